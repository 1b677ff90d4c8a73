"""Policies that build latents step by step, and their trajectories."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gfn.env import DiscreteEnv
from gfn.estimators import Estimator
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.categorical import drawable
from gfnem.errors import UserError
from gfnem.gflownet.trajectories import ScoredTrajectories
from gfnem.latents import LatentTable
from gfnem.model import LatentVariableModel


@dataclass(frozen=True)
class Paths:
    """`samples` trajectories for each data point, step by step.

    z: where they end.
    log_joint: log p(x, z), without gradient.
    log_forward: log P_F of each action, differentiable; 0 behind the end.
    log_backward: log P_B of undoing each action.
    flows: gives the learned part of the log flow of the state before each action, and the part of
        log p(x, z) that this state has fixed, both [steps, batch * samples]; not every objective
        asks for them.
    record: what the policy needs to make torchgfn trajectories of them.
    model_log_joint: log_joint again, differentiable in the model, where gradients are wanted and
        the policy keeps what they need: M-steps do not compute it twice then.
    """

    z: Any
    log_joint: Float[Tensor, "batch samples"]
    log_forward: Float[Tensor, "steps batch samples"]
    log_backward: Float[Tensor, "steps batch samples"]
    flows: Callable[[], tuple[Tensor, Tensor]]
    record: Any
    model_log_joint: Float[Tensor, "batch samples"] | None = None

    @property
    def log_weights(self) -> Float[Tensor, "batch samples"]:
        """log p(x, z) + log P_B - log P_F: the mean of exp of it is p(x)."""
        return self.log_joint + (self.log_backward - self.log_forward).sum(0)


@dataclass(frozen=True)
class Behaviour:
    """How trajectories are drawn.

    temperature: actions are drawn from P_F^(1 / temperature), renormalised.
    epsilon: with this probability from the uniform distribution over the legal actions.
    """

    temperature: float = 1.0
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}; it must be positive")
        if not 0 <= self.epsilon <= 1:
            raise UserError(f"epsilon is {self.epsilon}; it must lie between 0 and 1")

    @property
    def on_policy(self) -> bool:
        return self.temperature == 1.0 and self.epsilon == 0.0

    def probabilities(
        self, logits: Float[Tensor, "*batch choices"]
    ) -> Float[Tensor, "*batch choices"]:
        """Of choices, of which those with a logit of -inf are illegal."""
        logits = drawable(logits)
        weights = (logits / self.temperature).softmax(-1)
        if self.epsilon > 0:
            uniform = logits.isfinite().to(weights.dtype)
            uniform = uniform / uniform.sum(-1, keepdim=True)
            weights = (1 - self.epsilon) * weights + self.epsilon * uniform
        return weights


ON_POLICY = Behaviour()


class Policy(nn.Module, ABC):
    """Forward and backward policy, flows and environment of one task.

    Every method takes the condition of a batch: all that depends on x and the model alone,
    computed once for each E-step.
    """

    def check(self, model: LatentVariableModel) -> None:
        """Raises UserError for a model that this policy cannot be used with."""

    @abstractmethod
    def condition(self, model: LatentVariableModel, x: Any) -> Any:
        """Encode a batch. Gradients reach this policy's parameters, never the model's."""

    @abstractmethod
    def sample(self, condition: Any, samples: int, behaviour: Behaviour = ON_POLICY) -> Paths:
        """Roll out; scores are those of the plain policy whatever the behaviour."""

    @abstractmethod
    def retrace(self, condition: Any, z: Any) -> Paths:
        """Trajectories that end in given latents, drawn from P_B."""

    def log_forward(self, condition: Any, z: Any) -> Float[Tensor, "batch samples"]:
        """log P_F of trajectories that end in given latents, drawn from P_B."""
        return self.retrace(condition, z).log_forward.sum(0)

    def tabulate(self, condition: Any) -> LatentTable | None:
        """p and q of every z, without gradients; None for a policy that does not do it.

        Raises UserError where there are too many.
        """
        return None

    @property
    def least_depth(self) -> int:
        """How many steps back a walk must go at least for its z to have others to lead to."""
        return 1

    @abstractmethod
    def regrow(
        self, condition: Any, z: Any, depth: int, temperature: float = 1.0
    ) -> tuple[Paths, Paths]:
        """Walk `depth` steps back from z with P_B, or to the start, then forward again.

        Returns the walked and the new trajectories. Their log_forward, of the tempered policy,
        and log_backward are 0 before the state where they part.
        """

    @abstractmethod
    def trajectories(self, condition: Any, paths: Paths) -> ScoredTrajectories:
        """The same paths as torchgfn trajectories."""

    @abstractmethod
    def estimators(self) -> tuple[Estimator, Estimator]:
        """P_F and P_B as torchgfn estimators that may be asked about any state."""

    @abstractmethod
    def flow_parameters(self) -> list[nn.Parameter]:
        """Parameters of log Z(x) and the state flows, which want a higher learning rate."""


class NumberedPolicy(Policy):
    """A policy of latents that can be told in whole numbers, none of them negative."""

    @abstractmethod
    def numbers(self, z: Any) -> Int[Tensor, "batch samples numbers"]:
        """Two of a data point are the same latent if and only if their numbers are the same.

        What the longest data point of a batch has more numbers than another counts as 0.
        """

    @abstractmethod
    def from_numbers(self, condition: Any, numbers: Int[Tensor, "batch samples numbers"]) -> Any:
        """z of given numbers."""


def trajectories_of_choices(
    env: DiscreteEnv,
    choices: Int[Tensor, "rows steps"],
    actions: Int[Tensor, "steps rows"],
    paths: Paths,
    count: Int[Tensor, "rows"] | None = None,
) -> ScoredTrajectories:
    """Paths that make one choice after the other, then exit, as torchgfn trajectories.

    A state holds the choices made, and -1 where there is none yet. The states' conditions are the
    rows of the data points in their batch, and behind them `count` where it is given.

    count: the choices of each row, the first of its `steps`; None for all of them.
    """
    steps = choices.shape[1]
    batch, samples = paths.log_joint.shape
    point = torch.arange(batch, device=choices.device).repeat_interleave(samples)
    conditions = [point] if count is None else [point, count]
    if count is None:
        count = torch.full_like(point, steps)
    step = torch.arange(steps + 2, device=choices.device)[:, None]
    made = torch.arange(steps, device=choices.device) < torch.minimum(step, count)[..., None]
    states = torch.where(made, choices, -1)
    states = torch.where((step > count)[..., None], env.sf, states)
    leave = torch.full_like(actions[:1], env.n_actions - 1)
    actions = torch.cat([actions, leave])
    actions = torch.where(step[:-1] == count, leave, actions)
    actions = torch.where(step[:-1] > count, env.dummy_action, actions)
    condition = torch.stack(conditions, -1).to(torch.get_default_dtype())
    return ScoredTrajectories(
        env=env,
        states=env.States(states, conditions=condition.expand(len(states), -1, -1)),
        actions=env.actions_from_tensor(actions[..., None]),
        terminating_idx=count + 1,
        log_rewards=paths.log_joint.flatten(),
        log_probs=paths.log_forward.flatten(1),
        log_pb=paths.log_backward.flatten(1),
        flows=paths.flows,
    )
