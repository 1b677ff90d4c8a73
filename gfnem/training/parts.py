"""What EM asks of data and evaluators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior

if TYPE_CHECKING:
    from gfnem.run import Run

Metrics = dict[str, float]


class Data(Protocol):
    """Yields batches of x."""

    def train_batches(self, epoch: int) -> Sequence[Any]:
        """All training data once, in an order that depends on the epoch alone."""
        ...


class Evaluator(Protocol):
    """Rates a model and a posterior on held-out data."""

    selection: str

    def __call__(
        self, model: LatentVariableModel, posterior: Posterior, split: str, final: bool = False
    ) -> Metrics:
        """Metrics under `split/...`; `selection` is the one of them that is minimised."""
        ...

    def report(self, model: LatentVariableModel, posterior: Posterior, run: Run) -> None:
        """Tables and figures of a finished run."""
        ...
