"""Lazy momentum against a loop over rows in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gfnem.app.build import build
from gfnem.app.composition import compose
from gfnem.optim import DANA, SGD, PowerLaw, WordTable, lazy_groups

STEPS = 100
SCHEDULES: dict[str, Any] = {
    "decay": PowerLaw(1.0, -1.0, scale=8.0),
    "gamma1": lambda t: 1 + 1 / (1 + t),
    "gamma2": PowerLaw(0.05, -0.25, scale=3.0, floor=0.02),
    "gamma3": PowerLaw(0.02, -0.5),
}


def active_rows(rows: int) -> np.ndarray:
    """Which rows have a gradient in each step; the first always, the last never."""
    active = np.random.default_rng(1).random((STEPS, rows)) < np.linspace(1, 0, rows)
    active[:, 0], active[:, -1] = True, False
    return active


def gradient(theta: np.ndarray, t: int) -> np.ndarray:
    return theta * (1 + t % 3) + np.sin(t + np.arange(theta.size)).reshape(theta.shape)


def row_by_row(
    theta: np.ndarray, dana: dict[str, Any], lr: float, weight_decay: float
) -> np.ndarray:
    """Each active row moves by DANA with its own number of steps; weight decay goes by lr."""
    theta = theta.copy()
    y = np.zeros_like(theta)
    done = [0] * len(theta)
    for step, active in enumerate(active_rows(len(theta))):
        gradients = gradient(theta, step)
        for row in np.flatnonzero(active):
            decay, gamma1, gamma2, gamma3 = (
                dana[name](done[row]) if callable(dana[name]) else dana[name]
                for name in ("decay", "gamma1", "gamma2", "gamma3")
            )
            g = gradients[row]
            y[row] = (1 - decay) * y[row] + gamma1 * g
            shrink = lr * weight_decay * (gamma2 or dana.get("decay_rate", 0))
            theta[row] = (1 - shrink) * theta[row] - lr * (gamma2 * g + gamma3 * y[row])
            done[row] += 1
    return theta


def train(optimizer_class: Any, shape: tuple[int, ...], kind: str, **options: Any) -> Tensor:
    p = nn.Parameter(torch.from_numpy(table(shape)))
    optimizer = optimizer_class([p], lazy=True, **options)
    for step, active in enumerate(active_rows(len(p))):
        g = gradient(p.detach().numpy(), step)
        g[~active] = 0
        p.grad = torch.from_numpy(g)
        if kind == "sparse":
            # Rows may be named more than once and may be zero.
            rows = torch.tensor([*np.flatnonzero(active), 0, len(p) - 1])
            values = p.grad[rows]
            values[0] /= 2
            values[-2] /= 2
            p.grad = torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=True)
        elif kind == "sparse entries":
            p.grad = p.grad.to_sparse()
        optimizer.step()
    return p.detach()


def table(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize("kind", ["dense", "sparse", "sparse entries"])
@pytest.mark.parametrize("shape", [(6, 3), (5, 2, 2)])
@pytest.mark.parametrize("layerwise", [False, True])
def test_dana_is_a_loop_over_rows(shape: tuple[int, ...], kind: str, layerwise: bool) -> None:
    options: dict[str, Any] = {"lr": 0.5, "weight_decay": 0.2}
    found = train(DANA, shape, kind, layerwise=layerwise, **SCHEDULES, **options)
    gamma3 = SCHEDULES["gamma3"]
    size = np.prod(shape) if layerwise else 1
    dana = {**SCHEDULES, "gamma3": lambda t: gamma3(t) / size}
    np.testing.assert_allclose(found, row_by_row(table(shape), dana, **options), rtol=0, atol=1e-10)
    np.testing.assert_array_equal(found[-1], table(shape)[-1])


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_a_loop_over_rows(kind: str, nesterov: bool) -> None:
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.2}
    found = train(SGD, (6, 3), kind, momentum=0.8, nesterov=nesterov, **options)
    dana = {"decay": 0.2, "gamma1": 1.0}
    dana |= {"gamma2": 1.0, "gamma3": 0.8} if nesterov else {"gamma2": 0.0, "gamma3": 1.0}
    expected = row_by_row(table((6, 3)), {**dana, "decay_rate": 1.0}, **options)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:all rows of a table")
@pytest.mark.parametrize("optimizer_class", [DANA, SGD])
def test_rows_that_are_always_active_have_ordinary_momentum(optimizer_class: Any) -> None:
    results = []
    for lazy in (False, True):
        p = nn.Parameter(torch.from_numpy(table((4, 3))))
        optimizer = optimizer_class([p], lr=0.02, weight_decay=0.1, lazy=lazy, maximize=True)
        for step in range(STEPS):
            p.grad = torch.from_numpy(-gradient(p.detach().numpy(), step))
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)


def test_idle_rows_keep_momentum_weight_and_number_of_steps() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = SGD([p], lr=0.1, momentum=0.5, weight_decay=1.0, lazy=True)
    p.grad = torch.ones(2, 2)
    optimizer.step()
    before = p.detach().clone()
    # One entry that is not zero makes a row active.
    p.grad = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    optimizer.step()
    state = optimizer.state[p]
    assert p[0].equal(before[0])
    assert state["step"].tolist() == [1, 2]
    assert state["momentum"].tolist() == [[1.0, 1.0], [0.5, 1.5]]
    torch.testing.assert_close(p[1].detach(), 0.9 * before[1] - torch.tensor([0.05, 0.15]))


def test_rows_that_are_not_finite_are_seen() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.tensor([[0.0, 0.0], [0.0, float("nan")]])
    DANA([p], lr=0.1, lazy=True).step()
    assert p.isfinite().tolist() == [[True, True], [True, False]]


@pytest.mark.filterwarnings("ignore:all rows of a table")
def test_steps_are_counted_in_half_precision() -> None:
    p = nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    optimizer = SGD([p], lr=0.0, lazy=True)
    p.grad = torch.ones_like(p)
    for _ in range(300):
        optimizer.step()
    other = SGD([p], lr=0.0, lazy=True)
    other.load_state_dict(optimizer.state_dict())
    other.step()
    assert int(other.state[p]["step"]) == 301
    # What was loaded is the other's own.
    assert int(optimizer.state[p]["step"]) == 300


@pytest.mark.parametrize("optimizer_class", [DANA, SGD])
@pytest.mark.parametrize("shape", [(3,), ()])
def test_parameters_without_rows_are_refused(optimizer_class: Any, shape: tuple[int, ...]) -> None:
    vector, matrix = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(2, 2))
    message = r"^lazy momentum is for tables of rows, not for a parameter of shape \((3,)?\): give"
    with pytest.raises(ValueError, match=message):
        optimizer_class([vector, matrix], lazy=True)
    optimizer = optimizer_class([{"params": [vector]}, {"params": [matrix], "lazy": True}])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(shape))], "lazy": True})


@pytest.mark.filterwarnings("error")
def test_a_table_without_idle_rows_is_warned_of_once() -> None:
    message = r"^all rows of a table of shape \(3, 2\) had a gradient in each of 100 steps: lazy"
    busy, idle = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    optimizer = SGD([busy, idle], lr=0.0, lazy=True)
    for step in range(1, 251):
        busy.grad, idle.grad = torch.ones(3, 2), torch.ones(3, 2)
        idle.grad[2] = float(step != 5)
        if step == 100:
            with pytest.warns(UserWarning, match=message):
                optimizer.step()
        else:
            optimizer.step()


def test_parameters_without_gradients_stay() -> None:
    table = nn.Parameter(torch.ones(2, 2))
    SGD([table], lr=0.1, weight_decay=0.5, lazy=True).step()
    assert table.equal(torch.ones(2, 2))


def test_rows_wait_in_tables_of_words_alone() -> None:
    network = nn.ModuleDict({"words": WordTable(5, 2), "rest": nn.Linear(2, 2)})
    other = nn.Parameter(torch.ones(3))
    groups = [{"params": list(network.parameters())}, {"params": [other], "lr": 0.3}]
    optimizer = SGD(lazy_groups(groups, network), lr=0.1, lazy=True)
    found = [(group["lazy"], group["lr"], len(group["params"])) for group in optimizer.param_groups]
    assert found == [(True, 0.1, 1), (False, 0.1, 2), (False, 0.3, 1)]
    assert optimizer.param_groups[0]["params"][0] is network["words"].weight
    with pytest.raises(ValueError, match="^lazy momentum is for tables of word embeddings, and"):
        lazy_groups(groups, nn.Embedding(5, 2))


def test_the_transformer_reads_words_that_wait(tiny_data: list[str], tiny_run: list[str]) -> None:
    given = [
        "policy=transformer",
        "policy.width=8",
        "optimizer=sgd",
        "optimizer.posterior.lazy=true",
    ]
    built = build(compose([*tiny_data, *tiny_run, *given]))
    em = built.em
    assert em.steps.posterior_trainer is not None
    table = em.posterior.get_parameter("policy.word.weight")
    before = table.detach().clone()
    em.fit()
    read = set(torch.cat(built.data.train.word_ids).tolist())
    moved = set((table != before).any(1).nonzero()[:, 0].tolist())
    assert moved and moved <= read
    (lazy, *others) = em.steps.posterior_trainer.optimizer.param_groups
    assert lazy["lazy"] and lazy["params"][0] is table
    assert not any(group["lazy"] for group in others)
