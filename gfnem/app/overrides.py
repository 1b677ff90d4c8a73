"""Overrides as Hydra reads them, and what is refused of them one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.errors import HydraException

from gfnem.app.folders import Groups
from gfnem.app.nearest import did_you_mean
from gfnem.app.paths import paths_in
from gfnem.errors import UserError

# What is of sweeps alone.
_OF_SWEEPS = ("launcher", "sweeper", "hydra.launcher", "hydra.sweeper", "hydra.sweep")
# What a launcher or a sweeper needs beside gfnem, as an extra of it.
_EXTRAS = {
    "joblib": "joblib",
    "submitit_local": "slurm",
    "submitit_slurm": "slurm",
    "optuna": "optuna",
}


def parsed(override: str) -> Override:
    """Raises UserError for what Hydra cannot read."""
    try:
        return OverridesParser.create().parse_override(override)
    except (HydraException, ValueError) as error:  # a number of thousands of digits
        raise UserError(
            f"{override!r} is not of the form key=value, or its value needs quotes of its own, "
            f"as in \"key='a,b'\" ({line_of(error)})"
        ) from None


def quoted(overrides: Iterable[str], multirun: bool) -> list[str]:
    """Overrides with quotes around what Hydra cannot read without them: names of jobs.

    multirun: whether commas may stand between several of them.
    """
    return [_quoted(override, multirun) for override in overrides]


def _quoted(override: str, multirun: bool) -> str:
    key, _, value = override.partition("=")
    if "=" not in value:
        return override
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        texts = paths_in(value) if multirun else [value]
        return f"{key}={','.join(map(in_quotes, texts))}"
    return override


def in_quotes(text: str) -> str:
    """Some text as Hydra reads it whatever it says."""
    return QuotedString(text, Quote.single).with_quotes()


def check(override: Override, groups: Groups, multirun: bool = False) -> None:
    """Raise UserError for what Hydra would accept without effect or refuse in many lines.

    groups: what there is to choose from.
    multirun: whether the override is of a sweep; one of its values is checked here.
    """
    key, text = override.key_or_group, override.input_line or ""
    if not key:
        raise UserError(f"{text!r} is not of the form key=value")
    if override.is_delete():
        raise UserError(f"{text}: options can be changed, not removed")
    if override.is_sweep_override():
        raise UserError(f"{text}: several values need --multirun, text with a comma needs quotes")
    if key == "hydra.run.dir":
        raise UserError(f"{text} has no effect: run_dir says where the run's directory is")
    part = ".".join(key.replace("/", ".").split(".")[:2])
    if part in _OF_SWEEPS and not multirun:
        raise UserError(f"{text} has no effect without --multirun")
    value = str(override.value())
    if value in _EXTRAS and value not in groups.get(
        f"hydra/{key.removeprefix('hydra/')}", (value,)
    ):
        raise UserError(f"{text} needs a plug-in: pip install 'gfnem[{_EXTRAS[value]}]'")
    if key in groups and value not in groups[key]:
        offered = f"{key} is one of {', '.join(groups[key])}"
        meant = did_you_mean(value, groups[key])
        raise UserError(f"{text}: {f'{meant} {offered}' if meant else offered}")


def plugins() -> Groups:
    """The launchers and sweepers that are installed."""
    Plugins.instance()  # finds them
    groups: Groups = {}
    for group in ("hydra/launcher", "hydra/sweeper"):
        names = ConfigStore.instance().list(group)
        stored = [name.removesuffix(".yaml") for name in names if name.endswith(".yaml")]
        groups[group] = dict.fromkeys(stored, "")
    return groups


def values_of(override: Override) -> list[Override]:
    """An override for each value of a sweep; of an interval for its ends."""
    key = override.get_key_element()
    if not override.is_sweep_override():
        return [override]
    value = override.value()
    if isinstance(value, IntervalSweep):
        texts = [str(value.start), str(value.end)]
    else:
        texts = list(override.sweep_string_iterator())
    return [parsed(f"{key}={text}") for text in texts]


def products(overrides: Iterable[Override]) -> list[list[str]]:
    """One value of each override; of several for the same option the last counts."""
    return [list(job) for job in itertools.product(*_values(overrides).values())]


def each_value(overrides: Iterable[Override]) -> list[list[str]]:
    """Overrides in which every value of a sweep occurs; of others the first."""
    values = _values(overrides)
    first = {key: some[0] for key, some in values.items()}
    others = [{**first, key: one} for key, some in values.items() for one in some[1:]]
    return [list(job.values()) for job in (first, *others)]


def _values(overrides: Iterable[Override]) -> dict[str, list[str]]:
    """Key -> the overrides that a sweep makes of it."""
    return {
        override.get_key_element(): [
            f"{value.get_key_element()}={value.get_value_element_as_str()}"
            for value in values_of(override)
        ]
        for override in overrides
    }


def line_of(error: BaseException) -> str:
    """An error of Hydra's or OmegaConf's in one line, without its links and key listings."""
    said = [str(error)] if error.__cause__ is None else [str(error), str(error.__cause__)]
    lines = [line.strip() for line in "\n".join(said).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("See http", "full_key:"))]
    return " ".join(line for line in kept if not line.startswith("object_type="))
