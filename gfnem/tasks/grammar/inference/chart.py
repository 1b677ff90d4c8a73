"""The chart: scores of all spans of a batch of sentences under rules of any family.

The inside score of words i, ..., j - 1 under nonterminal A with context P above it is

    beta(i, j)[P, A] = exp(scales[i, j]) messages[i, j][P, A],

each span's messages being scaled to maximum 1. All spans of one width are computed at once, from
the narrowest to the widest; what rules make of the messages of two children, their families know
(`SpanMessages`). The backward pass is the outside algorithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gfnem.tasks.grammar.rules.grammar import Potentials
from gfnem.tasks.grammar.rules.messages import Children, Choose, SpanMessages
from gfnem.tasks.grammar.rules.span_table import SpanTable
from gfnem.tasks.grammar.trees.tree import Trees


@dataclass(frozen=True)
class Chart:
    """Scores of all spans of at least two words.

    potentials: what they are of.
    scales: of each span; 0 for single words.
    weights: by width, the scale of each split of a span relative to the span's largest.
    peaks: by width, the maximum that each span's messages were divided by.
    """

    potentials: Potentials
    messages: SpanMessages
    scales: SpanTable
    weights: dict[int, Float[Tensor, "starts batch splits"]]
    peaks: dict[int, Float[Tensor, "starts batch"]]

    @staticmethod
    def of(
        potentials: Potentials,
        span_scores: Float[Tensor, "batch length+1 length+1"] | None = None,
        best: bool = False,
    ) -> Chart:
        """Fill in the messages of all spans, in double precision where single does not do.

        span_scores: added to the log-score of every tree that holds the span.
        best: of each span's best tree alone.
        """
        chart, least = Chart._filled(potentials, span_scores, best)
        double = potentials.in_double(least, chart.root_weights().sum(-1))
        return chart if double is None else Chart._filled(double, span_scores, best)[0]

    @staticmethod
    @torch.no_grad()
    def _filled(
        potentials: Potentials,
        span_scores: Float[Tensor, "batch length+1 length+1"] | None,
        best: bool,
    ) -> tuple[Chart, Float[Tensor, ""]]:
        """The chart, and what `Potentials.in_double` asks."""
        batch, length = potentials.log_scale.shape
        scales = SpanTable.zeros(potentials.log_scale, length, batch)
        messages = potentials.best_spans() if best else potentials.spans()
        chart, least = Chart(potentials, messages, scales, {}, {}), []
        for width in range(2, length + 1):
            chart.weights[width], largest = scales.split_weights(width)
            raw = messages.combine(width, chart.weights[width])
            by_context = raw.amax(-1)
            peak = by_context.amax(-1)
            least.append(by_context.amin(-1) if by_context.shape[-1] > 1 else peak)
            scale = largest + peak.log()
            if span_scores is not None:
                scale = scale + span_scores.diagonal(width, 1, 2).t()
            chart.peaks[width] = torch.where(peak > 0, peak, 1.0)
            messages.put(width, raw / chart.peaks[width][..., None, None])
            scales.put(width, scale)
        ends = [end for width in range(2, length + 1) for end in range(width, length + 1)]
        inside = torch.tensor(ends, device=potentials.lengths.device)[:, None] <= potentials.lengths
        return chart, torch.where(inside, torch.cat(least), 1.0).amin()

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        return self.potentials.lengths

    def root_weights(self) -> Float[Tensor, "batch nonterminals"]:
        """p(S -> A) beta(0, n)[S, A], divided by exp(root_scale)."""
        return self.potentials.root.detach() * self.messages.whole(self.lengths)

    def root_scale(self) -> Float[Tensor, "batch"]:
        return self.scales.whole(self.lengths)

    def trees(self, top: Int[Tensor, "batch samples"], choose: Choose) -> Trees:
        """Labelled trees from the labels of their roots.

        choose: the weights of options, along the last dimension -> the index of one.
        """
        contexts = self.messages.contexts

        def split(width: int, start: Tensor, row: Tensor, label: Tensor, above: Tensor) -> Children:
            if width == 2:
                return Children(torch.ones_like(start), label, label)
            weights, context = self.weights[width][start, row], contexts.under(above)
            return self.messages.split(width, weights, start, row, label, context, choose)

        return top_down(top, self.lengths, contexts.labels, split)


# The width of some spans, and of each its start, its sentence, its label and the one above it.
Splitter = Callable[[int, Tensor, Tensor, Tensor, Tensor], Children]


def top_down(
    top: Int[Tensor, "batch samples"], lengths: Int[Tensor, "batch"], labels: int, split: Splitter
) -> Trees:
    """Labelled trees from the labels of their roots; all spans of one width are split at once.

    labels: how many there are; S, above the roots, counts as one more.
    """
    batch, samples = top.shape
    length = int(lengths.max())
    sentence = torch.arange(batch, device=top.device).repeat_interleave(samples)
    # The spans of a tree that are still to be split do not overlap: each is known by its start.
    widths = lengths.new_zeros(batch * samples, length)
    label, above = torch.zeros_like(widths), torch.full_like(widths, labels)
    widths[:, 0], label[:, 0] = lengths[sentence], top.flatten()
    node_start = lengths.new_zeros(batch * samples, length - 1)
    node_end = torch.zeros_like(node_start)
    node_label = torch.full_like(node_start, -1)
    for width in range(length, 1, -1):
        tree, start = (widths == width).nonzero(as_tuple=True)
        own = label[tree, start]
        children = split(width, start, sentence[tree], own, above[tree, start])
        middle = start + children.left_width
        node_start[tree, middle - 1], node_end[tree, middle - 1] = start, start + width
        node_label[tree, middle - 1] = own
        widths[tree, start], label[tree, start] = children.left_width, children.left_label
        widths[tree, middle] = width - children.left_width
        label[tree, middle] = children.right_label
        above[tree, start] = above[tree, middle] = own
    shape = (batch, samples, length - 1)
    return Trees(node_start.view(shape), node_end.view(shape), lengths, node_label.view(shape))


class _LogPartition(torch.autograd.Function):
    """log p(x) without the words' scales; its gradient is the outside algorithm."""

    @staticmethod
    def forward(ctx, chart: Chart, span_scores: Tensor | None, *tables: Tensor):  # pyright: ignore
        ctx.chart = chart
        total = chart.root_weights().sum(-1)
        log_total = total.log() + chart.root_scale()
        ctx.save_for_backward(total, log_total)
        return log_total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore
        chart: Chart = ctx.chart
        total, log_total = ctx.saved_tensors
        seed = torch.where(log_total.isfinite(), grad / total, 0.0)
        gradients = chart.messages.gradients()
        gradients.seed(chart.lengths, seed[:, None] * chart.potentials.root)
        length = chart.scales.length
        grad_spans = total.new_zeros(len(total), length + 1, length + 1)
        # The gradient of a label that is next to impossible in its span has no bound.
        limit = torch.finfo(total.dtype).max * torch.finfo(total.dtype).eps
        for width in range(length, 1, -1):
            received = gradients.received(width)
            of_span = (received * chart.messages.of_width(width)).sum((-1, -2))
            grad_spans.diagonal(width, 1, 2).copy_(of_span.t())
            out = (received / chart.peaks[width][..., None, None]).clamp(-limit, limit)
            gradients.spread(width, chart.weights[width], out)
        grad_root = seed @ chart.messages.whole(chart.lengths)
        if not ctx.needs_input_grad[1]:
            grad_spans = None
        return None, grad_spans, grad_root, *gradients.tables()


def log_total(
    chart: Chart, span_scores: Float[Tensor, "batch length+1 length+1"] | None = None
) -> Float[Tensor, "batch"]:
    """log p(x), differentiable in the tables of the chart's potentials and in the spans' scores.

    span_scores: those that the chart was made with, or zeros.
    """
    potentials = chart.potentials
    if span_scores is not None:
        span_scores = span_scores.to(potentials.root.dtype)
    total = _LogPartition.apply(chart, span_scores, *potentials.tables())
    return total + potentials.total_log_scale
