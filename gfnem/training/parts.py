"""What EM asks of data and evaluators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from gfnem.errors import UserError
from gfnem.model import ClosedFormModel, LatentVariableModel
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

    def __call__(
        self, model: LatentVariableModel, posterior: Posterior, split: str, final: bool = False
    ) -> Metrics:
        """Return metrics under `split/...`."""
        ...

    def selection(self, model: LatentVariableModel) -> str:
        """Return the metric of the validation split that is minimised."""
        ...

    def report(self, model: LatentVariableModel, posterior: Posterior, run: Run) -> None:
        """Add tables and figures to a finished run."""
        ...


def check_parts(model: LatentVariableModel, posterior: Posterior, frozen: bool) -> None:
    """Raise UserError where a model and a posterior cannot be trained together.

    Args:
        model, posterior: what is to be trained.
        frozen: whether the model stays as it is.
    """
    posterior.check(model)
    if frozen and not posterior.parameter_groups():
        raise UserError("em.m_steps=0 trains the posterior alone, but it has no parameters")
    if frozen and posterior.joint:
        raise UserError(
            f"em.m_steps=0 trains the posterior alone, but {type(posterior).__name__} and the "
            "model learn in one step: use another posterior"
        )
    if posterior.closed_m_step and not isinstance(model, ClosedFormModel):
        raise UserError(
            f"posterior.m_step=closed needs a model that knows its maximum; "
            f"{type(model).__name__} does not: take an m_step by gradient"
        )
