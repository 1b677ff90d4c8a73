"""Chains that count their transitions say which are kept; Gibbs is held to enumerated kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gfnem.errors import UserError
from gfnem.latents import Latents
from gfnem.posteriors.mcmc import MCMC, Gibbs, Moves
from gfnem.tasks.mixture.model import HierarchicalMixture
from tests.tasks.discrete_vae.tiny import make_model as make_vae
from tests.tasks.mixture.tiny import (
    Component,
    components,
    counts,
    float64,  # noqa: F401
    log_joint_table,
    make_model,
    p_value,
    points,
    posteriors,
    total_variation,
)

pytestmark = pytest.mark.usefixtures("float64")


@dataclass(frozen=True)
class Numbered:
    """Data points that are nothing but ids.

    numbers: of a state.
    """

    ids: Tensor
    numbers: int = 1


class Counting(Moves):
    """A state is the number of its transitions, as often as the data says."""

    def condition(self, model: Any, x: Numbered) -> Numbered:
        return x

    def begin(self, condition: Numbered, chains: int) -> Tensor:
        return torch.zeros(len(condition.ids), chains, condition.numbers).long()

    def walk(self, condition: Numbered, state: Tensor, steps: int) -> Tensor:
        assert state.shape[::2] == (len(condition.ids), condition.numbers)
        return state + steps

    def latents(self, condition: Numbered, state: Tensor) -> Tensor:
        return state


def batch(*ids: int, numbers: int = 1) -> Numbered:
    return Numbered(torch.tensor(ids), numbers)


def counted(latents: Latents) -> list[int]:
    """Transitions of each data point, which are those of all its chains."""
    assert latents.log_weights is None and latents.m_step_weights is None
    assert (latents.z == latents.z[:, :1, :1]).all()
    return latents.z[:, 0, 0].tolist()


def counting(**options: Any) -> Any:
    return MCMC(Counting(), **{"samples": 3, "steps": 2, "burn_in": 5, **options})


def test_chains_go_on_where_the_last_m_step_left_them():
    posterior: Any = counting()
    model: Any = None
    for ids, transitions in (
        ([1, 0], [7, 7]),
        ([0, 1], [9, 9]),
        ([3, 1], [7, 11]),
        ([2, 3, 0], [7, 9, 11]),
    ):
        latents = posterior.m_step_latents(model, batch(*ids))
        assert counted(latents) == transitions
        assert latents.z.shape == (len(ids), 3, 1)


def test_chains_of_data_points_of_different_sizes():
    posterior, model = counting(), None
    for numbers, ids, transitions in (
        (2, [0, 1], [7, 7]),
        (4, [2], [7]),
        (1, [3], [7]),
        (2, [1, 0], [9, 9]),
        (4, [2], [9]),
    ):
        latents = posterior.m_step_latents(model, batch(*ids, numbers=numbers))
        assert counted(latents) == transitions
        assert latents.z.shape == (len(ids), 3, numbers)


def test_draws_for_other_purposes_begin_anew_and_are_not_kept():
    posterior, model, x = counting(), None, batch(0, 1)
    assert counted(posterior.m_step_latents(model, x)) == [7, 7]
    draws = posterior.sample(model, x, 6)
    assert counted(draws) == [5, 5] and draws.z.shape == (2, 6, 1)
    assert posterior.m_step_latents(model, x, draws) is draws
    posterior.eval()
    assert counted(posterior.m_step_latents(model, x)) == [5, 5]
    # Of data points that have no number, as raw input has none.
    assert counted(posterior.sample(model, batch(-1, -1), 2)) == [5, 5]
    posterior.train()
    assert counted(posterior.m_step_latents(model, x)) == [9, 9]


def test_kept_chains_are_part_of_the_state():
    posterior, other, x = counting(), counting(), batch(0, 2)
    posterior.m_step_latents(None, x)
    other.load_state_dict(posterior.state_dict())
    for go_on in (posterior, other):
        assert counted(go_on.m_step_latents(None, batch(1, 2))) == [7, 9]
    message = (
        "posterior.samples is 2, but 3 chains were kept for each data point: leave it as it was"
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        counting(samples=2).load_state_dict(posterior.state_dict())


def test_there_is_nothing_to_learn():
    posterior = counting(burn_in=0, m_step="closed")
    step = posterior.e_step(None, batch(0))
    assert step.loss is None and step.latents is None and posterior.parameter_groups() == []
    assert posterior.closed_m_step and not counting().closed_m_step
    assert posterior.m_step_samples == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"m_step": "sample"}, "posterior.m_step is 'sample'; use 'gradient' or 'closed'"),
        ({"samples": 0}, "posterior.samples is 0; it must be at least 1"),
        ({"steps": 0}, "posterior.steps is 0; it must be at least 1"),
        ({"burn_in": -1}, "posterior.burn_in is -1; it must not be negative"),
    ],
)
def test_options_that_make_no_posterior(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        counting(**options)


def kernel_of(p: dict[Component, float]) -> dict[Component, dict[Component, float]]:
    """First a proposal of any component, then a supercluster given the petal, then a petal given
    the supercluster.
    """
    of_petal = {j: sum(p[i, j] for i in range(3)) for j in range(4)}
    of_supercluster = {i: sum(p[i, j] for j in range(4)) for i in range(3)}
    sweep: dict[Component, dict[Component, float]] = {
        (i, j): {(k, n): p[k, j] / of_petal[j] * p[k, n] / of_supercluster[k] for k, n in p}
        for i, j in p
    }
    kernel = {}
    for z in p:
        jump = {y: min(1, p[y] / p[z]) / len(p) for y in p if y != z}
        jump[z] = 1 - sum(jump.values())
        kernel[z] = {end: sum(jump[y] * sweep[y][end] for y in p) for end in p}
    return kernel


def test_gibbs_transitions_are_those_of_the_enumerated_kernel():
    model, x = make_model(), points(2)
    moves, each = Gibbs(), torch.tensor(components())
    repeats = 1_000
    torch.manual_seed(0)
    start = each.repeat_interleave(repeats, 0).expand(2, -1, -1)
    end = moves.walk(moves.condition(model, x), start, 1)
    for row, p in enumerate(posteriors(model, x)):
        kernel = kernel_of(p)
        for z in p:
            assert sum(p[start] * kernel[start][z] for start in p) == pytest.approx(p[z])
        for number, reached in enumerate(end[row].split(repeats)):
            assert p_value(counts(reached), kernel[components()[number]]) > 1e-4


def test_long_chains_have_the_exact_posterior():
    """Also of points whose explanations differ in both parts."""
    model, x, samples = make_model(), points(3), 4_000
    torch.manual_seed(0)
    latents = MCMC(Gibbs(), samples, steps=1, burn_in=30).m_step_latents(model, x)
    for row, p in enumerate(posteriors(model, x)):
        drawn = {z: n / samples for z, n in counts(latents.z.index[row]).items()}
        assert total_variation(drawn, p) < 0.02


def test_m_steps_climb_the_mean_over_the_chains():
    model, x = make_model(), points(6)
    posterior = MCMC(Gibbs(), samples=3)
    torch.manual_seed(0)
    value = posterior.expected_log_joint(model, x)
    value.sum().backward()
    assert model.means.grad is not None and model.means.grad.abs().max() > 0
    kept = posterior.get_extra_state()["kept"]
    table = log_joint_table(model, x)
    at = kept[..., 0] * 4 + kept[..., 1]
    torch.testing.assert_close(value, table.gather(1, at).mean(-1))


def test_models_whose_latents_have_no_parts():
    message = "^posterior.moves=Gibbs needs a model whose latents have parts; DiscreteVAE has none:"
    with pytest.raises(UserError, match=message):
        MCMC(Gibbs()).sample(make_vae(), points(2), 1)


def test_one_component_alone():
    model = HierarchicalMixture(torch.zeros(1, 2), petals=1)
    latents = MCMC(Gibbs()).sample(model, points(2), 5)
    assert latents.z.index.tolist() == 2 * [5 * [[0, 0]]]
