"""Importance sampling of log p(x), the same for whatever proposes codes."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gfnem.inference import log_mean_exp
from gfnem.tasks.discrete_vae.codes import Codes
from gfnem.tasks.discrete_vae.images import Images
from gfnem.tasks.discrete_vae.model import DiscreteVAE
from gfnem.tasks.discrete_vae.policy import GridPolicy

# Grids drawn at a time, fewer where their images would hold more numbers than the second: grids
# that all are the same are rated in one go, and some likelihoods need every pixel of every pair.
CHUNK, NUMBERS = 16384, 2**24
# Temperatures are looked for in steps of these factors, up to the range's ends.
COARSE, FINE = 4.0, 2**0.5
COLDEST, HOTTEST = 4.0**-5, 4.0**5
# Of an image's weights: what draws that are decoded in bfloat16 alone may make up. Rounding moves
# them by a tenth or so, and the estimate of log p(x) by that much of this.
NEGLIGIBLE = 1e-3


@torch.no_grad()
def log_weights(
    policy: GridPolicy, model: DiscreteVAE, x: Images, samples: int, temperature: float = 1.0
) -> Float[Tensor, "batch samples"]:
    """log p(x, z) - log q(z | x) in nats, for z drawn from q at a temperature.

    The mean of exp of it is p(x). Grids that repeat among an image's draws are decoded once. Where
    the model trains in bfloat16, all draws are first decoded in it, and in float32 those that make
    up nearly all of the weight.
    """
    condition = policy.condition(model, x)
    parts = []
    most = max(min(CHUNK, NUMBERS // math.prod(model.image_shape)) // max(len(x), 1), 1)
    while samples > 0:
        z, log_q = policy.draw(condition, min(samples, most), temperature)
        parts.append(_log_joint(model, x, z, log_q) - log_q)
        samples -= most
    return torch.cat(parts, 1)


def _log_joint(
    model: DiscreteVAE, x: Images, z: Codes, log_q: Float[Tensor, "batch samples"]
) -> Float[Tensor, "batch samples"]:
    """log p(x, z), in bfloat16 where that matters to no estimate and the model trains in it."""
    if model.precision == "float32":
        return model.log_joint(x, z)
    grids = z.index.flatten(0, 1)
    image = torch.arange(len(x), device=grids.device).repeat_interleave(z.index.shape[1])
    log_prior = model.log_prior(grids)
    log_joint = log_prior + model.log_reconstruction_of(x, image, grids, "bfloat16")
    weights, order = (log_joint.view_as(log_q) - log_q).softmax(-1).sort(-1)
    weighty = torch.empty_like(order, dtype=torch.bool)
    weighty.scatter_(1, order, weights.cumsum(-1) > NEGLIGIBLE)
    again = weighty.flatten().nonzero().squeeze(-1)
    log_joint[again] = log_prior[again] + model.log_reconstruction_of(x, image[again], grids[again])
    return log_joint.view_as(log_q)


def effective_samples(log_weights: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch"]:
    """1 / sum of the squared self-normalised weights."""
    return 1 / log_weights.softmax(-1).square().sum(-1)


def choose_temperature(
    policy: GridPolicy, model: DiscreteVAE, x: Images, samples: int = 16
) -> float:
    """The proposal's temperature with the best mean bound on given images.

    Climbs in coarse steps from 1, then in fine ones.
    """

    def bound(temperature: float) -> float:
        return float(log_mean_exp(log_weights(policy, model, x, samples, temperature)).mean())

    best, value = 1.0, bound(1.0)
    for factor in (COARSE, FINE):
        start = best
        for direction in (factor, 1 / factor):
            temperature = start * direction
            while COLDEST <= temperature <= HOTTEST:
                there = bound(temperature)
                if there <= value:
                    break
                best, value = temperature, there
                temperature *= direction
    return best
