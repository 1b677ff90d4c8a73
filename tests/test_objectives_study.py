"""The study of objectives, on two runs of a few steps."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow

FEW = [
    *(f"data.{split}_points=20" for split in ("train", "valid", "test")),
    "em.max_e_steps=4",
    "em.evaluate_every=2",
]


@pytest.fixture
def study(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location(
        "objectives_study", root / "scripts" / "objectives_study.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(root / "scripts")
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, "objectives_study", module)
    spec.loader.exec_module(module)
    return module


def test_every_objective_is_run_where_it_can_be(study: Any) -> None:
    study.MODELS = {"mixture": "objectives"}
    jobs = list(study.all_jobs(Path("runs"), ["seed=0"]))
    found = {(job.objective, job.behaviour) for job in jobs}
    assert len(found) == len(jobs) == 10 + 6 + 6
    assert len({job.directory for job in jobs}) == len(jobs)
    assert {o for o, behaviour in found if behaviour == "epsilon 0.1"} == {
        *("tb", "subtb", "db", "fl_db", "vargrad", "tb_sleep")
    }
    assert ("reverse_kl", "on-policy") in found


def test_runs_end_in_a_table_and_a_figure(
    study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study.MODELS = {"mixture": "objectives"}
    study.OFF_POLICY = {}
    given = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    given += ["--processes", "1", "objective=tb,vargrad", "seed=0", "device=cpu", *FEW]
    assert study.main(given) == 0
    table = (tmp_path / "out" / "objectives.md").read_text().splitlines()
    assert [line.split(" | ")[:3] for line in table[2:]] == [
        ["| mixture", "tb", "on-policy"],
        ["| mixture", "vargrad", "on-policy"],
    ]
    assert (tmp_path / "out" / "objectives.png").read_bytes().startswith(b"\x89PNG")
    assert "2 of them to be done" in capsys.readouterr().out
    # What is complete is not run again.
    assert study.main(given) == 0
    assert "0 of them to be done" in capsys.readouterr().out


def test_steps_that_some_seeds_never_need(study: Any) -> None:
    texts = [study.text(study.STEPS, np.array(steps)) for steps in ([40, 80, 60], [20, np.inf, 40])]
    assert texts == ["60", "40 (2 of 3)"]
    assert study.text(study.STEPS, np.array([np.inf, np.inf])) == "never"
    assert study.text(study.STEPS, np.array([np.inf, 20, np.inf])) == "never (1 of 3)"
    assert study.text("modes covered", np.array([0.5, 1.0])) == "0.750 ± 0.354"
