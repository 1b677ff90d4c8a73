"""What `gfnem` itself hands out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gfnem


def test_nothing_is_imported_before_it_is_asked_for(root: Path) -> None:
    code = (
        "import sys, gfnem\n"
        "assert set(gfnem.__all__) <= set(dir(gfnem))\n"
        "assert not {'torch', 'hydra', 'gfnem.em'} & set(sys.modules)\n"
        "from gfnem import EM\n"
        "assert EM is sys.modules['gfnem.em'].EM\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", gfnem.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(gfnem, name).__name__ == name


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="^module 'gfnem' has no attribute 'Em'$"):
        gfnem.Em  # noqa: B018


def test_load(tiny_mixture: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trained run as the command line reads it."""
    from gfnem.app.main import main

    few = ["data.train_points=40", "data.valid_points=8", "data.test_points=8", "posterior=exact"]
    assert main([*tiny_mixture, *few, f"run_dir={tmp_path / 'run'}"]) == 0
    em = gfnem.load(tmp_path / "run")
    assert em.evaluate("test", final=True)["test/nll"] == pytest.approx(
        gfnem.Run.open(tmp_path / "run").summary()["test/nll"]
    )
    data: Any = gfnem.load(tmp_path / "run", "last", ["data.test_points=5"]).data
    assert len(data.test) == 5
