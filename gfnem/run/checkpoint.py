"""Files that are whole or absent, and checkpoints among them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZipFile

from gfnem.errors import UserError

_SCALARS = (type(None), bool, int, float, str)
_SEQUENCES = (list, tuple)
_MAPPINGS = (dict, OrderedDict)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` once it is complete and on disk.

    The bytes go to a temporary file of the same folder, which replaces `path` in one step when
    the block ends. Whatever interrupts the block leaves the old file as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state to `path`, atomically.

    Args:
        path: the file; its folder exists.
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.

    Raises:
        TypeError: something in `state` could be written but not be read back; the message
            says where it is.
    """
    import torch

    _check_readable(state, "state")
    content = BytesIO()  # torch would hide what the disk says
    torch.save(state, content)
    with atomic_write(path) as file:
        file.write(content.getbuffer())


def load_state(path: Path, otherwise: str) -> dict[str, Any]:
    """Read a state that `save_state` wrote, with every tensor on the CPU.

    Nothing but tensors, containers, numbers and strings is ever unpickled.

    Args:
        path: the file.
        otherwise: what the user can do when it cannot be read; the end of the error message.

    Raises:
        UserError: the file is missing, truncated, damaged or something else than a checkpoint.
    """
    import torch

    try:
        with ZipFile(path) as archive:
            intact = archive.testzip() is None  # torch does not look at the checksums
        state = torch.load(path, map_location="cpu", weights_only=True) if intact else None
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist: {otherwise}") from None
    except Exception:  # which one depends on where the damage is: it can be nearly any
        state = None
    if not isinstance(state, dict):
        raise UserError(
            f"checkpoint {path} cannot be read, it is damaged or not a checkpoint: {otherwise}"
        )
    return state


def _check_readable(value: Any, where: str) -> None:
    """Raise TypeError unless `torch.load(weights_only=True)` can read `value` back."""
    import torch

    if type(value) in _MAPPINGS:
        for key, item in value.items():
            _check_readable(key, f"the key {key!r} of {where}")
            _check_readable(item, f"{where}[{key!r}]")
    elif type(value) in _SEQUENCES:
        for index, item in enumerate(value):
            _check_readable(item, f"{where}[{index}]")
    elif not isinstance(value, torch.Tensor) and type(value) not in _SCALARS:
        raise TypeError(
            f"{where} is a {type(value).__name__}: a checkpoint holds tensors, containers, "
            "numbers and strings only"
        )
