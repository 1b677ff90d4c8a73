"""Exact inference in grammars whose rules see the parent, on matrix products.

The inside score beta(i, j, A | P) is the probability of words i, ..., j - 1 under nonterminal A
with P above it. A child's context is its parent's label, so that a rule under A meets

    pairs(i, j, A, B, C) = sum_k beta(i, k, B | A) beta(k, j, C | A),

and then, beside the two terms with a word as child, which are looked up as in `inside`,

    beta(i, j, A | P) = sum_BC rules[A, P, B, C] pairs(i, j, A, B, C).

As in `inside`, all spans of one width are computed at once, every span is scaled to maximum 1, and
the backward pass is the outside algorithm.
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
from gfnem.tasks.grammar.rules.annotated import AnnotatedPotentials
from gfnem.tasks.grammar.rules.products import matrix_vector, times_narrow
from gfnem.tasks.grammar.trees.tree import Trees


def inside_chart(potentials: AnnotatedPotentials) -> Chart:
    """What everything else here is computed from, for those who ask more than one thing.

    Without gradients.
    """
    with torch.no_grad():
        return Chart.of(*_tables(potentials))


def log_partition(
    potentials: AnnotatedPotentials, chart: Chart | None = None
) -> Float[Tensor, "batch"]:
    """log p(x) in nats, once differentiable in the potentials.

    A sentence of probability zero has log-probability -inf and gradient 0.

    chart: of the potentials, where it is at hand.
    """
    return _LogPartition.apply(*_tables(potentials), None, chart) + potentials.total_log_scale


def span_marginals(
    potentials: AnnotatedPotentials, chart: Chart | None = None
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
    potentials: AnnotatedPotentials,
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
    nonterminals = len(chart.root)
    top = draw(possible(chart.root_weights())[:, None].expand(-1, samples, -1))

    # A span's symbol is its label together with its context.
    def split(width: int, start: Tensor, sentence: Tensor, symbol: Tensor) -> Children:
        label, context = symbol % nonterminals, symbol // nonterminals
        if width == 2:
            return Children(torch.ones_like(start), label, label)
        left = chart.vectors.left(width)[start, sentence, :, label]
        right = chart.vectors.right(width)[start, sentence, :, label]
        rules = chart.rules[label, context].unflatten(1, (nonterminals, nonterminals))
        # First a split and one child's label: the left child's, or if that is a word the right
        # one's. Then, given those, the right child's label if it is still open.
        word_left = chart.left[start, sentence, label, context] * right[:, 0]
        word_right = chart.right[start + width - 1, sentence, label, context] * left[:, -1]
        inner = left[:, 1:-1] * (right[:, 1:-1] @ rules.mT)
        options = torch.cat([word_left[:, None], inner, word_right[:, None]], 1)
        weights = chart.weights[width][start, sentence, :, None]
        option = draw((weights * options).flatten(1))
        left_width, first = option // nonterminals + 1, option % nonterminals
        second = first.clone()
        open_ = ((left_width > 1) & (left_width < width - 1)).nonzero().squeeze(-1)
        second[open_] = draw(rules[open_, first[open_]] * right[open_, left_width[open_] - 1])
        above = label * nonterminals
        return Children(left_width, above + first, above + second)

    whole = nonterminals * nonterminals + top
    return without_contexts(top_down(whole, potentials.lengths, split), nonterminals, labelled)


def inside_scores(potentials: AnnotatedPotentials) -> tuple[SpanTable, SpanTable]:
    """beta of all spans of at least two words, [context, label], and the logarithms of its scales.

    Both are 0 for single words. Without gradients.
    """
    chart = inside_chart(potentials)
    return chart.vectors, chart.scales


def _tables(
    potentials: AnnotatedPotentials,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Spans of one width begin everywhere: here every place has its word's tables.
    p = potentials
    word = p.word.t()
    return p.root, p.rules, p.left[word], p.right[word], p.both, p.lengths


@dataclass(frozen=True)
class Chart:
    """The scores of all spans of at least two words, beta = vectors * exp(scales).

    Both are 0 for single words: a word's score is in `left` and `right`, which are those of
    `AnnotatedPotentials`, by position. Of a span's vectors the context comes first, so that
    what it is to a parent is one matrix [parent, own label].

    weights: by width, the scale of each split of a span relative to the span's largest.
    peaks: by width, the maximum that each span's vectors were divided by.
    """

    root: Float[Tensor, "nonterminals"]
    rules: Float[Tensor, "nonterminals contexts nonterminals*nonterminals"]
    left: Float[Tensor, "length batch nonterminals contexts nonterminals"]
    right: Float[Tensor, "length batch nonterminals contexts nonterminals"]
    lengths: Int[Tensor, "batch"]
    vectors: SpanTable
    scales: SpanTable
    weights: dict[int, Float[Tensor, "starts batch splits"]]
    peaks: dict[int, Float[Tensor, "starts batch"]]

    @staticmethod
    def of(
        root: Float[Tensor, "nonterminals"],
        rules: Float[Tensor, "nonterminals contexts nonterminals nonterminals"],
        left: Float[Tensor, "length batch nonterminals contexts nonterminals"],
        right: Float[Tensor, "length batch nonterminals contexts nonterminals"],
        both: Float[Tensor, "batch gaps nonterminals contexts"],
        lengths: Int[Tensor, "batch"],
        span_scores: Float[Tensor, "batch length+1 length+1"] | None = None,
    ) -> Chart:
        length, batch, nonterminals, contexts, _ = left.shape
        chart = Chart(
            root=root,
            rules=rules.flatten(2),
            left=left,
            right=right,
            lengths=lengths,
            vectors=SpanTable.zeros(both, length, batch, contexts, nonterminals),
            scales=SpanTable.zeros(both, length, batch),
            weights={},
            peaks={},
        )
        vectors, largest = both.permute(1, 0, 3, 2), both.new_zeros(())
        for width in range(2, length + 1):
            if width > 2:
                chart.weights[width], largest = chart.scales.split_weights(width)
                vectors = chart.combine(width)
            peak = vectors.amax((-1, -2))
            scale = largest + peak.log()
            if span_scores is not None:
                scale = scale + span_scores.diagonal(width, 1, 2).t()
            chart.peaks[width] = torch.where(peak > 0, peak, 1.0)
            chart.vectors.put(width, vectors / chart.peaks[width][..., None, None])
            chart.scales.put(width, scale)
        return chart

    def left_children(
        self, width: int
    ) -> Float[Tensor, "starts batch splits nonterminals nonterminals"]:
        """Of the spans of `width` words, whatever their label: [..., parent, own label]; a view."""
        return self.vectors.left(width)[..., : len(self.root), :]

    def right_children(
        self, width: int
    ) -> Float[Tensor, "starts batch splits nonterminals nonterminals"]:
        """The same at the same splits."""
        return self.vectors.right(width)[..., : len(self.root), :]

    def combine(self, width: int) -> Float[Tensor, "starts batch contexts nonterminals"]:
        """The spans of `width` > 2 words from their children, not yet divided by their peaks."""
        left, right = self.left_children(width), self.right_children(width)
        weights = self.weights[width][..., None, None]
        word_left = matrix_vector(self.left[: len(left)], right[:, :, 0])
        word_right = matrix_vector(self.right[width - 1 :], left[:, :, -1])
        vectors = weights[:, :, 0] * word_left + weights[:, :, -1] * word_right
        if width > 3:
            inner = times_narrow(self.pairs(width), self.rules.mT)
            vectors += inner.unflatten(1, vectors.shape[:2]).permute(1, 2, 0, 3)
        return vectors.mT

    def pairs(self, width: int) -> Float[Tensor, "nonterminals spans nonterminals*nonterminals"]:
        """Scores of two children under each label, neither of them a word, summed over splits."""
        left, right = self.inner_children(width)
        return torch.matmul(left.mT, right).flatten(1, 2).flatten(2)

    def inner_children(
        self, width: int
    ) -> tuple[
        Float[Tensor, "nonterminals starts batch splits nonterminals"],
        Float[Tensor, "nonterminals starts batch splits nonterminals"],
    ]:
        """Left, weighted, and right children at splits without a word, by the parent's label."""
        left, right = self.left_children(width), self.right_children(width)
        weighted = self.weights[width][:, :, 1:-1, None, None] * left[:, :, 1:-1]
        return weighted.permute(3, 0, 1, 2, 4), right[:, :, 1:-1].permute(3, 0, 1, 2, 4)

    def root_weights(self) -> Float[Tensor, "batch nonterminals"]:
        """p(S -> A) beta(0, n, A | S), divided by exp(root_scale)."""
        return self.root * self.vectors.whole(self.lengths)[:, -1]

    def root_scale(self) -> Float[Tensor, "batch"]:
        return self.scales.whole(self.lengths)


class _LogPartition(torch.autograd.Function):
    """log p(x) without the words' scales; its gradient is the outside algorithm."""

    @staticmethod
    def forward(ctx, root, rules, left, right, both, lengths, span_scores, chart):
        ctx.chart = chart or Chart.of(root, rules, left, right, both, lengths, span_scores)
        total = ctx.chart.root_weights().sum(-1)
        log_total = total.log() + ctx.chart.root_scale()
        ctx.save_for_backward(total, log_total)
        return log_total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        chart: Chart = ctx.chart
        total, log_total = ctx.saved_tensors
        nonterminals, batch, length = len(chart.root), len(total), chart.vectors.length
        contexts = chart.rules.shape[1]
        # The gradient of log p(x) in the spans' vectors: what a span receives as a left child by
        # its start, what it receives as a right child by its end.
        outside = SpanTable.zeros(total, length, batch, contexts, nonterminals)
        seed = torch.where(log_total.isfinite(), grad / total, 0.0)
        sentence = torch.arange(batch, device=total.device)
        outside.by_start[0, sentence, chart.lengths, -1] = seed[:, None] * chart.root
        grad_spans = total.new_zeros(batch, length + 1, length + 1)
        # The gradient of a label that is next to impossible in its span has no bound.
        limit = torch.finfo(total.dtype).max * torch.finfo(total.dtype).eps

        def received(width: int) -> Float[Tensor, "starts batch nonterminals contexts"]:
            """Complete once all wider spans have passed theirs on; before division by peaks."""
            starts = length - width + 1
            score = outside.by_start[:starts, :, width] + outside.by_end[width:, :, length - width]
            vectors = chart.vectors.by_start[:starts, :, width]
            grad_spans.diagonal(width, 1, 2).copy_((score * vectors).sum((-1, -2)).t())
            return (score / chart.peaks[width][..., None, None]).clamp(-limit, limit).mT

        grad_rules = torch.zeros_like(chart.rules)
        # What reaches left[start] and right[end - 1] from each span.
        shape = (length + 1, batch, length + 1, nonterminals, contexts)
        of_left, of_right = total.new_zeros(shape), total.new_zeros(shape)
        for width in range(length, 2, -1):
            score, weights = received(width), chart.weights[width][..., None, None]
            left = outside.left(width)[..., :nonterminals, :]
            right = outside.right(width)[..., :nonterminals, :]
            of_left[: len(score), :, width] = word_left = weights[:, :, 0] * score
            of_right[width:, :, length - width] = word_right = weights[:, :, -1] * score
            right[:, :, 0] += matrix_vector(chart.left[: len(score)].mT, word_left)
            left[:, :, -1] += matrix_vector(chart.right[width - 1 :].mT, word_right)
            if width > 3:
                by_label = score.permute(2, 0, 1, 3).flatten(1, 2)
                grad_rules.baddbmm_(by_label.mT, chart.pairs(width))
                pairs = torch.bmm(by_label, chart.rules)
                pairs = pairs.unflatten(1, score.shape[:2]).unflatten(3, (nonterminals, -1))
                left_inner, right_inner = chart.inner_children(width)
                of_split = (right_inner @ pairs.mT).permute(1, 2, 3, 0, 4)
                left[:, :, 1:-1] += weights[:, :, 1:-1] * of_split
                right[:, :, 1:-1] += (left_inner @ pairs).permute(1, 2, 3, 0, 4)
        grad_both = received(2)

        def of_words(above: Tensor, child: Tensor) -> Tensor:
            child = child[..., :nonterminals, :].transpose(2, 3)
            return above.permute(0, 1, 3, 4, 2) @ child

        # All widths at once: the span (i, j) of 3, ..., length words met left[i] with (i + 1, j)
        # and right[j - 1] with (i, j - 1).
        by_start, by_end = chart.vectors.by_start, chart.vectors.by_end
        return (
            seed @ chart.vectors.whole(chart.lengths)[:, -1],
            grad_rules.unflatten(2, (nonterminals, nonterminals)),
            of_words(of_left[:-1, :, 3:], by_start[1:, :, 2:-1]),
            of_words(of_right[1:, :, :-3], by_end[:-1, :, 1:-2]),
            grad_both.transpose(0, 1),
            None,
            grad_spans if ctx.needs_input_grad[6] else None,
            None,
        )
