"""The study of policies, on grammars of a few steps."""

from __future__ import annotations

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gfnem.tasks.grammar.evaluate import GrammarEvaluator

pytestmark = pytest.mark.slow


@pytest.fixture
def study(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(root / "scripts")
    spec = importlib.util.spec_from_file_location(
        "policies_study", root / "scripts" / "policies_study.py"
    )
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, "policies_study", module)
    spec.loader.exec_module(module)
    # Processes would have to import the script by a name.
    module.ProcessPoolExecutor = lambda processes, context: ThreadPoolExecutor(processes)
    few = ("model.nonterminals=3", "model.preterminals=4", "em.m_steps=2")
    module.MODELS = {"cfg": ("model=pcfg", *few), "ncfg": ("model=ncfg", *few)}
    module.LENGTHS = (8,)
    module.POLICIES = {
        "cfg": {"root-flow": ("policy=root_flow",)},
        "ncfg": {"chart": ("policy=chart",), "root-flow": ("policy=root_flow",)},
    }
    monkeypatch.setattr(GrammarEvaluator, "report", lambda *arguments: None)
    module.MEASURED = (0, 0.1, 0.3)
    module.SHOWN = (0, 0.3)
    return module


def test_runs_end_in_a_table_and_a_figure(
    study: Any, tmp_path: Path, tiny_data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--seconds", "1"]
    given += [*tiny_data, "model.width=8"]
    assert study.main(given) == 0
    table = (tmp_path / "out" / "policies.md").read_text().splitlines()
    assert table[0].startswith("| grammar | words | policy | gap, 0 s | gap, 0.3 s | distinct")
    assert [line.split(" | ")[:3] for line in table[2:]] == [
        ["| cfg", "to 8", "root-flow"],
        ["| ncfg", "to 8", "chart"],
        ["| ncfg", "to 8", "root-flow"],
    ]
    assert (tmp_path / "out" / "policies.png").read_bytes().startswith(b"\x89PNG")
    lines = json.loads((tmp_path / "runs" / "ncfg_8" / "root-flow.json").read_text())
    assert [line["seconds"] for line in lines] == [0, 0.1, 0.3]
    assert 0 == lines[0]["e_steps"] < lines[1]["e_steps"] < lines[2]["e_steps"]
    assert "3 policies, 3 of them to be trained" in capsys.readouterr().out
    # What is complete is not done again.
    assert study.main(given) == 0
    out = capsys.readouterr().out
    assert "2 grammars, 0 of them" in out and "3 policies, 0 of them" in out


def test_what_cannot_run_is_said(
    study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "model.typo=1"]
    assert study.main(given) == 1
    assert "model.typo" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
