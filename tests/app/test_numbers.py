"""Numbers that no part can use are refused in one line, whatever option they are given for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gfnem.app.main import main
from gfnem.app.verb_options import split
from gfnem.errors import UserError
from gfnem.memory import is_out_of_memory

BEYOND = 2**70


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["em.max_seconds=nan"], "em.max_seconds=nan: it must be finite"),
        (["optimizer.model.lr=inf"], "optimizer.model.lr=inf: it must be finite"),
        ([f"seed={BEYOND}"], f"seed={BEYOND}: it must fit into 64 bits"),
        ([f"evaluator.lengths=[3,{BEYOND}]"], f"evaluator.lengths=[3, {BEYOND}]: it must fit into"),
        (["em=null"], "em=None: only options of it can be set"),
        ([f"seed={'9' * 5_000}"], f"'seed={'9' * 5_000}' is not of the form key=value"),
        (["threads=100000"], "threads is 100000; it must be at most 1024"),
        (
            ["data.train_sentences=1000000000"],
            "toy_english is asked for 1,000,000,600 sentences; it",
        ),
        ([f"model.width={10**15}"], "there is not enough memory: make models and batches smaller"),
    ],
)
def test_numbers_at_the_edge(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"gfnem: {message}") and told.count("\n") == 1
    assert os.listdir() == []


def test_errors_that_are_not_about_memory():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("Trying to create tensor with negative dimension -1"))


def test_numbers_of_verbs():
    with pytest.raises(UserError, match=f"^n={BEYOND}: it must fit into 64 bits$"):
        split([f"n={BEYOND}"], {"n": int})
