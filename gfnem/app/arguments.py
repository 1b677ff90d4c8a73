"""What was typed: a verb, flags and overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gfnem.app.nearest import did_you_mean
from gfnem.errors import UserError

SHORT = {"-h": "--help", "-m": "--multirun", "-r": "--run", "-c": "--cfg", "-p": "--package"}
SHORT |= {"-i": "--info", "-cd": "--config-dir", "-sc": "--shell-completion"}
"""Short flag -> the flag."""
FLAGS = (*SHORT.values(), "--version", "--resolve", "--hydra-help")

VALUED = ("--cfg", "--package", "--config-dir")
"""Flags that a value follows."""

_CFG = ("job", "hydra", "all")
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


@dataclass
class Command:
    """A command line of `gfnem`.

    verb: what is to be done.
    given: arguments that are neither the verb nor flags, in their order.
    flags: flag -> its value, "" where it takes none.
    """

    verb: str = "train"
    given: list[str] = field(default_factory=list)
    flags: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, arguments: Sequence[str]) -> Command:
        """Raises UserError for flags that gfnem does not have, and for their values."""
        command = cls()
        rest = list(arguments)
        if rest and re.fullmatch(r"\w+", rest[0]):
            command.verb = rest.pop(0)
        while rest:
            argument = rest.pop(0)
            if not argument.startswith("-"):
                command.given.append(argument)
                continue
            flag, has_value, value = argument.partition("=")
            flag = SHORT.get(flag, flag)
            if flag not in FLAGS:
                reason = did_you_mean(flag, FLAGS) or "see gfnem --help"
                raise UserError(f"there is no flag {flag}: {reason}")
            if flag in VALUED and not has_value:
                value = rest.pop(0) if rest else ""
            if flag == "--info" and not has_value:
                value = rest.pop(0) if rest and rest[0] in _INFO else "all"
            command.flags[flag] = value
        command._check()
        return command

    def _check(self) -> None:
        for flag, choices in (("--cfg", _CFG), ("--info", _INFO)):
            if self.flags.get(flag, choices[0]) not in choices:
                raise UserError(f"{flag} takes one of {', '.join(choices)}, as {flag} {choices[0]}")
        several = [
            flag for flag in ("--multirun", "--run", "--cfg", "--info") if flag in self.flags
        ]
        if len(several) > 1:
            raise UserError(f"{' and '.join(several)} do not go together: give one of them")

    @property
    def multirun(self) -> bool:
        """Whether it is a sweep."""
        return "--multirun" in self.flags

    @property
    def config_dir(self) -> Path | None:
        """The folder with configuration files of the user's own."""
        given = self.flags.get("--config-dir")
        return None if given is None else Path(given)

    def of_hydra(self) -> list[str]:
        """The flags as Hydra reads them."""
        return [word for flag, value in self.flags.items() for word in (flag, value) if word]
