"""Grammars of low rank.

    p(B C | A, P) = sum over r of p(r | A, P) p(B | r) p(C | r):

few numbers for many symbols. Whatever is below a child, a word or a tree, is to a parent one vector
over r, in the context that the parent makes, and two children's vectors are multiplied entry by
entry. So nothing with an index for both children is ever needed; words are children like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.categorical import sample_categorical
from gfnem.tasks.grammar.rules.contexts import Contexts, joined
from gfnem.tasks.grammar.rules.dense import DensePotentials
from gfnem.tasks.grammar.rules.dense_spans import DenseSpans
from gfnem.tasks.grammar.rules.grammar import Grammar, Potentials, Words
from gfnem.tasks.grammar.rules.low_rank_spans import LowRankSpans, LowRankTables
from gfnem.tasks.grammar.rules.messages import Choose, Kept, MergeGradients


@dataclass(frozen=True)
class LowRankGrammar(Grammar):
    """A mixture of products, as log-probabilities.

    mixture: log p(r | A, P), indexed [P, A, r]; contexts P as in `DenseGrammar`.
    left, right: log p(B | r) and log p(C | r).
    """

    root: Float[Tensor, "nonterminals"]
    mixture: Float[Tensor, "contexts nonterminals rank"]
    left: Float[Tensor, "rank symbols"]
    right: Float[Tensor, "rank symbols"]
    emission: Float[Tensor, "inner preterminals vocabulary"]

    @property
    def rank(self) -> int:
        return len(self.left)

    def under_contexts(self) -> Tensor:
        return self.mixture

    def choices(self) -> tuple[Tensor, ...]:
        return self.mixture, self.left, self.right

    def draw_children(
        self, label: Tensor, context: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        rank = sample_categorical(self.mixture[context, label].exp(), generator)
        return (
            sample_categorical(self.left[rank].exp(), generator),
            sample_categorical(self.right[rank].exp(), generator),
        )

    def potentials(
        self, words: Int[Tensor, "batch length"], lengths: Int[Tensor, "batch"]
    ) -> LowRankPotentials:
        said = Words.of(self, words)
        # Split, not sliced: the gradient of a slice is as large as what it is cut from.
        (left, word_left), (right, word_right) = (
            table.exp().tensor_split([self.nonterminals], 1) for table in (self.left, self.right)
        )

        def of_words(table: Float[Tensor, "rank preterminals"]) -> Tensor:
            vectors = said.emission.flatten(0, 2) @ table.t()
            return vectors.unflatten(0, said.emission.shape[:3]).permute(1, 2, 0, 3)

        return LowRankPotentials(
            root=self.root.exp(),
            contexts=self.contexts,
            mixture=self.mixture.transpose(0, 1).exp(),
            left=left,
            right=right,
            word_left=of_words(word_left),
            word_right=of_words(word_right),
            preterminal=said.preterminal,
            log_scale=said.log_scale,
            log_word=said.log_word,
            lengths=lengths,
            words=words,
            grammar=self,
            spread=self.spread(),
        )


@dataclass(frozen=True)
class LowRankPotentials(Potentials):
    """A grammar of low rank with the words of a batch summed in.

    mixture: p(r | A, P), indexed [A, P, r].
    left, right: p(B | r) and p(C | r) of nonterminals.
    word_left: sum over T of p(T | r) p(T -> w_i) in each context, word i the left child.
    word_right: the same with word i the right child.
    """

    of_grammar: ClassVar[set[str]] = Potentials.of_grammar | {"mixture", "left", "right"}
    mixture: Float[Tensor, "nonterminals contexts rank"]
    left: Float[Tensor, "rank nonterminals"]
    right: Float[Tensor, "rank nonterminals"]
    word_left: Float[Tensor, "batch length inner rank"]
    word_right: Float[Tensor, "batch length inner rank"]

    def tables(self) -> tuple[Tensor, ...]:
        return self.root, *self._tables()

    def _tables(self) -> LowRankTables:
        return LowRankTables(self.mixture, self.left, self.right, self.word_left, self.word_right)

    def spans(self) -> LowRankSpans:
        return LowRankSpans(self.contexts, self._tables(), self.lengths)

    def best_spans(self) -> DenseSpans:
        # A maximum over rules does not factor: they are written out one by one.
        ways = torch.eye(self.contexts.total, dtype=self.root.dtype, device=self.root.device)
        return self._dense(ways[:, None].expand(-1, len(self.root), -1)).best_spans()

    def two_words(self) -> Tensor:
        products = self.word_left[:, :-1] * self.word_right[:, 1:]
        return self._heads(products.flatten(0, 1)).unflatten(0, products.shape[:2])

    def word_on_left(self, sentence: Tensor, word: Tensor, right: Tensor) -> tuple[Tensor, Kept]:
        on_left, on_right = self.word_left[sentence, word], self._inner(right) @ self.right.t()
        return self._heads(on_left * on_right), (on_left, on_right)

    def word_on_right(self, sentence: Tensor, word: Tensor, left: Tensor) -> tuple[Tensor, Kept]:
        on_left, on_right = self._inner(left) @ self.left.t(), self.word_right[sentence, word]
        return self._heads(on_left * on_right), (on_left, on_right)

    def two_nodes(self, left: Tensor, right: Tensor) -> tuple[Tensor, Kept]:
        on_left = self._inner(left) @ self.left.t()
        on_right = self._inner(right) @ self.right.t()
        return self._heads(on_left * on_right), (on_left, on_right)

    def _inner(self, message: Tensor) -> Float[Tensor, "nodes inner nonterminals"]:
        """Messages of nodes under labels, which are all that are children."""
        return message[:, : self.contexts.inner]

    def _heads(
        self, products: Float[Tensor, "nodes inner rank"]
    ) -> Float[Tensor, "nodes contexts nonterminals"]:
        """Messages of the products of two children's vectors."""
        found = []
        for part in self.contexts.parts:
            mixture = part.by_context(self.mixture, 0)
            heads = torch.bmm(products[:, part.contexts].transpose(0, 1), mixture.mT)
            found.append(part.by_label(heads.transpose(0, 1), 1))
        return joined(found, 1).mT

    def merge_gradients(self) -> LowRankMergeGradients:
        return LowRankMergeGradients(self)

    def inner_rules(self, label: Tensor, context: Tensor) -> Tensor:
        return (self.mixture[label, context][:, None] * self.left.t()) @ self.right

    def word_left_rules(
        self, sentence: Tensor, position: Tensor, label: Tensor, context: Tensor
    ) -> Tensor:
        word = self.word_left[sentence, position, self.contexts.under(label)]
        return (self.mixture[label, context] * word) @ self.right

    def word_right_rules(
        self, sentence: Tensor, position: Tensor, label: Tensor, context: Tensor
    ) -> Tensor:
        word = self.word_right[sentence, position, self.contexts.under(label)]
        return (self.mixture[label, context] * word) @ self.left

    def rule_probabilities(
        self,
        sentence: Tensor,
        start: Tensor,
        end: Tensor,
        label: Tensor,
        context: Tensor,
        left: Tensor,
        right: Tensor,
    ) -> Tensor:
        below = self.contexts.under(label)

        def vector(child: Tensor, table: Tensor, words: Tensor, position: Tensor) -> Tensor:
            of_word = words[sentence, position, below]
            return torch.where(child[:, None] < 0, of_word, table.t()[child.clamp(min=0)])

        on_left = vector(left, self.left, self.word_left, start)
        on_right = vector(right, self.right, self.word_right, end - 1)
        return (self.mixture[label, context] * on_left * on_right).sum(-1)

    def draw_pairs(
        self, label: Tensor, context: Tensor, left: Tensor, right: Tensor, draw: Choose
    ) -> tuple[Tensor, Tensor]:
        # First r, then each child given it: no pair of labels is ever looked at.
        products = (left @ self.left.t()) * (right @ self.right.t())
        rank = draw(self.mixture[label, context] * products)
        return draw(self.left[rank] * left), draw(self.right[rank] * right)

    def averaged(self, weight: Tensor, contexts: Contexts, order: Tensor) -> DensePotentials:
        return self._dense(weight).reordered(contexts, order)

    def _dense(self, weight: Float[Tensor, "ways nonterminals contexts"]) -> DensePotentials:
        """One probability for each rule, averaged over contexts in several ways."""
        mixture = torch.einsum("apr,wap->awr", self.mixture, weight)
        # What each label makes of a word in its own context.
        below = self.root.new_tensor(self.contexts.below, dtype=torch.long)
        on_left = mixture * self.word_left[:, :, below, None]
        on_right = mixture * self.word_right[:, :, below, None]
        word = torch.arange(self.log_scale.numel(), device=self.log_scale.device)
        shared: Any = {field.name: getattr(self, field.name) for field in fields(Potentials)}
        shared["grammar"] = None
        return DensePotentials(
            **shared,
            rules=(mixture[..., None, :] * self.left.t()) @ self.right,
            word=word.view_as(self.log_scale),
            left=(on_left @ self.right).flatten(0, 1),
            right=(on_right @ self.left).flatten(0, 1),
            both=(on_left[:, :-1] * self.word_right[:, 1:, below, None]).sum(-1),
        )


class LowRankMergeGradients(MergeGradients):
    """Merges remember their children's vectors over r."""

    def __init__(self, potentials: LowRankPotentials):
        self.potentials = potentials
        self.grads = LowRankTables(*map(torch.zeros_like, potentials.tables()[1:]))
        p = potentials
        self.mixture = [
            torch.zeros_like(part.by_context(p.mixture, 0)) for part in p.contexts.parts
        ]

    def two_words(self, sentence: Tensor, gap: Tensor, out: Tensor) -> None:
        p = self.potentials
        on_left, on_right = p.word_left[sentence, gap], p.word_right[sentence, gap + 1]
        of_left, of_right = self._through((on_left, on_right), out)
        self._add(self.grads.word_left, sentence, gap, of_left)
        self._add(self.grads.word_right, sentence, gap + 1, of_right)

    def word_on_left(
        self, sentence: Tensor, word: Tensor, right: Tensor, kept: Kept, out: Tensor
    ) -> Tensor:
        of_left, of_right = self._through(kept, out)
        self._add(self.grads.word_left, sentence, word, of_left)
        return self._node(self.grads.right, self.potentials.right, of_right, right)

    def word_on_right(
        self, sentence: Tensor, word: Tensor, left: Tensor, kept: Kept, out: Tensor
    ) -> Tensor:
        of_left, of_right = self._through(kept, out)
        self._add(self.grads.word_right, sentence, word, of_right)
        return self._node(self.grads.left, self.potentials.left, of_left, left)

    def two_nodes(
        self, left: Tensor, right: Tensor, kept: Kept, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        of_left, of_right = self._through(kept, out)
        return (
            self._node(self.grads.left, self.potentials.left, of_left, left),
            self._node(self.grads.right, self.potentials.right, of_right, right),
        )

    def _through(self, kept: Kept, out: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the two children's vectors."""
        on_left, on_right = kept
        products, found = on_left * on_right, []
        for part, total in zip(self.potentials.contexts.parts, self.mixture, strict=True):
            here = part.by_context(out.mT, 1).transpose(0, 1)
            total.baddbmm_(here.mT, products[:, part.contexts].transpose(0, 1))
            mixture = part.by_context(self.potentials.mixture, 0)
            found.append(torch.bmm(here, mixture).transpose(0, 1))
        of_products = joined(found, 1)
        return of_products * on_right, of_products * on_left

    def _node(self, total: Tensor, table: Tensor, of_vector: Tensor, child: Tensor) -> Tensor:
        """Hand a child's on, given that of its vector."""
        inner = child[:, : of_vector.shape[1]]
        total.addmm_(of_vector.flatten(0, 1).t(), inner.flatten(0, 1))
        return of_vector @ table

    def _add(self, total: Tensor, sentence: Tensor, word: Tensor, of_vector: Tensor) -> None:
        at = sentence * total.shape[1] + word
        total.flatten(0, 1).index_add_(0, at, of_vector)

    def tables(self) -> tuple[Tensor, ...]:
        parts = self.potentials.contexts.parts
        found = [part.by_label(one, 0) for part, one in zip(parts, self.mixture, strict=True)]
        return self.grads._replace(mixture=joined(found, 0))
