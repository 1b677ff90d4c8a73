"""When the next M-step may run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from gfnem.errors import UserError


class Schedule(ABC):
    """Asked before each of the two steps on every batch, told after each of them.

    Attributes:
        warmup: E-steps before the first M-step, where that is known.
    """

    warmup = 0

    @abstractmethod
    def e_step_due(self) -> bool:
        """Whether this batch gets an E-step."""

    @abstractmethod
    def e_step_done(self, loss: float | Tensor) -> None:
        """An E-step ended with this loss, a number or a tensor of one, which may be on a device."""

    @abstractmethod
    def m_step_due(self, m_steps: int) -> bool:
        """Whether this batch gets an M-step, after `m_steps` of them."""

    @abstractmethod
    def m_step_done(self) -> None:
        """An M-step ended."""

    def metrics(self, m_steps: int) -> dict[str, float]:
        """Figures worth logging."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Alternation(Schedule):
    """`e_steps` E-steps, then `m_steps` M-steps, over and over.

    Each step gets a batch of its own, but the first M-step of a cycle shares the last E-step's,
    and so its latents.

    warmup_e_steps: E-steps before the first cycle.
    """

    def __init__(self, e_steps: int = 1, m_steps: int = 1, warmup_e_steps: int = 0):
        if e_steps < 1 or m_steps < 1 or warmup_e_steps < 0:
            raise UserError(
                f"schedule: e_steps={e_steps} and m_steps={m_steps} must be at least 1, "
                f"warmup_e_steps={warmup_e_steps} at least 0"
            )
        self.e_steps = e_steps
        self.m_steps = m_steps
        self.warmup = warmup_e_steps
        self.e_left = e_steps + warmup_e_steps
        self.m_left = m_steps

    def e_step_due(self) -> bool:
        return self.e_left > 0

    def e_step_done(self, loss: float | Tensor) -> None:
        self.e_left -= 1

    def m_step_due(self, m_steps: int) -> bool:
        return self.e_left == 0

    def m_step_done(self) -> None:
        self.m_left -= 1
        if self.m_left == 0:
            self.e_left, self.m_left = self.e_steps, self.m_steps


class AdaptiveThreshold(Schedule):
    """An E-step on every batch, an M-step while q fits (arXiv 2302.06576).

    An M-step runs while the exponential moving average of the E-step's loss, corrected for its
    start at zero, is below a threshold that moves linearly from `maximum` to `minimum` over
    `horizon` M-steps.

    decay: of the moving average.
    """

    def __init__(self, maximum: float, minimum: float, horizon: int, decay: float = 0.95):
        if horizon < 1:
            raise UserError(f"schedule.horizon is {horizon}; it must be at least 1 M-step")
        if not 0 <= decay < 1:
            raise UserError(f"schedule.decay is {decay}; it must be at least 0 and below 1")
        self.maximum = maximum
        self.minimum = minimum
        self.horizon = horizon
        self.decay = decay
        self.sum = 0.0
        self.weight = 0.0

    def e_step_due(self) -> bool:
        return True

    def e_step_done(self, loss: float | Tensor) -> None:
        self.sum = self.decay * self.sum + (1 - self.decay) * float(loss)
        self.weight = self.decay * self.weight + (1 - self.decay)

    def m_step_due(self, m_steps: int) -> bool:
        return self.average < self.threshold(m_steps)

    def m_step_done(self) -> None:
        pass

    @property
    def average(self) -> float:
        """The bias-corrected moving average; infinite before the first E-step."""
        return self.sum / self.weight if self.weight else float("inf")

    def threshold(self, m_steps: int) -> float:
        done = min(m_steps / self.horizon, 1.0)
        return self.maximum + (self.minimum - self.maximum) * done

    def metrics(self, m_steps: int) -> dict[str, float]:
        return {
            "schedule/average_e_loss": self.average,
            "schedule/threshold": self.threshold(m_steps),
        }
