"""Averages of weights along training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gfnem.training.average import AveragedWeights


class One(nn.Module):
    """A network of one number."""

    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))


def test_average_of_hand_worked_updates():
    one = One(8.0)
    average = AveragedWeights([one], decay=0.15)
    # Decays .1, then .15 where 2 / 11 is more.
    for value, expected in ((4.0, 0.1 * 8 + 0.9 * 4), (0.0, 0.15 * 4.4)):
        one.value.data.fill_(value)
        average.update()
        with average.in_place():
            assert one.value.item() == pytest.approx(expected)
        assert one.value.item() == value
    average.put_in_place()
    assert one.value.item() == pytest.approx(0.66)
