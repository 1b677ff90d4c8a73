from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor

from gfnem.tasks.grammar.inference.labelled import labelled_scores, log_joint_labelled
from gfnem.tasks.grammar.inference.messages import (
    log_joint_shape,
    sample_labels,
    shape_scores,
)
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.trees.tree import Trees
from tests.tasks.grammar import oracle
from tests.tasks.grammar.tiny import (
    count_trees,
    every_shape,
    float64,  # noqa: F401
    p_value,
    sparse_grammar,
)

LENGTHS = [4, 2, 6, 3, 5]
# Words 6 and 7 have no preterminal in a sparse grammar.
SPARSE_WORDS = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 7, 2, 0], [3, 5, 2, 0, 0]])
SPARSE_LENGTHS = torch.tensor([5, 4, 3])


def with_gradients(grammar: DenseGrammar) -> list[Tensor]:
    rules = (grammar.root, grammar.binary, grammar.emission)
    return [rule.clone().requires_grad_() for rule in rules]


def random_labels(trees: Trees, nonterminals: int, seed: int = 0) -> Trees:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(nonterminals, trees.start.shape, generator=generator)
    return Trees(trees.start, trees.end, trees.lengths, torch.where(trees.exists, labels, -1))


def naive_log_joint(grammar: DenseGrammar, words: list[int], shape: oracle.Shape) -> Tensor:
    """One tree at a time, probabilities of all symbols over each of its spans."""
    nonterminals, preterminals = grammar.nonterminals, grammar.preterminals

    def below(i: int, j: int) -> Tensor:
        if j - i == 1:
            return torch.cat([torch.zeros(nonterminals), grammar.emission[0, :, words[i]].exp()])
        (k,) = (
            k
            for k in range(i + 1, j)
            if (k - i == 1 or (i, k) in shape) and (j - k == 1 or (k, j) in shape)
        )
        parent = torch.einsum("abc,b,c->a", grammar.binary[0].exp(), below(i, k), below(k, j))
        return torch.cat([parent, torch.zeros(preterminals)])

    return (grammar.root.exp() @ below(0, len(words))[:nonterminals]).log()


def expected_values(grammar: DenseGrammar, words: Tensor, trees: Trees) -> Tensor:
    values = []
    for index in range(len(trees.lengths)):
        sentence = oracle.sentence(words, trees.lengths, index)
        samples = range(trees.start.shape[1])
        if trees.labels is None:
            joint = oracle.enumerate_shapes(grammar, sentence)
            values.append([joint[trees.spans(index, sample)] for sample in samples])
        else:
            rules = oracle.Rules(grammar)
            values.append(
                [
                    oracle.log_or_inf(rules.joint(sentence, oracle.tree_at(trees, index, sample)))
                    for sample in samples
                ]
            )
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("seed", [0, 1])
def test_log_joint_of_every_shape_is_that_of_enumeration(seed):
    grammar = oracle.random_grammar(seed=seed, temperature=(1.0, 0.3)[seed])
    words, lengths = oracle.random_sentences(LENGTHS, seed=seed)
    trees = every_shape(lengths)
    value = log_joint_shape(grammar.potentials(words, lengths), trees)
    torch.testing.assert_close(value, expected_values(grammar, words, trees), rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", [2, 3])
def test_log_joint_of_labelled_trees_is_that_of_enumeration(seed):
    grammar = oracle.random_grammar(seed=seed, temperature=0.5)
    words, lengths = oracle.random_sentences(LENGTHS, seed=seed)
    trees = random_labels(every_shape(lengths), grammar.nonterminals)
    value = log_joint_labelled(grammar.potentials(words, lengths), trees)
    torch.testing.assert_close(value, expected_values(grammar, words, trees), rtol=0, atol=1e-10)


def test_labels_summed_out_of_labelled_trees_leave_the_shape():
    grammar = oracle.random_grammar(2, 3, seed=4)
    words, lengths = oracle.random_sentences([5, 4], seed=4)
    potentials = grammar.potentials(words, lengths)
    trees = Trees.random(lengths, 1, torch.Generator().manual_seed(0))
    combinations = torch.cartesian_prod(*[torch.arange(2)] * 4)
    count = len(combinations)
    labelled = Trees(
        trees.start.expand(-1, count, -1),
        trees.end.expand(-1, count, -1),
        lengths,
        torch.where(trees.exists, combinations, -1),
    )
    total = log_joint_labelled(potentials, labelled).logsumexp(-1)
    total[1] -= torch.tensor(2.0).log()  # the fourth node of a sentence without one
    torch.testing.assert_close(total, log_joint_shape(potentials, trees).squeeze(1))


def test_log_joint_shape_passes_gradcheck_in_the_grammar():
    words, lengths = oracle.random_sentences([5, 2, 4], seed=5)
    trees = every_shape(lengths)
    rules = with_gradients(oracle.random_grammar(2, 2, seed=5))
    assert torch.autograd.gradcheck(
        lambda *rules: log_joint_shape(DenseGrammar(*rules).potentials(words, lengths), trees),
        rules,
    )


@pytest.mark.usefixtures("float64")
def test_gradients_are_those_of_a_naive_computation():
    words, lengths = oracle.random_sentences(LENGTHS, seed=6)
    trees = every_shape(lengths)
    weights = torch.randn(trees.start.shape[:2], generator=torch.Generator().manual_seed(0))
    grammar = oracle.random_grammar(seed=6, temperature=0.5)
    fast, naive = with_gradients(grammar), with_gradients(grammar)
    value = log_joint_shape(DenseGrammar(*fast).potentials(words, lengths), trees)
    (weights * value).sum().backward()
    for index in range(len(LENGTHS)):
        sentence = oracle.sentence(words, lengths, index)
        for sample, weight in enumerate(weights[index].tolist()):
            joint = naive_log_joint(DenseGrammar(*naive), sentence, trees.spans(index, sample))
            assert joint.item() == pytest.approx(value[index, sample].item())
            (weight * joint).backward()
    for one, other in zip(fast, naive, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_labelled_gradients_are_rule_counts():
    """Of rules without words below them: each use of a rule counts one."""
    words, lengths = oracle.random_sentences([6, 4], seed=7)
    trees = random_labels(every_shape(lengths), 3)
    rules = with_gradients(oracle.random_grammar(seed=7))
    log_joint_labelled(DenseGrammar(*rules).potentials(words, lengths), trees).sum().backward()
    counts = torch.zeros(3, 3, 3, dtype=torch.float64)
    roots = torch.zeros(3, dtype=torch.float64)
    for index in range(2):
        for sample in range(trees.start.shape[1]):
            tree = oracle.tree_at(trees, index, sample)
            label = {(i, j): a for i, j, a in tree}
            roots[label[0, int(lengths[index])]] += 1
            for i, j, a in tree:
                for k in range(i + 1, j):
                    if (i, k) in label and (k, j) in label:
                        counts[a, label[i, k], label[k, j]] += 1
    root, binary, _ = (rule.grad for rule in rules)
    assert root is not None and binary is not None
    torch.testing.assert_close(root, roots)
    torch.testing.assert_close(binary[0, :, :3, :3], counts)
    # Where words are below, preterminals share the count: every node has used one rule.
    assert binary.sum().item() == pytest.approx(42 * (5 + 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 1, 4, 7])
def test_words_and_rules_of_probability_zero(seed, dtype):
    grammar = sparse_grammar(seed)
    rules = [rule.detach().to(dtype).requires_grad_() for rule in with_gradients(grammar)]
    shapes = every_shape(SPARSE_LENGTHS)
    for trees, log_joint in (
        (shapes, log_joint_shape),
        (random_labels(shapes, 3, seed), log_joint_labelled),
    ):
        potentials = DenseGrammar(*rules).potentials(SPARSE_WORDS, SPARSE_LENGTHS)
        value = log_joint(potentials, trees)
        expected = expected_values(grammar, SPARSE_WORDS, trees)
        assert (expected[1] == -inf).all() and (expected == -inf).any()
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-4)
        gradients = torch.autograd.grad(value.sum(), rules, retain_graph=True)
        assert all(gradient.isfinite().all() for gradient in gradients)
        impossible = torch.autograd.grad(value[expected == -inf].sum(), rules)
        if log_joint is log_joint_shape:
            assert all((gradient == 0).all() for gradient in impossible)
        scores_of = shape_scores if trees.labels is None else labelled_scores
        scores, log_joint_again = scores_of(potentials, trees)
        assert not scores.isnan().any()
        torch.testing.assert_close(log_joint_again, value.detach())


def test_shapes_of_probability_zero_have_no_gradient_in_the_potentials():
    given = sparse_grammar(7).potentials(SPARSE_WORDS, SPARSE_LENGTHS)
    names = ("root", "rules", "left", "right", "both")
    tables = [getattr(given, name).clone().requires_grad_() for name in names]
    potentials = replace(given, **dict(zip(names, tables, strict=True)))
    value = log_joint_shape(potentials, every_shape(SPARSE_LENGTHS))
    possible = value > -inf
    assert possible[2].any() and not possible[2].all()
    for gradient in torch.autograd.grad(value[~possible].sum(), tables, retain_graph=True):
        assert (gradient == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), tables))


def test_sampled_labels_have_their_exact_probabilities():
    grammar = oracle.random_grammar(seed=8, temperature=0.6)
    words, lengths = oracle.random_sentences([4, 2, 5, 3], seed=8)
    potentials = grammar.potentials(words, lengths)
    for seed in range(3):
        one = Trees.random(lengths, 1, torch.Generator().manual_seed(seed))
        draws = 8_000
        many = Trees(one.start.expand(-1, draws, -1), one.end.expand(-1, draws, -1), lengths)
        labelled = sample_labels(potentials, many, torch.Generator().manual_seed(seed))
        assert labelled.labels is not None
        assert torch.equal(labelled.start, many.start) and torch.equal(labelled.end, many.end)
        assert ((labelled.labels >= 0) == many.exists).all()
        for index in range(len(lengths)):
            joint = oracle.enumerate_labelled(grammar, oracle.sentence(words, lengths, index))
            shape = one.spans(index)
            given = {z: p for z, p in joint.items() if oracle.shape_of(z) == shape}
            assert p_value(count_trees(labelled, index), oracle.posterior(given)) > 1e-3


def test_sampled_labels_are_possible_and_repeat_with_their_generator():
    lengths = SPARSE_LENGTHS[:1]
    potentials = sparse_grammar(0).potentials(SPARSE_WORDS[:1], lengths)
    shapes = every_shape(lengths)
    shapes = shapes.select(torch.arange(14).repeat(20)[None])
    assert (log_joint_shape(potentials, shapes) > -inf).all()
    assert (log_joint_labelled(potentials, random_labels(shapes, 3)) == -inf).any()
    first, second, other = (
        sample_labels(potentials, shapes, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert (log_joint_labelled(potentials, first) > -inf).all()
    assert first.labels is not None and second.labels is not None and other.labels is not None
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.labels, other.labels)


def below(tree: Iterable[tuple[int, ...]], start: int, end: int) -> Any:
    """The part of a tree under one of its nodes, counted from the node's first word."""
    return frozenset(
        (i - start, j - start, *label) for i, j, *label in tree if start <= i and j <= end
    )


@pytest.mark.parametrize("latent", ["shape", "labelled"])
def test_inside_scores_are_those_of_enumeration(latent):
    grammar = oracle.random_grammar(seed=9, temperature=0.6)
    any_root = DenseGrammar(torch.zeros(3), grammar.binary, grammar.emission)
    words, lengths = oracle.random_sentences([5, 2, 4], seed=9)
    trees = every_shape(lengths)
    if latent == "labelled":
        trees = random_labels(trees, 3)
    potentials = grammar.potentials(words, lengths)
    scores_of = shape_scores if latent == "shape" else labelled_scores
    scores, log_joint = scores_of(potentials, trees)
    torch.testing.assert_close(
        log_joint, expected_values(grammar, words, trees), rtol=0, atol=1e-10
    )
    cache: dict = {}
    for index in range(len(lengths)):
        sentence = oracle.sentence(words, lengths, index)
        for sample in range(trees.start.shape[1]):
            if latent == "shape":
                tree = trees.spans(index, sample)
            else:
                tree = oracle.tree_at(trees, index, sample)
            for gap in range(len(sentence) - 1):
                start = int(trees.start[index, sample, gap])
                end = int(trees.end[index, sample, gap])
                part, span = below(tree, start, end), sentence[start:end]
                if latent == "shape":
                    key = tuple(span)
                    if key not in cache:
                        cache[key] = oracle.enumerate_shapes(any_root, span)
                    expected = cache[key][part]
                else:
                    expected = oracle.log_joint_labelled(any_root, span, part)
                assert scores[index, sample, gap].item() == pytest.approx(expected, abs=1e-10)


def test_log_joint_of_long_sentences_stays_finite_in_single_precision():
    grammar = oracle.random_grammar(5, 6, 20, dtype=torch.float32)
    words, lengths = oracle.random_sentences([60, 45], vocabulary=20)
    trees = Trees.random(lengths, 3, torch.Generator().manual_seed(0))
    value = log_joint_shape(grammar.potentials(words, lengths), trees)
    exact = oracle.random_grammar(5, 6, 20)
    reference = log_joint_shape(exact.potentials(words, lengths), trees)
    assert (reference < -150).all()
    torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=0)


def test_labelled_scores_of_shapes_are_refused():
    words, lengths = oracle.random_sentences([3])
    potentials = oracle.random_grammar().potentials(words, lengths)
    with pytest.raises(ValueError, match="labelled trees are needed; these are shapes"):
        log_joint_labelled(potentials, Trees.random(lengths))
