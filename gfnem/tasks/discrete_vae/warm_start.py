"""Runs that begin with another way of training the same encoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gfnem.errors import UserError
from gfnem.latents import EStep, Latents, LatentTable
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.tasks.discrete_vae.images import Images
from gfnem.tasks.discrete_vae.importance import choose_temperature
from gfnem.tasks.discrete_vae.model import DiscreteVAE
from gfnem.tasks.discrete_vae.policy import GridPolicy


class WarmStart(Posterior):
    """One posterior for the first steps of a run, another from then on, with the same policy.

    When the second takes over, the policy's base logits are scaled so that they propose well: the
    distances of a VQ-VAE say nothing of how sure they are.

    start: makes the first posterior of the policy.
    then: the second.
    steps: E-steps of the first.
    """

    def __init__(
        self, start: Callable[[GridPolicy], Posterior], then: Posterior, steps: int = 1000
    ):
        super().__init__()
        if steps < 1:
            raise UserError(f"warm_start.steps is {steps}; it must be at least 1")
        policy: Any = getattr(then, "policy", None)
        if policy is None:
            raise UserError(
                f"warm_start begins with an encoder, and {type(then).__name__} has none to go on "
                "with: leave warm_start out"
            )
        self.policy: GridPolicy = policy
        self.start = start(policy)
        self.then = then
        self.steps = steps
        self.done: Tensor
        self.register_buffer("done", torch.zeros((), dtype=torch.long))

    @property
    def active(self) -> Posterior:
        """The one of the two that is being trained."""
        return self.start if int(self.done) < self.steps else self.then

    @property
    def joint(self) -> bool:
        return self.active.joint

    @property
    def closed_m_step(self) -> bool:
        # The first learns in one step with the model.
        return self.then.closed_m_step

    @property
    def deterministic(self) -> bool:
        return getattr(self.active, "deterministic", False)

    @property
    def m_step_samples(self) -> int:
        return self.active.m_step_samples

    def check(self, model: LatentVariableModel) -> None:
        self.start.check(model)
        self.then.check(model)

    def tabulate(self, model: LatentVariableModel, x: Images) -> LatentTable | None:
        return self.active.tabulate(model, x)

    def e_step(self, model: DiscreteVAE, x: Images) -> EStep:
        if int(self.done) == self.steps:
            self._take_over(model, x)
        active = self.active
        if int(self.done) <= self.steps:
            self.done += 1
        return active.e_step(model, x)

    @torch.no_grad()
    def _take_over(self, model: DiscreteVAE, x: Images) -> None:
        if self.policy.log_beta is not None:
            self.policy.log_beta.sub_(math.log(choose_temperature(self.policy, model, x)))

    def sample(self, model: DiscreteVAE, x: Images, samples: int) -> Latents:
        return self.active.sample(model, x, samples)

    def refine(self, model: DiscreteVAE, x: Images, latents: Latents) -> Latents:
        return self.active.refine(model, x, latents)

    def expected_log_joint(
        self, model: DiscreteVAE, x: Images, latents: Latents | None = None
    ) -> Tensor:
        return self.active.expected_log_joint(model, x, latents)

    def parameter_groups(self) -> list[dict[str, Any]]:
        # Both train the policy; what the first has besides learns without gradients.
        return self.then.parameter_groups()
