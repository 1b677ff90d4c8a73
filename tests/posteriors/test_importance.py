"""Resampled draws of given candidates, and of the priors of all tasks held to enumeration."""

from __future__ import annotations

import re
from math import log
from typing import Any

import pytest
import torch

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.latents import EStep, Latents
from gfnem.posterior import Posterior
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.posteriors.importance import ImportancePosterior
from gfnem.posteriors.mcmc import MCMC, Gibbs
from gfnem.tasks.discrete_vae.mean_field import MeanField
from gfnem.tasks.mixture.components import Components
from tests.posteriors.test_exact import Intractable
from tests.tasks.discrete_vae import tiny as vae
from tests.tasks.grammar import oracle
from tests.tasks.grammar import tiny as grammar
from tests.tasks.grammar.tiny import (
    LATENTS,
    float64,  # noqa: F401
    p_value,
    total_variation,
)
from tests.tasks.mixture import tiny as mixture

pytestmark = pytest.mark.usefixtures("float64")


class Three(Posterior):
    """Three candidates for each data point, of weights 0, 1 and 3."""

    def e_step(self, model: Any, x: Any) -> EStep:
        return EStep(None, self.sample(model, x, 3), {"seen": float(len(x))})

    def sample(self, model: Any, x: Any, samples: int) -> Latents:
        assert samples == 3
        z = Components(torch.tensor([[0, 0], [1, 1], [2, 2]]).expand(len(x), -1, -1))
        log_weights = torch.tensor([0.0, 1.0, 3.0]).log()
        return Latents(z, log_weights.expand(len(x), -1))


def test_draws_are_in_proportion_to_the_weights_and_weigh_their_mean():
    posterior, model, x = ImportancePosterior(Three(), 3), mixture.make_model(), mixture.points(2)
    torch.manual_seed(0)
    latents = posterior.sample(model, x, 4_000)
    assert latents.m_step_weights is None and latents.log_weights is not None
    for row in range(2):
        counts = mixture.counts(latents.z.index[row])
        assert p_value(counts, {(1, 1): 0.25, (2, 2): 0.75}) > 1e-3
    assert latents.log_weights.tolist() == [[pytest.approx(log(4 / 3))] * 4_000] * 2
    assert posterior.m_step_latents(model, x).z.index.shape == (2, 4, 2)


def test_the_mean_weight_is_the_likelihood_whatever_the_number_of_candidates():
    model, x = mixture.make_model(), mixture.points(1)
    copies = 100_000
    many = x.select(torch.zeros(copies, dtype=torch.long))
    torch.manual_seed(0)
    log_weights = ImportancePosterior(proposals=3).sample(model, many, 2).log_weights
    assert log_weights is not None and log_weights[:, 0].equal(log_weights[:, 1])
    weights = log_weights[:, 0].exp()
    likelihood = float(mixture.log_joint_table(model, x).logsumexp(-1).exp())
    error = float(weights.std()) / copies**0.5
    assert error < 0.02 * likelihood
    assert float(weights.mean()) == pytest.approx(likelihood, abs=4 * error)
    # The bound of few candidates lies below.
    assert float(log_weights.mean()) < log(likelihood) - 0.1


def test_many_candidates_give_the_exact_posterior_of_a_mixture():
    model, x, samples = mixture.make_model(), mixture.points(3), 20_000
    torch.manual_seed(0)
    latents = ImportancePosterior(proposals=50_000).sample(model, x, samples)
    for row, p in enumerate(mixture.posteriors(model, x)):
        drawn = {z: n / samples for z, n in mixture.counts(latents.z.index[row]).items()}
        assert total_variation(drawn, p) < 0.02


def test_many_candidates_give_the_exact_posterior_of_a_discrete_vae():
    model, x, samples = vae.make_model(noise=0.3), vae.images(2), 20_000
    torch.manual_seed(0)
    latents = ImportancePosterior(proposals=50_000).sample(model, x, samples)
    for row, p in enumerate(vae.posteriors(model, x)):
        drawn = {z: n / samples for z, n in vae.counts(latents.z.index[row]).items()}
        assert total_variation(drawn, p) < 0.03


@pytest.mark.parametrize("latent", LATENTS)
def test_many_candidates_give_the_exact_posterior_of_a_grammar(latent: Any):
    rules = oracle.random_grammar(2, 3, temperature=0.7)
    model, x = grammar.FixedModel(rules, latent), grammar.sentences([4, 2])
    samples = 20_000
    torch.manual_seed(0)
    latents = ImportancePosterior(proposals=50_000).sample(model, x, samples)
    assert latents.log_weights is not None
    for row in range(2):
        words = grammar.words_of(x, row)
        p = oracle.posterior(grammar.enumerate_trees(rules, words, latent))
        drawn = {z: n / samples for z, n in grammar.count_trees(latents.z, row).items()}
        assert total_variation(drawn, p) < 0.03
        expected = oracle.log_partition(rules, words)
        assert float(latents.log_weights[row, 0]) == pytest.approx(expected, abs=0.03)


def test_a_proposal_learns_as_it_would_alone():
    model, x = mixture.make_model(), mixture.points(2)
    own = GFlowNetPosterior(mixture.make_policy(), flow_lr=0.1)
    posterior = ImportancePosterior(own, proposals=5, m_step="closed")
    torch.manual_seed(0)
    step = posterior.e_step(model, x)
    torch.manual_seed(0)
    alone = own.e_step(model, x)
    assert step.loss is not None and alone.loss is not None and step.loss.equal(alone.loss)
    assert step.latents is None and alone.latents is not None
    groups, expected = posterior.parameter_groups(), own.parameter_groups()
    assert [g.get("lr") for g in groups] == [g.get("lr") for g in expected] == [None, 0.1]
    assert not posterior.joint and posterior.closed_m_step
    policy = vae.make_policy(autoregressive=False)
    assert ImportancePosterior(MeanField(policy, gradient="gumbel")).joint


def test_there_is_nothing_to_learn_for_the_prior():
    posterior = ImportancePosterior()
    step = posterior.e_step(mixture.make_model(), mixture.points(2))
    assert step.loss is None and step.latents is None and posterior.parameter_groups() == []
    assert not (posterior.joint or posterior.closed_m_step)


class Nothing:
    def train_batches(self, epoch: int) -> list[object]:
        return []


def test_models_and_proposals_that_give_no_weights():
    message = "^posterior=importance proposes draws of the prior, which Intractable does not give:"
    with pytest.raises(UserError, match=message):
        EM(Intractable(), ImportancePosterior(), Nothing(), m_steps=1)
    message = "^posterior.proposal is MCMC, whose draws have no weights: use a proposal whose"
    with pytest.raises(UserError, match=message):
        posterior = ImportancePosterior(MCMC(Gibbs()))
        posterior.sample(mixture.make_model(), mixture.points(1), 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"m_step": "sample"}, "posterior.m_step is 'sample'; use 'gradient' or 'closed'"),
        ({"proposals": 0}, "posterior.proposals is 0; it must be at least 1"),
        ({"samples": 0}, "posterior.samples is 0; it must be at least 1"),
    ],
)
def test_options_that_make_no_posterior(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        ImportancePosterior(**options)
