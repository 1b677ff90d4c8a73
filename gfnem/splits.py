"""Parts of data by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from gfnem.errors import UserError

Part = TypeVar("Part")


def named_split(parts: Mapping[str, Part], name: str) -> Part:
    """Give a part by its name; raises UserError for a name that there is not."""
    if name not in parts:
        raise UserError(f"split is {name!r}; use one of {', '.join(parts)}")
    return parts[name]
