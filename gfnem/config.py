"""From overrides to a composed configuration; whatever is wrong with them is one clear line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gfnem.errors import UserError
from gfnem.help import config_folder, groups_in

# What every run is made of; each part is a mapping with a `_target_`, or null.
PARTS = (
    "data",
    "model",
    "policy",
    "objective",
    "local_search",
    "refinement",
    "posterior",
    "warm_start",
    "schedule",
    "optimizer",
    "em",
    "evaluator",
    "tracker",
)


def model_parts(config: Mapping[Any, Any]) -> list[str]:
    """What a run has beside PARTS: groups that its task's models take beside their own options.

    Raises UserError for a configuration that does not list them.
    """
    named = config.get("model_parts")
    if not isinstance(named, (list, ListConfig)) or not all(isinstance(n, str) for n in named):
        raise UserError(
            f"model_parts is {named}; it must be a list of groups, which older runs do not have"
        )
    return list(named)


def compose(overrides: Sequence[str], folder: Path | None = None) -> DictConfig:
    """The configuration of a new run.

    folder: more configuration files, beside gfnem's own.

    Raises UserError for overrides that cannot be read or that nothing takes.
    """
    return _compose(config_folder(), _checked(overrides, folder))


def _checked(overrides: Sequence[str], folder: Path | None) -> list[str]:
    """The overrides of a new run, and where more configuration files are."""
    groups = groups_in(config_folder())
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"--config-dir {folder} is no folder: check the path")
        for group, options in groups_in(folder).items():
            groups[group] = {**groups.get(group, {}), **options}
    for override in overrides:
        _check(_parsed(override), override, groups)
    searched = [] if folder is None else [f"hydra.searchpath=['file://{folder.resolve()}']"]
    return [*searched, *overrides]


def compose_stored(run: Path, overrides: Sequence[str]) -> DictConfig:
    """The configuration in a run's directory, with some of its values changed.

    Raises UserError for overrides that cannot be read or that nothing takes.
    """
    for override in overrides:
        _check(_parsed(override), override, {})
    config = _compose(run.resolve(), overrides)
    # The run's checkpoints hold all parameters, those that came from other runs too.
    config.model_from = None
    for part in model_parts(config):
        _leave_out_runs(config.get(part))
    return config


def _leave_out_runs(options: Any) -> None:
    """Set every `run`, the directory of another run, to null."""
    if isinstance(options, DictConfig):
        for name, value in options.items():
            if name == "run":
                options.run = None
            _leave_out_runs(value)


def combinations(overrides: Sequence[str], folder: Path | None = None) -> list[list[str]]:
    """The overrides of every job of a sweep, `seed=1,2,3 posterior=exact,gflownet`.

    What an experiment sweeps over by itself, its `hydra.sweeper.params`, comes in addition; what is
    given counts more.
    """
    swept_by = cache(partial(_swept_by, folder=folder))
    return [
        job
        for given in _products(overrides)
        for job in _products(
            [*swept_by(*(o for o in given if o.startswith("experiment="))), *given]
        )
    ]


def sweep(
    overrides: Sequence[str], folder: Path | None = None
) -> list[tuple[list[str], DictConfig]]:
    """Overrides and configuration of every job of a sweep, as `combinations` has them.

    Job number n runs in the folder n of the sweep's `run_dir`.
    """
    jobs = [(job, compose(job, folder)) for job in combinations(overrides, folder)]
    for number, (_, config) in enumerate(jobs):
        # So that ${now:} in `run_dir` is the same in all of them.
        OmegaConf.copy_cache(jobs[0][1], config)
        config.run_dir = f"{config.run_dir}/{number}"
    return jobs


def _products(overrides: Sequence[str]) -> list[list[str]]:
    """One value of each override; of several for the same option the last counts."""
    try:
        batches = BasicSweeper.split_arguments([_parsed(o) for o in overrides], None)
    except HydraException as error:
        raise UserError(_line(error)) from None
    return [list(job) for batch in batches for job in batch]


def _swept_by(*experiment: str, folder: Path | None) -> list[str]:
    """What an experiment, `experiment=...` or none, sweeps over by itself, as overrides."""
    if not experiment:
        return []
    config = _hydra_compose(config_folder(), _checked(experiment, folder), with_hydra=True)
    return [f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items()]


def _compose(folder: Path, overrides: Sequence[str]) -> DictConfig:
    config = _hydra_compose(folder, overrides)
    _drop_parts_not_chosen(config, overrides)
    _check_m_step(config, overrides)
    return config


def _hydra_compose(folder: Path, overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    """with_hydra: keep what Hydra says of itself."""
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
            return hydra_compose(
                "config", overrides=list(overrides), return_hydra_config=with_hydra
            )
    except (HydraException, OmegaConfBaseException) as error:
        unknown = re.match("Could not override '([^']+)'", str(error))
        if unknown:
            raise UserError(
                f"{unknown[1]} is no option of this configuration: gfnem --cfg prints all of them"
            ) from None
        raise UserError(_line(error)) from None


def _drop_parts_not_chosen(config: DictConfig, overrides: Sequence[str]) -> None:
    """Data and experiments may say something of parts that a posterior does without.

    Raises UserError for overrides that do, and for a posterior that the task does not have.
    """
    parts = [*PARTS, *model_parts(config)]
    if config.get("posterior") is None:
        raise UserError(f"task={config.task} has no such posterior: choose another one")
    for override in overrides:
        added = _parsed(override)
        if added.is_add() and added.key_or_group.partition(".")[0] not in parts:
            raise UserError(f"{override}: only options of {', '.join(parts)} can be added")
        part, _, choice = override.partition("=")
        if part in parts and choice not in ("null", "none") and config.get(part) is None:
            raise UserError(f"{override} has no effect: this run has no {part}")
    for part in parts:
        options = config.get(part)
        if not isinstance(options, DictConfig) or part == "optimizer" or "_target_" in options:
            continue
        for override in overrides:
            if override.partition("=")[0].lstrip("+").startswith(f"{part}."):
                raise UserError(f"{override} has no effect: this run has no {part}")
        config[part] = None


def _check_m_step(config: DictConfig, overrides: Sequence[str]) -> None:
    """Raise UserError for options of M-steps by gradient where they are in closed form."""
    if OmegaConf.select(config, "posterior.m_step") != "closed":
        return
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        if key == "em.model_clip" or key.startswith("optimizer.model"):
            raise UserError(
                f"{override} has no effect: M-steps go to the maximum at once; set "
                "posterior.m_step=gradient"
            )


def _parsed(override: str) -> Override:
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(
            f"{override!r} is not of the form key=value, or its value needs quotes of its own, "
            f"as in \"key='a=b'\" ({_line(error)})"
        ) from None


def _check(override: Override, text: str, groups: dict[str, dict[str, str]]) -> None:
    """Raise UserError for what Hydra would accept without effect or refuse in many lines."""
    key = override.key_or_group
    if not key:
        raise UserError(f"{text!r} is not of the form key=value")
    if key.split(".")[0].split("/")[0] == "hydra":
        raise UserError(f"{text}: there is nothing of Hydra's own to set here; see run_dir")
    if override.is_delete():
        raise UserError(f"{text}: options can be changed, not removed")
    if override.is_sweep_override():
        raise UserError(f"{text}: several values need --multirun, text with a comma needs quotes")
    if key in groups and str(override.value()) not in groups[key]:
        raise UserError(f"{text}: {key} is one of {', '.join(groups[key])}")


def _line(error: Exception) -> str:
    """An error of Hydra's or OmegaConf's in one line, without its links and key listings."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("See http", "full_key:"))]
    return " ".join(line for line in kept if not line.startswith("object_type="))
