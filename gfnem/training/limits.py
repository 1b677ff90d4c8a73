"""How far training is, and where it ends."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

from gfnem.errors import UserError
from gfnem.training.parts import Metrics

Clock = Literal["wall", "cpu"]


@dataclass
class Counters:
    """What training has done so far.

    Attributes:
        m_steps, e_steps: steps of either kind.
        batches: batches of data that had a step.
        epoch, position: where the next batch is: in which pass over the data, and there which.
        seconds: on the clock of the run, evaluations included.
    """

    m_steps: int = 0
    e_steps: int = 0
    batches: int = 0
    epoch: int = 0
    position: int = 0
    seconds: float = 0.0

    @property
    def metrics(self) -> Metrics:
        """The counts that a summary tells."""
        return {
            "train/m_steps": self.m_steps,
            "train/e_steps": self.e_steps,
            "time/seconds": self.seconds,
        }


@dataclass
class Limits:
    """Where training ends: at the first of these that is reached.

    Attributes:
        m_steps: M-steps; 0 for a model that stays as it is.
        e_steps: E-steps; None for no limit.
        seconds: seconds; None for no limit.
        warmup: E-steps before the first M-step, which are shown while they last.
    """

    m_steps: int
    e_steps: int | None = None
    seconds: float | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        check_at_least("m_steps", self.m_steps, 0)
        check_at_least("max_e_steps", self.e_steps, 1)
        check_at_least("max_seconds", self.seconds, 0)
        if self.m_steps == 0 and self.e_steps is None and self.seconds is None:
            raise UserError(
                "em.m_steps=0 trains the posterior alone: say when to stop, by em.max_e_steps or "
                "em.max_seconds"
            )

    @property
    def frozen(self) -> bool:
        """Whether the model stays as it is, and q alone is trained."""
        return self.m_steps == 0

    def reached(self, done: Counters) -> bool:
        """Whether there is nothing left to train."""
        return any(at >= end for _, at, end in self._ways(done))

    def progress(self, done: Counters) -> tuple[str, int, int]:
        """Return what is counted, how much of it is done and how much there is."""
        if not self.frozen and done.m_steps == 0 and done.e_steps < self.warmup:
            return "warm-up e-step", done.e_steps, self.warmup
        unit, at, end = self._ways(done)[0]
        return unit, int(at), math.ceil(end)

    def seconds_left(self, since: Counters, done: Counters) -> float | None:
        """Estimate the time to the end at the speed since then, evaluations included.

        Returns None where nothing tells it.
        """
        passed = done.seconds - since.seconds
        left = [
            (end - at) * passed / (at - before)
            for (_, before, _), (_, at, end) in zip(
                self._ways(since), self._ways(done), strict=True
            )
            if at > before
        ]
        return min(left, default=None)

    def _ways(self, done: Counters) -> list[tuple[str, float, float]]:
        """Each limit: its unit, how much is done and where training ends. The first is shown."""
        ways: list[tuple[str, float, float | None]] = [
            ("m-step", done.m_steps, self.m_steps or None),
            ("e-step", done.e_steps, self.e_steps),
            ("second", done.seconds, self.seconds),
        ]
        return [(unit, at, end) for unit, at, end in ways if end is not None]


class Stopwatch:
    """Counts the seconds of training.

    Args:
        clock: "wall", or "cpu", whose time another program on the machine does not take.

    Raises:
        UserError: there is no such clock.
    """

    def __init__(self, clock: Clock = "wall"):
        if clock not in ("wall", "cpu"):
            raise UserError(f"em.clock is {clock!r}; use 'wall' or 'cpu'")
        self._now = time.monotonic if clock == "wall" else time.process_time
        self._began = self._now()

    def start(self, seconds: float) -> None:
        """Go on from so many seconds."""
        self._began = self._now() - seconds

    @property
    def seconds(self) -> float:
        return self._now() - self._began


def check_at_least(option: str, value: float | None, least: float) -> None:
    """Raise UserError where an option of `em` is smaller than it may be."""
    if value is not None and not value >= least:
        raise UserError(f"em.{option} is {value}; it must be at least {least}")
