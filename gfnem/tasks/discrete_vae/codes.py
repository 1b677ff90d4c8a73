"""Latents of discrete VAEs: grids of codebook entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def distinct(
    index: Int[Tensor, "rows positions"], codes: int
) -> tuple[Int[Tensor, "distinct positions"], Int[Tensor, "rows"]]:
    """The different ones of grids of so many codes, and which of them each row is."""
    positions = index.shape[1]
    if codes**positions >= 2**63:
        return torch.unique(index, dim=0, return_inverse=True)
    place = codes ** torch.arange(positions, device=index.device)
    key, row = (index * place).sum(-1).unique(return_inverse=True)
    return key[:, None] // place % codes, row


@dataclass(frozen=True)
class Codes:
    """`samples` grids for each image, their codes in raster order.

    index: entries of the codebook, from 0.
    decoded: what the decoder is given in place of `index`, which then is the prior's alone; None
        for the same grids. Only M-steps that decode greedily set it.
    """

    index: Int[Tensor, "batch samples positions"]
    decoded: Int[Tensor, "batch samples positions"] | None = None

    def select(self, chosen: Int[Tensor, "batch chosen"]) -> Codes:
        """Some of each image's grids."""
        return self._each(
            lambda t: t.gather(1, chosen[..., None].expand(-1, -1, t.shape[-1])), self
        )

    def where(self, accept: Bool[Tensor, "batch samples"], other: Codes) -> Codes:
        """These grids where accepted, the others elsewhere."""
        return Codes(torch.where(accept[..., None], self.index, other.index))

    def to(self, device: str | torch.device) -> Codes:
        return self._each(lambda t: t.to(device), self)

    @staticmethod
    def _each(change, codes: Codes) -> Codes:
        decoded = codes.decoded
        return Codes(change(codes.index), None if decoded is None else change(decoded))
