"""Which runs are seeds of one setting, and in what settings differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Options = dict[str, str]
"""Dotted key -> value as text. An option that is null is as good as absent."""

# What tells nothing of how a run was trained, apart from its seed.
_IGNORED = (
    "seed",
    "run_dir",
    "module_folders",
    "tracker",
    "verbs",
    "ensemble_verbs",
    "patterns",
    "model_parts",
)
# Where another posterior has none of these, its name says so.
_OF_POSTERIOR = (
    "e_step",
    "policy",
    "objective",
    "schedule",
    "optimizer.posterior",
    "em.posterior_clip",
)
WITH_SEED = "with seed"

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but their seed.

    runs: which of the configurations, by number.
    options: what they have in common; `data.seed` is "with seed" where each seed has its own.
    """

    runs: list[int]
    options: Options


def settings_of(configs: Sequence[Mapping[str, Any]]) -> list[Setting]:
    """Group the configurations of runs by what they say apart from the seed, in their order.

    `data.seed` counts as part of the seed where, among runs that agree in all else, each seed
    comes with a data seed of its own. What is made of such data may have other sizes.
    """
    options = [_options(config) for config in configs]
    seeds = [str(config.get("seed")) for config in configs]

    def apart_from_data(run: int) -> Hashable:
        return frozenset(_without(options[run], ("data.seed", "sizes")).items())

    settings = []
    for runs in _grouped(range(len(configs)), apart_from_data):
        pairs = {(seeds[run], options[run].get("data.seed")) for run in runs}
        if 1 < len(pairs) == len({seed for seed, _ in pairs}) == len({data for _, data in pairs}):
            common = _without(options[runs[0]], ("sizes",))
            settings.append(Setting(runs, {**common, "data.seed": WITH_SEED}))
        else:
            same = _grouped(runs, lambda run: frozenset(options[run].items()))
            settings += [Setting(some, options[some[0]]) for some in same]
    return settings


def differences(settings: Sequence[Options]) -> dict[str, list[str]]:
    """What tells settings apart: name -> the value in each of them, "" where there is none.

    A part that is made by different classes is named by its class, and its options are compared
    among settings with the same class only. Names are the shortest ends of the dotted keys that
    no other key has. An option that repeats another of the same name is left out.
    """
    keys = list(dict.fromkeys(key for options in settings for key in options))
    differing = [key for key in keys if _differs(key, settings)]
    if any(_is_under(key, ("data",)) for key in differing):
        differing = [key for key in differing if not _is_under(key, ("sizes",))]
    columns = {key: _shown(key, settings) for key in differing}
    # Classes first; then options near the top, whose copies further down are left out; what all
    # settings have before what some have.
    differing.sort(key=lambda k: (not _is_class(k), k.count("."), columns[k].count("")))
    columns = {_part(key): columns[key] for key in differing}
    nodes = {node for key in keys for node in _nodes(_part(key))} | set(_IGNORED)
    return {
        _shortest(name, nodes): values
        for name, values in columns.items()
        if not any(
            _last(other) == _last(name) and _repeats(name, other, columns) for other in columns
        )
    }


def _options(config: Mapping[str, Any]) -> Options:
    """Flatten a configuration, without what repeats the sizes of the data."""
    sizes = config.get("sizes") or {}
    return {
        key: _text(value)
        for key, value in _leaves(config)
        if not _is_under(key, _IGNORED)
        and (_is_under(key, ("data", "sizes")) or sizes.get(_last(key)) != value)
    }


def _leaves(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{key}.")
        elif value is not None and (name == "_target_" or not str(name).startswith("_")):
            yield key, value


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    # Some formats have but one kind of number.
    whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if whole else value)


def _differs(key: str, settings: Sequence[Options]) -> bool:
    """Whether an option has several values among settings whose parts around it agree."""

    def classes(options: Options) -> Hashable:
        around = list(_nodes(_part(key)))[:-1]
        return tuple(options.get(f"{node}._target_") for node in around)

    for alike in _grouped(settings, classes):
        groups = [alike]
        if _is_under(_part(key), _OF_POSTERIOR):
            groups = _grouped(alike, lambda options: options.get("posterior._target_"))
            groups.append([options for options in alike if key in options])
        if any(len({options.get(key) for options in group}) > 1 for group in groups):
            return True
    return False


def _shown(key: str, settings: Sequence[Options]) -> list[str]:
    values = [options.get(key, "") for options in settings]
    if _is_class(key):
        short = [_last(value) for value in values]
        return short if len(set(short)) == len(set(values)) else values
    return values


def _repeats(name: str, other: str, columns: Mapping[str, list[str]]) -> bool:
    """Whether another column says all that one does, and more or before it."""
    if columns[name] == columns[other]:
        names = list(columns)
        return names.index(other) < names.index(name)
    return all(a in ("", b) for a, b in zip(columns[name], columns[other], strict=True))


def _shortest(name: str, nodes: Iterable[str]) -> str:
    ends = [name.split(".", cut)[-1] for cut in range(name.count("."), -1, -1)]
    return next(
        end for end in ends if end == name or sum(f".{n}".endswith(f".{end}") for n in nodes) == 1
    )


def _nodes(key: str) -> Iterator[str]:
    """The parts that hold an option, from the outermost, and the option."""
    names = key.split(".")
    for depth in range(1, len(names) + 1):
        yield ".".join(names[:depth])


def _is_class(key: str) -> bool:
    return key.endswith("._target_")


def _part(key: str) -> str:
    return key.removesuffix("._target_")


def _last(key: str) -> str:
    return key.rpartition(".")[-1]


def _is_under(key: str, parts: Iterable[str]) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def _without(options: Options, parts: Iterable[str]) -> Options:
    return {key: value for key, value in options.items() if not _is_under(key, parts)}


def _grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Items with the same key together, in the order of the first of each."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
