"""How much the gradient of an E-step depends on what was drawn in it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from gfnem.errors import UserError
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior


@torch.enable_grad()
def gradient_noise(
    model: LatentVariableModel, posterior: Posterior, x: Any, e_steps: int
) -> dict[str, float]:
    """Of the loss of E-steps on the same batch x, with the parameters as they are.

    Gradients g are those in the parameters that q's draws depend on.

    gradient_variance: E|g - E g|^2, unbiased. Losses of different objectives have different
        scales, so it cannot be compared between them.
    gradient_noise: gradient_variance / |mean of g|^2, which no scale changes. The mean's own noise
        is not taken off: the value is `e_steps` where gradients are nothing but noise. NaN where
        all gradients are zero.

    Torch's random numbers go on; whoever trains on them keeps them apart.

    Raises UserError for fewer than 2 E-steps and for a posterior that has none.
    """
    if e_steps < 2:
        raise UserError(
            f"evaluator.gradient_e_steps is {e_steps}; it must be at least 2, or null for none"
        )
    parameters = posterior.sampling_parameters()
    if not parameters:
        raise UserError(
            "evaluator.gradient_e_steps has no effect: the posterior has nothing to learn"
        )
    # A sleep phase counts what it draws in the model, which these draws are no part of.
    model = deepcopy(model)
    gradients = []
    for _ in range(e_steps):
        loss = posterior.e_step(model, x).loss
        assert loss is not None
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        gradients.append(torch.cat([part.flatten() for part in gradient]).double())
    all_gradients = torch.stack(gradients)
    variance = all_gradients.var(0).sum()
    signal = all_gradients.mean(0).square().sum()
    return {
        "gradient_variance": float(variance),
        "gradient_noise": float(variance / signal),
    }
