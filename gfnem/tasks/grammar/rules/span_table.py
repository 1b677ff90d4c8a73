"""Tables with a value for every span of the sentences of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SpanTable:
    """A value for every span, stored twice so that slices, not gathers, give a span's children.

    by_start: the span of `width` words from `start` on, at [start, sentence, width].
    by_end: the span of `width` words before `end`, at [end, sentence, length - width].
    """

    by_start: Float[Tensor, "length+1 batch length+1 ..."]
    by_end: Float[Tensor, "length+1 batch length+1 ..."]

    @staticmethod
    def zeros(like: Tensor, length: int, batch: int, *shape: int) -> SpanTable:
        size = (length + 1, batch, length + 1, *shape)
        return SpanTable(like.new_zeros(size), like.new_zeros(size))

    def to(self, dtype: torch.dtype) -> SpanTable:
        return SpanTable(self.by_start.to(dtype), self.by_end.to(dtype))

    @property
    def length(self) -> int:
        return self.by_start.shape[0] - 1

    def put(self, width: int, values: Float[Tensor, "starts batch ..."]) -> None:
        """Set the spans of `width` words, ordered by their start."""
        self.by_start[: self.length - width + 1, :, width] = values
        self.by_end[width:, :, self.length - width] = values

    def of_width(self, width: int) -> Float[Tensor, "starts batch ..."]:
        """The spans of `width` words, ordered by their start; a view."""
        return self.by_start[: self.length - width + 1, :, width]

    def left(self, width: int) -> Float[Tensor, "starts batch splits ..."]:
        """Left children of the spans of `width` words, of 1, ..., width - 1 words; a view."""
        return self.by_start[: self.length - width + 1, :, 1:width]

    def right(self, width: int) -> Float[Tensor, "starts batch splits ..."]:
        """Right children at the same splits, of width - 1, ..., 1 words; a view."""
        return self.by_end[width:, :, self.length - width + 1 : self.length]

    def split_weights(
        self, width: int
    ) -> tuple[Float[Tensor, "starts batch splits"], Float[Tensor, "starts batch"]]:
        """Of logarithmic scales: the scale of each split of the spans of `width` words relative to
        the span's largest, and the logarithm of that one.
        """
        scales = self.left(width) + self.right(width)
        # Kept finite where no split is possible, so that exp(-inf - largest) is 0.
        largest = scales.amax(-1).clamp(min=torch.finfo(scales.dtype).min)
        return (scales - largest[..., None]).exp(), largest

    def whole(self, lengths: Int[Tensor, "batch"]) -> Float[Tensor, "batch ..."]:
        """The span of each whole sentence."""
        return self.by_start[0, torch.arange(len(lengths), device=lengths.device), lengths]
