"""E-steps and M-steps on one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gfnem.latents import EStep, Latents
from gfnem.model import ClosedFormModel, LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.schedule import Schedule
from gfnem.training.gap import posterior_gap
from gfnem.training.limits import Counters
from gfnem.training.parts import Metrics
from gfnem.training.record import Record
from gfnem.training.trainer import Trainer, minimise


class Steps:
    """Takes steps of a model and its posterior, counts them, and tells of their losses.

    Args:
        model, posterior: what learns.
        model_trainer: of the model.
        posterior_trainer: of the posterior; None for one without parameters.
        schedule: hears of each step.
        record: hears of each loss.

    Attributes:
        done: counts the steps.
    """

    def __init__(
        self,
        model: LatentVariableModel,
        posterior: Posterior,
        model_trainer: Trainer,
        posterior_trainer: Trainer | None,
        schedule: Schedule,
        record: Record,
    ):
        self.model = model
        self.posterior = posterior
        self.model_trainer = model_trainer
        self.posterior_trainer = posterior_trainer
        self.schedule = schedule
        self.record = record
        self.done = Counters()

    def e_step(self, x: Any) -> Latents | None:
        """Bring q(z | x) closer to the posterior; return the latents that it saw."""
        assert self.posterior_trainer is not None
        estep, loss = self._e_step_loss(x)
        if self.posterior_trainer.step(loss):
            objective = loss if estep.objective is None else estep.objective
            self.schedule.e_step_done(objective.detach())
            self.record.add({"train/e_loss": loss, **estep.metrics})
        if not self.record.has("train/posterior_gap"):
            self.record.add(posterior_gap(self.model, x, estep.latents))
        return estep.latents

    def m_step(self, x: Any, latents: Latents | None) -> None:
        """Climb the likelihood of x with latents from q(z | x), those of the E-step if given."""
        if self.posterior.closed_m_step:
            self.record.add({"train/m_loss": self._maximise(x, latents)})
        else:
            loss = -self.posterior.expected_log_joint(self.model, x, latents).mean()
            if self.model_trainer.step(loss):
                self.record.add({"train/m_loss": loss})
        self._count_m_step()
        self.schedule.m_step_done()

    def joint_step(self, x: Any) -> None:
        """Take E- and M-step in one, where the posterior's loss trains the model as well."""
        assert self.posterior_trainer is not None
        estep, loss = self._e_step_loss(x)
        if minimise(loss, self.model_trainer, self.posterior_trainer):
            self.record.add({"train/joint_loss": loss, **estep.metrics})
        self._count_m_step()

    @property
    def metrics(self) -> Metrics:
        """Figures of the schedule and the model, and how many updates were skipped."""
        skipped = sum(trainer.skipped for trainer in self._trainers.values())
        of_parts = self.schedule.metrics(self.done.m_steps) | self.model.metrics()
        return {**of_parts, "train/skipped": skipped}

    def state_dict(self) -> dict[str, Any]:
        return {name: trainer.state_dict() for name, trainer in self._trainers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, trainer in self._trainers.items():
            trainer.load_state_dict(state[name])

    @torch.no_grad()
    def _maximise(self, x: Any, latents: Latents | None) -> Tensor:
        """Take an M-step in closed form; return the loss at the maximum."""
        assert isinstance(self.model, ClosedFormModel)
        given = self.posterior.m_step_latents(self.model, x, latents)
        self.model.maximise(x, given)
        return -given.mean(self.model.log_joint(x, given.z)).mean()

    def _e_step_loss(self, x: Any) -> tuple[EStep, Tensor]:
        estep = self.posterior.e_step(self.model, x)
        assert estep.loss is not None
        self.done.e_steps += 1
        return estep, estep.loss

    def _count_m_step(self) -> None:
        self.done.m_steps += 1
        self.model.m_step_done(self.done.m_steps)

    @property
    def _trainers(self) -> dict[str, Trainer]:
        trainers = {"model": self.model_trainer, "posterior": self.posterior_trainer}
        return {name: trainer for name, trainer in trainers.items() if trainer is not None}
