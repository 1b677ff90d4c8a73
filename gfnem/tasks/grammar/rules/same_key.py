"""Entries that share a key, taken together in groups of bounded size for products of matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

SIZE = 8


@dataclass(frozen=True)
class SameKey:
    """Groups of at most `SIZE` entries with one key; a key that comes often has several groups.

    order: the entries, group by group.
    group, place: of each entry in that order, its group and where in the group it is.
    key: of each group.
    """

    order: Int[Tensor, "entries"]
    group: Int[Tensor, "entries"]
    place: Int[Tensor, "entries"]
    key: Int[Tensor, "groups"]

    @staticmethod
    def of(key: Int[Tensor, "entries"]) -> SameKey:
        order = key.argsort(stable=True)
        key = key[order]
        rank = torch.arange(len(key), device=key.device) - torch.searchsorted(key, key)
        begins = rank % SIZE == 0
        return SameKey(order, begins.cumsum(0) - 1, rank % SIZE, key[begins])

    def padded(
        self, values: Shaped[Tensor, "*before entries *after"], axis: int = 0
    ) -> Shaped[Tensor, "*before groups size *after"]:
        """Values of the entries by group and place; 0 where a group is not full."""
        before, after = values.shape[:axis], values.shape[axis + 1 :]
        table = values.new_zeros(*before, len(self.key), SIZE, *after)
        table[(slice(None),) * axis + (self.group, self.place)] = values.index_select(
            axis, self.order
        )
        return table
