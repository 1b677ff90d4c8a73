"""Messages of all spans under rules with one probability each, on matrix products.

The message m(i, j)[P, A] is the probability of words i, ..., j - 1 under nonterminal A with context
P above it. The children of a label stand in the context c that it makes, so that

    pairs(i, j)[c, B, C] = sum_k m(i, k)[c, B] m(k, j)[c, C]

is needed but once for all labels that make it, and then

    m(i, j)[P, A] = sum_C left[i, A, P, C] m(i + 1, j)[c, C]           a word on the left
                  + sum_B right[j - 1, A, P, B] m(i, j - 1)[c, B]      a word on the right
                  + sum_BC rules[A, P, B, C] pairs(i, j)[c, B, C].

All spans of one width are computed at once: the sum over k is a batched matrix product, and one
more matrix product applies the rules. With maxima in place of the sums the same messages are those
of the best trees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.tasks.grammar.rules.contexts import Contexts, Part, joined
from gfnem.tasks.grammar.rules.messages import Children, Choose, SpanGradients, SpanMessages
from gfnem.tasks.grammar.rules.products import matrix_vector, times_narrow
from gfnem.tasks.grammar.rules.span_table import SpanTable


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


class DenseTables(NamedTuple):
    """Those of `DensePotentials`."""

    rules: Float[Tensor, "nonterminals contexts nonterminals nonterminals"]
    word: Int[Tensor, "batch length"]
    left: Float[Tensor, "words nonterminals contexts nonterminals"]
    right: Float[Tensor, "words nonterminals contexts nonterminals"]
    both: Float[Tensor, "batch gaps nonterminals contexts"]


class _PartTables(NamedTuple):
    """The rules of the labels that make some contexts, by the context of the children.

    left, right: at every place those of its word.
    """

    part: Part
    rules: Float[Tensor, "inner size*contexts pairs"]
    left: Float[Tensor, "length batch inner size*contexts nonterminals"]
    right: Float[Tensor, "length batch inner size*contexts nonterminals"]


class DenseSpans(SpanMessages):
    """See the module's description.

    best: maxima in place of sums.
    """

    def __init__(self, contexts: Contexts, tables: DenseTables, best: bool):
        self.contexts = contexts
        self.tables = tables
        self.semiring = _MAX_PRODUCT if best else _SUM_PRODUCT
        # Spans of one width begin everywhere: here every place has its word's tables.
        word = tables.word.t().contiguous()
        left, right = tables.left[word], tables.right[word]
        self.parts = [
            _PartTables(
                part,
                part.by_context(tables.rules, 0).flatten(2),
                part.by_context(left, 2).contiguous(),
                part.by_context(right, 2).contiguous(),
            )
            for part in contexts.parts
        ]
        batch, length = tables.word.shape
        shape = contexts.total, contexts.labels
        self.messages = SpanTable.zeros(tables.both, length, batch, *shape)

    def combine(self, width: int, weights: Float[Tensor, "starts batch splits"]) -> Tensor:
        if width == 2:
            return self.tables.both.permute(1, 0, 3, 2)
        plus, product, times_narrow, matrix_vector = self.semiring
        left, right = self.messages.left(width), self.messages.right(width)
        starts, found = left.shape[:2], []
        for part, rules, of_left, of_right in self.parts:
            word_left = matrix_vector(of_left[: len(left)], right[:, :, 0, part.contexts])
            word_right = matrix_vector(of_right[width - 1 :], left[:, :, -1, part.contexts])
            on_left, on_right = weights[:, :, :1, None], weights[:, :, -1:, None]
            heads = plus(on_left * word_left, on_right * word_right)
            if width > 3:
                inner_left, inner_right = self.inner_children(part, width, weights)
                inner = times_narrow(_pairs(product(inner_left.mT, inner_right)), rules.mT)
                heads = plus(heads, inner.unflatten(1, starts).permute(1, 2, 0, 3))
            found.append(part.by_label(heads, 2))
        return joined(found, 2).mT

    def inner_children(
        self, part: Part, width: int, weights: Float[Tensor, "starts batch splits"]
    ) -> tuple[
        Float[Tensor, "inner starts batch splits nonterminals"],
        Float[Tensor, "inner starts batch splits nonterminals"],
    ]:
        """Left, weighted, and right children at splits without a word, by their context."""
        left = self.messages.left(width)[:, :, 1:-1, part.contexts]
        right = self.messages.right(width)[:, :, 1:-1, part.contexts]
        weighted = weights[:, :, 1:-1, None, None] * left
        return weighted.permute(3, 0, 1, 2, 4), right.permute(3, 0, 1, 2, 4)

    def put(self, width: int, messages: Tensor) -> None:
        self.messages.put(width, messages)

    def of_width(self, width: int) -> Tensor:
        return self.messages.of_width(width)

    def whole(self, lengths: Int[Tensor, "batch"]) -> Tensor:
        return self.messages.whole(lengths)[:, self.contexts.root]

    def table(self) -> SpanTable:
        return self.messages

    def split(
        self,
        width: int,
        weights: Tensor,
        start: Tensor,
        sentence: Tensor,
        label: Tensor,
        context: Tensor,
        choose: Choose,
    ) -> Children:
        tables, labels, below = self.tables, self.contexts.labels, self.contexts.under(label)
        left = self.messages.left(width)[start, sentence, :, below]
        right = self.messages.right(width)[start, sentence, :, below]
        rules = tables.rules[label, context]
        first_word = tables.word[sentence, start]
        last_word = tables.word[sentence, start + width - 1]
        # First a split and one child's label: the left child's, or if that is a word the right
        # one's. Then, given those, the right child's label if it is still open.
        word_left = tables.left[first_word, label, context] * right[:, 0]
        word_right = tables.right[last_word, label, context] * left[:, -1]
        inner = left[:, 1:-1] * self.semiring.product(right[:, 1:-1], rules.mT)
        options = torch.cat([word_left[:, None], inner, word_right[:, None]], 1)
        option = choose((weights[..., None] * options).flatten(1))
        left_width, first = option // labels + 1, option % labels
        second = first.clone()
        open_ = ((left_width > 1) & (left_width < width - 1)).nonzero().squeeze(-1)
        second[open_] = choose(rules[open_, first[open_]] * right[open_, left_width[open_] - 1])
        return Children(left_width, first, second)

    def gradients(self) -> DenseSpanGradients:
        return DenseSpanGradients(self)


class DenseSpanGradients(SpanGradients):
    """What a span receives as a left child is kept by its start, as a right child by its end."""

    def __init__(self, spans: DenseSpans):
        self.spans = spans
        messages, (batch, length) = spans.messages, spans.tables.word.shape
        total, labels = spans.contexts.total, spans.contexts.labels
        self.received_by = SpanTable.zeros(messages.by_start, length, batch, total, labels)
        self.rules = [torch.zeros_like(tables.rules) for tables in spans.parts]
        self.both: Tensor | None = None
        # What reaches left[start] and right[end - 1] from each span.
        shape = (length + 1, batch, length + 1, labels, total)
        self.on_left = messages.by_start.new_zeros(shape)
        self.on_right = messages.by_start.new_zeros(shape)

    def seed(self, lengths: Tensor, whole: Tensor) -> None:
        sentence = torch.arange(len(lengths), device=lengths.device)
        self.received_by.by_start[0, sentence, lengths, self.spans.contexts.root] = whole

    def received(self, width: int) -> Tensor:
        table, length = self.received_by, self.received_by.length
        return table.of_width(width) + table.by_end[width:, :, length - width]

    def spread(self, width: int, weights: Tensor, out: Tensor) -> None:
        if width == 2:
            self.both = out
            return
        length, heads = self.received_by.length, out.mT
        left, right = self.received_by.left(width), self.received_by.right(width)
        starts = heads.shape[:2]
        word_left = weights[:, :, :1, None] * heads
        word_right = weights[:, :, -1:, None] * heads
        self.on_left[: len(heads), :, width] = word_left
        self.on_right[width:, :, length - width] = word_right
        for (part, rules, of_left, of_right), total in zip(
            self.spans.parts, self.rules, strict=True
        ):
            contexts = part.contexts
            on_left, on_right = (part.by_context(word, 2) for word in (word_left, word_right))
            right[:, :, 0, contexts] += matrix_vector(of_left[: len(heads)].mT, on_left)
            left[:, :, -1, contexts] += matrix_vector(of_right[width - 1 :].mT, on_right)
            if width > 3:
                here = part.by_context(heads, 2).permute(2, 0, 1, 3).flatten(1, 2)
                inner_left, inner_right = self.spans.inner_children(part, width, weights)
                total.baddbmm_(here.mT, _pairs(inner_left.mT @ inner_right))
                pairs = torch.bmm(here, rules).unflatten(1, starts)
                pairs = pairs.unflatten(3, (self.spans.contexts.labels, -1))
                of_left = (inner_right @ pairs.mT).permute(1, 2, 3, 0, 4)
                left[:, :, 1:-1, contexts] += weights[:, :, 1:-1, None, None] * of_left
                right[:, :, 1:-1, contexts] += (inner_left @ pairs).permute(1, 2, 3, 0, 4)

    def tables(self) -> tuple[Tensor, ...]:
        spans, labels = self.spans, self.spans.contexts.labels
        rules = [
            tables.part.by_label(total, 0).unflatten(2, (labels, labels))
            for tables, total in zip(spans.parts, self.rules, strict=True)
        ]
        # All widths at once: the span (i, j) of 3, ..., length words met left[i] with (i + 1, j)
        # and right[j - 1] with (i, j - 1).
        messages, tables = spans.messages, spans.tables
        left = self._of_words(self.on_left[:-1, :, 3:], messages.by_start[1:, :, 2:-1])
        right = self._of_words(self.on_right[1:, :, :-3], messages.by_end[:-1, :, 1:-2])
        word = tables.word.t().flatten()
        assert self.both is not None
        return (
            joined(rules, 0),
            torch.zeros_like(tables.left).index_add_(0, word, left.flatten(0, 1)),
            torch.zeros_like(tables.right).index_add_(0, word, right.flatten(0, 1)),
            self.both.permute(1, 0, 3, 2),
        )

    def _of_words(
        self,
        above: Float[Tensor, "length batch widths nonterminals contexts"],
        beside: Float[Tensor, "length batch widths contexts nonterminals"],
    ) -> Float[Tensor, "length batch nonterminals contexts nonterminals"]:
        found = []
        for tables in self.spans.parts:
            heads = tables.part.by_context(above, 3).permute(0, 1, 3, 4, 2)
            other = beside[..., tables.part.contexts, :].transpose(2, 3)
            found.append(tables.part.by_label(heads @ other, 2))
        return joined(found, 2)


def _pairs(
    products: Float[Tensor, "inner starts batch nonterminals nonterminals"],
) -> Float[Tensor, "inner spans nonterminals*nonterminals"]:
    return products.flatten(1, 2).flatten(2)
