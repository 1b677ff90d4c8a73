"""Rotations held to the Metropolis-Hastings kernel over all trees, written out."""

from __future__ import annotations

from math import inf

import pytest
import torch

from gfnem.errors import UserError
from gfnem.posteriors.mcmc import MCMC
from gfnem.tasks.grammar.policies.moves import Rotations
from tests.tasks.discrete_vae.tiny import make_model as make_vae
from tests.tasks.grammar import oracle, parents_oracle
from tests.tasks.grammar.tiny import (
    LATENTS,
    FixedModel,
    count_trees,
    enumerate_trees,
    float64,  # noqa: F401
    p_value,
    sentences,
    total_variation,
    words_of,
)

pytestmark = pytest.mark.usefixtures("float64")

GRAMMAR = oracle.random_grammar(2, 3, temperature=0.7)


def kernel_of(p: dict[oracle.Shape, float]) -> dict[oracle.Shape, dict[oracle.Shape, float]]:
    """Of one proposal: trees are neighbours when they differ in one span."""
    kernel = {}
    for shape in p:
        others = [other for other in p if len(shape - other) == 1]
        row = {other: min(1, p[other] / p[shape]) / len(others) for other in others}
        kernel[shape] = row | {shape: 1 - sum(row.values())}
    return kernel


def test_transitions_are_those_of_the_enumerated_kernel():
    """In a batch with shorter sentences, whose trees have two neighbours, one or none."""
    model, x = FixedModel(GRAMMAR), sentences([5, 4, 2, 3])
    moves, repeats = Rotations(), 1_000
    condition = moves.condition(model, x)
    shapes = [oracle.shapes(length) for length in x.lengths.tolist()]
    start = oracle.to_trees([(some * 14)[:14] for some in shapes], x.lengths)
    state = start.sizes.repeat_interleave(repeats, 1)
    torch.manual_seed(0)
    end = moves.latents(condition, moves.walk(condition, state, 1))
    for row in range(len(x)):
        p = oracle.posterior(oracle.enumerate_shapes(GRAMMAR, words_of(x, row)))
        kernel = kernel_of(p)
        for shape in p:
            total = sum(p[other] * kernel[other].get(shape, 0.0) for other in p)
            assert total == pytest.approx(p[shape])
        for number in range(14):
            chosen = torch.arange(repeats).expand(len(x), -1) + number * repeats
            reached = count_trees(end.select(chosen), row)
            assert p_value(reached, kernel[start.spans(row, number)]) > 1e-4


@pytest.mark.parametrize("latent", LATENTS)
def test_chains_have_the_exact_posterior(latent):
    model, x = FixedModel(GRAMMAR, latent), sentences([4, 2])
    samples = 6_000
    torch.manual_seed(0)
    z = MCMC(Rotations(), samples, steps=5, burn_in=20).m_step_latents(model, x).z
    assert (z.labels is None) == (latent == "shape")
    for row in range(len(x)):
        p = oracle.posterior(enumerate_trees(GRAMMAR, words_of(x, row), latent))
        counts = count_trees(z, row)
        assert p_value(counts, p) > 1e-3
        assert total_variation({tree: n / samples for tree, n in counts.items()}, p) < 0.02


def test_rules_that_see_the_parent_are_no_obstacle():
    grammar, x = parents_oracle.random_grammar(3, 3), sentences([4, 3])
    model = FixedModel(grammar, "labelled")
    samples = 6_000
    torch.manual_seed(0)
    z = MCMC(Rotations(), samples, steps=5, burn_in=20).m_step_latents(model, x).z
    for row in range(len(x)):
        words = words_of(x, row)
        p = oracle.posterior(parents_oracle.enumerate_labelled(grammar, words))
        assert p_value(count_trees(z, row), p) > 1e-3


def test_chains_leave_trees_of_probability_zero():
    """A -> T A | A T | T T: a word at the edge of every span."""
    binary = torch.tensor([[[0.0, 0.3], [0.5, 0.2]]]).log()
    grammar = oracle.context_free(torch.zeros(1), binary, torch.zeros(1, 1))
    x = sentences([5], vocabulary=1)
    log_joint = oracle.enumerate_shapes(grammar, words_of(x, 0))
    impossible = [shape for shape, value in log_joint.items() if value == -inf]
    assert len(impossible) == 6
    moves = Rotations()
    condition = moves.condition(FixedModel(grammar), x)
    start = oracle.to_trees([impossible * 500], x.lengths).sizes
    torch.manual_seed(0)
    counts = count_trees(moves.latents(condition, moves.walk(condition, start, 40)), 0)
    assert p_value(counts, oracle.posterior(log_joint)) > 1e-3


def test_chains_of_sentences_come_back_in_batches_of_other_lengths():
    model, x, longer = FixedModel(GRAMMAR), sentences([3, 2]), sentences([3, 2, 6])
    posterior = MCMC(Rotations(), samples=2)
    for batch in (x, longer, x):
        z = posterior.m_step_latents(model, batch).z
        for row, length in enumerate(batch.lengths.tolist()):
            for sample in range(2):
                assert z.spans(row, sample) in oracle.shapes(length)


def test_the_grammar_is_computed_once_for_all_transitions(monkeypatch):
    model, x = FixedModel(GRAMMAR), sentences([3, 2])
    calls = []
    potentials = model.potentials
    monkeypatch.setattr(model, "potentials", lambda x: calls.append(x) or potentials(x))
    MCMC(Rotations()).m_step_latents(model, x)
    assert len(calls) == 1


def test_other_models_are_refused():
    message = (
        "^posterior.moves=Rotations rotates the trees of a grammar, which DiscreteVAE is not: use"
    )
    with pytest.raises(UserError, match=message):
        Rotations().condition(make_vae(), sentences([3]))
