from __future__ import annotations

import math
import re
from itertools import product
from typing import Any

import pytest
import torch

from gfnem.errors import UserError
from gfnem.tasks.discrete_vae.codes import Codes
from gfnem.tasks.discrete_vae.images import Images
from gfnem.tasks.discrete_vae.model import DiscreteVAE
from gfnem.tasks.discrete_vae.vector_quantized import FiniteScalar, VectorQuantized
from tests.tasks.discrete_vae.tiny import (
    images,
    log_joint,
    make_model,
    make_policy,
)

# In single precision, as the quantiser computes.

EMBEDDING = 3


def setting(
    embedding: int = EMBEDDING, n: int = 16, **options: Any
) -> tuple[DiscreteVAE, VectorQuantized, Images]:
    """After one step, the codebook's first, which begins it with k-means."""
    policy = make_policy(logits="distance", autoregressive=False, embedding=embedding, noise=0.3)
    model, x = make_model(embedding=embedding), images(n)
    posterior = VectorQuantized(policy, **options)
    torch.manual_seed(0)
    posterior.e_step(model, x)
    return model, posterior, x


@pytest.mark.parametrize("embedding", [1, 2, EMBEDDING])
def test_codebook_is_the_models_after_every_step(embedding):
    model, posterior, _ = setting(embedding)
    for seed in range(1, 4):
        assert torch.equal(model.codebook.weight, posterior.quantiser.codebook)
        before = model.codebook.weight.detach().clone()
        posterior.e_step(model, images(16, seed=seed))
        assert not torch.equal(model.codebook.weight, before)
    assert model.codebook.weight.requires_grad


def test_codebook_follows_the_mean_of_its_vectors():
    """Without memory, decay 0, every entry is the mean of the vectors next to it."""
    model, posterior, x = setting(decay=0.0, dead_below=0.0)
    entries = model.codebook.weight.detach().clone()
    policy = posterior.policy
    vectors = policy.projection(policy.features(x)).detach().flatten(0, 1)
    nearest = torch.cdist(vectors, entries).argmin(-1)
    posterior.e_step(model, x)
    for entry in nearest.unique():
        mean = vectors[nearest == entry].mean(0)
        torch.testing.assert_close(model.codebook.weight[entry].detach(), mean, rtol=0, atol=2e-4)


def test_entries_that_nothing_is_near_to_begin_anew():
    model, posterior, x = setting(dead_below=2.0)
    with torch.no_grad():
        posterior.quantiser.codebook[0] = 100.0
    quantiser: Any = posterior.quantiser
    quantiser._codebook.embed_avg[:, 0] = 100.0
    quantiser._codebook.cluster_size[:, 0] = 1.0
    posterior.e_step(model, x)
    policy = posterior.policy
    vectors = policy.projection(policy.features(x)).detach().flatten(0, 1)
    distance = (vectors - model.codebook.weight[0].detach()).norm(dim=-1).min()
    assert float(distance) < 1e-4


@pytest.mark.parametrize("commitment", [0.0, 0.25, 2.0])
def test_loss_is_that_of_the_nearest_grid(commitment):
    """log p(x, z) by a plain loop, and |h - e|^2 summed over the grid."""
    model, posterior, x = setting(commitment=commitment, n=8)
    entries = model.codebook.weight.detach().clone()
    policy = posterior.policy
    vectors = policy.projection(policy.features(x)).detach()
    distance = (vectors[:, :, None] - entries).square().sum(-1)
    nearest = distance.argmin(-1)
    expected_joint = 0.0
    with torch.no_grad():
        model.codebook.weight.copy_(entries)
        for pixels, grid in zip(x.pixels, nearest, strict=True):
            expected_joint += log_joint(model, pixels, grid)
    expected = commitment * distance.amin(-1).sum(-1).mean()
    step = posterior.e_step(model, x)
    assert step.loss is not None and step.latents is None
    assert float(step.metrics["e_step/commitment"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(step.metrics["e_step/log_joint"]) == pytest.approx(expected_joint / 8, rel=1e-4)
    assert step.loss.item() == pytest.approx(float(expected) - expected_joint / 8, rel=1e-4)


def test_gradient_passes_straight_through_to_the_encoder():
    model, posterior, x = setting(commitment=0.0)
    entries = model.codebook.weight.detach().clone()
    step = posterior.e_step(model, x)
    assert step.loss is not None
    step.loss.backward()
    policy = posterior.policy
    found = [p.grad for p in (*policy.encoder.parameters(), *policy.projection.parameters())]

    vectors = policy.projection(policy.features(x))
    nearest = torch.cdist(vectors.detach(), entries).argmin(-1)
    chosen = entries[nearest].requires_grad_()
    row = torch.arange(len(x))
    log_p = model.likelihood.log_prob(x.pixels, model.decode(chosen), row, row)
    (at_entries,) = torch.autograd.grad(-log_p.mean(), chosen)
    parameters = [*policy.encoder.parameters(), *policy.projection.parameters()]
    expected = torch.autograd.grad(vectors, parameters, at_entries)
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    # The codebook learns without gradients, decoder and prior with them.
    assert model.codebook.weight.grad is None
    for part in (model.decoder, model.prior):
        for parameter in part.parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all()


def test_training_raises_the_likelihood_of_the_nearest_grids():
    model, posterior, x = setting()
    assert posterior.joint
    parameters = [*posterior.parameters(), *model.parameters()]
    optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], lr=0.01)
    values = []
    for _ in range(120):
        step = posterior.e_step(model, x)
        assert step.loss is not None
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        values.append(float(step.metrics["e_step/log_joint"]))
    assert values[-1] > values[0] + 2


def test_as_a_distribution_it_is_a_softmax_of_distances():
    model, posterior, x = setting(n=2)
    policy = posterior.policy
    assert policy.log_beta is not None
    vectors = policy.projection(policy.features(x)).detach()
    distance = (vectors[:, :, None] - model.codebook.weight.detach()).square().sum(-1)
    log_p = (-policy.log_beta.detach().exp() * distance).log_softmax(-1)
    latents = posterior.sample(model, x, 50)
    assert latents.log_weights is not None
    log_q = log_p[:, None].expand(-1, 50, -1, -1).gather(-1, latents.z.index[..., None])
    expected = model.log_joint(x, latents.z).detach() - log_q.squeeze(-1).sum(-1)
    torch.testing.assert_close(latents.log_weights, expected, rtol=1e-4, atol=1e-4)
    greedy = policy.most_likely(policy.condition(model, x))
    assert torch.equal(greedy.index[:, 0], distance.argmin(-1))


def test_state_is_kept():
    model, posterior, x = setting()
    state = {key: value.clone() for key, value in posterior.state_dict().items()}
    policy = make_policy(logits="distance", autoregressive=False, embedding=EMBEDDING)
    other = VectorQuantized(policy)
    other.load_state_dict(state)
    losses = []
    for one in (posterior, other):
        twin = make_model(embedding=EMBEDDING)
        torch.manual_seed(1)
        loss = one.e_step(twin, x).loss
        assert loss is not None
        losses.append(loss.item())
        assert torch.equal(twin.codebook.weight, one.quantiser.codebook)
    assert losses[0] == losses[1]
    assert torch.equal(posterior.quantiser.codebook, other.quantiser.codebook)


def test_decoding_the_nearest_grid_again_gives_its_reconstruction():
    model, posterior, x = setting(n=4)
    policy = posterior.policy
    nearest = policy.most_likely(policy.condition(model, x))
    found = model.log_joint(x, Codes(nearest.index))[:, 0]
    step = posterior.e_step(model, x)
    assert float(step.metrics["e_step/log_joint"]) == pytest.approx(found.mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"commitment": -1.0}, "posterior.commitment is -1.0; it must not be negative"),
        ({"decay": 1.0}, "posterior.decay is 1.0; it must be at least 0 and below 1"),
        ({"logits": "linear"}, "posterior=vq needs policy.logits=distance"),
    ],
)
def test_arguments_that_make_no_posterior(options, message):
    policy = make_policy(logits=options.pop("logits", "distance"))
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        VectorQuantized(policy, **options)


# Finite scalar quantisation.


def finite(levels: tuple[int, ...], n: int = 8) -> tuple[DiscreteVAE, FiniteScalar, Images]:
    """After one step, which makes the lattice the model's codebook."""
    sizes: Any = {"codes": math.prod(levels), "embedding": len(levels)}
    policy = make_policy(logits="bounded_distance", autoregressive=False, noise=0.5, **sizes)
    model, x = make_model(**sizes), images(n)
    posterior = FiniteScalar(policy, levels)
    posterior.e_step(model, x)
    return model, posterior, x


@pytest.mark.parametrize("levels", [(2, 2), (3, 2), (4, 3, 2)])
def test_lattice_has_every_combination_of_levels(levels):
    model, _, _ = finite(levels)
    found = {tuple(entry) for entry in model.codebook.weight.detach().double().tolist()}
    each = [[2 * level / (count - 1) - 1 for level in range(count)] for count in levels]
    assert len(found) == math.prod(levels)
    for entry in product(*each):
        assert min(math.dist(entry, other) for other in found) < 1e-6


@pytest.mark.parametrize("levels", [(2, 2), (3, 2), (4, 3, 2)])
def test_finite_scalars_take_the_nearest_entry(levels):
    """And so the most likely grid of the distribution is the one that was trained."""
    model, posterior, x = finite(levels)
    policy = posterior.policy
    vectors = policy.projection(policy.features(x)).detach()
    assert vectors.abs().max() <= 1
    nearest = torch.cdist(vectors, model.codebook.weight.detach()).argmin(-1)
    quantised, index, lost = posterior.quantise(vectors)
    assert torch.equal(index, nearest) and len(nearest.unique()) > 2 and lost == 0
    torch.testing.assert_close(quantised, model.codebook.weight.detach()[nearest])
    best = policy.most_likely(policy.condition(model, x)).index
    assert torch.equal(best[:, 0], nearest)
    step = posterior.e_step(model, x)
    expected = model.log_joint(x, Codes(best)).mean().item()
    assert float(step.metrics["e_step/log_joint"]) == pytest.approx(expected, rel=1e-4)


def test_gradient_passes_through_the_rounding():
    _, posterior, _ = finite((3, 2))
    vectors = torch.tensor([[[0.3, -0.2], [-0.9, 0.8]]], requires_grad=True)
    quantised, _, _ = posterior.quantise(vectors)
    (gradient,) = torch.autograd.grad((quantised * torch.tensor([2.0, 5.0])).sum(), vectors)
    torch.testing.assert_close(gradient, torch.tensor([2.0, 5.0]).expand_as(vectors))


@pytest.mark.parametrize(
    "levels, logits, message",
    [
        ((2, 2), "distance", "posterior=fsq needs policy.logits=bounded_distance"),
        ((2, 1), "bounded_distance", "posterior.levels=[2, 1]: each must be at least 2"),
        (
            (2, 3, 2),
            "bounded_distance",
            "posterior.levels=[2, 3, 2] make 12 codes of 3 numbers; set model.codes=12 and "
            "model.embedding=3",
        ),
    ],
)
def test_levels_that_make_no_codebook(levels, logits, message):
    policy = make_policy(logits=logits, codes=4, embedding=2)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        FiniteScalar(policy, levels)
