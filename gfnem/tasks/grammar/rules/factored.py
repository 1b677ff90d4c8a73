"""Grammars whose rules see the parent and are of low rank.

    p(B C | A, P) = sum over r of p(r | A, P) p(B | r) p(C | r):

few numbers for many symbols. Whatever is below a child, a word or a tree, is to a parent with label
A one vector over r, and two children's vectors are multiplied entry by entry. So nothing with
an index for both children is ever needed; words are children like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.categorical import sample_categorical
from gfnem.tasks.grammar.rules.annotated import (
    AnnotatedGrammar,
    AveragedRules,
    ContextPotentials,
    mean_log_word,
    mean_preterminal,
)


@dataclass(frozen=True)
class LowRankGrammar(AnnotatedGrammar):
    """A mixture of products, as log-probabilities.

    mixture: log p(r | A, P), indexed [P, A, r].
    left, right: log p(B | r) and log p(C | r).
    """

    root: Float[Tensor, "nonterminals"]
    mixture: Float[Tensor, "contexts nonterminals rank"]
    left: Float[Tensor, "rank symbols"]
    right: Float[Tensor, "rank symbols"]
    emission: Float[Tensor, "nonterminals preterminals vocabulary"]

    def under_parents(self) -> Tensor:
        return self.mixture

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
    ) -> FactoredPotentials:
        emission, log_scale = self._emissions(words)
        # Split, not sliced: the gradient of a slice is as large as what it is cut from.
        (left, word_left), (right, word_right) = (
            table.exp().tensor_split([self.nonterminals], 1) for table in (self.left, self.right)
        )

        def of_words(table: Float[Tensor, "rank preterminals"]) -> Tensor:
            vectors = emission.flatten(0, 2) @ table.t()
            return vectors.unflatten(0, emission.shape[:3]).permute(1, 2, 0, 3)

        return FactoredPotentials(
            root=self.root.exp(),
            mixture=self.mixture.transpose(0, 1).exp(),
            left=left,
            right=right,
            word_left=of_words(word_left),
            word_right=of_words(word_right),
            preterminal=mean_preterminal(emission),
            log_scale=log_scale,
            log_word=mean_log_word(emission, log_scale),
            lengths=lengths,
        )


@dataclass(frozen=True)
class FactoredPotentials(ContextPotentials):
    """What a grammar of low rank says of the words of a batch of sentences, as probabilities.

    mixture: p(r | A, P), indexed [A, P, r].
    left, right: p(B | r) and p(C | r) of nonterminals.
    word_left: sum over T of p(T | r) p(T -> w_i | T, A), word i the left child; indexed [i, A, r].
    word_right: the same with word i the right child.
    root, preterminal, log_scale, log_word, lengths: see `ContextPotentials`.
    """

    of_grammar: ClassVar[set[str]] = {"root", "mixture", "left", "right"}
    root: Float[Tensor, "nonterminals"]
    mixture: Float[Tensor, "nonterminals contexts rank"]
    left: Float[Tensor, "rank nonterminals"]
    right: Float[Tensor, "rank nonterminals"]
    word_left: Float[Tensor, "batch length nonterminals rank"]
    word_right: Float[Tensor, "batch length nonterminals rank"]
    preterminal: Float[Tensor, "batch length preterminals"]
    log_scale: Float[Tensor, "batch length"]
    log_word: Float[Tensor, "batch length"]
    lengths: Int[Tensor, "batch"]

    @property
    def contexts(self) -> int:
        return self.mixture.shape[1]

    def two_words(self) -> Float[Tensor, "batch gaps contexts nonterminals"]:
        products = self.word_left[:, :-1] * self.word_right[:, 1:]
        return self._messages(products.flatten(0, 1)).unflatten(0, products.shape[:2])

    def word_on_left(self, sentence: Tensor, word: Tensor, right: Tensor) -> Tensor:
        # The label of the merged root is the other one's context, which S never is.
        on_right = right[:, :-1] @ self.right.t()
        return self._messages(self.word_left[sentence, word] * on_right)

    def word_on_right(self, sentence: Tensor, word: Tensor, left: Tensor) -> Tensor:
        on_left = left[:, :-1] @ self.left.t()
        return self._messages(on_left * self.word_right[sentence, word])

    def two_roots(self, left: Tensor, right: Tensor) -> Tensor:
        return self._messages((left[:, :-1] @ self.left.t()) * (right[:, :-1] @ self.right.t()))

    def _messages(
        self, products: Float[Tensor, "nodes nonterminals rank"]
    ) -> Float[Tensor, "nodes contexts nonterminals"]:
        """Of the products of two children's vectors."""
        return torch.bmm(products.transpose(0, 1), self.mixture.mT).permute(1, 2, 0)

    def inner_rules(self, label: Tensor, context: Tensor) -> Tensor:
        return (self.mixture[label, context][:, None] * self.left.t()) @ self.right

    def word_left_rules(
        self, sentence: Tensor, position: Tensor, label: Tensor, context: Tensor
    ) -> Tensor:
        return (self.mixture[label, context] * self.word_left[sentence, position, label]) @ (
            self.right
        )

    def word_right_rules(
        self, sentence: Tensor, position: Tensor, label: Tensor, context: Tensor
    ) -> Tensor:
        return (self.mixture[label, context] * self.word_right[sentence, position, label]) @ (
            self.left
        )

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
        def vector(child: Tensor, table: Tensor, words: Tensor, position: Tensor) -> Tensor:
            of_word = words[sentence, position, label]
            return torch.where(child[:, None] < 0, of_word, table.t()[child.clamp(min=0)])

        on_left = vector(left, self.left, self.word_left, start)
        on_right = vector(right, self.right, self.word_right, end - 1)
        return (self.mixture[label, context] * on_left * on_right).sum(-1)

    def averaged(self, weight: Tensor) -> AveragedRules:
        mixture = torch.einsum("apr,wap->awr", self.mixture, weight)
        on_left = mixture * self.word_left[..., None, :]
        on_right = mixture * self.word_right[..., None, :]
        return AveragedRules(
            rules=(mixture[..., None, :] * self.left.t()) @ self.right,
            left=on_left @ self.right,
            right=on_right @ self.left,
            both=(on_left[:, :-1] * self.word_right[:, 1:, :, None]).sum(-1),
        )
