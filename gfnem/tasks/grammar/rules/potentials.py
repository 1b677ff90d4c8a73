"""A grammar's rules with the words of a batch of sentences summed in.

A word needs no recursion: the preterminal above it is summed out as soon as the word is known.
What is left for trees and charts is a recursion over nonterminals alone, with rules that have a
word as left child, as right child or as both, looked up by position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gfnem.tasks.grammar.rules.products import matrix_vector, times_narrow


@dataclass(frozen=True)
class Grammar:
    """Log-probabilities of a PCFG's rules.

    root: S -> A.
    binary: A -> B C; children are nonterminals first, preterminals behind them.
    emission: T -> w.
    """

    root: Float[Tensor, "nonterminals"]
    binary: Float[Tensor, "nonterminals symbols symbols"]
    emission: Float[Tensor, "preterminals vocabulary"]

    @property
    def nonterminals(self) -> int:
        return self.root.shape[0]

    @property
    def preterminals(self) -> int:
        return self.emission.shape[0]

    def potentials(
        self, words: Int[Tensor, "batch length"], lengths: Int[Tensor, "batch"]
    ) -> Potentials:
        """The grammar with the words of a batch summed in, differentiable."""
        return Potentials.of(self, words, lengths)


Same = TypeVar("Same", bound="MergePotentials")


class MergePotentials(ABC):
    """What forests ask of a grammar with the words of a batch of sentences summed in.

    A root's message m[P, A] is the probability of its words given its label A and the context P
    that A's rules see beside it. Contexts are the labels that may stand above, then S; rules that
    see nothing have one context for all.

    of_grammar: names of what is there once for all sentences.
    root, log_scale, log_word, preterminal, lengths: as in `Potentials`.
    """

    of_grammar: ClassVar[set[str]] = {"root", "rules"}
    root: Float[Tensor, "nonterminals"]
    log_scale: Float[Tensor, "batch length"]
    log_word: Float[Tensor, "batch length"]
    preterminal: Float[Tensor, "batch length preterminals"]
    lengths: Int[Tensor, "batch"]

    @property
    def total_log_scale(self) -> Float[Tensor, "batch"]:
        """The sum of log_scale over each sentence's words."""
        position = torch.arange(self.log_scale.shape[1], device=self.lengths.device)
        return (self.log_scale * (position < self.lengths[:, None])).sum(-1)

    def select(self: Same, rows: Int[Tensor, "rows"]) -> Same:
        """The same of chosen sentences, which may repeat."""
        this: Any = self
        of_words = {f.name for f in fields(this)} - self.of_grammar
        return replace(this, **{name: getattr(this, name)[rows] for name in of_words})

    def detach(self: Same) -> Same:
        """The same without gradients."""
        this: Any = self
        return replace(this, **{f.name: getattr(this, f.name).detach() for f in fields(this)})

    @property
    @abstractmethod
    def contexts(self) -> int:
        """How many contexts there are."""

    @abstractmethod
    def two_words(self) -> Float[Tensor, "batch gaps contexts nonterminals"]:
        """Messages over the two words beside each gap, up to the words' scales."""

    @abstractmethod
    def word_on_left(
        self,
        sentence: Int[Tensor, "nodes"],
        word: Int[Tensor, "nodes"],
        right: Float[Tensor, "nodes contexts nonterminals"],
    ) -> Float[Tensor, "nodes contexts nonterminals"]:
        """Messages of merges of a word and a root on its right, up to the word's scale."""

    @abstractmethod
    def word_on_right(
        self,
        sentence: Int[Tensor, "nodes"],
        word: Int[Tensor, "nodes"],
        left: Float[Tensor, "nodes contexts nonterminals"],
    ) -> Float[Tensor, "nodes contexts nonterminals"]:
        """Messages of merges of a root and a word on its right, up to the word's scale."""

    @abstractmethod
    def two_roots(
        self,
        left: Float[Tensor, "nodes contexts nonterminals"],
        right: Float[Tensor, "nodes contexts nonterminals"],
    ) -> Float[Tensor, "nodes contexts nonterminals"]:
        """Messages of merges of two roots."""

    @abstractmethod
    def average(
        self,
        message: Float[Tensor, "*nodes contexts nonterminals"],
        whole: Bool[Tensor, "*nodes"],
        weights: Float[Tensor, "*nodes nonterminals"] | None = None,
    ) -> Float[Tensor, "*nodes nonterminals"]:
        """Messages averaged over contexts.

        whole: whether the words are all of the sentence, above which there is but S.
        weights: of the labels that may stand above, summing to 1; None for equal ones.
        """


@dataclass(frozen=True)
class Potentials(MergePotentials):
    """What a context-free grammar says of the words of a batch of sentences, as probabilities.

    root: p(S -> A).
    rules: p(A -> B C), both children nonterminals.
    left: sum over T of p(A -> T C) p(T -> w_i), word i the left child; indexed [i, A, C].
    right: sum over T of p(A -> B T) p(T -> w_i), word i the right child; indexed [i, A, B].
    both: sum over T and U of p(A -> T U) p(T -> w_i) p(U -> w_i+1).
    log_scale: every p(T -> w_i) above is divided by exp(log_scale[i]), their maximum over T.
    log_word: log of the mean over T of p(T -> w_i).
    preterminal: p(T -> w_i) divided by its sum over T. With the rules it is all that the posterior
        over trees depends on, so it says of a word what there is to know, a rare one's too.
    lengths: words of each sentence; entries behind the sentence are meaningless.
    """

    root: Float[Tensor, "nonterminals"]
    rules: Float[Tensor, "nonterminals nonterminals nonterminals"]
    left: Float[Tensor, "batch length nonterminals nonterminals"]
    right: Float[Tensor, "batch length nonterminals nonterminals"]
    both: Float[Tensor, "batch gaps nonterminals"]
    log_scale: Float[Tensor, "batch length"]
    log_word: Float[Tensor, "batch length"]
    preterminal: Float[Tensor, "batch length preterminals"]
    lengths: Int[Tensor, "batch"]

    @staticmethod
    def of(
        grammar: Grammar, words: Int[Tensor, "batch length"], lengths: Int[Tensor, "batch"]
    ) -> Potentials:
        """Differentiable in the grammar; words of probability zero are allowed."""
        nt, pt = grammar.nonterminals, grammar.preterminals
        log_emission = grammar.emission.t()[words]
        log_scale = log_emission.detach().amax(-1)
        log_scale = torch.where(log_scale.isfinite(), log_scale, 0.0)
        emission = (log_emission - log_scale[..., None]).exp()
        probability = grammar.binary.exp()
        left = emission @ probability[:, nt:, :nt].permute(1, 0, 2).reshape(pt, nt * nt)
        right = emission @ probability[:, :nt, nt:].permute(2, 0, 1).reshape(pt, nt * nt)
        pair = emission[:, :-1] @ probability[:, nt:, nt:].permute(1, 0, 2).reshape(pt, nt * pt)
        both = matrix_vector(pair.unflatten(-1, (nt, pt)), emission[:, 1:])
        mean = emission.mean(-1)
        tiny = torch.finfo(mean.dtype).tiny
        return Potentials(
            root=grammar.root.exp(),
            rules=probability[:, :nt, :nt],
            left=left.unflatten(-1, (nt, nt)),
            right=right.unflatten(-1, (nt, nt)),
            both=both,
            log_scale=log_scale,
            log_word=mean.clamp(min=tiny).log() + log_scale,
            preterminal=emission / (emission.sum(-1, keepdim=True) + tiny),
            lengths=lengths,
        )

    @property
    def contexts(self) -> int:
        return 1

    def two_words(self) -> Float[Tensor, "batch gaps 1 nonterminals"]:
        return self.both[..., None, :]

    def word_on_left(self, sentence: Tensor, word: Tensor, right: Tensor) -> Tensor:
        return right @ self.left[sentence, word].mT

    def word_on_right(self, sentence: Tensor, word: Tensor, left: Tensor) -> Tensor:
        return left @ self.right[sentence, word].mT

    @cached_property
    def _pairs_to_labels(self) -> Float[Tensor, "pairs nonterminals"]:
        return self.rules.flatten(1).t()

    def two_roots(self, left: Tensor, right: Tensor) -> Tensor:
        pairs = (left.mT * right).flatten(1)
        return times_narrow(pairs, self._pairs_to_labels)[:, None]

    def average(self, message: Tensor, whole: Tensor, weights: Tensor | None = None) -> Tensor:
        # Of one context.
        return message.squeeze(-2)
