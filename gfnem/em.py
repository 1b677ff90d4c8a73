"""Expectation-maximisation: alternate E-steps, which train q(z | x), and M-steps, which train p."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gfnem.errors import UserError
from gfnem.latents import EStep, Latents
from gfnem.model import ClosedFormModel, LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.precision import matmul_precision
from gfnem.schedule import Alternation, Schedule
from gfnem.training.average import AveragedWeights
from gfnem.training.interrupt import interruptible
from gfnem.training.means import Means
from gfnem.training.parts import Data, Evaluator, Metrics
from gfnem.training.trainer import (
    MODEL_OPTIMIZER,
    POSTERIOR_OPTIMIZER,
    OptimizerFactory,
    Trainer,
    minimise,
)

if TYPE_CHECKING:
    from gfnem.run import Run


class EM:
    """Fit p(x, z) by maximum likelihood with latents from q(z | x).

    model, posterior, data: what is trained, and on what.
    m_steps: the run ends after so many M-steps; 0 leaves the model as it is and trains q alone.
    max_e_steps, max_seconds: or after so many E-steps or seconds, whichever comes first; None for
        no limit.
    clock: what tells the seconds: "wall", or "cpu", whose time another program on the machine does
        not take.
    matmul_precision: of products of float32 matrices in E- and M-steps, as torch names it: "medium"
        is bfloat16 inside where the device is faster with it. Evaluations are in full precision.
    schedule: when steps are due; a posterior without parameters gets an M-step on every batch.
    model_optimizer, posterior_optimizer: called with parameter groups.
    model_clip, posterior_clip: largest norms of the gradients.
    warmup: steps over which both learning rates rise.
    average: decay of the exponential moving average of all weights, taken after each M-step, that
        is rated and kept in the place of the weights themselves; None for no average.
    evaluator: rates the model every `evaluate_every` M-steps (E-steps where there are no M-steps)
        and at the end.
    log_every: batches between two lines of metrics.
    run: where metrics, checkpoints, figures and the summary go; None to keep nothing.
    seed: of all random numbers; None leaves torch's generator as it is.
    device: where to train.
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
        max_seconds: float | None = None,
        clock: Literal["wall", "cpu"] = "wall",
        matmul_precision: Literal["highest", "high", "medium"] = "highest",
        run: Run | None = None,
        seed: int | None = None,
        device: str | torch.device = "cpu",
    ):
        for name, value, least in (
            ("m_steps", m_steps, 0),
            ("max_e_steps", max_e_steps, 1),
            ("max_seconds", max_seconds, 0),
            ("evaluate_every", evaluate_every, 1),
            ("log_every", log_every, 1),
            ("warmup", warmup, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"em.{name} is {value}; it must be at least {least}")
        for name, clip in (("model_clip", model_clip), ("posterior_clip", posterior_clip)):
            if clip is not None and not clip > 0:
                raise UserError(f"em.{name} is {clip}; it must be positive, or null for none")
        if average is not None and not 0 <= average < 1:
            raise UserError(f"em.average is {average}; it must be from 0 to below 1, or null")
        if m_steps == 0 and max_e_steps is None and max_seconds is None:
            raise UserError(
                "em.m_steps=0 trains the posterior alone: say when to stop, by em.max_e_steps or "
                "em.max_seconds"
            )
        if clock not in ("wall", "cpu"):
            raise UserError(f"em.clock is {clock!r}; use 'wall' or 'cpu'")
        if matmul_precision not in ("highest", "high", "medium"):
            raise UserError(
                f"em.matmul_precision is {matmul_precision!r}; use 'highest', 'high' or 'medium'"
            )
        posterior.check(model)
        self._now = time.monotonic if clock == "wall" else time.process_time
        self.model = model.to(device)
        self.posterior = posterior.to(device)
        self.data = data
        self.total_m_steps = m_steps
        self.max_e_steps = max_e_steps
        self.max_seconds = max_seconds
        self.matmul_precision = matmul_precision
        self.schedule = schedule or Alternation()
        self.evaluator = evaluator
        self.evaluate_every = evaluate_every
        self.log_every = log_every
        self.run = run
        self.device = torch.device(device)
        if seed is not None:
            torch.manual_seed(seed)
        self.model_trainer = Trainer(
            "model", model.parameter_groups(), model_optimizer, model_clip, warmup
        )
        groups = posterior.parameter_groups()
        self.posterior_trainer = (
            Trainer("posterior", groups, posterior_optimizer, posterior_clip, warmup)
            if groups
            else None
        )
        if self._frozen and self.posterior_trainer is None:
            raise UserError("em.m_steps=0 trains the posterior alone, but it has no parameters")
        if self._frozen and posterior.joint:
            raise UserError(
                f"em.m_steps=0 trains the posterior alone, but {type(posterior).__name__} and the "
                "model learn in one step: use another posterior"
            )
        if posterior.closed_m_step and not isinstance(model, ClosedFormModel):
            raise UserError(
                f"posterior.m_step=closed needs a model that knows its maximum; "
                f"{type(model).__name__} does not: take an m_step by gradient"
            )
        self.average = (
            None if average is None else AveragedWeights([self.model, self.posterior], average)
        )
        self.m_steps = self.e_steps = 0
        self.batches_seen = self.epoch = self.position = 0
        self.seconds = 0.0
        self.evaluated: int | None = None  # steps at the latest evaluation
        self.best = math.nan  # nothing rated yet
        self.best_m_steps = 0
        self.latest: Metrics = {}
        self._means = Means()
        self.stopped = False

    def fit(self) -> Metrics:
        """Train to the end, or until interrupted; returns the summary.

        Ctrl-C ends it after the batch at hand, with the last checkpoint and a summary written; a
        second one at once. Raises Diverged, with the last good checkpoint kept.
        """
        status = "failed"
        self.stopped = False
        try:
            with interruptible(self._stop):
                self._train()
            summary = self._conclude()
            status = "stopped" if self.stopped else "finished"
            return summary
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            if self.run is not None:
                self.run.finish(status)

    def _stop(self) -> None:
        self.stopped = True

    def _train(self) -> None:
        began = self._now() - self.seconds
        if self.run is not None:
            unit, done, total = self._progress
            self.run.progress.start(total, done, unit)
        for x in self._batches():
            x = x.to(self.device)
            with matmul_precision(self.matmul_precision):
                if self.posterior.joint:
                    self._joint_step(x)
                    m_step_due = True
                else:
                    m_step_due = self._alternate(x)
            if self.average is not None and (m_step_due or self._frozen):
                self.average.update()
            self.batches_seen += 1
            self.seconds = self._now() - began
            if self.batches_seen % self.log_every == 0:
                self._log()
            if (m_step_due or self._frozen) and self._steps % self.evaluate_every == 0:
                self._evaluate()
            if self.stopped or self.finished:
                break
        self.seconds = self._now() - began
        if self.stopped:
            self._save(best=False)
        elif self.evaluated != self._steps:
            self._evaluate()

    def _alternate(self, x: Any) -> bool:
        """What the schedule says of a batch; whether that was an M-step too."""
        estep = self._e_step(x) if self._e_step_due() else None
        if estep is not None and "train/posterior_gap" not in self._means:
            self._means.add(self._posterior_gap(x, estep.latents))
        m_step_due = self._m_step_due()
        if m_step_due:
            self._m_step(x, estep.latents if estep is not None else None)
        return m_step_due

    @property
    def _frozen(self) -> bool:
        """Whether the model stays as it is and q alone is trained."""
        return self.total_m_steps == 0

    @property
    def _steps(self) -> int:
        """What evaluations count: M-steps, or E-steps where the model is frozen."""
        return self.e_steps if self._frozen else self.m_steps

    @property
    def _progress(self) -> tuple[str, int, int]:
        """What is counted towards the end of the run, how much is done and how much there is."""
        if not self._frozen:
            return "m-step", self.m_steps, self.total_m_steps
        if self.max_e_steps is not None:
            return "e-step", self.e_steps, self.max_e_steps
        assert self.max_seconds is not None
        return "second", int(self.seconds), math.ceil(self.max_seconds)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return (
            (self.max_e_steps is not None and self.e_steps >= self.max_e_steps)
            or (self.max_seconds is not None and self.seconds >= self.max_seconds)
            or (not self._frozen and self.m_steps >= self.total_m_steps)
        )

    def _batches(self) -> Iterator[Any]:
        if self.finished:
            return
        while True:
            batches = self.data.train_batches(self.epoch)
            if len(batches) == 0:
                raise UserError("the training data has no batches: give more data")
            while self.position < len(batches):
                x = batches[self.position]
                self.position += 1
                yield x
            self.epoch, self.position = self.epoch + 1, 0

    def _e_step_due(self) -> bool:
        return self._frozen or (self.posterior_trainer is not None and self.schedule.e_step_due())

    def _m_step_due(self) -> bool:
        if self._frozen:
            return False
        return self.posterior_trainer is None or self.schedule.m_step_due(self.m_steps)

    def _e_step(self, x: Any) -> EStep:
        assert self.posterior_trainer is not None
        estep = self.posterior.e_step(self.model, x)
        assert estep.loss is not None
        loss = estep.loss.detach()
        if self.posterior_trainer.step(estep.loss):
            self.schedule.e_step_done(loss if estep.objective is None else estep.objective.detach())
            self._means.add({"train/e_loss": loss, **estep.metrics})
        self.e_steps += 1
        return estep

    def _joint_step(self, x: Any) -> None:
        """E- and M-step in one, where the posterior's loss trains the model as well."""
        assert self.posterior_trainer is not None
        estep = self.posterior.e_step(self.model, x)
        assert estep.loss is not None
        if minimise(estep.loss, self.model_trainer, self.posterior_trainer):
            self._means.add({"train/joint_loss": estep.loss.detach(), **estep.metrics})
        self.e_steps += 1
        self.m_steps += 1
        self.model.m_step_done(self.m_steps)

    def _m_step(self, x: Any, latents: Latents | None) -> None:
        if self.posterior.closed_m_step:
            self._maximise(x, latents)
        else:
            loss = -self.posterior.expected_log_joint(self.model, x, latents).mean()
            if self.model_trainer.step(loss):
                self._means.add({"train/m_loss": loss.detach()})
        self.m_steps += 1
        self.model.m_step_done(self.m_steps)
        self.schedule.m_step_done()

    @torch.no_grad()
    def _maximise(self, x: Any, latents: Latents | None) -> None:
        """An M-step in closed form; its loss is that of the maximum."""
        assert isinstance(self.model, ClosedFormModel)
        given = self.posterior.m_step_latents(self.model, x, latents)
        self.model.maximise(x, given)
        self._means.add({"train/m_loss": -given.mean(self.model.log_joint(x, given.z)).mean()})

    @torch.no_grad()
    def _posterior_gap(self, x: Any, latents: Latents | None) -> dict[str, float | Tensor]:
        """log p(x) - E_q[log p(x, z) + log P_B - log P_F] in nats per data point, where exact.

        Of a model that is not normalised, log p(x) is not what weights are of on average.
        """
        if latents is None or latents.log_weights is None or not self.model.normalised:
            return {}
        log_likelihood = self.model.log_likelihood(x)
        if log_likelihood is None:
            return {}
        return {"train/posterior_gap": (log_likelihood - latents.log_weights.mean(-1)).mean()}

    def _log(self) -> None:
        metrics = self._means.take()
        metrics.update(self.schedule.metrics(self.m_steps))
        metrics.update(self.model.metrics())
        trainers = [self.model_trainer, self.posterior_trainer]
        metrics["train/skipped"] = sum(t.skipped for t in trainers if t is not None)
        self._write(metrics)

    def _write(self, metrics: Metrics) -> None:
        if self.run is None:
            return
        counters = {"train/m_steps": self.m_steps, "train/e_steps": self.e_steps}
        self.run.log({**metrics, "time/seconds": self.seconds}, counters)
        self.run.progress.update(self._progress[1], metrics)

    def _evaluate(self) -> None:
        best = True
        if self.evaluator is not None:
            with self._rated_weights():
                self.latest = self.evaluate("valid")
            selection = self.evaluator.selection
            if selection not in self.latest:
                raise UserError(
                    f"{selection} is to tell which checkpoint is best, but it is not known of this "
                    f"model with {type(self.posterior).__name__}: use another evaluator.select"
                )
            score = self.latest[selection]
            # There is always a best checkpoint, and any score is better than none or NaN.
            best = score < self.best or math.isnan(self.best)
            if best:
                self.best = score
            self._write(self.latest)
        if best:
            self.best_m_steps = self.m_steps
        self.evaluated = self._steps
        self._save(best)

    def _rated_weights(self) -> AbstractContextManager[None]:
        """The weights that are rated and kept in place of those that are trained."""
        return nullcontext() if self.average is None else self.average.in_place()

    def evaluate(self, split: str, final: bool = False) -> Metrics:
        """Rate model and posterior on a split; training goes on as if it had not happened."""
        assert self.evaluator is not None
        devices = [self.device] if self.device.type == "cuda" else []
        modes = self.model.training, self.posterior.training
        self.model.eval()
        self.posterior.eval()
        try:
            with torch.random.fork_rng(devices), torch.no_grad():
                torch.manual_seed(0)
                return self.evaluator(self.model, self.posterior, split, final)
        finally:
            self.model.train(modes[0])
            self.posterior.train(modes[1])

    def _conclude(self) -> Metrics:
        """Rate the best checkpoint on the test split, unless interrupted, and write the summary."""
        summary = {
            "train/m_steps": self.m_steps,
            "train/e_steps": self.e_steps,
            "train/best_m_steps": self.best_m_steps,
            "time/seconds": self.seconds,
            **self.latest,
        }
        if self.evaluator is not None and not self.stopped:
            if self.run is not None:
                # Evaluations may show a progress of their own.
                self.run.progress.stop()
                state = self.run.load_checkpoint("best")
                self.model.load_state_dict(state["model"])
                self.posterior.load_state_dict(state["posterior"])
                summary.update(state["latest"])
            else:
                summary["train/best_m_steps"] = self.m_steps
                if self.average is not None:
                    self.average.put_in_place()
            summary.update(self.evaluate("test", final=True))
            if self.run is not None:
                self.evaluator.report(self.model, self.posterior, self.run)
        if self.run is not None:
            self.run.write_summary(summary)
        return summary

    def _save(self, best: bool) -> None:
        if self.run is not None:
            self.run.save_checkpoint(self.state_dict(), best)

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on; model and posterior have the weights that are rated."""
        with self._rated_weights():
            networks = {"model": self.model.state_dict(), "posterior": self.posterior.state_dict()}
            if self.average is not None:
                networks = deepcopy(networks)
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            **networks,
            "average": self.average and self.average.state_dict(),
            "model_trainer": self.model_trainer.state_dict(),
            "posterior_trainer": self.posterior_trainer and self.posterior_trainer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "latest": self.latest,
            "sums": self._means.state_dict(),
            "random": {"cpu": torch.get_rng_state(), "cuda": cuda},
            "lines": self.run.lines if self.run is not None else 0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.posterior.load_state_dict(state["posterior"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.model_trainer.load_state_dict(state["model_trainer"])
        if self.posterior_trainer is not None:
            self.posterior_trainer.load_state_dict(state["posterior_trainer"])
        self.schedule.load_state_dict(state["schedule"])
        for name in _COUNTERS:
            setattr(self, name, state["counters"][name])
        self.latest = state["latest"]
        self._means.load_state_dict(state["sums"])
        torch.set_rng_state(state["random"]["cpu"])
        # A run may go on on another device than it began on.
        if self.device.type == "cuda" and state["random"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        if self.run is not None:
            self.run.truncate_metrics(state["lines"])


_COUNTERS = (
    "m_steps",
    "e_steps",
    "batches_seen",
    "epoch",
    "position",
    "seconds",
    "evaluated",
    "best",
    "best_m_steps",
)
