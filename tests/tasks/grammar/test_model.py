from __future__ import annotations

from collections import Counter, defaultdict
from itertools import product
from math import exp, log, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from gfnem.errors import UserError
from gfnem.tasks.grammar.networks import NeuralPCFG
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.text.corpus import Sentences
from tests.tasks.grammar import oracle
from tests.tasks.grammar.oracle import tree_at
from tests.tasks.grammar.tiny import (
    LATENTS,
    count_trees,
    enumerate_trees,
    every_shape,
    float64,  # noqa: F401
    log_likelihood,
    p_value,
    sentences,
    words_of,
)

pytestmark = pytest.mark.usefixtures("float64")

VOCABULARY = 2


def neural_pcfg(**options) -> NeuralPCFG:
    torch.manual_seed(2)
    options = {"nonterminals": 2, "preterminals": 3, "width": 8, "max_length": 4, **options}
    return NeuralPCFG(VOCABULARY, **options)


def rules_of(model: NeuralPCFG) -> DenseGrammar:
    grammar = model.grammar().map(Tensor.detach)
    assert isinstance(grammar, DenseGrammar)
    return grammar


def never_stops(**options) -> NeuralPCFG:
    """Every symbol has two nonterminals as children."""
    model = neural_pcfg(nonterminals=2, preterminals=2, **options)
    with torch.no_grad():
        bias = model.binary_rules.bias.view(4, 4)
        bias.zero_()
        bias[:2, :2] = 1000.0
    return model


def every_sentence(max_length: int) -> Sentences:
    """All sentences of 2 to max_length words."""
    words, lengths = [], []
    for length in range(2, max_length + 1):
        some = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * length)
        words.append(torch.nn.functional.pad(some, (0, max_length - length)))
        lengths += [length] * len(some)
    return Sentences(torch.cat(words), torch.tensor(lengths), torch.arange(len(lengths)))


def test_rules_are_normalised():
    grammar = rules_of(neural_pcfg())
    assert grammar.root.shape == (2,)
    assert grammar.binary.shape == (1, 2, 5, 5)
    assert grammar.emission.shape == (1, 3, VOCABULARY)
    for rules in (grammar.root, grammar.binary.flatten(2), grammar.emission):
        assert (rules.exp() > 0).all()
        torch.testing.assert_close(rules.logsumexp(-1), torch.zeros(rules.shape[:-1]))


@pytest.mark.parametrize("latent", ["shape", "labelled"])
def test_values_are_those_of_enumeration(latent):
    model = neural_pcfg(latent=latent)
    grammar = rules_of(model)
    x = sentences([5, 2, 4, 3], VOCABULARY)
    z = every_shape(x.lengths)
    if latent == "labelled":
        z = model.sample_posterior(x, 20)
        assert z.labels is not None
    value, total = model.log_joint(x, z), log_likelihood(model, x)
    assert value.requires_grad and total.requires_grad
    for index in range(len(x)):
        words = words_of(x, index)
        expected = oracle.log_partition(grammar, words)
        assert total[index].item() == pytest.approx(expected, abs=1e-10)
        if latent == "shape":
            joint: dict[Any, float] = oracle.enumerate_shapes(grammar, words)
            trees = [z.spans(index, sample) for sample in range(z.start.shape[1])]
        else:
            joint = oracle.enumerate_labelled(grammar, words)
            trees = [oracle.tree_at(z, index, sample) for sample in range(z.start.shape[1])]
        expected = torch.tensor([joint[tree] for tree in trees])
        torch.testing.assert_close(value[index].detach(), expected, rtol=0, atol=1e-10)


def test_posterior_draws_are_of_the_model_s_latent():
    x = sentences([3, 4], VOCABULARY)
    assert neural_pcfg(latent="shape").sample_posterior(x, 2).labels is None
    assert neural_pcfg(latent="labelled").sample_posterior(x, 2).labels is not None


def test_sampled_sentences_have_the_frequencies_of_their_likelihood():
    """Of all draws, those that were rejected as too long among them."""
    model = neural_pcfg(tries=3)
    n = 8_000
    x, z = model.sample(n, torch.Generator().manual_seed(0))
    everything = every_sentence(model.max_length)
    values = log_likelihood(model, everything).tolist()
    probabilities: dict[Any, float] = {
        tuple(words_of(everything, index)): exp(value) for index, value in enumerate(values)
    }
    fits = sum(probabilities.values())
    assert 0.2 < 1 - fits < 0.8
    assert all(n * p > 10 for p in probabilities.values())
    probabilities["too long"] = 1 - fits
    counts = Counter(tuple(words_of(x, index)) for index in range(len(x)))
    rejected = int(model.rejected)
    assert len(x) < n
    assert n < len(x) + rejected < 3 * n
    # Those that were rejected in the last round were not drawn again.
    expected = n * (1 - (1 - fits) ** 3)
    assert len(x) == pytest.approx(expected, abs=4 * sqrt(n))
    assert p_value({**counts, "too long": rejected}, probabilities) > 1e-3
    assert (x.ids == -1).all()
    assert x.words.shape[1] == int(x.lengths.max()) == model.max_length
    assert (x.words[torch.arange(x.words.shape[1]) >= x.lengths[:, None]] == 0).all()


def test_sampled_trees_have_the_frequencies_of_their_posterior():
    model = neural_pcfg(tries=1)
    grammar = rules_of(model)
    x, z = model.sample(12_000, torch.Generator().manual_seed(1))
    assert z.labels is not None and z.start.shape[1] == 1
    assert torch.equal(z.lengths, x.lengths)
    common = Counter(tuple(words_of(x, index)) for index in range(len(x)) if x.lengths[index] == 4)
    for words, count in common.most_common(2):
        assert count > 100
        same = [index for index in range(len(x)) if tuple(words_of(x, index)) == words]
        trees = Counter(oracle.tree_at(z, index) for index in same)
        exact = oracle.posterior(oracle.enumerate_labelled(grammar, words))
        assert p_value(trees, exact) > 1e-3


@pytest.mark.parametrize("latent", LATENTS)
def test_prior_draws_have_the_frequencies_of_trees_of_their_length_over_all_sentences(latent):
    model, lengths, samples = neural_pcfg(latent=latent), [4, 2, 3], 5_000
    grammar = rules_of(model)
    torch.manual_seed(0)
    z, log_prior = model.sample_prior(sentences(lengths, VOCABULARY), samples)
    assert (z.labels is None) == (latent == "shape") and log_prior.shape == (3, samples)
    for index, length in enumerate(lengths):
        joint: defaultdict[Any, float] = defaultdict(float)
        for words in product(range(VOCABULARY), repeat=length):
            for tree, value in enumerate_trees(grammar, words, latent).items():
                joint[tree] += exp(value)
        p = {tree: value / sum(joint.values()) for tree, value in joint.items()}
        assert p_value(count_trees(z, index), p) > 1e-3
        for sample in range(20):
            tree = z.spans(index, sample) if latent == "shape" else tree_at(z, index, sample)
            assert float(log_prior[index, sample]) == pytest.approx(log(p[tree]))


def test_posterior_samples_have_the_frequencies_of_the_posterior():
    model = neural_pcfg(latent="labelled")
    grammar = rules_of(model)
    x = sentences([4, 3], VOCABULARY)
    torch.manual_seed(0)
    z = model.sample_posterior(x, 5_000)
    for index in range(2):
        exact = oracle.posterior(oracle.enumerate_labelled(grammar, words_of(x, index)))
        assert p_value(count_trees(z, index), exact) > 1e-3


def test_draws_that_do_not_fit_are_counted_and_tries_are_bounded():
    model = never_stops(tries=3, max_length=10)
    x, z = model.sample(5, torch.Generator().manual_seed(0))
    assert len(x) == 0
    assert x.words.shape[0] == z.start.shape[0] == 0
    assert z.labels is not None and z.labels.shape == z.start.shape
    assert int(model.rejected) == 15
    model.sample(4)
    assert int(model.rejected) == 15 + 12
    assert int(model.state_dict()["rejected"]) == 27
    assert model.log_joint(x, z).shape == (0, 1)


def test_nothing_is_redrawn_when_all_fits():
    model = neural_pcfg()
    with torch.no_grad():
        bias = model.binary_rules.bias.view(5, 5)
        bias.fill_(-1000.0)
        bias[2:, 2:] = 0.0
    x, z = model.sample(50, torch.Generator().manual_seed(0))
    z = z.shapes()
    assert len(x) == 50 and (x.lengths == 2).all()
    assert int(model.rejected) == 0
    assert (z.start == 0).all() and (z.end == 2).all()
    assert log_likelihood(model, sentences([3], VOCABULARY)).item() < -500
    torch.testing.assert_close(model.log_joint(x, z)[:, 0], log_likelihood(model, x))


def test_the_same_generator_gives_the_same_draws():
    model = neural_pcfg()
    first, second, other = (
        model.sample(64, torch.Generator().manual_seed(seed))[0].words.tolist()
        for seed in (0, 0, 1)
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize(
    "options, message",
    [
        ({"latent": "tree"}, "latent is 'tree'; use 'shape' or 'labelled'"),
        ({"nonterminals": 0}, "model.nonterminals is 0; it must be at least 1"),
        ({"preterminals": -1}, "model.preterminals is -1; it must be at least 1"),
        ({"width": 0}, "model.width is 0; it must be at least 1"),
        ({"tries": 0}, "model.tries is 0; it must be at least 1"),
    ],
)
def test_arguments_that_make_no_grammar(options, message):
    with pytest.raises(UserError, match=message):
        NeuralPCFG(VOCABULARY, **{"nonterminals": 2, "preterminals": 2, "width": 4, **options})
