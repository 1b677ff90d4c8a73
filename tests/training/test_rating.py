"""The end of training, evaluations, and which was best."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.run import Run
from gfnem.schedule import Alternation
from tests.training.tiny import (
    INF,
    NAN,
    Mixture,
    Rater,
    Table,
    Told,
    Urn,
    lines,
    optimizers,
    parameters,
    same,
    without_times,
)


def test_ends_after_so_many_e_steps(told: Told, run: Run) -> None:
    evaluator = Rater()
    schedule = Alternation(e_steps=2, m_steps=1)
    em = EM(Mixture(), Table(), Urn(), 100, 5, schedule, evaluator=evaluator, run=run)
    summary = em.fit()
    assert summary["train/e_steps"] == 5 and summary["train/m_steps"] == 2
    assert evaluator.calls == [("valid", False), ("test", True)]
    assert told.ends == ["finished"]


def test_ends_before_the_first_m_step(run: Run) -> None:
    schedule = Alternation(warmup_e_steps=10)
    em = EM(Mixture(), Table(), Urn(), 9, 4, schedule, evaluator=Rater(), run=run)
    summary = em.fit()
    assert summary["train/m_steps"] == summary["train/best_m_steps"] == 0
    assert "test/nll" in summary


@pytest.mark.parametrize(("m_steps", "at"), [(10, [4, 8, 10]), (8, [4, 8]), (3, [3])])
def test_evaluations(run: Run, m_steps: int, at: list[int]) -> None:
    evaluator = Rater()
    schedule = Alternation(e_steps=2)  # batches without an M-step must not rate a second time
    em = EM(
        Mixture(), Table(), Urn(), m_steps, schedule=schedule, evaluator=evaluator,
        evaluate_every=4, run=run,
    )  # fmt: skip
    summary = em.fit()
    assert evaluator.calls == [("valid", False)] * len(at) + [("test", True)]
    assert [line["train/m_steps"] for line in run.metrics() if "valid/nll" in line] == at
    assert evaluator.reported == 1
    assert without_times(run.summary()) == without_times(summary)
    keys = {f"{split}/{name}" for split in ("valid", "test") for name in ("nll", "bound")}
    counters = {"train/m_steps", "train/e_steps", "train/best_m_steps", "time/seconds"}
    assert set(summary) == keys | counters
    assert summary["train/m_steps"] == m_steps and summary["train/e_steps"] == 2 * m_steps
    assert summary["time/seconds"] > 0


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([3.0, 1.0, 2.0], 2),
        ([2.0, 2.0], 1),
        ([3.0, NAN, 2.0, NAN], 3),
        ([NAN, 5.0, 4.0, 6.0], 3),
        ([NAN, INF, 4.0], 3),
        ([INF, INF], 1),
        ([NAN, NAN], 2),
    ],
)
def test_best_checkpoint_is_tested(run: Run, scores: list[float], best: int) -> None:
    evaluator = Rater(scores=scores)
    em = EM(Mixture(), Table(), Urn(), len(scores), evaluator=evaluator, evaluate_every=1, run=run)
    summary = em.fit()
    assert summary["train/best_m_steps"] == best
    assert summary["valid/nll"] == pytest.approx(scores[best - 1], nan_ok=True)
    *valid, test = evaluator.rated
    assert [torch.equal(test, rated) for rated in valid].index(True) == best - 1
    assert torch.equal(run.load_checkpoint("best")["model"]["symbol"], test)
    assert run.load_checkpoint("last")["done"]["m_steps"] == len(scores)


def test_a_selection_that_is_no_metric() -> None:
    evaluator = Rater()
    evaluator.selected = "valid/posterior_gap"
    message = (
        "^valid/posterior_gap is to tell which checkpoint is best, but it is not known of this "
        "model with Table: use another evaluator.select$"
    )
    with pytest.raises(UserError, match=message):
        EM(Mixture(), Table(), Urn(), 1, evaluator=evaluator).fit()


@pytest.mark.parametrize("log_every", [1, 4])
def test_evaluation_does_not_change_training(tmp_path: Path, log_every: int) -> None:
    logged, trained = [], []
    for every in (5, 7):
        run = Run.create(tmp_path / str(every), {})
        em = EM(
            Mixture(), Table(), Urn(), 20, schedule=Alternation(2, 3), evaluator=Rater(),
            evaluate_every=every, log_every=log_every, run=run, seed=0,
        )  # fmt: skip
        em.fit()
        logged.append([line for line in lines(run) if "valid/" not in line])
        trained.append(run.load_checkpoint("last")["model"])
    assert logged[0] == logged[1] and len(logged[0]) > 4
    assert same(*(list(state.values()) for state in trained))


def test_evaluation_leaves_modes_and_random_numbers_even_when_it_fails() -> None:
    def fail(split: str) -> None:
        torch.rand(3)
        if split == "test":
            raise KeyboardInterrupt

    em = EM(Mixture(), Table(), Urn(), 1, evaluator=Rater(before=fail))
    em.posterior.eval()
    state = torch.get_rng_state()
    em.evaluate("valid")
    with pytest.raises(KeyboardInterrupt):
        em.evaluate("test")
    assert em.model.training and not em.posterior.training
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_draws_the_same_numbers_every_time() -> None:
    em = EM(Mixture(), Table(), Urn(), 1, evaluator=Rater())
    rated = em.evaluate("valid")
    torch.rand(1)
    assert em.evaluate("valid") == rated


def test_without_run_and_with_it_the_same_is_learned(run: Run) -> None:
    summaries, trained = [], []
    for where in (run, None):
        em = EM(Mixture(), Table(), Urn(), 9, evaluator=Rater(scores=[1.0]), run=where, seed=0)
        summaries.append(without_times(em.fit()))
        trained.append(parameters(em))
    assert summaries[0] == summaries[1] and same(*trained)


def test_without_evaluator(run: Run) -> None:
    model = Mixture()
    summary = EM(model, Table(), Urn(), 4, run=run).fit()
    counters = {"train/m_steps": 4, "train/e_steps": 4, "train/best_m_steps": 4}
    assert without_times(summary) == without_times(run.summary()) == counters
    assert torch.equal(run.load_checkpoint("last")["model"]["symbol"], model.symbol)
    assert EM(Mixture(), Table(), Urn(), 4).fit().keys() == summary.keys()


def test_batches_are_moved_to_the_device() -> None:
    devices = []
    data = Urn(used=lambda x, device: devices.append(device))
    EM(Mixture(), Table(), data, 3, device="cpu").fit()
    assert devices == [torch.device("cpu")] * 3


def test_average_of_weights_is_rated_and_kept(run: Run) -> None:
    class Noting(Mixture):
        def m_step_done(self, m_steps: int) -> None:
            trained.append(self.symbol.detach().clone())

    trained: list[Tensor] = []
    rater = Rater()
    em = EM(
        Noting(), Table(), Urn(), m_steps=3, evaluate_every=1, average=0.2, run=run, seed=0,
        evaluator=rater, **optimizers(),
    )  # fmt: skip
    average = Mixture().symbol.detach()
    em.fit()
    for decay, weights, valid in zip((0.1, 2 / 11, 0.2), trained, rater.rated, strict=False):
        average = decay * average + (1 - decay) * weights
        torch.testing.assert_close(valid, average)
    torch.testing.assert_close(run.load_checkpoint("last")["model"]["symbol"], average)
    with pytest.raises(UserError, match="em.average is 1; it must be from 0 to below 1, or null"):
        EM(Mixture(), Table(), Urn(), m_steps=3, average=1)
