"""Expectation-maximisation: alternate E-steps, which train q(z | x), and M-steps, which train p."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from signal import SIGINT
from typing import TYPE_CHECKING, Any

import torch

from gfnem.errors import UserError
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.precision import MatmulPrecision, check_matmul_precision, matmul_precision
from gfnem.schedule import Alternation, Schedule
from gfnem.training.interrupt import interruptible
from gfnem.training.limits import Clock, Counters, Limits, Stopwatch
from gfnem.training.networks import Networks
from gfnem.training.parts import Data, Evaluator, Metrics, check_parts
from gfnem.training.random_state import random_state, set_random_state
from gfnem.training.rating import Rating
from gfnem.training.record import Record
from gfnem.training.steps import Steps
from gfnem.training.trainer import (
    MODEL_OPTIMIZER,
    POSTERIOR_OPTIMIZER,
    OptimizerFactory,
    Trainer,
)

if TYPE_CHECKING:
    from gfnem.run import Run


class EM:
    """Fit p(x, z) by maximum likelihood with latents from q(z | x).

    Args:
        model, posterior, data: what is trained, and on what.
        m_steps: the run ends after so many M-steps; 0 leaves the model as it is and trains q alone.
        max_e_steps, max_seconds: or after so many E-steps or seconds, whichever comes first; None
            for no limit.
        clock: what tells the seconds: "wall", or "cpu", whose time another program on the machine
            does not take.
        matmul_precision: of products of float32 matrices in E- and M-steps, as torch names it:
            "medium" is bfloat16 inside where the device is faster with it. Evaluations are in full
            precision.
        schedule: when steps are due; a posterior without parameters gets an M-step on every batch.
        model_optimizer, posterior_optimizer: called with parameter groups.
        model_clip, posterior_clip: largest norms of the gradients.
        warmup: steps over which both learning rates rise.
        average: decay of the exponential moving average of all weights, taken after each M-step,
            that is rated and kept in the place of the weights themselves; None for no average.
        evaluator: rates the model every `evaluate_every` M-steps (E-steps where there are no
            M-steps) and at the end.
        log_every: batches between two lines of metrics.
        checkpoint_minutes: there is a checkpoint before the first batch, at each evaluation and
            after so many minutes without one.
        run: where metrics, checkpoints, figures and the summary go; None to keep nothing.
        seed: of all random numbers; None leaves torch's generator as it is.
        device: where to train.

    Attributes:
        limits: where training ends.
        rating: the latest evaluation and which was best.
        stopped: the signal that has ended training before its limits; 0 where none has.

    Raises:
        UserError: parts or options that do not go together.
    """

    def __init__(
        self,
        model: LatentVariableModel,
        posterior: Posterior,
        data: Data,
        m_steps: int,
        max_e_steps: int | None = None,
        schedule: Schedule | None = None,
        model_optimizer: OptimizerFactory = MODEL_OPTIMIZER,
        posterior_optimizer: OptimizerFactory = POSTERIOR_OPTIMIZER,
        model_clip: float | None = 3.0,
        posterior_clip: float | None = 5.0,
        warmup: int = 0,
        average: float | None = None,
        evaluator: Evaluator | None = None,
        evaluate_every: int = 100,
        log_every: int = 20,
        checkpoint_minutes: float = 10.0,
        max_seconds: float | None = None,
        clock: Clock = "wall",
        matmul_precision: MatmulPrecision = "highest",
        run: Run | None = None,
        seed: int | None = None,
        device: str | torch.device = "cpu",
    ):
        self.schedule = schedule or Alternation()
        self.limits = Limits(m_steps, max_e_steps, max_seconds, self.schedule.warmup)
        self.stopwatch = Stopwatch(clock)
        self.rating = Rating(evaluator, evaluate_every)
        self.record = Record(self.limits, self.rating, log_every, checkpoint_minutes)
        self.record.run = run
        check_matmul_precision(matmul_precision)
        self.matmul_precision: MatmulPrecision = matmul_precision
        check_parts(model, posterior, self.limits.frozen)
        self.device = torch.device(device)
        self.model = model.to(device)
        self.posterior = posterior.to(device)
        self.data = data
        if seed is not None:
            torch.manual_seed(seed)
        self.steps = Steps(
            self.model,
            self.posterior,
            Trainer("model", model.parameter_groups(), model_optimizer, model_clip, warmup),
            Trainer.of("posterior", posterior, posterior_optimizer, posterior_clip, warmup),
            self.schedule,
            self.record,
        )
        self.networks = Networks(self.model, self.posterior, average)
        self.stopped = 0

    def fit(self) -> Metrics:
        """Train to the end, or until interrupted; return the summary.

        Ctrl-C ends it after the batch at hand, with the last checkpoint and a summary written; a
        second one ends it at once.

        Raises:
            Diverged: too many updates in a row were not finite; the last good checkpoint is kept.
        """
        status = "failed"
        self.stopped = 0
        try:
            with interruptible(self.stop):
                self._train()
            summary = self.record.conclude(self.networks, self.done, bool(self.stopped))
            status = "stopped" if self.stopped else "finished"
            return summary
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            if self.record.run is not None:
                self.record.run.finish(status)

    def stop(self, signal: int = SIGINT) -> None:
        """End training after the batch at hand, as that signal asks for."""
        self.stopped = signal

    def evaluate(self, split: str, final: bool = False) -> Metrics:
        """Rate model and posterior on a split; training goes on as if it had not happened."""
        return self.rating.rate(self.model, self.posterior, split, final)

    @property
    def done(self) -> Counters:
        """The steps so far."""
        return self.steps.done

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.limits.reached(self.done)

    def _train(self) -> None:
        self.stopwatch.start(self.done.seconds)
        self.record.begin(self.done)
        if self.done.batches == 0:
            self._save(best=False)
        for x in self._batches():
            x = x.to(self.device)
            with matmul_precision(self.matmul_precision):
                counted = self._take_steps(x)
            if counted:
                self.networks.update()
            self.done.batches += 1
            self.done.seconds = self.stopwatch.seconds
            if self.record.line_is_due(self.done):
                self.record.write_line(self.steps.metrics, self.done)
            if counted and self._counted % self.rating.every == 0:
                self._evaluate()
            elif self.record.checkpoint_is_due(self.done):
                self._save(best=False)
            if self.stopped or self.finished:
                break
        self.done.seconds = self.stopwatch.seconds
        if self.stopped:
            self._save(best=False)
        elif self.rating.steps != self._counted:
            self._evaluate()

    def _batches(self) -> Iterator[Any]:
        while not self.finished:
            batches = self.data.train_batches(self.done.epoch)
            if len(batches) == 0:
                raise UserError("the training data has no batches: give more data")
            while self.done.position < len(batches):
                self.done.position += 1
                yield batches[self.done.position - 1]
            self.done.epoch, self.done.position = self.done.epoch + 1, 0

    def _take_steps(self, x: Any) -> bool:
        """Take the steps that are due on a batch; return whether it counts for evaluations."""
        if self.posterior.joint:
            self.steps.joint_step(x)
            return True
        e_step_due = self.steps.posterior_trainer is not None and (
            self.limits.frozen or self.schedule.e_step_due()
        )
        latents = self.steps.e_step(x) if e_step_due else None
        if self.limits.frozen:
            return True
        always = self.steps.posterior_trainer is None
        m_step_due = always or self.schedule.m_step_due(self.done.m_steps)
        if m_step_due:
            self.steps.m_step(x, latents)
        return m_step_due

    @property
    def _counted(self) -> int:
        """What evaluations count: M-steps, or E-steps where the model stays as it is."""
        return self.done.e_steps if self.limits.frozen else self.done.m_steps

    def _evaluate(self) -> None:
        self._save(best=self.record.rate(self.networks, self.done, self._counted))

    def _save(self, best: bool) -> None:
        if self.record.run is not None:
            self.record.save(self.state_dict(), self.done, best)

    def state_dict(self) -> dict[str, Any]:
        """Return all that training needs to go on; networks have the weights that are rated."""
        return {
            **self.networks.state_dict(),
            "steps": self.steps.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rating": self.rating.state_dict(),
            "record": self.record.state_dict(),
            "done": asdict(self.done),
            "random": random_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.networks.load_state_dict(state)
        for name in ("steps", "schedule", "rating", "record"):
            getattr(self, name).load_state_dict(state[name])
        self.steps.done = Counters(**state["done"])
        set_random_state(state["random"], self.device)
