"""Grammars whose rules see the parent of their left-hand side, with a batch's words summed in.

A rule's context is the symbol above its left-hand side: a nonterminal, or S, which comes last. A
nonterminal together with its context makes such a grammar context-free, so that it has an inside
algorithm. The context of a word's preterminal is the left-hand side of the rule that made it;
hence words are summed out as in `potentials`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gfnem.categorical import sample_categorical
from gfnem.tasks.grammar.rules.potentials import MergePotentials, Potentials
from gfnem.tasks.grammar.rules.products import matrix_vector, times_narrow
from gfnem.tasks.grammar.rules.same_key import SameKey


class AveragedRules(NamedTuple):
    """Rules as in `Potentials`, each averaged over contexts in several ways."""

    rules: Float[Tensor, "nonterminals ways nonterminals nonterminals"]
    left: Float[Tensor, "batch length nonterminals ways nonterminals"]
    right: Float[Tensor, "batch length nonterminals ways nonterminals"]
    both: Float[Tensor, "batch gaps nonterminals ways"]


class ContextPotentials(MergePotentials):
    """What a grammar whose rules see their context says of the words of a batch of sentences.

    Contexts are nonterminals, then S. How rules are stored is left to subclasses.

    preterminal: p(T -> w_i | T, A), mean over A, divided by its sum over T: what encoders see.
    log_scale: every p(T -> w_i | T, A) is divided by exp(log_scale[i]), their maximum.
    log_word: log of the mean over T and A of p(T -> w_i | T, A).
    root, lengths: as in `Potentials`.
    """

    def average(self, message: Tensor, whole: Tensor, weights: Tensor | None = None) -> Tensor:
        under_s, others = message[..., -1, :], message[..., :-1, :]
        average = others.mean(-2) if weights is None else matrix_vector(others.mT, weights)
        return torch.where(whole[..., None], under_s, average)

    @abstractmethod
    def inner_rules(
        self, label: Int[Tensor, "spans"], context: Int[Tensor, "spans"]
    ) -> Float[Tensor, "spans nonterminals nonterminals"]:
        """p(A -> B C | A, P) of given A and P, both children nonterminals."""

    @abstractmethod
    def word_left_rules(
        self,
        sentence: Int[Tensor, "spans"],
        position: Int[Tensor, "spans"],
        label: Int[Tensor, "spans"],
        context: Int[Tensor, "spans"],
    ) -> Float[Tensor, "spans nonterminals"]:
        """Sum over T of p(A -> T C | A, P) p(T -> w | T, A), the word on the left; by C."""

    @abstractmethod
    def word_right_rules(
        self,
        sentence: Int[Tensor, "spans"],
        position: Int[Tensor, "spans"],
        label: Int[Tensor, "spans"],
        context: Int[Tensor, "spans"],
    ) -> Float[Tensor, "spans nonterminals"]:
        """Sum over T of p(A -> B T | A, P) p(T -> w | T, A), the word on the right; by B."""

    @abstractmethod
    def rule_probabilities(
        self,
        sentence: Int[Tensor, "spans"],
        start: Int[Tensor, "spans"],
        end: Int[Tensor, "spans"],
        label: Int[Tensor, "spans"],
        context: Int[Tensor, "spans"],
        left: Int[Tensor, "spans"],
        right: Int[Tensor, "spans"],
    ) -> Float[Tensor, "spans"]:
        """Of one rule for each span; a child's label is -1 for the span's first or last word."""

    @abstractmethod
    def averaged(self, weight: Float[Tensor, "ways nonterminals contexts"]) -> AveragedRules:
        """Sums over contexts P, in each way with weights that depend on A and P."""


@dataclass(frozen=True)
class AnnotatedPotentials(ContextPotentials):
    """What an annotated grammar says of the words of a batch of sentences, as probabilities.

    Contexts are nonterminals, then S. Labels come first, as each has rules of its own.

    root: p(S -> A).
    rules: p(A -> B C | A, P), both children nonterminals; indexed [A, P, B, C].
    word: where the tables of each word are in `left` and `right`, which hold every distinct word
        of the batch once.
    left: sum over T of p(A -> T C | A, P) p(T -> w | T, A), word w the left child; indexed
        [w, A, P, C].
    right: sum over T of p(A -> B T | A, P) p(T -> w | T, A), word w the right child; indexed
        [w, A, P, B].
    both: sum over T and U of p(A -> T U | A, P) p(T -> w_i | T, A) p(U -> w_i+1 | U, A).
    preterminal: p(T -> w_i | T, A), mean over A, divided by its sum over T: what encoders see.
    log_scale: every p(T -> w_i | T, A) above is divided by exp(log_scale[i]), their maximum.
    log_word: log of the mean over T and A of p(T -> w_i | T, A).
    lengths: words of each sentence; entries behind the sentence are meaningless.
    """

    of_grammar: ClassVar[set[str]] = {"root", "rules", "left", "right"}
    root: Float[Tensor, "nonterminals"]
    rules: Float[Tensor, "nonterminals contexts nonterminals nonterminals"]
    word: Int[Tensor, "batch length"]
    left: Float[Tensor, "words nonterminals contexts nonterminals"]
    right: Float[Tensor, "words nonterminals contexts nonterminals"]
    both: Float[Tensor, "batch gaps nonterminals contexts"]
    preterminal: Float[Tensor, "batch length preterminals"]
    log_scale: Float[Tensor, "batch length"]
    log_word: Float[Tensor, "batch length"]
    lengths: Int[Tensor, "batch"]

    @staticmethod
    def of_context_free(potentials: Potentials) -> AnnotatedPotentials:
        """Rules that see no parent as rules that have one context; views."""
        places = potentials.log_scale
        return AnnotatedPotentials(
            root=potentials.root,
            rules=potentials.rules[:, None],
            word=torch.arange(places.numel(), device=places.device).view_as(places),
            left=potentials.left.flatten(0, 1)[..., None, :],
            right=potentials.right.flatten(0, 1)[..., None, :],
            both=potentials.both[..., None],
            preterminal=potentials.preterminal,
            log_scale=potentials.log_scale,
            log_word=potentials.log_word,
            lengths=potentials.lengths,
        )

    @property
    def contexts(self) -> int:
        return self.rules.shape[1]

    def two_words(self) -> Float[Tensor, "batch gaps contexts nonterminals"]:
        return self.both.mT

    def word_on_left(self, sentence: Tensor, word: Tensor, right: Tensor) -> Tensor:
        # The label of the merged root is the other one's context, which S never is.
        return matrix_vector(self.left[self.word[sentence, word]], right[:, :-1]).mT

    def word_on_right(self, sentence: Tensor, word: Tensor, left: Tensor) -> Tensor:
        return matrix_vector(self.right[self.word[sentence, word]], left[:, :-1]).mT

    @cached_property
    def _pairs_to_contexts(self) -> Float[Tensor, "nonterminals pairs contexts"]:
        return self.rules.flatten(2).mT

    def two_roots(self, left: Tensor, right: Tensor) -> Tensor:
        pairs = (left[:, :-1, :, None] * right[:, :-1, None]).flatten(2)
        return times_narrow(pairs.transpose(0, 1), self._pairs_to_contexts).permute(1, 2, 0)

    def inner_rules(self, label: Tensor, context: Tensor) -> Tensor:
        return self.rules[label, context]

    def word_left_rules(
        self, sentence: Tensor, position: Tensor, label: Tensor, context: Tensor
    ) -> Tensor:
        return self.left[self.word[sentence, position], label, context]

    def word_right_rules(
        self, sentence: Tensor, position: Tensor, label: Tensor, context: Tensor
    ) -> Tensor:
        return self.right[self.word[sentence, position], label, context]

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
        word_left, word_right = left < 0, right < 0
        first, last = self.word[sentence, start], self.word[sentence, end - 1]
        kinds = (
            (word_left & word_right, self.both, (sentence, start, label, context)),
            (word_left & ~word_right, self.left, (first, label, context, right)),
            (~word_left & word_right, self.right, (last, label, context, left)),
            (~word_left & ~word_right, self.rules, (label, context, left, right)),
        )
        probability = self.rules.new_zeros(label.shape)
        for chosen, table, at in kinds:
            values = table[tuple(index[chosen] for index in at)]
            probability = probability.masked_scatter(chosen, values)
        return probability

    def averaged(self, weight: Tensor) -> AveragedRules:
        def of_words(table: Tensor) -> Tensor:
            # Labels first, as in memory, so that nothing is copied.
            return (weight[:, None] @ table.transpose(0, 1)).transpose(0, 1)[self.word]

        weight = weight.transpose(0, 1)
        return AveragedRules(
            rules=torch.einsum("apbc,awp->awbc", self.rules, weight),
            left=of_words(self.left),
            right=of_words(self.right),
            both=torch.einsum("niap,awp->niaw", self.both, weight),
        )


class AnnotatedGrammar(ABC):
    """Log-probabilities of the rules of a grammar that sees the parent.

    S -> A; A -> B C given the context of A; T -> w given the nonterminal above T. Children are
    nonterminals first, preterminals behind them.
    """

    root: Float[Tensor, "nonterminals"]
    emission: Float[Tensor, "nonterminals preterminals vocabulary"]

    @property
    def nonterminals(self) -> int:
        return self.emission.shape[0]

    @property
    def preterminals(self) -> int:
        return self.emission.shape[1]

    @abstractmethod
    def under_parents(self) -> Float[Tensor, "contexts nonterminals outcomes"]:
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
    ) -> ContextPotentials:
        """With the words summed in, differentiable; words of probability zero are allowed."""

    def _emissions(
        self, words: Int[Tensor, "*words"]
    ) -> tuple[Float[Tensor, "nonterminals *words preterminals"], Float[Tensor, "*words"]]:
        """p(T -> w | T, A), scaled to maximum 1 for each word, and the scales' logarithms."""
        log_emission = self.emission.transpose(1, 2)[:, words]
        log_scale = log_emission.detach().amax((0, -1))
        log_scale = torch.where(log_scale.isfinite(), log_scale, 0.0)
        return (log_emission - log_scale[..., None]).exp(), log_scale


def mean_preterminal(
    emission: Float[Tensor, "nonterminals *words preterminals"],
) -> Float[Tensor, "*words preterminals"]:
    """`ContextPotentials.preterminal`."""
    mean = emission.mean(0)
    return mean / (mean.sum(-1, keepdim=True) + torch.finfo(mean.dtype).tiny)


def mean_log_word(
    emission: Float[Tensor, "nonterminals *words preterminals"],
    log_scale: Float[Tensor, "*words"],
) -> Float[Tensor, "*words"]:
    """`ContextPotentials.log_word`."""
    mean = emission.mean((0, -1))
    return mean.clamp(min=torch.finfo(mean.dtype).tiny).log() + log_scale


class _Probabilities(torch.autograd.Function):
    """Probabilities of rules [A, P, left child, right child], apart by which children are words.

    Both nonterminals, [A, P, B, C]; the left a word, [A, T, P, C]; the right a word, [A, U, P, B];
    both words, [A, T, P, U]. Each is written where the products that follow want it, and so is its
    gradient: the rules are many and every copy of them shows.
    """

    @staticmethod
    def forward(ctx, log_rules: Tensor, nonterminals: int):  # pyright: ignore
        # In place once they are in order: CPUs take twice as long for both at once.
        parts = tuple(
            view.clone(memory_format=torch.contiguous_format).exp_()
            for view in _Probabilities._views(log_rules, nonterminals)
        )
        ctx.save_for_backward(*parts)
        ctx.nonterminals, ctx.shape = nonterminals, log_rules.shape
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):  # pyright: ignore
        total = grads[0].new_empty(ctx.shape)
        views = _Probabilities._views(total, ctx.nonterminals)
        for view, part, grad in zip(views, ctx.saved_tensors, grads, strict=True):
            torch.mul(part, grad, out=view)
        return total, None

    @staticmethod
    def _views(rules: Tensor, nonterminals: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inner, word = slice(nonterminals), slice(nonterminals, None)
        return (
            rules[:, :, inner, inner],
            rules[:, :, word, inner].transpose(1, 2),
            rules[:, :, inner, word].permute(0, 3, 1, 2),
            rules[:, :, word, word].transpose(1, 2),
        )


class _WordPairs(torch.autograd.Function):
    """Sum over T and U of emission[A, v, T] rules[A, T, P, U] emission[A, w, U], indexed [A, i, P],
    v and w being the first and the second word of the pair i.

    Pairs with the same first word are taken together, in groups. Label by label, so that what has
    both P and U stays small: memory that is seen for the first time costs more than the products.
    Sums over T alone are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, emission, rules, first, second):  # pyright: ignore
        labels, groups = len(rules), SameKey.of(first)
        kept = labels if any(ctx.needs_input_grad) else 1
        of_firsts = emission.new_empty(kept, len(groups.key), *rules.shape[2:])
        others = groups.padded(second)
        value = emission.new_empty(labels, len(first), rules.shape[2])
        for label in range(labels):
            of_first = of_firsts[label % kept]
            flat = of_first.flatten(1)
            torch.mm(emission[label, groups.key], rules[label].flatten(1), out=flat)
            both = emission[label, others] @ of_first.mT
            value[label, groups.order] = both[groups.group, groups.place]
        ctx.save_for_backward(emission, rules, of_firsts, others)
        ctx.groups = groups
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore
        emission, rules, of_firsts, others = ctx.saved_tensors
        groups: SameKey = ctx.groups
        grads = groups.padded(grad, 1)
        # Pairs that are together in no tree have no gradient.
        used = grads.ne(0).any(-1).any(-1).any(0).nonzero().squeeze(-1)
        key, others, grads = groups.key[used], others[used], grads[:, used]
        grad_emission, grad_rules = torch.zeros_like(emission), torch.empty_like(rules)
        for label in range(len(rules)):
            on_first = (grads[label].mT @ emission[label, others]).flatten(1)
            on_second = grads[label] @ of_firsts[label].index_select(0, used)
            torch.mm(emission[label, key].t(), on_first, out=grad_rules[label].flatten(1))
            grad_emission[label].index_add_(0, key, on_first @ rules[label].flatten(1).t())
            grad_emission[label].index_add_(0, others.flatten(), on_second.flatten(0, 1))
        return grad_emission, grad_rules, None, None


@dataclass(frozen=True)
class DenseGrammar(AnnotatedGrammar):
    """One log-probability for each rule: binary[P, A, B, C]."""

    root: Float[Tensor, "nonterminals"]
    binary: Float[Tensor, "contexts nonterminals symbols symbols"]
    emission: Float[Tensor, "nonterminals preterminals vocabulary"]

    def under_parents(self) -> Tensor:
        return self.binary.flatten(2)

    def draw_children(
        self, label: Tensor, context: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        symbols = self.binary.shape[-1]
        rule = sample_categorical(self.binary[context, label].flatten(1).exp(), generator)
        return rule // symbols, rule % symbols

    def potentials(
        self, words: Int[Tensor, "batch length"], lengths: Int[Tensor, "batch"]
    ) -> AnnotatedPotentials:
        # Tables are large and words come again: every one has a table but once.
        words, word = words.unique(return_inverse=True)
        emission, log_scale = self._emissions(words)
        gaps = torch.Size((len(word), word.shape[1] - 1))
        rules, word_inner, inner_word, word_word = _Probabilities.apply(
            self.binary.transpose(0, 1), self.nonterminals
        )

        def of_word(rules: Tensor) -> Tensor:
            """[w, A, P, other child] from [A, word's preterminal, P, other child]."""
            table = torch.bmm(emission, rules.flatten(2))
            return table.unflatten(2, rules.shape[2:]).transpose(0, 1)

        left = of_word(word_inner)
        right = of_word(inner_word)
        both = _WordPairs.apply(emission, word_word, word[:, :-1].flatten(), word[:, 1:].flatten())
        both = both.unflatten(1, gaps).permute(1, 2, 0, 3)
        return AnnotatedPotentials(
            root=self.root.exp(),
            rules=rules,
            word=word,
            left=left,
            right=right,
            both=both,
            preterminal=mean_preterminal(emission)[word],
            log_scale=log_scale[word],
            log_word=mean_log_word(emission, log_scale)[word],
            lengths=lengths,
        )
