"""The posterior: q(z | x), trained in the E-step and sampled for the M-step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gfnem.errors import UserError
from gfnem.latents import EStep, Latents, LatentTable
from gfnem.model import LatentVariableModel


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
        return model.expected_log_joint(x, self.m_step_latents(model, x, latents))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters for a torch optimizer; empty where nothing is learned."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [{"params": parameters}] if parameters else []

    def sampling_parameters(self) -> list[nn.Parameter]:
        """The learned parameters that q's draws depend on."""
        return [p for p in self.parameters() if p.requires_grad]
