"""Options are checked against what takes them, before anything is made of them."""

from __future__ import annotations

import re
import sys
from typing import Any, cast

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gfnem.app.nearest import did_you_mean
from gfnem.app.refusals import DIRECT, PARTS, model_parts
from gfnem.app.signatures import annotations_of, check_type, fits
from gfnem.errors import UserError
from gfnem.run.patterns import USUAL, patterns_for

# The parts that a posterior may take beside its own options; a model's are the task's.
POSTERIOR_PARTS = ("policy", "objective", "local_search", "refinement")

NEEDED = ("data", "model", "posterior", "optimizer", "em", "tracker")


def resolve(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain values.

    Raises UserError for options that their part does not take, that have the wrong type, that are
    missing or that have no effect.
    """
    try:
        resolved = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(str(error).partition("\n")[0]) from None
    find_modules(resolved.get("module_folders"))
    # An option that refers to another is named after it in messages, so both forms are needed.
    _check(resolved, cast(dict[str, Any], OmegaConf.to_container(config)))
    return resolved


def find_modules(folders: Any) -> None:
    """Let what `_target_` names be found in some folders, too."""
    if not fits(folders, list[str] | None):
        raise UserError(f"module_folders={folders}: it must be a list of folders")
    sys.path += [folder for folder in folders or () if folder not in sys.path]


def _check(resolved: dict[str, Any], raw: dict[str, Any]) -> None:
    for name, annotation in DIRECT.items():
        _check_given(resolved.get(name), name)
        check_type(resolved.get(name), annotation, name)
    for purpose in USUAL:
        patterns_for(resolved, purpose)
    for part in (*PARTS, *model_parts(resolved)):
        options = resolved.get(part)
        if options is None and part not in NEEDED:
            continue
        if not isinstance(options, dict):
            raise UserError(f"{part}={options}: only options of it can be set, {part}.KEY=VALUE")
        _check_options(options, raw[part], part)
    for whole, parts in (("model", resolved["model_parts"]), ("posterior", POSTERIOR_PARTS)):
        target = resolved[whole]["_target_"]
        taken = annotations_of(get_object(target))
        taker = target.rpartition(".")[-1]
        for part in parts:
            if resolved.get(part) is not None and part not in taken:
                raise UserError(f"{part} has no effect with {taker}: leave {part}=... out")
        if "policy" in parts and "policy" in taken and resolved.get("policy") is None:
            raise UserError(f"{taker} needs a policy: give one, or use posterior=mcmc")


def _check_options(options: dict[str, Any], raw: Any, path: str) -> None:
    annotations = None
    if "_target_" in options:
        target = options["_target_"]
        try:
            annotations = annotations_of(get_object(target))
        except (ImportError, ValueError, AttributeError) as error:
            line = " ".join(str(error).split())
            raise UserError(f"{path}._target_={target} cannot be imported: {line}") from None
    for name, value in options.items():
        if name.startswith("_"):
            continue
        source = raw[name] if isinstance(raw, dict) else None
        reference = re.fullmatch(r"\$\{([\w.]+)\}", source) if isinstance(source, str) else None
        where = reference[1] if reference else f"{path}.{name}"
        _check_given(value, where)
        if annotations is not None:
            if name not in annotations:
                siblings = [where.removesuffix(name) + known for known in annotations]
                if meant := did_you_mean(where, siblings):
                    raise UserError(f"{where}: {meant}")
                raise UserError(f"{where} is no option of {options['_target_']}")
            check_type(value, annotations[name], where)
        if isinstance(value, dict):
            _check_options(value, source, where)


def _check_given(value: Any, where: str) -> None:
    if value == "???":
        raise UserError(f"{where} is missing: give it with {where}=...")
