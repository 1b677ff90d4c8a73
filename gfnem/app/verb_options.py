"""Options of a verb of its own, beside the overrides of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml

from gfnem.app.nearest import did_you_mean
from gfnem.app.signatures import check_numbers, described, fits
from gfnem.errors import UserError


def split(given: Iterable[str], annotations: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A verb's own options, read as their annotations say, and what else was given.

    Text is taken as it stands, so that paths need no quotes.

    Raises UserError for an option of another type.
    """
    own: dict[str, Any] = {}
    others = []
    for override in given:
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
        check_numbers(own[key], key)
    return own, others


def refuse(
    given: Iterable[str],
    refused: Callable[[str], bool],
    reason: str,
    known: Iterable[str] = (),
) -> None:
    """Raise UserError for an option that is refused, with the known one that is near."""
    known = list(known)
    for override in given:
        key = override.partition("=")[0].lstrip("+")
        if refused(key):
            raise UserError(f"{override}: {did_you_mean(key, known) or reason}")


def is_under(key: str, parts: Iterable[str]) -> bool:
    """Whether a dotted key is one of the parts or below one of them."""
    return any(key == part or key.startswith(f"{part}.") for part in parts)
