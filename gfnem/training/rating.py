"""Evaluations along training, and which of them was best."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from gfnem.errors import UserError
from gfnem.inference import device_of
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.training.limits import check_at_least
from gfnem.training.parts import Evaluator, Metrics


class Rating:
    """Rates model and posterior on the validation data, and knows which rating was best.

    Args:
        evaluator: what rates them; None where nothing does, and the latest steps count as best.
        every: steps from one evaluation to the next.

    Attributes:
        latest: the metrics of the latest evaluation.
        best: the lowest value of the evaluator's selection so far; NaN where nothing is rated yet.
        best_m_steps: M-steps at that evaluation.
        steps: steps at the latest evaluation.
    """

    def __init__(self, evaluator: Evaluator | None, every: int):
        check_at_least("evaluate_every", every, 1)
        self.evaluator = evaluator
        self.every = every
        self.latest: Metrics = {}
        self.best = math.nan
        self.best_m_steps = 0
        self.steps: int | None = None
        self._seconds: list[float] = []

    def rate(
        self, model: LatentVariableModel, posterior: Posterior, split: str, final: bool = False
    ) -> Metrics:
        """Return the metrics of a split; training goes on as if it had not happened."""
        assert self.evaluator is not None
        began = time.monotonic()
        device = device_of(model)
        modes = model.training, posterior.training
        model.eval()
        posterior.eval()
        try:
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                torch.no_grad(),
            ):
                torch.manual_seed(0)
                return self.evaluator(model, posterior, split, final)
        finally:
            model.train(modes[0])
            posterior.train(modes[1])
            self._seconds.append(time.monotonic() - began)

    def and_the_last(self, seconds_left: float | None) -> float | None:
        """Add the evaluation behind the end of training, as far as the others tell how long it is.

        Args:
            seconds_left: to the end of training; None where that is not known.
        """
        if seconds_left is None or not self._seconds:
            return seconds_left
        return seconds_left + sum(self._seconds) / len(self._seconds)

    def take(
        self, model: LatentVariableModel, posterior: Posterior, m_steps: int, steps: int
    ) -> bool:
        """Rate the validation data after so many steps; return whether it is the best so far.

        Raises:
            UserError: the evaluator's selection is none of its metrics.
        """
        best = True
        if self.evaluator is not None:
            self.latest = self.rate(model, posterior, "valid")
            selection = self.evaluator.selection(model)
            if selection not in self.latest:
                raise UserError(
                    f"{selection} is to tell which checkpoint is best, but it is not known of this "
                    f"model with {type(posterior).__name__}: use another evaluator.select"
                )
            score = self.latest[selection]
            # There is always a best checkpoint, and any score is better than none or NaN.
            best = score < self.best or math.isnan(self.best)
            if best:
                self.best = score
        if best:
            self.best_m_steps = m_steps
        self.steps = steps
        return best

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = ("latest", "best", "best_m_steps", "steps")
