"""What the README and the pages that it leads to say works as it stands there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
from hydra.utils import get_method

from gfnem.app.composition import Sweep, combinations, compose
from gfnem.app.folders import config_folder, groups_in
from gfnem.app.help import verbs_of
from gfnem.app.options import resolve
from gfnem.app.signatures import annotations_of
from gfnem.run.compare import compare
from gfnem.tasks.grammar.verbs import parse_ensemble

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    *sorted(
        str(page.relative_to(ROOT))
        for folder in ("conf", "gfnem", "scripts")
        for page in ROOT.glob(f"{folder}/**/README.md")
    ),
]
RESULTS = [f"scripts/results/{page.name}" for page in ROOT.glob("scripts/results/*.md")]


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[list[str]]:
    """The command lines of a page that call gfnem."""
    lines = [line for block in blocks(text_of(page), "bash") for line in block.splitlines()]
    return [shlex.split(line.rpartition("| ")[2]) for line in lines if "gfnem " in line]


@cache
def options_of_verbs() -> Mapping[str, set[str]]:
    """Verb -> what it takes beside run and checkpoint."""
    calls = {
        verb: [get_method(call) for call in tasks.values()] for verb, tasks in verbs_of([]).items()
    }
    calls["parse"].append(parse_ensemble)
    return {verb: {o for call in of for o in annotations_of(call)} for verb, of in calls.items()}


def test_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 150
    assert len(PAGES) == 7


def test_python_lines(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(text_of("README.md"), "python")
    assert len([line for line in code.splitlines() if line]) == 12
    fewer, count = re.subn(r"([em]_steps)=\d+", r"\1=2", code)
    assert count == 2
    exec(fewer, {})
    assert "'test/nll_per_token'" in capsys.readouterr().out


def test_python_lines_that_read_a_run(
    tiny_data: list[str],
    tiny_run: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from gfnem.app.main import main

    (code,) = blocks(text_of("gfnem/tasks/grammar/README.md"), "python")
    monkeypatch.chdir(tmp_path)
    assert main([*tiny_data, *tiny_run, "posterior=exact", "run_dir=runs/mine"]) == 0
    (tmp_path / "sentences.txt").write_text("the old king slept\n")
    capsys.readouterr()
    exec(code, {})
    assert re.fullmatch(r"\(S .*slept\)+\n", capsys.readouterr().out)


def test_two_commands_set_up() -> None:
    readme = text_of("README.md")
    setup = readme.partition("## Set-up")[2].partition("\n## ")[0]
    install, test = (block.rstrip("\n") for block in blocks(setup, "bash"))
    assert "\n" not in install + test
    assert install.endswith(" && gfnem")
    # The one that .ci/run looks for.
    assert re.findall(r"^python -m venv .* pytest$", readme, re.MULTILINE) == [test]


@pytest.mark.parametrize("page", PAGES)
def test_command_lines(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A page may show what can be done on a cluster alone.
    monkeypatch.setattr("gfnem.app.composition._check_slurm", lambda: None)
    for program, first, *others in commands(page):
        assert program == "gfnem"
        if first == "--help":
            continue
        if first in verbs_of([]):
            check_verb(first, others)
            continue
        arguments = [o for o in (first, *others) if o not in ("--multirun", "--cfg", "job")]
        if first.startswith("resume="):
            resolve(compose(others))
        elif first == "--multirun":
            # Of many seeds one says it all.
            fewer = [o for o in arguments if not o.startswith("seed=")]
            assert len(combinations(arguments)) > 1
            assert list(Sweep([*fewer, "seed=0"]).configurations())
        else:
            resolve(compose(arguments))


def check_verb(verb: str, arguments: list[str]) -> None:
    given = {o.partition("=")[0] for o in arguments if re.match(r"[a-z]+=", o)}
    if verb == "compare":
        assert given <= {*annotations_of(compare), "wandb"}
    else:
        assert "run" in given
        assert given <= {"run", "checkpoint", "seed", *options_of_verbs()[verb]}


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_text(page: str) -> None:
    """Choices of a group are there, and every other option is somewhere in conf/."""
    groups = groups_in(config_folder())
    known = "\n".join(file.read_text() for file in config_folder().rglob("*.yaml"))
    for key, values in re.findall(r"`(?:[^`\n]* )?([a-z_.]+)=([^`\s]*)", text_of(page)):
        if key in groups:
            # Of `posterior=exact,seed=1`, the name of a job, the first is one.
            chosen = {value for value in values.split(",") if "=" not in value}
            assert chosen <= {*groups[key], "MINE"}, f"{key}={values}"
        elif "." in key and not key.startswith("hydra."):
            assert re.search(rf"\b{key.rpartition('.')[2]}: ", known), key


@pytest.mark.parametrize("page", sorted({*PAGES, *RESULTS}))
def test_files_that_are_shown_exist(page: str) -> None:
    files = re.findall(r"\]\((?!https?:)([^)]+)\)", text_of(page))
    assert [file for file in files if not (ROOT / page).parent.joinpath(file).exists()] == []


@pytest.mark.parametrize("page", sorted({*PAGES, *RESULTS}))
def test_tables_of_f1_have_right_branching_trees(page: str) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", text_of(page), re.MULTILINE)
    for table in tables:
        head, _, rows = table.partition("\n")
        if re.search(r"\bF1\b", head) and re.search(r"\d", rows):
            assert re.search(r"^\| right-branching", rows, re.MULTILINE), head
