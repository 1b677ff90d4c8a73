"""Grids that are filled code by code in raster order, as a torchgfn environment."""

from __future__ import annotations

from typing import Any, cast

import torch
from gfn.actions import Actions
from gfn.env import DiscreteEnv
from gfn.states import DiscreteStates, States
from torch import Tensor
from torch.nn import functional


class GridEnv(DiscreteEnv):
    """A state holds the code at each position, or -1 where there is none yet.

    Actions are the codes, for the first empty position, and behind them exit, which is forced when
    the grid is full and illegal before. The state graph is a tree, so P_B = 1. `conditions` are
    the row of the image in its batch. The reward, log p(x, z), belongs to the trajectories that
    policies return; the environment alone knows no model.
    """

    is_conditional = True

    def __init__(self, positions: int, codes: int, device: str | torch.device = "cpu"):
        self.positions = positions
        self.codes = codes
        s0 = torch.full((positions,), -1, dtype=torch.long, device=device)
        super().__init__(n_actions=codes + 1, s0=s0, state_shape=(positions,), debug=False)

    def make_states_class(self) -> type[DiscreteStates]:
        env = self

        class GridStates(DiscreteStates):
            state_shape = env.state_shape
            s0 = env.s0
            sf = env.sf
            n_actions = env.n_actions

            def filled(self) -> Tensor:
                """Number of codes placed."""
                return (self.tensor >= 0).sum(-1)

            def _compute_forward_masks(self) -> Tensor:
                full = (self.filled() == env.positions)[..., None]
                return torch.cat([(~full).expand(*full.shape[:-1], env.codes), full], -1)

            def _compute_backward_masks(self) -> Tensor:
                filled = self.filled()[..., None]
                last = self.tensor.gather(-1, (filled - 1).clamp(min=0)).squeeze(-1)
                return functional.one_hot(last.clamp(min=0), env.codes).bool() & (filled > 0)

            @classmethod
            def make_random_states(
                cls, batch_shape: tuple[int, ...], conditions: Any = None, **_: Any
            ) -> States:
                raise ValueError("a grid cannot be drawn without a policy; roll one out instead")

        return GridStates

    def step(self, states: DiscreteStates, actions: Actions) -> DiscreteStates:
        first_empty = (states.tensor >= 0).sum(-1, keepdim=True)
        filled = states.tensor.clone().scatter_(-1, first_empty, actions.tensor)
        # Without conditions: torchgfn attaches them and would warn at every step otherwise.
        return cast(DiscreteStates, self.States(filled))

    def backward_step(self, states: DiscreteStates, actions: Actions) -> DiscreteStates:
        last = (states.tensor >= 0).sum(-1, keepdim=True) - 1
        emptied = states.tensor.clone().scatter_(-1, last, -1)
        return cast(DiscreteStates, self.States(emptied, conditions=states.conditions))

    def log_reward(self, states: DiscreteStates, conditions: Tensor | None = None) -> Tensor:
        raise ValueError("the reward of a grid is log p(x, z): it travels with the trajectories")
