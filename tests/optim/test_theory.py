"""Recursions of second moments against our optimizers on drawn data, and cases solved by hand."""

from __future__ import annotations

import doctest
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gfnem.optim import DANA, SGD, PowerLaw, theory
from gfnem.optim.theory import (
    Moments,
    Overlaps,
    active_share,
    dana_step,
    learning,
    oscillation_lr,
    power_law_features,
    rare_bias_stationary,
    rare_bias_step,
    rare_features_loss,
    rare_features_step,
    rare_weight_step,
    retention,
    risk,
    sparse_step,
    stability_lr,
    stationary_error,
)

RUNS = 800
DANA_OPTIONS: dict[str, Any] = {
    "decay": PowerLaw(1.0, -1.0, scale=4.0),
    "gamma1": 1.0,
    "gamma2": 0.15,
    "gamma3": PowerLaw(0.06, -0.4),
}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def dana_options(t: int) -> dict[str, Any]:
    return {name: c(t) if callable(c) else c for name, c in DANA_OPTIONS.items()}


def start(error: Any) -> Moments:
    return Moments(error, 0 * error, 0 * error)


def assert_drawn(samples: Sequence[Tensor], expected: Sequence[Any]) -> None:
    """All means over runs are within 5 standard errors."""
    for drawn, value in zip(samples, expected, strict=True):
        deviation = drawn.std(0) / math.sqrt(len(drawn))
        z = (drawn.mean(0) - torch.as_tensor(value)) / deviation.clamp(min=1e-12)
        assert z.abs().max() < 5


def drawn_moments(e: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return e**2, y**2, e * y


def test_dana_on_random_features(generator: torch.Generator) -> None:
    """In the space of x, where nothing of the derivation is used."""
    v, d, batch, alpha, beta = 24, 6, 2, 0.8, 0.6
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    weights = torch.randn(v, d, **draw) / math.sqrt(d)
    problem = power_law_features(weights, alpha, beta)
    j = torch.arange(1, v + 1, dtype=torch.float64)
    theta = nn.Parameter(torch.zeros(RUNS, d, dtype=torch.float64))
    optimizer = DANA([theta], **DANA_OPTIONS)
    moments = start(problem.error)
    for t in range(30):
        x = torch.randn(RUNS, batch, v, **draw) * j**-alpha
        phi = x @ weights
        residual = torch.einsum("rbd,rd->rb", phi, theta.detach()) - x @ j**-beta
        theta.grad = torch.einsum("rb,rbd->rd", residual, phi) / batch
        optimizer.step()
        given = dana_options(t)
        moments = dana_step(moments, problem.eigenvalues, problem.floor, batch, **given)
        if t in (0, 4, 29):
            e = (theta.detach() - problem.optimum) @ problem.directions
            y = optimizer.state[theta]["momentum"] @ problem.directions
            assert_drawn(drawn_moments(e, y), moments)
    # Of all parameters together, without the eigenbasis.
    scaled = j[:, None] ** -alpha * weights
    risks = (theta.detach() @ scaled.T - j ** (-alpha - beta)).square().sum(1) / 2
    assert_drawn([risks], [risk(moments, problem.eigenvalues, problem.floor)])


def test_the_floor_is_the_least_risk(generator: torch.Generator) -> None:
    weights = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    problem = power_law_features(weights, alpha=0.7, beta=0.3)
    j = torch.arange(1, 10, dtype=torch.float64)
    scaled = j[:, None] ** -0.7 * weights
    found = torch.linalg.lstsq(scaled, j[:, None] ** -1.0)
    torch.testing.assert_close(problem.optimum, found.solution[:, 0])
    rest = scaled @ problem.optimum - j**-1.0
    torch.testing.assert_close(problem.floor, rest.square().sum())
    covariance = problem.directions * problem.eigenvalues @ problem.directions.T
    torch.testing.assert_close(covariance, scaled.T @ scaled)
    # At theta = 0 the risk is that of the target itself.
    at_zero = risk(start(problem.error), problem.eigenvalues, problem.floor)
    torch.testing.assert_close(at_zero, (j**-1.0).square().sum() / 2)


def test_dana_with_exact_gradients_is_the_loop_itself() -> None:
    eigenvalues = np.array([1.0, 0.3, 0.01])
    e, y = np.array([1.0, -2.0, 0.5]), np.zeros(3)
    moments = start(e**2)
    for t in range(50):
        given = dana_options(t)
        g = eigenvalues * e
        y = (1 - given["decay"]) * y + given["gamma1"] * g
        e = e - given["gamma2"] * g - given["gamma3"] * y
        moments = dana_step(moments, eigenvalues, 0.0, math.inf, **given)
        for found, expected in zip(moments, (e**2, y**2, e * y), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)


def test_one_direction_of_sgd_by_hand() -> None:
    """E x^4 = 3 E[x^2]^2."""
    options: dict[str, Any] = {"decay": 1.0, "gamma1": 0.0, "gamma2": 0.1, "gamma3": 0.0}
    error = np.array([2.0])
    found = dana_step(start(error), np.array([0.5]), 0.3, 1, **options)
    by_hand = 2 * (1 - 2 * 0.1 * 0.5 + 3 * 0.1**2 * 0.5**2) + 0.1**2 * 0.5 * 0.3
    assert found.error[0] == pytest.approx(by_hand)


@pytest.mark.parametrize("lazy", [False, True])
def test_momentum_on_sparse_least_squares(lazy: bool, generator: torch.Generator) -> None:
    batch, lr, momentum, noise = 3, 0.08, 0.8, 0.5
    p = torch.tensor([0.02, 0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    d = len(p)
    first = torch.tensor([1.0, -1.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    # Each feature of each run is a row of the table.
    table = nn.Parameter(first.repeat(RUNS)[:, None])
    optimizer = SGD([table], lr=lr, momentum=momentum, lazy=lazy)
    moments = start(first**2)
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    for t in range(40):
        x = torch.randn(RUNS, batch, d, **draw) * (torch.rand(RUNS, batch, d, **draw) < p)
        e = table.detach().view(RUNS, d)
        residual = torch.einsum("rbd,rd->rb", x, e)
        residual -= noise * torch.randn(RUNS, batch, **draw)
        table.grad = (torch.einsum("rb,rbd->rd", residual, x) / batch).view(-1, 1)
        optimizer.step()
        moments = sparse_step(moments, p, lr, momentum, batch, noise, lazy)
        if t in (0, 4, 39):
            m = optimizer.state[table]["momentum"].view(RUNS, d)
            assert_drawn(drawn_moments(table.detach().view(RUNS, d), m), moments)
    if not lazy:
        # A row that waits is not a row whose momentum dies down.
        other = sparse_step(moments, p, lr, momentum, batch, noise, lazy=True)
        assert not other.error.allclose(sparse_step(moments, p, lr, momentum, batch, noise).error)


def test_sparse_least_squares_by_hand() -> None:
    """One feature in one data point; and exact gradients, where all is p times a parabola."""
    found = sparse_step(start(np.array([2.0])), np.array([0.1]), 0.5, 0.9, 1, noise=0.3)
    assert found.error[0] == pytest.approx(
        2 * (1 - 2 * 0.5 * 0.1 + 3 * 0.5**2 * 0.1) + 0.5**2 * 0.1 * 0.09
    )
    p, e, m = np.array([0.5, 0.1]), np.array([1.0, -2.0]), np.zeros(2)
    moments = start(e**2)
    for _ in range(50):
        m = 0.7 * m + p * e
        e = e - 0.3 * m
        moments = sparse_step(moments, p, 0.3, 0.7, math.inf)
    for value, expected in zip(moments, (e**2, m**2, e * m), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_frequent_rows_never_wait() -> None:
    moments = Moments(*np.random.default_rng(0).random((3, 4)))
    one, other = (
        sparse_step(moments, np.ones(4), 0.1, 0.9, 2, 0.1, lazy) for lazy in (True, False)
    )
    np.testing.assert_allclose(one, other)


def test_arrays_and_tensors_of_several_runs() -> None:
    """A leading dimension is a run of its own."""
    generator = np.random.default_rng(0)
    moments = Moments(*generator.random((3, 2, 4)))
    p = generator.random(4)

    def step(given: Moments, frequencies: Any) -> list[Moments]:
        return [
            dana_step(given, frequencies, 0.1, 2, 0.2, 1.0, 0.1, 0.05),
            sparse_step(given, frequencies, 0.1, 0.9, 2, 0.1, lazy=True),
            rare_bias_step(given, 0.1, 0.1, 0.9, 2),
        ]

    of_arrays = step(moments, p)
    of_tensors = step(Moments(*map(torch.from_numpy, moments)), torch.from_numpy(p))
    for run in range(2):
        alone = step(Moments(*(value[run] for value in moments)), p)
        for arrays, tensors, one in zip(of_arrays, of_tensors, alone, strict=True):
            for array, tensor, value in zip(arrays, tensors, one, strict=True):
                np.testing.assert_allclose(array, tensor, rtol=1e-13)
                np.testing.assert_allclose(array[run], value, rtol=1e-13)


def growth(p: float, lr: float, momentum: float, batch: float, d: int, lazy: bool) -> float:
    """The spectral radius of the recursion for features of one frequency."""
    columns = []
    for unit in np.eye(3):
        moments = Moments(*(np.full(d, value) for value in unit))
        after = sparse_step(moments, np.full(d, p), lr, momentum, batch, lazy=lazy)
        columns.append([value[0] for value in after])
    return float(np.abs(np.linalg.eigvals(np.array(columns).T)).max())


SETTINGS = [
    (p, momentum, batch, d, lazy)
    for p, batch in ((0.001, 1), (0.05, 4), (0.5, 64), (0.9, 1000))
    for momentum in (0.0, 0.5, 0.99)
    for d in (1, 50)
    for lazy in (False, True)
]


@pytest.mark.parametrize(("p", "momentum", "batch", "d", "lazy"), SETTINGS)
def test_stability_line(p: float, momentum: float, batch: int, d: int, lazy: bool) -> None:
    lr = stability_lr(p, momentum, batch, d, lazy)
    assert growth(p, 0.99 * lr, momentum, batch, d, lazy) < 1
    assert growth(p, 1.01 * lr, momentum, batch, d, lazy) > 1


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("momentum", [0.3, 0.9, 0.99])
def test_oscillation_line(momentum: float, lazy: bool) -> None:
    """The eigenvalues of the means of e and m become complex."""
    p, batch = 0.1, 4
    q = active_share(p, batch) if lazy else 1.0
    line = oscillation_lr(p, momentum, batch, lazy)
    for lr, oscillates in ((0.99 * line, False), (1.01 * line, True)):
        # m' = (1 - q + q beta) m + p e and e' = e - lr (q beta m + p e)
        means = [[1 - lr * p, -lr * q * momentum], [p, 1 - q + q * momentum]]
        assert bool(np.abs(np.linalg.eigvals(means).imag).max() > 0) == oscillates
    ratio = learning(p, line, momentum, batch) / retention(p, momentum, batch)
    if not lazy:
        assert ratio == pytest.approx((1 + math.sqrt(momentum)) ** 2 / 2)


def test_time_scales() -> None:
    assert active_share(0.5, 2) == 0.75
    assert retention(0.5, 0.9, 2) == pytest.approx(7.5)
    assert retention(0.5, 0.9, 2, lazy=True) == pytest.approx(10)
    # Slow learning: the squared error falls by e in so many steps, of which a share is active.
    p, lr, momentum, batch = np.array([0.02]), 0.001, 0.5, 1000
    steps = learning(p, lr, momentum, batch)[0] / active_share(p, batch)[0]
    moments = start(np.array([1.0]))
    for _ in range(round(steps)):
        moments = sparse_step(moments, p, lr, momentum, batch)
    assert moments.error[0] == pytest.approx(math.exp(-1), rel=0.01)


@pytest.mark.parametrize("lazy", [False, True])
def test_errors_end_where_they_stay(lazy: bool) -> None:
    p, lr, momentum, batch, d, noise = 0.2, 0.1, 0.6, 3, 4, 0.7
    r = stationary_error(p, lr, momentum, batch, d, noise, lazy)
    moments = start(np.full(d, 1.0))
    for _ in range(2000):
        moments = sparse_step(moments, np.full(d, p), lr, momentum, batch, noise, lazy)
    np.testing.assert_allclose(moments.error, r, rtol=1e-10)


def test_bias_of_a_rare_class(generator: torch.Generator) -> None:
    p, batch, lr, momentum, runs = 0.05, 8, 0.12, 0.5, 2000
    optimum = math.log(p / (1 - p))
    bias = nn.Parameter(torch.full((runs, 1), optimum, dtype=torch.float64))
    optimizer = SGD([bias], lr=lr, momentum=momentum)
    moments = start(np.zeros(1))
    for t in range(150):
        rare = torch.rand(runs, batch, generator=generator) < p
        bias.grad = bias.detach().sigmoid() - rare.double().mean(1, keepdim=True)
        optimizer.step()
        moments = rare_bias_step(moments, p, lr, momentum, batch)
        if t in (0, 20, 149):
            e = bias.detach() - optimum
            assert_drawn(drawn_moments(e, optimizer.state[bias]["momentum"]), moments)
    for _ in range(3000):
        moments = rare_bias_step(moments, p, lr, momentum, batch)
    expected = lr / (2 * batch * (1 - momentum)) / (1 - lr * p * (1 - p) / (2 * (1 + momentum)))
    assert rare_bias_stationary(p, lr, momentum, batch) == pytest.approx(expected)
    assert moments.error[0] == pytest.approx(expected)


def test_weight_of_a_rare_class_far_from_the_optimum(generator: torch.Generator) -> None:
    p, batch, lr, runs = 2e-3, 4, 2.0, 2000
    optimum = math.log(p / (1 - p))
    bias = nn.Parameter(torch.full((runs, 1), optimum + 0.5, dtype=torch.float64))
    optimizer = SGD([bias], lr=lr, momentum=0.0)
    mean, square = math.exp(-0.5), math.exp(-1)
    for t in range(400):
        rare = torch.rand(runs, batch, generator=generator) < p
        bias.grad = bias.detach().sigmoid() - rare.double().mean(1, keepdim=True)
        optimizer.step()
        mean, square = rare_weight_step(mean, square, p, lr, batch)
        if t in (50, 399):
            w = (optimum - bias.detach()).exp()
            assert_drawn([w, w**2], [mean, square])
    # One step by hand: w + lr p = 1.5, and 0.1 data points of the class are expected.
    by_hand = [
        sum(
            math.exp(-0.1) * 0.1**k / math.factorial(k) * (1.5 * math.exp(-0.2 * k)) ** n
            for k in range(20)
        )
        for n in (1, 2)
    ]
    assert rare_weight_step(1.48, 1.48**2, 0.01, 2.0, 10) == pytest.approx(by_hand)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_features_of_a_rare_class_in_many_dimensions(
    momentum: float, generator: torch.Generator
) -> None:
    p, d, batch, signal, runs = 0.1, 400, 8, 4.0, 20
    lr, begin = 8 * (1 - momentum) / d, math.log(p / (1 - p))
    mu = torch.zeros(d, dtype=torch.float64)
    mu[3] = math.sqrt(signal)
    # The last entry is the bias.
    theta = nn.Parameter(torch.zeros(runs, d + 1, dtype=torch.float64))
    theta.data[:, d] = begin
    optimizer = SGD([theta], lr=lr, momentum=momentum)
    limit = Overlaps(0.0, 0.0, begin)
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    for _ in range(400):
        rare = (torch.rand(runs, batch, **draw) < p).double()
        x = torch.randn(runs, batch, d, **draw) + rare[..., None] * mu
        x = torch.cat([x, torch.ones(runs, batch, 1, dtype=torch.float64)], 2)
        rest = torch.einsum("rbd,rd->rb", x, theta.detach()).sigmoid() - rare
        theta.grad = torch.einsum("rb,rbd->rd", rest, x) / batch
        optimizer.step()
        limit = rare_features_step(limit, p, lr, momentum, batch, d, signal)
    weights, bias = theta.detach()[:, :d], theta.detach()[:, d]
    m, of_bias = optimizer.state[theta]["momentum"].split((d, 1), 1)
    found = (
        weights @ mu,
        weights.square().sum(1),
        bias,
        m @ mu,
        (m * weights).sum(1),
        m.square().sum(1),
        of_bias[:, 0],
    )
    for drawn, value in zip(found, limit, strict=True):
        # Terms that are smaller by 1 / sqrt(d), and what varies from run to run.
        error = 4 * float(drawn.std()) / math.sqrt(runs)
        assert float(drawn.mean()) == pytest.approx(value, rel=0.03, abs=error)
    # From where it begins it has learned.
    optimum = Overlaps(signal, signal, begin - signal / 2)
    losses = [rare_features_loss(o, p) for o in (Overlaps(0.0, 0.0, begin), limit, optimum)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


def test_loss_of_a_rare_class_is_an_integral() -> None:
    overlaps, p = Overlaps(mean=1.5, square=2.0, bias=-1.0), 0.2
    z = np.linspace(-15, 15, 20001) * math.sqrt(2)
    density = np.exp(-(z**2) / 4) / math.sqrt(4 * math.pi)
    rare, other = np.logaddexp(0, -(z + 0.5)), np.logaddexp(0, z - 1)
    expected = ((p * rare + (1 - p) * other) * density).sum() * (z[1] - z[0])
    assert rare_features_loss(overlaps, p) == pytest.approx(float(expected), rel=1e-8)


def test_examples_run() -> None:
    failed, attempted = doctest.testmod(theory)
    assert attempted and not failed
