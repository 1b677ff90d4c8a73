"""What was meant by a name that does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher
from functools import partial

# Of the ratio of SequenceMatcher; of as many letters, up to four, two of three are enough.
_NEAR, _NEAR_OF_FEW = 0.8, 0.66


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is nearest to a name, or None where none is near.

    Dotted names have as many parts; with all but the last in common, the last is compared.
    """
    alike = [one for one in known if one.count(".") == name.count(".")]
    return max((one for one in alike if _near(name, one)), key=partial(_ratio, name), default=None)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The question after the nearest name, or None where none is near."""
    found = nearest(name, known)
    return None if found is None else f"did you mean {found}?"


def _near(one: str, other: str) -> bool:
    one, other = _different(one, other)
    few = len(one) == len(other) <= 4
    return _ratio(one, other) >= (_NEAR_OF_FEW if few else _NEAR)


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, *_different(one, other)).ratio()


def _different(one: str, other: str) -> tuple[str, str]:
    """The last parts of names that have all others in common."""
    (parent, _, leaf), (other_parent, _, other_leaf) = one.rpartition("."), other.rpartition(".")
    return (leaf, other_leaf) if parent == other_parent else (one, other)
