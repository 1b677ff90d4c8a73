"""One network: warm-up, clipping and updates that are skipped."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gfnem.training.trainer import Diverged, Trainer
from tests.training.tiny import (
    SGD,
    infinite_gradient,
    plain,
)


def weights(*values: float) -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(torch.tensor(values))]}]


def test_learning_rates_of_all_groups_rise_linearly() -> None:
    groups = weights(0.0) + weights(0.0)
    groups[1]["lr"] = 0.4
    trainer = Trainer("model", groups, partial(torch.optim.SGD, lr=0.1), None, warmup=4)
    at = [[0.0, 0.0]]
    for _ in range(6):
        trainer.step(sum((p.sum() for p in trainer.parameters), torch.zeros(())))
        at.append([p.item() for p in trainer.parameters])
    moved = torch.tensor(at).diff(dim=0)
    factors = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    torch.testing.assert_close(moved, -factors[:, None] * torch.tensor([0.1, 0.4]))


@pytest.mark.parametrize("warmup", [0, 1])
def test_no_warmup(warmup: int) -> None:
    adam = partial(torch.optim.Adam, lr=0.1)
    group, expected = weights(1.0, -2.0), nn.Parameter(torch.tensor([1.0, -2.0]))
    trainer, optimizer = Trainer("model", group, adam, None, warmup), adam([expected])
    for _ in range(5):
        trainer.step(group[0]["params"][0].square().sum())
        optimizer.zero_grad()
        expected.square().sum().backward()
        optimizer.step()
        assert torch.equal(group[0]["params"][0], expected)


@pytest.mark.parametrize(
    ("clip", "moved"), [(1.0, [-0.6, -0.8]), (10.0, [-3.0, -4.0]), (None, [-3.0, -4.0])]
)
def test_gradient_is_clipped_to_a_norm(clip: float | None, moved: list[float]) -> None:
    group = weights(0.0, 0.0)
    trainer = Trainer("model", group, SGD, clip, warmup=0)
    assert trainer.step((group[0]["params"][0] * torch.tensor([3.0, 4.0])).sum())
    torch.testing.assert_close(group[0]["params"][0].detach(), torch.tensor(moved))


def infinite_loss(weight: Tensor) -> Tensor:
    return weight.sum() * math.inf


def loss_not_a_number(weight: Tensor) -> Tensor:
    return weight.sum() * math.nan


@pytest.mark.parametrize("bad", [infinite_loss, loss_not_a_number, infinite_gradient])
@pytest.mark.parametrize("clip", [1.0, None])
def test_update_that_is_not_finite_is_skipped(
    bad: Callable[[Tensor], Tensor], clip: float | None
) -> None:
    group = weights(1.0, 2.0)
    (weight,) = group[0]["params"]
    trainer = Trainer("model", group, partial(torch.optim.Adam, lr=0.1), clip, warmup=5)
    assert trainer.step(weight.square().sum())
    before = weight.detach().clone()
    state = plain(trainer.state_dict())
    assert not trainer.step(bad(weight))
    assert torch.equal(weight, before)
    assert plain(trainer.state_dict()) == state | {"skipped": 1, "skipped_in_a_row": 1}
    assert trainer.step(weight.square().sum())
    assert weight.isfinite().all() and not torch.equal(weight, before)
    assert (trainer.skipped, trainer.skipped_in_a_row) == (1, 0)


def test_tenth_skipped_update_in_a_row_ends_training() -> None:
    group = weights(1.0)
    (weight,) = group[0]["params"]
    trainer = Trainer("model", group, SGD, None, warmup=0)
    for _ in range(9):
        assert not trainer.step(loss_not_a_number(weight))
    assert trainer.step(weight.sum())
    for _ in range(9):
        assert not trainer.step(infinite_gradient(weight))
    message = (
        "^the model's loss or gradient was not finite 10 times in a row: "
        "lower its learning rate or gradient clipping$"
    )
    with pytest.raises(Diverged, match=message):
        trainer.step(loss_not_a_number(weight))
    assert trainer.skipped == 19


def test_trainer_goes_on_from_its_state() -> None:
    def loss(group: list[dict[str, Any]]) -> Tensor:
        return group[0]["params"][0].square().sum()

    adam = partial(torch.optim.Adam, lr=0.1)
    one, other = weights(1.0), weights(1.0)
    trainer, resumed = (Trainer("model", group, adam, None, warmup=6) for group in (one, other))
    for _ in range(3):
        trainer.step(loss(one))
    trainer.step(loss(one) * math.nan)
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    other[0]["params"][0].data.copy_(one[0]["params"][0].data)
    assert (resumed.skipped, resumed.skipped_in_a_row) == (1, 1)
    for _ in range(6):
        trainer.step(loss(one))
        resumed.step(loss(other))
        assert torch.equal(one[0]["params"][0], other[0]["params"][0])
