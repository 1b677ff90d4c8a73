"""What the README says works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from gfnem.app.composition import Sweep, combinations, compose
from gfnem.app.options import resolve


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text()


@pytest.fixture(scope="module")
def results(root: Path) -> str:
    return (root / "scripts/results/README.md").read_text()


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)


def test_python_lines(readme: str, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(readme, "python")
    assert len(code.splitlines()) <= 15
    fewer, count = re.subn(r"([em]_steps)=\d+", r"\1=2", code)
    assert count == 2
    exec(fewer, {})
    assert "'test/nll_per_token'" in capsys.readouterr().out


def test_two_commands_set_up(readme: str, root: Path) -> None:
    setup = readme.partition("## Set-up")[2].partition("\n## ")[0]
    install, test = (block.rstrip("\n") for block in blocks(setup, "bash"))
    assert "\n" not in install + test
    assert install.endswith(" && gfnem")
    # The one that .ci/run looks for.
    assert re.findall(r"^python -m venv .* pytest$", readme, re.MULTILINE) == [test]


def test_command_lines(readme: str, results: str) -> None:
    shown = [*blocks(readme, "bash"), *blocks(results, "bash")]
    lines = [line for block in shown for line in block.splitlines()]
    commands = [shlex.split(line.rpartition("| ")[2]) for line in lines if "gfnem " in line]
    verbs = {"evaluate", "parse", "generate", "compare"}
    for program, *arguments in commands:
        assert program == "gfnem"
        if arguments[0] in verbs or arguments[0].startswith("resume="):
            continue
        if arguments[0] == "--multirun":
            # Of many seeds one says it all.
            fewer = [re.sub(r"^seed=(\d),.*", r"seed=\1", o) for o in arguments[1:]]
            assert len(combinations(arguments[1:])) > 1
            assert list(Sweep(fewer).configurations())
        else:
            resolve(compose(arguments))


def test_files_that_are_shown_exist(readme: str, results: str, root: Path) -> None:
    for text, folder in ((readme, root), (results, root / "scripts/results")):
        files = re.findall(r"\]\((?!https?:)([^)]+)\)", text)
        assert files
        assert [file for file in files if not (folder / file).exists()] == []
