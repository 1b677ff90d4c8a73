"""Dimension-adapted Nesterov acceleration."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from gfnem.optim.momentum import MomentumOptimizer
from gfnem.optim.schedules import Coefficient, Coefficients, PowerLaw, value_at

COEFFICIENTS = ("decay", "gamma1", "gamma2", "gamma3")
# As for the language model of the paper's authors.
DECAY = PowerLaw(init=1.0, power=-1.0, scale=8.0)
GAMMA3 = PowerLaw(init=0.5, power=-0.5)


class DANA(MomentumOptimizer):
    """Minimise by DANA, a momentum that lengthens as steps are done (arXiv 2505.16098).

    With the gradient g_t at theta_t, t = 0, 1, ..., and y_0 = 0:

        y_{t+1} = (1 - decay(t)) y_t + gamma1(t) g_t
        theta_{t+1} = (1 - lr gamma2(t) weight_decay) theta_t
                      - lr (gamma2(t) g_t + gamma3(t) y_{t+1})

    The published schedules are `dana_constant` and `dana_decaying`. With gamma3 = 0 this is SGD.
    With gamma1 = gamma2 = 1, gamma3 = beta and decay = 1 - beta it is Nesterov's momentum as torch
    has it.

    A parameter's t counts its own updates; a step in which it has no gradient is none of them.
    Coefficients that are functions are options of the code, not state: `state_dict` leaves them
    out, and an optimizer that loads it keeps its own.

    Example:
        >>> import torch
        >>> from gfnem.optim import DANA, dana_decaying
        >>> theta = torch.nn.Parameter(torch.ones(4))
        >>> optimizer = DANA([theta], **dana_decaying(batch=1, dimension=4, trace=1.0, alpha=1.0))
        >>> theta.square().sum().backward()
        >>> optimizer.step()
        >>> bool((theta < 1).all())
        True

    Args:
        params: parameters, or groups of them that may have all further options for themselves.
        lr: factor of gamma2 and gamma3.
        decay: how much of the momentum a step forgets, from 0 to 1; 8 / (8 + t).
        gamma1: of the gradient in the momentum.
        gamma2: of the gradient in the step.
        gamma3: of the momentum in the step; 0.5 / sqrt(1 + t). These four are numbers or functions
            of t, and with `lazy` the functions are called with tensors.
        layerwise: divide gamma3 by the parameter's number of entries.
        weight_decay: decoupled, as AdamW's, with the rate lr gamma2.
        lazy: rows, along the first dimension, whose gradient is all zero in a step stay as they
            are, momentum and weights, and t counts each row's own updates. For tables of word
            embeddings alone: softmax emissions give every row a gradient at every step.
        maximize: the loss instead.
        foreach: update all parameters in one call; None does where they are on a CUDA device.

    Raises:
        ValueError: for numbers out of range and for lazy momentum of parameters without rows.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        decay: Coefficient = DECAY,
        gamma1: Coefficient = 1.0,
        gamma2: Coefficient = 1.0,
        gamma3: Coefficient = GAMMA3,
        layerwise: bool = False,
        weight_decay: float = 0.0,
        lazy: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ):
        defaults = {
            "lr": lr,
            "decay": decay,
            "gamma1": gamma1,
            "gamma2": gamma2,
            "gamma3": gamma3,
            "layerwise": layerwise,
            "weight_decay": weight_decay,
            "lazy": lazy,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        for name in COEFFICIENTS:
            first = value_at(group[name], 0)
            if not first >= 0:
                raise ValueError(f"{name} is {first}; it must be at least 0")
            if name == "decay" and first > 1:
                raise ValueError(f"decay is {first}; it must be at most 1")

    def _coefficients(self, group: dict[str, Any], size: int, step: Any) -> Coefficients:
        decay, gamma1, gamma2, gamma3 = (value_at(group[name], step) for name in COEFFICIENTS)
        rate = group["lr"] * gamma2
        return Coefficients(
            keep=1 - decay,
            gamma1=gamma1,
            gamma2=rate,
            gamma3=group["lr"] * gamma3 / (size if group["layerwise"] else 1),
            shrink=rate * group["weight_decay"],
        )

    def state_dict(self) -> dict[str, Any]:
        """The state and those options that are plain values."""
        state = super().state_dict()
        for group in state["param_groups"]:
            for name in COEFFICIENTS:
                if callable(group[name]):
                    del group[name]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; functions of t stay those given here."""
        own = [{name: group[name] for name in COEFFICIENTS} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, coefficients in zip(self.param_groups, own, strict=True):
            for name, coefficient in coefficients.items():
                group.setdefault(name, coefficient)
