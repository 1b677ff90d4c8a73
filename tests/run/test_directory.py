"""One run is one directory, and nothing in it is lost or doubled by a stop and a resume."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure

from gfnem.errors import UserError
from gfnem.run import Run

CONFIG = {"task": {"name": "grammar", "lengths": [2, 20]}, "seed": 3, "note": "ε"}


class Recorder:
    """A tracker that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def start(self, path: Path, config: Mapping[str, Any]) -> None:
        self.told.append(("start", path, config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.told.append(("log", dict(values), step))

    def summary(self, values: Mapping[str, Any]) -> None:
        self.told.append(("summary", dict(values)))

    def figure(self, name: str, path: Path) -> None:
        self.told.append(("figure", name, path))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.told.append(("table", name, columns, rows))

    def finish(self, status: str) -> None:
        self.told.append(("finish", status))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", CONFIG)


def log(run: Run, *steps: int) -> None:
    for step in steps:
        run.log({"train/e_loss": 0.5 * step}, {"train/m_steps": step})


@pytest.mark.parametrize("config", [CONFIG, yaml.safe_dump(CONFIG)])
def test_config_is_kept(tmp_path: Path, config: dict[str, Any] | str) -> None:
    run = Run.create(tmp_path / "a" / "b", config)
    assert run.config == CONFIG
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
    assert Run.open(run.path).config == CONFIG


def test_run_starts_in_a_directory_with_other_files(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    assert Run.create(tmp_path, CONFIG).metrics() == []


def test_second_run_in_a_directory_is_refused(run: Run) -> None:
    with pytest.raises(UserError, match="holds a run already: resume that one or name a new"):
        Run.create(run.path, CONFIG)


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot start a run in .*file/run \(Not a directory\)"):
        Run.create(tmp_path / "file" / "run", CONFIG)


def test_lines_are_on_disk_at_once_as_strict_json(run: Run) -> None:
    run.log({"a": torch.tensor(1.5), "b": math.nan, "c": -math.inf}, {"train/m_steps": 1})  # type: ignore[dict-item]
    (line,) = (run.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"train/m_steps": 1, "a": 1.5, "b": None, "c": None}
    (read,) = run.metrics()
    assert read["a"] == 1.5 and math.isnan(read["b"]) and math.isnan(read["c"])


def test_resumed_run_repeats_no_line(run: Run) -> None:
    log(run, 1, 2, 3)
    run.save_checkpoint({"lines": run.lines})
    log(run, 4, 5)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"train/m_steps": 6, "train/e_')  # killed in the middle of a line

    resumed = Run.open(run.path)
    assert [line["train/m_steps"] for line in resumed.metrics()] == [1, 2, 3, 4, 5]
    resumed.truncate_metrics(resumed.load_checkpoint()["lines"])
    log(resumed, 4, 5, 6)
    assert [line["train/m_steps"] for line in resumed.metrics()] == [1, 2, 3, 4, 5, 6]
    assert resumed.lines == 6 == Run.open(run.path).lines


def test_lost_lines_are_reported(run: Run) -> None:
    log(run, 1, 2)
    with pytest.raises(UserError, match=r"metrics\.jsonl has 2 lines, .* written after 3: restore"):
        run.truncate_metrics(3)


def test_broken_line_is_named(run: Run) -> None:
    log(run, 1)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write("oops\n")
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl is not a JSON object: repair"):
        run.metrics()


def test_summary_is_replaced_in_one_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"test/nll_per_token": 5.2, "model/name": "pcfg", "test/tokens": 12}
    run.write_summary(first)
    assert run.summary() == first

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run.write_summary({"test/nll_per_token": 1.0})
    assert run.summary() == first
    run.write_summary({"test/f1": math.inf})
    assert json.loads((run.path / "summary.json").read_text()) == {"test/f1": None}


def test_missing_and_broken_summary(run: Run) -> None:
    with pytest.raises(UserError, match=r"has no summary\.json: the run is not complete, resume"):
        run.summary()
    (run.path / "summary.json").write_text("[1]")
    with pytest.raises(UserError, match=r"summary\.json is not a JSON object: repair"):
        run.summary()


def test_last_and_best_checkpoint(run: Run) -> None:
    run.save_checkpoint({"step": 1}, best=True)
    run.save_checkpoint({"step": 2})
    assert run.load_checkpoint() == {"step": 2}
    assert run.load_checkpoint("best") == {"step": 1}


def test_unreadable_checkpoint_points_to_the_other(run: Run) -> None:
    with pytest.raises(UserError, match=r"last\.pt does not exist: there is no other in this run"):
        run.load_checkpoint()
    run.save_checkpoint({"step": 1})
    with pytest.raises(UserError, match=r"best\.pt does not exist: .* checkpoint=last"):
        run.load_checkpoint("best")
    run.save_checkpoint({"step": 2}, best=True)
    (run.path / "checkpoints" / "last.pt").write_bytes(b"half")
    with pytest.raises(UserError, match=r"last\.pt cannot be read, .* checkpoint=best"):
        run.load_checkpoint()


def test_open_names_what_is_missing_or_broken(run: Run) -> None:
    with pytest.raises(UserError, match="run directory .*elsewhere does not exist: check the path"):
        Run.open(run.path / "elsewhere")
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no metrics\.jsonl: it is not the directory of a run"):
        Run.open(run.path)
    (run.path / "metrics.jsonl").touch()
    for broken in (b"a: [", b"just text", b"\xff\xfe"):
        (run.path / "config.yaml").write_bytes(broken)
        with pytest.raises(UserError, match=r"config\.yaml is not a YAML mapping: repair"):
            Run.open(run.path)
    (run.path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"has no config\.yaml: it is not the directory of a run"):
        Run.open(run.path)


def test_figures_and_tables_become_files(run: Run) -> None:
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([1, 2])
    run.add_figure("curve", figure)
    image = (run.path / "plots" / "curve.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert [int.from_bytes(image[i : i + 4], "big") for i in (16, 20)] == [300, 150]

    rows = [("the cat, asleep", 1.5), ('say "no"', 2)]
    run.add_table("parses", ["sentence", "score"], rows)
    with (run.path / "tables" / "parses.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["sentence", "score"],
            ["the cat, asleep", "1.5"],
            ['say "no"', "2"],
        ]


def test_tracker_is_told_everything(tmp_path: Path) -> None:
    tracker = Recorder()
    run = Run.create(tmp_path / "run", CONFIG, tracker)
    log(run, 10)
    run.write_summary({"test/f1": 30.0})
    run.add_figure("empty", Figure(figsize=(1, 1)))
    run.add_table("words", ["word"], iter([["a"]]))
    run.finish("stopped")
    path = run.path
    assert tracker.told == [
        ("start", path, CONFIG),
        ("log", {"train/m_steps": 10, "train/e_loss": 5.0}, 0),
        ("summary", {"test/f1": 30.0}),
        ("figure", "empty", path / "plots" / "empty.png"),
        ("table", "words", ["word"], [["a"]]),
        ("finish", "stopped"),
    ]

    tracker = Recorder()
    log(Run.open(path, tracker), 20)
    assert tracker.told[1] == ("log", {"train/m_steps": 20, "train/e_loss": 10.0}, 1)
