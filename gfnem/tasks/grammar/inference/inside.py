"""Exact inference in a PCFG on matrix products.

The inside score beta(i, j, A) is the probability of words i, ..., j - 1 under nonterminal A. Words
are already summed into `Potentials`, so a chart holds nonterminals only: beta(i, i + 2) = both[i],
and for wider spans

    beta(i, j, A) = sum_C left[i, A, C] beta(i + 1, j, C)              a word on the left
                  + sum_B right[j - 1, A, B] beta(i, j - 1, B)         a word on the right
                  + sum_BC rules[A, B, C] sum_k beta(i, k, B) beta(k, j, C).

All spans of one width are computed at once: the sum over k is a batched matrix product, and one
more matrix product applies the rules. Every span's vector is scaled to maximum 1 and keeps the
logarithm of its scale. With maxima in place of the sums the same chart holds Viterbi scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gfnem.categorical import sample_categorical
from gfnem.tasks.grammar.inference.spans import (
    Children,
    SpanTable,
    Splitter,
    marginals,
    possible,
    top_down,
)
from gfnem.tasks.grammar.rules.potentials import Grammar, Potentials
from gfnem.tasks.grammar.rules.products import matrix_vector, times_narrow
from gfnem.tasks.grammar.trees.tree import Trees


def inside_chart(potentials: Potentials) -> Chart:
    """What everything else here is computed from, for those who ask more than one thing.

    Without gradients. Viterbi trees have a chart of their own.
    """
    with torch.no_grad():
        return Chart.of(*_tables(potentials), _SUM_PRODUCT)


def log_partition(
    potentials: Potentials,
    span_scores: Float[Tensor, "batch length+1 length+1"] | None = None,
    chart: Chart | None = None,
) -> Float[Tensor, "batch"]:
    """log p(x) in nats, once differentiable in the potentials and in the span scores.

    A sentence of probability zero has log-probability -inf and gradient 0.

    span_scores: added to the log-score of every tree that holds the span (start, end), for spans
        of at least two words; -inf forbids a span. The gradient at 0 is p(span in z | x).
    chart: of the potentials, where it is at hand; without span scores.
    """
    assert span_scores is None or chart is None, "a chart has the span scores that it was made with"
    total = _LogPartition.apply(*_tables(potentials), span_scores, chart)
    return total + potentials.total_log_scale


def span_marginals(
    potentials: Potentials, chart: Chart | None = None
) -> Float[Tensor, "batch length+1 length+1"]:
    """p(span (start, end) in z | x); 0 for single words and for sentences of probability zero.

    chart: of the potentials, where it is at hand.
    """
    tables = [table.detach() for table in _tables(potentials)]
    return marginals(
        lambda scores: _LogPartition.apply(*tables, scores, chart), potentials.log_scale
    )


def expected_counts(
    grammar: Grammar, words: Int[Tensor, "batch length"], lengths: Int[Tensor, "batch"]
) -> Grammar:
    """How often the trees of these sentences use each rule, expected under p(z | x).

    Summed over the batch, with a count in the place of each of the grammar's log-probabilities.
    A sentence of probability zero counts nothing.
    """
    with torch.enable_grad():
        rules = [
            rule.detach().requires_grad_()
            for rule in (grammar.root, grammar.binary, grammar.emission)
        ]
        total = log_partition(Potentials.of(Grammar(*rules), words, lengths))
        return Grammar(*torch.autograd.grad(total.sum(), rules))


@torch.no_grad()
def sample(
    potentials: Potentials,
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
    root = draw(possible(chart.root_weights())[:, None].expand(-1, samples, -1))
    trees = top_down(root, potentials.lengths, chart.splitter(draw))
    return trees if labelled else trees.shapes()


@torch.no_grad()
def viterbi(potentials: Potentials) -> tuple[Trees, Float[Tensor, "batch"]]:
    """The labelled tree of highest p(x, z) of each sentence, and its log p(x, z) in nats.

    A tree's labels are nonterminals: preterminals are summed out over each word, as everywhere
    in this package.

    Raises UserError if a sentence has probability zero.
    """
    best = partial(torch.argmax, dim=-1)
    chart = Chart.of(*_tables(potentials), _MAX_PRODUCT)
    weights = possible(chart.root_weights())
    trees = top_down(best(weights)[:, None], potentials.lengths, chart.splitter(best))
    log_joint = weights.amax(-1).log() + chart.root_scale() + potentials.total_log_scale
    return trees, log_joint


@torch.no_grad()
def minimum_bayes_risk(
    scores: Float[Tensor, "batch length+1 length+1"], lengths: Int[Tensor, "batch"]
) -> Trees:
    """The unlabelled tree with the highest sum of its spans' scores, one for each sentence.

    With p(span in z | x) as scores it has the most expected correct spans (Goodman 1996, "Parsing
    algorithms and metrics"). Among equals the split furthest to the left is taken.
    """
    batch, length = scores.shape[0], scores.shape[1] - 1
    best = SpanTable.zeros(scores, length, batch)
    left_width = torch.zeros_like(best.by_start, dtype=torch.long)
    for width in range(2, length + 1):
        children, choice = (best.left(width) + best.right(width)).max(-1)
        best.put(width, children + scores.diagonal(width, 1, 2).t())
        left_width[: length - width + 1, :, width] = choice + 1

    def split(width: int, start: Tensor, sentence: Tensor, label: Tensor) -> Children:
        return Children(left_width[start, sentence, width], label, label)

    return top_down(torch.zeros_like(lengths)[:, None], lengths, split).shapes()


def inside_scores(
    root: Float[Tensor, "nonterminals"],
    rules: Float[Tensor, "nonterminals nonterminals nonterminals"],
    left: Float[Tensor, "batch length nonterminals nonterminals"],
    right: Float[Tensor, "batch length nonterminals nonterminals"],
    both: Float[Tensor, "batch gaps nonterminals"],
    lengths: Int[Tensor, "batch"],
) -> tuple[SpanTable, SpanTable]:
    """beta of all spans of at least two words, and the logarithms of its scales.

    The arguments are those of `Potentials`. Both are 0 for single words. Without gradients.
    """
    with torch.no_grad():
        chart = Chart.of(root, rules, left, right, both, lengths, _SUM_PRODUCT)
    return chart.vectors, chart.scales


def _tables(potentials: Potentials) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    p = potentials
    return p.root, p.rules, p.left, p.right, p.both, p.lengths


class _Semiring(NamedTuple):
    """What stands for the sum of probabilities and for products; the last two as in `products`."""

    plus: Callable[[Tensor, Tensor], Tensor]
    product: Callable[[Tensor, Tensor], Tensor]
    times_narrow: Callable[[Tensor, Tensor], Tensor]
    matrix_vector: Callable[[Tensor, Tensor], Tensor]


def _max_product(
    left: Float[Tensor, "*batch m k"], right: Float[Tensor, "*batch k n"]
) -> Float[Tensor, "*batch m n"]:
    # Column by column, so that no tensor holds all m k n products.
    columns = [_max_matrix_vector(left, column) for column in right.unbind(-1)]
    return torch.stack(columns, -1)


def _max_matrix_vector(
    matrix: Float[Tensor, "*batch m n"], vector: Float[Tensor, "*batch n"]
) -> Float[Tensor, "*batch m"]:
    return (matrix * vector[..., None, :]).amax(-1)


_SUM_PRODUCT = _Semiring(torch.add, torch.matmul, times_narrow, matrix_vector)
_MAX_PRODUCT = _Semiring(torch.maximum, _max_product, _max_product, _max_matrix_vector)


@dataclass(frozen=True)
class Chart:
    """The scores of all spans of at least two words, beta = vectors * exp(scales).

    Both are 0 for single words: a word's score is in `left` and `right`, which are those of
    `Potentials`, position first.

    weights: by width, the scale of each split of a span relative to the span's largest.
    peaks: by width, the maximum that each span's vector was divided by.
    """

    root: Float[Tensor, "nonterminals"]
    rules: Float[Tensor, "nonterminals nonterminals*nonterminals"]
    left: Float[Tensor, "length batch nonterminals nonterminals"]
    right: Float[Tensor, "length batch nonterminals nonterminals"]
    lengths: Int[Tensor, "batch"]
    semiring: _Semiring
    vectors: SpanTable
    scales: SpanTable
    weights: dict[int, Float[Tensor, "starts batch splits"]]
    peaks: dict[int, Float[Tensor, "starts batch"]]

    @staticmethod
    def of(
        root: Float[Tensor, "nonterminals"],
        rules: Float[Tensor, "nonterminals nonterminals nonterminals"],
        left: Float[Tensor, "batch length nonterminals nonterminals"],
        right: Float[Tensor, "batch length nonterminals nonterminals"],
        both: Float[Tensor, "batch gaps nonterminals"],
        lengths: Int[Tensor, "batch"],
        semiring: _Semiring,
        span_scores: Float[Tensor, "batch length+1 length+1"] | None = None,
    ) -> Chart:
        batch, length, nonterminals, _ = left.shape
        chart = Chart(
            root=root,
            rules=rules.flatten(1),
            left=left.transpose(0, 1).contiguous(),
            right=right.transpose(0, 1).contiguous(),
            lengths=lengths,
            semiring=semiring,
            vectors=SpanTable.zeros(both, length, batch, nonterminals),
            scales=SpanTable.zeros(both, length, batch),
            weights={},
            peaks={},
        )
        vector, largest = both.transpose(0, 1), both.new_zeros(())
        for width in range(2, length + 1):
            if width > 2:
                chart.weights[width], largest = chart.scales.split_weights(width)
                vector = chart.combine(width)
            peak = vector.amax(-1)
            scale = largest + peak.log()
            if span_scores is not None:
                scale = scale + span_scores.diagonal(width, 1, 2).t()
            chart.peaks[width] = torch.where(peak > 0, peak, 1.0)
            chart.vectors.put(width, vector / chart.peaks[width][..., None])
            chart.scales.put(width, scale)
        return chart

    def combine(self, width: int) -> Float[Tensor, "starts batch nonterminals"]:
        """The spans of `width` > 2 words from their children, not yet divided by their peaks."""
        semiring = self.semiring
        left, right = self.vectors.left(width), self.vectors.right(width)
        weights = self.weights[width]
        word_left = semiring.matrix_vector(self.left[: len(left)], right[:, :, 0])
        word_right = semiring.matrix_vector(self.right[width - 1 :], left[:, :, -1])
        vector = semiring.plus(weights[..., :1] * word_left, weights[..., -1:] * word_right)
        if width > 3:
            inner = semiring.times_narrow(self.pairs(width).flatten(0, 1), self.rules.t())
            vector = semiring.plus(vector, inner.unflatten(0, vector.shape[:2]))
        return vector

    def pairs(self, width: int) -> Float[Tensor, "starts batch nonterminals*nonterminals"]:
        """Scores of two children, neither of them a word, summed over the splits."""
        left, right = self.vectors.left(width)[:, :, 1:-1], self.vectors.right(width)[:, :, 1:-1]
        weighted = self.weights[width][:, :, 1:-1, None] * left
        return self.semiring.product(weighted.transpose(-1, -2), right).flatten(-2)

    def root_weights(self) -> Float[Tensor, "batch nonterminals"]:
        """p(S -> A) beta(0, n, A), divided by exp(root_scale)."""
        return self.root * self.vectors.whole(self.lengths)

    def root_scale(self) -> Float[Tensor, "batch"]:
        return self.scales.whole(self.lengths)

    def splitter(self, choose: Callable[[Tensor], Tensor]) -> Splitter:
        """How to split spans of known label, their descendants summed out (or at their best).

        choose: the weights of options, along the last dimension -> the index of one.
        """
        nonterminals = len(self.root)

        def split(width: int, start: Tensor, sentence: Tensor, label: Tensor) -> Children:
            if width == 2:
                return Children(torch.ones_like(start), label, label)
            left = self.vectors.left(width)[start, sentence]
            right = self.vectors.right(width)[start, sentence]
            rules = self.rules[label].unflatten(1, (nonterminals, nonterminals))
            # First a split and one child's label: the left child's, or if that is a word the
            # right one's. Then, given those, the right child's label if it is still open.
            word_left = self.left[start, sentence, label] * right[:, 0]
            word_right = self.right[start + width - 1, sentence, label] * left[:, -1]
            products = self.semiring.product(right[:, 1:-1], rules.transpose(1, 2))
            options = [word_left[:, None], left[:, 1:-1] * products, word_right[:, None]]
            weights = self.weights[width][start, sentence, :, None]
            option = choose((weights * torch.cat(options, 1)).flatten(1))
            left_width, first = option // nonterminals + 1, option % nonterminals
            second = first.clone()
            both = ((left_width > 1) & (left_width < width - 1)).nonzero().squeeze(-1)
            given = rules[both, first[both]] * right[both, left_width[both] - 1]
            second[both] = choose(given)
            return Children(left_width, first, second)

        return split


class _LogPartition(torch.autograd.Function):
    """log p(x) without the words' scales; its gradient is the outside algorithm."""

    @staticmethod
    def forward(ctx, root, rules, left, right, both, lengths, span_scores, chart):
        ctx.chart = chart or Chart.of(
            root, rules, left, right, both, lengths, _SUM_PRODUCT, span_scores
        )
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
        # The gradient of log p(x) in the spans' vectors: what a span receives as a left child by
        # its start, what it receives as a right child by its end.
        outside = SpanTable.zeros(total, length, batch, nonterminals)
        seed = torch.where(log_total.isfinite(), grad / total, 0.0)
        sentence = torch.arange(batch, device=total.device)
        outside.by_start[0, sentence, chart.lengths] = seed[:, None] * chart.root
        grad_spans = total.new_zeros(batch, length + 1, length + 1)
        # The gradient of a label that is next to impossible in its span has no bound.
        limit = torch.finfo(total.dtype).max * torch.finfo(total.dtype).eps

        def received(width: int) -> Float[Tensor, "starts batch nonterminals"]:
            """Complete once all wider spans have passed theirs on; before division by peaks."""
            starts = length - width + 1
            score = outside.by_start[:starts, :, width] + outside.by_end[width:, :, length - width]
            vector = chart.vectors.by_start[:starts, :, width]
            grad_spans.diagonal(width, 1, 2).copy_((score * vector).sum(-1).t())
            return (score / chart.peaks[width][..., None]).clamp(-limit, limit)

        grad_rules = torch.zeros_like(chart.rules)
        # What reaches left[start] and right[end - 1] from each span.
        of_left, of_right = torch.zeros_like(outside.by_start), torch.zeros_like(outside.by_end)
        for width in range(length, 2, -1):
            score, weights = received(width), chart.weights[width]
            left, right = outside.left(width), outside.right(width)
            of_left[: len(score), :, width] = word_left = weights[..., :1] * score
            of_right[width:, :, length - width] = word_right = weights[..., -1:] * score
            right[:, :, 0] += matrix_vector(chart.left[: len(score)].mT, word_left)
            left[:, :, -1] += matrix_vector(chart.right[width - 1 :].mT, word_right)
            if width > 3:
                grad_rules.addmm_(score.flatten(0, 1).t(), chart.pairs(width).flatten(0, 1))
                pairs = (score @ chart.rules).unflatten(-1, (nonterminals, nonterminals))
                weights = weights[:, :, 1:-1, None]
                left[:, :, 1:-1] += weights * (
                    chart.vectors.right(width)[:, :, 1:-1] @ pairs.transpose(-1, -2)
                )
                right[:, :, 1:-1] += (weights * chart.vectors.left(width)[:, :, 1:-1]) @ pairs
        grad_both = received(2)
        # All widths at once: the span (i, j) of 3, ..., length words met left[i] with (i + 1, j)
        # and right[j - 1] with (i, j - 1).
        grad_left = of_left[:-1, :, 3:].transpose(-1, -2) @ chart.vectors.by_start[1:, :, 2:-1]
        grad_right = of_right[1:, :, :-3].transpose(-1, -2) @ chart.vectors.by_end[:-1, :, 1:-2]
        return (
            seed @ chart.vectors.whole(chart.lengths),
            grad_rules.unflatten(1, (nonterminals, nonterminals)),
            grad_left.transpose(0, 1),
            grad_right.transpose(0, 1),
            grad_both.transpose(0, 1),
            None,
            grad_spans if ctx.needs_input_grad[6] else None,
            None,
        )
