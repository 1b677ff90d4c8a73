"""Spans of a batch of sentences: tables over them, and trees made top-down by splitting them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.errors import UserError
from gfnem.tasks.grammar.trees.tree import Trees


def possible(root_weights: Float[Tensor, "batch nonterminals"]) -> Tensor:
    """The weights themselves; raises UserError where a sentence has no tree at all."""
    impossible = (root_weights.amax(-1) <= 0).nonzero()
    if len(impossible):
        raise UserError(
            f"sentence {int(impossible[0])} of the batch has probability 0 under the grammar and "
            "so no tree; leave it out or let the grammar derive it"
        )
    return root_weights


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

    @property
    def length(self) -> int:
        return self.by_start.shape[0] - 1

    def put(self, width: int, values: Float[Tensor, "starts batch ..."]) -> None:
        """Set the spans of `width` words, ordered by their start."""
        self.by_start[: self.length - width + 1, :, width] = values
        self.by_end[width:, :, self.length - width] = values

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


def marginals(
    log_partition: Callable[[Tensor], Tensor], log_scale: Float[Tensor, "batch length"]
) -> Float[Tensor, "batch length+1 length+1"]:
    """The probability of each span (start, end): the gradient of log p(x) in a score of the span.

    log_partition: log p(x) of every sentence from its spans' scores, differentiable.
    log_scale: of each word; tells sizes and kind of the scores.
    """
    batch, length = log_scale.shape
    with torch.enable_grad():
        scores = log_scale.new_zeros(batch, length + 1, length + 1).requires_grad_()
        return torch.autograd.grad(log_partition(scores).sum(), scores)[0]


def without_contexts(trees: Trees, nonterminals: int, labelled: bool) -> Trees:
    """Trees of symbols, a label and a context times the number of labels each, with labels alone.

    Shapes unless `labelled`.
    """
    if not labelled:
        return trees.shapes()
    assert trees.labels is not None
    return replace(trees, labels=torch.where(trees.exists, trees.labels % nonterminals, -1))


class Children(NamedTuple):
    """How spans are split; the label of a child that is a word means nothing."""

    left_width: Int[Tensor, "spans"]
    left_label: Int[Tensor, "spans"]
    right_label: Int[Tensor, "spans"]


# The width of some spans, and of each its start, its sentence and its label -> its children.
Splitter = Callable[[int, Tensor, Tensor, Tensor], Children]


def top_down(
    root: Int[Tensor, "batch samples"], lengths: Int[Tensor, "batch"], split: Splitter
) -> Trees:
    """Labelled trees from the labels of their roots; all spans of one width are split at once."""
    batch, samples = root.shape
    length = int(lengths.max())
    sentence = torch.arange(batch, device=root.device).repeat_interleave(samples)
    # The spans of a tree that are still to be split do not overlap: each is known by its start.
    widths = lengths.new_zeros(batch * samples, length)
    labels = torch.zeros_like(widths)
    widths[:, 0], labels[:, 0] = lengths[sentence], root.flatten()
    node_start = lengths.new_zeros(batch * samples, length - 1)
    node_end = torch.zeros_like(node_start)
    node_label = torch.full_like(node_start, -1)
    for width in range(length, 1, -1):
        tree, start = (widths == width).nonzero(as_tuple=True)
        label = labels[tree, start]
        children = split(width, start, sentence[tree], label)
        middle = start + children.left_width
        node_start[tree, middle - 1] = start
        node_end[tree, middle - 1] = start + width
        node_label[tree, middle - 1] = label
        widths[tree, start], labels[tree, start] = children.left_width, children.left_label
        widths[tree, middle] = width - children.left_width
        labels[tree, middle] = children.right_label
    shape = (batch, samples, length - 1)
    return Trees(node_start.view(shape), node_end.view(shape), lengths, node_label.view(shape))
