"""DANA and SGD against a loop in NumPy and against torch's optimizers."""

from __future__ import annotations

import doctest
import io
import math
from collections.abc import Callable
from copy import deepcopy
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from gfnem.app.build import build
from gfnem.app.composition import compose
from gfnem.errors import UserError
from gfnem.optim import DANA, SGD, PowerLaw, dana_constant, dana_decaying

STEPS = 100
SCHEDULES: dict[str, Any] = {
    "decay": PowerLaw(1.0, -1.0, scale=8.0),
    "gamma1": lambda t: 1 + 1 / (1 + t),
    "gamma2": PowerLaw(0.05, -0.25, scale=3.0, floor=0.02),
    "gamma3": PowerLaw(0.02, -0.5),
}
SHAPES = ((3, 4), (5,), (2, 2, 3))


def start() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in SHAPES
    ]


def gradient(theta: Any, t: int) -> Any:
    """Of a loss that changes with the steps; for arrays and tensors."""
    return theta * (1 + t % 3) + math.sin(t)


def train(
    make: Callable[..., torch.optim.Optimizer], steps: int = STEPS, **options: Any
) -> list[nn.Parameter]:
    parameters = start()
    optimizer = make(parameters, **options)
    for t in range(steps):
        for p in parameters:
            p.grad = gradient(p.detach(), t)
        optimizer.step()
    return parameters


def assert_same(found: list[nn.Parameter], expected: list[Any], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            one.detach(), torch.as_tensor(other).detach(), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.3},
        {"weight_decay": 0.1, "lr": 0.5},
        {"layerwise": True, "gamma3": 0.2},
        {"maximize": True},
        {"decay": 0.25, "gamma1": 0.5, "gamma2": 0.0, "gamma3": 0.01},
    ],
)
def test_dana_is_its_definition(options: dict[str, Any], foreach: bool | None) -> None:
    given = {**SCHEDULES, **options}
    found = train(DANA, **given, foreach=foreach)
    expected = []
    for p in start():
        theta = p.detach().numpy().copy()
        y = np.zeros_like(theta)
        for t in range(STEPS):
            decay, gamma1, gamma2, gamma3 = (
                given[name](t) if callable(given[name]) else given[name]
                for name in ("decay", "gamma1", "gamma2", "gamma3")
            )
            g = gradient(theta, t) * (-1 if given.get("maximize") else 1)
            lr = given.get("lr", 1.0)
            y = (1 - decay) * y + gamma1 * g
            size = theta.size if given.get("layerwise") else 1
            theta = theta - lr * gamma2 * given.get("weight_decay", 0) * theta
            theta = theta - lr * gamma2 * g - lr * gamma3 / size * y
        expected.append(theta)
    if options.get("maximize"):
        # Numbers that grow: the same digits, not the same distance.
        assert all(np.abs(theta).max() > 1e3 for theta in expected)
    assert_same(found, expected, 1e-10)


def test_in_one_call_is_one_by_one_to_the_last_bit() -> None:
    given: dict[str, Any] = {**SCHEDULES, "weight_decay": 0.1, "layerwise": True}
    for one, other in zip(
        train(DANA, **given, foreach=True), train(DANA, **given, foreach=False), strict=True
    ):
        assert one.equal(other)


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_without_gamma3_it_is_sgd(weight_decay: float) -> None:
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": weight_decay}
    assert_same(train(DANA, gamma3=0.0, **options), train(torch.optim.SGD, **options), 1e-14)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("beta", [0.3, 0.9])
def test_with_constant_coefficients_it_is_nesterovs_momentum(beta: float, maximize: bool) -> None:
    options: dict[str, Any] = {"lr": 0.01, "momentum": beta, "maximize": maximize}
    expected = train(torch.optim.SGD, nesterov=True, **options)
    constant: dict[str, Any] = {
        "gamma1": 1.0,
        "gamma2": 0.01,
        "gamma3": 0.01 * beta,
        "decay": 1 - beta,
    }
    assert_same(train(DANA, maximize=maximize, **constant), expected, 1e-12)
    assert_same(train(SGD, nesterov=True, **options), expected, 1e-12)
    heavy_ball = train(torch.optim.SGD, **options)
    assert_same(train(SGD, **options), heavy_ball, 1e-12)


def test_weight_decay_of_sgd_is_decoupled() -> None:
    found = train(SGD, steps=2, lr=0.1, momentum=0.5, weight_decay=0.3)
    for p, end in zip(start(), found, strict=True):
        y = gradient(p.detach(), 0)
        theta = 0.97 * p.detach() - 0.1 * y
        y = 0.5 * y + gradient(theta, 1)
        torch.testing.assert_close(end.detach(), 0.97 * theta - 0.1 * y, rtol=1e-13, atol=0)


def test_published_schedules() -> None:
    constant = dana_constant(batch=2, dimension=64, trace=8.0)
    assert constant["gamma2"] == 0.125 and constant["gamma1"] == 1.0
    assert constant["gamma3"] == pytest.approx(0.1 * 2 / 64 / 4)
    assert constant["decay"] == PowerLaw(1.0, -1.0, scale=8.0)
    assert PowerLaw(1.0, -1.0, scale=8.0)(24) == pytest.approx(8 / (8 + 24))
    # More data than the trace: the factor is 1. h = 1/3 of d = 64 is B = 4.
    decaying = dana_decaying(batch=4, dimension=64, trace=2.0, alpha=1.5, delta=4.0)
    assert decaying["gamma2"] == 0.5
    gamma3: Any = decaying["gamma3"]
    assert gamma3(0) == 0.1
    assert gamma3(7) == pytest.approx(0.1 * 8 ** (-(2 / 3) / 3))
    assert decaying["decay"] == PowerLaw(1.0, -1.0, scale=4.0)


def test_power_law_has_a_floor_for_numbers_and_tensors() -> None:
    law = PowerLaw(init=0.5, power=-0.5, scale=2.0, floor=0.2)
    expected = [0.5, 0.5 / math.sqrt(1.5), 0.2]
    assert [law(t) for t in (0, 1, 100)] == pytest.approx(expected)
    assert law(torch.tensor([0.0, 1.0, 100.0])).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("make", [DANA, SGD])
def test_groups_have_options_of_their_own(make: Any) -> None:
    own: dict[str, Any] = {"lr": 0.2, "weight_decay": 0.3}
    own |= {"momentum": 0.5} if make is SGD else {"gamma3": 0.0, "layerwise": True, "decay": 0.5}

    def grouped(parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], **own}]
        return make(groups, **options)

    found = train(grouped, lr=0.01)
    assert_same(found[:1], train(make, lr=0.01)[:1], 0)
    assert_same(found[1:], train(make, **own)[1:], 0)


def test_learning_rates_warm_up() -> None:
    """As a Trainer's do."""
    constant: dict[str, Any] = {"decay": 0.1, "gamma3": 0.9}
    results = []
    for optimizer_class, options in (
        (DANA, constant),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ):
        (p, *_) = start()
        optimizer = optimizer_class([p], lr=0.05, **options)
        warmup = LinearLR(optimizer, 0.1, total_iters=9)
        for t in range(20):
            p.grad = gradient(p.detach(), t)
            optimizer.step()
            warmup.step()
        results.append(p)
    assert_same(results[:1], results[1:], 1e-12)


def test_closure_is_evaluated_with_gradients() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer = DANA([p], lr=0.1, gamma3=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 4
    assert p.item() == pytest.approx(2 - 0.1 * 4)
    assert optimizer.step() is None


def test_parameters_without_gradients_stay_and_count_no_step() -> None:
    p, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = DANA([p, other], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        other.grad = torch.ones(2)
        optimizer.step()
    assert p.equal(torch.ones(2)) and p not in optimizer.state
    p.grad = torch.ones(2)
    optimizer.step()
    assert [optimizer.state[one]["step"] for one in (p, other)] == [1, 4]
    alone = nn.Parameter(torch.ones(2))
    alone.grad = torch.ones(2)
    DANA([alone], lr=0.1, weight_decay=0.5).step()
    assert p.equal(alone)


def test_sparse_gradients_are_dense_ones_with_zeros() -> None:
    results = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(6, 3, sparse=sparse)
        optimizer = DANA(table.parameters(), lr=0.1)
        for t in range(5):
            optimizer.zero_grad()
            table(torch.tensor([t, t, 1])).square().sum().backward()
            optimizer.step()
        results.append(table.weight)
    torch.testing.assert_close(*results)


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("copy", [deepcopy, saved_and_loaded])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("precision", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("make", [DANA, SGD])
def test_state_goes_on_to_the_last_bit(
    make: Any, precision: torch.dtype, lazy: bool, copy: Callable[..., Any]
) -> None:
    given: dict[str, Any] = {"lr": 0.3, "weight_decay": 0.1, "lazy": lazy}
    if make is DANA:
        given |= {**SCHEDULES, "gamma1": 0.5}

    def run(p: nn.Parameter, optimizer: Any, steps: range) -> None:
        for t in steps:
            g = gradient(p.detach(), t)
            g[t % len(p)] = 0
            p.grad = g
            optimizer.step()

    p = nn.Parameter(start()[0].detach().to(precision))
    optimizer = make([p], **given)
    run(p, optimizer, range(10))
    state = copy(optimizer.state_dict())
    resumed = nn.Parameter(p.detach().clone())
    # Numbers come from the state, functions from the code.
    other = make([resumed], **{**given, "lr": 1.0, "lazy": False, "weight_decay": 0.0})
    other.load_state_dict(state)
    run(p, optimizer, range(10, 20))
    run(resumed, other, range(10, 20))
    assert p.equal(resumed)
    assert not p.equal(start()[0].to(precision))


def test_functions_are_no_part_of_the_state() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = DANA([p], gamma1=0.5, gamma3=PowerLaw(0.1, -1.0))
    (group,) = optimizer.state_dict()["param_groups"]
    assert group["gamma1"] == 0.5 and "gamma3" not in group and "decay" not in group
    assert optimizer.param_groups[0]["gamma3"] == PowerLaw(0.1, -1.0)
    other = DANA([p], gamma1=0.9, gamma3=0.25)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["gamma1"] == 0.5
    assert other.param_groups[0]["gamma3"] == 0.25
    with pytest.raises(ValueError, match="different number of parameter groups"):
        DANA([{"params": [p]}, {"params": [nn.Parameter(torch.ones(1))]}]).load_state_dict(
            optimizer.state_dict()
        )


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (DANA, {"lr": -1}, "lr is -1; it must be at least 0"),
        (SGD, {"weight_decay": -1}, "weight_decay is -1; it must be at least 0"),
        (DANA, {"gamma3": -1}, "gamma3 is -1; it must be at least 0"),
        (DANA, {"gamma2": lambda t: t - 2}, "gamma2 is -2; it must be at least 0"),
        (DANA, {"decay": 1.5}, "decay is 1.5; it must be at most 1"),
        (SGD, {"momentum": 1.0}, "momentum is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_what_cannot_be_used_is_refused(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make([nn.Parameter(torch.ones(2, 2))], **options)
    optimizer = make([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=f"^{message}$"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(optimizer.param_groups) == 1


def test_schedules_that_are_none_are_refused() -> None:
    with pytest.raises(UserError, match="^scale is 0; it must be above 0$"):
        PowerLaw(1.0, -1.0, scale=0)
    with pytest.raises(UserError, match="^power is 11; it must lie between -10 and 10$"):
        PowerLaw(1.0, 11)
    with pytest.raises(UserError, match="^trace is 0; it must be above 0$"):
        dana_constant(batch=1, dimension=2, trace=0)
    with pytest.raises(UserError, match="^dimension is 1; it must be above 1$"):
        dana_decaying(batch=1, dimension=1, trace=1, alpha=1)


@pytest.mark.parametrize("module", ["dana", "schedules", "sgd"])
def test_examples_run(module: str) -> None:
    failed, attempted = doctest.testmod(import_module(f"gfnem.optim.{module}"))
    assert attempted and not failed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["+optimizer.model.betas=1"], "optimizer.model.betas is no option of gfnem.optim.DANA"),
        (
            ["+optimizer.model.gamma3.typo=1"],
            "optimizer.model.gamma3.typo is no option of gfnem.optim.PowerLaw",
        ),
        (["optimizer.model.decay=x"], "optimizer.model.decay=x: it must be a number"),
        (["optimizer.model.decay=2"], "optimizer.model: decay is 2; it must be at most 1"),
        (["optimizer.model.decay.scale=0"], "scale is 0; it must be above 0"),
        (
            ["optimizer.posterior.lazy=true"],
            "optimizer.posterior: lazy momentum is for tables of word embeddings, and this "
            "network has none: choose lazy=false",
        ),
    ],
)
def test_options_on_the_command_line(
    given: list[str], message: str, tiny_mixture: list[str]
) -> None:
    steps = "posterior.m_step=gradient"
    with pytest.raises(UserError, match=f"^{message}$"):
        build(compose([*tiny_mixture, steps, "optimizer=dana", *given]))


def test_a_number_may_stand_for_a_schedule(tiny_mixture: list[str]) -> None:
    given = ["posterior.m_step=gradient", "optimizer=dana", "optimizer.model.gamma3=0.1"]
    em = build(compose([*tiny_mixture, *given])).em
    (group, *_) = em.steps.model_trainer.optimizer.param_groups
    assert group["gamma3"] == 0.1 and group["decay"] == PowerLaw(1.0, -1.0, scale=8.0)
