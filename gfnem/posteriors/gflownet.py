"""A conditional GFlowNet as posterior: q(z | x) is where its trajectories end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gfnem.errors import UserError
from gfnem.gflownet.objectives import Objective, VarGrad, WeightedSum
from gfnem.gflownet.paths import Paths, Scores
from gfnem.gflownet.policy import ON_POLICY, Behaviour, NumberedPolicy, Policy
from gfnem.gflownet.refinement import BackAndForth, Refinement
from gfnem.gflownet.replay import Replay
from gfnem.latents import EStep, Latents, LatentTable
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior, check_m_step

VARGRAD = VarGrad()


class GFlowNetPosterior(Posterior):
    """q(z | x) of a conditional GFlowNet (arXiv 2302.06576).

    policy: the task's policy.
    objective: one of `gfnem.gflownet.objectives`.
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
        objective: Objective | WeightedSum = VARGRAD,
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
        self.objective = WeightedSum.of(objective)
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
                f"a sleep phase needs a model that is normalised; this {type(model).__name__} is "
                f"not, because {model.unnormalised}, or set sleep to 0 and take an objective "
                "without a sleep phase"
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
            objective=step.loss,
        )

    def _wake(self, model: LatentVariableModel, x: Any) -> EStep:
        """What the objective says of trajectories of x."""
        condition = self.policy.condition(model, x)
        paths = self.policy.sample(condition, self.samples, self.behaviour)
        loss = self.objective(Scores.join([paths, *self._explored(condition, x, paths)]))
        metrics = {"e_step/objective": loss.detach()}
        latents = None
        if self.behaviour.on_policy:
            log_weights = paths.log_weights.detach()
            weights = log_weights.softmax(-1)
            metrics["e_step/effective_samples"] = (1 / weights.square().sum(-1)).mean()
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
