"""The script that gives gfnem what it cannot use, on a handful of its kinds."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script(root: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "scripts")
        script = importlib.import_module("bad_inputs")
        script.import_all()
        yield script


@pytest.fixture(scope="module")
def prepared(script: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    script.write_good(folder)
    return folder


@pytest.fixture(scope="module")
def kinds(script: Any) -> dict[tuple[str, str], Any]:
    kinds = script.other_kinds()
    named = {(kind.group, kind.name): kind for kind in kinds}
    assert len(named) == len(kinds) > 450
    return named


@pytest.mark.parametrize(
    "kind",
    [
        ("sizes and rates", "threads=100000"),
        ("text, trees", "100,000 brackets opened"),
        ("points, csv", "1e+160 in it"),
        ("images, folder", "gif, cut"),
        ("images, IDX", "petabytes in train"),
        ("command lines", "train 'a=('"),
    ],
)
def test_some_kinds(
    script: Any, kinds: dict[tuple[str, str], Any], kind: Any, prepared: Path, tmp_path: Path
):
    assert script.attempt(kinds[kind], tmp_path, prepared).end == "refused"


def test_options_of_a_task(
    script: Any, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tables = importlib.import_module("bad_input_kinds")
    monkeypatch.setattr(tables, "VARIANTS", {"points": tables.RUNS["points"]})
    kinds = {kind.name: kind for kind in tables.options(prepared)}
    assert {"data.spacing=nan", "em.m_steps=-1", "policy.width=0", "device=nosuch"} <= kinds.keys()
    assert script.attempt(kinds["em.max_seconds=nan"], tmp_path, prepared).end == "refused"


def test_what_is_wrong_is_seen(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def crashes(arguments: list[str]) -> int:
        raise ValueError("of ours")

    def stops(arguments: list[str]) -> int:
        raise SystemExit(3)

    def waits(arguments: list[str]) -> int:
        while True:
            pass

    monkeypatch.setattr(script, "SECONDS", 1)
    ends = []
    for number, broken in enumerate((crashes, stops, waits)):
        monkeypatch.setattr(script, "gfnem", broken)
        (tmp_path / str(number)).mkdir()
        kind = script.Kind("group", broken.__name__, [])
        ends.append(script.attempt(kind, tmp_path / str(number), tmp_path))
    assert [outcome.end for outcome in ends] == ["traceback", "silent", "hang"]
    assert "| all | 3 | 0 | 0 | 1 | 1 | 1 | 0 |" in script.table(ends)
