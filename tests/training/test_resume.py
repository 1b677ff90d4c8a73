"""Runs that stop go on as if they had never stopped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gfnem.em import EM
from gfnem.run import Run
from gfnem.schedule import AdaptiveThreshold, Alternation
from gfnem.training.limits import Stopwatch
from tests.training.tiny import (
    NAN,
    Metrics,
    Mixture,
    Rater,
    Table,
    Told,
    Urn,
    fail,
    interrupt_twice,
    lines,
    optimizers,
    parameters,
    plain,
    stopping,
    without_times,
)


def alternating(run: Run, data: Urn | None = None, **options: Any) -> EM:
    """26 batches: 3 for warm-up, then cycles of 4; 7 in an epoch, 4 between lines."""
    options = {"evaluator": Rater(), "device": "cpu"} | options
    schedule = Alternation(e_steps=2, m_steps=3, warmup_e_steps=3)
    return EM(
        Mixture(), Table(), data or Urn(), m_steps=17, schedule=schedule, evaluate_every=5,
        log_every=4, warmup=12, run=run, seed=0, **optimizers(), **options,
    )  # fmt: skip


def adaptive(run: Run, data: Urn | None = None, **options: Any) -> EM:
    """26 batches, of which 16 have an M-step."""
    options = {"evaluator": Rater(), "device": "cpu"} | options
    schedule = AdaptiveThreshold(maximum=1.9, minimum=1.7, horizon=10, decay=0.8)
    return EM(
        Mixture(), Table(), data or Urn(), m_steps=100, max_e_steps=26, schedule=schedule,
        evaluate_every=5, log_every=4, warmup=12, average=0.7, run=run, seed=0, **optimizers(),
        **options,
    )  # fmt: skip


def resumed(make: Callable[..., EM], path: Path, **options: Any) -> tuple[EM, Run]:
    run = Run.open(path)
    em = make(run, **options)
    em.load_state_dict(run.load_checkpoint("last"))
    return em, run


@dataclasses.dataclass
class Reference:
    """A run that was never stopped."""

    make: Callable[..., EM]
    lines: list[str]
    summary: Metrics
    trained: dict[str, Any]

    @classmethod
    def of(cls, make: Callable[..., EM], path: Path) -> Reference:
        run = Run.create(path, {})
        em = make(run)
        summary = without_times(em.fit())
        assert em.done.batches == 26
        return cls(make, lines(run), summary, run.load_checkpoint("last"))

    def assert_equals(self, run: Run, summary: Metrics) -> None:
        """To the last bit."""
        assert lines(run) == self.lines
        assert without_times(summary) == self.summary
        assert without_times(run.summary()) == self.summary
        state = run.load_checkpoint("last")
        for part in state.keys() - {"done"}:
            assert plain(state[part]) == plain(self.trained[part]), part


@pytest.fixture(scope="module", params=[alternating, adaptive], ids=lambda make: make.__name__)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    with torch.random.fork_rng([]):
        return Reference.of(request.param, tmp_path_factory.mktemp("reference"))


def test_reference_holds_what_its_tests_need(reference: Reference) -> None:
    rated = [json.loads(line) for line in reference.lines if '"valid/nll"' in line]
    m_steps = int(reference.summary["train/m_steps"])
    # The last one is out of turn.
    assert [line["train/m_steps"] for line in rated] == [5, 10, 15, m_steps]
    assert m_steps in (16, 17) and reference.summary["train/e_steps"] != m_steps
    assert sum('"train/m_loss"' in line for line in reference.lines) >= 5


@pytest.mark.parametrize(
    ("reference", "number"),
    [(alternating, number) for number in range(26)] + [(adaptive, n) for n in (3, 9, 16, 25)],
    indirect=["reference"],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_stopped_run_goes_on(reference: Reference, tmp_path: Path, told: Told, number: int) -> None:
    """In mid-cycle, mid-epoch, mid-window, before, with and after evaluations."""
    stopped = Run.create(tmp_path / "run", {}, told)
    em = reference.make(stopped, stopping(number))
    summary = em.fit()
    assert em.done.batches == number + 1
    assert told.ends == ["stopped"]
    assert without_times(stopped.summary()) == without_times(summary)
    assert not any(key.startswith("test/") for key in summary)

    em, run = resumed(reference.make, stopped.path)
    reference.assert_equals(run, em.fit())
    assert em.done.seconds > summary["time/seconds"]


def test_run_goes_on_after_many_stops(reference: Reference, tmp_path: Path) -> None:
    stops = 2, 3, 11, 18, 25
    reference.make(Run.create(tmp_path / "run", {}), stopping(*stops)).fit()
    for _ in stops[1:]:
        resumed(reference.make, tmp_path / "run", data=stopping(*stops))[0].fit()
    em, run = resumed(reference.make, tmp_path / "run")
    reference.assert_equals(run, em.fit())


def test_best_score_is_kept_across_a_stop(run: Run) -> None:
    alternating(run, stopping(10), evaluator=Rater(scores=[1.0])).fit()
    em, _ = resumed(alternating, run.path, evaluator=Rater(scores=[2.0, 3.0, NAN]))
    summary = em.fit()
    assert (summary["train/best_m_steps"], summary["valid/nll"]) == (5, 1.0)


def test_second_stop_tells_of_the_evaluation_before_the_first(tmp_path: Path) -> None:
    once, twice = (Run.create(tmp_path / name, {}) for name in ("once", "twice"))
    expected = without_times(alternating(once, stopping(11)).fit())
    alternating(twice, stopping(10)).fit()
    em, run = resumed(alternating, twice.path, data=stopping(11))
    assert without_times(em.fit()) == without_times(run.summary()) == expected
    assert "valid/nll" in expected


def test_fit_called_again_goes_on(reference: Reference, run: Run) -> None:
    em = reference.make(run, stopping(10))
    em.fit()
    reference.assert_equals(run, em.fit())


def test_finished_run_is_only_rated_again(reference: Reference, run: Run) -> None:
    reference.make(run).fit()
    evaluator = Rater()
    em, again = resumed(reference.make, run.path, evaluator=evaluator)
    reference.assert_equals(again, em.fit())
    assert evaluator.calls == [("test", True)]


@pytest.mark.parametrize(
    ("how", "error", "status"),
    [(fail, RuntimeError, "failed"), (interrupt_twice, KeyboardInterrupt, "stopped")],
)
@pytest.mark.parametrize("where", ["training", "evaluation", "test"])
@pytest.mark.parametrize("reference", [alternating], indirect=True, ids=["alternating"])
def test_broken_run_goes_on_from_its_last_checkpoint(
    reference: Reference,
    run: Run,
    told: Told,
    where: str,
    how: Callable[[], None],
    error: type[BaseException],
    status: str,
) -> None:
    breaking = {"training": [], "evaluation": ["valid"] * 3, "test": ["test"]}[where]

    def count(split: str) -> None:
        if split in breaking:
            breaking.remove(split)
            if not breaking:
                how()

    data = stopping(20, how=how) if where == "training" else Urn()
    with pytest.raises(error):
        alternating(run, data, evaluator=Rater(before=count)).fit()
    assert told.ends == [status]
    assert not (run.path / "summary.json").exists()
    em, run = resumed(alternating, run.path)
    assert em.done.m_steps == {"training": 10, "evaluation": 10, "test": 17}[where]
    reference.assert_equals(run, em.fit())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_run_on_a_gpu_goes_on_there_and_on_the_cpu(tmp_path: Path) -> None:
    make = partial(alternating, device="cuda")
    reference = Reference.of(make, tmp_path / "reference")
    for name, device in (("gpu", "cuda"), ("cpu", "cpu")):
        stopped = Run.create(tmp_path / name, {})
        make(stopped, stopping(10)).fit()
        em, run = resumed(partial(alternating, device=device), stopped.path)
        summary = em.fit()
        assert parameters(em)[0].device.type == device
        if device == "cuda":
            reference.assert_equals(run, summary)


def test_a_run_that_is_killed_before_its_first_evaluation_goes_on(
    reference: Reference, run: Run
) -> None:
    with pytest.raises(RuntimeError):
        reference.make(run, stopping(0, how=fail)).fit()
    em, again = resumed(reference.make, run.path)
    assert em.done.batches == 0
    reference.assert_equals(again, em.fit())


def test_checkpoints_by_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = run.save_checkpoint

    def note(state: dict[str, Any], best: bool) -> None:
        saved.append((state["done"]["m_steps"], best))
        save(state, best)

    monkeypatch.setattr(run, "save_checkpoint", note)
    em = EM(Mixture(), Table(), Urn(), 12, evaluate_every=5, checkpoint_minutes=1.5, run=run)
    # Each M-step takes 45 seconds.
    monkeypatch.setattr(Stopwatch, "seconds", property(lambda _: 45.0 * em.done.m_steps))
    em.fit()
    assert saved == [
        *[(0, False), (2, False), (4, False), (5, True)],
        *[(7, False), (9, False), (10, True), (12, False), (12, True)],
    ]
