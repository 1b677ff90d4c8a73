"""What DANA and SGD share: steps along the gradient and along a running sum of gradients."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, _foreach_add_, _foreach_mul_  # pyright: ignore[reportPrivateImportUsage]
from torch.optim.optimizer import Optimizer

from gfnem.optim.lazy import step_rows
from gfnem.optim.schedules import Coefficients

# Steps after which a lazy table must have had idle rows. Looking waits for the device, once.
WATCHED = 100


class MomentumOptimizer(Optimizer, ABC):
    """Move parameters by gradients g and their running sum y.

    y' = keep y + gamma1 g;  theta' = (1 - shrink) theta - gamma2 g - gamma3 y',

    where a parameter's coefficients depend on its group and on how many steps it has done. Steps
    without a gradient are none. No step waits for the device, but sparse gradients do when their
    rows are put in order.

    Groups have the options `lazy`, `maximize` and `foreach`; see `DANA`.
    """

    @abstractmethod
    def _coefficients(self, group: dict[str, Any], size: int, step: Any) -> Coefficients:
        """The coefficients of a parameter with `size` entries after `step` steps."""

    @abstractmethod
    def _check(self, group: dict[str, Any]) -> None:
        """Raise ValueError for options of a group that cannot be used."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with options of its own.

        Raises:
            ValueError: for options that cannot be used.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_shared(group)
            self._check(group)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: evaluates the loss again and computes gradients.

        Returns:
            What the closure returns, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["lazy"]:
                for p in parameters:
                    self._step_rows(group, p)
            else:
                self._step_all(group, parameters)
        return loss

    def _step_rows(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros(len(p), dtype=torch.int64, device=p.device)
            state["momentum"] = torch.zeros_like(p)
            state["calls"] = 0
        step_rows(
            p,
            state["momentum"],
            state["step"],
            lambda t: self._signed_coefficients(group, p.numel(), t),
        )
        state["calls"] += 1
        if state["calls"] == WATCHED and bool((state["step"] == WATCHED).all()):
            warnings.warn(
                f"all rows of a table of shape {tuple(p.shape)} had a gradient in each of "
                f"{WATCHED} steps: lazy momentum is plain momentum there",
                stacklevel=3,
            )

    def _step_all(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        alike: dict[Coefficients, list[Tensor]] = defaultdict(list)
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["momentum"] = torch.zeros_like(p)
            alike[self._signed_coefficients(group, p.numel(), state["step"])].append(p)
            state["step"] += 1
        for coefficients, some in alike.items():
            gradients = [p.grad.to_dense() for p in some if p.grad is not None]
            momenta = [self.state[p]["momentum"] for p in some]
            foreach = group["foreach"]
            if foreach is None:
                foreach = all(p.is_cuda for p in some)
            update = _update_together if foreach else _update_one_by_one
            update(some, gradients, momenta, coefficients)

    def _signed_coefficients(self, group: dict[str, Any], size: int, step: Any) -> Coefficients:
        """The coefficients, with those of the gradient negative where the loss is to grow."""
        c = self._coefficients(group, size, step)
        if group["maximize"]:
            return c._replace(gamma1=-c.gamma1, gamma2=-c.gamma2)
        return c

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        super().load_state_dict(state_dict)
        for p, state in self.state.items():
            # Optimizer leaves whatever is called `step` where and as it was.
            if isinstance(state["step"], Tensor):
                state["step"] = state["step"].to(p.device, copy=True)


def _check_shared(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name} is {group[name]}; it must be at least 0")
    for p in group["params"]:
        if group["lazy"] and p.dim() < 2:
            raise ValueError(
                f"lazy momentum is for tables of rows, not for a parameter of shape "
                f"{tuple(p.shape)}: give tables a parameter group of their own"
            )


def _update_one_by_one(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    c: Coefficients,
) -> None:
    for p, g, y in zip(parameters, gradients, momenta, strict=True):
        y.mul_(c.keep).add_(g, alpha=c.gamma1)
        if c.shrink != 0:
            p.mul_(1 - c.shrink)
        if c.gamma2 != 0:
            p.add_(g, alpha=-c.gamma2)
        if c.gamma3 != 0:
            p.add_(y, alpha=-c.gamma3)


def _update_together(
    parameters: list[Tensor], gradients: list[Tensor], momenta: list[Tensor], c: Coefficients
) -> None:
    _foreach_mul_(momenta, c.keep)
    _foreach_add_(momenta, gradients, alpha=c.gamma1)
    if c.shrink != 0:
        _foreach_mul_(parameters, 1 - c.shrink)
    if c.gamma2 != 0:
        _foreach_add_(parameters, gradients, alpha=-c.gamma2)
    if c.gamma3 != 0:
        _foreach_add_(parameters, momenta, alpha=-c.gamma3)
