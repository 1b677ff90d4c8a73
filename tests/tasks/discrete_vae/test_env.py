from __future__ import annotations

from typing import Any

import pytest
import torch
from gfn.samplers import Sampler

from gfnem.tasks.discrete_vae.env import GridEnv
from tests.tasks.discrete_vae.tiny import (
    CODES,
    all_grids,
    counts,
    float64,  # noqa: F401
    images,
    make_model,
    make_policy,
    p_value,
)

pytestmark = pytest.mark.usefixtures("float64")


def debug_env(positions: int = 4, codes: int = CODES) -> GridEnv:
    env = GridEnv(positions, codes)
    env.debug = True
    return env


def partial_grids(positions: int, codes: int) -> list[torch.Tensor]:
    """All states with 0, 1, ... codes placed."""
    levels = []
    for filled in range(positions + 1):
        known = all_grids(filled, codes) if filled else torch.zeros(1, 0, dtype=torch.long)
        empty = torch.full((len(known), positions - filled), -1)
        levels.append(torch.cat([known, empty], 1))
    return levels


@pytest.mark.parametrize("autoregressive", [True, False])
def test_torchgfn_s_sampler_draws_from_the_policy(autoregressive):
    model, policy = make_model(), make_policy(autoregressive=autoregressive)
    x = images(3)
    condition = policy.condition(model, x)
    rows = torch.arange(3).repeat_interleave(4_000)
    env = debug_env()
    start = env.reset(batch_shape=(len(rows),), conditions=rows[:, None].double())
    torch.manual_seed(0)
    forward, _ = policy.estimators(condition)
    trajectories = Sampler(forward).sample_trajectories(env, states=start)
    assert (trajectories.terminating_idx == 5).all()
    ends = trajectories.terminating_states.tensor
    grids = all_grids()
    index = grids.expand(3, -1, -1)
    q = policy._log_probabilities(condition, index).sum(-1).exp()
    torch.testing.assert_close(q.sum(-1), torch.ones(3))
    assert (q[0] - q[1]).abs().sum() > 0.05
    for row in range(3):
        probability = dict(zip(map(tuple, grids.tolist()), q[row].tolist(), strict=True))
        assert p_value(counts(ends[rows == row]), probability) > 1e-3


def test_masks():
    env = debug_env()
    for filled, tensor in enumerate(partial_grids(4, CODES)):
        states: Any = env.States(tensor)
        assert (states.filled() == filled).all()
        codes, leave = states.forward_masks[:, :CODES], states.forward_masks[:, CODES]
        assert codes.all() == (filled < 4) and codes.any() == (filled < 4)
        assert leave.all() == (filled == 4) and leave.any() == (filled == 4)
        if filled == 0:
            assert not states.backward_masks.any()
        else:
            undone = states.backward_masks.nonzero()[:, 1]
            assert (states.backward_masks.sum(-1) == 1).all()
            assert torch.equal(undone, tensor[:, filled - 1])


@pytest.mark.parametrize("positions, codes", [(4, 3), (1, 2), (3, 2)])
def test_steps_and_their_undoing_are_inverse(positions, codes):
    env = debug_env(positions, codes)
    levels = partial_grids(positions, codes)
    for before, after in zip(levels, levels[1:], strict=False):
        states: Any = env.States(before.repeat_interleave(codes, 0))
        actions = env.actions_from_tensor(torch.arange(codes).repeat(len(before))[:, None])
        reached: Any = env._step(states, actions)
        assert torch.equal(reached.tensor, after)
        assert torch.equal(env._backward_step(reached, actions).tensor, states.tensor)
        # The states that steps are taken from stay as they are.
        assert torch.equal(states.tensor, before.repeat_interleave(codes, 0))


def test_full_grids_can_but_leave():
    env = debug_env()
    full: Any = env.States(all_grids())
    leave = env.actions_from_tensor(torch.full((len(all_grids()), 1), CODES))
    assert env._step(full, leave).is_sink_state.all()
    start: Any = env.States(env.s0[None])
    assert start.is_initial_state.all() and not start.is_sink_state.any()


def test_what_an_environment_alone_cannot_do():
    env = debug_env()
    states: Any = env.States(env.s0[None])
    with pytest.raises(ValueError, match="it travels with the trajectories"):
        env.log_reward(states)
    with pytest.raises(ValueError, match="cannot be drawn without a policy; roll one out instead"):
        env.States.make_random_states((3,))
