"""Trajectories as an E-step sees them: `samples` of each data point, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What policies and model say of `samples` trajectories of each data point.

    Attributes:
        log_joint: log p(x, z) of their ends, without gradient.
        log_forward: log P_F of each action, differentiable; 0 behind the exit.
        log_backward: log P_B of undoing each action, differentiable where P_B is learned.
        exits: the step at which trajectories of each data point take the exit, the last action.
        flows: gives the learned part of the log flow of the state before each action, and the part
            of log p(x, z) that this state has fixed, both [steps, batch * samples]; not every
            objective asks for them. The state before the exit has flow p(x, z), so there the
            learned part is 0.
    """

    log_joint: Float[Tensor, "batch samples"]
    log_forward: Float[Tensor, "steps batch samples"]
    log_backward: Float[Tensor, "steps batch samples"]
    exits: Int[Tensor, "batch"]
    flows: Callable[[], tuple[Tensor, Tensor]]

    @property
    def log_weights(self) -> Float[Tensor, "batch samples"]:
        """log p(x, z) + log P_B - log P_F: the mean of exp of it is p(x)."""
        return self.log_joint + (self.log_backward - self.log_forward).sum(0)

    @property
    def step(self) -> Int[Tensor, "steps 1"]:
        """The number of each step, beside `exits`."""
        return torch.arange(len(self.log_forward), device=self.exits.device)[:, None]

    @property
    def is_exit(self) -> Bool[Tensor, "steps batch 1"]:
        return (self.step == self.exits)[..., None]

    @property
    def is_action(self) -> Bool[Tensor, "steps batch 1"]:
        """Which steps a trajectory has: those up to the exit."""
        return (self.step <= self.exits)[..., None]

    def log_flows(self, forward_looking: bool) -> Float[Tensor, "steps batch samples"]:
        """Return the log flow of the state before each action.

        Args:
            forward_looking: whether to add what is fixed of log p(x, z) (arXiv 2302.01687);
                otherwise only that of the complete state is added.
        """
        learned, fixed = self._split_flows()
        return learned + (fixed if forward_looking else torch.where(self.is_exit, fixed, 0.0))

    @staticmethod
    def join(parts: Sequence[Scores]) -> Scores:
        """Put groups of trajectories of the same data points side by side."""
        if len(parts) == 1:
            return parts[0]

        def flows() -> tuple[Tensor, Tensor]:
            learned, fixed = zip(*(part._split_flows() for part in parts), strict=True)
            return torch.cat(learned, 2).flatten(1), torch.cat(fixed, 2).flatten(1)

        return Scores(
            log_joint=torch.cat([part.log_joint for part in parts], 1),
            log_forward=torch.cat([part.log_forward for part in parts], 2),
            log_backward=torch.cat([part.log_backward for part in parts], 2),
            exits=parts[0].exits,
            flows=flows,
        )

    def _split_flows(
        self,
    ) -> tuple[Float[Tensor, "steps batch samples"], Float[Tensor, "steps batch samples"]]:
        learned, fixed = self.flows()
        shape = self.log_joint.shape
        return learned.unflatten(1, shape), fixed.unflatten(1, shape)


@dataclass(frozen=True, kw_only=True)
class Paths(Scores):
    """Trajectories and where they end.

    Attributes:
        z: where they end.
        record: what the policy needs to make torchgfn trajectories of them.
        model_log_joint: log_joint again, differentiable in the model, where gradients are wanted
            and the policy keeps what they need: M-steps do not compute it twice then.
    """

    z: Any
    record: Any
    model_log_joint: Float[Tensor, "batch samples"] | None = None
