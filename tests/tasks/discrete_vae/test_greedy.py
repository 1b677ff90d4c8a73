from __future__ import annotations

import pytest
import torch

from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.tasks.discrete_vae.greedy import GreedyDecoding
from tests.tasks.discrete_vae.tiny import (
    float64,  # noqa: F401
    images,
    log_joint,
    make_model,
    make_policy,
)

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("logits", ["linear", "distance"])
def test_decoder_sees_the_most_likely_codes_and_the_prior_a_draw(logits):
    model, x = make_model(), images(3)
    policy = make_policy(logits=logits)
    posterior = GFlowNetPosterior(policy, refinement=GreedyDecoding(), samples=5)
    greedy = policy.most_likely(policy.condition(model, x)).index
    torch.manual_seed(0)
    latents = posterior.sample(model, x, 5)
    refined = posterior.refine(model, x, latents)
    assert refined.log_weights is None and refined.m_step_weights is None
    assert torch.equal(refined.z.index, latents.z.index[:, :1])
    assert refined.z.decoded is not None and torch.equal(refined.z.decoded, greedy)
    assert not torch.equal(refined.z.index, greedy)
    expected = [
        log_joint(model, pixels, drawn, grid)
        for pixels, drawn, grid in zip(x.pixels, latents.z.index[:, 0], greedy[:, 0], strict=True)
    ]
    value = posterior.expected_log_joint(model, x, latents)
    assert value.tolist() == pytest.approx(expected)
    value.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in policy.parameters())
