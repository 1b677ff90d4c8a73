"""torchgfn's trajectories, for its own objectives, samplers and containers."""

from __future__ import annotations

import torch
from gfn.containers import Trajectories
from gfn.env import DiscreteEnv
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.gflownet.paths import Paths


def make_trajectories(
    env: DiscreteEnv,
    states: Int[Tensor, "states rows numbers"],
    actions: Int[Tensor, "steps rows"],
    conditions: Float[Tensor, "rows numbers"],
    exits: Int[Tensor, "rows"],
    paths: Paths,
) -> Trajectories:
    """Make torchgfn trajectories of paths whose states and actions are known.

    What comes behind a trajectory's exit, and the exit itself, is put in.

    Args:
        env: whose states and actions they are.
        states: before each action, and behind the last one.
        actions: their numbers; that of the exit may be anything.
        conditions: of each row; the first number is the row of the data point in its batch.
        exits: the step at which each row takes the exit.
        paths: what is known of them; a row is one of them, those of a data point in a row.
    """
    step = torch.arange(len(states), device=states.device)[:, None]
    states = torch.where((step > exits)[..., None], env.sf, states)
    actions = torch.where(step[:-1] == exits, env.n_actions - 1, actions)
    actions = torch.where(step[:-1] > exits, env.dummy_action, actions)
    conditions = conditions.to(torch.get_default_dtype()).expand(len(states), -1, -1)
    return Trajectories(
        env=env,
        states=env.States(states, conditions=conditions),
        actions=env.actions_from_tensor(actions[..., None]),
        terminating_idx=exits + 1,
        log_rewards=paths.log_joint.flatten(),
        log_probs=paths.log_forward.flatten(1),
    )


def trajectories_of_choices(
    env: DiscreteEnv,
    choices: Int[Tensor, "rows steps"],
    actions: Int[Tensor, "steps rows"],
    paths: Paths,
    counted: bool = False,
) -> Trajectories:
    """Make torchgfn trajectories of paths that make one choice after the other, then exit.

    A state holds the choices made, and -1 where there is none yet. The states' conditions are the
    rows of the data points in their batch.

    Args:
        env: whose states and actions they are.
        choices: of each row; those behind its exit do not count.
        actions: the numbers of the choices among the environment's actions.
        paths: what is known of them.
        counted: whether the conditions tell the number of choices of each data point, too.
    """
    batch, samples = paths.log_joint.shape
    point = torch.arange(batch, device=choices.device).repeat_interleave(samples)
    exits = paths.exits.repeat_interleave(samples)
    place = torch.arange(choices.shape[1], device=choices.device)
    step = torch.arange(choices.shape[1] + 2, device=choices.device)[:, None, None]
    states = torch.where(place < torch.minimum(step, exits[:, None]), choices, -1)
    actions = torch.cat([actions, actions[:1]])
    conditions = torch.stack([point, exits] if counted else [point], -1)
    return make_trajectories(env, states, actions, conditions, exits, paths)
