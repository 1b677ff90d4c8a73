from __future__ import annotations

import re
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import kstest
from torch import Tensor

from gfnem.errors import UserError
from gfnem.latents import Latents
from gfnem.tasks.mixture.components import Components
from gfnem.tasks.mixture.data import PointData, Points, lattice, sampled
from gfnem.tasks.mixture.model import HierarchicalMixture, starting_at
from tests.tasks.mixture.tiny import (
    components,
    counts,
    every,
    float64,  # noqa: F401
    log_joint_table,
    make_data,
    make_model,
    p_value,
    points,
    posteriors,
    random_components,
)

SIZES = [(3, 4, 2), (1, 1, 2), (2, 5, 3), (5, 2, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("superclusters, petals, dimensions", SIZES)
def test_densities_are_scipy_s(superclusters, petals, dimensions, dtype):
    model = make_model(superclusters, petals, dimensions).to(dtype)
    x = points(9, dimensions)
    x = Points(x.values.to(dtype), x.ids)
    table = log_joint_table(model, x)
    tolerance: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6 if dtype == torch.float64 else 1e-5}
    found = model.log_joint_all(x).double()
    torch.testing.assert_close(found.flatten(1), table, **tolerance)
    torch.testing.assert_close(model.log_likelihood(x).double(), table.logsumexp(-1), **tolerance)
    order = torch.randperm(len(components(superclusters, petals)))
    z = Components(torch.tensor(components(superclusters, petals))[order].expand(9, -1, -1))
    torch.testing.assert_close(model.log_joint(x, z).double(), table[:, order], **tolerance)


@pytest.mark.usefixtures("float64")
def test_posterior_is_that_of_enumeration():
    model, x = make_model(), points(4)
    torch.manual_seed(0)
    drawn = model.sample_posterior(x, 6_000)
    latents = model.enumerate(x)
    assert latents.m_step_weights is not None
    for row, probability in enumerate(posteriors(model, x)):
        assert p_value(counts(drawn.index[row]), probability) > 1e-3
        each = map(tuple, latents.z.index[row].tolist())
        weights = latents.m_step_weights[row].tolist()
        assert dict(zip(each, weights, strict=True)) == pytest.approx(probability)


@pytest.mark.usefixtures("float64")
def test_draws_have_the_model_s_distribution():
    model = HierarchicalMixture(torch.tensor([[0.0, 0.0, 3.0], [9.0, 0.0, -3.0]]), petals=3)
    x, z = model.sample(6_000, torch.Generator().manual_seed(0))
    assert x.values.shape == (6_000, 3) and z.index.shape == (6_000, 1, 2)
    assert (x.ids == -1).all()
    assert p_value(counts(z.index[:, 0]), dict.fromkeys(components(2, 3), 1 / 6)) > 1e-3
    # Petals begin at 60 degrees; the third dimension has none.
    here = x.values[(z.index[:, 0] == torch.tensor([1, 0])).all(-1)]
    for dimension, center in enumerate((9.5, 3**0.5 / 2, -3.0)):
        assert kstest(here[:, dimension].numpy(), "norm", (center, 0.25)).pvalue > 1e-3
    assert (np.corrcoef(here.numpy().T) - np.eye(3)).max() < 0.12


@pytest.mark.usefixtures("float64")
def test_prior_draws_are_uniform_for_each_point():
    torch.manual_seed(0)
    z, log_prior = make_model().sample_prior(points(2), 6_000)
    assert log_prior.shape == (2, 6_000) and (log_prior == -log(12)).all()
    assert not z.index[0].equal(z.index[1])
    for index in z.index:
        assert p_value(counts(index), dict.fromkeys(components(), 1 / 12)) > 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("weighted", [True, False])
def test_maximum_is_where_scipy_finds_it(weighted):
    model, x, z = make_model(), points(6), random_components(6, 5)
    weights = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) if weighted else None
    latents = Latents(z, None, weights)
    shape = model.means.shape

    def loss(means: np.ndarray) -> float:
        moved = HierarchicalMixture(torch.tensor(means).view(shape))
        return -float(latents.mean(moved.log_joint(x, z)).sum().detach())

    best = minimize(loss, model.means.detach().flatten().numpy(), method="BFGS", tol=1e-9)
    model.maximise(x, latents)
    assert model.means.flatten().tolist() == pytest.approx(best.x.tolist(), abs=1e-5)


def test_maximum_of_a_hand_worked_case():
    """Two petals stand above and below their mean; nothing says where the third mean is."""
    means = torch.tensor([[0.0, 0.0], [1.0, 1.0], [7.0, 8.0]])
    model = HierarchicalMixture(means, petals=2)
    x = Points.numbered(torch.tensor([[2.0, 3.0], [4.0, 1.0]]))
    z = Components(torch.tensor([[[0, 0], [1, 1]], [[0, 1], [1, 1]]]))
    model.maximise(x, Latents(z, None, torch.tensor([[0.5, 0.5], [0.25, 0.75]])))
    # First: (2, 2) by 1/2 and (4, 2) by 1/4; second: (2, 4) by 1/2 and (4, 2) by 3/4.
    expected = torch.tensor([[8 / 3, 2.0], [3.2, 2.8], [7.0, 8.0]])
    torch.testing.assert_close(model.means.detach(), expected)


@pytest.mark.usefixtures("float64")
def test_expectations_over_one_part_of_the_latent():
    model, x = make_model(), points(5)
    q = [normal_q(5, values, seed) for seed, values in enumerate(model.parts)]
    table = log_joint_table(model, x).view(5, *model.parts)
    for part, subscripts in enumerate(("nij,nj->ni", "nij,ni->nj")):
        expected = torch.einsum(subscripts, table, q[1 - part])
        found = model.expected_log_joint_of(x, q, part)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(model.latents(every(5).index).index, every(5).index)


def normal_q(rows: int, values: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, values, generator=generator).softmax(-1)


def test_means_start_where_they_are_told():
    data = make_data(train=400)
    for start in ("normal", "points"):
        torch.manual_seed(3)
        first = starting_at(data, 50, 2, start)
        torch.manual_seed(3)
        assert first.means.equal(starting_at(data, 50, 7, start).means)
        assert not first.means.equal(starting_at(data, 50, 2, start).means)
        assert first.start.equal(first.means.detach())
        means = first.means.detach()
        distance = (means[:, None] - data.train.values).norm(dim=-1).min(1).values
        if start == "points":
            assert (distance == 0).all() and len(means.unique(dim=0)) == 50
        else:
            assert (distance > 0).any()
            assert float(means.std()) == pytest.approx(0.25 * float(data.spread), rel=0.2)
            assert (means.mean(0) - data.center).abs().max() < 0.1


def test_a_mixture_may_begin_at_the_truth_of_its_data():
    data = sampled(superclusters=3, deviation=0.5, train_points=3)
    model = starting_at(data, 3, 4, "truth", 0.5)
    assert model.is_truth and model.means.equal(lattice(3, 2))
    assert not starting_at(data, 3, 4, "points", 0.5).is_truth
    for (superclusters, petals, deviation), name, given, true in (
        ((2, 4, 0.5), "superclusters", 2, 3),
        ((3, 2, 0.5), "petals", 2, 4),
        ((3, 4, 0.25), "deviation", 0.25, 0.5),
    ):
        message = f"model.{name} is {given}, but model.start=truth needs that of the data: {true}"
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            starting_at(data, superclusters, petals, "truth", deviation)


def test_components_are_as_wide_as_they_are_told():
    model, wide = make_model(), HierarchicalMixture(make_model().means.detach(), deviation=0.5)
    x, twice = points(3), Points(2 * points(3).values, points(3).ids)
    with torch.no_grad():
        wide.means.mul_(2)
        wide.offsets.mul_(2)
    torch.testing.assert_close(wide.log_joint_all(twice), model.log_joint_all(x) - 2 * log(2))
    drawn, z = wide.sample(4000)
    center = (wide.means[z.supercluster] + wide.offsets[z.petal])[:, 0]
    assert float((drawn.values - center).std().detach()) == pytest.approx(0.5, rel=0.05)


def test_the_start_is_kept_where_the_means_move():
    model = make_model()
    before = model.start.clone()
    model.maximise(points(3), Latents(every(3), None))
    assert model.start.equal(before) and not model.means.equal(before)
    other = make_model()
    other.load_state_dict(model.state_dict())
    assert other.start.equal(before) and other.means.equal(model.means)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"superclusters": 0}, "model.superclusters is 0; it must be at least 1"),
        ({"deviation": 0.0}, "model.deviation is 0.0; it must be positive"),
        ({"petals": 0}, "model.petals is 0; it must be at least 1"),
        ({"start": "here"}, "model.start is 'here'; use 'normal', 'points' or 'truth'"),
        (
            {"start": "truth"},
            "model.start=truth: nobody knows what points was drawn from; use data=sampled",
        ),
        (
            {"superclusters": 13, "start": "points"},
            "model.superclusters is 13; with model.start=points it can be at most 12, the number "
            "of training points",
        ),
    ],
)
def test_options_that_make_no_model(options: dict[str, Any], message: str):
    data: PointData = make_data()
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        starting_at(data, **options)
