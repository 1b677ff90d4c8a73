"""What all families of grammars offer: rules, and what they say of the words of a batch.

S -> A; A -> B C given the context of A; T -> w given the context of T. Children are nonterminals
first, preterminals behind them. A context is what the rules see of the label above, S counting as
one: nothing, the label itself or the group that it is in (`Contexts`).

A word needs no recursion: the preterminal above it is summed out as soon as the word is known. What
is left for trees and charts is a recursion over nonterminals alone, by messages (`messages`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import log
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gfnem.tasks.grammar.rules.contexts import Contexts
from gfnem.tasks.grammar.rules.messages import Choose, Kept, MergeGradients, SpanMessages
from gfnem.tasks.grammar.rules.products import matrix_vector

SameGrammar = TypeVar("SameGrammar", bound="Grammar")
SamePotentials = TypeVar("SamePotentials", bound="Potentials")


class Grammar(ABC):
    """Log-probabilities of rules; how those of A -> B C are stored is left to families.

    root: S -> A.
    emission: T -> w given the context of T.

    Raises ValueError for tables that tell different contexts apart.
    """

    root: Float[Tensor, "nonterminals"]
    emission: Float[Tensor, "inner preterminals vocabulary"]

    def __post_init__(self):
        if len(self.emission) != self.contexts.inner:
            raise ValueError(
                f"emission tells {len(self.emission)} contexts apart, binary rules make "
                f"{self.contexts.inner}"
            )

    @property
    def nonterminals(self) -> int:
        return len(self.root)

    @property
    def preterminals(self) -> int:
        return self.emission.shape[1]

    @property
    def contexts(self) -> Contexts:
        """What the rules see of the label above."""
        return Contexts.counted(len(self.under_contexts()), self.nonterminals)

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """Of the binary rules; None where each has a probability of its own."""

    @torch.no_grad()
    def spread(self) -> Float[Tensor, ""]:
        """How far apart log-probabilities of binary rules are that compete, at most.

        Infinitely far where a rule is impossible.
        """
        ranges = (torch.aminmax(table, dim=-1) for table in self.choices())
        widest = [(highest - lowest).amax() for lowest, highest in ranges]
        return torch.stack(widest).amax().nan_to_num(nan=torch.inf)

    def choices(self) -> tuple[Float[Tensor, "*any outcomes"], ...]:
        """Log-probabilities of what binary rules choose from."""
        return (self.under_contexts(),)

    @abstractmethod
    def under_contexts(self) -> Float[Tensor, "contexts nonterminals outcomes"]:
        """Log-probabilities of what a nonterminal becomes under each context."""

    @abstractmethod
    def draw_children(
        self,
        label: Int[Tensor, "rows"],
        context: Int[Tensor, "rows"],
        generator: torch.Generator | None,
    ) -> tuple[Int[Tensor, "rows"], Int[Tensor, "rows"]]:
        """B and C of rules A -> B C."""

    @abstractmethod
    def potentials(
        self, words: Int[Tensor, "batch length"], lengths: Int[Tensor, "batch"]
    ) -> Potentials:
        """With the words summed in, differentiable; words of probability zero are allowed."""

    def map(self: SameGrammar, change: Callable[[Tensor], Tensor]) -> SameGrammar:
        """The same with other tables of log-probabilities."""
        this: Any = self
        return replace(this, **{f.name: change(getattr(this, f.name)) for f in fields(this)})

    def of_any_word(self: SameGrammar) -> SameGrammar:
        """The same with one word in place of the vocabulary, which every preterminal gives."""
        return self.with_emission(torch.zeros_like(self.emission[..., :1]))

    def with_emission(
        self: SameGrammar, emission: Float[Tensor, "inner preterminals vocabulary"]
    ) -> SameGrammar:
        """The same over another vocabulary."""
        this: Any = self
        return replace(this, emission=emission)


class Words(NamedTuple):
    """What preterminals say of words.

    emission: p(T -> w) given the context of T, scaled to maximum 1 for each word.
    log_scale: the scales' logarithms.
    log_word: log of the mean of p(T -> w) over T and its contexts.
    preterminal: that mean over contexts alone, scaled to sum 1 over T.
    """

    emission: Float[Tensor, "inner *words preterminals"]
    log_scale: Float[Tensor, "*words"]
    log_word: Float[Tensor, "*words"]
    preterminal: Float[Tensor, "*words preterminals"]

    @staticmethod
    def of(grammar: Grammar, words: Int[Tensor, "*words"]) -> Words:
        log_emission = grammar.emission.transpose(1, 2)[:, words]
        log_scale = log_emission.detach().amax((0, -1))
        log_scale = torch.where(log_scale.isfinite(), log_scale, 0.0)
        emission = (log_emission - log_scale[..., None]).exp()
        mean = emission.mean(0)
        tiny = torch.finfo(mean.dtype).tiny
        return Words(
            emission=emission,
            log_scale=log_scale,
            log_word=mean.mean(-1).clamp(min=tiny).log() + log_scale,
            preterminal=mean / (mean.sum(-1, keepdim=True) + tiny),
        )


@dataclass(frozen=True)
class Potentials(ABC):
    """A grammar with the words of a batch of sentences summed in, as probabilities.

    root: p(S -> A).
    contexts: what the rules see of the label above.
    preterminal: p(T -> w_i), mean over contexts, divided by its sum over T. With the rules it is
        all that the posterior over trees depends on, so it says of a word what there is to know,
        a rare one's too: what encoders see.
    log_scale: every p(T -> w_i) is divided by exp(log_scale[i]), their maximum.
    log_word: log of the mean over T and contexts of p(T -> w_i).
    lengths: words of each sentence; entries behind the sentence are meaningless.
    words: their ids.
    grammar: what the tables were made of; None where they are averages of its rules.
    spread: `Grammar.spread`.
    """

    # Names of what is there once for all sentences.
    of_grammar: ClassVar[set[str]] = {"root", "contexts", "grammar", "spread"}
    root: Float[Tensor, "nonterminals"]
    contexts: Contexts
    preterminal: Float[Tensor, "batch length preterminals"]
    log_scale: Float[Tensor, "batch length"]
    log_word: Float[Tensor, "batch length"]
    lengths: Int[Tensor, "batch"]
    words: Int[Tensor, "batch length"]
    grammar: Grammar | None
    spread: Float[Tensor, ""]

    @property
    def total_log_scale(self) -> Float[Tensor, "batch"]:
        """The sum of log_scale over each sentence's words."""
        position = torch.arange(self.log_scale.shape[1], device=self.lengths.device)
        return (self.log_scale * (position < self.lengths[:, None])).sum(-1)

    def select(self: SamePotentials, rows: Int[Tensor, "rows"]) -> SamePotentials:
        """The same of chosen sentences, which may repeat."""
        return self._map(lambda table: table[rows], lambda name: name not in self.of_grammar)

    def detach(self: SamePotentials) -> SamePotentials:
        """The same without gradients."""
        detached = self._map(Tensor.detach, lambda name: name not in ("contexts", "grammar"))
        grammar = None if self.grammar is None else self.grammar.map(Tensor.detach)
        return replace(detached, grammar=grammar)

    def of_rules(self) -> Potentials:
        """The same in double precision, where single does not hold the rules one by one."""
        one = torch.ones_like(self.spread)
        return self.in_double(one, one) or self

    def in_double(
        self, least: Float[Tensor, ""], total: Float[Tensor, "trees"]
    ) -> Potentials | None:
        """The same in double precision, where single precision does not do; otherwise None.

        A message holds what is more than `tiny` of its largest value. Of what is lost nothing
        matters as long as rules cannot make up for it, which differ by their `spread` at most, and
        every context has a value far above: sums are then right to e^-14. Asking waits for the
        device.

        least: of all nodes or spans and all contexts, the smallest of their largest values before
            they were scaled.
        total: of whole sentences or trees, the sum of p(S -> A) times their scaled message.
        """
        if self.grammar is None or self.root.dtype == torch.float64:
            return None
        room = -log(torch.finfo(self.root.dtype).tiny) - 14
        if float(torch.maximum(self.spread - least.log(), -total.detach().amin().log())) < room:
            return None
        return self.grammar.map(Tensor.double).potentials(self.words, self.lengths)

    def _map(
        self: SamePotentials, change: Callable[[Tensor], Tensor], chosen: Callable[[str], bool]
    ) -> SamePotentials:
        names = (field.name for field in fields(self) if chosen(field.name))
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    def average(
        self,
        message: Float[Tensor, "*nodes contexts nonterminals"],
        whole: Bool[Tensor, "*nodes"],
        weights: Float[Tensor, "*nodes inner"] | None = None,
    ) -> Float[Tensor, "*nodes nonterminals"]:
        """Messages averaged over the contexts that may stand above.

        whole: whether the words are all of the sentence, above which there is but S.
        weights: of the contexts that labels make, summing to 1; None for equal ones.
        """
        if self.contexts.total == 1:
            return message.squeeze(-2)
        under_s, others = message[..., -1, :], message[..., :-1, :]
        average = others.mean(-2) if weights is None else matrix_vector(others.mT, weights)
        return torch.where(whole[..., None], under_s, average)

    @abstractmethod
    def tables(self) -> tuple[Tensor, ...]:
        """What is differentiable, the root's rules first."""

    @abstractmethod
    def two_words(self) -> Float[Tensor, "batch gaps contexts nonterminals"]:
        """Messages over the two words beside each gap, up to the words' scales."""

    @abstractmethod
    def word_on_left(
        self,
        sentence: Int[Tensor, "nodes"],
        word: Int[Tensor, "nodes"],
        right: Float[Tensor, "nodes contexts nonterminals"],
    ) -> tuple[Float[Tensor, "nodes contexts nonterminals"], Kept]:
        """Messages of merges of a word and a node on its right, up to the word's scale."""

    @abstractmethod
    def word_on_right(
        self,
        sentence: Int[Tensor, "nodes"],
        word: Int[Tensor, "nodes"],
        left: Float[Tensor, "nodes contexts nonterminals"],
    ) -> tuple[Float[Tensor, "nodes contexts nonterminals"], Kept]:
        """Messages of merges of a node and a word on its right, up to the word's scale."""

    @abstractmethod
    def two_nodes(
        self,
        left: Float[Tensor, "nodes contexts nonterminals"],
        right: Float[Tensor, "nodes contexts nonterminals"],
    ) -> tuple[Float[Tensor, "nodes contexts nonterminals"], Kept]:
        """Messages of merges of two nodes."""

    @abstractmethod
    def merge_gradients(self) -> MergeGradients:
        """Gradients of what merges of these potentials give; zero to begin with."""

    @abstractmethod
    def spans(self) -> SpanMessages:
        """Messages of all spans, to be filled in; without gradients."""

    @abstractmethod
    def best_spans(self) -> SpanMessages:
        """The same of each span's best tree alone, maxima in place of sums."""

    @abstractmethod
    def inner_rules(
        self, label: Int[Tensor, "nodes"], context: Int[Tensor, "nodes"]
    ) -> Float[Tensor, "nodes nonterminals nonterminals"]:
        """p(A -> B C) of given A in its context, both children nonterminals."""

    @abstractmethod
    def word_left_rules(
        self,
        sentence: Int[Tensor, "nodes"],
        position: Int[Tensor, "nodes"],
        label: Int[Tensor, "nodes"],
        context: Int[Tensor, "nodes"],
    ) -> Float[Tensor, "nodes nonterminals"]:
        """Sum over T of p(A -> T C) p(T -> w), the word on the left; by C."""

    @abstractmethod
    def word_right_rules(
        self,
        sentence: Int[Tensor, "nodes"],
        position: Int[Tensor, "nodes"],
        label: Int[Tensor, "nodes"],
        context: Int[Tensor, "nodes"],
    ) -> Float[Tensor, "nodes nonterminals"]:
        """Sum over T of p(A -> B T) p(T -> w), the word on the right; by B."""

    @abstractmethod
    def rule_probabilities(
        self,
        sentence: Int[Tensor, "nodes"],
        start: Int[Tensor, "nodes"],
        end: Int[Tensor, "nodes"],
        label: Int[Tensor, "nodes"],
        context: Int[Tensor, "nodes"],
        left: Int[Tensor, "nodes"],
        right: Int[Tensor, "nodes"],
    ) -> Float[Tensor, "nodes"]:
        """Of one rule at each node; a child's label is -1 for the node's first or last word."""

    def draw_pairs(
        self,
        label: Int[Tensor, "nodes"],
        context: Int[Tensor, "nodes"],
        left: Float[Tensor, "nodes nonterminals"],
        right: Float[Tensor, "nodes nonterminals"],
        draw: Choose,
    ) -> tuple[Int[Tensor, "nodes"], Int[Tensor, "nodes"]]:
        """Labels of two children, given the messages of both under the node's label."""
        weights = self.inner_rules(label, context) * left[:, :, None] * right[:, None]
        drawn = draw(weights.flatten(1))
        return drawn // len(self.root), drawn % len(self.root)

    @abstractmethod
    def averaged(
        self,
        weight: Float[Tensor, "ways nonterminals contexts"],
        contexts: Contexts,
        order: Int[Tensor, "nonterminals"],
    ) -> Potentials:
        """Rules that see less: sums over contexts P, in each way with weights that depend on A.

        weight: of each context above each label.
        contexts: what the new rules see, as many in all as there are ways, of labels in the new
            order.
        order: the labels as the new rules have them.
        """
