"""Training: Hydra's application, one run or the jobs of a sweep, and runs that go on."""

from __future__ import annotations

import logging
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gfnem.app.arguments import Command
from gfnem.app.composition import Sweep, check_overrides, compose, compose_stored
from gfnem.app.console import lasting_console
from gfnem.app.folders import config_folder
from gfnem.app.loggers import let_loggers_speak
from gfnem.app.overrides import in_quotes, line_of, quoted
from gfnem.app.refusals import model_parts, own_folders, settle
from gfnem.app.status import DONE, FAILED, INTERRUPTED, USER_ERROR
from gfnem.app.verb_options import is_under, refuse, split
from gfnem.app.verbs import lines_of
from gfnem.errors import UserError

# What imports torch is imported where it is needed, so that mistakes are told at once.
if TYPE_CHECKING:
    from gfnem.app.build import Built
    from gfnem.em import EM
    from gfnem.run import Run

Checkpoint = Literal["last", "best"]

# A checkpoint holds what these options made: whoever reads it cannot change them.
KEPT = (
    "task",
    "seed",
    "run_dir",
    "model_from",
    "latent",
    "sizes",
    "model",
    "model_parts",
    "policy",
    "warm_start",
    "optimizer",
    "schedule",
    "em.warmup",
    "em.average",
    "patterns",
)


def start(command: Command) -> int:
    """Train, or let Hydra print what it is asked for; returns the exit status.

    Raises UserError for what cannot be used, before anything is trained.
    """
    own, given = split(command.given, {"resume": str, "checkpoint": Checkpoint})
    for argument in given:
        if "=" not in argument and not argument.startswith("~"):
            raise UserError(f"{argument!r} is not of the form key=value: see gfnem --help")
    shows = any(flag in command.flags for flag in ("--cfg", "--info", "--hydra-help"))
    multirun = command.multirun or ("hydra.mode=MULTIRUN" in given and not shows)
    if "resume" in own:
        if multirun:
            raise UserError("resume=DIR does not go with --multirun")
        which = own.get("checkpoint", "last")
        shown = "--cfg" in command.flags
        return resume(Path(own["resume"]), given, which, command.config_dir, shown)
    if "checkpoint" in own:
        raise UserError("checkpoint=last|best goes with resume=DIR, or with what a run is for")
    overrides = quoted(given, multirun)
    if multirun:
        return _sweep(command, overrides)
    check_overrides(overrides, command.config_dir, multirun=shows)
    if "--info" in command.flags:
        logging.getLogger("hydra").setLevel(logging.DEBUG)  # it logs what others print
    try:
        return run_hydra([*command.of_hydra(), *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        compose(overrides, command.config_dir)  # says in one line what Hydra refuses
        raise UserError(line_of(error)) from None


def run_hydra(arguments: Sequence[str]) -> int:
    """Run Hydra's application with the arguments that it has on a command line.

    Returns the exit status. Raises what Hydra and the run raise.
    """
    application = hydra.main(
        version_base="1.3", config_path=str(config_folder()), config_name="config"
    )(train)
    try:
        with _command_line(arguments):
            application()
    except _Ended as ended:
        raise ended.error from None
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else DONE
    return DONE


def train(config: DictConfig) -> float | None:
    """Train one model: what Hydra calls, for each job of a sweep.

    Returns what sweepers minimise, the best value of the evaluator's selection, or None where there
    is none: NaN would end Optuna's sweeps, where None is a trial that failed.
    """
    let_loggers_speak()
    hydra_config = cast(DictConfig, HydraConfig.get())
    if hydra_config.mode == RunMode.MULTIRUN:
        return _job(config, hydra_config)
    try:
        settle(config, hydra_config)
        status, best = _train(config, own_folders(hydra_config))
    except Exception as error:
        # Hydra would say more than the one line that there is for a user's mistake.
        raise _Ended(error) from error
    if status != DONE:
        raise SystemExit(status)
    return best


def resume(
    directory: Path,
    overrides: Sequence[str],
    which: Checkpoint = "last",
    folder: Path | None = None,
    print_config: bool = False,
) -> int:
    """Go on with a run that was stopped, or train it longer; returns the exit status."""
    from gfnem.run import Run

    stored = Run.open(directory)
    kept = (*KEPT, *model_parts(stored.config))
    refuse(overrides, lambda key: is_under(key, kept), "a resumed run keeps what it began with")
    config = compose_stored(stored, overrides, folder)
    if print_config:
        print(OmegaConf.to_yaml(config), end="")
        return DONE
    from gfnem.run.lock import alone

    flags = [] if folder is None else [f"--config-dir={folder}"]
    with alone(directory):
        return _go_on(stored, config, which, [*flags, *overrides])


def _go_on(stored: Run, config: DictConfig, which: Checkpoint, arguments: Sequence[str]) -> int:
    from gfnem.app.build import build, make
    from gfnem.app.provenance import check_words
    from gfnem.app.trained import fitting
    from gfnem.run import Run

    # A run that was killed before its first checkpoint begins again.
    state = stored.load_checkpoint(which) if stored.has_checkpoints else None
    built = build(config)
    check_words(stored.path, built.data)
    em = built.em
    if state is not None:
        with fitting(stored.path):
            em.load_state_dict(state)
    if em.finished and _is_complete(stored, em):
        steps = f"{em.done.m_steps} M-steps and {em.done.e_steps} E-steps"
        print(
            f"{stored.path} is finished, with {steps}: "
            "raise em.m_steps (or what else ended it) to go on"
        )
        return DONE
    run = Run.open(stored.path, make(built.config["tracker"]))
    run.truncate_metrics(0 if state is None else state["record"]["lines"])
    return _fit(built, run, arguments)


class _Ended(BaseException):
    """Carries what a run raised through Hydra, which would print it in its own way."""

    def __init__(self, error: Exception):
        self.error = error


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Hydra reads its arguments from `sys.argv`, and raises where a variable is set."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _sweep(command: Command, overrides: Sequence[str]) -> int:
    sweep = Sweep(overrides, command.config_dir)
    configurations = list(sweep.configurations())
    for config in configurations:
        _check_model_from(config)
    from gfnem.app.options import resolve
    from gfnem.app.sweeps import check_new, jobs_in, keep_error, show_results, told

    for config in configurations:
        resolve(config)
    if sweep.grid:
        check_new(sweep.directory, sweep.jobs(), sweep.fixed)
    before = jobs_in(sweep.directory)
    fixed = ",".join(map(in_quotes, sweep.fixed))
    own = [f"hydra.job.config.override_dirname.exclude_keys=[{fixed}]"]
    own.append(f"hydra.sweep.dir={in_quotes(str(sweep.directory))}")
    try:
        status = run_hydra([*command.of_hydra(), *own, *overrides])
    except Exception as error:  # of a launcher or a sweeper
        keep_error(sweep.directory, error)
        status = FAILED
        print(f"gfnem: the sweep has ended early: {told(sweep.directory)}", file=sys.stderr)
    finally:
        errors = show_results(jobs_in(sweep.directory) - before)
    if any(not error.startswith("gfnem: ") for error in errors):
        return FAILED
    return USER_ERROR if errors else status


def _job(config: DictConfig, hydra_config: DictConfig) -> float | None:
    """One of a sweep; whatever it raises, the others go on."""
    from gfnem.app.sweeps import keep_error, make_directory, output_of, told

    directory = make_directory(hydra_config)
    print(f"job {hydra_config.job.num}: {directory.name}", flush=True)
    try:
        with output_of(directory):
            settle(config, hydra_config)
            config.run_dir = str(directory)
            status, best = _train(config, own_folders(hydra_config))
    except Exception as error:
        keep_error(directory, error)
        print(f"job {hydra_config.job.num} failed: {told(directory)}", flush=True)
        return None
    if status > 128:
        raise KeyboardInterrupt
    return best


def _train(config: DictConfig, folders: Sequence[Path]) -> tuple[int, float | None]:
    """Exit status and objective of a run."""
    _check_model_from(config)
    from gfnem.app.build import build, make
    from gfnem.app.provenance import keep_provenance
    from gfnem.run import Run
    from gfnem.run.lock import alone

    built = build(config)
    given = built.em.model.is_truth or built.config["model_from"] is not None
    if built.config["em"]["m_steps"] == 0 and not given:
        raise UserError(
            "em.m_steps=0 trains the posterior alone: give model_from=RUN, the run of its model, "
            "or a model that is the truth of its data, such as model.start=truth of a mixture"
        )
    tracker = make(built.config["tracker"])
    run = Run.create(built.config["run_dir"], built.config, tracker)
    with alone(run.path):
        keep_provenance(run.path, built.data)
        status = _fit(built, run, [f"--config-dir={folder}" for folder in folders])
    return status, built.em.rating.best if math.isfinite(built.em.rating.best) else None


def _check_model_from(config: DictConfig) -> None:
    """Raise UserError where there is no run to begin with, before data is read."""
    from gfnem.run import Run

    if config.model_from is not None:
        Run.open(config.model_from)


def _fit(built: Built, run: Run, arguments: Sequence[str]) -> int:
    with lasting_console():
        return _fit_and_tell(built, run, arguments)


def _fit_and_tell(built: Built, run: Run, arguments: Sequence[str]) -> int:
    em = built.em
    em.record.run = run
    print(built.data.describe())
    print(f"device {em.device}, run directory {run.path}", flush=True)
    again = shlex.join(["gfnem", f"resume={run.path}", *arguments])
    try:
        summary = em.fit()
    except KeyboardInterrupt:
        print(f"interrupted; go on from the last checkpoint with: {again}")
        return INTERRUPTED
    if em.stopped:
        done = f"{em.done.m_steps} of {em.limits.m_steps} M-steps and {em.done.e_steps} E-steps"
        print(f"stopped after {done}; go on with: {again}")
        return 128 + em.stopped
    evaluator = em.rating.evaluator
    if evaluator is not None:
        selection = evaluator.selection(em.model)
        print(f"the checkpoint of lowest {selection}, {em.rating.best:.4g}, is rated")
    shown = ("train/m_steps", "train/best_m_steps", "time/seconds")
    kept = {k: v for k, v in summary.items() if k in shown or k.startswith("test/")}
    for line in lines_of(kept):
        print(line)
    print(f"run directory {run.path}")
    return DONE


def _is_complete(run: Run, em: EM) -> bool:
    """Whether the final evaluation is there, and not that of a run that went on since."""
    if not (run.path / "summary.json").exists():
        return False
    summary = run.summary()
    steps = em.done.m_steps, em.done.e_steps
    at = summary.get("train/m_steps"), summary.get("train/e_steps")
    return at == steps and any(key.startswith("test/") for key in summary)
