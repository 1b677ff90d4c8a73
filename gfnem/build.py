"""From a composed configuration to data, model, posterior and EM."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from gfnem.config import PARTS, model_parts
from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.memory import keep_freed_memory
from gfnem.run import Run
from gfnem.run.patterns import USUAL, patterns_for
from gfnem.signatures import annotations_of, described, fits

# The parts that a posterior may take beside its own options; a model's are the task's.
POSTERIOR_PARTS = ("policy", "objective", "local_search", "refinement")


@dataclass(frozen=True)
class Built:
    """Everything a configuration describes.

    config: the configuration itself, resolved, with the sizes that the data has.
    em: holds model, posterior, data and evaluator; its run is not set.
    """

    config: dict[str, Any]
    data: Any
    em: EM


def build(config: DictConfig) -> Built:
    """Check all options, then make all parts.

    Raises UserError for an option that cannot be used.
    """
    resolved, data = load_data(config)
    device = set_up(resolved["seed"], resolved["threads"], resolved["device"])
    model = _make_for(data, resolved["model"], **_parts(data, resolved, resolved["model_parts"]))
    if resolved["model_from"] is not None:
        _begin_with(model, resolved["model_from"])
    posterior = make(resolved["posterior"], **_parts(data, resolved, POSTERIOR_PARTS))
    if resolved.get("warm_start"):
        posterior = make(resolved["warm_start"], then=posterior)
    optimizers = {
        f"{network}_optimizer": _optimizer(options, f"optimizer.{network}")
        for network, options in resolved["optimizer"].items()
        if options is not None
    }
    schedule = make(resolved["schedule"]) if resolved.get("schedule") else None
    evaluator = make(resolved["evaluator"], data=data) if resolved.get("evaluator") else None
    if not posterior.parameter_groups():
        _check_nothing_learns(resolved)
    em = make(
        resolved["em"],
        model=model,
        posterior=posterior,
        data=data,
        schedule=schedule,
        evaluator=evaluator,
        device=device,
        **optimizers,
    )
    return Built(resolved, data, em)


def _begin_with(model: nn.Module, directory: str) -> None:
    """Give a model the best parameters of another run.

    Raises UserError where there are none or they are those of another model.
    """
    state = Run.open(directory).load_checkpoint("best")["model"]
    own = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if shapes != {name: tuple(value.shape) for name, value in own.items()}:
        raise UserError(
            f"the model of model_from={directory} is not of this kind and size: choose the data, "
            "the model and its options as there"
        )
    model.load_state_dict(state)


def load_data(config: DictConfig) -> tuple[dict[str, Any], Any]:
    """The resolved configuration with the data's sizes in it, and the data.

    Raises UserError for options that cannot be used and for data of other sizes than those that
    the configuration has already.
    """
    resolved = resolve(config)
    data = make(resolved["data"])
    before, now = resolved["sizes"], data.sizes()
    if all(before.values()) and before != now:
        raise UserError(f"the data is not what the run began with: {before} then, {now} now")
    return resolve(cast(DictConfig, OmegaConf.merge(config, {"sizes": now}))), data


def resolve(config: DictConfig) -> dict[str, Any]:
    """The configuration as plain values.

    Raises UserError for options that their part does not take, that have the wrong type, that are
    missing or that have no effect.
    """
    try:
        resolved = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(str(error).partition("\n")[0]) from None
    # An option that refers to another is named after it in messages, so both forms are needed.
    _check(resolved, cast(dict[str, Any], OmegaConf.to_container(config)))
    return resolved


def set_up(seed: int, threads: int | None, device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Seed all random numbers, set up the CPU's arithmetic and memory and choose the device."""
    keep_freed_memory()
    if threads is not None:
        if threads < 1:
            raise UserError(f"threads is {threads}; it must be at least 1")
        torch.set_num_threads(threads)
    # Numbers below 1e-38, such as the odds of a pixel that is never on, take a CPU ten times as
    # long as others and change nothing. NumPy looks for the smallest ones before, and remembers.
    for precision in ("float32", "float64"):
        np.finfo(np.dtype(precision))
    torch.set_flush_denormal(True)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but no CUDA device can be used here: take device=cpu")
    torch.manual_seed(seed)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def make(options: dict[str, Any], **parts: Any) -> Any:
    """Call what `_target_` names with the options and further parts, or make a partial of it."""
    try:
        call = instantiate(options, _partial_=True, _convert_="all")
    except Exception as error:
        # Objects among the options are made first, and Hydra wraps what they raise.
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    return call if options.get("_partial_") else call(**parts)


def _make_for(data: Any, options: dict[str, Any], **parts: Any) -> Any:
    """Make a part; one that takes `data` begins at the data."""
    takes_data = "data" in annotations_of(get_object(options["_target_"]))
    return make(options, data=data, **parts) if takes_data else make(options, **parts)


def _parts(data: Any, resolved: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those of some parts that the configuration has."""
    return {name: _make_for(data, resolved[name]) for name in names if resolved.get(name)}


def _check(resolved: dict[str, Any], raw: dict[str, Any]) -> None:
    direct = {**annotations_of(set_up), "run_dir": str, "model_from": str | None}
    for name, annotation in direct.items():
        _check_given(resolved.get(name), name)
        _check_type(resolved.get(name), annotation, name)
    for purpose in USUAL:
        patterns_for(resolved, purpose)
    for part in (*PARTS, *model_parts(resolved)):
        options = resolved.get(part)
        if options is None:
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
                raise UserError(f"{where} is no option of {options['_target_']}")
            _check_type(value, annotations[name], where)
        if isinstance(value, dict):
            _check_options(value, source, where)


def _check_given(value: Any, where: str) -> None:
    if value == "???":
        raise UserError(f"{where} is missing: give it with {where}=...")


def _check_type(value: Any, annotation: Any, where: str) -> None:
    if not fits(value, annotation):
        shown = "null" if value is None else value
        raise UserError(f"{where}={shown}: it must be {described(annotation)}")


def _optimizer(options: dict[str, Any], path: str) -> Any:
    """The factory of an optimizer, tried out: it alone knows which values it takes.

    It raises UserError for parameters that the optimizer cannot take.
    """
    factory = make(options)

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        try:
            return factory(groups)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None

    optimizer([nn.Parameter(torch.zeros(1, 1))])
    return optimizer


def _check_nothing_learns(config: dict[str, Any]) -> None:
    """Raise UserError for options about E-steps where the posterior has no parameters."""
    em = config["em"]
    given = {
        "schedule": config.get("schedule"),
        "optimizer.posterior": config["optimizer"].get("posterior"),
        "em.posterior_clip": em.get("posterior_clip"),
        "em.max_e_steps": em.get("max_e_steps"),
    }
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name} has no effect: the posterior has nothing to learn")
