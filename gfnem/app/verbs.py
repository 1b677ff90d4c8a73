"""Verbs: what is done with runs that are there, by gfnem or by their task."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gfnem.app.folders import EVALUATE, config_folder, task_verbs
from gfnem.app.nearest import did_you_mean, nearest
from gfnem.app.paths import paths_in
from gfnem.app.signatures import annotations_of
from gfnem.app.trust import check_stored, folders_of_modules
from gfnem.app.verb_options import is_under, refuse, split
from gfnem.errors import UserError
from gfnem.run import FilesTracker, Run, WandbTracker

# What imports torch is imported where it is needed, so that mistakes are told at once.
if TYPE_CHECKING:
    from gfnem.em import EM
    from gfnem.training.parts import Metrics

# Options of the stored configuration that mean something to a verb that reads a run.
_EVALUATE_TAKES = ("data", "device", "threads", "evaluator")
_TASK_VERB_TAKES = ("data", "device", "threads", "seed")


def use_run(verb: str, given: Sequence[str], folder: Path | None = None) -> Iterator[str]:
    """Do with trained models what a verb says: evaluate, or one that the runs' task brings.

    folder: a `--config-dir`, whose modules the runs may use.

    Gives the lines to print. Raises UserError for what cannot be done.
    """
    of_run, overrides = split(given, {"run": str, "checkpoint": Literal["best", "last"]})
    if "run" not in of_run:
        refuse(overrides, lambda key: nearest(key, ["run"]) is not None, "", ["run"])
        own = ("train", "compare", "evaluate", *task_verbs(config_folder()))
        meant = "" if verb in own else did_you_mean(verb, own)
        raise UserError(
            f"gfnem {verb}: {meant}"
            if meant
            else f"gfnem {verb} needs run=DIR, the directory of a run; the verbs are train, "
            "compare, evaluate and those of the run's task, such as parse and generate"
        )
    several = of_run["run"].startswith("[")
    directories = _directories(of_run["run"]) if several else [of_run["run"]]
    runs = {directory: Run.open(directory) for directory in directories}
    from hydra.utils import get_method

    from gfnem.app.options import find_modules
    from gfnem.app.trained import load
    from gfnem.categorical import check_draws, watched

    for run in runs.values():
        check_stored(run.config, run.path, folder)
    target = _call_of(verb, runs, several)
    find_modules(folders_of_modules(folder))
    call = get_method(target)
    annotations = annotations_of(call)
    options, overrides = split(overrides, annotations)
    takes = _EVALUATE_TAKES if verb == "evaluate" and not several else _TASK_VERB_TAKES
    refuse(
        overrides,
        lambda key: not is_under(key, takes),
        f"it means nothing to {verb}",
        ("run", "checkpoint", *annotations, *takes),
    )
    checkpoint = of_run.get("checkpoint", "best")
    trained = {directory: load(directory, checkpoint, overrides, folder) for directory in runs}
    with watched():
        result = call(trained if several else trained[of_run["run"]], **options)
        for line in lines_of(result) if isinstance(result, Mapping) else result:
            check_draws()
            yield line


def evaluate(em: EM, split: str = "test") -> Metrics:
    """Print the metrics of model and posterior on a split of the data.

    Args:
        split: train, valid or test, or what else the data has to test on.

    Raises:
        UserError: the data has no such split.
    """
    return em.evaluate(split, final=True)


def compare(given: Sequence[str]) -> None:
    """Put runs beside each other; what is no option is a place where there are runs."""
    from gfnem.run.compare import compare as compare_runs

    own = {
        "wandb": str,
        "metrics": str,
        "out": str,
        "reach": str,
        "tracker": Literal["files", "wandb"],
    }
    of_wandb = {f"tracker.{key}": kind for key, kind in annotations_of(WandbTracker).items()}
    places = [argument for argument in given if _is_place(argument, own | of_wandb)]
    named = [argument for argument in given if argument not in places]
    options, others = split(named, own | of_wandb)
    takes = f"compare takes {', '.join(own)}, tracker.KEY and folders"
    refuse(others, lambda key: True, takes, (*own, *of_wandb))
    tracked = {key.partition(".")[2]: options.pop(key) for key in of_wandb if key in options}
    if options.pop("tracker", "files") == "wandb":
        tracker = WandbTracker(**tracked)
    else:
        refuse(named, lambda key: key in of_wandb, "it has no effect without tracker=wandb")
        tracker = FilesTracker()
    project = options.pop("wandb", None)
    compare_runs(places, project, tracker=tracker, **options)


def lines_of(metrics: Mapping[str, float]) -> Iterator[str]:
    """A table of two columns."""
    width = max(map(len, metrics))
    for name, value in metrics.items():
        yield (
            f"{name:<{width}}  {value:.4f}"
            if isinstance(value, float)
            else f"{name:<{width}}  {value}"
        )


def _is_place(argument: str, options: Mapping[str, Any]) -> bool:
    """Whether an argument of compare is no option: names of jobs look like one."""
    option = re.match(r"\+*([\w.]+)=", argument)
    if option is None:
        return True
    return option[1] not in options and (os.path.exists(argument) or bool(glob.glob(argument)))


def _directories(given: str) -> list[str]:
    """The directories of several runs, a list in brackets."""
    inside = given.removeprefix("[")
    named = [name.strip("'\" ") for name in paths_in(inside.removesuffix("]"))]
    if not inside.endswith("]") or not all(named) or any(name[0] in "[{" for name in named):
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
        of_task = run.config.get("verbs")
        verbs = {"evaluate": EVALUATE, **(of_task if isinstance(of_task, Mapping) else {})}
        if verb not in verbs:
            meant = did_you_mean(verb, verbs) or f"use {', '.join(verbs)}"
            raise UserError(f"there is no verb {verb} for {directory}: {meant}")
        of_several = run.config.get("ensemble_verbs", {})
        if several and verb not in of_several:
            raise UserError(
                f"{directory} (task={run.config['task']}) has no ensemble_verbs.{verb} in its "
                f"config.yaml: {verb} takes one such run, run=DIR"
            )
        calls[directory] = of_several[verb] if several else verbs[verb]
        if not isinstance(calls[directory], str):
            raise UserError(f"{directory} has no function for {verb} in its config.yaml")
    (first, call), *others = calls.items()
    for directory, other in others:
        if other != call:
            raise UserError(
                f"{directory} is not of the task of {first}, so that no {verb} is of both"
            )
    return call
