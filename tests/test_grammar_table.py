"""The table of grammars, on runs of a few steps."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from gfnem.run.finished import FinishedRun


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(root / "scripts")
    return importlib.import_module("grammar_table")


def test_runs_end_in_a_table(
    script: Any, tmp_path: Path, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.md"
    given = ["--runs", str(tmp_path / "runs"), "--out", str(out), "--processes", "1"]
    given += ["--data", "toy_english", "--max-length", "12", "--rows", "marginal,gflownet"]
    given += ["--seeds", "0", "--experiments", "grammar_cfg", "--m-steps", "4"]
    few = [f"data.{split}_sentences=8" for split in ("train", "valid", "test")]
    given += [option for option in tiny_run if not option.startswith("em.m_steps")]
    given += ["device=cpu", "data.batch_size=4", *few]
    for wrong, message in (
        (["--rows", "gibbs"], "--rows gibbs: choose of marginal, exact_sampling, mcem, gflownet"),
        (["schedule.warmup_e_steps=0"], "schedule.warmup_e_steps is no option of this config"),
    ):
        with pytest.raises(SystemExit):
            script.main([*given, *wrong])
        assert message in capsys.readouterr().err
    assert script.main([*given, "posterior.samples=1"]) == 1
    printed = capsys.readouterr()
    assert "2 runs, 2 of them to be done" in printed.out
    assert "posterior.samples is 1; objective=vargrad needs at least 2" in printed.err
    assert not out.exists()
    assert script.main(given) == 0
    # That of exact training is complete.
    assert "2 runs, 1 of them to be done" in capsys.readouterr().out
    given_data, _, head, _, *lines = [line.split(" | ") for line in out.read_text().splitlines()]
    assert given_data == ["data=toy_english data.max_length=12"]
    assert [line[:3] for line in lines] == [
        ["| grammar_cfg", "marginal", "1"],
        ["| grammar_cfg", "gflownet", "1"],
        *(
            [f"| {kind} trees", "", ""]
            for kind in ("left-branching", "right-branching", "random", "gold")
        ),
    ]
    assert all(len(line) == len(head) for line in lines)
    assert 0 <= float(lines[-1][head.index("right edge, q")]) <= 1
    assert float(lines[2][head.index("sentence F1")]) >= 0
    nats, gap = (head.index(name) for name in ("nats per word", "posterior gap"))
    assert all(0 < float(line[nats]) < 10 for line in lines[:2])
    assert abs(float(lines[0][gap])) < 1e-3 < float(lines[1][gap])
    # What is complete is not run again.
    assert script.main(given) == 0
    assert "2 runs, 0 of them to be done" in capsys.readouterr().out


def test_numbers_of_a_run(script: Any) -> None:
    """A bound stands where there is no likelihood; an evaluation does not count as M-steps."""
    times = [(0, 0.0), (0, 5.0), (2, 6.0), (4, 7.0), (4, 7.0), (6, 12.0)]
    lines = [{"train/m_steps": steps, "time/seconds": seconds} for steps, seconds in times]
    summary = {
        "test/iw_nll_per_token": 5.0,
        "test/iw_samples": 128,
        "time/total_seconds": 90.0,
    }
    seeds = [
        script.numbers_of(
            FinishedRun.of("run", {}, summary | {"test/iw_nll_per_token": nats}, lines)
        )
        for nats in (5.0, 5.2)
    ]
    assert seeds[0]["seconds per M-step"] == 0.5 and seeds[0]["minutes"] == 1.5
    assert script.texts("nats per word", [seeds]) == ["≤ 5.10 ± 0.14 (K = 128)"]
    assert script.texts("posterior gap", [seeds]) == ["–"]
