from __future__ import annotations

from dataclasses import replace
from math import exp, inf, log

import pytest
import torch
from torch import Tensor

from gfnem.errors import UserError
from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.trees.tree import Trees
from tests.tasks.grammar import oracle
from tests.tasks.grammar.oracle import context_free

LENGTHS = [4, 2, 6, 3, 5]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def in_dtype(grammar: DenseGrammar, dtype: torch.dtype) -> DenseGrammar:
    return DenseGrammar(
        grammar.root.to(dtype), grammar.binary.to(dtype), grammar.emission.to(dtype)
    )


def sparse_grammar(seed: int = 0) -> DenseGrammar:
    """A random grammar without half of its rules and without its last two words."""
    grammar = oracle.random_grammar(seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def thin(log_probability: Tensor) -> Tensor:
        kept = torch.rand(log_probability.shape, generator=generator) < 0.5
        return torch.where(kept, log_probability, -inf)

    emission = grammar.emission.clone()
    emission[..., -2:] = -inf
    return DenseGrammar(grammar.root, thin(grammar.binary), thin(emission))


def as_table(marginals: dict[tuple[int, int], float], length: int) -> Tensor:
    table = torch.zeros(length + 1, length + 1, dtype=torch.float64)
    for (i, j), value in marginals.items():
        table[i, j] = value
    return table


def with_gradients(grammar: DenseGrammar) -> list[Tensor]:
    rules = (grammar.root, grammar.binary, grammar.emission)
    return [rule.clone().requires_grad_() for rule in rules]


@dtypes
def test_log_partition_and_marginals_are_those_of_enumeration(dtype):
    words, lengths = oracle.random_sentences(LENGTHS, seed=1)
    for seed, temperature in enumerate((1.0, 0.3)):
        grammar = oracle.random_grammar(seed=seed, dtype=dtype, temperature=temperature)
        potentials = grammar.potentials(words, lengths)
        value, marginals = inside.log_partition(potentials), inside.span_marginals(potentials)
        assert value.dtype == marginals.dtype == dtype
        for index in range(len(LENGTHS)):
            sentence = oracle.sentence(words, lengths, index)
            expected = as_table(oracle.span_marginals(grammar, sentence), max(LENGTHS))
            assert value[index].item() == pytest.approx(
                oracle.log_partition(grammar, sentence), rel=TOLERANCE[dtype]
            )
            torch.testing.assert_close(
                marginals[index].double(), expected, rtol=0, atol=TOLERANCE[dtype]
            )


@dtypes
def test_expected_counts_are_those_of_enumeration(dtype):
    words, lengths = oracle.random_sentences([3, 5, 2, 4], seed=2)
    grammar = oracle.random_grammar(seed=2, dtype=dtype)
    single = [
        oracle.expected_counts(grammar, oracle.sentence(words, lengths, index))
        for index in range(len(lengths))
    ]
    counts = inside.expected_counts(grammar, words, lengths)
    for name in ("root", "binary", "emission"):
        expected = sum(getattr(one, name) for one in single)
        torch.testing.assert_close(
            getattr(counts, name).double(), expected, rtol=0, atol=3 * TOLERANCE[dtype]
        )


def test_expected_counts_of_long_sentences_add_up():
    words, lengths = oracle.random_sentences([40, 33], vocabulary=12, seed=3)
    counts = inside.expected_counts(oracle.random_grammar(7, 9, 12), words, lengths)
    assert counts.root.sum().item() == pytest.approx(2)
    assert counts.binary.sum().item() == pytest.approx(39 + 32)
    occurrences = torch.cat([words[0], words[1, :33]]).bincount(minlength=12).double()
    torch.testing.assert_close(counts.emission.sum((0, 1)), occurrences)


def test_span_scores_reweight_the_trees_that_hold_the_span():
    words, lengths = oracle.random_sentences(LENGTHS, seed=4)
    grammar = oracle.random_grammar(seed=4)
    scores = torch.randn(
        len(LENGTHS), 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    scores[2, 1, 4] = -inf
    scores[4, 0, 5] = -inf  # the whole of sentence 4, so that no tree is left
    scores.requires_grad_()
    value = inside.log_partition(grammar.potentials(words, lengths), scores)
    for index in range(len(LENGTHS)):
        joint = oracle.enumerate_shapes(grammar, oracle.sentence(words, lengths, index))
        table = scores[index].tolist()
        total = sum(exp(p + sum(table[i][j] for i, j in shape)) for shape, p in joint.items())
        assert value[index].item() == pytest.approx(oracle.log_or_inf(total), rel=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), scores)
    assert gradient.isfinite().all()
    assert gradient[2, 1, 4] == 0
    assert (gradient[4] == 0).all()
    assert gradient[0, 0, 4].item() == pytest.approx(1)


def test_log_partition_passes_gradcheck():
    words, lengths = oracle.random_sentences([5, 2, 4], seed=5)
    potentials = oracle.random_grammar(2, 2, seed=5).potentials(words, lengths)
    scores = 0.1 * torch.arange(3 * 36, dtype=torch.float64).reshape(3, 6, 6).sin()
    names = ("root", "rules", "left", "right", "both")
    tables = [getattr(potentials, name).clone().requires_grad_() for name in names]

    def function(span_scores: Tensor, *tables: Tensor) -> Tensor:
        changed = replace(potentials, **dict(zip(names, tables, strict=True)))
        return inside.log_partition(changed, span_scores)

    torch.autograd.gradcheck(function, (scores.requires_grad_(), *tables))


def test_log_partition_passes_gradcheck_in_the_grammar():
    words, lengths = oracle.random_sentences([2, 5], seed=6)
    rules = with_gradients(oracle.random_grammar(2, 2, seed=6))
    torch.autograd.gradcheck(
        lambda *rules: inside.log_partition(DenseGrammar(*rules).potentials(words, lengths)), rules
    )


@dtypes
def test_words_and_rules_of_probability_zero(dtype):
    words = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 0, 7, 2, 0, 0], [3, 5, 0, 0, 0, 0]])
    lengths = torch.tensor([6, 4, 2])
    impossible = 0
    for seed in range(4):
        grammar = sparse_grammar(seed)
        rules = with_gradients(in_dtype(grammar, dtype))
        potentials = DenseGrammar(*rules).potentials(words, lengths)
        value, marginals = inside.log_partition(potentials), inside.span_marginals(potentials)
        assert value[1] == -inf  # word 7
        for index in range(len(lengths)):
            sentence = oracle.sentence(words, lengths, index)
            expected = oracle.log_partition(grammar, sentence)
            impossible += expected == -inf
            assert value[index].item() == pytest.approx(expected, rel=TOLERANCE[dtype])
            if expected == -inf:
                assert (marginals[index] == 0).all()
            else:
                torch.testing.assert_close(
                    marginals[index].double(),
                    as_table(oracle.span_marginals(grammar, sentence), 6),
                    rtol=0,
                    atol=TOLERANCE[dtype],
                )
        gradients = torch.autograd.grad(value.sum(), rules)
        assert all(gradient.isfinite().all() for gradient in gradients)
        counts = inside.expected_counts(DenseGrammar(*rules), words, lengths)
        for gradient, count in zip(
            gradients, (counts.root, counts.binary, counts.emission), strict=True
        ):
            torch.testing.assert_close(gradient, count)
    assert 4 < impossible < 12


def test_a_word_that_nothing_emits_takes_nothing_from_its_neighbours():
    grammar = oracle.random_grammar(dtype=torch.float32)
    emission = grammar.emission.clone()
    emission[..., 7] = -inf
    rules = with_gradients(DenseGrammar(grammar.root, grammar.binary, emission))
    words, lengths = oracle.random_sentences([40, 35], vocabulary=7, seed=7)
    alone = inside.log_partition(DenseGrammar(*rules).potentials(words, lengths))
    expected = torch.autograd.grad(alone[0], rules)
    words[1, 20] = 7
    value = inside.log_partition(DenseGrammar(*rules).potentials(words, lengths))
    torch.testing.assert_close(value[0], alone[0])
    assert value[1] == -inf
    for gradient, wanted in zip(torch.autograd.grad(value.sum(), rules), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_gradients_do_not_overflow():
    # A -> C T is likely but C -> T T impossible; the only tree has two rules of probability e^-60,
    # so the gradient of p(C -> T T) would be e^120.
    rules = torch.full((3, 4, 4), -inf)
    rules[0, 2, 3], rules[0, 1, 3], rules[1, 3, 3] = log(0.5), -60.0, -60.0
    grammar = context_free(torch.tensor([0.0, -inf, -inf]), rules, torch.zeros(1, 1))
    root, binary, emission = with_gradients(grammar)
    words, lengths = torch.zeros(1, 3, dtype=torch.long), torch.tensor([3])
    potentials = DenseGrammar(root, binary, emission).potentials(words, lengths)
    value = inside.log_partition(potentials)
    assert value.item() == pytest.approx(-120)
    gradients = torch.autograd.grad(value.sum(), (root, binary, emission))
    expected = torch.zeros(3, 4, 4)
    expected[0, 1, 3] = expected[1, 3, 3] = 1
    torch.testing.assert_close(gradients[0], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(gradients[1], expected[None])
    torch.testing.assert_close(gradients[2], torch.tensor([[[3.0]]]))


def test_padding_is_not_read():
    words, lengths = oracle.random_sentences([12, 7, 2], seed=9)
    grammar = oracle.random_grammar(seed=9)
    value = inside.log_partition(grammar.potentials(words, lengths))
    other = torch.where(torch.arange(12) < lengths[:, None], words, 5)
    other = torch.nn.functional.pad(other, (0, 3), value=6)
    potentials = grammar.potentials(other, lengths)
    torch.testing.assert_close(inside.log_partition(potentials), value)
    marginals = inside.span_marginals(potentials)
    for index, length in enumerate(lengths.tolist()):
        alone = grammar.potentials(words[index : index + 1, :length], lengths[index : index + 1])
        torch.testing.assert_close(inside.log_partition(alone)[0], value[index])
        assert marginals[index].sum().item() == pytest.approx(length - 1)
        assert marginals[index, :, length + 1 :].sum() == 0


def test_float32_agrees_with_float64_on_forty_words():
    words, lengths = oracle.random_sentences([40, 40, 31], vocabulary=50, seed=10)
    results = {}
    for dtype in (torch.float32, torch.float64):
        grammar = oracle.random_grammar(15, 30, 50, seed=10, temperature=0.3, dtype=dtype)
        potentials = grammar.potentials(words, lengths)
        results[dtype] = (
            inside.log_partition(potentials).double(),
            inside.span_marginals(potentials).double(),
            inside.expected_counts(grammar, words, lengths).binary.double(),
        )
    for single, double in zip(results[torch.float32], results[torch.float64], strict=True):
        torch.testing.assert_close(single, double, rtol=1e-5, atol=1e-4)


def test_marginals_and_counts_do_not_depend_on_the_callers_gradient_mode():
    words, lengths = oracle.random_sentences(LENGTHS, seed=11)
    grammar = DenseGrammar(*with_gradients(oracle.random_grammar(seed=11)))
    potentials = grammar.potentials(words, lengths)
    marginals = inside.span_marginals(potentials)
    counts = inside.expected_counts(grammar, words, lengths)
    with torch.no_grad():
        torch.testing.assert_close(inside.span_marginals(potentials), marginals)
        again = inside.expected_counts(grammar, words, lengths)
    torch.testing.assert_close(again.binary, counts.binary)
    assert not marginals.requires_grad
    assert grammar.binary.grad is None


def frequencies(trees: Trees, index: int) -> dict:
    """How often each tree of a sentence was drawn, as a fraction; keys as in the oracle."""
    columns = [trees.start, trees.end] + ([] if trees.labels is None else [trees.labels])
    nodes = int(trees.lengths[index]) - 1
    table = torch.stack(columns, -1)[index, :, :nodes]
    distinct, counts = table.unique(dim=0, return_counts=True)
    return {
        frozenset(map(tuple, tree)): count / len(table)
        for tree, count in zip(distinct.tolist(), counts.tolist(), strict=True)
    }


def test_samples_follow_the_posterior():
    words, lengths = oracle.random_sentences([4, 2, 6], seed=12)
    grammar = oracle.random_grammar(seed=12, temperature=0.5)
    samples = 20000
    trees = inside.sample(
        grammar.potentials(words, lengths), samples, torch.Generator().manual_seed(0)
    )
    assert trees.start.shape == (3, samples, 5)
    assert trees.labels is not None
    assert (trees.labels[0, :, 3:] == -1).all()
    for index in range(3):
        sentence = oracle.sentence(words, lengths, index)
        labelled = oracle.enumerate_labelled(grammar, sentence)
        shapes = oracle.enumerate_shapes(grammar, sentence)
        for drawn, joint in ((trees, labelled), (trees.shapes(), shapes)):
            posterior, frequency = oracle.posterior(joint), frequencies(drawn, index)
            assert set(frequency) <= set(posterior)
            total_variation = sum(abs(frequency.get(z, 0) - p) for z, p in posterior.items()) / 2
            # On average |frequency - p| is at most the frequency's standard deviation.
            expected = sum((p / samples) ** 0.5 for p in posterior.values()) / 2
            assert total_variation < 2 * expected
    # Two draws of one sentence are independent: they agree as often as the posterior says.
    posterior = oracle.posterior(oracle.enumerate_labelled(grammar, words[0, :4].tolist()))
    same = (trees.start[0, ::2] == trees.start[0, 1::2]) & (trees.end[0, ::2] == trees.end[0, 1::2])
    agree = (same & (trees.labels[0, ::2] == trees.labels[0, 1::2])).all(-1).double().mean()
    assert agree.item() == pytest.approx(sum(p * p for p in posterior.values()), abs=0.015)


def test_samples_of_a_sparse_grammar_are_possible_and_the_generator_decides_them():
    words, lengths = oracle.random_sentences([6, 5], vocabulary=6, seed=13)
    grammar = sparse_grammar(seed=2)
    potentials = grammar.potentials(words, lengths)
    trees = inside.sample(potentials, 50, torch.Generator().manual_seed(1))
    for index in range(2):
        sentence = oracle.sentence(words, lengths, index)
        for number in range(50):
            tree = oracle.tree_at(trees, index, number)
            assert oracle.log_joint_labelled(grammar, sentence, tree) > -inf
    again = inside.sample(potentials, 50, torch.Generator().manual_seed(1), labelled=False)
    assert torch.equal(again.start, trees.start)
    assert torch.equal(again.end, trees.end)
    assert again.labels is None


@dtypes
def test_viterbi_is_the_best_of_all_labelled_trees(dtype):
    words, lengths = oracle.random_sentences(LENGTHS, seed=14)
    for grammar in (oracle.random_grammar(seed=14), oracle.random_grammar(4, 2, seed=15)):
        trees, value = inside.viterbi(in_dtype(grammar, dtype).potentials(words, lengths))
        assert trees.start.shape == (len(LENGTHS), 1, max(LENGTHS) - 1)
        for index in range(len(LENGTHS)):
            sentence = oracle.sentence(words, lengths, index)
            joint = oracle.enumerate_labelled(grammar, sentence)
            best = max(joint, key=joint.__getitem__)
            assert oracle.tree_at(trees, index) == best
            assert value[index].item() == pytest.approx(joint[best], rel=TOLERANCE[dtype])


def test_minimum_bayes_risk_is_the_best_of_all_shapes():
    lengths = torch.tensor(LENGTHS)
    generator = torch.Generator().manual_seed(16)
    for _ in range(5):
        scores = torch.randn(len(LENGTHS), 7, 7, dtype=torch.float64, generator=generator)
        trees = inside.minimum_bayes_risk(scores, lengths)
        assert trees.labels is None
        for index, length in enumerate(LENGTHS):
            table = scores[index].tolist()
            best = max(oracle.shapes(length), key=lambda s: sum(table[i][j] for i, j in s))
            assert trees.spans(index) == best


def test_minimum_bayes_risk_of_marginals_has_the_most_expected_correct_spans():
    words, lengths = oracle.random_sentences([6], seed=17)
    grammar = oracle.random_grammar(seed=17)
    marginals = inside.span_marginals(grammar.potentials(words, lengths))
    tree = inside.minimum_bayes_risk(marginals, lengths).spans(0)
    posterior = oracle.posterior(
        oracle.enumerate_shapes(grammar, oracle.sentence(words, lengths, 0))
    )

    def expected_correct(candidate: oracle.Shape) -> float:
        return sum(p * len(candidate & shape) for shape, p in posterior.items())

    assert expected_correct(tree) == pytest.approx(max(map(expected_correct, posterior)))


@pytest.mark.parametrize("decode", [lambda p: inside.sample(p, 3), inside.viterbi])
def test_an_impossible_sentence_has_no_tree(decode):
    words = torch.tensor([[1, 2, 3], [1, 7, 3]])
    potentials = sparse_grammar().potentials(words, torch.tensor([2, 3]))
    with pytest.raises(UserError, match="sentence 1 of the batch has probability 0"):
        decode(potentials)


def test_agrees_with_torch_struct():
    torch_struct = pytest.importorskip("torch_struct")
    words, lengths = oracle.random_sentences([9, 5, 7], vocabulary=20, seed=18)
    grammar = oracle.random_grammar(4, 6, 20, seed=18)
    terms = grammar.emission.t()[words]
    rules = grammar.binary.expand(3, -1, -1, -1)
    distribution = torch_struct.SentCFG((terms, rules, grammar.root.expand(3, -1)), lengths)
    potentials = grammar.potentials(words, lengths)
    torch.testing.assert_close(inside.log_partition(potentials), distribution.partition)
    counts = inside.expected_counts(grammar, words, lengths)
    torch.testing.assert_close(counts.binary, distribution.marginals[1].sum(0))


def test_two_words_by_hand():
    # S -> A (1); A -> T U (1/4), A -> U T (3/4) in place of everything else.
    binary = torch.full((1, 3, 3), -inf, dtype=torch.float64)
    binary[0, 1, 2], binary[0, 2, 1] = log(1 / 4), log(3 / 4)
    emission = torch.tensor([[0.5, 0.5], [0.1, 0.9]], dtype=torch.float64).log()
    grammar = context_free(torch.zeros(1, dtype=torch.float64), binary, emission)
    words = torch.tensor([[0, 1]])
    value = inside.log_partition(grammar.potentials(words, torch.tensor([2])))
    assert value.item() == pytest.approx(log(0.25 * 0.5 * 0.9 + 0.75 * 0.1 * 0.5))
