"""What is refused of a composed configuration, before anything of it is made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import DictConfig, ListConfig, OmegaConf

from gfnem.app.documented import annotations_in_file
from gfnem.app.folders import config_folder
from gfnem.app.overrides import parsed
from gfnem.app.signatures import check_type
from gfnem.errors import UserError

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
# What is set directly.
DIRECT: Mapping[str, Any] = {
    "seed": int,
    "threads": int | None,
    "device": Literal["auto", "cpu", "cuda"],
    "run_dir": str,
    "model_from": str | None,
}


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


def settle(config: DictConfig, hydra: DictConfig) -> None:
    """Finish a composed configuration, once Hydra has done its part.

    hydra: what Hydra says of itself.

    Raises UserError for what has no effect or belongs to another task.
    """
    overrides = task_overrides(hydra)
    _check_task(config, hydra.runtime.choices)
    _drop_parts_not_chosen(config, overrides)
    _check_m_step(config, overrides)
    _check_types(config, overrides)
    beside = [str(folder.parent) for folder in own_folders(hydra)]
    if beside:
        config.module_folders = [*config.module_folders, *beside]


def task_overrides(hydra: DictConfig) -> list[str]:
    """The overrides that Hydra has taken, without those of its own configuration."""
    return cast(list[str], OmegaConf.to_container(hydra.overrides.task))


def own_folders(hydra: DictConfig) -> list[Path]:
    """The folders of configuration files that are not gfnem's own."""
    return [
        Path(source.path)
        for source in hydra.runtime.config_sources
        if source.schema == "file" and source.provider != "main"
    ]


def _check_task(config: DictConfig, choices: DictConfig) -> None:
    """Raise UserError for a choice that belongs to another of gfnem's tasks."""
    if not (config_folder() / "task" / f"{config.get('task')}.yaml").exists():
        return
    for part in PARTS:
        target = OmegaConf.select(config, f"{part}._target_")
        of_task = re.match(r"gfnem\.tasks\.(\w+)\.", str(target))
        if part in choices and of_task and of_task[1] != config.task:
            raise UserError(
                f"{part}={choices[part]} is of task={of_task[1]}, and this run is of "
                f"task={config.task}: choose another {part}, or that task"
            )


def _drop_parts_not_chosen(config: DictConfig, overrides: Sequence[str]) -> None:
    """Data and experiments may say something of parts that a posterior does without.

    Raises UserError for overrides that do, and for a posterior that the task does not have.
    """
    parts = [*PARTS, *model_parts(config)]
    if config.get("posterior") is None:
        raise UserError(f"task={config.task} has no such posterior: choose another one")
    for override in overrides:
        added = parsed(override)
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


def _check_types(config: DictConfig, overrides: Sequence[str]) -> None:
    """Raise UserError for values of a wrong type, as far as that is told without torch.

    All options are checked before anything is made of them; this answers sooner.
    """
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        part, _, name = key.rpartition(".")
        options = OmegaConf.select(config, part) if part else config
        if not isinstance(options, DictConfig) or name not in options:
            continue
        target = str(options.get("_target_"))
        known = annotations_in_file(target) if target.startswith("gfnem.") else {}
        annotation = known.get(name, Any) if part else DIRECT.get(name, Any)
        if not OmegaConf.is_interpolation(options, name):
            check_type(options[name], annotation, key)
