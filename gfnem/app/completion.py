"""Completion in shells: Hydra's own, with the verbs and flags of gfnem."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from gfnem.app.arguments import FLAGS, SHORT, VALUED
from gfnem.app.documented import Documented
from gfnem.app.help import verbs_of
from gfnem.app.paths import beginning_with


def complete(arguments: Sequence[str]) -> None:
    """Answer a shell, or print what it has to know of gfnem.

    arguments: as Hydra takes them: install=SHELL, uninstall=SHELL or query=SHELL, which completes
        the line in the environment.
    """
    if not any(argument.startswith("query=") for argument in arguments):
        _hydra(arguments)
        return
    line = os.environ.get("COMP_LINE", "")
    words = line.split()[1:]
    last = words.pop() if words and not line.endswith(" ") else ""
    if last.startswith("-"):
        _print(flag for flag in (*FLAGS, *SHORT) if flag.startswith(last))
        return
    if words and words[-1] in (*VALUED, *(s for s, flag in SHORT.items() if flag in VALUED)):
        _print(beginning_with(last))
        return
    folder = _folder(words)
    calls = verbs_of(folder)
    verb = words[0] if words and words[0] in calls else ""
    if verb in ("", "train"):
        if not words:
            _print(one for one in (*calls, "resume=") if one.startswith(last))
        os.environ["COMP_LINE"] = " ".join(["gfnem", *words[bool(verb) :], last])
        _hydra([*arguments, *(part for one in folder for part in ("--config-dir", str(one)))])
        return
    key, is_option, value = last.partition("=")
    if verb == "compare" and not is_option:
        _print(beginning_with(last))
    elif is_option and key in ("run", "file", "out"):
        _print(f"{key}={path}" for path in beginning_with(value))
    else:
        _print(option for option in _options(verb, calls[verb].values()) if option.startswith(last))


def _options(verb: str, calls: Iterable[str]) -> list[str]:
    if verb == "compare":
        return ["metrics=", "out=", "reach=", "wandb=", "tracker="]
    documented = filter(None, map(Documented.read, calls))
    own = [f"{option}=" for one in documented for option in one.options]
    return list(dict.fromkeys(["run=", "checkpoint=", *own]))


def _folder(words: Sequence[str]) -> list[Path]:
    """The folder of configuration files that a line names, if it exists."""
    flags = ("--config-dir", "-cd")
    named = [Path(after) for flag, after in zip(words, words[1:], strict=False) if flag in flags]
    return [folder for folder in named[:1] if folder.is_dir()]


def _hydra(arguments: Sequence[str]) -> None:
    from hydra.errors import HydraException

    from gfnem.app.training import run_hydra

    try:
        run_hydra(["--shell-completion", *arguments])
    except HydraException:
        return  # what is typed is not complete: there is nothing to offer


def _print(words: Iterable[str]) -> None:
    for word in sorted(set(words)):
        print(word)
