"""Every family of grammars has every ability: likelihood, trees, draws and posteriors, in one place
and against enumeration.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from math import exp
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gfnem.posteriors.exact import ExactPosterior
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.posteriors.importance import ImportancePosterior
from gfnem.posteriors.mcmc import MCMC
from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.policies.chart import ChartPolicy
from gfnem.tasks.grammar.policies.moves import Rotations
from gfnem.tasks.grammar.policies.root_flow import RootFlowPolicy
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.rules.grammar import Grammar
from gfnem.tasks.grammar.rules.low_rank import LowRankGrammar
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.tree import Trees
from tests.tasks.grammar import oracle, parents_oracle
from tests.tasks.grammar.parents_oracle import random_low_rank_grammar
from tests.tasks.grammar.tiny import (
    count_trees,
    every_shape,
    float64,  # noqa: F401
    log_likelihood,
    p_value,
    sentences,
    total_variation,
    words_of,
)

pytestmark = pytest.mark.usefixtures("float64")

LABELS, PRETERMINALS, WORDS = 2, 3, 4
LENGTHS = [4, 2, 3]


def low_rank_context_free() -> LowRankGrammar:
    grammar = random_low_rank_grammar(LABELS, PRETERMINALS, 3, WORDS, seed=1)
    return LowRankGrammar(
        grammar.root, grammar.mixture[:1], grammar.left, grammar.right, grammar.emission[:1]
    )


FAMILIES: dict[str, Grammar] = {
    "context-free": oracle.random_grammar(LABELS, PRETERMINALS, WORDS, seed=1, temperature=0.5),
    "parents": parents_oracle.random_grammar(LABELS, PRETERMINALS, WORDS, 1, temperature=0.5),
    "context-free, low rank": low_rank_context_free(),
    "parents, low rank": random_low_rank_grammar(LABELS, PRETERMINALS, 3, WORDS, seed=1),
}


class Fixed(GrammarModel):
    """Its parameters are the rules' log-probabilities themselves."""

    def __init__(self, rules: Grammar, latent: Any = "shape"):
        super().__init__(latent, max_length=4)
        self.rules = rules
        self.table_list = nn.ParameterList(vars(rules).values())

    def grammar(self) -> Grammar:
        tables = iter(self.table_list)
        return self.rules.map(lambda _: next(tables))


def enumerable(grammar: Grammar) -> DenseGrammar:
    """The same rules one by one, under every label above."""
    tables = grammar.map(Tensor.detach)
    if isinstance(tables, LowRankGrammar):
        tables = parents_oracle.as_dense(tables)
    assert isinstance(tables, DenseGrammar)
    return DenseGrammar(
        tables.root,
        tables.binary.expand(LABELS + 1, -1, -1, -1),
        tables.emission.expand(LABELS, -1, -1),
    )


@pytest.fixture(params=FAMILIES)
def grammar(request: pytest.FixtureRequest) -> Grammar:
    return FAMILIES[request.param]


def joint(grammar: Grammar, words: list[int], latent: str = "labelled") -> dict[Any, float]:
    """log p(x, z) of every z."""
    of = parents_oracle.enumerate_shapes
    return (of if latent == "shape" else parents_oracle.enumerate_labelled)(
        enumerable(grammar), words
    )


def test_likelihood_and_its_gradient(grammar):
    model, x = Fixed(grammar), sentences(LENGTHS, WORDS)
    value = log_likelihood(model, x)
    for index in range(len(x)):
        expected = parents_oracle.log_partition(enumerable(grammar), words_of(x, index))
        assert value[index].item() == pytest.approx(expected, abs=1e-10)
    rules = list(vars(grammar).values())
    assert torch.autograd.gradcheck(
        lambda *tables: inside.log_partition(
            type(grammar)(*tables).potentials(x.words, x.lengths)  # pyright: ignore
        ),
        [rule.clone().requires_grad_() for rule in rules],
    )


def test_expected_counts_are_those_of_enumeration(grammar):
    x = sentences(LENGTHS, WORDS)
    counts = inside.expected_counts(grammar, x.words, x.lengths)
    single = [
        parents_oracle.expected_counts(enumerable(grammar), words_of(x, index))
        for index in range(len(x))
    ]
    root, binary, emission = (torch.stack(one).sum(0) for one in zip(*single, strict=True))
    torch.testing.assert_close(counts.root, root)
    seen = len(counts.emission)
    torch.testing.assert_close(counts.emission, emission if seen > 1 else emission.sum(0)[None])
    if isinstance(counts, DenseGrammar):
        seen = len(counts.binary)
        torch.testing.assert_close(counts.binary, binary if seen > 1 else binary.sum(0)[None])
    else:
        # Each rule used draws r once, and once each child.
        assert isinstance(counts, LowRankGrammar)
        for table in (counts.mixture, counts.left, counts.right):
            assert table.sum().item() == pytest.approx(sum(LENGTHS) - len(LENGTHS))
        torch.testing.assert_close(counts.left.sum(0), binary.sum((0, 1, 3)))


@pytest.mark.parametrize("latent", ["shape", "labelled"])
def test_log_joint_and_its_gradient(grammar, latent):
    model, x = Fixed(grammar, latent), sentences(LENGTHS, WORDS)
    z = every_shape(x.lengths)
    if latent == "labelled":
        z = inside.sample(model.potentials(x), 9, torch.Generator().manual_seed(0))
    value = model.log_joint(x, z)
    given = model.log_joint_given(model.potentials(x), z)
    for index in range(len(x)):
        every = joint(grammar, words_of(x, index), latent)
        for sample in range(z.start.shape[1]):
            tree: Any = z.spans(index, sample)
            if latent == "labelled":
                tree = oracle.tree_at(z, index, sample)
            assert value[index, sample].item() == pytest.approx(every[tree], abs=1e-10)
    torch.testing.assert_close(value, given)
    one, other = (
        torch.autograd.grad(log_joint.sum(), list(model.parameters()))
        for log_joint in (value, given)
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_shapes_weighted_by_the_posterior_are_those_of_the_likelihood(grammar):
    model, x = Fixed(grammar), sentences([5], WORDS)
    value = model.log_joint(x, every_shape(x.lengths))
    parameters = list(model.parameters())
    one = torch.autograd.grad((value.detach().softmax(-1) * value).sum(), parameters)
    other = torch.autograd.grad(log_likelihood(model, x).sum(), parameters)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def test_marginals_and_the_tree_of_least_risk(grammar):
    model, x = Fixed(grammar), sentences(LENGTHS, WORDS)
    marginals = inside.span_marginals(model.potentials(x))
    best = inside.minimum_bayes_risk(marginals, x.lengths)
    for index, length in enumerate(LENGTHS):
        posterior = oracle.posterior(joint(grammar, words_of(x, index), "shape"))
        expected = torch.zeros_like(marginals[index])
        for shape, probability in posterior.items():
            for i, j in shape:
                expected[i, j] += probability
        torch.testing.assert_close(marginals[index], expected)
        risk = {shape: sum(float(expected[i, j]) for i, j in shape) for shape in posterior}
        assert risk[best.spans(index)] == pytest.approx(max(risk.values()))
        assert len(best.spans(index)) == length - 1


def test_the_best_tree(grammar, monkeypatch):
    x = sentences(LENGTHS, WORDS)
    potentials = grammar.potentials(x.words, x.lengths)
    trees, value = inside.viterbi(potentials)
    for index in range(len(x)):
        every = joint(grammar, words_of(x, index))
        assert value[index].item() == pytest.approx(max(every.values()), abs=1e-10)
        assert every[oracle.tree_at(trees, index)] == pytest.approx(value[index].item())
    # One sentence at once, where rules take much memory.
    monkeypatch.setattr(inside, "MOST_WRITTEN_OUT", 1)
    again, values = inside.viterbi(potentials)
    torch.testing.assert_close(values, value)
    assert again.labels is not None and trees.labels is not None
    assert torch.equal(again.start, trees.start) and torch.equal(again.labels, trees.labels)


@pytest.mark.parametrize("latent", ["shape", "labelled"])
def test_exact_draws(grammar, latent):
    model, x = Fixed(grammar, latent), sentences(LENGTHS, WORDS)
    torch.manual_seed(0)
    z = model.sample_posterior(x, 8_000)
    assert (z.labels is not None) == (latent == "labelled")
    for index in range(len(x)):
        exact = oracle.posterior(joint(grammar, words_of(x, index), latent))
        assert p_value(count_trees(z, index), exact) > 1e-3


def test_labels_given_the_shape(grammar):
    model, x = Fixed(grammar), sentences(LENGTHS, WORDS)
    torch.manual_seed(0)
    one = Trees.random(x.lengths, 1)
    many = Trees(one.start.expand(-1, 8_000, -1), one.end.expand(-1, 8_000, -1), x.lengths)
    labelled = model.sample_labels(model.potentials(x), many)
    for index in range(len(x)):
        every = joint(grammar, words_of(x, index))
        given = {z: p for z, p in every.items() if oracle.shape_of(z) == one.spans(index)}
        assert p_value(count_trees(labelled, index), oracle.posterior(given)) > 1e-3


def test_ancestral_draws(grammar):
    model = Fixed(grammar)
    x, z = model.sample(6_000, torch.Generator().manual_seed(0))
    assert z.labels is not None and ((z.labels >= 0) == z.exists).all()
    found = Counter(tuple(words_of(x, index)) for index in range(len(x)))
    pairs = sentences([2] * WORDS**2, WORDS)
    every = torch.cartesian_prod(torch.arange(WORDS), torch.arange(WORDS))
    value = log_likelihood(model, type(x)(every, pairs.lengths, pairs.ids)).exp()
    # Of sentences of two words, the shares among all that are as short.
    counts = {tuple(words): found[tuple(words)] for words in every.tolist()}
    expected = dict(zip(counts, (value / value.sum()).tolist(), strict=True))
    assert sum(counts.values()) > 500
    assert p_value(counts, expected) > 1e-3


def test_draws_of_the_prior(grammar):
    model, x = Fixed(grammar, "labelled"), sentences([3], WORDS)
    torch.manual_seed(0)
    z, log_probability = model.sample_prior(x, 6_000)
    every: dict[Any, float] = defaultdict(float)
    for words in torch.cartesian_prod(*[torch.arange(WORDS)] * 3).tolist():
        for tree, value in joint(grammar, words).items():
            every[tree] += exp(value)
    prior = {tree: p / sum(every.values()) for tree, p in every.items()}
    assert p_value(count_trees(z, 0), prior) > 1e-3
    tree = oracle.tree_at(z, 0, 7)
    assert log_probability[0, 7].exp().item() == pytest.approx(prior[tree])


LATENTS = pytest.mark.parametrize("latent", ["shape", "labelled"])


def assert_draws_are_of_the_posterior(z: Trees, grammar: Grammar, x: Sentences, latent: str):
    for index in range(len(x)):
        exact = oracle.posterior(joint(grammar, words_of(x, index), latent))
        drawn = {tree: count / z.start.shape[1] for tree, count in count_trees(z, index).items()}
        assert total_variation(drawn, exact) < 0.04


@LATENTS
@pytest.mark.parametrize("exact", [True, False])
def test_gflownets(grammar, exact, latent):
    """Weights of draws are unbiased for p(x); with an exact guide they are p(x)."""
    model, x = Fixed(grammar, latent), sentences(LENGTHS, WORDS)
    torch.manual_seed(0)
    if exact:
        policy = ChartPolicy(LABELS, PRETERMINALS, 4, latent, guide="exact", width=8)
    else:
        policy = RootFlowPolicy(LABELS, PRETERMINALS, 4, latent, width=8)
    posterior = GFlowNetPosterior(policy, samples=4, sleep=1.0)
    posterior.check(model)
    loss = posterior.e_step(model, x).loss
    assert loss is not None and loss.isfinite()
    with torch.no_grad():
        log_weights = posterior.sample(model, x, 3_000).log_weights
    assert log_weights is not None
    ratio = (log_weights - log_likelihood(model, x)[:, None]).exp()
    if exact:
        torch.testing.assert_close(ratio, torch.ones_like(ratio))
    error = ratio.std(-1) / ratio.shape[1] ** 0.5
    assert (error < 0.1).all()
    assert ((ratio.mean(-1) - 1).abs() < 4 * error + 1e-9).all()


@LATENTS
def test_chains(grammar, latent):
    model, x = Fixed(grammar, latent), sentences(LENGTHS, WORDS)
    torch.manual_seed(0)
    z = MCMC(Rotations(), 5_000, steps=5, burn_in=20).m_step_latents(model, x).z
    assert_draws_are_of_the_posterior(z, grammar, x, latent)


@LATENTS
def test_candidates_of_the_prior(grammar, latent):
    model, x = Fixed(grammar, latent), sentences(LENGTHS, WORDS)
    torch.manual_seed(0)
    latents = ImportancePosterior(proposals=20_000).sample(model, x, 10_000)
    assert_draws_are_of_the_posterior(latents.z, grammar, x, latent)
    assert latents.log_weights is not None
    torch.testing.assert_close(
        latents.log_weights[:, 0], log_likelihood(model, x), rtol=0, atol=0.05
    )


@LATENTS
def test_the_exact_posterior_needs_no_weights(grammar, latent):
    model, x = Fixed(grammar, latent), sentences(LENGTHS, WORDS)
    posterior = ExactPosterior()
    posterior.check(model)
    log_weights = posterior.sample(model, x, 3).log_weights
    assert log_weights is not None
    torch.testing.assert_close(log_weights, log_likelihood(model, x)[:, None].expand(-1, 3))
