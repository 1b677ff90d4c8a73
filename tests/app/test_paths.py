"""Lists of paths with commas in their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from gfnem.app.paths import beginning_with, paths_in


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("seed=1", "seed=1,posterior=exact", "seed=2"):
        Path("sweep", name).mkdir(parents=True)
    Path("sweep/table.md").touch()


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("sweep/seed=1,posterior=exact", ["sweep/seed=1,posterior=exact"]),
        (
            "sweep/seed=1,posterior=exact, sweep/seed=2",
            ["sweep/seed=1,posterior=exact", "sweep/seed=2"],
        ),
        ("sweep/seed=1,sweep/seed=2", ["sweep/seed=1", "sweep/seed=2"]),
        ("nosuch,sweep/seed=2,none", ["nosuch", "sweep/seed=2", "none"]),
        ("", [""]),
    ],
)
def test_the_longest_that_exists(text: str, paths: list[str]) -> None:
    assert paths_in(text) == paths


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("sw", ["sweep/"]),
        ("sweep/seed=1", ["sweep/seed=1/", "sweep/seed=1,posterior=exact/"]),
        ("sweep/t", ["sweep/table.md"]),
        ("nosuch/x", []),
    ],
)
def test_beginning_with(text: str, paths: list[str]) -> None:
    assert beginning_with(text) == paths
