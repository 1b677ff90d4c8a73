"""From a composed configuration to data, model, posterior and EM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from gfnem.app.machine import set_up
from gfnem.app.options import POSTERIOR_PARTS, resolve
from gfnem.app.provenance import check_words
from gfnem.app.signatures import annotations_of
from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.optim import lazy_groups
from gfnem.run import Run


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
        check_words(Path(resolved["model_from"]), data)
        _begin_with(model, resolved["model_from"])
    posterior = make(resolved["posterior"], **_parts(data, resolved, POSTERIOR_PARTS))
    if resolved.get("warm_start"):
        posterior = make(resolved["warm_start"], then=posterior)
    optimizers = {
        f"{name}_optimizer": _optimizer(options, f"optimizer.{name}", network)
        for name, network in {"model": model, "posterior": posterior}.items()
        if (options := resolved["optimizer"].get(name)) is not None
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
    state = Run.open(directory).load_checkpoint("best").get("model")
    if not isinstance(state, dict) or _shapes(state) != _shapes(model.state_dict()):
        raise UserError(
            f"the model of model_from={directory} is not of this kind and size: choose the data, "
            "the model and its options as there"
        )
    model.load_state_dict(state)


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}


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


def _optimizer(options: dict[str, Any], path: str, network: nn.Module) -> Any:
    """The factory of a network's optimizer, tried out: it alone knows which values it takes.

    It raises UserError for parameters that the optimizer cannot take. Lazy momentum is that of
    tables of words.
    """
    factory = make(options)

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        try:
            return factory(lazy_groups(groups, network) if options.get("lazy") else groups)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None

    optimizer([{"params": [nn.Parameter(torch.zeros(1, 1))]}])
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
