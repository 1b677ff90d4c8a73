from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch

from gfnem.inference import inference, log_mean_exp
from gfnem.tasks.discrete_vae import importance
from gfnem.tasks.discrete_vae.codes import Codes
from gfnem.tasks.discrete_vae.importance import (
    choose_temperature,
    effective_samples,
    log_weights,
)
from tests.tasks.discrete_vae.tiny import (
    all_grids,
    float64,
    images,
    log_joint_table,
    make_model,
    make_policy,
)

__all__ = ["float64"]
pytestmark = pytest.mark.usefixtures("float64")


class Known:
    """In place of a policy: at temperature T it draws from p(z | x) to the power of power / T."""

    def __init__(self, table, power: float = 1.0):
        self.grids = all_grids()
        self.table = table
        self.power = power
        self.asked: list[int] = []

    def condition(self, model, x):
        return x

    def draw(self, x, samples: int, temperature: float = 1.0):
        self.asked.append(samples)
        log_q = (self.table[x.ids] * self.power / temperature).log_softmax(-1)
        chosen = torch.multinomial(log_q.exp(), samples, replacement=True)
        return Codes(self.grids[chosen]), log_q.gather(1, chosen)


def test_the_exact_posterior_gives_every_draw_the_weight_of_the_likelihood():
    model, x = make_model(), images(3)
    table = log_joint_table(model, x)
    policy: Any = Known(table)
    weights = log_weights(policy, model, x, 50)
    torch.testing.assert_close(weights, table.logsumexp(-1)[:, None].expand(-1, 50))
    torch.testing.assert_close(effective_samples(weights), torch.full((3,), 50.0))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_weights_average_to_the_enumerated_likelihood(temperature):
    model, policy, x = make_model(), make_policy(), images(4)
    torch.manual_seed(0)
    weights = (log_weights(policy, model, x, 40_000, temperature)).exp()
    exact = log_joint_table(model, x).exp().sum(-1)
    error = weights.std(-1) / 40_000**0.5
    # So that the comparison can fail: the estimate is good to a few percent.
    assert (error < 0.04 * exact).all()
    assert ((weights.mean(-1) - exact).abs() < 4 * error).all()


def test_many_draws_are_made_in_several_goes(monkeypatch):
    model, x = make_model(), images(3)
    policy: Any = Known(log_joint_table(model, x))
    monkeypatch.setattr(importance, "CHUNK", 12)
    assert log_weights(policy, model, x, 10).shape == (3, 10)
    assert policy.asked == [4, 4, 2]


def test_large_images_are_rated_with_fewer_draws_at_a_time(monkeypatch):
    model, x = make_model(), images(3)
    policy: Any = Known(log_joint_table(model, x))
    # Sixteen pixels: two draws for each of three images.
    monkeypatch.setattr(importance, "NUMBERS", 16 * 6)
    log_weights(policy, model, x, 5)
    assert policy.asked == [2, 2, 1]


def test_bound_and_effective_samples_of_a_hand_worked_case():
    weights = torch.tensor([[1.0, 3.0], [0.2, 0.2]]).log()
    assert log_mean_exp(weights).tolist() == pytest.approx([log(2), log(0.2)])
    assert effective_samples(weights).tolist() == pytest.approx([16 / 10, 2])


def many_images(model, power: float):
    """Eight images, each 250 times, and a proposal that is exact at a known temperature.

    Two draws of each are few enough for a wrong temperature to cost more than the noise.
    """
    x = images(8)
    policy: Any = Known(log_joint_table(model, x), power)
    return policy, x.select(torch.arange(8).repeat(250))


# Within fine steps of a coarse one, on either side of 1, and 1 itself.
@pytest.mark.parametrize("best", [2**-3.5, 0.5, 1.0, 2**1.5, 16.0, 2**5.5])
def test_the_temperature_that_makes_the_proposal_exact_is_found(best):
    model = make_model(noise=0.5)
    policy, x = many_images(model, best)
    torch.manual_seed(0)
    assert choose_temperature(policy, model, x, 2) == pytest.approx(best)


def test_the_chosen_temperature_is_better_than_its_neighbours():
    model = make_model(noise=0.5)
    policy, x = many_images(model, 3.0)
    torch.manual_seed(0)
    chosen = choose_temperature(policy, model, x, 2)

    def bound(temperature: float) -> float:
        # Many times two draws: hardly any noise.
        weights = log_weights(policy, model, x, 200, temperature)
        return float(torch.stack([log_mean_exp(pair) for pair in weights.split(2, 1)]).mean())

    assert chosen != 1
    for factor in (2**0.5, 4):
        assert bound(chosen) > max(bound(chosen / factor), bound(chosen * factor))


def test_the_choice_depends_on_the_seed_alone():
    model, policy, x = make_model(), make_policy(), images(4)
    torch.manual_seed(5)
    first = choose_temperature(policy, model, x, 8), torch.rand(())
    torch.manual_seed(5)
    assert (choose_temperature(policy, model, x, 8), torch.rand(())) == first


def test_nothing_has_a_gradient():
    model, policy = make_model(), make_policy()
    assert not log_weights(policy, model, images(2), 3).requires_grad


def test_models_that_train_in_bfloat16_are_rated_as_exactly(monkeypatch):
    torch.set_default_dtype(torch.float32)
    exact, rounded = make_model(), make_model(precision="bfloat16")
    x = images(3)
    again: list[int] = []
    decode = rounded.log_reconstruction_of

    def counted(x, image, index, precision=None):
        if precision is None:
            again.append(len(index))
        return decode(x, image, index, precision)

    monkeypatch.setattr(rounded, "log_reconstruction_of", counted)
    policy: Any = Known(log_joint_table(exact, x), power=0.1)
    torch.manual_seed(0)
    expected = log_weights(policy, exact, x, 200)
    with inference(exact, rounded):
        torch.manual_seed(0)
        found = log_weights(policy, rounded, x, 200)
    assert 0 < again[0] < found.numel(), "draws without weight are decoded in bfloat16 alone"
    difference = (found - expected).abs()
    assert 0 < difference.max() < 0.1
    likely = expected.softmax(-1) > 0.01
    assert likely.any() and difference[likely].max() < 1e-5
    torch.testing.assert_close(log_mean_exp(found), log_mean_exp(expected), atol=1e-4, rtol=0)
