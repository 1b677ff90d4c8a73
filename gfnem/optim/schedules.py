"""Coefficients of an update: numbers, or functions of the steps done."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from gfnem.errors import UserError

# A function is called with the number of steps that were done before. With lazy momentum that is a
# tensor of the rows' own numbers, so the function must be one of tensors, too, element by element.
Coefficient = float | Callable[[Any], Any]


class Coefficients(NamedTuple):
    """What one update multiplies with, numbers or [rows, 1, ..., 1].

    y' = keep y + gamma1 g;  theta' = (1 - shrink) theta - gamma2 g - gamma3 y'.
    """

    keep: Any
    gamma1: Any
    gamma2: Any
    gamma3: Any
    shrink: Any


@dataclass(frozen=True)
class PowerLaw:
    """Give max(init (1 + t / scale)^power, floor) after t steps.

    Example:
        >>> PowerLaw(init=1.0, power=-1.0, scale=8.0)(8)
        0.5

    Args:
        init: the value at t = 0.
        power: from -10 to 10, below 0 where the value falls.
        scale: steps after which it begins to move, above 0.
        floor: the least value.

    Raises:
        UserError: for a scale that is not above 0 and for another power.
    """

    init: float
    power: float
    scale: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise UserError(f"scale is {self.scale}; it must be above 0")
        if abs(self.power) > 10:
            raise UserError(f"power is {self.power}; it must lie between -10 and 10")

    def __call__(self, t: Any) -> Any:
        value = self.init * (1 + t / self.scale) ** self.power
        if isinstance(value, Tensor):
            return value.clamp(min=self.floor)
        return max(value, self.floor)


def value_at(coefficient: Coefficient, t: Any) -> Any:
    """The value of a coefficient after t steps, a number or a tensor as t is."""
    return coefficient(t) if callable(coefficient) else coefficient


def dana_constant(
    batch: float, dimension: float, trace: float, delta: float = 8.0
) -> dict[str, Coefficient]:
    """Give the coefficients of DANA-constant (arXiv 2505.16098).

    gamma1 = 1, gamma2 = min(1, B / Tr) / 2, gamma3 = 0.1 (B / d) min(1, B / Tr) and
    decay = delta / (delta + t).

    Example:
        >>> from torch import nn
        >>> from gfnem.optim import DANA
        >>> given = dana_constant(batch=2, dimension=64, trace=1.6)
        >>> optimizer = DANA(nn.Linear(64, 1).parameters(), **given)

    Args:
        batch: B, data points in a step.
        dimension: d, the number of parameters. 1 where DANA divides by the layers' sizes itself.
        trace: Tr, the sum of the eigenvalues of the data's covariance.
        delta: steps over which the momentum begins to lengthen; more than about
            4 + 2 (alpha + beta) / (2 alpha) for the exponents of data and target.

    Raises:
        UserError: for a number that is not above 0.
    """
    _check_positive(batch=batch, dimension=dimension, trace=trace, delta=delta)
    share = min(1.0, batch / trace)
    return _published(share, 0.1 * batch / dimension * share, delta)


def dana_decaying(
    batch: float, dimension: float, trace: float, alpha: float, delta: float = 8.0
) -> dict[str, Coefficient]:
    """Give the coefficients of DANA-decaying (arXiv 2505.16098).

    As in `dana_constant`, but gamma3 = 0.1 min(1, B / Tr) (1 + t)^(-(1 - h) / (2 alpha)), where h
    is what makes B = d^h.

    Args:
        batch: B, data points in a step.
        dimension: d, the number of parameters, above 1.
        trace: Tr, the sum of the eigenvalues of the data's covariance.
        alpha: of the eigenvalues, the j-th being about j^(-2 alpha).
        delta: steps over which the momentum begins to lengthen.

    Raises:
        UserError: for a number that is not above 0, and for a dimension that is not above 1.
    """
    _check_positive(batch=batch, trace=trace, alpha=alpha, delta=delta)
    if not dimension > 1:
        raise UserError(f"dimension is {dimension}; it must be above 1")
    share = min(1.0, batch / trace)
    h = math.log(batch) / math.log(dimension)
    return _published(share, PowerLaw(0.1 * share, -(1 - h) / (2 * alpha)), delta)


def _published(share: float, gamma3: Coefficient, delta: float) -> dict[str, Coefficient]:
    return {
        "decay": PowerLaw(init=1.0, power=-1.0, scale=delta),
        "gamma1": 1.0,
        "gamma2": share / 2,
        "gamma3": gamma3,
    }


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise UserError(f"{name} is {number}; it must be above 0")
