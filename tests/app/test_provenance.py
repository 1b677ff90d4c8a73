from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import gfnem
from gfnem.app.main import main

LINES = ["the cat sees a dog", "a dog sees the cat", "the dog sees a cat"]


def write(name: str, lines: Sequence[str]) -> str:
    Path(name).write_text("\n".join(lines) + "\n")
    return name


@pytest.fixture
def run(tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on three sentences in a file."""
    monkeypatch.chdir(tmp_path)
    splits = [f"data.{split}={write(split, LINES)}" for split in ("train", "valid", "test")]
    assert main([*tiny_run, "data=text", "posterior=exact", *splits, "run_dir=run"]) == 0
    return Path("run")


def test_a_run_knows_its_words_and_its_environment(run: Path) -> None:
    words = json.loads((run / "words.json").read_text())
    assert words[0] == "<unk>" and set(words[1:]) == set(" ".join(LINES).split())
    environment = json.loads((run / "environment.json").read_text())
    assert environment["gfnem"] == gfnem.__version__
    assert {"commit", "python", "torch", "torchgfn", "numpy", "host", "command"} <= set(environment)


@pytest.mark.parametrize(
    "lines",
    [
        [line.replace("cat", "cow") for line in LINES],  # as many words, but others
        [line.replace("the", "A").replace("a", "the").replace("A", "a") for line in LINES[:1]] * 2
        + ["dog dog dog cat sees the a"],  # the same in another order
    ],
)
def test_other_words_are_refused(
    lines: list[str], run: Path, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "valid", "test"):
        write(name, lines)
    splits = [f"data.{split}={split}" for split in ("train", "valid", "test")]
    again = [*tiny_run, "data=text", "posterior=exact", *splits, "run_dir=new", "model_from=run"]
    for command in (["evaluate", "run=run"], ["resume=run", "em.m_steps=9"], again):
        capsys.readouterr()
        assert main(command) == 2
        message = "gfnem: the data does not have the words of run, or has them in another order"
        assert capsys.readouterr().err.startswith(message)
