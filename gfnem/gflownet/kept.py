"""What a posterior remembers of every training point."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional


class Kept:
    """Some rows of whole numbers, none of them negative, for each data point, by its id.

    Data points may have rows of different lengths; the table grows with the ids that it sees.

    rows: of each data point.
    table: -1 where a data point has no row yet, or a shorter one.
    """

    def __init__(self, rows: int):
        self.table: Int[Tensor, "ids rows numbers"] = torch.zeros(0, rows, 0).long()

    @property
    def rows(self) -> int:
        return self.table.shape[1]

    def recall(
        self, ids: Int[Tensor, "batch"], numbers: int
    ) -> Int[Tensor, "batch rows {numbers}"]:
        """The rows of some data points, as far as so many numbers."""
        more_ids = max(int(ids.max()) + 1 - self.table.shape[0], 0)
        more_numbers = max(numbers - self.table.shape[2], 0)
        room = (0, more_numbers, 0, 0, 0, more_ids)
        self.table = functional.pad(self.table.to(ids.device), room, value=-1)
        return self.table[ids, :, :numbers]

    def keep(self, ids: Int[Tensor, "batch"], rows: Int[Tensor, "batch rows numbers"]) -> None:
        """In place of what was there; for data points that were recalled with as many numbers."""
        self.table[ids, :, : rows.shape[2]] = rows
