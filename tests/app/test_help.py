"""Help and completion, which know the verbs of all tasks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gfnem.app.main import main

MINE = """\
def count(em, word: str = "the", least: int = 2):
    \"\"\"Print how often a word is drawn.

    Raises:
        UserError: never.
    \"\"\"
"""


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with configuration files of a task with a verb, and the module beside it."""
    (tmp_path / "mine/task").mkdir(parents=True)
    (tmp_path / "mine/task/words.yaml").write_text("# my words\nverbs: {count: counting.count}\n")
    (tmp_path / "counting.py").write_text(f"import torch\n\n\n{MINE}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out


class TestHelp:
    def test_of_a_verb(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = shown(["parse", "--help"], capsys)
        usage = "gfnem parse run=DIR [checkpoint=best] [file=None] [decode=mbr] [samples=16] "
        assert usage in text
        assert "decode: mbr, the minimum-Bayes-risk tree" in text and "Raises" not in text

    def test_of_a_verb_of_two_tasks(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = shown(["generate", "-h"], capsys)
        assert "of task=grammar:\ngfnem generate run=DIR [checkpoint=best] [n=16] [OVER" in text
        assert "of task=discrete_vae:\n" in text and "[file=samples.png]" in text

    @pytest.mark.parametrize(("verb", "said"), [("evaluate", "[split=test]"), ("compare", "DIR D")])
    def test_of_gfnems_own(self, verb: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert said in shown([verb, "--help"], capsys)

    def test_of_a_folder_of_ones_own(
        self, own_folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "words             my words\n" in shown(["--help", "--config-dir", "mine"], capsys)
        text = shown(["count", "-h", "-cd", "mine"], capsys)
        assert "gfnem count run=DIR [checkpoint=best] [word=the] [least=2] [OVERRIDE ...]" in text
        assert "Print how often a word is drawn." in text


class TestCompletion:
    @pytest.fixture
    def completed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> object:
        def complete(line: str, shell: str = "bash") -> list[str]:
            monkeypatch.setenv("COMP_LINE", line)
            return shown(["--shell-completion", f"query={shell}"], capsys).split()

        return complete

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_verbs_and_groups(self, completed, shell: str) -> None:
        offered = completed("gfnem ", shell)
        assert {"parse", "generate", "reconstruct", "evaluate", "compare", "resume="} <= {*offered}
        assert {"posterior", "policy=", "em.", "hydra"} <= {*offered}

    @pytest.mark.parametrize(
        ("line", "offered"),
        [
            ("gfnem eva", ["evaluate", "evaluator."]),
            ("gfnem --mul", ["--multirun"]),
            ("gfnem task=mi", ["task=mixture"]),
            ("gfnem train -m em.m_s", ["em.m_steps="]),
            ("gfnem parse ", ["checkpoint=", "decode=", "file=", "run=", "samples="]),
            ("gfnem parse run=mi", ["run=mine/"]),
            ("gfnem compare mi", ["mine/"]),
            ("gfnem --config-dir mi", ["mine/"]),
            ("gfnem --config-dir mine task=wo", ["task=words"]),
            ("gfnem em.m_steps=[ posterior=e", []),
        ],
    )
    def test_line(self, completed, line: str, offered: list[str], own_folder: Path) -> None:
        assert completed(line) == offered

    def test_comes_without_torch(self, root: Path) -> None:
        code = (
            "import sys; from gfnem.app.main import main; main(['-sc', 'query=bash']);"
            "assert not {'torch', 'wandb', 'nltk'} & set(sys.modules)"
        )
        environment = {**os.environ, "PYTHONPATH": str(root), "COMP_LINE": "gfnem "}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "reconstruct" in done.stdout

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_install(self, shell: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert "-sc query=" in shown(["-sc", f"install={shell}"], capsys)
