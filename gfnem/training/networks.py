"""Model and posterior, with the weights that are trained and those that are rated."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.training.average import AveragedWeights


class Networks:
    """The two networks of a run.

    Args:
        model, posterior: the networks, where they are to be trained.
        decay: of the average of their weights that is rated and kept; None to rate the weights
            themselves.
    """

    def __init__(self, model: LatentVariableModel, posterior: Posterior, decay: float | None):
        self.model = model
        self.posterior = posterior
        self.average = None if decay is None else AveragedWeights([model, posterior], decay)

    def update(self) -> None:
        """Take the weights as they are into the average."""
        if self.average is not None:
            self.average.update()

    def rated(self) -> AbstractContextManager[None]:
        """Put the weights that are rated in the place of those that are trained, for a while."""
        return nullcontext() if self.average is None else self.average.in_place()

    def state_dict(self) -> dict[str, Any]:
        """Return all weights; `model` and `posterior` are those that are rated."""
        with self.rated():
            state = {"model": self.model.state_dict(), "posterior": self.posterior.state_dict()}
            if self.average is None:
                return state
            return {**deepcopy(state), "average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.load_rated(state)
        if self.average is not None:
            self.average.load_state_dict(state["average"])

    def load_rated(self, state: dict[str, Any]) -> None:
        """Take the weights that were rated, for good."""
        self.model.load_state_dict(state["model"])
        self.posterior.load_state_dict(state["posterior"])
