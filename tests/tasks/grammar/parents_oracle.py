"""A grammar whose rules see the parent by brute force; see `oracle`, whose trees these are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp

import torch
from torch import Tensor

from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.rules.low_rank import LowRankGrammar
from tests.tasks.grammar import oracle
from tests.tasks.grammar.oracle import LabelledTree, Shape


def random_grammar(
    nonterminals: int = 3,
    preterminals: int = 3,
    vocabulary: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    temperature: float = 1.0,
) -> DenseGrammar:
    """Normalised random rules; a low temperature makes them peaked. Same rules in any dtype."""
    draw = _log_probabilities(seed, dtype, temperature)
    symbols = nonterminals + preterminals
    return DenseGrammar(
        root=draw(nonterminals),
        binary=draw(nonterminals + 1, nonterminals, symbols**2).unflatten(-1, (symbols, symbols)),
        emission=draw(nonterminals, preterminals, vocabulary),
    )


def random_low_rank_grammar(
    nonterminals: int = 3, preterminals: int = 3, rank: int = 4, vocabulary: int = 8, seed: int = 0
) -> LowRankGrammar:
    draw = _log_probabilities(seed, torch.float64, 1.0)
    return LowRankGrammar(
        root=draw(nonterminals),
        mixture=draw(nonterminals + 1, nonterminals, rank),
        left=draw(rank, nonterminals + preterminals),
        right=draw(rank, nonterminals + preterminals),
        emission=draw(nonterminals, preterminals, vocabulary),
    )


def as_dense(grammar: LowRankGrammar) -> DenseGrammar:
    """The same rules one by one."""
    left, right = grammar.left.exp(), grammar.right.exp()
    binary = torch.einsum("par,rb,rc->pabc", grammar.mixture.exp(), left, right)
    return DenseGrammar(grammar.root, binary.log(), grammar.emission)


def _log_probabilities(seed: int, dtype: torch.dtype, temperature: float):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        logits = torch.randn(*shape, generator=generator, dtype=torch.float64) / temperature
        return logits.log_softmax(-1).to(dtype)

    return draw


def with_gradients(grammar: DenseGrammar) -> list[Tensor]:
    """Its rules as leaves: root, binary and emission."""
    rules = (grammar.root, grammar.binary, grammar.emission)
    return [rule.clone().requires_grad_() for rule in rules]


class Rules:
    """root[A], binary[P][A][B][C] and emission[A][T][w] as nested lists; S is the last P."""

    def __init__(self, grammar: DenseGrammar):
        self.root = grammar.root.double().exp().tolist()
        self.binary = grammar.binary.double().exp().tolist()
        self.emission = grammar.emission.double().exp().tolist()

    def nodes(
        self, words: Sequence[int], tree: LabelledTree
    ) -> Iterator[tuple[int, int, list[tuple[int, int, list[int], float]]]]:
        """Each node's context P and label A, and the ways (B, C, words below, p) to expand it."""
        nonterminals = len(self.root)

        def below(i: int, j: int) -> list[tuple[int, list[int]]]:
            if j - i > 1:
                return [(label[i, j], [])]
            return [(nonterminals + t, [i]) for t in range(len(self.emission[0]))]

        label = {(i, j): a for i, j, a in tree}
        for i, k, j in oracle.splits(frozenset(label)):
            a = label[i, j]
            around = [span for span in label if span[0] <= i and j <= span[1] and span != (i, j)]
            parent = min(around, key=lambda span: span[1] - span[0], default=None)
            context = nonterminals if parent is None else label[parent]
            ways = []
            for b, on_left in below(i, k):
                for c, on_right in below(k, j):
                    probability = self.binary[context][a][b][c]
                    for symbol, word in ((b, on_left), (c, on_right)):
                        for position in word:
                            row = self.emission[a][symbol - nonterminals]
                            probability *= row[words[position]]
                    ways.append((b, c, on_left + on_right, probability))
            yield context, a, ways

    def joint(self, words: Sequence[int], tree: LabelledTree) -> float:
        """p(x, z), preterminals summed out word by word."""
        (top,) = (a for i, j, a in tree if (i, j) == (0, len(words)))
        probability = self.root[top]
        for _, _, ways in self.nodes(words, tree):
            probability *= sum(p for *_, p in ways)
        return probability


def enumerate_labelled(grammar: DenseGrammar, words: Sequence[int]) -> dict[LabelledTree, float]:
    """log p(x, z) of every labelled tree over the sentence."""
    rules = Rules(grammar)
    return {
        tree: oracle.log_or_inf(rules.joint(words, tree))
        for tree in oracle.labelled_trees(len(words), grammar.nonterminals)
    }


def enumerate_shapes(grammar: DenseGrammar, words: Sequence[int]) -> dict[Shape, float]:
    """log p(x, shape) of every shape over the sentence, labels summed out."""
    total = dict.fromkeys(oracle.shapes(len(words)), 0.0)
    for tree, log_joint in enumerate_labelled(grammar, words).items():
        total[oracle.shape_of(tree)] += exp(log_joint)
    return {shape: oracle.log_or_inf(probability) for shape, probability in total.items()}


def log_partition(grammar: DenseGrammar, words: Sequence[int]) -> float:
    """log p(x)."""
    return oracle.log_or_inf(sum(exp(p) for p in enumerate_labelled(grammar, words).values()))


def expected_counts(grammar: DenseGrammar, words: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """How often root rules, binary rules and emissions are used, expected given the sentence."""
    rules = Rules(grammar)
    root, binary, emission = (
        torch.zeros_like(rule, dtype=torch.float64)
        for rule in (grammar.root, grammar.binary, grammar.emission)
    )
    for tree, probability in oracle.posterior(enumerate_labelled(grammar, words)).items():
        if probability == 0:
            continue
        (top,) = (a for i, j, a in tree if (i, j) == (0, len(words)))
        root[top] += probability
        for context, a, ways in rules.nodes(words, tree):
            total = sum(p for *_, p in ways)
            for b, c, positions, p in ways:
                share = probability * p / total
                binary[context, a, b, c] += share
                symbols = [s - grammar.nonterminals for s in (b, c) if s >= grammar.nonterminals]
                for symbol, position in zip(symbols, positions, strict=True):
                    emission[a, symbol, words[position]] += share
    return root, binary, emission
