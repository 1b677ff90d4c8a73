"""Verbs of the command line."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gfnem import __version__
from gfnem import help as help_text
from gfnem.errors import UserError

# What is heavy to import is imported where it is needed, so that help and errors come at once.
if TYPE_CHECKING:
    from omegaconf import DictConfig

    from gfnem.build import Built
    from gfnem.em import EM
    from gfnem.run import Run
    from gfnem.training.parts import Metrics

DONE, USER_ERROR, INTERRUPTED = 0, 2, 130

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
# Options of the stored configuration that mean something to a verb that reads a run.
EVALUATE_TAKES = ("data", "device", "threads", "evaluator")
TASK_VERB_TAKES = ("data", "device", "threads", "seed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (that of the process by default); returns the exit status.

    0: done. 2: something that was given cannot be used, as one line on standard error says.
    130: interrupted.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("gfnem").setLevel(logging.INFO)
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # what it logs, it also raises
    try:
        return _main(list(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        return _failed(error)
    except KeyboardInterrupt:
        print("gfnem: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough; nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        # A full disk, a folder that may not be written: named by the error itself.
        return _failed(UserError(str(error)))


@dataclass
class Command:
    """What was typed."""

    verb: str = "train"
    overrides: list[str] = field(default_factory=list)
    multirun: bool = False
    print_config: bool = False
    config_dir: Path | None = None


def _main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(help_text.text(), end="")
        return DONE
    if "--version" in arguments:
        print(f"gfnem {__version__}")
        return DONE
    if arguments[:1] == ["compare"]:
        return _compare(arguments[1:])
    command = _read(arguments)
    if command.verb != "train":
        return _use_run(command.verb, command.overrides)
    own, overrides = _split(command.overrides, {"resume": str})
    if "resume" in own:
        if command.multirun or command.config_dir is not None:
            raise UserError("resume=DIR goes with neither --multirun nor --config-dir")
        return _resume(Path(own["resume"]), overrides, command.print_config)
    if command.multirun:
        return _sweep(overrides, command.config_dir, command.print_config)
    from gfnem.config import compose

    return _train(compose(overrides, command.config_dir), command.print_config)


def _read(arguments: list[str]) -> Command:
    command = Command()
    rest = iter(arguments)
    for number, argument in enumerate(rest):
        if argument in ("--multirun", "-m"):
            command.multirun = True
        elif argument == "--cfg":
            command.print_config = True
        elif argument == "--config-dir":
            command.config_dir = Path(next(rest, ""))
        elif argument.startswith("-"):
            raise UserError(f"there is no flag {argument}: see gfnem --help")
        elif "=" in argument:
            command.overrides.append(argument)
        elif number == 0:
            command.verb = argument
        else:
            raise UserError(f"{argument!r} is not of the form key=value: see gfnem --help")
    if command.verb != "train" and (
        command.multirun or command.print_config or command.config_dir is not None
    ):
        raise UserError(f"gfnem {command.verb} takes no flags: see gfnem --help")
    return command


def _train(config: DictConfig, print_config: bool) -> int:
    from gfnem.build import build, load_data, make

    if print_config:
        return _print_config(load_data(config)[0])
    from gfnem.run import Run

    built = build(config)
    given = built.em.model.is_truth or built.config["model_from"] is not None
    if built.config["em"]["m_steps"] == 0 and not given:
        raise UserError(
            "em.m_steps=0 trains the posterior alone: give model_from=RUN, the run of its model, "
            "or a model that is the truth of its data, such as model.start=truth of a mixture"
        )
    tracker = make(built.config["tracker"])
    return _fit(built, Run.create(built.config["run_dir"], built.config, tracker))


def _sweep(overrides: list[str], config_dir: Path | None, print_config: bool) -> int:
    from gfnem.config import sweep

    jobs = sweep(overrides, config_dir)
    status = DONE
    for number, (choices, config) in enumerate(jobs, 1):
        print(f"job {number} of {len(jobs)}: {' '.join(choices)}", flush=True)
        try:
            job_status = _train(config, print_config)
        except UserError as error:
            job_status = _failed(error)
        if job_status == INTERRUPTED:
            return INTERRUPTED
        status = max(status, job_status)
    return status


def _resume(directory: Path, overrides: list[str], print_config: bool) -> int:
    from gfnem.run import Run

    stored = Run.open(directory)
    from gfnem.build import build, load_data, make
    from gfnem.config import compose_stored, model_parts

    kept = (*KEPT, *model_parts(stored.config))
    _refuse(overrides, lambda key: _is_under(key, kept), "a resumed run keeps what it began with")
    config = compose_stored(directory, overrides)
    if print_config:
        return _print_config(load_data(config)[0])
    state = stored.load_checkpoint("last")
    built = build(config)
    em = built.em
    em.load_state_dict(state)
    if em.finished and _is_complete(stored):
        print(
            f"{directory} is finished, with {em.m_steps} M-steps and {em.e_steps} E-steps: "
            "raise em.m_steps (or what else ended it) to go on"
        )
        return DONE
    run = Run.open(directory, make(built.config["tracker"]))
    run.truncate_metrics(state["lines"])
    return _fit(built, run, overrides)


def _fit(built: Built, run: Run, overrides: Sequence[str] = ()) -> int:
    em = built.em
    em.run = run
    print(built.data.describe())
    print(f"device {em.device}, run directory {run.path}", flush=True)
    again = shlex.join(["gfnem", f"resume={run.path}", *overrides])
    try:
        summary = em.fit()
    except KeyboardInterrupt:
        print(f"interrupted; go on from the last checkpoint with: {again}")
        return INTERRUPTED
    if em.stopped:
        done = f"{em.m_steps} of {em.total_m_steps} M-steps and {em.e_steps} E-steps"
        print(f"stopped after {done}; go on with: {again}")
        return INTERRUPTED
    if em.evaluator is not None:
        print(f"the checkpoint of lowest {em.evaluator.selection}, {em.best:.4g}, is rated")
    shown = ("train/m_steps", "train/best_m_steps", "time/seconds")
    for line in _lines({k: v for k, v in summary.items() if k in shown or k.startswith("test/")}):
        print(line)
    print(f"run directory {run.path}")
    return DONE


def _use_run(verb: str, overrides: list[str]) -> int:
    """Do with trained models what a verb says: evaluate, or one that the runs' task brings."""
    of_run, overrides = _split(overrides, {"run": str, "checkpoint": Literal["best", "last"]})
    if "run" not in of_run:
        raise UserError(
            f"gfnem {verb} needs run=DIR, the directory of a run; the verbs are train, compare, "
            "evaluate and those of the run's task, such as parse and generate"
        )
    from gfnem.run import Run

    several = of_run["run"].startswith("[")
    directories = _directories(of_run["run"]) if several else [of_run["run"]]
    runs = {directory: Run.open(directory) for directory in directories}
    from hydra.utils import get_method

    from gfnem.build import build
    from gfnem.categorical import check_draws, watched
    from gfnem.config import compose_stored
    from gfnem.signatures import annotations_of

    call = get_method(_call_of(verb, runs, several))
    options, overrides = _split(overrides, annotations_of(call))
    takes = EVALUATE_TAKES if verb == "evaluate" and not several else TASK_VERB_TAKES
    _refuse(overrides, lambda key: not _is_under(key, takes), f"it means nothing to {verb}")
    trained = {}
    for directory, run in runs.items():
        config = compose_stored(run.path, overrides)
        state = run.load_checkpoint(of_run.get("checkpoint", "best"))
        trained[directory] = em = build(config).em
        em.model.load_state_dict(state["model"])
        em.posterior.load_state_dict(state["posterior"])
    with watched():
        result = call(trained if several else trained[of_run["run"]], **options)
        for line in _lines(result) if isinstance(result, Mapping) else result:
            check_draws()
            print(line)
    return DONE


def _directories(given: str) -> list[str]:
    """The directories of several runs, a list in brackets."""
    import yaml

    try:
        named = yaml.load(given, yaml.BaseLoader)  # which takes all items as text
    except yaml.YAMLError:
        named = None
    if not named or not all(isinstance(name, str) for name in named):
        raise UserError(f"run={given}: several runs are a list of directories, run=[DIR,DIR]")
    paths = [Path(name).resolve() for name in named]
    for number, name in enumerate(named):
        if paths[number] in paths[:number]:
            raise UserError(f"run={given}: {name} is there twice")
    return named


def _call_of(verb: str, runs: Mapping[str, Run], several: bool) -> str:
    """What does what a verb says with a run, or with several of one task."""
    calls = {}
    for directory, run in runs.items():
        verbs = {"evaluate": "gfnem.cli.evaluate", **run.config["verbs"]}
        if verb not in verbs:
            raise UserError(f"there is no verb {verb} for {directory}: use {', '.join(verbs)}")
        of_several = run.config.get("ensemble_verbs", {})
        if several and verb not in of_several:
            raise UserError(
                f"{directory} (task={run.config['task']}) has no ensemble_verbs.{verb} in its "
                f"config.yaml: {verb} takes one such run, run=DIR"
            )
        calls[directory] = of_several[verb] if several else verbs[verb]
    (first, call), *others = calls.items()
    for directory, other in others:
        if other != call:
            raise UserError(
                f"{directory} is not of the task of {first}, so that no {verb} is of both"
            )
    return call


def evaluate(em: EM, split: str = "test") -> Metrics:
    """Rate model and posterior on a split."""
    return em.evaluate(split, final=True)


def _compare(arguments: list[str]) -> int:
    """Put runs beside each other; what is no option is a place where there are runs."""
    from gfnem.run.compare import compare
    from gfnem.run.tracking import FilesTracker, WandbTracker
    from gfnem.signatures import annotations_of

    for argument in arguments:
        if argument.startswith("-"):
            raise UserError("gfnem compare takes no flags: see gfnem --help")
    given = [argument for argument in arguments if re.match(r"\+*[\w.]+=", argument)]
    places = [argument for argument in arguments if argument not in given]
    own = {
        "wandb": str,
        "metrics": str,
        "out": str,
        "reach": str,
        "tracker": Literal["files", "wandb"],
    }
    of_wandb = {f"tracker.{key}": kind for key, kind in annotations_of(WandbTracker).items()}
    options, others = _split(given, own | of_wandb)
    _refuse(others, lambda key: True, f"compare takes {', '.join(own)}, tracker.KEY and folders")
    tracked = {key.partition(".")[2]: options.pop(key) for key in of_wandb if key in options}
    if options.pop("tracker", "files") == "wandb":
        tracker = WandbTracker(**tracked)
    else:
        _refuse(given, lambda key: key in of_wandb, "it has no effect without tracker=wandb")
        tracker = FilesTracker()
    project = options.pop("wandb", None)
    compare(places, project, tracker=tracker, **options)
    return DONE


def _split(
    overrides: Iterable[str], annotations: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """A verb's own options, read as their annotations say, and all other overrides.

    Text is taken as it stands, so that paths need no quotes.
    """
    import yaml

    from gfnem.signatures import described, fits

    own: dict[str, Any] = {}
    others = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in annotations:
            others.append(override)
            continue
        try:
            own[key] = value if fits(value, annotations[key]) else yaml.safe_load(value)
        except yaml.YAMLError:
            own[key] = None
        if not fits(own[key], annotations[key]):
            raise UserError(f"{override}: it must be {described(annotations[key])}")
    return own, others


def _refuse(overrides: Iterable[str], refused: Callable[[str], bool], reason: str) -> None:
    for override in overrides:
        if refused(override.partition("=")[0].lstrip("+")):
            raise UserError(f"{override}: {reason}")


def _is_under(key: str, parts: Iterable[str]) -> bool:
    """Whether a dotted key is one of the parts or below one of them."""
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def _is_complete(run: Run) -> bool:
    """Whether the run's final evaluation is there."""
    return (run.path / "summary.json").exists() and any(
        key.startswith("test/") for key in run.summary()
    )


def _print_config(config: Mapping[str, Any]) -> int:
    import yaml

    print(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True), end="")
    return DONE


def _lines(metrics: Mapping[str, float]) -> Iterator[str]:
    """A table of two columns."""
    width = max(map(len, metrics))
    for name, value in metrics.items():
        yield (
            f"{name:<{width}}  {value:.4f}"
            if isinstance(value, float)
            else f"{name:<{width}}  {value}"
        )


def _failed(error: UserError) -> int:
    print(f"gfnem: {error}", file=sys.stderr)
    return USER_ERROR
