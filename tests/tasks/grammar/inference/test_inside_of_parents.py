from __future__ import annotations

from dataclasses import replace
from math import inf, log
from typing import Any

import pytest
import torch

from gfnem.errors import UserError
from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.trees.tree import Trees
from tests.tasks.grammar import oracle, parents_oracle
from tests.tasks.grammar.parents_oracle import random_low_rank_grammar
from tests.tasks.grammar.tiny import count_trees, p_value

LENGTHS = [4, 2, 6, 3, 5]


def without_context(grammar: DenseGrammar) -> DenseGrammar:
    """The same context-free rules under every parent."""
    nt = grammar.nonterminals
    return DenseGrammar(
        root=grammar.root,
        binary=grammar.binary.expand(nt + 1, -1, -1, -1),
        emission=grammar.emission.expand(nt, -1, -1),
    )


def sparse_grammar(seed: int, dtype: torch.dtype = torch.float64) -> DenseGrammar:
    """A random grammar without half of its rules and without its last two words."""
    grammar = parents_oracle.random_grammar(2, 3, seed=seed, dtype=dtype)
    kept = torch.rand(grammar.binary.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    emission = grammar.emission.clone()
    emission[..., -2:] = -inf
    return DenseGrammar(grammar.root, torch.where(kept, grammar.binary, -inf), emission)


RULES: dict[str, Any] = {
    "context_free": oracle.random_grammar,
    "dense": parents_oracle.random_grammar,
    "low_rank": random_low_rank_grammar,
}


@pytest.mark.parametrize("rules", RULES)
def test_one_chart_tells_all_that_charts_of_their_own_do(rules):
    words, lengths = oracle.random_sentences([5, 2, 4], seed=4)
    grammar = RULES[rules](3, 4, seed=4)
    potentials, other = (
        grammar.potentials(words[rows], lengths[rows]) for rows in ([0, 1, 2], [1, 2, 0])
    )
    chart = inside.inside_chart(potentials)

    def draw(chart: Any) -> Trees:
        return inside.sample(potentials, 30, torch.Generator().manual_seed(0), chart=chart)

    for tell in (inside.log_partition, inside.span_marginals):
        expected = tell(potentials)
        assert torch.equal(tell(potentials, chart=chart), expected)
        # It is that chart which is read, not one that is made again.
        assert not torch.equal(tell(potentials, chart=inside.inside_chart(other)), expected)
    one, expected = draw(chart), draw(None)
    assert torch.equal(one.start, expected.start) and torch.equal(one.end, expected.end)
    assert one.labels is not None and expected.labels is not None
    assert torch.equal(one.labels, expected.labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_partition_is_that_of_enumeration(dtype):
    words, lengths = oracle.random_sentences(LENGTHS, seed=1)
    grammar = parents_oracle.random_grammar(seed=1, dtype=dtype, temperature=0.5)
    value = inside.log_partition(grammar.potentials(words, lengths))
    assert value.dtype == dtype
    expected = [
        parents_oracle.log_partition(grammar, oracle.sentence(words, lengths, index))
        for index in range(len(LENGTHS))
    ]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(value.tolist(), expected, rtol=tolerance, atol=0)


def test_gradients_are_expected_counts():
    words, lengths = oracle.random_sentences([4, 2, 5, 3], seed=2)
    grammar = parents_oracle.random_grammar(2, 3, seed=2, temperature=0.5)
    rules = parents_oracle.with_gradients(grammar)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    value = inside.log_partition(DenseGrammar(*rules).potentials(words, lengths))
    (weights * value).sum().backward()
    for index, weight in enumerate(weights):
        counts = parents_oracle.expected_counts(grammar, oracle.sentence(words, lengths, index))
        for rule, count in zip(rules, counts, strict=True):
            assert rule.grad is not None
            rule.grad -= weight * count
    for rule in rules:
        torch.testing.assert_close(rule.grad, torch.zeros_like(rule))


def test_rules_that_ignore_the_parent_make_a_pcfg():
    words, lengths = oracle.random_sentences([12, 7, 2, 9], seed=3)
    grammar = oracle.random_grammar(4, 5, seed=3, temperature=0.5)
    potentials = grammar.potentials(words, lengths)
    with_parents = without_context(grammar).potentials(words, lengths)
    torch.testing.assert_close(inside.log_partition(with_parents), inside.log_partition(potentials))
    torch.testing.assert_close(
        inside.span_marginals(with_parents), inside.span_marginals(potentials)
    )


def test_span_marginals_are_those_of_enumeration():
    words, lengths = oracle.random_sentences([5, 3], seed=4)
    grammar = parents_oracle.random_grammar(2, 3, seed=4, temperature=0.5)
    marginals = inside.span_marginals(grammar.potentials(words, lengths))
    expected = torch.zeros_like(marginals)
    for index in range(2):
        sentence = oracle.sentence(words, lengths, index)
        shapes = oracle.posterior(parents_oracle.enumerate_shapes(grammar, sentence))
        for shape, probability in shapes.items():
            for i, j in shape:
                expected[index, i, j] += probability
    torch.testing.assert_close(marginals, expected)


@pytest.mark.parametrize("labelled", [True, False])
def test_samples_have_the_frequencies_of_the_posterior(labelled):
    words, lengths = oracle.random_sentences([4, 2, 5], seed=5)
    grammar = parents_oracle.random_grammar(2, 3, seed=5, temperature=0.5)
    generator = torch.Generator().manual_seed(0)
    potentials = grammar.potentials(words, lengths)
    trees = inside.sample(potentials, 10_000, generator, labelled)
    assert (trees.labels is not None) == labelled
    if trees.labels is not None:
        assert ((trees.labels >= 0) == trees.exists).all()
    enumerate_trees = (
        parents_oracle.enumerate_labelled if labelled else parents_oracle.enumerate_shapes
    )
    for index in range(3):
        exact = oracle.posterior(enumerate_trees(grammar, oracle.sentence(words, lengths, index)))
        assert p_value(count_trees(trees, index), exact) > 1e-3


def test_samples_repeat_with_their_generator():
    words, lengths = oracle.random_sentences([8, 5], seed=6)
    potentials = parents_oracle.random_grammar(seed=6).potentials(words, lengths)
    first, second, other = (
        inside.sample(potentials, 20, torch.Generator().manual_seed(seed)).labels
        for seed in (0, 0, 1)
    )
    assert first is not None and second is not None and other is not None
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [0, 1, 4])
def test_words_and_rules_of_probability_zero(seed, dtype):
    words, lengths = torch.tensor([[0, 1, 2, 3], [1, 0, 7, 2]]), torch.tensor([4, 4])
    grammar = sparse_grammar(seed, dtype)
    rules = parents_oracle.with_gradients(grammar)
    value = inside.log_partition(DenseGrammar(*rules).potentials(words, lengths))
    expected = parents_oracle.log_partition(grammar, words[0].tolist())
    assert value[0].item() == pytest.approx(expected, abs=1e-4)
    assert value[1].item() == -inf
    for gradient in torch.autograd.grad(value[1], rules, retain_graph=True):
        assert (gradient == 0).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value[0], rules))
    with pytest.raises(UserError, match="sentence 1 of the batch has probability 0 under"):
        inside.sample(grammar.potentials(words, lengths), 2)


def test_long_sentences_stay_finite_in_single_precision():
    words, lengths = oracle.random_sentences([60, 45], vocabulary=20)
    single = parents_oracle.with_gradients(
        parents_oracle.random_grammar(3, 4, 20, dtype=torch.float32)
    )
    value = inside.log_partition(DenseGrammar(*single).potentials(words, lengths))
    value.sum().backward()
    assert all(rule.grad is not None and rule.grad.isfinite().all() for rule in single)
    double = parents_oracle.random_grammar(3, 4, 20)
    exact = inside.log_partition(double.potentials(words, lengths))
    assert (exact < -110).all()
    torch.testing.assert_close(value.detach().double(), exact, rtol=1e-5, atol=0)


def test_two_words_by_hand():
    # Under S: A -> T U (1/4), A -> U T (3/4); under anything else nothing.
    binary = torch.full((2, 1, 3, 3), -inf, dtype=torch.float64)
    binary[1, 0, 1, 2], binary[1, 0, 2, 1] = log(1 / 4), log(3 / 4)
    emission = torch.tensor([[[0.5, 0.5], [0.1, 0.9]]], dtype=torch.float64).log()
    grammar = DenseGrammar(torch.zeros(1, dtype=torch.float64), binary, emission)
    potentials = grammar.potentials(torch.tensor([[0, 1]]), torch.tensor([2]))
    value = inside.log_partition(potentials)
    assert value.item() == pytest.approx(log(0.25 * 0.5 * 0.9 + 0.75 * 0.1 * 0.5))
    under_itself = replace(grammar, binary=binary.flip(0))
    potentials = under_itself.potentials(torch.tensor([[0, 1]]), torch.tensor([2]))
    assert inside.log_partition(potentials).item() == -inf
