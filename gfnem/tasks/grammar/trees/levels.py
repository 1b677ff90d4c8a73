"""The nodes of a batch of trees level by level."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gfnem.tasks.grammar.trees.tree import Trees

LEAVES, WORD_LEFT, WORD_RIGHT, INNER = range(4)


@dataclass(frozen=True)
class Levels:
    """The nodes of a batch of trees as one flat list, by height and then by kind.

    A node's kind says which children are words: both (LEAVES), one, or none (INNER).

    sentence, row, gap, start, end: of each node; row counts trees over the whole batch.
    left, right: positions in this list of the children; -1 for a word.
    root: position of each tree's root, [batch * samples].
    slices: for each height, bottom-up, (kind, first, behind the last) of its non-empty kinds.
    heights: for each height, bottom-up, (first, behind the last).
    known: how many nodes, the first of the list, are there just as children; they are in no slice.
    """

    sentence: Int[Tensor, "total"]
    row: Int[Tensor, "total"]
    gap: Int[Tensor, "total"]
    start: Int[Tensor, "total"]
    end: Int[Tensor, "total"]
    left: Int[Tensor, "total"]
    right: Int[Tensor, "total"]
    root: Int[Tensor, "rows"]
    slices: list[tuple[int, int, int]]
    heights: list[tuple[int, int]]
    known: int

    @staticmethod
    def of(trees: Trees, chosen: Bool[Tensor, "batch samples nodes"] | None = None) -> Levels:
        """Of all nodes, or of the chosen ones; roots are to be among them."""
        batch, samples, nodes = trees.start.shape
        left, right = (child.flatten(0, 1) for child in trees.children())
        exists = trees.exists.flatten(0, 1)
        start, end = trees.start.flatten(0, 1), trees.end.flatten(0, 1)
        height = torch.zeros_like(left)
        while True:
            below = torch.maximum(
                torch.where(left >= 0, height.gather(1, left.clamp(min=0)), -1),
                torch.where(right >= 0, height.gather(1, right.clamp(min=0)), -1),
            )
            if torch.equal(below + 1, height):
                break
            height = below + 1
        kind = (left >= 0) * 2 + (right >= 0) * 1
        key = height * 4 + kind
        if chosen is not None:
            chosen = chosen.flatten(0, 1)
            is_child = torch.zeros_like(chosen[:, :1]).expand(-1, nodes + 1).clone()
            for child in (left, right):
                # One place more takes what is written for words.
                is_child.scatter_(1, torch.where(chosen & (child >= 0), child, nodes), True)
            key = torch.where(chosen, key, -1)
            exists = chosen | is_child[:, :nodes]
        row, gap = exists.nonzero(as_tuple=True)
        key, order = key[row, gap].sort(stable=True)
        row, gap = row[order], gap[order]
        position = torch.full_like(left, -1)
        position[row, gap] = torch.arange(len(row), device=row.device)
        children = []
        for child in (left, right):
            child = child[row, gap]
            at = position[row, child.clamp(min=0)]
            children.append(torch.where(child >= 0, at, -1))
        top = trees.end.flatten(0, 1) - trees.start.flatten(0, 1)
        known = 0 if chosen is None else int((key < 0).sum())
        slices, first = [], known
        behind = (torch.bincount(key[known:] // 4).cumsum(0) + known).tolist()
        keys, counts = key[known:].unique_consecutive(return_counts=True)
        for value, count in zip(keys.tolist(), counts.tolist(), strict=True):
            slices.append((value % 4, first, first + count))
            first += count
        return Levels(
            sentence=row // samples,
            row=row,
            gap=gap,
            start=start[row, gap],
            end=end[row, gap],
            left=children[0],
            right=children[1],
            root=position.gather(1, top.argmax(-1, keepdim=True)).squeeze(1),
            slices=slices,
            heights=list(zip([known, *behind[:-1]], behind, strict=True)),
            known=known,
        )

    def of_kind(self, kind: int) -> Int[Tensor, "nodes"]:
        """Positions of all nodes of a kind."""
        parts = [
            torch.arange(first, behind, device=self.row.device)
            for this, first, behind in self.slices
            if this == kind
        ]
        return torch.cat(parts) if parts else self.row.new_zeros(0)

    def labelled(self, trees: Trees, label: Int[Tensor, "total"]) -> Trees:
        """These trees with a label for each of their nodes."""
        labels = torch.full(trees.start.flatten(0, 1).shape, -1, device=label.device)
        labels[self.row, self.gap] = label
        return replace(trees, labels=labels.view_as(trees.start))

    def places(self, trees: Trees) -> Int[Tensor, "total"]:
        """Of each node in one list of all gaps of these trees."""
        return self.row * trees.start.shape[-1] + self.gap

    def by_gap(
        self, values: Float[Tensor, "total *any"], trees: Trees
    ) -> Float[Tensor, "batch samples nodes *any"]:
        """Values of the nodes of these trees where their gaps are; 0 for no node."""
        flat = values.new_zeros(trees.start.numel(), *values.shape[1:])
        flat[self.places(trees)] = values
        return flat.view(*trees.start.shape, *values.shape[1:])
