"""Exact inference in grammars whose rules see the parent and are of low rank.

As in `factored_messages`, a span or a word is to a parent with label A one vector over r on the
left, another one on the right. The inside score of words i, ..., j - 1 under A with P above it is

    beta(i, j, A | P) = sum_r p(r | A, P) sum_k left(i, k, A, r) right(k, j, A, r).

Time goes with the square of the nonterminals, not with their fourth power. The sum over k has
no matrix product to it and is bound by memory: it runs split by split over the spans of one width.
As in `inside`, every span is scaled to maximum 1, and the backward pass is the outside algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gfnem.categorical import sample_categorical
from gfnem.tasks.grammar.inference.spans import (
    Children,
    SpanTable,
    marginals,
    possible,
    top_down,
    without_contexts,
)
from gfnem.tasks.grammar.rules.factored import FactoredPotentials
from gfnem.tasks.grammar.trees.tree import Trees


def inside_chart(potentials: FactoredPotentials) -> Chart:
    """What everything else here is computed from, for those who ask more than one thing.

    Without gradients.
    """
    with torch.no_grad():
        return Chart.of(*_tables(potentials))


def log_partition(
    potentials: FactoredPotentials, chart: Chart | None = None
) -> Float[Tensor, "batch"]:
    """log p(x) in nats, once differentiable in the potentials.

    A sentence of probability zero has log-probability -inf and gradient 0.

    chart: of the potentials, where it is at hand.
    """
    return _LogPartition.apply(*_tables(potentials), None, chart) + potentials.total_log_scale


def span_marginals(
    potentials: FactoredPotentials, chart: Chart | None = None
) -> Float[Tensor, "batch length+1 length+1"]:
    """p(span (start, end) in z | x); 0 for single words and for sentences of probability zero.

    chart: of the potentials, where it is at hand.
    """
    tables = [table.detach() for table in _tables(potentials)]
    return marginals(
        lambda scores: _LogPartition.apply(*tables, scores, chart), potentials.log_scale
    )


@torch.no_grad()
def sample(
    potentials: FactoredPotentials,
    samples: int,
    generator: torch.Generator | None = None,
    labelled: bool = True,
    chart: Chart | None = None,
) -> Trees:
    """Independent trees from p(z | x), `samples` of each sentence; shapes unless `labelled`.

    chart: of the potentials, where it is at hand.

    Raises UserError if a sentence has probability zero.
    """
    draw = partial(sample_categorical, generator=generator)
    chart = chart or inside_chart(potentials)
    nonterminals, _, rank = chart.mixture.shape
    top = draw(possible(chart.root_weights())[:, None].expand(-1, samples, -1))

    # A span's symbol is its label together with its context.
    def split(width: int, start: Tensor, sentence: Tensor, symbol: Tensor) -> Children:
        label, context = symbol % nonterminals, symbol // nonterminals
        products = torch.stack(
            [
                chart.left[this][label, start, sentence]
                * chart.right[width - this][label, start + this, sentence]
                for this in range(1, width)
            ],
            1,
        )
        weights = chart.weights[width][start, sentence, :, None] * products
        weights = weights * chart.mixture[label, context][:, None]
        option = draw(weights.flatten(1))
        left_width, component = option // rank + 1, option % rank

        def child(begin: Tensor, size: Tensor, table: Tensor) -> Tensor:
            """The label of a child under `label`; 0 for a word."""
            drawn = torch.zeros_like(size)
            for this in size.unique().tolist():
                if this > 1:
                    at = (size == this).nonzero().squeeze(1)
                    vectors = chart.vectors[this][label[at], begin[at], sentence[at]]
                    drawn[at] = draw(table[component[at]] * vectors)
            return label * nonterminals + drawn

        return Children(
            left_width,
            child(start, left_width, potentials.left),
            child(start + left_width, width - left_width, potentials.right),
        )

    whole = nonterminals * nonterminals + top
    return without_contexts(top_down(whole, potentials.lengths, split), nonterminals, labelled)


def inside_scores(potentials: FactoredPotentials) -> tuple[SpanTable, SpanTable]:
    """beta of all spans of at least two words, [context, label], and the logarithms of its scales.

    Both are 0 for single words. Without gradients.
    """
    chart = inside_chart(potentials)
    batch, length = potentials.log_scale.shape
    shape = chart.mixture.shape[1], chart.mixture.shape[0]
    vectors = SpanTable.zeros(chart.root, length, batch, *shape)
    for width, values in chart.vectors.items():
        vectors.put(width, values.permute(1, 2, 0, 3))
    return vectors, chart.scales


def _tables(potentials: FactoredPotentials) -> tuple[Tensor, ...]:
    p = potentials
    return p.root, p.mixture, p.left, p.right, p.word_left, p.word_right, p.lengths


@dataclass(frozen=True)
class Chart:
    """The scores of all spans, by width; beta = vectors * exp(scales).

    left, right: what spans are to their parents as left and as right children, a word a span of
        width 1.
    products: of the children's vectors, summed over splits, before division by peaks.
    vectors: beta of spans of at least two words, [context, ..., label].
    weights: the scale of each split of a span relative to the span's largest.
    peaks: the maximum that each span's vectors were divided by.
    """

    root: Float[Tensor, "nonterminals"]
    mixture: Float[Tensor, "nonterminals contexts rank"]
    lengths: Int[Tensor, "batch"]
    left: dict[int, Float[Tensor, "nonterminals starts batch rank"]]
    right: dict[int, Float[Tensor, "nonterminals starts batch rank"]]
    products: dict[int, Float[Tensor, "nonterminals starts batch rank"]]
    vectors: dict[int, Float[Tensor, "contexts starts batch nonterminals"]]
    scales: SpanTable
    weights: dict[int, Float[Tensor, "starts batch splits"]]
    peaks: dict[int, Float[Tensor, "starts batch"]]

    @staticmethod
    def of(
        root: Float[Tensor, "nonterminals"],
        mixture: Float[Tensor, "nonterminals contexts rank"],
        left: Float[Tensor, "rank nonterminals"],
        right: Float[Tensor, "rank nonterminals"],
        word_left: Float[Tensor, "batch length nonterminals rank"],
        word_right: Float[Tensor, "batch length nonterminals rank"],
        lengths: Int[Tensor, "batch"],
        span_scores: Float[Tensor, "batch length+1 length+1"] | None = None,
    ) -> Chart:
        batch, length, nonterminals, _ = word_left.shape
        chart = Chart(
            root=root,
            mixture=mixture,
            lengths=lengths,
            left={1: word_left.permute(2, 1, 0, 3).contiguous()},
            right={1: word_right.permute(2, 1, 0, 3).contiguous()},
            products={},
            vectors={},
            scales=SpanTable.zeros(root, length, batch),
            weights={},
            peaks={},
        )
        for width in range(2, length + 1):
            chart.weights[width], largest = chart.scales.split_weights(width)
            products = chart.products[width] = chart.combine(width)
            raw = torch.bmm(products.flatten(1, 2), mixture.mT)
            raw = raw.unflatten(1, products.shape[1:3]).permute(3, 1, 2, 0)
            peak = raw.amax((0, 3))
            scale = largest + peak.log()
            if span_scores is not None:
                scale = scale + span_scores.diagonal(width, 1, 2).t()
            chart.scales.put(width, scale)
            chart.peaks[width] = torch.where(peak > 0, peak, 1.0)
            vectors = chart.vectors[width] = raw.new_empty(raw.shape)
            torch.div(raw, chart.peaks[width][..., None], out=vectors)
            if width < length:
                chart.left[width] = vectors[:nonterminals] @ left.t()
                chart.right[width] = vectors[:nonterminals] @ right.t()
        return chart

    def combine(self, width: int) -> Float[Tensor, "nonterminals starts batch rank"]:
        """Products of the vectors of both children, weighted and summed over splits."""
        weights = self.weights[width]
        starts = len(weights)
        products = torch.zeros_like(self.left[1][:, :starts])
        weighted = torch.empty_like(products)
        for split in range(1, width):
            left, right = self.children(width, split)
            torch.mul(left, weights[:, :, split - 1, None], out=weighted)
            products.addcmul_(weighted, right)
        return products

    def children(self, width: int, split: int) -> tuple[Tensor, Tensor]:
        """Of the spans of `width` words, with a left child of `split` words; views."""
        starts = len(self.weights[width])
        return self.left[split][:, :starts], self.right[width - split][:, split : split + starts]

    def root_weights(self) -> Float[Tensor, "batch nonterminals"]:
        """p(S -> A) beta(0, n, A | S), divided by exp(root_scale)."""
        return self.root * self.whole()

    def whole(self) -> Float[Tensor, "batch nonterminals"]:
        """The scaled beta(0, n, A | S)."""
        whole = self.root.new_zeros(len(self.lengths), len(self.root))
        for length, sentence in _by_length(self.lengths):
            whole[sentence] = self.vectors[length][-1, 0, sentence]
        return whole

    def root_scale(self) -> Float[Tensor, "batch"]:
        return self.scales.whole(self.lengths)


def _by_length(lengths: Int[Tensor, "batch"]) -> list[tuple[int, Int[Tensor, "sentences"]]]:
    """Each length that occurs and the sentences that have it."""
    return [
        (length, (lengths == length).nonzero().squeeze(1)) for length in lengths.unique().tolist()
    ]


class _LogPartition(torch.autograd.Function):
    """log p(x) without the words' scales; its gradient is the outside algorithm."""

    @staticmethod
    def forward(
        ctx, root, mixture, left, right, word_left, word_right, lengths, span_scores, chart
    ):
        chart = chart or Chart.of(
            root, mixture, left, right, word_left, word_right, lengths, span_scores
        )
        total = chart.root_weights().sum(-1)
        log_total = total.log() + chart.root_scale()
        ctx.chart = chart
        ctx.save_for_backward(left, right, total, log_total)
        return log_total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        chart: Chart = ctx.chart
        left, right, total, log_total = ctx.saved_tensors
        nonterminals, batch, length = len(chart.root), len(total), chart.scales.length
        seed = torch.where(log_total.isfinite(), grad / total, 0.0)
        whole = dict(_by_length(chart.lengths))
        grad_spans = total.new_zeros(batch, length + 1, length + 1)
        grad_mixture = torch.zeros_like(chart.mixture)
        grad_left, grad_right = torch.zeros_like(left), torch.zeros_like(right)
        # The gradients in what spans are to their parents, by width; none of whole sentences.
        of_left, of_right = (
            {width: torch.zeros_like(vectors) for width, vectors in side.items()}
            for side in (chart.left, chart.right)
        )
        # The gradient of a label that is next to impossible in its span has no bound.
        limit = torch.finfo(total.dtype).max * torch.finfo(total.dtype).eps
        for width in range(length, 1, -1):
            # Complete once all wider spans have passed theirs on.
            vectors = chart.vectors[width]
            outside = torch.zeros_like(vectors)
            if width < length:
                under = vectors[:nonterminals].flatten(0, 2)
                on_left, on_right = of_left.pop(width), of_right.pop(width)
                outside[:nonterminals] = on_left @ left + on_right @ right
                grad_left.addmm_(on_left.flatten(0, 2).t(), under)
                grad_right.addmm_(on_right.flatten(0, 2).t(), under)
            if width in whole:
                outside[-1, 0, whole[width]] = seed[whole[width], None] * chart.root
            grad_spans.diagonal(width, 1, 2).copy_((outside * vectors).sum((0, 3)).t())
            outside = (outside / chart.peaks[width][..., None]).clamp(-limit, limit)
            by_label = outside.permute(3, 1, 2, 0).flatten(1, 2)
            products = chart.products[width]
            grad_mixture.baddbmm_(by_label.mT, products.flatten(1, 2))
            of_products = torch.bmm(by_label, chart.mixture).view_as(products)
            weighted = torch.empty_like(of_products)
            starts = products.shape[1]
            for split in range(1, width):
                torch.mul(of_products, chart.weights[width][:, :, split - 1, None], out=weighted)
                on_left, on_right = chart.children(width, split)
                of_left[split][:, :starts].addcmul_(weighted, on_right)
                of_right[width - split][:, split : split + starts].addcmul_(weighted, on_left)
        return (
            seed @ chart.whole(),
            grad_mixture,
            grad_left,
            grad_right,
            of_left[1].permute(2, 1, 0, 3),
            of_right[1].permute(2, 1, 0, 3),
            None,
            grad_spans if ctx.needs_input_grad[7] else None,
            None,
        )
