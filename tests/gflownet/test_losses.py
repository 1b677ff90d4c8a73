from __future__ import annotations

from math import cosh, exp, inf, nan
from typing import Any

import pytest
import torch
from gfn.gflownet.losses import LinexLoss, ShiftedCoshLoss

from gfnem.errors import UserError
from gfnem.gflownet.losses import LARGEST_EXPONENT, make_loss


def value_and_slope(loss: Any, alpha: float, residual: float) -> tuple[float, float]:
    t = torch.tensor(residual, requires_grad=True)
    value = make_loss(loss, alpha)(t)
    value.backward()
    assert t.grad is not None
    return float(value.detach()), float(t.grad)


@pytest.mark.parametrize("t", [-3.0, -0.2, 0.0, 0.2, 3.0])
def test_losses_written_out(t):
    assert value_and_slope("squared", 1.0, t)[0] == pytest.approx(t**2)
    assert value_and_slope("shifted_cosh", 1.0, t)[0] == pytest.approx(
        2 * cosh(t) - 2, rel=1e-6, abs=1e-6
    )
    for alpha in (-1.0, 0.5, 1.0, 2.0):
        expected = (exp(-alpha * t) + alpha * t - 1) / alpha**2
        assert value_and_slope("linex", alpha, t)[0] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_torchgfn_s_alpha_has_the_opposite_sign():
    t = torch.linspace(-5, 5, 11)
    torch.testing.assert_close(make_loss("linex", 0.7)(t), LinexLoss(-0.7)(t), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss, alpha", [("linex", 1.0), ("linex", -1.0), ("shifted_cosh", 1.0)])
@pytest.mark.parametrize("t", [-1e4, -100.0, 100.0, 1e4])
def test_large_residuals_are_drawn_towards_balance(loss, alpha, t):
    value, slope = value_and_slope(loss, alpha, t)
    assert value > 0 and value < inf
    assert slope * t > 0
    assert abs(slope) < 2 * exp(LARGEST_EXPONENT)


def test_torchgfn_s_clamp_draws_large_residuals_away():
    t = torch.tensor(100.0, requires_grad=True)
    (slope,) = torch.autograd.grad(LinexLoss(1.0)(t), t)
    assert float(slope) < 0
    (slope,) = torch.autograd.grad(ShiftedCoshLoss()(t), t)
    assert float(slope) == 0


@pytest.mark.parametrize(
    "loss, alpha, message",
    [
        ("linex", 0.0, "objective.alpha is 0.0; it must be a finite number but 0"),
        ("linex", nan, "objective.alpha is nan; it must be a finite number but 0"),
        ("huber", 1.0, "objective.loss is 'huber'; use 'squared', 'linex' or 'shifted_cosh'"),
    ],
)
def test_losses_there_are_not(loss, alpha, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        make_loss(loss, alpha)
