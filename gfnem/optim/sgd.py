"""Stochastic gradient descent with a momentum that may be lazy."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from gfnem.optim.momentum import MomentumOptimizer
from gfnem.optim.schedules import Coefficients


class SGD(MomentumOptimizer):
    """Minimise by SGD with momentum, Polyak's or Nesterov's, whose idle rows may wait.

    With the gradient g_t at theta_t and y_0 = 0:

        y_{t+1} = momentum y_t + g_t
        theta_{t+1} = (1 - lr weight_decay) theta_t - lr y_{t+1}
        or, with nesterov, (1 - lr weight_decay) theta_t - lr (g_t + momentum y_{t+1})

    Without weight decay and lazy rows it is torch.optim.SGD.

    Example:
        >>> import torch
        >>> from gfnem.optim import SGD
        >>> table = torch.nn.Embedding(5, 2)
        >>> before = table.weight.detach().clone()
        >>> optimizer = SGD(table.parameters(), lr=0.1, lazy=True)
        >>> table(torch.tensor([1, 3])).square().sum().backward()
        >>> optimizer.step()
        >>> (table.weight != before).any(1).tolist()
        [False, True, False, True, False]

    Args:
        params: parameters, or groups of them that may have all further options for themselves.
        lr: learning rate.
        momentum: at least 0 and below 1.
        nesterov: Nesterov's momentum.
        weight_decay: decoupled, as AdamW's.
        lazy: rows, along the first dimension, whose gradient is all zero in a step stay as they
            are, momentum and weights. For tables of word embeddings alone: softmax emissions give
            every row a gradient at every step.
        maximize: the loss instead.
        foreach: update all parameters in one call; None does where they are on a CUDA device.

    Raises:
        ValueError: for numbers out of range and for lazy momentum of parameters without rows.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        lazy: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "lazy": lazy,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum is {group['momentum']}; it must be at least 0 and below 1")

    def _coefficients(self, group: dict[str, Any], size: int, step: Any) -> Coefficients:
        lr, momentum = group["lr"], group["momentum"]
        nesterov = group["nesterov"]
        return Coefficients(
            keep=momentum,
            gamma1=1.0,
            gamma2=lr if nesterov else 0.0,
            gamma3=lr * momentum if nesterov else lr,
            shrink=lr * group["weight_decay"],
        )
