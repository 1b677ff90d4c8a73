"""The console: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest

from gfnem.errors import UserError
from gfnem.run import Progress, Run
from gfnem.run.progress import counted


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
    progress.start("m-step", 200, 1500)
    progress.update("m-step", 200, 1500, {"train/e_loss": 3.0})
    clock[0] += 50
    progress.update("m-step", 250, 1500)
    progress.update(
        "m-step",
        300,
        1500,
        {
            "train/e_loss": 1.204,
            "train/grad_norm": 9.0,
            "train/m_loss": 40.1,
            "train/gap": 0.01234,
            "valid/nll_per_token": 5.634,
            "valid/perplexity": 279.8,
        },
        600.0,
    )
    progress.note("checkpoint written")
    clock[0] += 50
    progress.update("m-step", 1500, 1500, {"train/e_loss": 1.1}, 0.0)
    progress.stop()
    # 100 steps in 50 s; then 1300 in 100 s.
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
    progress.start("m-step", 0, 101)
    clock[0] += 75
    progress.update("m-step", 1, 101, {"train/e_loss": 1.0}, 7500.0)
    assert output.getvalue().endswith("eta 2:05:00\n")


def test_plain_lines_go_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(shown=["*/loss"])
    progress.start("m-step", 0, 2)
    progress.update("m-step", 0, 2, {"train/loss": 2.5, "train/e_loss": 1.0})
    assert capsys.readouterr().out == "m-step 0/2  loss 2.50  -- it/s  eta --:--\n"


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    output = Terminal()
    with Progress(file=output) as progress:
        progress.start("m-step", 0, 1500)
        progress.note("[not markup] 7")
        shown = {"train/e_loss": 1.2, "valid/nll_per_token": 5.63}
        progress.update("m-step", 300, 1500, shown, seconds_left=90.0)
        progress.update("m-step", 301, 1500)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert "[not markup] 7" in text
    assert re.search(r"m-step 301/1500  ━+.* it/s  eta \d\d:\d\d", text)
    assert "e_loss 1.20  valid/nll_per_token 5.63" in text


def test_terminal_is_given_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    hide, show = "\x1b[?25l", "\x1b[?25h"
    output = Terminal()
    with pytest.raises(KeyError), Progress(file=output) as progress:
        progress.start("m-step", 0, 10)
        assert hide in output.getvalue() and show not in output.getvalue()
        raise KeyError
    assert show in output.getvalue()


def test_counts_other_things(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.start("second", 0, 300)
    progress.update("second", 12, 300, {"train/e_loss": 1.0})
    assert capsys.readouterr().out.startswith("second 12/300  e_loss 1.00  ")


def test_the_speed_of_a_warm_up_is_not_that_of_what_follows(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress()
    progress.start("warm-up e-step", 0, 10)
    clock[0] += 5
    progress.update("warm-up e-step", 10, 10, {"train/e_loss": 1.0})
    progress.update("m-step", 0, 4, {"train/e_loss": 1.0})
    clock[0] += 1
    progress.update("m-step", 2, 4, {"train/e_loss": 1.0}, 1.0)
    warm, first, second = capsys.readouterr().out.splitlines()
    assert warm == "warm-up e-step 10/10  e_loss 1.00  2.00 it/s  eta --:--"
    assert first == "m-step 0/4  e_loss 1.00  -- it/s  eta --:--"
    assert second == "m-step 2/4  e_loss 1.00  2.00 it/s  eta 00:01"


def test_an_evaluation_is_told_when_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.start("m-step", 3, 10)
    with progress.rating("valid"):
        assert capsys.readouterr().out == "m-step 3/10  rating valid\n"
        assert list(counted([1, 2])) == [1, 2]
    with Progress().rating("test"):
        pass
    assert capsys.readouterr().out == "rating test\n"


def test_an_evaluation_has_a_bar_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    output = Terminal()
    progress = Progress(file=output)
    with progress.rating("test"):
        for _ in counted(["one", "two", "three"]):
            assert progress._live is not None
            progress._live.refresh()
    assert progress._live is None
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    for done in range(3):
        assert re.search(rf"rating test  [━╸╺]+ +{done}/3", text)


def test_a_run_says_what_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.create(tmp_path, {"patterns": {"console": ["valid/*f1"]}})
    run.progress.start("m-step", 0, 2)
    f1 = {"valid/sentence_f1": 27.2, "valid/corpus_f1": 1.0}
    run.progress.update("m-step", 0, 2, {"train/e_loss": 1.0, **f1})
    assert "m-step 0/2  valid/sentence_f1 27.20  --" in capsys.readouterr().out
    with pytest.raises(UserError, match="patterns.console is valid/; it must be a list"):
        Run.create(tmp_path / "other", {"patterns": {"console": "valid/"}})
