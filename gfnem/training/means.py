"""Means of metrics between two lines of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gfnem.training.parts import Metrics


class Means:
    """Collects metrics; what is on a device is waited for when a line is due, not before.

    Example:
        >>> means = Means()
        >>> means.add({"train/m_loss": 2.0})
        >>> means.add({"train/m_loss": 4.0})
        >>> means.take()
        {'train/m_loss': 3.0}
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float | Tensor]] = {}

    def add(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Keep for the next line; tensors hold one number each."""
        for key, value in metrics.items():
            kept = value.detach() if isinstance(value, Tensor) else value
            self._values.setdefault(key, []).append(kept)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def take(self) -> Metrics:
        """Give the means since the last time, and begin anew."""
        values, self._values = self.state_dict(), {}
        return {key: sum(numbers) / len(numbers) for key, numbers in values.items()}

    def state_dict(self) -> dict[str, list[float]]:
        return {key: [float(value) for value in values] for key, values in self._values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._values = {key: list(values) for key, values in state.items()}
