"""The script that kills runs, on two of one kind."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_killed_runs_lose_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(root / "scripts")
    script = importlib.import_module("kill_runs")
    assert script.main(["--kills", "2", "--only", "mixture"]) == 0
    assert capfd.readouterr().out.endswith("; 0 things wrong\n")
