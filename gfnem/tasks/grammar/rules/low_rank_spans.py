"""Messages of all spans under rules of low rank.

A span or a word is to a parent one vector over r on the left, another one on the right, in the
context c that the parent makes. The message of words i, ..., j - 1 under A with context P above is

    m(i, j)[P, A] = sum_r p(r | A, P) sum_k left(i, k)[c, r] right(k, j)[c, r].

Time goes with the square of the nonterminals, not with their fourth power. The sum over k has
no matrix product to it and is bound by memory: it runs split by split over the spans of one width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.tasks.grammar.rules.contexts import Contexts, joined
from gfnem.tasks.grammar.rules.messages import Children, Choose, SpanGradients, SpanMessages
from gfnem.tasks.grammar.rules.span_table import SpanTable


class LowRankTables(NamedTuple):
    """Those of `LowRankPotentials`."""

    mixture: Float[Tensor, "nonterminals contexts rank"]
    left: Float[Tensor, "rank nonterminals"]
    right: Float[Tensor, "rank nonterminals"]
    word_left: Float[Tensor, "batch length inner rank"]
    word_right: Float[Tensor, "batch length inner rank"]


class LowRankSpans(SpanMessages):
    """By width.

    left, right: what spans are to their parents as left and as right children, a word a span of
        width 1.
    products: of the children's vectors, summed over splits.
    messages: of spans of at least two words.
    """

    left: dict[int, Float[Tensor, "inner starts batch rank"]]
    right: dict[int, Float[Tensor, "inner starts batch rank"]]
    products: dict[int, Float[Tensor, "inner starts batch rank"]]
    messages: dict[int, Float[Tensor, "contexts starts batch nonterminals"]]

    def __init__(self, contexts: Contexts, tables: LowRankTables, lengths: Int[Tensor, "batch"]):
        self.contexts = contexts
        self.tables = tables
        self.length = tables.word_left.shape[1]
        self.left = {1: tables.word_left.permute(2, 1, 0, 3).contiguous()}
        self.right = {1: tables.word_right.permute(2, 1, 0, 3).contiguous()}
        self.products, self.messages = {}, {}
        self.by_length = {
            length: (lengths == length).nonzero().squeeze(1) for length in lengths.unique().tolist()
        }

    def combine(self, width: int, weights: Float[Tensor, "starts batch splits"]) -> Tensor:
        starts = len(weights)
        products = torch.zeros_like(self.left[1][:, :starts])
        weighted = torch.empty_like(products)
        for split in range(1, width):
            left, right = self.children(width, split)
            torch.mul(left, weights[:, :, split - 1, None], out=weighted)
            products.addcmul_(weighted, right)
        self.products[width] = products
        found = []
        for part in self.contexts.parts:
            mixture = part.by_context(self.tables.mixture, 0)
            heads = torch.bmm(products[part.contexts].flatten(1, 2), mixture.mT)
            heads = heads.unflatten(1, products.shape[1:3]).movedim(0, 2)
            found.append(part.by_label(heads, 2))
        return joined(found, 2).mT

    def children(self, width: int, split: int) -> tuple[Tensor, Tensor]:
        """Of the spans of `width` words, with a left child of `split` words; views."""
        starts = self.length - width + 1
        return self.left[split][:, :starts], self.right[width - split][:, split : split + starts]

    def put(self, width: int, messages: Tensor) -> None:
        self.messages[width] = messages.movedim(2, 0).contiguous()
        if width < self.length:
            inner = self.messages[width][: self.contexts.inner]
            self.left[width] = inner @ self.tables.left.t()
            self.right[width] = inner @ self.tables.right.t()

    def of_width(self, width: int) -> Tensor:
        return self.messages[width].movedim(0, 2)

    def whole(self, lengths: Int[Tensor, "batch"]) -> Tensor:
        whole = self.tables.left.new_zeros(len(lengths), self.contexts.labels)
        for length, sentence in self.by_length.items():
            whole[sentence] = self.messages[length][self.contexts.root, 0, sentence]
        return whole

    def table(self) -> SpanTable:
        batch, total = len(self.tables.word_left), self.contexts.total
        table = SpanTable.zeros(self.tables.left, self.length, batch, total, self.contexts.labels)
        for width in self.messages:
            table.put(width, self.of_width(width))
        return table

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
        below, rank = self.contexts.under(label), len(self.tables.left)
        products = torch.stack(
            [
                self.left[this][below, start, sentence]
                * self.right[width - this][below, start + this, sentence]
                for this in range(1, width)
            ],
            1,
        )
        options = weights[..., None] * products * self.tables.mixture[label, context][:, None]
        option = choose(options.flatten(1))
        left_width, component = option // rank + 1, option % rank

        def child(begin: Tensor, size: Tensor, table: Tensor) -> Tensor:
            """The label of a child; 0 for a word."""
            chosen = torch.zeros_like(size)
            for this in size.unique().tolist():
                if this > 1:
                    at = (size == this).nonzero().squeeze(1)
                    messages = self.messages[this][below[at], begin[at], sentence[at]]
                    chosen[at] = choose(table[component[at]] * messages)
            return chosen

        return Children(
            left_width,
            child(start, left_width, self.tables.left),
            child(start + left_width, width - left_width, self.tables.right),
        )

    def gradients(self) -> LowRankSpanGradients:
        return LowRankSpanGradients(self)


class LowRankSpanGradients(SpanGradients):
    """of_left, of_right: of what spans are to their parents, by width; none of whole sentences."""

    def __init__(self, spans: LowRankSpans):
        self.spans = spans
        self.left = torch.zeros_like(spans.tables.left)
        self.right = torch.zeros_like(spans.tables.right)
        self.mixture = [
            torch.zeros_like(part.by_context(spans.tables.mixture, 0))
            for part in spans.contexts.parts
        ]
        self.of_left, self.of_right = (
            {width: torch.zeros_like(vectors) for width, vectors in side.items()}
            for side in (spans.left, spans.right)
        )
        self.of_whole: Tensor | None = None

    def seed(self, lengths: Tensor, whole: Tensor) -> None:
        self.of_whole = whole

    def received(self, width: int) -> Tensor:
        spans = self.spans
        messages, inner = spans.messages[width], spans.contexts.inner
        out = torch.zeros_like(messages)
        if width < spans.length:
            under = messages[:inner].flatten(0, 2)
            on_left, on_right = self.of_left.pop(width), self.of_right.pop(width)
            out[:inner] = on_left @ spans.tables.left + on_right @ spans.tables.right
            self.left.addmm_(on_left.flatten(0, 2).t(), under)
            self.right.addmm_(on_right.flatten(0, 2).t(), under)
        if width in spans.by_length:
            sentence = spans.by_length[width]
            assert self.of_whole is not None
            out[spans.contexts.root, 0, sentence] = self.of_whole[sentence]
        return out.movedim(0, 2)

    def spread(self, width: int, weights: Tensor, out: Tensor) -> None:
        spans, heads, found = self.spans, out.mT, []
        products = spans.products[width]
        for part, total in zip(spans.contexts.parts, self.mixture, strict=True):
            here = part.by_context(heads, 2).movedim(2, 0).flatten(1, 2)
            total.baddbmm_(here.mT, products[part.contexts].flatten(1, 2))
            mixture = part.by_context(spans.tables.mixture, 0)
            found.append(torch.bmm(here, mixture).unflatten(1, out.shape[:2]))
        of_products = joined(found, 0)
        weighted, starts = torch.empty_like(of_products), len(weights)
        for split in range(1, width):
            torch.mul(of_products, weights[:, :, split - 1, None], out=weighted)
            on_left, on_right = spans.children(width, split)
            self.of_left[split][:, :starts].addcmul_(weighted, on_right)
            self.of_right[width - split][:, split : split + starts].addcmul_(weighted, on_left)

    def tables(self) -> tuple[Tensor, ...]:
        parts = self.spans.contexts.parts
        mixture = [part.by_label(one, 0) for part, one in zip(parts, self.mixture, strict=True)]
        return (
            joined(mixture, 0),
            self.left,
            self.right,
            self.of_left[1].permute(2, 1, 0, 3),
            self.of_right[1].permute(2, 1, 0, 3),
        )
