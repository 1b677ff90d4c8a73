"""Updates that are not finite, and runs that diverge."""

from __future__ import annotations

import math

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from gfnem.em import EM
from gfnem.run import Run
from gfnem.training.trainer import Diverged
from tests.training.tiny import (
    Mixture,
    Rater,
    Symbols,
    Table,
    Told,
    Urn,
    curve,
)


class Poisoned(Mixture):
    """A likelihood that is not a number in M-steps of these numbers, counted from 0."""

    def __init__(self, *poisoned: int) -> None:
        super().__init__()
        self.poisoned = poisoned
        self.m_steps = 0

    def log_joint(self, x: Symbols, z: Tensor) -> Float[Tensor, "batch samples"]:
        value = super().log_joint(x, z)
        if torch.is_grad_enabled():
            self.m_steps += 1
            if self.m_steps - 1 in self.poisoned:
                return value * math.nan
        return value


def test_skipped_updates_are_counted_and_kept_out_of_the_means(run: Run) -> None:
    em = EM(Poisoned(1, 2, 7), Table(), Urn(), 10, log_every=5, run=run)
    em.fit()
    assert curve(run, "train/skipped") == [2, 3]
    assert all(math.isfinite(loss) for loss in curve(run, "train/m_loss"))
    assert em.done.m_steps == 10


def test_diverged_run_keeps_the_parameters_of_its_last_update(run: Run, told: Told) -> None:
    evaluator = Rater()
    em = EM(
        Poisoned(*range(5, 100)), Table(), Urn(), 100, evaluator=evaluator, evaluate_every=5,
        run=run,
    )  # fmt: skip
    with pytest.raises(Diverged, match="^the model's loss"):
        em.fit()
    assert em.done.m_steps == 14
    assert told.ends == ["failed"]
    assert not (run.path / "summary.json").exists()
    for which in ("last", "best"):
        kept = run.load_checkpoint(which)["model"]["symbol"]
        assert torch.equal(kept, evaluator.rated[0]) and kept.isfinite().all()


def test_posterior_that_diverges_is_named() -> None:
    class Broken(Table):
        def divergence(self, model: Mixture, x: Symbols, log_q: Tensor) -> Float[Tensor, ""]:
            return super().divergence(model, x, log_q) * math.inf

    em = EM(Mixture(), Broken(), Urn(), 100)
    with pytest.raises(Diverged, match="^the posterior's loss or gradient was not finite 10 times"):
        em.fit()
    assert em.done.m_steps == 0  # no M-step before the E-steps of its cycle are done
