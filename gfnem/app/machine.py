"""What a run needs of the machine."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from gfnem.errors import UserError
from gfnem.memory import keep_freed_memory

MOST_THREADS = 1024  # of many more PyTorch crashes


def set_up(seed: int, threads: int | None, device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Seed all random numbers, set up the CPU's arithmetic and memory and choose the device."""
    keep_freed_memory()
    if threads is not None:
        if threads < 1:
            raise UserError(f"threads is {threads}; it must be at least 1")
        if threads > MOST_THREADS:
            raise UserError(f"threads is {threads}; it must be at most {MOST_THREADS}")
        torch.set_num_threads(threads)
    # Numbers below 1e-38, such as the odds of a pixel that is never on, take a CPU ten times as
    # long as others and change nothing. NumPy looks for the smallest ones before, and remembers.
    for precision in ("float32", "float64"):
        np.finfo(np.dtype(precision))
    torch.set_flush_denormal(True)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but no CUDA device can be used here: take device=cpu")
    torch.manual_seed(seed)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
