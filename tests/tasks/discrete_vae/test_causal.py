from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from gfnem.tasks.discrete_vae.causal import CausalLinear, Prior, prior_named
from tests.tasks.discrete_vae.tiny import (
    CODES,
    all_grids,
    counts,
    float64,  # noqa: F401
    p_value,
    stirred,
)

pytestmark = pytest.mark.usefixtures("float64")

PRIORS = ("uniform", "masked_linear", "masked_convolution")
GRIDS = ((2, 2), (2, 3), (1, 4))

every_prior = pytest.mark.parametrize("name", PRIORS)
learned_prior = pytest.mark.parametrize("name", PRIORS[1:])


def make(name: Any, grid: tuple[int, int] = (2, 2)) -> Prior:
    torch.manual_seed(0)
    return stirred(prior_named(name, grid, CODES, 6), 0.3)


@every_prior
@pytest.mark.parametrize("grid", GRIDS)
def test_all_grids_have_mass_one(name, grid):
    prior = make(name, grid)
    log_p = prior.log_prob(all_grids(grid[0] * grid[1])).sum(-1).detach()
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)
    if name == "uniform":
        torch.testing.assert_close(log_p.exp(), torch.full_like(log_p, 1 / len(log_p)))
    else:
        assert float(log_p.std()) > 0.1


@learned_prior
@pytest.mark.parametrize("grid", GRIDS)
def test_each_code_is_given_all_before_it_and_no_others(name, grid):
    prior, positions = make(name, grid), grid[0] * grid[1]
    index = all_grids(positions)[7:8]
    expected = prior.log_probabilities(prior.one_hot(index))[0]
    for changed in range(positions):
        other = index.clone()
        other[0, changed] = (other[0, changed] + 1) % CODES
        found = prior.log_probabilities(prior.one_hot(other))[0]
        difference = (found - expected).abs().amax(-1)
        assert (difference[: changed + 1] == 0).all()
        if name == "masked_linear" or grid == (1, 4):
            assert (difference[changed + 1 :] > 1e-6).all()
        elif changed < positions - 1:
            assert difference[changed + 1 :].max() > 1e-6


def test_masked_convolutions_see_one_column_to_the_right_in_the_row_above():
    """Of the codes a b c / d e f, d is given a and b but not c, f all before it."""
    prior = make("masked_convolution", (2, 3))
    index = all_grids(6)[100:101]
    expected = prior.log_probabilities(prior.one_hot(index))[0]
    seen = []
    for changed in range(6):
        other = index.clone()
        other[0, changed] = (other[0, changed] + 1) % CODES
        found = prior.log_probabilities(prior.one_hot(other))[0]
        seen.append(((found - expected).abs().amax(-1) > 1e-9).int().tolist())
    assert [row[3] for row in seen] == [1, 1, 0, 0, 0, 0]
    assert [row[5] for row in seen] == [1, 1, 1, 1, 1, 0]


@every_prior
@pytest.mark.parametrize("grid", [(2, 2), (1, 3)])
def test_draws_have_the_frequencies_of_log_prob(name, grid):
    prior, grids = make(name, grid), all_grids(grid[0] * grid[1])
    drawn = prior.sample(20_000, torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, grid[0] * grid[1])
    p = prior.log_prob(grids).sum(-1).exp().tolist()
    probability = dict(zip(map(tuple, grids.tolist()), p, strict=True))
    assert p_value(counts(drawn), probability) > 1e-3


@learned_prior
@pytest.mark.parametrize("grid", GRIDS)
def test_draws_step_by_step_have_the_logits_of_one_pass(name, grid, monkeypatch):
    prior, positions = make(name, grid), grid[0] * grid[1]
    known = all_grids(positions)[torch.randperm(CODES**positions)[:50]]
    seen = []

    def forced(weights: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        seen.append(weights)
        return known[:, len(seen) - 1]

    monkeypatch.setattr("gfnem.tasks.discrete_vae.causal.sample_categorical", forced)
    with torch.no_grad():
        assert torch.equal(prior.sample(50), known)
        expected = prior.log_probabilities(prior.one_hot(known)).exp()
    torch.testing.assert_close(torch.stack(seen, 1), expected, rtol=0, atol=1e-9)


@every_prior
def test_gradients_reach_all_parameters(name):
    prior = make(name, (2, 3))
    index = all_grids(6)[::50]
    log_p = prior.log_prob(index).sum()
    parameters = dict(prior.named_parameters())
    if name == "uniform":
        assert not parameters
        return
    gradients = torch.autograd.grad(log_p, list(parameters.values()))
    for key, gradient in zip(parameters, gradients, strict=True):
        assert gradient.isfinite().all() and gradient.abs().max() > 0, key


def test_masked_linear_is_a_table_of_all_pairs_before_it():
    """By a loop: bias, the tables' rows of the codes before, and a residual network."""
    torch.manual_seed(0)
    layer: Any = stirred(CausalLinear(3, CODES, 4))
    index = torch.tensor([2, 0, 1])
    hidden = torch.zeros(3, 4)
    for position in range(3):
        hidden[position] = layer.bias[position]
        for before in range(position):
            hidden[position] += layer.table[before, index[before], position]
    expected = (hidden + layer.residual(hidden)).relu()
    found = layer(functional.one_hot(index, CODES)[None].double())[0]
    torch.testing.assert_close(found, expected)


def test_features_of_one_position_with_and_without_context():
    torch.manual_seed(0)
    index = all_grids(4)[::9]
    one_hot = functional.one_hot(index, CODES).double()
    context = torch.randn(len(index), 4, 2)
    for layer in (CausalLinear(4, CODES, 5), CausalLinear(4, CODES, 5, context=2)):
        stirred(layer)
        given = None if layer.context is None else layer.given(context)
        expected = layer(one_hot, given)
        for position in range(4):
            found = layer.at(position, one_hot[:, :position], given)
            torch.testing.assert_close(found, expected[:, position])
    assert isinstance(layer.context, nn.Linear)
    other = layer(one_hot, layer.given(context + 1))
    assert (other - expected).abs().max() > 0.01


@every_prior
def test_one_hot_codes_have_the_parameters_type(name):
    prior = make(name).to(torch.float32)
    expected = torch.float64 if name == "uniform" else torch.float32
    assert prior.one_hot(torch.tensor([0, 2])).dtype == expected
    assert prior.one_hot(torch.tensor([0, 2])).tolist() == [[1, 0, 0], [0, 0, 1]]
