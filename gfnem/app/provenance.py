"""What a run's numbers mean: which words its ids are, and what it was trained with."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gfnem.errors import UserError
from gfnem.run.checkpoint import atomic_write

WORDS = "words.json"
ENVIRONMENT = "environment.json"
LIBRARIES = ("gfnem", "torch", "torchgfn", "numpy", "hydra-core")


def keep_provenance(run: Path, data: Any) -> None:
    """Write what the ids of the data stand for, and the environment, into a run's directory."""
    words = _words(data)
    if words is not None:
        _write(run / WORDS, words)
    environment = {
        "commit": _commit(),
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
        "host": platform.node(),
        "command": sys.argv,
    }
    _write(run / ENVIRONMENT, environment)


def check_words(run: Path, data: Any) -> None:
    """Raise UserError where ids of the data stand for other words than in a run.

    Runs that have not kept their words, those of an older version, pass.
    """
    file = run / WORDS
    if not file.is_file():
        return
    try:
        kept = json.loads(file.read_text())
    except (ValueError, RecursionError):
        raise UserError(f"{file} is not a JSON list: restore it") from None
    words = _words(data)
    if words != kept:
        raise UserError(
            f"the data does not have the words of {run}, or has them in another order: give it the "
            "data that it was trained on"
        )


def _words(data: Any) -> list[str] | None:
    vocabulary = getattr(data, "vocabulary", None)
    return None if vocabulary is None else list(vocabulary.words)


def _commit() -> str | None:
    """The commit of gfnem's own sources; None where they are in no repository."""
    source = Path(__file__).parents[2]
    if not (source / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _write(path: Path, content: Any) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
