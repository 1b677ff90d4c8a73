"""Policies that build latents step by step, and their trajectories."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from gfn.containers import Trajectories
from gfn.estimators import Estimator
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.categorical import drawable
from gfnem.errors import UserError
from gfnem.gflownet.paths import Paths
from gfnem.latents import LatentTable
from gfnem.model import LatentVariableModel


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
    def trajectories(self, condition: Any, paths: Paths) -> Trajectories:
        """Make torchgfn trajectories of paths."""

    @abstractmethod
    def estimators(self, condition: Any) -> tuple[Estimator, Estimator]:
        """Make torchgfn estimators of P_F and P_B, which may be asked about any state."""

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
