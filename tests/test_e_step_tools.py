"""The study of the E-step's tools: its runs can be made, and its tables hold what they left."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from gfnem.app.composition import compose
from gfnem.app.options import resolve
from gfnem.run.finished import FinishedRun


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(root / "scripts")
    return importlib.import_module("e_step_tools")


def test_every_tool_can_be_used(script: Any, tmp_path: Path) -> None:
    grammar = script.exact_grammar(tmp_path, ("seed=3",))
    fixed = list(script.fixed_jobs(tmp_path, grammar.directory, "0", ()))
    moving = list(script.moving_jobs(tmp_path, "0", ()))
    assert [job.tool for job in fixed] == list(script.TOOLS)
    assert [job.tool for job in moving] == [*script.TOOLS, *script.ONLY_IN_EM]
    jobs = [grammar, *fixed, *moving]
    assert len({job.directory for job in jobs}) == len(jobs)
    configs = [resolve(compose(job.overrides)) for job in jobs]
    assert all(config["model"]["nonterminals"] == 12 for config in configs)
    assert len({str(config) for config in configs}) == len(jobs)


def test_tables(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def finished(job: Any) -> FinishedRun:
        seed = int(job.directory.name[-1])
        summary = {"train/e_steps": 400, "test/posterior_gap": 9.0, "train/posterior_gap": 0.1}
        lines = [
            {"train/e_steps": 80, "time/seconds": 1.0},
            {"train/e_steps": 100, "time/seconds": 2.0 + seed},
            {"train/e_steps": 100, "time/seconds": 2.0 + seed, "valid/posterior_gap": 3.0},
            {"train/e_steps": 400, "time/seconds": 9.0, "valid/posterior_gap": 2.0 + seed},
        ]
        return FinishedRun.of("run", {}, summary, lines)

    monkeypatch.setattr(script.ToolJob, "finished", finished)
    jobs = [job for seed in "01" for job in script.fixed_jobs(Path(), Path(), seed, ())]
    head, _, first, *others = script.table(jobs, script.FIXED).splitlines()
    assert len(others) + 1 == len(script.TOOLS)
    cells = dict(zip(head.split(" | "), first.split(" | "), strict=True))
    assert (cells["| tool"], cells["seeds"]) == ("| none", "2")
    assert cells["gap, 100 E-steps"] == "3"
    assert cells["gap, 400 E-steps"] == "2.50 ± 0.71"
    assert cells["best gap, training"] == "0.1000"
    assert cells["distinct trees, q"] == "–"
    *_, last = script.table(jobs, {"gap": "", script.F1: ""}, right_f1=46.23).splitlines()
    assert last == "| right-branching trees |  |  | 46.23 |"
    # Seconds of the lines are (1, 0, 7) and (2, 0, 6), for 20 and 300 E-steps.
    assert cells["ms per E-step |"] == "48 ± 16 |"
