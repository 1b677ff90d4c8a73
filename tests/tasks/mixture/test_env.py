from __future__ import annotations

from typing import Any

import pytest
import torch
from gfn.samplers import Sampler

from gfnem.tasks.mixture.env import MixtureEnv
from tests.tasks.mixture.tiny import (
    components,
    counts,
    float64,  # noqa: F401
    make_model,
    make_policy,
    p_value,
    points,
    q_tables,
)

pytestmark = pytest.mark.usefixtures("float64")

SIZES = [(3, 4), (1, 1), (2, 5)]


def debug_env(superclusters: int, petals: int) -> MixtureEnv:
    env = MixtureEnv(superclusters, petals)
    env.debug = True
    return env


def test_torchgfn_s_sampler_draws_from_the_policy():
    model, policy, x = make_model(), make_policy(), points(3)
    condition = policy.condition(model, x)
    rows = torch.arange(3).repeat_interleave(4_000)
    env = debug_env(3, 4)
    start = env.reset(batch_shape=(len(rows),), conditions=rows[:, None].double())
    torch.manual_seed(0)
    trajectories = Sampler(policy.estimators(condition)[0]).sample_trajectories(env, states=start)
    assert (trajectories.terminating_idx == 3).all()
    ends = trajectories.terminating_states.tensor
    for row, probability in enumerate(q_tables(policy, model, x)):
        assert p_value(counts(ends[rows == row]), probability) > 1e-3


@pytest.mark.parametrize("superclusters, petals", SIZES)
def test_masks_steps_and_their_undoing(superclusters, petals):
    env = debug_env(superclusters, petals)
    start: Any = env.States(env.s0.expand(superclusters, -1))
    assert start.is_initial_state.all() and not start.backward_masks.any()
    kinds = [superclusters, petals, 1]
    masks = torch.eye(3).bool().repeat_interleave(torch.tensor(kinds), 1)
    assert (start.forward_masks == masks[0]).all()
    first = env.actions_from_tensor(torch.arange(superclusters)[:, None])
    middle: Any = env._step(start, first)
    assert middle.tensor.tolist() == [[i, -1] for i in range(superclusters)]
    assert (middle.forward_masks == masks[1]).all()
    assert middle.backward_masks.nonzero().tolist() == [[i, i] for i in range(superclusters)]
    assert torch.equal(env._backward_step(middle, first).tensor, start.tensor)
    each = components(superclusters, petals)
    before: Any = env.States(torch.tensor([[i, -1] for i, _ in each]))
    second = env.actions_from_tensor(torch.tensor([[superclusters + j] for _, j in each]))
    full: Any = env._step(before, second)
    assert full.tensor.tolist() == [list(z) for z in each]
    assert (full.forward_masks == masks[2]).all()
    undone = full.backward_masks.nonzero().tolist()
    assert undone == [[row, superclusters + j] for row, (_, j) in enumerate(each)]
    assert torch.equal(env._backward_step(full, second).tensor, before.tensor)
    leave = env.actions_from_tensor(torch.full((len(each), 1), superclusters + petals))
    assert env._step(full, leave).is_sink_state.all()


def test_what_an_environment_alone_cannot_do():
    env = debug_env(3, 4)
    states: Any = env.States(env.s0[None])
    with pytest.raises(ValueError, match="it travels with trajectories"):
        env.log_reward(states)
    with pytest.raises(ValueError, match="cannot be drawn without a policy; roll one out instead"):
        env.States.make_random_states((3,))
