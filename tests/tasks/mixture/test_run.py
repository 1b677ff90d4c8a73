"""Runs from the command line on little data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gfnem.app.main import main
from gfnem.tasks.mixture.evaluate import MixtureEvaluator

POSTERIORS = [
    ["policy.width=8", "schedule.warmup_e_steps=3"],
    ["posterior=exact", "posterior.m_step=closed"],
    ["posterior=mean_field"],
    ["posterior=mcmc"],
    ["posterior=importance", "posterior.m_step=gradient"],
]


def lines(run: str) -> list[dict[str, float]]:
    text = Path(run, "metrics.jsonl").read_text()
    rows = map(json.loads, text.splitlines())
    return [{k: v for k, v in row.items() if k != "time/seconds"} for row in rows]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_train_resume_and_evaluate(
    posterior: list[str],
    tiny_mixture: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = [f"data.{split}_points=60" for split in ("train", "valid", "test")]
    given = [*tiny_mixture, *sizes, *posterior]
    assert main([*given, "run_dir=whole"]) == 0
    plots = {path.stem for path in Path("whole", "plots").iterdir()}
    assert plots == {"learning_curves", "assignments", "means"}
    # Figures take longer than all else.
    monkeypatch.setattr(MixtureEvaluator, "report", lambda *arguments: None)
    assert main([*given, "em.m_steps=2", "run_dir=half"]) == 0
    assert main(["resume=half", "em.m_steps=4"]) == 0
    rated = [line for line in lines("whole") if "valid/nll" in line]
    assert rated == [line for line in lines("half") if "valid/nll" in line]
    summary = json.loads(Path("whole", "summary.json").read_text())
    assert summary["test/log_likelihood"] == -summary["test/nll"] < 0
    assert summary["train/m_steps"] == 4 and summary["time/seconds"] > 0
    capsys.readouterr()
    assert main(["evaluate", "run=whole"]) == 0
    assert f"{summary['test/log_likelihood']:.4f}" in capsys.readouterr().out


def test_own_points(tiny_mixture: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    np.save("points.npy", np.random.default_rng(0).normal(size=(40, 3)))
    given = [*tiny_mixture, "data=points", "posterior=exact", "model.superclusters=2"]
    assert main([*given, "data.file=points.npy", "run_dir=run"]) == 0
    assert "points.npy: 32 training" in capsys.readouterr().out
    plots = {path.stem for path in Path("run", "plots").iterdir()}
    assert plots == {"learning_curves", "assignments", "means"}
    assert main([*given, "data.file=nosuch.csv"]) == 2
    assert capsys.readouterr().err == (
        "gfnem: nosuch.csv cannot be read: No such file or directory; check data.file\n"
    )
