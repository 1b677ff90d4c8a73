from __future__ import annotations

import re
from collections import Counter
from math import exp
from typing import Any

import pytest
import torch

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.posteriors.exact import ExactPosterior
from gfnem.tasks.grammar.decode import parse
from gfnem.tasks.grammar.networks import NeuralNCFG
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.rules.low_rank import LowRankGrammar
from gfnem.tasks.grammar.text.sources import toy_english
from gfnem.tasks.grammar.trees.tree import Trees
from tests.tasks.grammar import oracle, parents_oracle
from tests.tasks.grammar.tiny import (
    LATENTS,
    POLICIES,
    count_trees,
    every_shape,
    float64,  # noqa: F401
    make_policy,
    p_value,
    sentences,
    words_of,
)

pytestmark = pytest.mark.usefixtures("float64")

VOCABULARY = 2
RANKS = (None, 3)


def neural_ncfg(**options) -> NeuralNCFG:
    torch.manual_seed(3)
    options = {"nonterminals": 2, "preterminals": 2, "width": 8, "max_length": 4, **options}
    model = NeuralNCFG(VOCABULARY, **options)
    with torch.no_grad():
        # Far enough from uniform rules to tell one context from another.
        model.symbol.mul_(4)
        model.context.mul_(4)
    return model


def rules_of(model: NeuralNCFG) -> DenseGrammar:
    with torch.no_grad():
        grammar = model.grammar()
    if isinstance(grammar, LowRankGrammar):
        return parents_oracle.as_dense(grammar)
    assert isinstance(grammar, DenseGrammar)
    return grammar


@pytest.mark.parametrize("rank", RANKS)
def test_rules_are_normalised_and_see_the_parent(rank):
    grammar = rules_of(neural_ncfg(rank=rank))
    assert grammar.binary.shape == (3, 2, 4, 4)
    assert grammar.emission.shape == (2, 2, VOCABULARY)
    for rules in (grammar.root, grammar.binary.flatten(2), grammar.emission):
        torch.testing.assert_close(rules.logsumexp(-1), torch.zeros(rules.shape[:-1]))
    for rules in (grammar.binary, grammar.emission):
        assert ((rules[0] - rules[1]).abs().amax(dim=(-1, -2)) > 0.01).all()


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("latent", ["shape", "labelled"])
def test_values_are_those_of_enumeration(latent, rank):
    model = neural_ncfg(latent=latent, rank=rank)
    grammar = rules_of(model)
    x = sentences([5, 2, 4, 3], VOCABULARY)
    z = every_shape(x.lengths)
    if latent == "labelled":
        z = model.sample_posterior(x, 20)
        assert z.labels is not None
    value, log_likelihood = model.log_joint(x, z), model.log_likelihood(x)
    assert log_likelihood is not None
    assert value.requires_grad and log_likelihood.requires_grad
    for index in range(len(x)):
        words = words_of(x, index)
        expected = parents_oracle.log_partition(grammar, words)
        assert log_likelihood[index].item() == pytest.approx(expected, abs=1e-10)
        if latent == "shape":
            joint: dict[Any, float] = parents_oracle.enumerate_shapes(grammar, words)
            trees = [z.spans(index, sample) for sample in range(z.start.shape[1])]
        else:
            joint = parents_oracle.enumerate_labelled(grammar, words)
            trees = [oracle.tree_at(z, index, sample) for sample in range(z.start.shape[1])]
        expected = torch.tensor([joint[tree] for tree in trees])
        torch.testing.assert_close(value[index].detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", RANKS)
def test_posterior_draws_are_of_the_model_s_latent(rank):
    x = sentences([3, 4], VOCABULARY)
    assert neural_ncfg(latent="shape", rank=rank).sample_posterior(x, 2).labels is None
    model = neural_ncfg(latent="labelled", rank=rank)
    torch.manual_seed(0)
    z = model.sample_posterior(x, 5_000)
    for index in range(2):
        joint = parents_oracle.enumerate_labelled(rules_of(model), words_of(x, index))
        assert p_value(count_trees(z, index), oracle.posterior(joint)) > 1e-3


@pytest.mark.parametrize("rank", RANKS)
def test_draws_have_the_frequencies_of_their_likelihood_and_posterior(rank):
    model = neural_ncfg(tries=1, rank=rank)
    grammar = rules_of(model)
    n = 12_000
    x, z = model.sample(n, torch.Generator().manual_seed(1))
    assert z.labels is not None and torch.equal(z.lengths, x.lengths)
    assert len(x) + int(model.rejected) == n
    trees = Counter(
        (tuple(words_of(x, index)), oracle.tree_at(z, index))
        for index in range(len(x))
        if x.lengths[index] <= 3
    )
    probabilities: dict[Any, float] = {}
    for length in (2, 3):
        for words in torch.cartesian_prod(*[torch.arange(VOCABULARY)] * length).tolist():
            for tree, log_joint in parents_oracle.enumerate_labelled(grammar, words).items():
                probabilities[tuple(words), tree] = exp(log_joint)
    probabilities["longer"] = 1 - sum(probabilities.values())
    assert 0.05 < probabilities["longer"] < 0.95
    assert p_value({**trees, "longer": n - sum(trees.values())}, probabilities) > 1e-3


def test_no_likelihood_of_many_nonterminals():
    x = sentences([3], VOCABULARY)
    assert neural_ncfg(nonterminals=40).tractable
    few, many = (neural_ncfg(nonterminals=n, rank=2) for n in (100, 101))
    assert few.tractable and few.log_likelihood(x) is not None
    assert many.log_likelihood(x) is None
    for model in (many, neural_ncfg(nonterminals=41)):
        message = (
            f"posterior=exact: this NeuralNCFG is too large for it (model.nonterminals is "
            f"{model.nonterminals}; at most 40, or 100 with model.rank=R); make it smaller"
        )
        assert not model.tractable
        with pytest.raises(UserError, match=re.escape(message)):
            EM(model, ExactPosterior(), toy_english(train_sentences=10), m_steps=1)


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("latent", LATENTS)
def test_forests_of_rules_of_low_rank_have_the_model_s_scores(kind, latent):
    model = neural_ncfg(rank=3, nonterminals=3, preterminals=3, latent=latent)
    policy, x = make_policy(kind, latent), sentences([5, 2, 4, 3], VOCABULARY)
    paths = policy.sample(policy.condition(model, x), 4)
    torch.testing.assert_close(paths.log_joint, model.log_joint(x, paths.z).detach())


@pytest.mark.parametrize("rank", RANKS)
def test_parse_draws_labels_from_their_exact_posterior(rank):
    model = neural_ncfg(rank=rank)
    x = sentences([3] * 2_000, VOCABULARY)
    x.words[:] = torch.tensor([0, 1, 1])
    torch.manual_seed(0)
    trees = parse(model, ExactPosterior(), x, [["a", "b", "b"]] * 2_000, "sample")
    counts = Counter(str(tree) for tree in trees)
    joint = parents_oracle.enumerate_labelled(rules_of(model), [0, 1, 1])
    names = {
        str(_only(tree).to_nltk(0, ["a", "b", "b"])): p
        for tree, p in oracle.posterior(joint).items()
    }
    assert p_value(counts, names) > 1e-3


def _only(tree: oracle.LabelledTree) -> Trees:
    return oracle.to_trees([[tree]], torch.tensor([3]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"latent": "tree"}, "latent is 'tree'; use 'shape' or 'labelled'"),
        ({"nonterminals": 0}, "model.nonterminals is 0; it must be at least 1"),
        ({"rank": 0}, "model.rank is 0; it must be at least 1"),
    ],
)
def test_arguments_that_make_no_grammar(options, message):
    with pytest.raises(UserError, match=message):
        neural_ncfg(**options)
