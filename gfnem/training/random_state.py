"""The state of torch's random numbers, in checkpoints."""

from __future__ import annotations

from typing import Any

import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the generators that training on a device uses."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on from `random_state`, on that device or on another one."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
