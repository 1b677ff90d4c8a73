"""Policies that make one choice after the other, equally many for every data point."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from gfn.containers import Trajectories
from gfn.env import DiscreteEnv
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.gflownet.paths import Paths
from gfnem.gflownet.policy import ON_POLICY, Behaviour, NumberedPolicy
from gfnem.gflownet.trajectories import trajectories_of_choices


class SequencePolicy(NumberedPolicy):
    """z is a number of choices, `z.index`, that are made in order: the state graph is a tree, so
    P_B = 1, and q(z | x) the product of P_F.

    Conditions have the batch `x` and the `model`.
    """

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps
        self._envs: dict[str, DiscreteEnv] = {}

    @abstractmethod
    def make_env(self, device: torch.device) -> DiscreteEnv:
        """The states and actions for torchgfn."""

    @abstractmethod
    def actions(self, choices: Int[Tensor, "rows steps"]) -> Int[Tensor, "rows steps"]:
        """Numbers of choices among the environment's actions."""

    @abstractmethod
    def latents(self, index: Int[Tensor, "batch samples steps"]) -> Any:
        """z of given choices."""

    @abstractmethod
    def _draw(
        self,
        condition: Any,
        samples: int,
        behaviour: Behaviour,
        kept: Int[Tensor, "batch samples before"] | None = None,
    ) -> Int[Tensor, "batch samples steps"]:
        """Draw all choices, or those behind the ones kept, without gradients."""

    @abstractmethod
    def _log_probabilities(
        self,
        condition: Any,
        index: Int[Tensor, "batch samples steps"],
        temperature: float = 1.0,
    ) -> Float[Tensor, "batch samples steps"]:
        """log q of each choice given those before it."""

    @abstractmethod
    def _flows(
        self,
        condition: Any,
        index: Int[Tensor, "batch samples steps"],
        log_joint: Float[Tensor, "batch samples"],
    ) -> tuple[Float[Tensor, "states rows"], Float[Tensor, "states rows"]]:
        """As in `Scores.flows`."""

    def sample(self, condition: Any, samples: int, behaviour: Behaviour = ON_POLICY) -> Paths:
        return self._paths(condition, self._draw(condition, samples, behaviour))

    def retrace(self, condition: Any, z: Any) -> Paths:
        return self._paths(condition, z.index)

    def numbers(self, z: Any) -> Int[Tensor, "batch samples steps"]:
        return z.index

    def from_numbers(self, condition: Any, numbers: Int[Tensor, "batch samples steps"]) -> Any:
        return self.latents(numbers)

    def log_forward(self, condition: Any, z: Any) -> Float[Tensor, "batch samples"]:
        return self._log_probabilities(condition, z.index).sum(-1)

    @torch.no_grad()
    def regrow(
        self, condition: Any, z: Any, depth: int, temperature: float = 1.0
    ) -> tuple[Paths, Paths]:
        keep = max(self.steps - depth, 0)
        kept = z.index[..., :keep]
        new = self._draw(condition, z.index.shape[1], Behaviour(temperature), kept)
        old, grown = (
            self._paths(condition, index, temperature, score_from=keep) for index in (z.index, new)
        )
        return old, grown

    def trajectories(self, condition: Any, paths: Paths) -> Trajectories:
        choices = paths.record.flatten(0, 1)
        device = str(choices.device)
        if device not in self._envs:
            self._envs[device] = self.make_env(choices.device)
        return trajectories_of_choices(
            self._envs[device], choices, self.actions(choices).t(), paths
        )

    def _paths(
        self,
        condition: Any,
        index: Int[Tensor, "batch samples steps"],
        temperature: float = 1.0,
        score_from: int = 0,
    ) -> Paths:
        """score_from: choices before it get log P_F of 0."""
        log_q = self._log_probabilities(condition, index, temperature).movedim(-1, 0)
        none = torch.zeros_like(log_q[:1])
        forward = torch.cat([none.expand(score_from, -1, -1), log_q[score_from:], none])
        z = self.latents(index)
        with torch.no_grad():
            log_joint = condition.model.log_joint(condition.x, z)
        return Paths(
            z=z,
            log_joint=log_joint,
            log_forward=forward,
            log_backward=torch.zeros_like(forward),
            exits=index.new_full((len(index),), self.steps),
            flows=lambda: self._flows(condition, index, log_joint),
            record=index,
        )
