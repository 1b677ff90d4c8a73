"""The study of DANA on power laws, on problems of a second."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

pytestmark = pytest.mark.slow


@pytest.fixture
def study(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(root / "scripts")
    return importlib.import_module("power_law")


def test_slopes_of_power_laws(study: Any) -> None:
    steps = np.array([1, 3, 10, 100])
    risks = np.stack([2.0 * steps**-0.7, 5.0 * steps**0.5], -1)
    np.testing.assert_allclose(study.slopes(steps, risks), [-0.7, 0.5])


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([0.9, 0.6, 0.6, 0.5], (20, np.inf)),
        ([0.6, 0.9, 0.6, 0.5], (30, np.inf)),
        ([0.6, 0.6, 0.6, 0.8], (10, 40)),
        ([0.8, 0.8, 0.8, 0.8], (np.inf, np.inf)),
    ],
)
def test_where_dana_is_ahead_of_all_others(
    study: Any, shares: list[float], expected: tuple[float, float]
) -> None:
    steps = np.array([10, 20, 30, 40])
    risks = np.ones((4, len(study.METHODS)))
    risks[:, 2] = 2
    risks[:, study.METHODS.index("DANA constant")] = shares
    assert study.ahead(steps, risks, "DANA constant", below=0.3) == expected


def test_all_methods_are_optimizers_that_the_recursion_describes(study: Any) -> None:
    """In both spaces, where the mean over many runs is near the expectation."""
    generator = torch.Generator().manual_seed(0)
    problem = study.Problem.draw(1.0, 0.4, d=6, batch=16, draws=2, generator=generator)
    options = problem.options(momentum=0.9, delta=8.0)
    steps = np.array([1, 5, 30])
    exact = study.recursion(problem, options, steps)
    given = problem, options, steps, 400
    in_data = study.in_data_space(*given, 0.9, generator)
    for simulated in (in_data, study.along_eigenvectors(*given, generator)):
        assert simulated.shape == (3, 2, 400, len(study.METHODS))
        curves = study.Curves(steps, exact, simulated)
        assert abs(curves.z()).max() < 4.5
        # It would be seen if a method's coefficients were another's.
        shifted = study.Curves(steps, np.roll(exact, 1, -1), simulated)
        assert (abs(shifted.z()).max(0) > 6).all()


def test_it_ends_in_tables_and_a_figure(study: Any, root: Path, tmp_path: Path) -> None:
    few = [
        f"out={tmp_path / 'out'}",
        *("points=[[1.0,0.4]]", "draws=2", "resamples=20"),
        *("raw.d=4", "raw.runs=3", "raw.steps=20"),
        *("large.d=6", "large.runs=3", "large.steps=30", "large.window=[2,30]"),
        *("crossings.d=[4,6]", "crossings.steps=50"),
    ]
    with initialize_config_dir(str(root / "scripts" / "conf"), version_base="1.3"):
        study.main(compose("power_law", few))
    tables = (tmp_path / "out" / "power_law.md").read_text().split("\n\n")
    assert [len(table.strip().splitlines()) - 2 for table in tables] == [2, 5, 2]
    assert (tmp_path / "out" / "power_law.png").read_bytes().startswith(b"\x89PNG")
