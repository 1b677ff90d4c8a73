"""Averages of weights along training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gfnem.errors import UserError


class AveragedWeights:
    """Exponential moving average of the parameters of some networks.

    The k-th update weighs the parameters by 1 - min(decay, k / (9 + k)), so that where training
    began is soon forgotten.

    Args:
        networks: whose parameters are averaged. They must be where they are to be trained.
        decay: of the average at each update, in [0, 1).

    Raises:
        UserError: the decay is none.
    """

    def __init__(self, networks: Sequence[nn.Module], decay: float):
        if not 0 <= decay < 1:
            raise UserError(f"em.average is {decay}; it must be from 0 to below 1, or null")
        self.decay = decay
        self.updates = 0
        self.parameters: list[Tensor] = [p for network in networks for p in network.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the parameters as they are into the average."""
        self.updates += 1
        decay = min(self.decay, self.updates / (9 + self.updates))
        get_ema_multi_avg_fn(decay)(self.average, self.parameters, self.updates)

    def put_in_place(self) -> None:
        """Make the average the parameters."""
        _copy(self.parameters, self.average)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Make the average the parameters for a while."""
        trained = [p.detach().clone() for p in self.parameters]
        self.put_in_place()
        try:
            yield
        finally:
            _copy(self.parameters, trained)

    def state_dict(self) -> dict[str, Any]:
        """What the average needs to go on, beside a copy of the networks with the average in."""
        return {"updates": self.updates, "trained": [p.detach() for p in self.parameters]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; the networks hold the average that was taken then."""
        self.updates = state["updates"]
        _copy(self.average, self.parameters)
        _copy(self.parameters, state["trained"])


@torch.no_grad()
def _copy(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for old, new in zip(to, values, strict=True):
        old.copy_(new)
