"""The console: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest

from gfnem.errors import UserError
from gfnem.run import Progress, Run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still: what its only item says."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_plain_line_per_logging_step(clock: list[float]) -> None:
    output = io.StringIO()
    progress = Progress(file=output)
    progress.start(total=1500, done=200)
    progress.update(200, {"train/e_loss": 3.0})
    clock[0] += 50
    progress.update(250)
    progress.update(
        300,
        {
            "train/e_loss": 1.204,
            "train/grad_norm": 9.0,
            "train/m_loss": 40.1,
            "train/gap": 0.01234,
            "valid/nll_per_token": 5.634,
            "valid/perplexity": 279.8,
        },
    )
    progress.note("checkpoint written")
    clock[0] += 50
    progress.update(1500, {"train/e_loss": 1.1})
    progress.stop()
    # 100 steps in 50 s leave 1200 steps, 600 s; then 1300 in 100 s.
    assert output.getvalue().splitlines() == [
        "m-step 200/1500  e_loss 3.00  -- it/s  eta --:--",
        "m-step 300/1500  e_loss 1.20  m_loss 40.10  gap 0.0123  valid/nll_per_token 5.63  "
        "2.00 it/s  eta 10:00",
        "checkpoint written",
        "m-step 1500/1500  e_loss 1.10  m_loss 40.10  gap 0.0123  valid/nll_per_token 5.63  "
        "13.00 it/s  eta 00:00",
    ]


def test_hours_are_shown(clock: list[float]) -> None:
    output = io.StringIO()
    progress = Progress(file=output)
    progress.start(total=101)
    clock[0] += 75
    progress.update(1, {"train/e_loss": 1.0})
    assert output.getvalue().endswith("eta 2:05:00\n")


def test_plain_lines_go_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(shown=["*/loss"])
    progress.start(total=2)
    progress.update(0, {"train/loss": 2.5, "train/e_loss": 1.0})
    assert capsys.readouterr().out == "m-step 0/2  loss 2.50  -- it/s  eta --:--\n"


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    output = Terminal()
    with Progress(file=output) as progress:
        progress.start(total=1500)
        progress.note("[not markup] 7")
        progress.update(300, {"train/e_loss": 1.2, "valid/nll_per_token": 5.63})
        progress.update(301)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert "[not markup] 7" in text
    assert re.search(r"m-step 301/1500  ━+.* it/s  eta \d\d:\d\d", text)
    assert "e_loss 1.20  valid/nll_per_token 5.63" in text


def test_terminal_is_given_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    hide, show = "\x1b[?25l", "\x1b[?25h"
    output = Terminal()
    with pytest.raises(KeyError), Progress(file=output) as progress:
        progress.start(total=10)
        assert hide in output.getvalue() and show not in output.getvalue()
        raise KeyError
    assert show in output.getvalue()


def test_counts_other_things(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.start(total=300, unit="second")
    progress.update(12, {"train/e_loss": 1.0})
    assert capsys.readouterr().out.startswith("second 12/300  e_loss 1.00  ")


def test_a_run_says_what_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.create(tmp_path, {"patterns": {"console": ["valid/*f1"]}})
    run.progress.start(total=2)
    run.progress.update(0, {"train/e_loss": 1.0, "valid/sentence_f1": 27.2, "valid/corpus_f1": 1.0})
    assert "m-step 0/2  valid/sentence_f1 27.20  --" in capsys.readouterr().out
    with pytest.raises(UserError, match="patterns.console is valid/; it must be a list"):
        Run.create(tmp_path / "other", {"patterns": {"console": "valid/"}})
