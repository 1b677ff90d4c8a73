"""Choosing a supercluster and then a petal, as a torchgfn environment."""

from __future__ import annotations

from typing import Any, cast

import torch
from gfn.actions import Actions
from gfn.env import DiscreteEnv
from gfn.states import DiscreteStates, States
from torch import Tensor


class MixtureEnv(DiscreteEnv):
    """A state holds supercluster and petal, or -1 where there is none yet.

    Actions are the superclusters, behind them the petals and behind them exit; every state has but
    one of the three kinds. The state graph is a tree, so P_B = 1. `conditions` are the row of the
    point in its batch. The reward, log p(x, z), belongs to the trajectories that policies return;
    the environment alone knows no model.
    """

    is_conditional = True

    def __init__(self, superclusters: int, petals: int, device: str | torch.device = "cpu"):
        self.superclusters = superclusters
        self.petals = petals
        s0 = torch.full((2,), -1, dtype=torch.long, device=device)
        super().__init__(n_actions=superclusters + petals + 1, s0=s0, state_shape=(2,), debug=False)

    def make_states_class(self) -> type[DiscreteStates]:
        env = self

        class MixtureStates(DiscreteStates):
            state_shape = env.state_shape
            s0 = env.s0
            sf = env.sf
            n_actions = env.n_actions

            def chosen(self) -> Tensor:
                """Number of choices made."""
                return (self.tensor >= 0).sum(-1)

            def _compute_forward_masks(self) -> Tensor:
                kinds = torch.tensor([env.superclusters, env.petals, 1], device=self.device)
                step = torch.arange(3, device=self.device).repeat_interleave(kinds)
                return step == self.chosen()[..., None]

            def _compute_backward_masks(self) -> Tensor:
                action = torch.arange(env.n_actions - 1, device=self.device)
                return action == env.last_action(self.tensor)

            @classmethod
            def make_random_states(
                cls, batch_shape: tuple[int, ...], conditions: Any = None, **_: Any
            ) -> States:
                raise ValueError(
                    "a component cannot be drawn without a policy; roll one out instead"
                )

        return MixtureStates

    def last_action(self, state: Tensor) -> Tensor:
        """The action that led to each state; -1 for the initial one."""
        supercluster, petal = state[..., :1], state[..., 1:]
        return torch.where(petal >= 0, self.superclusters + petal, supercluster)

    def step(self, states: DiscreteStates, actions: Actions) -> DiscreteStates:
        first = states.tensor[..., :1] < 0
        supercluster = torch.where(first, actions.tensor, states.tensor[..., :1])
        petal = torch.where(first, -1, actions.tensor - self.superclusters)
        # Without conditions: torchgfn attaches them and would warn at every step otherwise.
        return cast(DiscreteStates, self.States(torch.cat([supercluster, petal], -1)))

    def backward_step(self, states: DiscreteStates, actions: Actions) -> DiscreteStates:
        supercluster, petal = states.tensor[..., :1], states.tensor[..., 1:]
        kept = torch.where(petal >= 0, supercluster, -1)
        before = torch.cat([kept, torch.full_like(petal, -1)], -1)
        return cast(DiscreteStates, self.States(before, conditions=states.conditions))

    def log_reward(self, states: DiscreteStates, conditions: Tensor | None = None) -> Tensor:
        raise ValueError("the reward of a component is log p(x, z): it travels with trajectories")
