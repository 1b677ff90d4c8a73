"""Latents of a batch of data points, and what an E-step gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Latents:
    """Latents drawn for a batch of data.

    z: `samples` latents for each data point.
    log_weights: log of importance weights w with E_q[w] = p(x): for a GFlowNet
        log p(x, z) + log P_B(trajectory | z) - log P_F(trajectory | x). None for latents that are
        no plain draws any more.
    m_step_weights: how much each latent counts in the M-step, summing to 1 for each data point;
        None for equal weights.
    log_joint: log p(x, z), differentiable in the model as long as that has not moved; None where
        drawing them did not need it.
    """

    z: Any
    log_weights: Float[Tensor, "batch samples"] | None
    m_step_weights: Float[Tensor, "batch samples"] | None = None
    log_joint: Float[Tensor, "batch samples"] | None = None

    def mean(self, values: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch"]:
        """Of a value of each latent, as much as it counts in the M-step."""
        if self.m_step_weights is None:
            return values.mean(-1)
        return (self.m_step_weights * values).sum(-1)


@dataclass(frozen=True)
class LatentTable:
    """Every latent of each data point. A column may be another's repetition, or be no latent of
    this data point: then both entries are -inf.

    log_joint: log p(x, z).
    log_q: log q(z | x), exact.
    """

    log_joint: Float[Tensor, "batch latents"]
    log_q: Float[Tensor, "batch latents"]


@dataclass(frozen=True)
class EStep:
    """What one E-step on one batch gives.

    loss: to be minimised in q's parameters; None for a posterior without any.
    latents: the latents it was trained on where they are draws of q, for an M-step on the same
        batch; None otherwise.
    metrics: figures worth logging; tensors of them hold one number.
    objective: the part of the loss that tells how far q is from p(z | x), by which schedules go;
        None where that is all of it.
    """

    loss: Float[Tensor, ""] | None
    latents: Latents | None
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)
    objective: Float[Tensor, ""] | None = None
