"""Rules of low rank against the same rules one by one and against enumeration."""

from __future__ import annotations

from math import inf

import pytest
import torch
from torch import Tensor

from gfnem.errors import UserError
from gfnem.tasks.grammar.inference import inside, messages
from gfnem.tasks.grammar.inference.labelled import log_joint_labelled, rule_scores
from gfnem.tasks.grammar.rules.contexts import Contexts
from gfnem.tasks.grammar.rules.dense import DensePotentials
from gfnem.tasks.grammar.rules.low_rank import LowRankGrammar, LowRankPotentials
from gfnem.tasks.grammar.trees.tree import Trees
from tests.tasks.grammar import oracle, parents_oracle
from tests.tasks.grammar.parents_oracle import as_dense, random_low_rank_grammar
from tests.tasks.grammar.tiny import count_trees, every_shape, p_value

LENGTHS = [4, 2, 6, 3, 5]


def both_kinds(
    lengths: list[int] = LENGTHS, seed: int = 0
) -> tuple[LowRankPotentials, DensePotentials]:
    words, length = oracle.random_sentences(lengths, seed=seed)
    grammar = random_low_rank_grammar(seed=seed)
    return grammar.potentials(words, length), as_dense(grammar).potentials(words, length)


def leaves(grammar: LowRankGrammar) -> list[Tensor]:
    return [table.clone().requires_grad_() for table in vars(grammar).values()]


def in_single_precision(grammar: LowRankGrammar) -> LowRankGrammar:
    return LowRankGrammar(*(table.float() for table in vars(grammar).values()))


def random_labels(trees: Trees, nonterminals: int, seed: int = 0) -> Trees:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(nonterminals, trees.start.shape, generator=generator)
    return Trees(trees.start, trees.end, trees.lengths, torch.where(trees.exists, labels, -1))


def test_tables_are_those_of_the_dense_grammar():
    ours, theirs = both_kinds(seed=1)
    assert ours.contexts == theirs.contexts == Contexts.parents(3)
    for name in ("root", "preterminal", "log_scale", "log_word", "lengths", "total_log_scale"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.two_words(), theirs.two_words())
    generator = torch.Generator().manual_seed(0)
    sentence, position, label, context = (
        torch.randint(size, (40,), generator=generator) for size in (5, 6, 3, 4)
    )
    at = sentence, position, label, context
    at_word = theirs.word[sentence, position], label, context
    torch.testing.assert_close(ours.inner_rules(label, context), theirs.rules[label, context])
    torch.testing.assert_close(ours.word_left_rules(*at), theirs.left[at_word])
    torch.testing.assert_close(ours.word_right_rules(*at), theirs.right[at_word])
    weight = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64)
    # The first label makes another context than those behind it, which are in another order.
    contexts, order = Contexts((0, 1, 1), 0), torch.tensor([0, 2, 1])
    one, other = (p.averaged(weight, contexts, order) for p in (ours, theirs))
    assert one.contexts == other.contexts == contexts
    for name in ("root", "rules", "both"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))
    for name in ("left", "right"):
        torch.testing.assert_close(getattr(one, name)[one.word], getattr(other, name)[other.word])


def test_merges_are_those_of_the_dense_grammar():
    ours, theirs = (potentials.select(torch.tensor([2, 4, 2])) for potentials in both_kinds(seed=1))
    assert ours.lengths.tolist() == [6, 5, 6]
    generator = torch.Generator().manual_seed(0)
    sentence, word = torch.randint(3, (20,), generator=generator), torch.arange(20) % 6
    left, right = torch.rand(2, 20, 4, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(ours.two_nodes(left, right)[0], theirs.two_nodes(left, right)[0])
    for name in ("word_on_left", "word_on_right"):
        one, other = (getattr(p, name)(sentence, word, left)[0] for p in (ours, theirs))
        torch.testing.assert_close(one, other)
    weights = torch.rand(20, 3, generator=generator, dtype=torch.float64)
    for given in (None, weights):
        one, other = (p.average(left, word == 0, given) for p in (ours, theirs))
        torch.testing.assert_close(one, other)


def test_nothing_of_detached_potentials_has_gradients():
    words, lengths = oracle.random_sentences([3, 4])
    potentials = LowRankGrammar(*leaves(random_low_rank_grammar())).potentials(words, lengths)
    assert potentials.mixture.requires_grad
    assert not any(table.requires_grad for table in potentials.detach().tables())


def test_log_joint_of_every_shape_is_that_of_enumeration():
    words, lengths = oracle.random_sentences(LENGTHS, seed=2)
    grammar = random_low_rank_grammar(2, 3, seed=2)
    trees = every_shape(lengths)
    value = messages.log_joint_shape(grammar.potentials(words, lengths), trees)
    for index in range(len(LENGTHS)):
        sentence = oracle.sentence(words, lengths, index)
        joint = parents_oracle.enumerate_shapes(as_dense(grammar), sentence)
        expected = [joint[trees.spans(index, sample)] for sample in range(trees.start.shape[1])]
        torch.testing.assert_close(value[index].tolist(), expected, rtol=0, atol=1e-10)


def test_scores_of_labelled_trees_are_those_of_the_dense_grammar():
    ours, theirs = both_kinds(seed=3)
    trees = random_labels(every_shape(ours.lengths), 3)
    torch.testing.assert_close(
        rule_scores(ours, trees), rule_scores(theirs, trees), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(log_joint_labelled(ours, trees), log_joint_labelled(theirs, trees))


def test_scores_of_nodes_are_those_of_the_dense_grammar():
    ours, theirs = both_kinds(seed=3)
    trees = every_shape(ours.lengths)
    for one, other in zip(
        messages.shape_scores(ours, trees),
        messages.shape_scores(theirs, trees),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_log_partition_is_that_of_enumeration():
    words, lengths = oracle.random_sentences(LENGTHS, seed=4)
    grammar = random_low_rank_grammar(2, 3, seed=4)
    value = inside.log_partition(grammar.potentials(words, lengths))
    expected = [
        parents_oracle.log_partition(as_dense(grammar), oracle.sentence(words, lengths, index))
        for index in range(len(LENGTHS))
    ]
    torch.testing.assert_close(value.tolist(), expected, rtol=1e-12, atol=0)


def test_values_and_gradients_pass_gradcheck_in_the_grammar():
    words, lengths = oracle.random_sentences([4, 2, 5], vocabulary=3, seed=5)
    shapes = every_shape(lengths).select(torch.tensor([[0, 3, 7]] * 3))
    labelled = random_labels(shapes, 2)
    tables = leaves(random_low_rank_grammar(2, 2, 3, 3, seed=5))
    for value in (
        inside.log_partition,
        lambda potentials: messages.log_joint_shape(potentials, shapes),
        lambda potentials: log_joint_labelled(potentials, labelled),
    ):
        assert torch.autograd.gradcheck(
            lambda *tables, value=value: value(LowRankGrammar(*tables).potentials(words, lengths)),
            tables,
        )


def test_gradients_are_those_of_the_dense_grammar():
    words, lengths = oracle.random_sentences([9, 2, 7, 12], seed=6)
    shapes = Trees.random(lengths, 5, torch.Generator().manual_seed(0))
    tables = leaves(random_low_rank_grammar(4, 5, 6, seed=6))
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    ours = LowRankGrammar(*tables)
    theirs = as_dense(ours)
    for grammar in (ours, theirs):
        potentials = grammar.potentials(words, lengths)
        values = (
            inside.log_partition(potentials) @ weight,
            weight @ messages.log_joint_shape(potentials, shapes).sum(-1),
        )
        found = [torch.autograd.grad(value, tables, retain_graph=True) for value in values]
        if grammar is ours:
            expected = found
        else:
            for one, other in zip(expected, found, strict=True):
                torch.testing.assert_close(one, other)


def test_span_marginals_and_inside_scores_are_those_of_the_dense_grammar():
    ours, theirs = both_kinds([8, 5, 2], seed=7)
    torch.testing.assert_close(inside.span_marginals(ours), inside.span_marginals(theirs))
    charts = inside.inside_chart(ours), inside.inside_chart(theirs)
    vectors, expected = (chart.messages.table() for chart in charts)
    scales, their_scales = (chart.scales for chart in charts)
    for width in range(2, 9):
        for one, other in (
            (vectors.left(width + 1), expected.left(width + 1)),
            (vectors.right(width + 1), expected.right(width + 1)),
            (scales.left(width + 1), their_scales.left(width + 1)),
        ):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(vectors.whole(ours.lengths), expected.whole(ours.lengths))


@pytest.mark.parametrize("labelled", [True, False])
def test_samples_have_the_frequencies_of_the_posterior(labelled):
    words, lengths = oracle.random_sentences([4, 2, 5], seed=8)
    grammar = random_low_rank_grammar(2, 3, seed=8)
    trees = inside.sample(
        grammar.potentials(words, lengths), 10_000, torch.Generator().manual_seed(0), labelled
    )
    assert (trees.labels is not None) == labelled
    if trees.labels is not None:
        assert ((trees.labels >= 0) == trees.exists).all()
    enumerate_trees = (
        parents_oracle.enumerate_labelled if labelled else parents_oracle.enumerate_shapes
    )
    for index in range(3):
        sentence = oracle.sentence(words, lengths, index)
        exact = oracle.posterior(enumerate_trees(as_dense(grammar), sentence))
        assert p_value(count_trees(trees, index), exact) > 1e-3


def test_sampled_labels_have_their_exact_probabilities():
    words, lengths = oracle.random_sentences([4, 2, 5, 3], seed=9)
    grammar = random_low_rank_grammar(seed=9)
    potentials = grammar.potentials(words, lengths)
    for seed in range(2):
        one = Trees.random(lengths, 1, torch.Generator().manual_seed(seed))
        draws = 8_000
        many = Trees(one.start.expand(-1, draws, -1), one.end.expand(-1, draws, -1), lengths)
        labelled = messages.sample_labels(potentials, many, torch.Generator().manual_seed(seed))
        assert labelled.labels is not None
        assert ((labelled.labels >= 0) == many.exists).all()
        for index in range(len(lengths)):
            sentence = oracle.sentence(words, lengths, index)
            joint = parents_oracle.enumerate_labelled(as_dense(grammar), sentence)
            given = {z: p for z, p in joint.items() if oracle.shape_of(z) == one.spans(index)}
            assert p_value(count_trees(labelled, index), oracle.posterior(given)) > 1e-3


@pytest.mark.parametrize("single", [False, True])
def test_words_and_rules_of_probability_zero(single):
    grammar = random_low_rank_grammar(2, 3, seed=10)
    emission, mixture = grammar.emission.clone(), grammar.mixture.clone()
    emission[..., -1:] = -inf
    mixture[0, :, :2] = mixture[1, 0] = -inf
    grammar = LowRankGrammar(grammar.root, mixture, grammar.left, grammar.right, emission)
    if single:
        grammar = in_single_precision(grammar)
    words, lengths = torch.tensor([[0, 1, 2, 3], [1, 0, 7, 2]]), torch.tensor([4, 4])
    tables = leaves(grammar)
    potentials = LowRankGrammar(*tables).potentials(words, lengths)
    joint = messages.log_joint_shape(potentials, every_shape(lengths))
    value = inside.log_partition(potentials)
    expected = parents_oracle.log_partition(as_dense(grammar), words[0].tolist())
    assert value[0].item() == pytest.approx(expected, abs=1e-4)
    assert joint[0].logsumexp(-1).item() == pytest.approx(expected, abs=1e-4)
    for one in (value, joint.sum(-1)):
        assert one[1].item() == -inf
        for gradient in torch.autograd.grad(one[1], tables, retain_graph=True):
            assert (gradient == 0).all()
        for gradient in torch.autograd.grad(one[0], tables, retain_graph=True):
            assert gradient.isfinite().all()
    with pytest.raises(UserError, match="sentence 1 of the batch has probability 0 under"):
        inside.sample(potentials, 2)


def test_long_sentences_stay_finite_in_single_precision():
    words, lengths = oracle.random_sentences([60, 45], vocabulary=20)
    trees = Trees.random(lengths, 3, torch.Generator().manual_seed(0))
    double = random_low_rank_grammar(3, 4, 5, 20)
    results = []
    for grammar in (in_single_precision(double), double):
        tables = leaves(grammar)
        potentials = LowRankGrammar(*tables).potentials(words, lengths)
        value = inside.log_partition(potentials)
        joint = messages.log_joint_shape(potentials, trees)
        (value.sum() + joint.sum()).backward()
        results.append((value, joint, *(table.grad for table in tables)))
    assert (results[1][0] < -110).all()
    for one, other in zip(*results, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4)
