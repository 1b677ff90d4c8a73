"""Imports point one way: no file of the package is in a circle of imports."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


def imports_of(root: Path) -> dict[str, set[str]]:
    """Which modules each module of the package imports, wherever in the file."""
    files = {}
    for file in (root / "gfnem").rglob("*.py"):
        parts = file.relative_to(root).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = file
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, file in files.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{file}: relative import"
                # A name of a package may be a module of it.
                named = [f"{node.module}.{alias.name}" for alias in node.names]
                found[name] |= {one if one in files else node.module for one in named}
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
    return {name: (own & files.keys()) - {name} for name, own in found.items()}


def test_no_circles(root: Path) -> None:
    imports = imports_of(root)
    assert {"gfnem.em", "gfnem.tasks.grammar.model"} <= imports.keys()
    assert "gfnem.model" in imports["gfnem.em"]
    try:
        list(TopologicalSorter(imports).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_what_belongs_to_a_task_is_named_in_tasks_alone(root: Path) -> None:
    folder = root / "gfnem"
    files = [file for file in folder.rglob("*.py") if folder / "tasks" not in file.parents]
    named = re.compile(r"tree_prior|f1(?!\d)")
    assert len(files) > 40
    assert [str(file) for file in files if named.search(file.read_text().lower())] == []


def test_circles_are_seen(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / "gfnem").mkdir(exist_ok=True)
        code = f"def f():\n    from gfnem import {other}\n    return {other}\n"
        (tmp_path / "gfnem" / f"{name}.py").write_text(code)
    with pytest.raises(CycleError):
        list(TopologicalSorter(imports_of(tmp_path)).static_order())


def test_trees_text_and_rules_know_nothing_of_the_rooms_above(root: Path) -> None:
    grammar = "gfnem.tasks.grammar"
    above = {
        "text": ("trees", "rules", "inference", "policies", "model"),
        "trees": ("text", "rules", "inference", "policies", "model"),
        "rules": ("text", "trees", "inference", "policies", "model"),
        "inference": ("policies", "model"),
    }
    for name, imported in imports_of(root).items():
        room = name.removeprefix(f"{grammar}.").partition(".")[0]
        for other in above.get(room, ()) if name.startswith(grammar) else ():
            assert not [one for one in imported if one.startswith(f"{grammar}.{other}")], name
