from __future__ import annotations

from math import inf

import pytest
import torch

from gfnem.tasks.grammar.inference.labelled import (
    labels_above,
    log_joint_by_gathers,
    log_joint_labelled,
)
from gfnem.tasks.grammar.inference.messages import log_joint_shape, sample_labels
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.trees.tree import Trees
from tests.tasks.grammar import oracle, parents_oracle
from tests.tasks.grammar.tiny import count_trees, every_shape, p_value

LENGTHS = [4, 2, 6, 3, 5]


def random_labels(trees: Trees, nonterminals: int, seed: int = 0) -> Trees:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(nonterminals, trees.start.shape, generator=generator)
    return Trees(trees.start, trees.end, trees.lengths, torch.where(trees.exists, labels, -1))


@pytest.mark.parametrize("seed", [0, 1])
def test_log_joint_of_every_shape_is_that_of_enumeration(seed):
    grammar = parents_oracle.random_grammar(2, 3, seed=seed, temperature=(1.0, 0.3)[seed])
    words, lengths = oracle.random_sentences(LENGTHS, seed=seed)
    trees = every_shape(lengths)
    value = log_joint_shape(grammar.potentials(words, lengths), trees)
    for index in range(len(LENGTHS)):
        sentence = oracle.sentence(words, lengths, index)
        joint = parents_oracle.enumerate_shapes(grammar, sentence)
        expected = [joint[trees.spans(index, sample)] for sample in range(trees.start.shape[1])]
        torch.testing.assert_close(value[index].tolist(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("seed", [2, 3])
def test_log_joint_of_labelled_trees_is_that_of_enumeration(seed, gathers):
    grammar = parents_oracle.random_grammar(seed=seed, temperature=0.5)
    words, lengths = oracle.random_sentences(LENGTHS, seed=seed)
    trees = random_labels(every_shape(lengths), 3)
    if gathers:
        value = log_joint_by_gathers(grammar, words, trees)
    else:
        value = log_joint_labelled(grammar.potentials(words, lengths), trees)
    rules = parents_oracle.Rules(grammar)
    for index in range(len(LENGTHS)):
        sentence = oracle.sentence(words, lengths, index)
        expected = [
            oracle.log_or_inf(rules.joint(sentence, oracle.tree_at(trees, index, sample)))
            for sample in range(trees.start.shape[1])
        ]
        torch.testing.assert_close(value[index].tolist(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("zeros", [False, True])
def test_gathers_have_the_gradients_of_tables(zeros):
    grammar = parents_oracle.random_grammar(seed=5, temperature=0.5)
    words, lengths = oracle.random_sentences(LENGTHS, seed=5)
    trees = random_labels(every_shape(lengths), 3)
    if zeros:
        # No word comes of the first preterminal, and some rules are impossible.
        emission, binary = grammar.emission.clone(), grammar.binary.clone()
        emission[:, 0], binary[0, 1] = -inf, -inf
        grammar = DenseGrammar(grammar.root, binary, emission)
    rules = parents_oracle.with_gradients(grammar)
    by_tables = log_joint_labelled(DenseGrammar(*rules).potentials(words, lengths), trees)
    by_gathers = log_joint_by_gathers(DenseGrammar(*rules), words, trees)
    torch.testing.assert_close(by_gathers, by_tables)
    assert by_gathers.isinf().any() == zeros
    possible = by_tables.isfinite()
    for one, other in zip(
        torch.autograd.grad(by_gathers[possible].sum(), rules),
        torch.autograd.grad(by_tables[possible].sum(), rules),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_gradients_of_shapes_are_expected_counts():
    """Weighted by the posterior, the gradients of all shapes are those of log p(x)."""
    grammar = parents_oracle.random_grammar(2, 3, seed=4, temperature=0.5)
    words, lengths = oracle.random_sentences([5], seed=4)
    rules = parents_oracle.with_gradients(grammar)
    value = log_joint_shape(
        DenseGrammar(*rules).potentials(words, lengths), every_shape(lengths)
    ).squeeze(0)
    (value.detach().softmax(-1) * value).sum().backward()
    counts = parents_oracle.expected_counts(grammar, words[0].tolist())
    for rule, count in zip(rules, counts, strict=True):
        torch.testing.assert_close(rule.grad, count)


def test_log_joint_passes_gradcheck_in_the_grammar():
    words, lengths = oracle.random_sentences([4, 2, 5], vocabulary=3, seed=5)
    trees = every_shape(lengths).select(torch.tensor([[0, 3, 7]] * 3))
    rules = parents_oracle.with_gradients(parents_oracle.random_grammar(2, 2, 3, seed=5))
    for z, log_joint in (
        (trees, log_joint_shape),
        (random_labels(trees, 2), log_joint_labelled),
    ):
        assert torch.autograd.gradcheck(
            lambda *rules, z=z, log_joint=log_joint: log_joint(
                DenseGrammar(*rules).potentials(words, lengths), z
            ),
            rules,
        )


def test_contexts_are_the_labels_of_the_parents():
    tree = frozenset({(0, 5, 2), (0, 2, 1), (2, 5, 0), (2, 4, 1)})
    trees = oracle.to_trees([[tree], [frozenset({(0, 2, 1)})]], torch.tensor([5, 2]))
    # Gaps in order: (0, 2) under 2, (0, 5) under S, (2, 4) under 0, (2, 5) under 2.
    above = labels_above(trees, 3)
    assert above[0, 0].tolist() == [2, 3, 0, 2]
    assert above[1, 0, 0].item() == 3


def test_sampled_labels_have_their_exact_probabilities():
    grammar = parents_oracle.random_grammar(seed=6, temperature=0.5)
    words, lengths = oracle.random_sentences([4, 2, 5, 3], seed=6)
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
            sentence = oracle.sentence(words, lengths, index)
            joint = parents_oracle.enumerate_labelled(grammar, sentence)
            given = {z: p for z, p in joint.items() if oracle.shape_of(z) == one.spans(index)}
            assert p_value(count_trees(labelled, index), oracle.posterior(given)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_of_probability_zero(dtype):
    grammar = parents_oracle.random_grammar(2, 2, seed=7, dtype=dtype)
    # Under S no rule has two words; under nonterminals none has two nonterminals.
    binary = grammar.binary.clone()
    binary[2, :, 2:, 2:] = -inf
    binary[:2, :, :2, :2] = -inf
    rules = parents_oracle.with_gradients(DenseGrammar(grammar.root, binary, grammar.emission))
    words, lengths = oracle.random_sentences([2, 5])
    trees = every_shape(lengths)
    value = log_joint_shape(DenseGrammar(*rules).potentials(words, lengths), trees)
    assert (value[0] == -inf).all()
    joint = parents_oracle.enumerate_shapes(
        DenseGrammar(grammar.root, binary, grammar.emission), words[1].tolist()
    )
    expected = [joint[trees.spans(1, sample)] for sample in range(14)]
    torch.testing.assert_close(value[1].tolist(), expected, rtol=0, atol=1e-4)
    for gradient in torch.autograd.grad(value[0].sum(), rules, retain_graph=True):
        assert (gradient == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), rules))


def test_long_sentences_stay_finite_in_single_precision():
    words, lengths = oracle.random_sentences([60, 45], vocabulary=20)
    trees = Trees.random(lengths, 3, torch.Generator().manual_seed(0))
    single, double = (
        parents_oracle.with_gradients(parents_oracle.random_grammar(4, 5, 20, dtype=dtype))
        for dtype in (torch.float32, torch.float64)
    )
    value, exact = (
        log_joint_shape(DenseGrammar(*rules).potentials(words, lengths), trees)
        for rules in (single, double)
    )
    assert (exact < -150).all()
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    value.sum().backward()
    exact.sum().backward()
    for one, other in zip(single, double, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-3, atol=1e-4)


def test_labelled_scores_of_shapes_are_refused():
    words, lengths = oracle.random_sentences([3])
    potentials = parents_oracle.random_grammar().potentials(words, lengths)
    for function in (log_joint_labelled, lambda _, trees: labels_above(trees, 3)):
        with pytest.raises(ValueError, match="labelled trees are needed; these are shapes"):
            function(potentials, Trees.random(lengths))
