"""Means of metrics between two lines of them."""

from __future__ import annotations

import torch

from gfnem.training.means import Means


def test_means_since_the_last_line():
    means, weight = Means(), torch.ones((), requires_grad=True)
    means.add({"train/loss": 2 * weight, "train/gap": 1.0})
    means.add({"train/loss": 4.0})
    assert "train/loss" in means and "valid/loss" not in means
    assert means.take() == {"train/loss": 3.0, "train/gap": 1.0}
    assert means.take() == {}


def test_means_go_on_from_their_state():
    means, again = Means(), Means()
    means.add({"train/loss": torch.tensor(2.0)})
    state = means.state_dict()
    assert state == {"train/loss": [2.0]}
    again.load_state_dict(state)
    again.add({"train/loss": 4.0})
    assert again.take() == {"train/loss": 3.0}
    assert state == {"train/loss": [2.0]}
