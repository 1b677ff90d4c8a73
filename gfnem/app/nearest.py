"""What was meant by a name that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

_NEAR = 0.8  # of the ratio of SequenceMatcher


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is nearest to a name, or None where none is near.

    Dotted names have as many parts; with all but the last in common, the last is compared.
    """
    alike = [one for one in known if one.count(".") == name.count(".")]
    ratio, found = max(((_ratio(name, one), one) for one in alike), default=(0.0, ""))
    return found if ratio >= _NEAR else None


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The question after the nearest name, or None where none is near."""
    found = nearest(name, known)
    return None if found is None else f"did you mean {found}?"


def _ratio(one: str, other: str) -> float:
    (parent, _, leaf), (other_parent, _, other_leaf) = one.rpartition("."), other.rpartition(".")
    if parent == other_parent:
        one, other = leaf, other_leaf
    return SequenceMatcher(None, one, other).ratio()
