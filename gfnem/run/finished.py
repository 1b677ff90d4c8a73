"""What finished runs leave to be compared, in directories or in a project of Weights & Biases."""

from __future__ import annotations

import glob
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gfnem.errors import UserError
from gfnem.run.directory import Run
from gfnem.run.paired import Scores, read_scores
from gfnem.run.patterns import USUAL, patterns_for
from gfnem.run.shown import printable

_API_SECONDS = 20  # to wait for an answer of the service


@dataclass(frozen=True)
class FinishedRun:
    """What there is to compare of a run.

    name: its directory, or its name and address in a project.
    numbers: those of its summary, and those of its last evaluation as `last/valid/...`.
    lines: of its metrics.
    scores: of each test sentence, where its directory has tables of them.
    """

    name: str
    config: Mapping[str, Any]
    numbers: Mapping[str, float]
    lines: Sequence[Mapping[str, float]]
    scores: Scores = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> FinishedRun:
        """Raises UserError for a run that is broken or not complete."""
        run = Run.open(directory)
        for purpose in USUAL:
            patterns_for(run.config, purpose)
        finished = cls.of(str(directory), run.config, run.summary(), run.metrics())
        return replace(finished, scores=read_scores(directory))

    @classmethod
    def of(
        cls,
        name: str,
        config: Mapping[str, Any],
        summary: Mapping[str, Any],
        lines: Sequence[Mapping[str, Any]],
    ) -> FinishedRun:
        """Raises UserError for a run whose summary has no results on test data."""
        if not _is_complete(summary):
            raise UserError(f"{name} has no test results: the run is not complete, resume it")
        lines = [_numbers(line) for line in lines]
        last = {f"last/{k}": v for line in lines for k, v in line.items() if k.startswith("valid/")}
        return cls(name, config, _numbers(summary) | last, lines)


def finished_runs(places: Iterable[str], project: str | None = None) -> list[FinishedRun]:
    """Read runs from directories and from a project; see `compare`.

    A run that is broken or not complete is named on standard error and left out.

    Raises UserError for a place without runs, a project that cannot be read, and where no run is
    complete.
    """
    found = []
    directories = _run_directories(places)
    records = _records(project) if project is not None else []
    for source in (*directories, *records):
        try:
            run = FinishedRun.read(source) if isinstance(source, Path) else FinishedRun.of(*source)
        except (UserError, OSError, ValueError, TypeError, KeyError) as error:
            print(f"left out: {printable(str(error))}", file=sys.stderr)
        else:
            found.append(run)
    if not found:
        raise UserError(f"none of {len(directories) + len(records)} runs can be compared")
    return found


def _run_directories(places: Iterable[str]) -> list[Path]:
    """Directories of runs, each once, at any depth under the places and what they match."""
    found: dict[str, Path] = {}
    for place in places:
        if os.path.isdir(place):
            folders = [place]
        elif os.path.exists(place):
            raise UserError(f"{place} is no folder: give the directory of a run")
        elif glob.has_magic(place):
            folders = sorted(filter(os.path.isdir, glob.glob(place, recursive=True)), key=_natural)
            if not folders:
                raise UserError(f"{place} matches no folder: check the pattern")
        else:
            raise UserError(f"{place!r} does not exist: check the path")
        runs = [run for folder in folders for run in _within(folder)]
        if not runs:
            raise UserError(f"{place} holds no runs: give directories of runs or folders of some")
        for run in runs:
            found.setdefault(os.path.realpath(run), run)
    return list(found.values())


def _within(folder: str) -> Iterator[Path]:
    for path, below, files in os.walk(folder):
        if "config.yaml" in files or "metrics.jsonl" in files:
            yield Path(path)
            below.clear()
        # Neither Hydra's own folder nor those of wandb are runs, though they hold a config.yaml.
        below[:] = sorted((n for n in below if n[0] != "." and n != "wandb"), key=_natural)


def _natural(name: str) -> list[str | int]:
    """Sorts 10 behind 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


Record = tuple[str, Mapping[str, Any], Mapping[str, Any], Sequence[Mapping[str, Any]]]
"""Name, configuration, summary and lines of metrics."""


def _records(project: str) -> list[Record]:
    """The runs of a project of Weights & Biases, from the oldest to the newest."""
    if not re.fullmatch(r"[^/\s]+/[^/\s]+", project):
        raise UserError(f"wandb={project} is not of the form ENTITY/PROJECT")
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"wandb={project} needs a package that is missing: pip install wandb"
        ) from None
    try:
        # Silence also keeps wandb from asking for a key: without one, it raises instead.
        wandb.setup(settings=wandb.Settings(silent=True, console="off"))
        runs = wandb.Api(timeout=_API_SECONDS).runs(project, lazy=False)
        return [_record(run, project) for run in runs if "compare" not in run.config]
    except Exception as error:  # of the network, the service or its process: it can be nearly any
        line = str(error).partition("\n")[0]
        raise UserError(
            f"wandb={project} cannot be read ({type(error).__name__}: {line}): check its name, the "
            "network and `wandb login`"
        ) from None


def _record(run: Any, project: str) -> Record:
    # Other keys of the summary are the best or the last values of curves.
    summary = {
        key.removeprefix("final/"): value
        for key, value in run.summary.items()
        if key.startswith("final/")
    }
    lines = list(run.scan_history()) if _is_complete(summary) else []
    return f"{run.name} ({project}/{run.id})", run.config, summary, lines


def _is_complete(summary: Mapping[str, Any]) -> bool:
    return any(key.startswith("test/") for key in summary)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The metrics among some values; services write what is not finite as text or as null."""
    missing = (None, "NaN", "Infinity", "-Infinity")
    metrics = {key: value for key, value in values.items() if "/" in key}
    return {
        key: math.nan if value in missing else value
        for key, value in metrics.items()
        if value in missing or isinstance(value, (int, float))
    }
