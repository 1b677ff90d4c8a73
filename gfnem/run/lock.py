"""One process at a time trains a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from gfnem.errors import UserError


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep other processes from writing into a run's directory in the meantime.

    What a killed process left half-written there is swept up. Locks end with their process.

    Args:
        path: the directory of the run.

    Raises:
        UserError: another process is at it.
    """
    try:
        with FileLock(path / ".lock", blocking=False):
            for file in path.rglob(".*.tmp"):
                file.unlink(missing_ok=True)
            yield
    except Timeout:
        raise UserError(
            f"another process is training {path}: wait until it ends, or stop it"
        ) from None
