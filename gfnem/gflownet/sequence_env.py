"""One choice after the other, as a torchgfn environment."""

from __future__ import annotations

from typing import Any, cast

import torch
from gfn.actions import Actions
from gfn.env import DiscreteEnv
from gfn.states import DiscreteStates, States
from torch import Tensor
from torch.nn import functional


class SequenceEnv(DiscreteEnv):
    """A state holds the choices made, and -1 for each of those that are still to be made.

    Actions are the choices, numbered, and behind them exit, which is forced when all are made and
    illegal before; a choice that makes no sense is for policies to leave out. The state graph is a
    tree. `conditions` are the row of the data point in its batch. The reward, log p(x, z), belongs
    to the trajectories that policies return; the environment alone knows no model.

    steps: choices to be made.
    choices: how many there are at each step.
    """

    is_conditional = True

    def __init__(self, steps: int, choices: int, device: str | torch.device = "cpu"):
        self.steps = steps
        self.choices = choices
        s0 = torch.full((steps,), -1, dtype=torch.long, device=device)
        super().__init__(n_actions=choices + 1, s0=s0, state_shape=(steps,), debug=False)

    def make_states_class(self) -> type[DiscreteStates]:
        env = self

        class SequenceStates(DiscreteStates):
            state_shape = env.state_shape
            s0 = env.s0
            sf = env.sf
            n_actions = env.n_actions

            def filled(self) -> Tensor:
                """Number of choices made."""
                return (self.tensor >= 0).sum(-1)

            def _compute_forward_masks(self) -> Tensor:
                full = (self.filled() == env.choices_due(self))[..., None]
                return torch.cat([(~full).expand(*full.shape[:-1], env.choices), full], -1)

            def _compute_backward_masks(self) -> Tensor:
                filled = self.filled()[..., None]
                last = self.tensor.gather(-1, (filled - 1).clamp(min=0)).squeeze(-1)
                return functional.one_hot(last.clamp(min=0), env.choices).bool() & (filled > 0)

            @classmethod
            def make_random_states(
                cls, batch_shape: tuple[int, ...], conditions: Any = None, **_: Any
            ) -> States:
                raise ValueError("states cannot be drawn without a policy; roll one out instead")

        return SequenceStates

    def choices_due(self, states: DiscreteStates) -> int | Tensor:
        """How many choices a complete state holds."""
        return self.steps

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
        raise ValueError("the reward is log p(x, z): it travels with the trajectories")
