"""The choices that make labelled trees top-down: the root's label, then one for each node."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from gfnem.tasks.grammar.trees.tree import Trees


@dataclass(frozen=True)
class Choices:
    """Numbers of choices; those behind the root's label are of a split and the children's labels.

    labels: how many there are.
    """

    labels: int

    def coded(
        self, split: Int[Tensor, "*any"], left: Int[Tensor, "*any"], right: Int[Tensor, "*any"]
    ) -> Int[Tensor, "*any"]:
        """The number of a left child of `split` words and the children's labels, 0 for a word."""
        return ((split - 1) * self.labels + left) * self.labels + right

    def decoded(
        self, choice: Int[Tensor, "*any"]
    ) -> tuple[Int[Tensor, "*any"], Int[Tensor, "*any"], Int[Tensor, "*any"]]:
        """Width of the left child and the children's labels."""
        square = self.labels**2
        return choice // square + 1, choice % square // self.labels, choice % self.labels

    def of(self, trees: Trees) -> tuple[Int[Tensor, "rows steps"], Int[Tensor, "rows nodes"]]:
        """The root's label and the choice at each node, and the nodes in the order of choices.

        Behind a shorter sentence's nodes there is nothing to choose: choice 0.
        """
        gap = torch.arange(trees.start.shape[-1], device=trees.start.device)
        below = (labels.clamp(min=0) for labels in trees.child_labels())
        choice = torch.where(trees.exists, self.coded(gap + 1 - trees.start, *below), 0)
        width = torch.where(trees.exists, trees.end - trees.start, 0)
        # Of equal widths those on the left come first, as gaps do.
        order = (-width).argsort(dim=-1, stable=True).flatten(0, 1)
        top = trees.top_labels().flatten()[:, None]
        return torch.cat([top, choice.flatten(0, 1).gather(1, order)], 1), order
