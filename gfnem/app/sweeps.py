"""Jobs of a sweep: their names and directories, those that fail, and the table at the end."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

from omegaconf import DictConfig

from gfnem.app.refusals import task_overrides
from gfnem.errors import UserError
from gfnem.run.compare import Comparison
from gfnem.run.finished import finished_runs

ERROR_FILE = "error.txt"
OUTPUT_FILE = "output.txt"
_LONGEST = 128  # characters of a name


def name_of(overrides: Iterable[str], fixed: Iterable[str]) -> str:
    """The name of a job: the options that are swept over and their values.

    Characters that paths or Hydra cannot bear are replaced, and a long name ends in a hash.

    fixed: names of the options that are the same in all jobs.
    """
    choices = (override.lstrip("+").partition("=") for override in overrides)
    swept = [f"{_plain(key)}={_plain(value)}" for key, _, value in choices if key not in fixed]
    name = ",".join(swept) or "job"
    if len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: _LONGEST - len(digest) - 1]}-{digest}"


def _plain(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text.strip("'\""), flags=re.ASCII)


def make_directory(hydra: DictConfig) -> Path:
    """Make the directory of the job that Hydra runs; one of the same name gets a number."""
    directory = Path(hydra.runtime.output_dir)
    if directory.is_relative_to(Path.cwd()):
        directory = directory.relative_to(Path.cwd())
    if hydra.sweep.subdir != ".":
        return directory
    name = name_of(task_overrides(hydra), hydra.job.config.override_dirname.exclude_keys)
    for number in itertools.count(1):
        path = directory / (name if number == 1 else f"{name}_{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
    raise AssertionError


def check_new(directory: Path, jobs: Sequence[Sequence[str]], fixed: Iterable[str]) -> None:
    """Raise UserError where there is something in the place of a job."""
    for job in jobs:
        path = directory / name_of(job, fixed)
        if path.exists():
            raise UserError(f"{path} is there already: name another run_dir, or remove it")


def jobs_in(directory: Path) -> set[Path]:
    """The directories of the jobs of a sweep, and of those before it in the same place."""
    if not directory.is_dir():
        return set()
    return {path for path in directory.iterdir() if path.is_dir() and path.name[0] != "."}


@contextmanager
def output_of(directory: Path) -> Iterator[None]:
    """Write what a job prints into its directory where others print at the same time."""
    if multiprocessing.current_process().name == "MainProcess":
        yield
        return
    with (directory / OUTPUT_FILE).open("w") as file, redirect_stdout(file):
        yield


def keep_error(directory: Path, error: Exception) -> None:
    """Write what a job or a sweep raised into its directory."""
    if isinstance(error, UserError):
        text = f"gfnem: {error}\n"
    else:
        text = "".join(traceback.format_exception(error))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ERROR_FILE).write_text(text)


def told(directory: Path) -> str:
    """What was raised, in one line, and where there is more of it."""
    file = directory / ERROR_FILE
    last = file.read_text().strip().rpartition("\n")[2]
    return f"{last.removeprefix('gfnem: ')} ({file})"


def show_results(jobs: Iterable[Path]) -> list[str]:
    """Print how jobs ended: a table of the finished ones, a line for each of the others.

    Returns what these raised.
    """
    errors = []
    runs = []
    for job in sorted(jobs):
        failed = sorted(job.rglob(ERROR_FILE))
        errors += [file.read_text() for file in failed]
        for file in failed:
            print(f"gfnem: {file.parent.name} failed: {told(file.parent)}", file=sys.stderr)
        if not failed and any(job.rglob("config.yaml")):
            runs.append(str(job))
    if runs:
        with suppress(UserError):  # none is complete, as has been said of each
            Comparison(finished_runs(runs)).show()
    return errors
