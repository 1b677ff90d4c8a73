"""From overrides to a composed configuration; whatever is wrong with them is one clear line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from gfnem.app.folders import check_folders, config_folder, groups_in
from gfnem.app.nearest import did_you_mean
from gfnem.app.overrides import (
    check,
    each_value,
    in_quotes,
    line_of,
    parsed,
    plugins,
    products,
    quoted,
    values_of,
)
from gfnem.app.refusals import model_parts, settle
from gfnem.app.trust import check_stored, folders_of_modules
from gfnem.errors import UserError

if TYPE_CHECKING:
    from gfnem.run import Run


def compose(overrides: Sequence[str], folder: Path | None = None) -> DictConfig:
    """The configuration of a new run.

    folder: more configuration files, beside gfnem's own.

    Raises UserError for overrides that cannot be read or that nothing takes.
    """
    check_overrides(overrides, folder)
    return _settled(_hydra_compose(config_folder(), _with_folder(overrides, folder)))


def check_overrides(
    overrides: Sequence[str], folder: Path | None = None, multirun: bool = False
) -> None:
    """Raise UserError for overrides of a new run that can be told to be wrong one by one."""
    given = [parsed(override) for override in overrides]
    folders = [*_searched(given), *([] if folder is None else [folder])]
    check_folders(folders)
    groups = groups_in(config_folder(), *folders) | plugins()
    for override in given:
        for value in values_of(override) if multirun else [override]:
            check(value, groups, multirun)


def compose_stored(run: Run, overrides: Sequence[str], folder: Path | None = None) -> DictConfig:
    """The configuration of a run, with some of its values changed.

    folder: a `--config-dir` of this command line, whose modules the run may use.

    Raises UserError for overrides that cannot be read or that nothing takes, and for a
    configuration that makes what it may not.
    """
    check_folders([] if folder is None else [folder])
    check_stored(run.config, run.path, folder)
    overrides = quoted(overrides, multirun=False)
    for override in overrides:
        check(parsed(override), {})
    config = _settled(_hydra_compose(run.path.resolve(), overrides))
    config.module_folders = folders_of_modules(folder)
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


class Sweep:
    """What a command line with several values is about.

    Attributes:
        directory: where its jobs go.
        varied: the overrides and their values.
        fixed: names of the options that have one value each.
        grid: whether every combination of values is a job; other sweepers choose.

    Raises:
        UserError: as `compose`, and for a launcher or a sweeper that is not installed.
    """

    def __init__(self, overrides: Sequence[str], folder: Path | None = None) -> None:
        check_overrides(overrides, folder, multirun=True)
        self._folder = folder
        given = [parsed(override) for override in overrides]
        config = self._composed(o.input_line or "" for o in given if not o.is_sweep_override())
        if config.hydra.runtime.choices["hydra/launcher"] == "submitit_slurm":
            _check_slurm()
        self.directory = Path(config.hydra.sweep.dir)
        self.grid = config.hydra.runtime.choices["hydra/sweeper"] == "basic"
        # What is given counts more than what an experiment sweeps over by itself.
        params = config.hydra.sweeper.get("params") or {}
        swept = [parsed(f"{key}={values}") for key, values in params.items()]
        options = (o for o in (*swept, *given) if not o.is_hydra_override())
        self.varied = list({o.get_key_element(): o for o in options}.values())
        if any(o.key_or_group == "run_dir" and o.is_sweep_override() for o in self.varied):
            raise UserError("run_dir is one for all jobs of a sweep, which have folders in it")
        self.fixed = sorted(o.key_or_group for o in self.varied if not o.is_sweep_override())
        self._of_hydra = [o.input_line or "" for o in given if o.is_hydra_override()]

    def jobs(self) -> list[list[str]]:
        """The overrides of all jobs of a grid; of another sweep jobs with every value in it.

        Raises UserError for a sweep over an interval, of which there is no grid.
        """
        for override in self.varied:
            if self.grid and override.is_sweep_override() and not override.is_discrete_sweep():
                raise UserError(
                    f"{override.input_line}: not all values of an interval can be taken; list "
                    "some, or use hydra/sweeper=optuna"
                )
        return products(self.varied) if self.grid else each_value(self.varied)

    def configurations(self) -> Iterator[DictConfig]:
        """Of all `jobs`."""
        for job in self.jobs():
            yield _settled(self._composed([*self._of_hydra, *job]))

    def _composed(self, overrides: Iterable[str]) -> DictConfig:
        return _hydra_compose(config_folder(), _with_folder(list(overrides), self._folder))


def combinations(overrides: Sequence[str], folder: Path | None = None) -> list[list[str]]:
    """The overrides of every job of a sweep, `seed=1,2,3 posterior=exact,gflownet`.

    What an experiment sweeps over by itself, its `hydra.sweeper.params`, comes in addition; what is
    given counts more.
    """
    return Sweep(overrides, folder).jobs()


def _settled(config: DictConfig) -> DictConfig:
    with open_dict(config):
        hydra = config.pop("hydra")
    settle(config, hydra)
    return config


def _with_folder(overrides: Sequence[str], folder: Path | None) -> list[str]:
    """Overrides that name a folder of configuration files in Hydra's way, too."""
    if folder is None:
        return list(overrides)
    folders = [*_searched([parsed(override) for override in overrides]), folder]
    paths = (in_quotes(f"file://{folder.resolve()}") for folder in folders)
    others = [o for o in overrides if not o.startswith("hydra.searchpath=")]
    return [f"hydra.searchpath=[{','.join(paths)}]", *others]


def _searched(overrides: Sequence[Override]) -> list[Path]:
    """Folders of configuration files that overrides name in Hydra's way."""
    named = [o.value() for o in overrides if o.key_or_group == "hydra.searchpath"]
    listed = [str(path) for paths in named if isinstance(paths, list) for path in paths]
    return [Path(path.removeprefix("file://")) for path in listed if not path.startswith("pkg://")]


def _hydra_compose(folder: Path, overrides: Sequence[str]) -> DictConfig:
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
            return hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
    except yaml.YAMLError as error:
        raise UserError(f"{folder}: {line_of(error)}") from None
    except (HydraException, OmegaConfBaseException) as error:
        unknown = re.match("Could not override '([^']+)'", str(error))
        if unknown is None:
            raise UserError(line_of(error)) from None
    key = unknown[1]
    known = _hydra_compose(folder, [o for o in overrides if parsed(o).key_or_group != key])
    meant = did_you_mean(key, _dotted(known))
    reason = f"{key}: {meant}" if meant else f"{key} is no option of this configuration:"
    raise UserError(f"{reason} gfnem --cfg job prints all of them")


def _dotted(config: DictConfig, above: str = "") -> Iterator[str]:
    """The names of all options."""
    for name, value in config.items_ex(resolve=False):
        yield f"{above}{name}"
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            yield from _dotted(value, f"{above}{name}.")


def _check_slurm() -> None:
    for program in ("sbatch", "srun"):
        if shutil.which(program) is None:
            raise UserError(
                f"Slurm's {program} is not here: start the sweep on a computer of the cluster, or "
                "take hydra/launcher=submitit_local"
            )
