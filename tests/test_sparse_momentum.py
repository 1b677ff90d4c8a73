"""The study of sparse momentum, on settings of a second."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

pytestmark = pytest.mark.slow


@pytest.fixture
def study(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(root / "scripts")
    return importlib.import_module("sparse_momentum")


def test_growth_without_momentum_by_hand(study: Any) -> None:
    """E e^2 of one feature, in one data point, goes on by 1 - 2 eta p + 3 eta^2 p."""
    p, lr = np.array([0.1, 0.5]), 0.3
    found = study.growth(p, lr, np.zeros(2), batch=1, d=1, lazy=False)
    np.testing.assert_allclose(found, 1 - 2 * lr * p + 3 * lr**2 * p)


def test_it_ends_in_tables_and_a_figure(study: Any, root: Path, tmp_path: Path) -> None:
    few = [
        f"out={tmp_path / 'out'}",
        *("settings.p=[0.3]", "settings.batch=[64]", "settings.momentum=[0.0,0.9]"),
        *("settings.runs=200", "settings.steps=20", "settings.d=4"),
        *("phases.points=12", "phases.batch=[1,16]"),
        *("tokens.d=128", "tokens.runs=5", "tokens.steps=30", "tokens.lr=[0.1,0.5]"),
        *("rare.p=[0.1,0.3]", "rare.momentum=[0.0]", "rare.step=[0.1,9.0]", "rare.runs=5"),
        *("rare.d=[8]", "rare.features_runs=2"),
    ]
    with initialize_config_dir(str(root / "scripts" / "conf"), version_base="1.3"):
        study.main(compose("sparse_momentum", few))
    tables = (tmp_path / "out" / "sparse_momentum.md").read_text().split("\n\n")
    settings, phases, tokens, rare, features = (table.strip().splitlines()[2:] for table in tables)
    assert [line.split(" | ")[0] for line in settings] == 2 * ["| global"] + 2 * ["| lazy"]
    assert all(float(line.split(" | ")[3]) < 2 for line in settings)
    assert len(phases) == 4 and all("| 100.0 % |" in line for line in phases)
    assert [line.split(" | ")[0] for line in tokens] == ["| none", "| global", "| lazy"]
    assert len(rare) == 4 and "unstable" in rare[0]
    assert len(features) == 1
    assert (tmp_path / "out" / "sparse_momentum.png").read_bytes().startswith(b"\x89PNG")
