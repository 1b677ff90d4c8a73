"""What rating a model needs, whatever its task."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn


@contextmanager
def inference(*modules: nn.Module) -> Iterator[None]:
    """Without gradients and in evaluation mode; modules are left in the mode they were in."""
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.train(mode)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is; the CPU for one without tensors."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def log_mean_exp(log_weights: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch"]:
    """The importance-weighted estimate of log p(x), on average a lower bound."""
    return log_weights.logsumexp(-1) - math.log(log_weights.shape[-1])
