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
from gfnem.posteriors.refinement import BackAndForth, Refinement
from gfnem.posteriors.replay import Replay


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
    local_search: Metropolis-Hastings that goes on from each trajectory's z in an E-step. The
        objective learns from trajectories to where it ends, too (arXiv 2310.02710).
    replay: best latents kept of each training point, by log p(x, z), among all that its E-steps
        have seen. The objective learns from trajectories to them, too; None keeps none.
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
        local_search: BackAndForth | None = None,
        replay: int | None = None,
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
            if part.off_policy:
                continue
            if not behaviour.on_policy:
                raise UserError(
                    f"posterior.behaviour has temperature={behaviour.temperature} and "
                    f"epsilon={behaviour.epsilon}; objective={part.name} needs plain draws of the "
                    "policy: set temperature=1 and epsilon=0"
                )
            if local_search is not None or replay is not None:
                raise UserError(
                    f"objective={part.name} needs plain draws of the policy: set "
                    "local_search=none and posterior.replay=null, or use another objective"
                )
        if not self.objective.wake and (local_search is not None or replay is not None):
            raise UserError(
                "local_search and posterior.replay have no effect with objective=sleep, which asks "
                "for no trajectories of the data: set local_search=none and posterior.replay=null"
            )
        if replay is not None and not isinstance(policy, NumberedPolicy):
            raise UserError(
                f"posterior.replay is {replay}, but {type(policy).__name__} cannot tell latents in "
                "numbers, to keep them: set posterior.replay=null"
            )
        self.local_search = local_search
        self.replay = None if replay is None else Replay(replay)
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
        explored = [paths, *self._explored(condition, x, paths)]
        trajectories = ScoredTrajectories.join(
            [self.policy.trajectories(condition, each) for each in explored]
        )
        loss = paths.log_forward.new_zeros(())
        for part, weight in self.objective.wake:
            # torchgfn's base class does not declare what all its objectives take.
            objective: Any = part
            loss = loss + weight * objective.loss(
                trajectories.env,
                trajectories,
                recalculate_all_logprobs=False,
                log_rewards=trajectories.log_rewards,
            )
        log_weights = paths.log_weights.detach()
        weights = log_weights.softmax(-1)
        metrics = {
            "e_step/objective": loss.detach(),
            "e_step/effective_samples": (1 / weights.square().sum(-1)).mean(),
        }
        latents = None
        if self.behaviour.on_policy:
            latents = Latents(paths.z, log_weights, log_joint=paths.model_log_joint)
        return EStep(loss, latents, metrics)

    def _explored(self, condition: Any, x: Any, paths: Paths) -> list[Paths]:
        """Trajectories to further latents of the same data points, from P_B."""
        policy, explored = self.policy, []
        if self.local_search is not None:
            z = self.local_search.walk(policy, condition, paths.z)
            explored.append(policy.retrace(condition, z))
        if self.replay is not None:
            assert isinstance(policy, NumberedPolicy)
            recalled = self.replay.recall(x.ids, policy.numbers(paths.z))
            explored.append(policy.retrace(condition, policy.from_numbers(condition, recalled)))
            # What is rated, in evaluations, is not to be changed by it.
            if self.training:
                shown = [paths, *explored]
                self.replay.show(
                    x.ids,
                    torch.cat([policy.numbers(each.z) for each in shown], 1),
                    torch.cat([each.log_joint for each in shown], 1),
                )
        return explored

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
