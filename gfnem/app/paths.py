"""Paths as they are typed: those of jobs have commas and equals signs in their names."""

from __future__ import annotations

from pathlib import Path


def paths_in(text: str) -> list[str]:
    """The paths of a list with commas between them: of each the longest that exists."""
    parts = text.split(",")
    found = []
    while parts:
        ends = range(len(parts), 1, -1)
        end = next((n for n in ends if Path(",".join(parts[:n]).strip()).exists()), 1)
        found.append(",".join(parts[:end]).strip())
        del parts[:end]
    return found


def beginning_with(text: str) -> list[str]:
    """The paths that begin with some text; folders end in a slash."""
    parent, slash, start = text.rpartition("/")
    folder = Path(parent + slash or ".")
    found = sorted(folder.glob("*")) if folder.is_dir() else []
    return [
        f"{parent}{slash}{path.name}{'/' * path.is_dir()}"
        for path in found
        if path.name.startswith(start)
    ]
