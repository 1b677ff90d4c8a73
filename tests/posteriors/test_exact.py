from __future__ import annotations

from typing import Any

import pytest
import torch

from gfnem.errors import UserError
from gfnem.model import LatentVariableModel, TractableModel
from gfnem.posteriors.exact import ExactPosterior
from tests.tasks.grammar import oracle
from tests.tasks.grammar.tiny import (
    LATENTS,
    FixedModel,
    count_trees,
    enumerate_trees,
    float64,  # noqa: F401
    p_value,
    sentences,
    words_of,
)
from tests.tasks.mixture.tiny import components, log_joint_table, make_model, points

pytestmark = pytest.mark.usefixtures("float64")

GRAMMAR = oracle.random_grammar(2, 3, temperature=0.7)
LENGTHS = [4, 2, 5]


@pytest.mark.parametrize("latent", LATENTS)
def test_samples_have_the_posterior_s_frequencies_and_equal_weights(latent):
    model, x = FixedModel(GRAMMAR, latent), sentences(LENGTHS)
    torch.manual_seed(0)
    latents = ExactPosterior().sample(model, x, 6_000)
    assert latents.log_weights is not None and latents.m_step_weights is None
    assert latents.log_weights.shape == (len(x), 6_000)
    for index in range(len(x)):
        joint = enumerate_trees(GRAMMAR, words_of(x, index), latent)
        assert p_value(count_trees(latents.z, index), oracle.posterior(joint)) > 1e-3
        expected = oracle.log_partition(GRAMMAR, words_of(x, index))
        assert latents.log_weights[index].tolist() == pytest.approx([expected] * 6_000)


def gradients(model: FixedModel, value: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


@pytest.mark.parametrize("latent", LATENTS)
def test_both_m_steps_climb_the_expectation_under_the_enumerated_posterior(latent):
    """Fisher's identity: the gradient of log p(x) is that of E_{p(z | x)}[log p(x, z)]."""
    model, x = FixedModel(GRAMMAR, latent), sentences(LENGTHS)
    exact = [oracle.posterior(enumerate_trees(GRAMMAR, words_of(x, i), latent)) for i in range(3)]
    most = max(map(len, exact))
    trees = oracle.to_trees([(list(one) * most)[:most] for one in exact], x.lengths)
    weights = torch.zeros(3, most)
    for index, one in enumerate(exact):
        weights[index, : len(one)] = torch.tensor(list(one.values()))
    expected = gradients(model, (weights * model.log_joint(x, trees)).sum())

    marginal = ExactPosterior("marginal").expected_log_joint(model, x)
    log_likelihood = [oracle.log_partition(GRAMMAR, words_of(x, index)) for index in range(3)]
    assert marginal.tolist() == pytest.approx(log_likelihood)
    for one, other in zip(gradients(model, marginal.sum()), expected, strict=True):
        torch.testing.assert_close(one, other)

    torch.manual_seed(0)
    posterior = ExactPosterior("sample", samples=20_000)
    assert posterior.m_step_samples == 20_000
    sampled = posterior.expected_log_joint(model, x)
    assert sampled.shape == (3,)
    assert (sampled - marginal).abs().max() > 0.1  # E[log p(x, z)] is no log p(x)
    for one, other in zip(gradients(model, sampled.sum()), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.03)


def test_given_latents_are_those_of_the_sampled_m_step():
    model, x = FixedModel(GRAMMAR, "shape"), sentences(LENGTHS)
    posterior = ExactPosterior("sample", samples=3)
    latents = posterior.sample(model, x, 7)
    value = posterior.expected_log_joint(model, x, latents)
    torch.testing.assert_close(value, model.log_joint(x, latents.z).mean(-1))


def test_m_steps_in_closed_form_learn_from_all_latents():
    model, x = make_model(), points(3)
    posterior = ExactPosterior("closed")
    assert posterior.closed_m_step and not ExactPosterior().closed_m_step
    latents = posterior.m_step_latents(model, x)
    table = log_joint_table(model, x)
    assert latents.z.index.tolist() == 3 * [[list(z) for z in components()]]
    torch.testing.assert_close(latents.m_step_weights, table.softmax(-1))
    message = "^posterior.m_step=closed needs all latents; FixedModel does not enumerate them: use "
    with pytest.raises(UserError, match=message):
        posterior.m_step_latents(FixedModel(GRAMMAR), sentences(LENGTHS))


def test_there_is_nothing_to_learn():
    posterior = ExactPosterior()
    step = posterior.e_step(FixedModel(GRAMMAR), sentences(LENGTHS))
    assert step.loss is None and step.latents is None and step.metrics == {}
    assert posterior.parameter_groups() == []


class Intractable(LatentVariableModel):
    def log_joint(self, x: Any, z: Any):
        raise AssertionError("never asked")

    def sample(self, n: int, generator: torch.Generator | None = None):
        raise AssertionError("never asked")


@pytest.mark.parametrize("ask", ["sample", "expected_log_joint"])
def test_models_without_a_tractable_posterior_are_refused(ask):
    posterior, x = ExactPosterior(), sentences(LENGTHS)
    message = "posterior=exact needs a model with a tractable posterior; Intractable has none"
    with pytest.raises(UserError, match=message):
        getattr(posterior, ask)(Intractable(), x, *([3] if ask == "sample" else []))


class TooLarge(TractableModel):
    """Tractable in kind, but not at its size."""

    @property
    def tractable(self) -> bool:
        return False

    def log_joint(self, x: Any, z: Any):
        raise AssertionError("never asked")

    def sample(self, n: int, generator: torch.Generator | None = None):
        raise AssertionError("never asked")

    def log_likelihood(self, x: Any):
        return None

    def sample_posterior(self, x: Any, samples: int):
        raise AssertionError("never asked")


@pytest.mark.parametrize("m_step", ["marginal", "sample"])
@pytest.mark.parametrize("ask", ["sample", "expected_log_joint"])
def test_models_too_large_to_enumerate_are_refused(ask, m_step):
    posterior, x = ExactPosterior(m_step), sentences(LENGTHS)
    message = (
        "^posterior=exact: this TooLarge is too large for it; make it smaller or use "
        "posterior=gflownet$"
    )
    with pytest.raises(UserError, match=message):
        getattr(posterior, ask)(TooLarge(), x, *([3] if ask == "sample" else []))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"m_step": "map"}, "posterior.m_step is 'map'; use 'marginal', 'sample' or 'closed'"),
        ({"samples": 0}, "posterior.samples is 0; it must be at least 1"),
    ],
)
def test_arguments_that_make_no_posterior(options, message):
    with pytest.raises(UserError, match=message):
        ExactPosterior(**options)
