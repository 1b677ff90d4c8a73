"""Batches of binary trees as tensors.

An n-word sentence has n - 1 gaps between its words, and a binary tree over it has n - 1 internal
nodes. Node b is the one whose two children meet in gap b, between word b and word b + 1, so nodes
need no numbering of their own and two trees are equal when their spans are equal gap by gap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Trees:
    """`samples` trees for each of `batch` sentences; `nodes` is the longest length minus one.

    start, end: the words of node b are start[b], ..., end[b] - 1. Its left child covers
        start[b], ..., b and its right child b + 1, ..., end[b] - 1. Both are 0 where a sentence
        has no gap b.
    lengths: words of each sentence.
    labels: the nonterminal of each node, -1 where there is no node; None for shapes.
    """

    start: Int[Tensor, "batch samples nodes"]
    end: Int[Tensor, "batch samples nodes"]
    lengths: Int[Tensor, "batch"]
    labels: Int[Tensor, "batch samples nodes"] | None = None

    @staticmethod
    def from_merge_times(
        times: Float[Tensor, "batch samples nodes"] | Int[Tensor, "batch samples nodes"],
        lengths: Int[Tensor, "batch"],
    ) -> Trees:
        """The trees that result when gaps are merged in the order of `times`.

        A node reaches left and right to the nearest gaps that are merged later (a Cartesian tree).
        Of equal times the one on the left is first.
        """
        nodes = times.shape[-1]
        gap = torch.arange(nodes, device=times.device)
        exists = gap < (lengths - 1)[:, None, None]
        on_left, on_right = gap < gap[:, None], gap > gap[:, None]
        # later[..., b, j]: gap j is merged after gap b, or lies behind the sentence.
        this, that = times[..., :, None], times[..., None, :]
        later = (that > this) | ((that == this) & on_right) | ~exists[..., None, :]
        start = torch.where(later & on_left, gap + 1, 0).amax(-1)
        end = torch.where(later & on_right, gap + 1, nodes + 1).amin(-1)
        end = torch.minimum(end, lengths[:, None, None])
        return Trees(start * exists, end * exists, lengths)

    @staticmethod
    def from_numbers(
        numbers: Int[Tensor, "batch samples numbers"],
        lengths: Int[Tensor, "batch"],
        labelled: bool,
    ) -> Trees:
        """The trees of which `numbers` are told."""
        per_node = numbers.unflatten(-1, (-1, 2 if labelled else 1))
        trees = Trees.from_merge_times(per_node[..., 0], lengths)
        if not labelled:
            return trees
        return replace(trees, labels=torch.where(trees.exists, per_node[..., 1], -1))

    @staticmethod
    def left_branching(lengths: Int[Tensor, "batch"]) -> Trees:
        """One tree for each sentence, every right child a word."""
        times = torch.arange(int(lengths.max()) - 1, device=lengths.device)
        return Trees.from_merge_times(times.expand(len(lengths), 1, -1), lengths)

    @staticmethod
    def right_branching(lengths: Int[Tensor, "batch"]) -> Trees:
        """One tree for each sentence, every left child a word."""
        times = -torch.arange(int(lengths.max()) - 1, device=lengths.device)
        return Trees.from_merge_times(times.expand(len(lengths), 1, -1), lengths)

    @staticmethod
    def random(
        lengths: Int[Tensor, "batch"], samples: int = 1, generator: torch.Generator | None = None
    ) -> Trees:
        """Trees whose every node is split at a uniformly random gap."""
        shape = (len(lengths), samples, int(lengths.max()) - 1)
        times = torch.rand(shape, generator=generator, device=lengths.device)
        return Trees.from_merge_times(times, lengths)

    @property
    def exists(self) -> Bool[Tensor, "batch samples nodes"]:
        """Whether the sentence has this gap."""
        return self.end > 0

    @property
    def sizes(self) -> Int[Tensor, "batch samples nodes"]:
        """Internal nodes under and including each node; 0 where there is no node."""
        return (self.end - self.start - 1).clamp(min=0)

    @property
    def numbers(self) -> Int[Tensor, "batch samples numbers"]:
        """Node by node its size and, if it has one, its label: other trees have others.

        Where the sentence has no node they are 0.
        """
        if self.labels is None:
            return self.sizes
        return torch.stack([self.sizes, self.labels.clamp(min=0)], -1).flatten(-2)

    def bottom_up(self) -> Int[Tensor, "batch samples nodes"]:
        """The nodes ordered so that children come before parents; missing nodes come last."""
        width = torch.where(self.exists, self.end - self.start, self.end.shape[-1] + 2)
        return width.argsort(dim=-1, stable=True)

    def children(
        self,
    ) -> tuple[Int[Tensor, "batch samples nodes"], Int[Tensor, "batch samples nodes"]]:
        """The nodes that are the left and the right child of each node; -1 for a word."""
        nodes = self.start.shape[-1]
        gap = torch.arange(nodes, device=self.start.device)
        child = self.exists[..., None, :] & (
            (self.start[..., None, :] >= self.start[..., :, None])
            & (self.end[..., None, :] <= self.end[..., :, None])
        )
        size = self.sizes
        # The widest node strictly to the left (right) of gap b inside node b's span.
        rank = torch.where(child, size[..., None, :] * nodes + gap, -1)
        left = torch.where(gap < gap[:, None], rank, -1).amax(-1)
        right = torch.where(gap > gap[:, None], rank, -1).amax(-1)
        return (
            torch.where(left >= 0, left % nodes, -1),
            torch.where(right >= 0, right % nodes, -1),
        )

    def child_labels(
        self,
    ) -> tuple[Int[Tensor, "batch samples nodes"], Int[Tensor, "batch samples nodes"]]:
        """The labels of each node's left and right child, for labelled trees; -1 for a word."""
        labels = self.labels
        assert labels is not None
        left, right = (
            torch.where(child < 0, -1, labels.gather(-1, child.clamp(min=0)))
            for child in self.children()
        )
        return left, right

    def top_labels(self) -> Int[Tensor, "batch samples"]:
        """The label of each labelled tree's topmost node."""
        assert self.labels is not None
        return self.labels.gather(-1, self.sizes.argmax(-1, keepdim=True)).squeeze(-1)

    def rotate(self, node: Int[Tensor, "batch samples"]) -> Trees:
        """The shapes that result when a node of each tree takes its parent's place.

        ((A B) C) becomes (A (B C)) and the other way round; the order of the words stays. A root
        has no parent, and its tree stays as it is.
        """
        node = node[..., None]
        sizes, lengths = self.sizes, self.lengths[:, None, None]
        # Of the two gaps beside a node's words one is its parent's, and the other one's node, if
        # there is any, holds both.
        before = self.start.gather(-1, node) - 1
        behind = self.end.gather(-1, node) - 1
        last = sizes.shape[-1] - 1
        none = sizes.shape[-1] + 1
        size_before = sizes.gather(-1, before.clamp(min=0)).where(before >= 0, none)
        size_behind = sizes.gather(-1, behind.clamp(0, last)).where(behind < lengths - 1, none)
        is_right = size_before < size_behind
        parent = before.where(is_right, behind).clamp(0, last)
        start, end = self.start.gather(-1, parent), self.end.gather(-1, parent)
        middle = node + 1
        rotated = Trees(
            self.start.scatter(-1, node, start).scatter(-1, parent, start.where(is_right, middle)),
            self.end.scatter(-1, node, end).scatter(-1, parent, middle.where(is_right, end)),
            self.lengths,
        )
        has_parent = torch.minimum(size_before, size_behind) < none
        return rotated.where(has_parent.squeeze(-1), self)

    def shapes(self) -> Trees:
        """The same trees without labels."""
        return replace(self, labels=None)

    def select(self, samples: Int[Tensor, "batch chosen"]) -> Trees:
        """The trees at these sample indices, sentence by sentence."""
        index = samples[..., None].expand(-1, -1, self.start.shape[-1])
        labels = None if self.labels is None else self.labels.gather(1, index)
        return Trees(self.start.gather(1, index), self.end.gather(1, index), self.lengths, labels)

    def where(self, condition: Bool[Tensor, "batch samples"], other: Trees) -> Trees:
        """These trees where `condition` holds and `other`'s elsewhere."""
        keep = condition[..., None]
        labels = None
        if self.labels is not None and other.labels is not None:
            labels = torch.where(keep, self.labels, other.labels)
        return Trees(
            torch.where(keep, self.start, other.start),
            torch.where(keep, self.end, other.end),
            self.lengths,
            labels,
        )

    def same_shapes(self) -> Bool[Tensor, "batch samples samples"]:
        """Which of a sentence's samples are the same unlabelled tree."""
        # Gap by gap, the span of a node is start and end; equal trees agree in all of them.
        return ((self.start[:, :, None] == self.start[:, None]).all(-1)) & (
            (self.end[:, :, None] == self.end[:, None]).all(-1)
        )

    def distinct_shapes(self) -> Int[Tensor, "batch"]:
        """How many different unlabelled trees each sentence has among its samples."""
        first = self.same_shapes().int().argmax(-1)
        return (first == torch.arange(first.shape[1], device=first.device)).sum(-1)

    def spans(self, sentence: int, sample: int = 0) -> frozenset[tuple[int, int]]:
        """All spans (start, end) of at least two words of one tree, the whole sentence's too."""
        nodes = int(self.lengths[sentence]) - 1
        start = self.start[sentence, sample, :nodes].tolist()
        end = self.end[sentence, sample, :nodes].tolist()
        return frozenset(zip(start, end, strict=True))

    def to_nltk(
        self,
        sentence: int,
        words: Sequence[str],
        sample: int = 0,
        name: Callable[[int], str] = lambda label: f"N{label}",
    ):
        """One tree as an `nltk.Tree`; nodes without labels are called "X", the root "S".

        name: names of the nonterminals.
        """
        from nltk import Tree

        length = int(self.lengths[sentence])
        start = self.start[sentence, sample].tolist()
        end = self.end[sentence, sample].tolist()
        labels = None if self.labels is None else self.labels[sentence, sample].tolist()
        # What begins at each word so far, and what ends there: small nodes are put together first.
        begins: list[Tree | str] = list(words[:length])
        ends = list(begins)
        for gap in sorted(range(length - 1), key=lambda gap: end[gap] - start[gap]):
            label = "X" if labels is None else name(labels[gap])
            node = Tree(label, [ends[gap], begins[gap + 1]])
            begins[start[gap]] = ends[end[gap] - 1] = node
        root = begins[0]
        return Tree("S", [root]) if labels is not None else Tree("S", list(root))
