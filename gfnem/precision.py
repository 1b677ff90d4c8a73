"""The numbers that a network computes with: float32, or bfloat16 in autocast."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import nn

from gfnem.errors import UserError

Precision = Literal["float32", "bfloat16"]
MatmulPrecision = Literal["highest", "high", "medium"]

logger = logging.getLogger(__name__)


def check_precision(owner: str, precision: str) -> None:
    """owner: the group of the configuration that has the option.

    Raises UserError for a precision that is none.
    """
    if precision not in ("float32", "bfloat16"):
        raise UserError(f"{owner}.precision is {precision!r}; use 'float32' or 'bfloat16'")


def in_precision(network: nn.Module, precision: Precision) -> torch.autocast:
    """A context that runs a network's layers in a precision."""
    device = next(network.parameters()).device.type
    if precision == "bfloat16" and device == "cpu" and not cpu_has_bfloat16():
        _warn_once()
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")


def training_precision(network: nn.Module, precision: Precision) -> torch.autocast:
    """A context that runs layers in a precision while the network is in training mode."""
    return in_precision(network, precision if network.training else "float32")


def cpu_has_bfloat16() -> bool:
    """Whether bfloat16 is faster than float32 on this machine's CPU."""
    # Without oneDNN, the operator does not exist.
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def _warn_once() -> None:
    logger.warning(
        "this CPU has no instructions for bfloat16, which takes many times as long as float32: "
        "choose precision=float32 for the model and the policy"
    )


def check_matmul_precision(precision: str) -> None:
    """Raise UserError for a precision of training that is none."""
    if precision not in ("highest", "high", "medium"):
        raise UserError(f"em.matmul_precision is {precision!r}; use 'highest', 'high' or 'medium'")


@contextmanager
def matmul_precision(precision: MatmulPrecision) -> Iterator[None]:
    """Of products of float32 matrices; see `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
