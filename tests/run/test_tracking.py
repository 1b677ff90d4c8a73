"""Weights & Biases: everything arrives, and nothing that fails there stops a run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from matplotlib.figure import Figure
from wandb.errors import CommError
from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

import gfnem
from gfnem.errors import UserError
from gfnem.run import Run, WandbTracker, tracking


@pytest.fixture(autouse=True)
def nobody_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    wandb.teardown()


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What we log; wandb's own loggers stay within its files."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("gfnem")]


def log(run: Run, *steps: int) -> None:
    for step in steps:
        metrics = {"train/e_loss": 1 / step, "valid/nll_per_token": abs(step - 2.5)}
        metrics["valid/score"] = step
        run.log(metrics, {"train/m_steps": step})


def records(directory: Path) -> list[Record]:
    """Decode the one log of an offline run: LevelDB framing around protocol buffers."""
    wandb.teardown()  # its process writes the last records after `finish` has returned
    (path,) = directory.glob("*.wandb")
    data, position, message, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        size = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        message += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            found.append(Record.FromString(message))
            message = b""
    return found


def history(directory: Path) -> list[dict[str, Any]]:
    return [
        {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in r.history.item
        }
        for r in records(directory)
        if r.WhichOneof("record_type") == "history"
    ]


def offline_runs(run: Run) -> list[Path]:
    return sorted((run.path / "wandb").glob("offline-run-*"))


def test_offline_run_holds_everything_and_is_resumed_under_its_id(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def tracker() -> WandbTracker:
        return WandbTracker("project", group="seeds", job_type="train", tags=("small",))

    run = Run.create(tmp_path / "run", {"seed": 1, "patterns": {"highest": ["*score"]}}, tracker())
    log(run, 1, 2)
    run.add_figure("trees", Figure(figsize=(1, 1)))
    run.add_table("parses", ["sentence", "score"], [["a b", 1.5], ["c d", "none"]])
    run.write_summary({"valid/nll_per_token": 0.25})
    run.finish("stopped")
    (first,) = offline_runs(run)

    resumed = Run.open(run.path, tracker())
    resumed.truncate_metrics(1)
    log(resumed, 2, 3)
    resumed.finish("finished")
    (second,) = set(offline_runs(run)) - {first}
    assert capfd.readouterr() == ("", "")

    starts = [r.run for r in records(first) if r.WhichOneof("record_type") == "run"]
    assert (starts[0].project, starts[0].run_group, starts[0].job_type) == (
        "project",
        "seeds",
        "train",
    )
    assert list(starts[0].tags) == ["small"] and starts[0].display_name == "run"
    assert {u.key: u.value_json for u in starts[0].config.update}["seed"] == "1"
    again = [r.run for r in records(second) if r.WhichOneof("record_type") == "run"]
    assert starts[0].run_id == again[0].run_id
    assert (run.path / "wandb" / "run-id.txt").read_text().strip() == starts[0].run_id

    rows = history(first)
    assert [(row["_step"], row["train/m_steps"]) for row in rows] == [(0, 1), (1, 2)]
    assert rows[0]["train/e_loss"] == 1.0 and rows[1]["train/e_loss"] == 0.5
    assert rows[1]["plots/trees/_type"] == "image-file"
    assert rows[1]["tables/parses/_type"] == "table-file"
    (table,) = first.glob("files/media/table/tables/*.json")
    assert json.loads(table.read_text())["data"] == [["a b", 1.5], ["c d", "none"]]
    assert [(row["_step"], row["train/m_steps"]) for row in history(second)] == [(1, 2), (2, 3)]

    defined = [r.metric for r in records(first) if r.WhichOneof("record_type") == "metric"]
    assert {m.name: m.step_metric for m in defined} == {
        "train/m_steps": "",
        "train/e_loss": "train/m_steps",
        "valid/nll_per_token": "train/m_steps",
        "valid/score": "train/m_steps",
    }
    assert {m.name for m in defined if m.summary.min} == {"valid/nll_per_token"}
    assert {m.name for m in defined if m.summary.max} == {"valid/score"}
    final = [
        (update.key, update.value_json)
        for r in records(first)
        if r.WhichOneof("record_type") == "summary"
        for update in r.summary.update
    ]
    assert ("final/valid/nll_per_token", "0.25") in final
    exits = [r.exit.exit_code for r in (*records(first), *records(second)) if r.HasField("exit")]
    assert exits == [255, 0]


def test_without_login_nothing_is_asked_on_a_terminal(tmp_path: Path) -> None:
    program = """
from gfnem.run import Run, WandbTracker
run = Run.create("run", {}, WandbTracker(mode="online"))
run.log({"train/e_loss": 1.0}, {"train/m_steps": 1})
run.finish()
"""
    ours, theirs = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(gfnem.__file__).parents[1]), "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        assert child.wait(timeout=60) == 0
        (line,) = os.read(ours, 10_000).decode().splitlines()
    finally:
        child.kill()
        os.close(ours)
    assert line.startswith("wandb does not start online, the run is tracked offline (UsageError: ")
    assert len(history(offline_runs(Run.open(tmp_path / "run"))[-1])) == 1


def test_unreachable_service_does_not_hold_up_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_INIT_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_MODE", "online")
    began = time.monotonic()
    run = Run.create(tmp_path / "run", {}, WandbTracker())
    log(run, 1)
    run.finish()
    assert time.monotonic() - began < 20  # wandb itself would go on trying for 90 s
    (warning,) = messages(caplog)
    assert warning.startswith("wandb does not start online, the run is tracked offline (CommError")
    assert len(history(offline_runs(run)[-1])) == 1


def test_error_during_the_run_ends_the_tracking_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path / "run", {}, WandbTracker())

    def broken(*_: object, **__: object) -> None:
        raise CommError("connection lost\nand more")

    monkeypatch.setattr(wandb.Run, "log", broken)
    log(run, 1, 2)
    run.add_figure("empty", Figure(figsize=(1, 1)))
    run.finish()
    assert messages(caplog) == [
        "wandb failed, the run goes on without it (CommError: connection lost)"
    ]
    assert len(run.metrics()) == 2


def test_run_goes_on_untracked_when_nothing_of_wandb_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(wandb, "init", broken)
    run = Run.create(tmp_path / "run", {}, WandbTracker())
    log(run, 1)
    run.finish()
    assert messages(caplog) == [
        "wandb does not start offline, the run is not tracked (OSError: no space left)"
    ]


def test_disabled_needs_no_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = Run.create(tmp_path / "run", {}, WandbTracker(mode="disabled"))
    log(run, 1)
    run.add_table("words", ["word"], [["a"]])
    run.finish()
    assert not (run.path / "wandb").exists()


@pytest.mark.parametrize(
    ("options", "variables", "message"),
    [
        ({"tags": ["x" * 70]}, {}, "wandb refuses tracker.tags or WANDB_TAGS: .* is 70 characters"),
        ({"tags": ["a", ""]}, {}, "wandb refuses tracker.tags or WANDB_TAGS: .* is empty"),
        ({"project": "a/b"}, {}, "wandb refuses a setting: Invalid project name 'a/b'"),
        ({}, {"WANDB_BASE_URL": "here"}, "wandb refuses .*WANDB_BASE_URL: Input should be a valid"),
    ],
)
def test_settings_that_wandb_refuses(
    options: dict[str, Any],
    variables: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        WandbTracker(**options)


def test_the_old_name_of_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert WandbTracker().mode == "offline"


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"missing: pip install wandb, or take tracker=files"):
        Run.create(tmp_path / "run", {}, WandbTracker())


def test_unknown_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"tracker\.mode=on is unknown: choose one of online, off"):
        WandbTracker(mode="on")
    monkeypatch.setenv("WANDB_MODE", "dry")
    with pytest.raises(UserError, match="WANDB_MODE=dry is unknown"):
        WandbTracker()


def test_address_of_an_online_run_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb.Run, "url", "https://service/run")
    with caplog.at_level(logging.INFO, logger="gfnem"):
        Run.create(tmp_path / "run", {}, WandbTracker()).finish()
    assert messages(caplog) == ["wandb: https://service/run"]
