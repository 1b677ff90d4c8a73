from __future__ import annotations

from dataclasses import replace
from math import exp, nan
from typing import Any

import pytest
import torch

from gfnem.errors import UserError
from gfnem.gflownet.refinement import (
    BackAndForth,
    ImportanceResampling,
    ImportanceWeighting,
    Thinning,
)
from gfnem.latents import Latents
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.tasks.grammar.policies.forest import ForestPolicy
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.tree import Trees
from tests.tasks.grammar import oracle
from tests.tasks.grammar.tiny import (
    FixedModel,
    count_trees,
    enumerate_trees,
    every_shape,
    float64,  # noqa: F401
    make_policy,
    p_value,
    sentences,
    total_variation,
    words_of,
)

pytestmark = pytest.mark.usefixtures("float64")

GRAMMAR = oracle.random_grammar(2, 3, temperature=0.7)
LENGTHS = [5, 3, 4]
CHAINS = 4_000


def exact_posteriors(x: Sentences, latent: Any) -> list[dict[Any, float]]:
    return [
        oracle.posterior(enumerate_trees(GRAMMAR, words_of(x, index), latent))
        for index in range(len(x))
    ]


def exact_draws(exact: list[dict[Any, float]], lengths: torch.Tensor) -> Trees:
    """Draws from enumerated posteriors, [batch, CHAINS]."""
    most = max(map(len, exact))
    trees = oracle.to_trees([(list(one) * most)[:most] for one in exact], lengths)
    weights = [torch.tensor(list(one.values())) for one in exact]
    chosen = [torch.multinomial(one, CHAINS, replacement=True) for one in weights]
    return trees.select(torch.stack(chosen))


def refined(
    policy: ForestPolicy, latent: Any, refinement: BackAndForth, lengths: list[int] = LENGTHS
) -> tuple[list[float], list[float]]:
    """p-values of each sentence's chains after the kernel, and how many of them have moved."""
    x = sentences(lengths)
    exact = exact_posteriors(x, latent)
    torch.manual_seed(0)
    z = exact_draws(exact, x.lengths)
    before = [p_value(count_trees(z, index), exact[index]) for index in range(len(x))]
    assert min(before) > 1e-3
    with torch.no_grad():
        latents = refinement(policy, FixedModel(GRAMMAR, latent), x, Latents(z, None))
    assert latents.log_weights is None and latents.m_step_weights is None
    new = latents.z
    moved = (new.start != z.start).any(-1) | (new.end != z.end).any(-1)
    if z.labels is not None:
        moved |= (new.labels != z.labels).any(-1)
    values = [p_value(count_trees(new, index), exact[index]) for index in range(len(x))]
    return values, moved.double().mean(-1).tolist()


@pytest.mark.parametrize(
    "latent, backward, temperature",
    [
        ("shape", "uniform", 1.0),
        ("shape", "learned", 1.0),
        ("labelled", "uniform", 1.0),
        ("labelled", "learned", 1.0),
        ("shape", "learned", 2.5),
        ("labelled", "uniform", 0.6),
    ],
)
def test_back_and_forth_leaves_the_exact_posterior_invariant(latent, backward, temperature):
    policy = make_policy("root_flow", latent, backward, nonterminals=2)
    kernel = BackAndForth(steps=4, depth=4, temperature=temperature)
    values, moved = refined(policy, latent, kernel)
    assert min(values) > 1e-3
    assert min(moved) > 0.1


def test_a_walk_of_one_step_leads_somewhere():
    policy = make_policy("root_flow", "shape", nonterminals=2)
    assert (policy.least_depth, make_policy("root_flow", "labelled").least_depth) == (2, 1)
    values, moved = refined(policy, "shape", BackAndForth(steps=4, depth=1))
    assert min(values) > 1e-3
    assert min(moved) > 0.1


@pytest.mark.parametrize("kind", ["light", "transformer"])
def test_back_and_forth_with_other_policies(kind):
    policy = make_policy(kind, "labelled", "learned", nonterminals=2)
    values, moved = refined(policy, "labelled", BackAndForth(steps=3, depth=3))
    assert min(values) > 1e-3 and moved[0] > 0.1


@pytest.mark.parametrize("term", [None, "log_joint", "log_forward", "log_backward"])
@pytest.mark.parametrize("latent", ["shape", "labelled"])
def test_every_term_of_the_acceptance_ratio_is_needed(latent, term, monkeypatch):
    policy = make_policy("root_flow", latent, "learned", nonterminals=2)
    regrow = policy.regrow

    def without_term(*args, **options):
        pair = regrow(*args, **options)
        return tuple(
            replace(paths, **{term: torch.zeros_like(getattr(paths, term))}) for paths in pair
        )

    if term is not None:
        monkeypatch.setattr(policy, "regrow", without_term)
    (value,), _ = refined(policy, latent, BackAndForth(steps=8, depth=4), [5])
    assert value > 1e-3 if term is None else value < 1e-6


def test_back_and_forth_brings_a_bad_policy_closer_to_the_posterior():
    policy = make_policy("root_flow", "shape", nonterminals=2)
    x = sentences([5])
    model = FixedModel(GRAMMAR, "shape")
    posterior = GFlowNetPosterior(policy, refinement=BackAndForth(steps=10, depth=4))
    torch.manual_seed(0)
    with torch.no_grad():
        plain = posterior.sample(model, x, CHAINS)
        better = posterior.refine(model, x, plain)
    (exact,) = exact_posteriors(x, "shape")
    before, after = (
        total_variation(
            {tree: count / CHAINS for tree, count in count_trees(latents.z, 0).items()}, exact
        )
        for latents in (plain, better)
    )
    assert before > 0.3
    assert after < 0.6 * before


def five_shapes(batch: int) -> tuple[Sentences, Trees]:
    """The five trees over four words, for each of `batch` sentences."""
    x = sentences([4] * batch)
    return x, every_shape(x.lengths)


def test_importance_resampling_draws_in_proportion_to_the_weights():
    x, z = five_shapes(2_000)
    weights = torch.tensor([1.0, 0.0, 3.0, 4.0, 2.0])
    latents = Latents(z, (weights.log() - 700).expand(2_000, -1))
    torch.manual_seed(0)
    policy: Any = None
    model: Any = None
    drawn = ImportanceResampling()(policy, model, x, latents)
    assert drawn.log_weights is None and drawn.m_step_weights is None
    assert drawn.z.start.shape == z.start.shape
    shapes = [z.spans(0, sample) for sample in range(5)]
    probabilities = dict(zip(shapes, (weights / 10).tolist(), strict=True))
    all_draws = Trees(
        drawn.z.start.flatten(0, 1)[None], drawn.z.end.flatten(0, 1)[None], x.lengths[:1]
    )
    assert p_value(count_trees(all_draws, 0), probabilities) > 1e-3


@pytest.mark.parametrize("samples", [1, 3, 12])
def test_importance_resampling_draws_as_many_as_asked(samples):
    x, z = five_shapes(2_000)
    weights = torch.tensor([0.0, 0.0, 3.0, 1.0, 0.0])
    latents = Latents(z, weights.log().expand(2_000, -1))
    torch.manual_seed(0)
    policy: Any = None
    model: Any = None
    drawn = ImportanceResampling(samples)(policy, model, x, latents)
    assert drawn.z.start.shape == (2_000, samples, z.start.shape[-1])
    three = (drawn.z.start == z.start[:, 2:3]).all(-1) & (drawn.z.end == z.end[:, 2:3]).all(-1)
    other = (drawn.z.start == z.start[:, 3:4]).all(-1) & (drawn.z.end == z.end[:, 3:4]).all(-1)
    assert (three | other).all()
    error = (0.75 * 0.25 / (2_000 * samples)) ** 0.5
    assert abs(three.double().mean().item() - 0.75) < 4 * error


@pytest.mark.parametrize("samples, kept", [(1, 1), (3, 3), (5, 5), (9, 5)])
def test_thinning_keeps_the_first_draws_and_their_weights(samples, kept):
    x, z = five_shapes(2)
    log_weights = torch.tensor([[0.0, 1.0, -2.0, 5.0, 0.5], [-9.0, -8.0, -7.0, -6.0, -5.0]])
    policy: Any = None
    model: Any = None
    latents = Thinning(samples)(policy, model, x, Latents(z, log_weights))
    assert torch.equal(latents.z.start, z.start[:, :kept])
    assert torch.equal(latents.z.end, z.end[:, :kept])
    assert latents.log_weights is not None and latents.m_step_weights is None
    assert torch.equal(latents.log_weights, log_weights[:, :kept])


@pytest.mark.parametrize("refinement", [Thinning, ImportanceResampling])
def test_at_least_one_latent_is_kept(refinement):
    message = "^refinement.samples is 0; it must be at least 1$"
    with pytest.raises(UserError, match=message):
        refinement(0)


def test_importance_weighting_keeps_all_latents():
    x, z = five_shapes(2)
    log_weights = torch.tensor([[0.0, 1.0, -2.0, 5.0, 0.5], [-900.0, -901.0, -902.0, -900.0, -1e4]])
    policy: Any = None
    model: Any = None
    latents = ImportanceWeighting()(policy, model, x, Latents(z, log_weights))
    assert latents.z is z and latents.log_weights is log_weights
    assert latents.m_step_weights is not None
    for row, expected in zip(latents.m_step_weights, log_weights.tolist(), strict=True):
        largest = max(expected)
        weights = [exp(value - largest) for value in expected]
        assert row.tolist() == pytest.approx([w / sum(weights) for w in weights])


@pytest.mark.parametrize("refinement", [ImportanceResampling(), ImportanceWeighting()])
@pytest.mark.parametrize("latent", ["shape", "labelled"])
def test_m_steps_on_weighted_latents_climb_the_exact_expectation(latent, refinement):
    policy = make_policy("root_flow", latent, nonterminals=2)
    posterior = GFlowNetPosterior(policy, samples=8_000, refinement=refinement)
    model, x = FixedModel(GRAMMAR, latent), sentences(LENGTHS)
    torch.manual_seed(0)
    plain = GFlowNetPosterior(policy, samples=8_000).expected_log_joint(model, x)
    value = posterior.expected_log_joint(model, x)
    exact = []
    for index in range(len(x)):
        joint = enumerate_trees(GRAMMAR, words_of(x, index), latent)
        exact.append(sum(p * joint[z] for z, p in oracle.posterior(joint).items()))
    assert value.tolist() == pytest.approx(exact, abs=0.06)
    assert (plain.detach() - torch.tensor(exact)).abs().max() > 0.2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps of back_and_forth is 0; it must be at least 1"),
        ({"depth": 0}, "depth of back_and_forth is 0; it must be at least 1"),
        ({"temperature": 0.0}, "temperature of back_and_forth is 0.0; it must be positive"),
        ({"temperature": nan}, "temperature of back_and_forth is nan; it must be positive"),
    ],
)
def test_arguments_that_make_no_refinement(options, message):
    with pytest.raises(UserError, match=message):
        BackAndForth(**options)
