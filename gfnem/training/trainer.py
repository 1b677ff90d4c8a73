"""One network's optimizer: warm-up, clipping, and updates that are skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gfnem.errors import UserError

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]

MODEL_OPTIMIZER: OptimizerFactory = partial(torch.optim.Adam, lr=1e-3, fused=True)
POSTERIOR_OPTIMIZER: OptimizerFactory = partial(torch.optim.Adam, lr=2e-3, fused=True)

# An update whose loss or gradient is not finite is skipped; so many in a row end the run.
SKIPS_ALLOWED = 10


class Diverged(UserError):  # noqa: N818
    """Too many updates in a row had a loss or a gradient that is not finite."""


class Trainer:
    """One network with its optimizer, warm-up, gradient clipping and skipped updates.

    name: of the network in messages.
    clip: largest norm of the gradient; None for no clipping.
    warmup: steps over which the learning rate rises linearly.
    """

    def __init__(
        self,
        name: str,
        groups: list[dict[str, Any]],
        optimizer: OptimizerFactory,
        clip: float | None,
        warmup: int,
    ):
        self.name = name
        self.clip = clip
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.optimizer = optimizer(groups)
        self.warmup = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, start_factor=1 / max(warmup, 1), total_iters=max(warmup - 1, 0)
        )
        self.skipped = 0
        self.skipped_in_a_row = 0

    def step(self, loss: Tensor) -> bool:
        """Minimise; False where the update was skipped because something was not finite.

        Raises Diverged at the tenth skipped update in a row.
        """
        return minimise(loss, self)

    def clip_gradient(self) -> bool:
        """Clip; False where the gradient is not finite."""
        norm = nn.utils.clip_grad_norm_(
            self.parameters, math.inf if self.clip is None else self.clip
        )
        return bool(norm.isfinite())

    def update(self, finite: bool) -> None:
        """Take a step along the gradient, or skip it where that is not finite."""
        if finite:
            self.skipped_in_a_row = 0
            self.optimizer.step()
            self.warmup.step()
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= SKIPS_ALLOWED:
            raise Diverged(
                f"the {self.name}'s loss or gradient was not finite {SKIPS_ALLOWED} times in "
                f"a row: lower its learning rate or gradient clipping"
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "warmup": self.warmup.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.warmup.load_state_dict(state["warmup"])
        self.skipped = state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]


def minimise(loss: Tensor, *trainers: Trainer) -> bool:
    """One step of all trainers' networks; False where it was skipped, as in `Trainer.step`."""
    for trainer in trainers:
        trainer.optimizer.zero_grad(set_to_none=True)
    finite = bool(loss.isfinite())
    if finite:
        loss.backward()
        finite = all([trainer.clip_gradient() for trainer in trainers])
    for trainer in trainers:
        trainer.update(finite)
    return finite
