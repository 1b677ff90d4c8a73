"""Grammars with one probability for each rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gfnem.categorical import sample_categorical
from gfnem.tasks.grammar.rules.contexts import Contexts, Part, joined
from gfnem.tasks.grammar.rules.dense_spans import DenseSpans, DenseTables
from gfnem.tasks.grammar.rules.grammar import Grammar, Potentials, Words
from gfnem.tasks.grammar.rules.messages import Kept, MergeGradients
from gfnem.tasks.grammar.rules.products import matrix_vector, times_narrow
from gfnem.tasks.grammar.rules.same_key import SameKey


@dataclass(frozen=True)
class DenseGrammar(Grammar):
    """One log-probability for each rule.

    binary: A -> B C in context P, indexed [P, A, B, C]. There is one context for all rules, which
        makes the grammar context-free, or one for each label above, S coming last.
    """

    root: Float[Tensor, "nonterminals"]
    binary: Float[Tensor, "contexts nonterminals symbols symbols"]
    emission: Float[Tensor, "inner preterminals vocabulary"]

    @property
    def rank(self) -> None:
        return None

    def under_contexts(self) -> Tensor:
        return self.binary.flatten(2)

    def draw_children(
        self, label: Tensor, context: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        symbols = self.binary.shape[-1]
        rule = sample_categorical(self.binary[context, label].flatten(1).exp(), generator)
        return rule // symbols, rule % symbols

    def potentials(
        self, words: Int[Tensor, "batch length"], lengths: Int[Tensor, "batch"]
    ) -> DensePotentials:
        contexts = self.contexts
        (part,) = contexts.parts
        if contexts.total == 1:
            distinct = words.flatten()
            word = torch.arange(words.numel(), device=words.device).view_as(words)
        else:
            # Tables are large and words come again: every one has a table but once.
            distinct, word = words.unique(return_inverse=True)
        said = Words.of(self, distinct)
        rules, word_inner, inner_word, word_word = _Probabilities.apply(
            self.binary.transpose(0, 1), self.nonterminals
        )

        def of_word(rules: Float[Tensor, "nonterminals preterminals contexts other"]) -> Tensor:
            """[w, A, P, other child] from [A, word's preterminal, P, other child]."""
            table = torch.bmm(said.emission, _by_word(rules, part).flatten(2))
            table = table.unflatten(2, (-1, rules.shape[-1])).transpose(0, 1)
            return part.by_label(table, 1)

        first, second = word[:, :-1].flatten(), word[:, 1:].flatten()
        both = _word_pairs(said.emission, _by_word(word_word, part), first, second)
        both = part.by_label(both, 1).unflatten(0, (len(word), -1))
        return DensePotentials(
            root=self.root.exp(),
            contexts=contexts,
            rules=rules,
            word=word,
            left=of_word(word_inner),
            right=of_word(inner_word),
            both=both,
            preterminal=said.preterminal[word],
            log_scale=said.log_scale[word],
            log_word=said.log_word[word],
            lengths=lengths,
            words=words,
            grammar=self,
            spread=self.spread(),
        )


def _by_word(
    rules: Float[Tensor, "nonterminals preterminals contexts other"], part: Part
) -> Float[Tensor, "inner preterminals size*contexts other"]:
    """Rules with a word as a child, by the context of the word."""
    return part.by_context(rules.transpose(1, 2), 0).transpose(1, 2)


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


def _word_pairs(
    emission: Float[Tensor, "inner words preterminals"],
    rules: Float[Tensor, "inner preterminals heads preterminals"],
    first: Int[Tensor, "pairs"],
    second: Int[Tensor, "pairs"],
) -> Float[Tensor, "pairs inner heads"]:
    """Sum over T and U of emission[c, v, T] rules[c, T, head, U] emission[c, w, U],

    v and w being the first and the second word of each pair.
    """
    if len(emission) > 1:
        return _WordPairs.apply(emission, rules, first, second).transpose(0, 1)
    of_first = emission[0, first] @ rules[0].flatten(1)
    on_first = of_first.unflatten(1, rules.shape[2:])
    return matrix_vector(on_first, emission[0, second])[:, None]


class _WordPairs(torch.autograd.Function):
    """`_word_pairs` of many contexts, which come first.

    Pairs with the same first word are taken together, in groups. Context by context, so that what
    has both heads and U stays small: memory that is seen for the first time costs more than the
    products. Sums over T alone are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, emission, rules, first, second):  # pyright: ignore
        contexts, groups = len(rules), SameKey.of(first)
        kept = contexts if any(ctx.needs_input_grad) else 1
        of_firsts = emission.new_empty(kept, len(groups.key), *rules.shape[2:])
        others = groups.padded(second)
        value = emission.new_empty(contexts, len(first), rules.shape[2])
        for context in range(contexts):
            of_first = of_firsts[context % kept]
            flat = of_first.flatten(1)
            torch.mm(emission[context, groups.key], rules[context].flatten(1), out=flat)
            both = emission[context, others] @ of_first.mT
            value[context, groups.order] = both[groups.group, groups.place]
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
        for context in range(len(rules)):
            on_first = (grads[context].mT @ emission[context, others]).flatten(1)
            on_second = grads[context] @ of_firsts[context].index_select(0, used)
            torch.mm(emission[context, key].t(), on_first, out=grad_rules[context].flatten(1))
            of_key = on_first @ rules[context].flatten(1).t()
            grad_emission[context].index_add_(0, key, of_key)
            grad_emission[context].index_add_(0, others.flatten(), on_second.flatten(0, 1))
        return grad_emission, grad_rules, None, None


@dataclass(frozen=True)
class DensePotentials(Potentials):
    """A dense grammar with the words of a batch summed in. Labels come first, then contexts.

    rules: p(A -> B C), both children nonterminals; indexed [A, P, B, C].
    word: where the tables of each word are in `left` and `right`.
    left: sum over T of p(A -> T C) p(T -> w), word w the left child; indexed [w, A, P, C].
    right: sum over T of p(A -> B T) p(T -> w), word w the right child; indexed [w, A, P, B].
    both: sum over T and U of p(A -> T U) p(T -> w_i) p(U -> w_i+1), indexed [i, A, P].
    """

    of_grammar: ClassVar[set[str]] = Potentials.of_grammar | {"rules", "left", "right"}
    rules: Float[Tensor, "nonterminals contexts nonterminals nonterminals"]
    word: Int[Tensor, "batch length"]
    left: Float[Tensor, "words nonterminals contexts nonterminals"]
    right: Float[Tensor, "words nonterminals contexts nonterminals"]
    both: Float[Tensor, "batch gaps nonterminals contexts"]

    def tables(self) -> tuple[Tensor, ...]:
        return self.root, self.rules, self.left, self.right, self.both

    def spans(self) -> DenseSpans:
        return DenseSpans(self.contexts, self._tables(), best=False)

    def best_spans(self) -> DenseSpans:
        return DenseSpans(self.contexts, self._tables(), best=True)

    def _tables(self) -> DenseTables:
        return DenseTables(self.rules, self.word, self.left, self.right, self.both)

    def two_words(self) -> Tensor:
        return self.both.mT

    def word_on_left(self, sentence: Tensor, word: Tensor, right: Tensor) -> tuple[Tensor, Kept]:
        return self._with_word(self.left[self.word[sentence, word]], right)

    def word_on_right(self, sentence: Tensor, word: Tensor, left: Tensor) -> tuple[Tensor, Kept]:
        return self._with_word(self.right[self.word[sentence, word]], left)

    def _with_word(
        self,
        table: Float[Tensor, "nodes nonterminals contexts nonterminals"],
        child: Float[Tensor, "nodes contexts nonterminals"],
    ) -> tuple[Tensor, Kept]:
        raw = [
            part.by_label(matrix_vector(part.by_context(table, 1), child[:, part.contexts]), 1)
            for part in self.contexts.parts
        ]
        return joined(raw, 1).mT, (table,)

    @cached_property
    def pairs_to_heads(self) -> list[Float[Tensor, "inner pairs size*contexts"]]:
        """Rules by the context of the children, of each part."""
        return [part.by_context(self.rules, 0).flatten(2).mT for part in self.contexts.parts]

    def two_nodes(self, left: Tensor, right: Tensor) -> tuple[Tensor, Kept]:
        raw = []
        for part, rules in zip(self.contexts.parts, self.pairs_to_heads, strict=True):
            of_pairs = times_narrow(pairs(left[:, part.contexts], right[:, part.contexts]), rules)
            raw.append(part.by_label(of_pairs.transpose(0, 1), 1))
        return joined(raw, 1).mT, ()

    def merge_gradients(self) -> DenseMergeGradients:
        return DenseMergeGradients(self)

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

    def averaged(self, weight: Tensor, contexts: Contexts, order: Tensor) -> DensePotentials:
        weight = weight.transpose(0, 1)

        def of_words(table: Tensor) -> Tensor:
            # Labels first, as in memory, so that nothing is copied.
            return (weight[:, None] @ table.transpose(0, 1)).transpose(0, 1)

        averaged = replace(
            self,
            grammar=None,
            rules=torch.einsum("apbc,awp->awbc", self.rules, weight),
            left=of_words(self.left),
            right=of_words(self.right),
            both=torch.einsum("niap,awp->niaw", self.both, weight),
        )
        return averaged.reordered(contexts, order)

    def reordered(self, contexts: Contexts, order: Int[Tensor, "nonterminals"]) -> DensePotentials:
        """The same with other labels first; contexts: of the labels in their new order."""
        if contexts.total == 1:
            return replace(self, contexts=contexts)
        return replace(
            self,
            contexts=contexts,
            root=self.root[order],
            rules=self.rules[order][:, :, order][..., order],
            left=self.left[:, order][..., order],
            right=self.right[:, order][..., order],
            both=self.both[:, :, order],
        )


def pairs(
    left: Float[Tensor, "nodes contexts nonterminals"],
    right: Float[Tensor, "nodes contexts nonterminals"],
) -> Float[Tensor, "contexts nodes nonterminals*nonterminals"]:
    """Messages of two children in each context, which comes first."""
    left, right = left.transpose(0, 1), right.transpose(0, 1)
    return (left[..., None] * right[..., None, :]).flatten(2)


class DenseMergeGradients(MergeGradients):
    """Gradients of a word's tables are summed at the end, all nodes of a word at once."""

    def __init__(self, potentials: DensePotentials):
        self.potentials = potentials
        self.parts = potentials.contexts.parts
        self.rules = [torch.zeros_like(rules.mT) for rules in potentials.pairs_to_heads]
        self.both = torch.zeros_like(potentials.both).flatten(0, 1)
        # Of each merge with a word: where its table is, what is above and what is beside it.
        self.on_left: list[tuple[Tensor, Tensor, Tensor]] = []
        self.on_right: list[tuple[Tensor, Tensor, Tensor]] = []

    def two_words(self, sentence: Tensor, gap: Tensor, out: Tensor) -> None:
        gaps = self.potentials.both.shape[1]
        self.both.index_add_(0, sentence * gaps + gap, out.mT)

    def word_on_left(
        self, sentence: Tensor, word: Tensor, right: Tensor, kept: Kept, out: Tensor
    ) -> Tensor:
        self.on_left.append((self.potentials.word[sentence, word], out.mT, right))
        return self._through(kept, out)

    def word_on_right(
        self, sentence: Tensor, word: Tensor, left: Tensor, kept: Kept, out: Tensor
    ) -> Tensor:
        self.on_right.append((self.potentials.word[sentence, word], out.mT, left))
        return self._through(kept, out)

    def _through(self, kept: Kept, out: Tensor) -> Tensor:
        (table,) = kept
        found = [
            matrix_vector(part.by_context(table, 1).mT, part.by_context(out.mT, 1))
            for part in self.parts
        ]
        return joined(found, 1)

    def two_nodes(
        self, left: Tensor, right: Tensor, kept: Kept, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        on_left, on_right, labels = [], [], left.shape[-1]
        for part, total in zip(self.parts, self.rules, strict=True):
            rules = part.by_context(self.potentials.rules, 0).flatten(2)
            here = part.by_context(out.mT, 1).transpose(0, 1)
            a, b = left[:, part.contexts], right[:, part.contexts]
            total.baddbmm_(here.mT, pairs(a, b))
            pair = torch.bmm(here, rules).unflatten(2, (labels, labels))
            on_left.append(matrix_vector(pair, b.transpose(0, 1)).transpose(0, 1))
            on_right.append(matrix_vector(pair.mT, a.transpose(0, 1)).transpose(0, 1))
        return joined(on_left, 1), joined(on_right, 1)

    def tables(self) -> tuple[Tensor, ...]:
        p = self.potentials
        labels = len(p.root)
        rules = [
            part.by_label(total, 0).unflatten(2, (labels, labels))
            for part, total in zip(self.parts, self.rules, strict=True)
        ]
        return (
            joined(rules, 0),
            self._of_words(self.on_left, p.left),
            self._of_words(self.on_right, p.right),
            self.both.view_as(p.both),
        )

    def _of_words(self, merges: list[tuple[Tensor, Tensor, Tensor]], table: Tensor) -> Tensor:
        if not merges:
            return torch.zeros_like(table)
        word, above, beside = (torch.cat(fields) for fields in zip(*merges, strict=True))
        found = [
            part.by_label(
                summed_products(
                    part.by_context(above, 1), beside[:, part.contexts], word, len(table)
                ),
                1,
            )
            for part in self.parts
        ]
        return joined(found, 1)


def summed_products(
    above: Float[Tensor, "nodes contexts heads"],
    below: Float[Tensor, "nodes contexts nonterminals"],
    table: Int[Tensor, "nodes"],
    tables: int,
) -> Float[Tensor, "tables contexts heads nonterminals"]:
    """Sum over the nodes of each table of above[c, head] below[c, C].

    The nodes of a table are taken together in groups, each a product of two matrices.
    """
    groups = SameKey.of(table)
    # Contexts come first, as in the tables' memory.
    left, right = groups.padded(above).permute(2, 0, 3, 1), groups.padded(below).permute(2, 0, 1, 3)
    products = left @ right
    total = above.new_zeros(below.shape[1], tables, *products.shape[2:])
    return total.index_add_(1, groups.key, products).transpose(0, 1)
