"""A conditional GFlowNet as posterior: q(z | x) is where its trajectories end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from gfn.env import DiscreteEnv
from gfn.estimators import Estimator
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.errors import UserError
from gfnem.model import LatentVariableModel
from gfnem.objectives import Objective, ScoredTrajectories, WeightedSum, vargrad
from gfnem.posterior import EStep, Latents, LatentTable, Posterior, check_m_step
from gfnem.posteriors.refinement import Refinement


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
    """

    z: Any
    log_joint: Float[Tensor, "batch samples"]
    log_forward: Float[Tensor, "steps batch samples"]
    log_backward: Float[Tensor, "steps batch samples"]
    flows: Callable[[], tuple[Tensor, Tensor]]
    record: Any

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


def trajectories_of_choices(
    env: DiscreteEnv,
    choices: Int[Tensor, "rows steps"],
    actions: Int[Tensor, "steps rows"],
    paths: Paths,
) -> ScoredTrajectories:
    """Paths that make one choice after the other, then exit, as torchgfn trajectories.

    A state holds the choices made, and -1 where there is none yet. The states' conditions are the
    rows of the data points in their batch.
    """
    steps = choices.shape[1]
    step = torch.arange(steps + 2, device=choices.device)[:, None, None]
    states = torch.where(torch.arange(steps, device=choices.device) < step, choices, -1)
    states = torch.where(step > steps, env.sf, states)
    leave = torch.full_like(actions[:1], env.n_actions - 1)
    batch, samples = paths.log_joint.shape
    point = torch.arange(batch, device=choices.device).repeat_interleave(samples)
    conditions = point[:, None].to(torch.get_default_dtype())
    return ScoredTrajectories(
        env=env,
        states=env.States(states, conditions=conditions.expand(len(states), -1, -1)),
        actions=env.actions_from_tensor(torch.cat([actions, leave])[..., None]),
        terminating_idx=torch.full_like(point, steps + 1),
        log_rewards=paths.log_joint.flatten(),
        log_probs=paths.log_forward.flatten(1),
        log_pb=paths.log_backward.flatten(1),
        flows=paths.flows,
    )


class GFlowNetPosterior(Posterior):
    """q(z | x) of a conditional GFlowNet (arXiv 2302.06576).

    policy: the task's policy.
    objective: a factory of `gfnem.objectives`, called with the policy's estimators.
    samples: trajectories of each data point in an E-step, and latents in an M-step.
    behaviour: how the E-step's trajectories are drawn; the M-step's are always plain draws.
    sleep: probability that an E-step has a sleep phase beside what the objective asks for: latents
        and data are drawn from the model and -log P_F of a trajectory from P_B is minimised.
    sleep_samples: data points drawn for a sleep phase.
    refinement: what makes the M-step's latents of plain draws; None takes the draws.
    flow_lr: learning rate of log Z(x) and the state flows; None for the optimizer's own.
    m_step: "gradient", or "closed" for a model that knows where log p(x, z) of the latents is
        largest: M-steps go there at once.
    """

    def __init__(
        self,
        policy: Policy,
        objective: Objective = vargrad,
        samples: int = 4,
        behaviour: Behaviour = ON_POLICY,
        sleep: float = 0.0,
        sleep_samples: int = 32,
        refinement: Refinement | None = None,
        flow_lr: float | None = None,
        m_step: Literal["gradient", "closed"] = "gradient",
    ):
        super().__init__()
        check_m_step(m_step)
        if samples < 1:
            raise UserError(f"posterior.samples is {samples}; it must be at least 1")
        if not 0 <= sleep <= 1:
            raise UserError(f"posterior.sleep is {sleep}; it is a probability")
        self.policy = policy
        # No submodule: torchgfn objectives own their estimators, but the policy's parameters
        # belong here.
        self.objective = WeightedSum.of(objective(*policy.estimators()))
        for part, _ in self.objective.wake:
            if samples < part.least_samples:
                raise UserError(
                    f"posterior.samples is {samples}; objective={part.name} needs at least "
                    f"{part.least_samples}"
                )
            if not (part.off_policy or behaviour.on_policy):
                raise UserError(
                    f"posterior.behaviour has temperature={behaviour.temperature} and "
                    f"epsilon={behaviour.epsilon}; objective={part.name} needs plain draws of the "
                    "policy: set temperature=1 and epsilon=0"
                )
        self.samples = samples
        self.behaviour = behaviour
        self.sleep = sleep
        self.sleep_samples = sleep_samples
        self.refinement = refinement
        self.flow_lr = flow_lr
        self.m_step = m_step

    @property
    def m_step_samples(self) -> int:
        return self.samples

    def check(self, model: LatentVariableModel) -> None:
        self.policy.check(model)
        if (self.sleep > 0 or self.objective.sleep > 0) and not model.normalised:
            raise UserError(
                f"a sleep phase learns from draws of the {type(model).__name__} alone, without its "
                "tree_prior: set posterior.sleep=0 and take an objective without a sleep phase, or "
                "set tree_prior=none"
            )

    def e_step(self, model: LatentVariableModel, x: Any) -> EStep:
        """The loss that brings q closer to p(z | x); see `Posterior.e_step`.

        Raises UserError where the sleep phase is all there is and none of the model's draws fit.
        """
        step = self._wake(model, x) if self.objective.wake else EStep(loss=None, latents=None)
        weight = self.objective.sleep
        if self.sleep > 0 and float(torch.rand(())) < self.sleep:
            weight += 1
        sleep_loss = self.sleep_loss(model) if weight > 0 else None
        if sleep_loss is None:
            if step.loss is None:
                raise UserError(
                    f"posterior.sleep_samples is {self.sleep_samples}, but none of the model's "
                    "draws fits and objective=sleep learns from nothing else: draw more, or use an "
                    "objective that learns from the data too"
                )
            return step
        loss = weight * sleep_loss
        return replace(
            step,
            loss=loss if step.loss is None else step.loss + loss,
            metrics={**step.metrics, "e_step/sleep": sleep_loss.detach()},
        )

    def _wake(self, model: LatentVariableModel, x: Any) -> EStep:
        """What the objective says of trajectories of x."""
        condition = self.policy.condition(model, x)
        paths = self.policy.sample(condition, self.samples, self.behaviour)
        trajectories = self.policy.trajectories(condition, paths)
        loss = paths.log_forward.new_zeros(())
        for part, weight in self.objective.wake:
            # torchgfn's base class does not declare what all its objectives take.
            objective: Any = part
            loss = loss + weight * objective.loss(
                trajectories.env,
                trajectories,
                recalculate_all_logprobs=False,
                log_rewards=paths.log_joint.flatten(),
            )
        log_weights = paths.log_weights.detach()
        weights = log_weights.softmax(-1)
        metrics = {
            "e_step/objective": loss.detach(),
            "e_step/effective_samples": (1 / weights.square().sum(-1)).mean(),
        }
        latents = Latents(paths.z, log_weights) if self.behaviour.on_policy else None
        return EStep(loss, latents, metrics)

    def sleep_loss(self, model: LatentVariableModel) -> Float[Tensor, ""] | None:
        """-log P_F of draws from the model; None when the model gave none that fit."""
        with torch.no_grad():
            x, z = model.sample(self.sleep_samples)
        if len(x) == 0:
            return None
        return -self.policy.log_forward(self.policy.condition(model, x), z).mean()

    @torch.no_grad()
    def sample(self, model: LatentVariableModel, x: Any, samples: int) -> Latents:
        paths = self.policy.sample(self.policy.condition(model, x), samples)
        return Latents(paths.z, paths.log_weights)

    @torch.no_grad()
    def tabulate(self, model: LatentVariableModel, x: Any) -> LatentTable | None:
        return self.policy.tabulate(self.policy.condition(model, x))

    def refine(self, model: LatentVariableModel, x: Any, latents: Latents) -> Latents:
        if self.refinement is None:
            return latents
        return self.refinement(self.policy, model, x, latents)

    def parameter_groups(self) -> list[dict[str, Any]]:
        flows = self.policy.flow_parameters()
        if self.flow_lr is None or not flows:
            return super().parameter_groups()
        return [{"params": self.sampling_parameters()}, {"params": flows, "lr": self.flow_lr}]

    def sampling_parameters(self) -> list[nn.Parameter]:
        """All but those of log Z(x) and the state flows."""
        flows = {id(p) for p in self.policy.flow_parameters()}
        return [p for p in self.parameters() if id(p) not in flows]
