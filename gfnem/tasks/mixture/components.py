"""Latents of hierarchical mixtures, (supercluster, petal), and where petals lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Standard deviation of every component, in every dimension, unless told otherwise.
DEVIATION = 0.25


@dataclass(frozen=True)
class Components:
    """`samples` components for each point.

    index: supercluster and petal, both from 0.
    """

    index: Int[Tensor, "batch samples 2"]

    @property
    def supercluster(self) -> Int[Tensor, "batch samples"]:
        return self.index[..., 0]

    @property
    def petal(self) -> Int[Tensor, "batch samples"]:
        return self.index[..., 1]

    def select(self, chosen: Int[Tensor, "batch chosen"]) -> Components:
        """Some of each point's components."""
        return Components(self.index.gather(1, chosen[..., None].expand(-1, -1, 2)))

    def where(self, accept: Bool[Tensor, "batch samples"], other: Components) -> Components:
        """These components where accepted, the others elsewhere."""
        return Components(torch.where(accept[..., None], self.index, other.index))

    def to(self, device: str | torch.device) -> Components:
        return Components(self.index.to(device))


def petal_offsets(petals: int, dimensions: int) -> Float[Tensor, "petals dimensions"]:
    """Centres of the petals around the mean of their supercluster: on a circle of radius 1 in the
    first two dimensions, at equal distances, the first at half of one from the first axis.
    """
    angle = (torch.arange(petals) + 0.5) * (2 * math.pi / petals)
    offsets = torch.zeros(petals, dimensions)
    offsets[:, 0], offsets[:, 1] = angle.cos(), angle.sin()
    return offsets
