"""What the configuration of a run may make when it is read again: runs may come from strangers.

A new run makes whatever its command line names. A stored one makes only what gfnem's own
configuration files name, those of a `--config-dir` of this command line, and torch's optimizers
and schedulers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gfnem.app.folders import config_folder
from gfnem.errors import UserError

MOST_ENTRIES = 20_000
"""Of a stored configuration: aliases can make few lines a great many entries."""

_DOTTED = re.compile(r"^[^#\n]*?:\s*((?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*)\s*(?:#.*)?$", re.MULTILINE)
_OF_TORCH = re.compile(r"torch\.optim\.(?:lr_scheduler\.)?[A-Za-z_]\w*")


def check_stored(config: Mapping[str, Any], where: Path, folder: Path | None = None) -> None:
    """Check the configuration of a run before anything is made of it.

    Args:
        config: as it was read.
        where: the directory of the run, for messages.
        folder: a `--config-dir` whose names are trusted, too.

    Raises:
        UserError: it names what it may not, or is nothing that gfnem has written.
    """
    for key in ("defaults", "hydra"):
        if key in config:
            raise UserError(f"{where} has {key} in its config.yaml, which no run has: it is left")
    trusted = trusted_names(None) | trusted_names(folder)
    verbs = [config.get("verbs"), config.get("ensemble_verbs")]
    calls = {
        name
        for of_task in verbs
        if isinstance(of_task, Mapping)
        for name in of_task.values()
        if isinstance(name, str)
    }
    for name, value in _entries(config, where):
        if (name == "_target_" or value in calls) and not (value in trusted or _is_of_torch(value)):
            raise UserError(
                f"{where} names {value} in its config.yaml, which is not of gfnem: if you trust "
                "it, give the folder of its configuration files, --config-dir DIR"
            )
        if isinstance(value, str) and "${" in value:
            raise UserError(
                f"{where} has {name}: {value} in its config.yaml, where runs have values: it is "
                "left"
            )


@cache
def trusted_names(folder: Path | None) -> frozenset[str]:
    """Names of Python's that a folder of configuration files gives; gfnem's own for None."""
    files = (config_folder() if folder is None else folder).rglob("*.yaml")
    return frozenset(name for file in files for name in _DOTTED.findall(file.read_text()))


def _entries(config: Mapping[str, Any], where: Path) -> Iterator[tuple[str, Any]]:
    """All entries that are no containers, with the name of each or of its list."""
    waiting: list[tuple[str, Any]] = [("", config)]
    seen = 0
    while waiting:
        name, value = waiting.pop()
        seen += 1
        if seen > MOST_ENTRIES:
            raise UserError(f"{where} has a config.yaml that is too large: restore it")
        if isinstance(value, Mapping):
            waiting += [(str(key), item) for key, item in value.items()]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            waiting += [(name, item) for item in value]
        else:
            yield name, value


def _is_of_torch(name: Any) -> bool:
    """Whether a name is that of one of torch's optimizers or schedulers."""
    if not (isinstance(name, str) and _OF_TORCH.fullmatch(name)):
        return False
    import torch

    *_, last = name.split(".")
    of_schedulers = ".lr_scheduler." in name
    found = getattr(torch.optim.lr_scheduler if of_schedulers else torch.optim, last, None)
    base = torch.optim.lr_scheduler.LRScheduler if of_schedulers else torch.optim.Optimizer
    return isinstance(found, type) and issubclass(found, base)


def folders_of_modules(folder: Path | None) -> Sequence[str]:
    """Where the modules are that a `--config-dir` names."""
    return [] if folder is None else [str(folder.resolve().parent)]
