"""Shapes of a treebank's trees."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from gfnem.errors import UserError
from gfnem.tasks.grammar.text.corpus import Corpus, GrammarData
from gfnem.tasks.grammar.text.walk import Span
from gfnem.tasks.grammar.trees.tree import Trees

Binarization = Literal["right", "left"]


@dataclass(frozen=True)
class Shapes:
    """A batch of gold trees' shapes.

    trees: one for each sentence.
    ids: where the sentences are in their corpus.
    """

    trees: Trees
    ids: Int[Tensor, "batch"]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        """Words of each sentence."""
        return self.trees.lengths

    def to(self, device: torch.device | str) -> Shapes:
        z = self.trees
        moved = Trees(z.start.to(device), z.end.to(device), z.lengths.to(device))
        return Shapes(moved, self.ids.to(device))


class ShapeData:
    """The shapes of gold trees, made binary.

    trees: sentences with gold trees.
    binarization: how nodes with more than two children are split: "right" makes (A (B C)) of
        (A B C), "left" makes ((A B) C).
    batch_size: of the training batches.
    seed: of their order.

    Raises UserError for sentences without trees.
    """

    def __init__(
        self,
        trees: GrammarData,
        binarization: Binarization = "right",
        batch_size: int = 256,
        seed: int = 0,
    ):
        if trees.train.gold is None:
            raise UserError(
                f"data.trees is {trees.name}, which has no gold trees to take shapes from: use "
                "data=treebank_shapes or data=bracketed_shapes"
            )
        if binarization not in ("right", "left"):
            raise UserError(f"data.binarization is {binarization!r}; use 'right' or 'left'")
        if batch_size < 1:
            raise UserError(f"data.batch_size is {batch_size}; it must be at least 1")
        self.trees = trees
        self.binarization: Binarization = binarization
        self.batch_size = batch_size
        self.seed = seed
        self._shapes = {split: self._shapes_of(trees.split(split)) for split in trees.corpora}

    def _shapes_of(self, corpus: Corpus) -> Trees:
        assert corpus.gold is not None
        return binary_shapes(corpus.gold, corpus.lengths, self.binarization)

    def train_batches(self, epoch: int) -> list[Shapes]:
        """All training shapes once; which share a batch depends on `seed` and epoch."""
        order = list(range(len(self.trees.train)))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return self._batches("train", order)

    def batches(self, split: str) -> list[Shapes]:
        """All shapes of a split in a fixed order, from short to long."""
        return self._batches(split, self._shapes[split].lengths.argsort(stable=True).tolist())

    def _batches(self, split: str, order: Sequence[int]) -> list[Shapes]:
        shapes = self._shapes[split]
        batches = []
        for ids in torch.tensor(order).split(self.batch_size):
            lengths = shapes.lengths[ids]
            nodes = int(lengths.max()) - 1
            start, end = shapes.start[ids, :, :nodes], shapes.end[ids, :, :nodes]
            batches.append(Shapes(Trees(start, end, lengths), ids))
        return batches

    def sizes(self) -> dict[str, int]:
        """Models of shapes need to know nothing of them."""
        return {}

    def describe(self) -> str:
        """What was read and what was left out, in one line."""
        return f"shapes of {self.trees.describe()}"


def binary_shapes(
    gold: Sequence[Iterable[Span]], lengths: Int[Tensor, "batch"], binarization: Binarization
) -> Trees:
    """Gold trees as binary ones; gold: spans of two or more words, the whole sentence included."""
    nodes = int(lengths.max()) - 1
    times = torch.zeros(len(gold), 1, nodes, dtype=torch.long)
    for row, (spans, length) in enumerate(zip(gold, lengths.tolist(), strict=True)):
        # The node of a gap is the smallest with words on both sides; within it, gaps are merged
        # from one side.
        smallest = [length] * (length - 1)
        for start, end in sorted(spans, key=lambda span: span[0] - span[1]):
            smallest[start : end - 1] = [end - start] * (end - 1 - start)
        for gap, size in enumerate(smallest):
            within = gap if binarization == "left" else -gap
            times[row, 0, gap] = size * 2 * (nodes + 1) + within
    return Trees.from_merge_times(times, lengths)
