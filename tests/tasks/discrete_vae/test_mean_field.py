from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gfnem.errors import UserError
from gfnem.gflownet.refinement import Thinning
from gfnem.tasks.discrete_vae.codes import Codes
from gfnem.tasks.discrete_vae.images import Images
from gfnem.tasks.discrete_vae.mean_field import MeanField
from gfnem.tasks.discrete_vae.model import DiscreteVAE
from tests.tasks.discrete_vae.tiny import (
    CODES,
    all_grids,
    float64,  # noqa: F401
    images,
    log_joint_table,
    make_model,
    make_policy,
    random_codes,
)

pytestmark = pytest.mark.usefixtures("float64")


def setting(**options: Any) -> tuple[DiscreteVAE, MeanField, Images]:
    return make_model(), MeanField(make_policy(autoregressive=False), **options), images(2)


def bound(model: DiscreteVAE, posterior: MeanField, x: Images) -> Tensor:
    """The mean evidence lower bound, by enumeration; differentiable in q."""
    log_p = posterior.policy.condition(model, x).base.log_softmax(-1)
    grids = all_grids()
    log_q = torch.stack([log_p[:, n, grids[:, n]] for n in range(4)]).sum(0)
    return (log_q.exp() * (log_joint_table(model, x) - log_q)).sum(-1).mean()


@pytest.mark.parametrize("samples, steps", [(2, 1_000), (6, 400)])
def test_score_function_gradient_is_that_of_the_bound(samples, steps):
    """Its mean, within its standard error, for every parameter."""
    model, posterior, x = setting(samples=samples)
    parameters = [p for p in posterior.parameters() if p.requires_grad]

    def flat(value: Tensor) -> Tensor:
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in gradients if g is not None])

    exact = -flat(bound(model, posterior, x))
    torch.manual_seed(0)
    estimates = []
    for _ in range(steps):
        loss = posterior.e_step(model, x).loss
        assert loss is not None
        estimates.append(flat(loss))
    mean, std = torch.stack(estimates).mean(0), torch.stack(estimates).std(0)
    known = std > 1e-9
    torch.testing.assert_close(mean[~known], exact[~known])
    score = (mean - exact)[known] * steps**0.5 / std[known]
    assert score.abs().max() < 5
    # Each parameter's share is far from the noise.
    assert (exact[known] * steps**0.5 / std[known]).abs().max() > 10


def test_a_constant_factor_of_the_joint_changes_no_gradient(monkeypatch):
    """The other draws' mean takes it away, draw by draw."""
    model, posterior, x = setting()
    weights = list(posterior.policy.projection.parameters())
    log_joint, gradients = model.log_joint, []
    for shift in (0.0, 1e4):
        monkeypatch.setattr(model, "log_joint", lambda x, z, by=shift: log_joint(x, z) + by)
        torch.manual_seed(0)
        loss = posterior.e_step(model, x).loss
        assert loss is not None
        gradients.append(torch.autograd.grad(loss, weights))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_e_step_s_draws_and_their_bound():
    model, posterior, x = setting(samples=5_000)
    torch.manual_seed(0)
    step = posterior.e_step(model, x)
    assert step.latents is not None and step.latents.log_weights is not None
    assert step.latents.z.index.shape == (2, 5_000, 4)
    assert not step.latents.log_weights.requires_grad
    elbo = float(bound(model, posterior, x).detach())
    error = float(step.latents.log_weights.std()) / 10_000**0.5
    assert abs(float(step.metrics["e_step/elbo"]) - elbo) < 4 * error
    assert all(p.grad is None for p in model.parameters())
    assert posterior.m_step_samples == 5_000 and not posterior.joint


def test_plain_draws_are_weighted_for_the_likelihood():
    model, posterior, x = setting()
    torch.manual_seed(0)
    latents = posterior.sample(model, x, 5_000)
    assert latents.log_weights is not None
    log_likelihood = log_joint_table(model, x).logsumexp(-1)
    ratio = (latents.log_weights - log_likelihood[:, None]).exp()
    error = ratio.std(-1) / 5_000**0.5
    assert (error < 0.1).all() and ((ratio.mean(-1) - 1).abs() < 4 * error).all()


def train(
    model: DiscreteVAE, posterior: MeanField, x: Images, parameters: list[Any], steps: int
) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = posterior.e_step(model, x).loss
        assert loss is not None
        loss.backward()
        optimizer.step()


def test_reinforce_climbs_the_bound():
    model, posterior, x = setting(samples=16)
    before = float(bound(model, posterior, x).detach())
    train(model, posterior, x, list(posterior.parameters()), 150)
    after = float(bound(model, posterior, x).detach())
    log_likelihood = float(log_joint_table(model, x).logsumexp(-1).mean())
    assert before < log_likelihood - 1 and before + 1 < after < log_likelihood


def test_gumbel_trains_both_networks():
    model, posterior, x = setting(gradient="gumbel")
    assert posterior.joint
    before = float(bound(model, posterior, x).detach())
    log_likelihood = float(log_joint_table(model, x).logsumexp(-1).mean())
    train(model, posterior, x, [*posterior.parameters(), *model.parameters()], 100)
    assert float(bound(model, posterior, x).detach()) > before + 3
    assert float(log_joint_table(model, x).logsumexp(-1).mean()) > log_likelihood + 3


def test_gumbel_s_loss_is_the_bound_at_a_draw(monkeypatch):
    """With q's entropy in closed form; gradients reach everything, through the draw."""
    model, posterior, x = setting(gradient="gumbel", temperature=0.7)
    z = random_codes(2, 1)
    asked: list[Any] = []

    def drawn(logits: Tensor, tau: float, hard: bool) -> Tensor:
        asked.append((tau, hard))
        soft = (logits / tau).softmax(-1)
        return functional.one_hot(z.index[:, 0], CODES) + soft - soft.detach()

    monkeypatch.setattr(functional, "gumbel_softmax", drawn)
    step = posterior.e_step(model, x)
    assert asked == [(0.7, True)] and step.latents is None and step.loss is not None
    q = posterior.policy.condition(model, x).base.softmax(-1)
    entropy = -(q * q.log()).sum((1, 2))
    expected = -(model.log_joint(x, Codes(z.index))[:, 0] + entropy).mean()
    assert step.loss.item() == pytest.approx(expected.item())
    assert float(step.metrics["e_step/elbo"]) == pytest.approx(-expected.item())
    step.loss.backward()
    policy = posterior.policy
    for parameter in (*model.parameters(), *policy.encoder.parameters()):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
    assert all(p.grad is not None for p in policy.projection.parameters())


def test_refinement_of_the_draws():
    model, posterior, x = setting(refinement=Thinning(2))
    latents = posterior.sample(model, x, 5)
    assert torch.equal(posterior.refine(model, x, latents).z.index, latents.z.index[:, :2])
    assert posterior.expected_log_joint(model, x, latents).tolist() == pytest.approx(
        model.log_joint(x, latents.z)[:, :2].mean(-1).tolist()
    )
    _, plain, _ = setting()
    assert plain.refine(model, x, latents) is latents


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gradient": "vimco"}, "posterior.gradient is 'vimco'; use 'reinforce' or 'gumbel'"),
        ({"samples": 1}, "posterior.samples is 1; gradient=reinforce needs at least 2"),
        ({"temperature": 0.0}, "posterior.temperature is 0.0; it must be positive"),
        ({"policy": "autoregressive"}, "posterior=mean_field needs policy.autoregressive=false"),
    ],
)
def test_arguments_that_make_no_posterior(options, message):
    policy = make_policy(autoregressive=options.pop("policy", None) is not None)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        MeanField(policy, **options)
