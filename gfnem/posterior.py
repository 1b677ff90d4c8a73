"""The posterior: q(z | x), trained in the E-step and sampled for the M-step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gfnem.errors import UserError
from gfnem.model import LatentVariableModel


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

    def expected_log_joint(self, model: LatentVariableModel, x: Any) -> Float[Tensor, "batch"]:
        """The mean of log p(x, z), differentiable in the model; not computed where it is known."""
        return self.mean(model.log_joint(x, self.z) if self.log_joint is None else self.log_joint)


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
    """

    loss: Float[Tensor, ""] | None
    latents: Latents | None
    metrics: Mapping[str, float | Tensor] = field(default_factory=dict)


def check_m_step(m_step: str, known: Sequence[str] = ("gradient", "closed")) -> None:
    """Raises UserError for no way of a posterior to make M-steps."""
    if m_step not in known:
        *others, last = map(repr, known)
        raise UserError(f"posterior.m_step is {m_step!r}; use {', '.join(others)} or {last}")


class Posterior(nn.Module, ABC):
    """q(z | x).

    m_step: how M-steps are made with it; "closed" is to the maximum at once.
    """

    m_step: str = "gradient"

    @property
    def joint(self) -> bool:
        """Whether E- and M-step are one: the loss of `e_step` trains the model as well.

        So it is where gradients pass through the model on their way to q.
        """
        return False

    @property
    def closed_m_step(self) -> bool:
        """Whether M-steps go to the maximum at once, for a model that knows it.

        Otherwise each is a step along the gradient of `expected_log_joint`.
        """
        return self.m_step == "closed"

    def check(self, model: LatentVariableModel) -> None:
        """Raises UserError for a model that this posterior cannot be used with."""

    @abstractmethod
    def e_step(self, model: LatentVariableModel, x: Any) -> EStep:
        """The loss that brings q closer to p(z | x).

        Gradients never reach the model, unless the posterior is `joint`.
        """

    @abstractmethod
    def sample(self, model: LatentVariableModel, x: Any, samples: int) -> Latents:
        """Plain draws of q with their importance weights, without gradients."""

    def tabulate(self, model: LatentVariableModel, x: Any) -> LatentTable | None:
        """p and q of every z, without gradients; None for a posterior that does not do it.

        Raises UserError where there are too many.
        """
        return None

    def refine(self, model: LatentVariableModel, x: Any, latents: Latents) -> Latents:
        """Latents for the M-step made of plain draws; here the draws themselves."""
        return latents

    @property
    def m_step_samples(self) -> int:
        """Latents of each data point in an M-step."""
        return 1

    @torch.no_grad()
    def m_step_latents(
        self, model: LatentVariableModel, x: Any, latents: Latents | None = None
    ) -> Latents:
        """What an M-step learns from.

        latents: draws of q for x where they are at hand; fresh ones otherwise.
        """
        if latents is None:
            latents = self.sample(model, x, self.m_step_samples)
        return self.refine(model, x, latents)

    def expected_log_joint(
        self, model: LatentVariableModel, x: Any, latents: Latents | None = None
    ) -> Float[Tensor, "batch"]:
        """E_q[log p(x, z)], what the M-step climbs; differentiable in the model alone.

        latents: as for `m_step_latents`.
        """
        return self.m_step_latents(model, x, latents).expected_log_joint(model, x)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters for a torch optimizer; empty where nothing is learned."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [{"params": parameters}] if parameters else []

    def sampling_parameters(self) -> list[nn.Parameter]:
        """The learned parameters that q's draws depend on."""
        return [p for p in self.parameters() if p.requires_grad]
