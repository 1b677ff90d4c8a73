"""A PCFG by brute force: every binary tree with every labelling, in plain Python.

Nothing here uses the package's algorithms; only `Grammar` and `Trees` as containers. Trees are
frozensets: a shape of spans (start, end), a labelled tree of (start, end, nonterminal), for spans
of at least two words, the whole sentence's among them. Small sentences and grammars only: six
words and three nonterminals have 10206 labelled trees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from math import exp, inf, log

import torch
from torch import Tensor

from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.trees.tree import Trees

Shape = frozenset[tuple[int, int]]
LabelledTree = frozenset[tuple[int, int, int]]


def random_grammar(
    nonterminals: int = 3,
    preterminals: int = 3,
    vocabulary: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    temperature: float = 1.0,
) -> DenseGrammar:
    """Normalised random rules; a low temperature makes them peaked. Same rules in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    symbols = nonterminals + preterminals

    def log_probabilities(*shape: int) -> Tensor:
        logits = torch.randn(*shape, generator=generator, dtype=torch.float64) / temperature
        return logits.log_softmax(-1).to(dtype)

    return context_free(
        log_probabilities(nonterminals),
        log_probabilities(nonterminals, symbols**2).view(nonterminals, symbols, symbols),
        log_probabilities(preterminals, vocabulary),
    )


def context_free(root: Tensor, binary: Tensor, emission: Tensor) -> DenseGrammar:
    """Rules root[A], binary[A, B, C] and emission[T, w], which see no parent."""
    return DenseGrammar(root, binary[None], emission[None])


def random_sentences(
    lengths: Sequence[int], vocabulary: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Word ids [batch, longest], padded with 0, and lengths [batch]."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(vocabulary, (len(lengths), max(lengths)), generator=generator)
    position = torch.arange(max(lengths))
    return words * (position < torch.tensor(lengths)[:, None]), torch.tensor(lengths)


def sentence(words: Tensor, lengths: Tensor, index: int) -> list[int]:
    """One sentence of a padded batch."""
    return words[index, : lengths[index]].tolist()


def shapes(length: int) -> list[Shape]:
    """All binary trees over `length` words."""

    def over(i: int, j: int) -> list[Shape]:
        if j - i == 1:
            return [frozenset()]
        return [
            frozenset({(i, j)}) | left | right
            for k in range(i + 1, j)
            for left in over(i, k)
            for right in over(k, j)
        ]

    return over(0, length)


def labelled_trees(length: int, nonterminals: int) -> Iterator[LabelledTree]:
    """All binary trees over `length` words with all labellings."""
    for shape in shapes(length):
        spans = sorted(shape)
        for labels in product(range(nonterminals), repeat=len(spans)):
            yield frozenset((i, j, a) for (i, j), a in zip(spans, labels, strict=True))


def shape_of(tree: LabelledTree) -> Shape:
    return frozenset((i, j) for i, j, _ in tree)


@cache
def splits(shape: Shape) -> list[tuple[int, int, int]]:
    """Each span's start i, split k and end j: what is no word on either side is a span too."""
    found = []
    for i, j in shape:
        (k,) = (
            k
            for k in range(i + 1, j)
            if (k - i == 1 or (i, k) in shape) and (j - k == 1 or (k, j) in shape)
        )
        found.append((i, k, j))
    return found


class Rules:
    """A grammar's probabilities as nested lists: root[A], binary[A][B][C], emission[T][w]."""

    def __init__(self, grammar: DenseGrammar):
        self.root = grammar.root.double().exp().tolist()
        (self.binary,) = grammar.binary.double().exp().tolist()
        (self.emission,) = grammar.emission.double().exp().tolist()
        # Trees of one sentence have most of their nodes in common.
        self.known: dict[tuple, list[tuple[int, int, float]]] = {}

    def child(
        self, words: Sequence[int], labels: dict[tuple[int, int], int], i: int, j: int
    ) -> list[tuple[int, float]]:
        """What may stand over (i, j) in this tree: symbols, each with its emission."""
        if j - i > 1:
            return [(labels[i, j], 1.0)]
        first = len(self.root)
        return [(first + t, row[words[i]]) for t, row in enumerate(self.emission)]

    def nodes(
        self, words: Sequence[int], tree: LabelledTree
    ) -> Iterator[tuple[int, int, int, list[tuple[int, int, float]]]]:
        """Each node's start i, split k and end j, and the ways (B, C, probability) to expand it.

        The probability is of A -> B C and of the emissions where B or C is a preterminal.
        """
        labels = {(i, j): a for i, j, a in tree}
        for i, k, j in splits(frozenset(labels)):
            rules = self.binary[labels[i, j]]
            node = (*words, i, k, j, labels[i, j], labels.get((i, k)), labels.get((k, j)))
            if node not in self.known:
                self.known[node] = [
                    (b, c, rules[b][c] * emission_b * emission_c)
                    for b, emission_b in self.child(words, labels, i, k)
                    for c, emission_c in self.child(words, labels, k, j)
                ]
            yield i, k, j, self.known[node]

    def joint(self, words: Sequence[int], tree: LabelledTree) -> float:
        """p(x, z), preterminals summed out word by word."""
        (top,) = (a for i, j, a in tree if (i, j) == (0, len(words)))
        probability = self.root[top]
        for _, _, _, ways in self.nodes(words, tree):
            probability *= sum(p for _, _, p in ways)
        return probability


def log_or_inf(probability: float) -> float:
    return log(probability) if probability > 0 else -inf


def log_joint_labelled(grammar: DenseGrammar, words: Sequence[int], tree: LabelledTree) -> float:
    """log p(x, z) of a labelled tree."""
    return log_or_inf(Rules(grammar).joint(words, tree))


def enumerate_labelled(grammar: DenseGrammar, words: Sequence[int]) -> dict[LabelledTree, float]:
    """log p(x, z) of every labelled tree over the sentence."""
    rules = Rules(grammar)
    return {
        tree: log_or_inf(rules.joint(words, tree))
        for tree in labelled_trees(len(words), grammar.nonterminals)
    }


def enumerate_shapes(grammar: DenseGrammar, words: Sequence[int]) -> dict[Shape, float]:
    """log p(x, shape) of every shape over the sentence, labels summed out."""
    total = dict.fromkeys(shapes(len(words)), 0.0)
    for tree, log_joint in enumerate_labelled(grammar, words).items():
        total[shape_of(tree)] += exp(log_joint)
    return {shape: log_or_inf(probability) for shape, probability in total.items()}


def log_partition(grammar: DenseGrammar, words: Sequence[int]) -> float:
    """log p(x)."""
    return log_or_inf(sum(exp(p) for p in enumerate_shapes(grammar, words).values()))


def posterior(log_joint: dict) -> dict:
    """p(z | x) from the log p(x, z) of all z."""
    total = sum(exp(p) for p in log_joint.values())
    return {z: exp(p) / total for z, p in log_joint.items()}


def span_marginals(grammar: DenseGrammar, words: Sequence[int]) -> dict[tuple[int, int], float]:
    """p(span in z | x) of every span of at least two words."""
    length = len(words)
    marginals = {(i, j): 0.0 for i in range(length) for j in range(i + 2, length + 1)}
    for shape, probability in posterior(enumerate_shapes(grammar, words)).items():
        for span in shape:
            marginals[span] += probability
    return marginals


def expected_counts(grammar: DenseGrammar, words: Sequence[int]) -> DenseGrammar:
    """How often each rule is used, expected under p(z, preterminals | x)."""
    rules = Rules(grammar)
    nonterminals, length = grammar.nonterminals, len(words)
    root, binary, emission = (
        torch.zeros_like(rule, dtype=torch.float64)
        for rule in (grammar.root, grammar.binary, grammar.emission)
    )
    for tree, probability in posterior(enumerate_labelled(grammar, words)).items():
        if probability == 0:
            continue
        labels = {(i, j): a for i, j, a in tree}
        root[labels[0, length]] += probability
        for i, k, j, ways in rules.nodes(words, tree):
            total = sum(p for _, _, p in ways)
            for b, c, p in ways:
                share = probability * p / total
                binary[0, labels[i, j], b, c] += share
                if k - i == 1:
                    emission[0, b - nonterminals, words[i]] += share
                if j - k == 1:
                    emission[0, c - nonterminals, words[k]] += share
    return DenseGrammar(root, binary, emission)


def tree_at(trees: Trees, index: int, sample: int = 0) -> LabelledTree:
    """One tree of a batch with labels."""
    assert trees.labels is not None
    nodes = int(trees.lengths[index]) - 1
    table = torch.stack([trees.start, trees.end, trees.labels], -1)[index, sample, :nodes]
    return frozenset(tuple(node) for node in table.tolist())


def to_trees(batch: Sequence[Sequence[Shape | LabelledTree]], lengths: Tensor) -> Trees:
    """A batch of `Trees`, the same number for each sentence; labelled if the trees are."""
    nodes = int(lengths.max()) - 1
    shape = (len(batch), len(batch[0]), nodes)
    start, end = torch.zeros(2, *shape, dtype=torch.long)
    labels = torch.full(shape, -1)
    for index, trees in enumerate(batch):
        for number, tree in enumerate(trees):
            label = {node[:2]: node[2] for node in tree if len(node) == 3}
            for i, k, j in splits(frozenset(node[:2] for node in tree)):
                start[index, number, k - 1], end[index, number, k - 1] = i, j
                labels[index, number, k - 1] = label.get((i, j), -1)
    labelled = any(len(node) == 3 for node in batch[0][0])
    return Trees(start, end, lengths, labels if labelled else None)
