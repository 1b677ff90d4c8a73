"""What training leaves behind: lines of metrics, evaluations and a summary."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gfnem.errors import UserError
from gfnem.training.limits import Counters, Limits, check_at_least
from gfnem.training.means import Means
from gfnem.training.networks import Networks
from gfnem.training.parts import Metrics
from gfnem.training.rating import Rating

if TYPE_CHECKING:
    from gfnem.run import Run


class Record:
    """Tells a run what happens in training; without a run it keeps what training itself needs.

    Args:
        limits: where training ends.
        rating: of model and posterior.
        every: batches from one line of metrics to the next.
        checkpoint_minutes: the longest time without a checkpoint.

    Attributes:
        run: who is told; None for nobody.
    """

    def __init__(self, limits: Limits, rating: Rating, every: int, checkpoint_minutes: float):
        check_at_least("log_every", every, 1)
        if not checkpoint_minutes > 0:
            raise UserError(f"em.checkpoint_minutes is {checkpoint_minutes}; it must be positive")
        self.limits = limits
        self.rating = rating
        self.every = every
        self.checkpoint_minutes = checkpoint_minutes
        self.run: Run | None = None
        self._means = Means()
        self._since = Counters()  # when the speed was last taken anew
        self._saved = 0.0

    def begin(self, done: Counters) -> None:
        """Measure the speed of training from here on."""
        self._since = replace(done)
        self._saved = done.seconds
        if self.run is not None:
            self.run.progress.start(*self.limits.progress(done))

    def add(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Keep metrics of a step for the next line."""
        self._means.add(metrics)

    def has(self, name: str) -> bool:
        """Whether the next line has a metric already."""
        return name in self._means

    def line_is_due(self, done: Counters) -> bool:
        """Whether a line is due after these batches."""
        return done.batches % self.every == 0

    def write_line(self, metrics: Metrics, done: Counters) -> None:
        """Write the means since the line before, and further metrics."""
        self._write({**self._means.take(), **metrics}, done)

    def rate(self, networks: Networks, done: Counters, steps: int) -> bool:
        """Rate the weights on the validation data; return whether they are the best so far."""
        with networks.rated(), self._announced("valid", done):
            best = self.rating.take(networks.model, networks.posterior, done.m_steps, steps)
        if self.rating.evaluator is not None:
            self._write(self.rating.latest, done)
        return best

    def checkpoint_is_due(self, done: Counters) -> bool:
        """Whether the latest checkpoint is too old."""
        return done.seconds - self._saved >= 60 * self.checkpoint_minutes

    def save(self, state: dict[str, Any], done: Counters, best: bool) -> None:
        """Write a checkpoint."""
        if self.run is not None:
            self.run.save_checkpoint(state, best)
            self._saved = done.seconds

    def conclude(self, networks: Networks, done: Counters, stopped: bool) -> Metrics:
        """Rate the best weights on the test data, unless stopped; write and return the summary."""
        rating, run = self.rating, self.run
        summary = {**done.metrics, "train/best_m_steps": rating.best_m_steps, **rating.latest}
        if rating.evaluator is not None and not stopped:
            if run is not None:
                state = run.load_checkpoint("best")
                summary.update(state["rating"]["latest"])
            else:
                summary["train/best_m_steps"] = done.m_steps
                state = networks.state_dict()
            networks.load_rated(state)
            with self._announced("test", done):
                summary.update(rating.rate(networks.model, networks.posterior, "test", final=True))
            if run is not None:
                rating.evaluator.report(networks.model, networks.posterior, run)
        if run is not None:
            run.write_summary(summary)
        return summary

    def state_dict(self) -> dict[str, Any]:
        lines = self.run.lines if self.run is not None else 0
        return {"means": self._means.state_dict(), "lines": lines}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._means.load_state_dict(state["means"])
        if self.run is not None:
            self.run.truncate_metrics(state["lines"])

    def _write(self, metrics: Metrics, done: Counters) -> None:
        if self.run is None:
            return
        steps = {"train/m_steps": done.m_steps, "train/e_steps": done.e_steps}
        self.run.log({**metrics, "time/seconds": done.seconds}, steps)
        left = self.rating.and_the_last(self.limits.seconds_left(self._since, done))
        self.run.progress.update(*self.limits.progress(done), metrics, left)
        if done.m_steps == 0 and not self.limits.frozen:
            self._since = replace(done)  # warm-ups tell nothing of the speed of what follows

    def _announced(self, split: str, done: Counters) -> AbstractContextManager[None]:
        if self.run is None or self.rating.evaluator is None:
            return nullcontext()
        self.run.progress.update(*self.limits.progress(done))
        return self.run.progress.rating(split)
