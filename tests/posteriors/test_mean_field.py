"""Coordinate ascent on the bound, held to hand-worked cases of the mixture and to enumeration."""

from __future__ import annotations

import re
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor

from gfnem.errors import UserError
from gfnem.posteriors.mean_field import MeanField
from gfnem.tasks.mixture.data import Points
from gfnem.tasks.mixture.model import HierarchicalMixture
from tests.tasks.discrete_vae.tiny import make_model as make_vae
from tests.tasks.mixture.tiny import (
    components,
    counts,
    float64,  # noqa: F401
    log_joint_table,
    make_model,
    p_value,
    points,
)

pytestmark = pytest.mark.usefixtures("float64")


def two_petals(*means: tuple[float, float]) -> HierarchicalMixture:
    """Each mean with one petal at a distance of 1 above it and one below."""
    return HierarchicalMixture(torch.tensor(means), petals=2)


def bound(model: HierarchicalMixture, q: list[Tensor], x: Points) -> Tensor:
    """The evidence lower bound of each point, by enumeration."""
    joint = (q[0][:, :, None] * q[1][:, None]).flatten(1)
    log_joint = log_joint_table(model, x)
    return (joint * log_joint).sum(-1) + torch.special.entr(joint).sum(-1)


def gap(model: HierarchicalMixture, q: list[Tensor], x: Points) -> list[float]:
    return (log_joint_table(model, x).logsumexp(-1) - bound(model, q, x)).tolist()


def test_fixed_point_of_a_hand_worked_case():
    """A point that is the upper petal of the one and the lower petal of the other: by symmetry the
    uniform factors do not move, though half of their mass is where the point cannot be.
    """
    model, x = two_petals((0.0, 0.0), (0.0, 2.0)), Points.numbered(torch.tensor([[0.0, 1.0]]))
    q = MeanField().eval().factors(model, x)
    for factor in q:
        assert factor.tolist() == [pytest.approx([0.5, 0.5])]
    # Two components at distance 0, two at 2: E_q[log p(x | z)] is 16 nats below the best.
    expected = 16 + log(2 + 2 * exp(-32)) - log(4)
    assert gap(model, q, x) == pytest.approx([expected])


def test_a_factorised_posterior_tells_half_of_the_truth():
    """The same point a little higher: both explanations stay as likely, q has to choose one."""
    model, x = two_petals((0.0, 0.0), (0.0, 2.0)), Points.numbered(torch.tensor([[0.0, 1.1]]))
    q = MeanField().eval().factors(model, x)
    assert [factor.argmax(-1).item() for factor in q] == [1, 1]
    assert gap(model, q, x) == pytest.approx([log(2)], abs=1e-4)


def test_factors_kept_from_one_m_step_to_the_next_are_stuck():
    """Between the old explanation and a better one that differs in both parts lie worse ones."""
    x = Points.numbered(torch.tensor([[0.0, 1.0]]))
    before, after = two_petals((0.0, 2.0), (0.0, 5.0)), two_petals((0.0, 3.0), (0.0, 0.0))
    posterior = MeanField()
    assert [f.argmax(-1).item() for f in posterior.factors(before, x)] == [0, 1]
    stuck = posterior.factors(after, x)
    assert [factor.argmax(-1).item() for factor in stuck] == [0, 1]
    # A distance of 1 instead of 0.
    assert gap(after, stuck, x) == pytest.approx([8], abs=1e-2)
    # In evaluation mode nothing is known of the point.
    fresh = posterior.eval().factors(after, x)
    assert [factor.argmax(-1).item() for factor in fresh] == [1, 0]
    assert gap(after, fresh, x) == pytest.approx([0], abs=1e-2)
    other = MeanField()
    other.load_state_dict(posterior.state_dict())
    for factor, same in zip(other.factors(after, x), stuck, strict=True):
        torch.testing.assert_close(factor, same)


def test_every_sweep_climbs_the_bound_and_the_last_leaves_factors_as_they_are():
    model, x = make_model(), points(20)
    bounds = [bound(model, MeanField(sweeps=n).eval().factors(model, x), x) for n in range(1, 6)]
    for lower, higher in zip(bounds, bounds[1:], strict=False):
        assert (higher >= lower - 1e-9).all()
    assert (bounds[1] > bounds[0] + 1e-3).any()
    q = MeanField(tolerance=1e-9).eval().factors(model, x)
    table = log_joint_table(model, x).view(20, *model.parts)
    for part, subscripts in enumerate(("nij,nj->ni", "nij,ni->nj")):
        expected = torch.einsum(subscripts, table, q[1 - part]).softmax(-1)
        torch.testing.assert_close(q[part], expected, rtol=1e-5, atol=1e-7)


def test_m_steps_take_the_expectation_exactly():
    model, x = make_model(), points(6)
    posterior = MeanField().eval()
    q = posterior.factors(model, x)
    joint = (q[0][:, :, None] * q[1][:, None]).flatten(1)
    expected = (joint * log_joint_table(model, x)).sum(-1)
    value = posterior.expected_log_joint(model, x)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    value.sum().backward()
    assert model.means.grad is not None and model.means.grad.abs().max() > 0
    latents = posterior.m_step_latents(model, x)
    assert latents.z.index.tolist() == 6 * [[list(z) for z in components()]]
    assert latents.m_step_weights is not None
    torch.testing.assert_close(latents.m_step_weights, joint)
    assert posterior.e_step(model, x).loss is None and posterior.parameter_groups() == []


def test_plain_draws_and_their_weights():
    model, x = make_model(), points(3)
    posterior = MeanField().eval()
    q = posterior.factors(model, x)
    torch.manual_seed(0)
    latents = posterior.sample(model, x, 6_000)
    assert latents.log_weights is not None
    for row in range(3):
        probability = {(i, j): float(q[0][row, i] * q[1][row, j]) for i, j in components()}
        assert p_value(counts(latents.z.index[row]), probability) > 1e-3
        log_joint = dict(zip(components(), log_joint_table(model, x)[row].tolist(), strict=True))
        drawn = [tuple(z) for z in latents.z.index[row, :50].tolist()]
        expected = [log_joint[z] - log(probability[z]) for z in drawn]
        assert latents.log_weights[row, :50].tolist() == pytest.approx(expected, rel=1e-5)


def test_what_is_kept_belongs_to_a_point_whatever_the_batch():
    model, x = make_model(), points(8)
    whole, parts = MeanField(sweeps=2), MeanField(sweeps=2)
    for _ in range(2):
        whole.factors(model, x)
        for rows in ([1, 0], [6, 3, 2], [7, 4, 5]):
            parts.factors(model, x.select(torch.tensor(rows)))
    for one, other in zip(whole.factors(model, x), parts.factors(model, x), strict=True):
        torch.testing.assert_close(one, other)


def test_models_whose_latents_have_no_parts():
    message = "posterior=mean_field needs a model whose latents have parts; DiscreteVAE has none: "
    with pytest.raises(UserError, match=message):
        MeanField().factors(make_vae(), points(2))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"m_step": "sample"}, "posterior.m_step is 'sample'; use 'gradient' or 'closed'"),
        ({"sweeps": 0}, "posterior.sweeps is 0; it must be at least 1"),
        ({"tolerance": 0.0}, "posterior.tolerance is 0.0; it must be positive"),
    ],
)
def test_options_that_make_no_posterior(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        MeanField(**options)
    assert MeanField("closed").closed_m_step and not MeanField().closed_m_step
