"""One network's optimizer: warm-up, clipping, and updates that are skipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gfnem.errors import UserError
from gfnem.posterior import Posterior
from gfnem.training.limits import check_at_least

OptimizerFactory = Callable[[Any], torch.optim.Optimizer]

MODEL_OPTIMIZER: OptimizerFactory = partial(torch.optim.Adam, lr=1e-3, fused=True)
POSTERIOR_OPTIMIZER: OptimizerFactory = partial(torch.optim.Adam, lr=2e-3, fused=True)

# An update whose loss or gradient is not finite is skipped; so many in a row end the run.
SKIPS_ALLOWED = 10


class Diverged(UserError):  # noqa: N818
    """Too many updates in a row had a loss or a gradient that is not finite."""


class Trainer:
    """One network with its optimizer, warm-up, gradient clipping and skipped updates.

    Args:
        name: of the network in messages.
        groups: its parameters, as optimizers take them.
        optimizer: makes the optimizer.
        clip: largest norm of the gradient; None for no clipping.
        warmup: steps over which the learning rate rises linearly.

    Raises:
        UserError: a clip or a warm-up that cannot be.
    """

    def __init__(
        self,
        name: str,
        groups: list[dict[str, Any]],
        optimizer: OptimizerFactory,
        clip: float | None,
        warmup: int,
    ):
        if clip is not None and not clip > 0:
            raise UserError(f"em.{name}_clip is {clip}; it must be positive, or null for none")
        check_at_least("warmup", warmup, 0)
        self.name = name
        self.clip = clip
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.optimizer = optimizer(groups)
        self.warmup = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, start_factor=1 / max(warmup, 1), total_iters=max(warmup - 1, 0)
        )
        self.skipped = 0
        self.skipped_in_a_row = 0

    @classmethod
    def of(
        cls,
        name: str,
        posterior: Posterior,
        optimizer: OptimizerFactory,
        clip: float | None,
        warmup: int,
    ) -> Trainer | None:
        """Make the trainer of a posterior; None for one that has no parameters."""
        groups = posterior.parameter_groups()
        return cls(name, groups, optimizer, clip, warmup) if groups else None

    def step(self, loss: Tensor) -> bool:
        """Minimise; False where the update was skipped because something was not finite.

        Raises Diverged at the tenth skipped update in a row.
        """
        return minimise(loss, self)

    def clip_gradient(self) -> Tensor:
        """Clip; return the norm that the gradient had."""
        return nn.utils.clip_grad_norm_(
            self.parameters, math.inf if self.clip is None else self.clip
        )

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
    """Take a step of all trainers' networks; False where it was skipped, as in `Trainer.step`.

    A step waits for the device once, for whether the loss and all gradients are finite.
    """
    for trainer in trainers:
        trainer.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norms = [trainer.clip_gradient() for trainer in trainers]
    finite = bool(torch.stack([loss.detach(), *norms]).isfinite().all())
    for trainer in trainers:
        trainer.update(finite)
    return finite
