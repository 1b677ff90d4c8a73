"""Where configuration files are and what they offer. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from gfnem.errors import UserError

EVALUATE = "gfnem.app.verbs.evaluate"
"""What does the verb that all tasks have."""

Groups = dict[str, dict[str, str]]
"""Group -> option -> the first comment in its file."""


def config_folder() -> Path:
    """gfnem's conf/: within the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def groups_in(*folders: Path) -> Groups:
    """What there is to choose from in some folders of configuration files."""
    groups: Groups = {}
    for folder in folders:
        for file in sorted(folder.glob("*/*.yaml")):
            groups.setdefault(file.parent.name, {})[file.stem] = next(comments(file), "")
    return groups


def comments(file: Path) -> Iterator[str]:
    """The comments that fill a line of a configuration file, without those for Hydra."""
    for line in file.read_text().splitlines():
        comment = line.removeprefix("#").strip()
        if line.startswith("#") and not comment.startswith("@package"):
            yield comment


def check_folders(folders: Sequence[Path]) -> None:
    """Raise UserError for a folder that does not exist, and for two files of one name.

    Of two Hydra would take the first, without a word.
    """
    seen = {file.relative_to(config_folder()): file for file in _files(config_folder())}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder} is no folder: check the path")
        for file in _files(folder):
            other = seen.setdefault(file.relative_to(folder), file)
            if other != file:
                raise UserError(f"{file} has the name of {other}: give it another one")


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.yaml"))


def task_verbs(*folders: Path) -> dict[str, dict[str, str]]:
    """Verb -> task -> what does it, of all tasks in some folders of configuration files."""
    import yaml

    verbs: dict[str, dict[str, str]] = {}
    for folder in folders:
        for file in sorted(folder.glob("task/*.yaml")):
            options = yaml.safe_load(file.read_text()) or {}
            for verb, call in (options.get("verbs") or {}).items():
                verbs.setdefault(verb, {})[file.stem] = call
    return verbs
