"""Losses of a balance's residual t = log(model / target).

g(t) is 0 at t = 0 and positive elsewhere. Where trajectories are draws of P_F and t is the residual
of a whole trajectory, with log Z(x) at its optimum, the expected gradient is that of a divergence
between P_F and the target p(z | x) P_B (arXiv 2410.02596).
"""

from __future__ import annotations

import math
from typing import Literal

from gfn.gflownet.losses import LinexLoss, RegressionLoss, ShiftedCoshLoss, SquaredLoss
from jaxtyping import Float
from torch import Tensor

from gfnem.errors import UserError

Loss = Literal["squared", "linex", "shifted_cosh"]

# Behind it exponentials go on along their tangents, so that any residual has a finite gradient that
# points to balance. torchgfn's clamp takes the exponential's gradient away there.
LARGEST_EXPONENT = 20.0


class Linex(LinexLoss):
    """g(t) = (exp(-alpha t) + alpha t - 1) / alpha^2.

    alpha = 1 is the forward KL(target || P_F), which avoids zeros, alpha = -1 half of
    chi^2(P_F || target), which forces them. torchgfn's alpha has the opposite sign: its
    documentation counts residuals as log(target / model), its objectives as log(model / target).
    """

    def __call__(self, residuals: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        exponent = -self.alpha * residuals
        return (_expm1(exponent) - exponent) / self.alpha**2


class ShiftedCosh(ShiftedCoshLoss):
    """g(t) = exp(t) + exp(-t) - 2, the sum of `Linex` at alpha = 1 and at alpha = -1."""

    def __call__(self, residuals: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return _expm1(residuals) + _expm1(-residuals)


def make_loss(loss: Loss, alpha: float) -> RegressionLoss:
    """The loss of a name. alpha: of linex alone."""
    if loss == "squared":
        return SquaredLoss()
    if loss == "linex":
        if alpha == 0 or not math.isfinite(alpha):
            raise UserError(f"objective.alpha is {alpha}; it must be a finite number but 0")
        return Linex(alpha)
    if loss == "shifted_cosh":
        return ShiftedCosh()
    raise UserError(f"objective.loss is {loss!r}; use 'squared', 'linex' or 'shifted_cosh'")


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, continued along its tangent."""
    beyond = (x - LARGEST_EXPONENT).clamp(min=0)
    return x.clamp(max=LARGEST_EXPONENT).expm1() + math.exp(LARGEST_EXPONENT) * beyond
