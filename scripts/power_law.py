"""DANA against SGD with momentum on least squares with power laws: simulated, exact, predicted.

    python scripts/power_law.py
    python scripts/power_law.py out=FOLDER large.d=256 'points=[[1.0, 0.4]]'

Options are in conf/power_law.yaml. Data x_j ~ N(0, j^(-2 alpha)) for j = 1..2d, d random features,
target sum_j j^(-beta) x_j (`gfnem.optim.theory.power_law_features`). SGD has the learning rate
min(1, B / Tr) / 2, Polyak's and Nesterov's momentum that times 1 - momentum, so that all three move
alike; DANA has its published schedules. It ends in power_law.md and power_law.png:

- simulated and exact risk, in the space of x with the optimizers of `gfnem.optim` themselves, and
  along the eigenvectors for large d. z is the mean difference over runs in standard errors;
- exponents of the risk above its floor, slopes of least squares on logarithms over a window, with
  95 % intervals of the bootstrap over draws of the features and runs;
- the longest stretch of steps with DANA's risk above the floor well below those of all three
  others, with 95 % intervals of the bootstrap over draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from jaxtyping import Float, Int
from jobs import markdown
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor, nn

from gfnem.optim import DANA, SGD, dana_constant, dana_decaying
from gfnem.optim.schedules import value_at
from gfnem.optim.theory import Moments, RandomFeatures, dana_step, power_law_features, risk

METHODS = ("SGD", "momentum", "Nesterov", "DANA constant", "DANA decaying")
COLORS = ("#888888", "#d1601f", "#c9a227", "#1f6fb4", "#8a4fb0")
COEFFICIENTS = ("decay", "gamma1", "gamma2", "gamma3")
Options = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Draws of the features at one point.

    eigenvalues: along each eigenvector.
    error: squared, at the start.
    floor: twice the least risk.
    trace: of the data's covariance.
    """

    alpha: float
    beta: float
    d: int
    batch: int
    drawn: list[RandomFeatures]
    weights: list[Float[Tensor, "v d"]]

    @staticmethod
    def draw(
        alpha: float, beta: float, d: int, batch: int, draws: int, generator: torch.Generator
    ) -> Problem:
        weights = [
            torch.randn(2 * d, d, generator=generator, dtype=torch.float64) / d**0.5
            for _ in range(draws)
        ]
        drawn = [power_law_features(w, alpha, beta) for w in weights]
        return Problem(alpha, beta, d, batch, drawn, weights)

    @property
    def scales(self) -> Float[Tensor, "v"]:
        """Of the data."""
        return torch.arange(1, 2 * self.d + 1, dtype=torch.float64) ** -self.alpha

    @property
    def target(self) -> Float[Tensor, "v"]:
        """Weights of the target."""
        return torch.arange(1, 2 * self.d + 1, dtype=torch.float64) ** -self.beta

    def of_draws(self, name: str) -> Tensor:
        return torch.stack([getattr(one, name) for one in self.drawn])

    def options(self, momentum: float, delta: float) -> dict[str, Options]:
        """Coefficients of each method, all as DANA's."""
        trace = float(self.scales.square().sum())
        rate = min(1.0, self.batch / trace) / 2
        slow = rate * (1 - momentum)
        constant = dana_constant(self.batch, self.d, trace, delta)
        decaying = dana_decaying(self.batch, self.d, trace, self.alpha, delta)
        return dict(
            zip(
                METHODS,
                (
                    {"decay": 1.0, "gamma1": 1.0, "gamma2": rate, "gamma3": 0.0},
                    {"decay": 1 - momentum, "gamma1": 1.0, "gamma2": 0.0, "gamma3": slow},
                    {
                        "decay": 1 - momentum,
                        "gamma1": 1.0,
                        "gamma2": slow,
                        "gamma3": slow * momentum,
                    },
                    constant,
                    decaying,
                ),
                strict=True,
            )
        )


class Curves:
    """Risks above the floor at some steps.

    steps: after which they were taken.
    exact: of each draw, by the recursion.
    simulated: of each draw and run; None where nothing was simulated.
    """

    def __init__(
        self,
        steps: Int[np.ndarray, "times"],
        exact: Float[np.ndarray, "times draws methods"],
        simulated: Float[np.ndarray, "times draws runs methods"] | None = None,
    ):
        self.steps, self.exact, self.simulated = steps, exact, simulated

    def z(self) -> Float[np.ndarray, "times methods"]:
        """Mean difference of simulated and exact risk over draws and runs, in standard errors."""
        assert self.simulated is not None
        rest = (self.simulated - self.exact[:, :, None]).reshape(len(self.steps), -1, len(METHODS))
        return rest.mean(1) / (rest.std(1, ddof=1) / rest.shape[1] ** 0.5)

    def within(self, window: Sequence[int]) -> Curves:
        low, high = window
        chosen = (self.steps >= low) & (self.steps <= high)
        simulated = None if self.simulated is None else self.simulated[chosen]
        return Curves(self.steps[chosen], self.exact[chosen], simulated)


def logarithmic(steps: int, per_decade: int = 8) -> Int[np.ndarray, "times"]:
    """Numbers of steps, evenly spread on a logarithmic axis, up to the last one."""
    points = np.geomspace(1, steps, int(np.log10(steps) * per_decade) + 1)
    return np.unique(points.round().astype(int))


def coefficients(options: Mapping[str, Options], t: int) -> dict[str, Float[Tensor, "methods 1"]]:
    return {
        name: torch.tensor(
            [[value_at(own[name], t)] for own in options.values()], dtype=torch.float64
        )
        for name in COEFFICIENTS
    }


def recursion(
    problem: Problem, options: Mapping[str, Options], steps: Int[np.ndarray, "times"]
) -> Float[np.ndarray, "times draws methods"]:
    """Exact risks above the floor."""
    eigenvalues = problem.of_draws("eigenvalues")[:, None]
    floor = problem.of_draws("floor")[:, None]
    error = problem.of_draws("error")[:, None].repeat(1, len(options), 1)
    moments = Moments(error, torch.zeros_like(error), torch.zeros_like(error))

    def advance(t: int) -> None:
        nonlocal moments
        given = coefficients(options, t)
        moments = dana_step(moments, eigenvalues, floor, problem.batch, **given)

    return recorded(steps, advance, lambda: risk(moments, eigenvalues, floor) - floor / 2)


def recorded(
    steps: Int[np.ndarray, "times"], advance: Callable[[int], None], value: Callable[[], Tensor]
) -> np.ndarray:
    """Values after some numbers of steps."""
    found, wanted = [], set(steps.tolist())
    for t in range(int(steps[-1])):
        advance(t)
        if t + 1 in wanted:
            found.append(value().numpy().copy())
    return np.stack(found)


def along_eigenvectors(
    problem: Problem,
    options: Mapping[str, Options],
    steps: Int[np.ndarray, "times"],
    runs: int,
    generator: torch.Generator,
) -> Float[np.ndarray, "times draws runs methods"]:
    """Simulate: the features along an eigenvector are independent normals.

    All methods see the same data.
    """
    draws, d, batch = len(problem.drawn), problem.d, problem.batch
    scales = problem.of_draws("eigenvalues").sqrt()[:, None, None]
    noise = problem.of_draws("floor").sqrt()[:, None, None]
    # At theta = 0 all of the target is error, to the signs, which do not matter.
    e = problem.of_draws("error").sqrt()[:, None, None].repeat(1, runs, len(options), 1)
    y = torch.zeros_like(e)

    def advance(t: int) -> None:
        draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        phi = torch.randn(draws, runs, batch, d, **draw) * scales
        residual = e @ phi.mT + (torch.randn(draws, runs, batch, **draw) * noise)[:, :, None]
        g = residual @ phi / batch
        c = coefficients(options, t)
        y.mul_(1 - c["decay"]).add_(c["gamma1"] * g)
        e.sub_(c["gamma2"] * g).sub_(c["gamma3"] * y)

    eigenvalues = problem.of_draws("eigenvalues")[:, None, None]
    return recorded(steps, advance, lambda: (eigenvalues * e.square()).sum(-1) / 2)


def in_data_space(
    problem: Problem,
    options: Mapping[str, Options],
    steps: Int[np.ndarray, "times"],
    runs: int,
    momentum: float,
    generator: torch.Generator,
) -> Float[np.ndarray, "times draws runs methods"]:
    """Simulate with data, features and optimizers themselves."""
    weights = torch.stack(problem.weights)
    draws, v, d = weights.shape
    shape = (draws, runs, d)
    thetas = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in options]
    optimizers = [
        optimizer_of(name, own, momentum, theta)
        for (name, own), theta in zip(options.items(), thetas, strict=True)
    ]
    scaled = problem.scales[:, None] * weights
    best = problem.of_draws("floor")[:, None] / 2

    def advance(_: int) -> None:
        draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
        x = torch.randn(draws, runs * problem.batch, v, **draw) * problem.scales
        phi = (x @ weights).view(draws, runs, problem.batch, d)
        said = (x @ problem.target).view(draws, runs, problem.batch)
        for theta, optimizer in zip(thetas, optimizers, strict=True):
            residual = (phi @ theta.detach()[..., None])[..., 0] - said
            theta.grad = (residual[:, :, None] @ phi)[:, :, 0] / problem.batch
            optimizer.step()

    def value() -> Tensor:
        rest = [theta.detach() @ scaled.mT - problem.scales * problem.target for theta in thetas]
        return torch.stack([one.square().sum(-1) / 2 - best for one in rest], -1)

    return recorded(steps, advance, value)


def optimizer_of(
    name: str, own: Options, momentum: float, theta: nn.Parameter
) -> torch.optim.Optimizer:
    if name == "SGD":
        return SGD([theta], lr=own["gamma2"], momentum=0.0)
    if name == "momentum":
        return SGD([theta], lr=own["gamma3"], momentum=momentum)
    if name == "Nesterov":
        return SGD([theta], lr=own["gamma2"], momentum=momentum, nesterov=True)
    return DANA([theta], **own)


def slopes(steps: np.ndarray, risks: Float[np.ndarray, "times *rest"]) -> np.ndarray:
    """Exponents: slopes of logarithms over logarithms, by least squares."""
    x = np.log(steps) - np.log(steps).mean()
    return np.tensordot(x, np.log(risks), 1) / (x**2).sum()


def resampled(
    curves: Curves, resamples: int, generator: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draws of the features with replacement, then runs of each; mean curves of both kinds."""
    assert curves.simulated is not None
    _, draws, runs, _ = curves.simulated.shape
    for _ in range(resamples):
        chosen = generator.integers(draws, size=draws)
        of_each = generator.integers(runs, size=(draws, runs))
        simulated = curves.simulated[:, chosen[:, None], of_each].mean((1, 2))
        yield simulated, curves.exact[:, chosen].mean(1)


def predicted(alpha: float, beta: float, method: str) -> float | None:
    """The exponent of the part that the target's own decay gives, where a formula is known."""
    of_sgd = -(2 * alpha + 2 * beta - 1) / (2 * alpha)
    if method == "DANA constant":
        return None
    return of_sgd * (2 - 1 / (2 * alpha)) if method == "DANA decaying" else of_sgd


def ahead(
    steps: np.ndarray, risks: Float[np.ndarray, "times methods"], method: str, below: float
) -> tuple[float, float]:
    """The longest stretch, on a logarithmic axis, with a method well below all three of SGD.

    Its first step and the first step behind it; infinite for none.
    """
    inside = risks[:, METHODS.index(method)] < (1 - below) * risks[:, :3].min(1)
    begin, end = np.flatnonzero(np.diff(np.pad(inside.astype(int), 1))).reshape(-1, 2).T
    if not len(begin):
        return np.inf, np.inf
    longest = int(np.argmax(steps[end - 1] / steps[begin]))
    behind = steps[end[longest]] if end[longest] < len(steps) else np.inf
    return float(steps[begin[longest]]), float(behind)


def interval(values: Sequence[Any] | np.ndarray) -> tuple[Any, Any]:
    return tuple(np.quantile(np.asarray(values), [0.025, 0.975], axis=0))  # pyright: ignore


@hydra.main(version_base="1.3", config_path="conf", config_name="power_law")
def main(config: DictConfig) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    raw, large = [], []
    exponent_rows, crossing_rows = [], []
    for alpha, beta in config.points:

        def draw(d: int, alpha: float = alpha, beta: float = beta) -> tuple[Problem, Any]:
            problem = Problem.draw(alpha, beta, d, config.batch, config.draws, generator)
            return problem, problem.options(config.momentum, config.delta)

        problem, options = draw(config.raw.d)
        steps = logarithmic(config.raw.steps)
        simulated = in_data_space(
            problem, options, steps, config.raw.runs, config.momentum, generator
        )
        raw.append(Curves(steps, recursion(problem, options, steps), simulated))

        for d in config.crossings.d:
            problem, options = draw(d)
            steps = logarithmic(config.crossings.steps, 40)
            exact = recursion(problem, options, steps)
            crossing_rows += crossings(alpha, beta, d, steps, exact, config, rng)
            if d == config.large.d:
                steps = logarithmic(config.large.steps)
                simulated = along_eigenvectors(
                    problem, options, steps, config.large.runs, generator
                )
                large.append(Curves(steps, recursion(problem, options, steps), simulated))
                curves = large[-1].within(config.large.window)
                exponent_rows += exponents(alpha, beta, curves, config.resamples, rng)
        print(f"alpha {alpha}, beta {beta}: done", flush=True)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "power_law.md").write_text(text(config, raw, large, exponent_rows, crossing_rows))
    figure(config, raw, large).savefig(out / "power_law.png", dpi=100)
    print(f"written to {out}: power_law.md, power_law.png")


def exponents(
    alpha: float, beta: float, curves: Curves, resamples: int, rng: np.random.Generator
) -> list[list[str]]:
    """A row for each method: measured, exact, their difference, predicted."""
    assert curves.simulated is not None
    found = slopes(curves.steps, curves.simulated.mean((1, 2)))
    exact = slopes(curves.steps, curves.exact.mean(1))
    drawn = [
        (slopes(curves.steps, one), slopes(curves.steps, other))
        for one, other in resampled(curves, resamples, rng)
    ]
    own, rest = interval([one for one, _ in drawn]), interval([one - other for one, other in drawn])
    momentum = METHODS.index("momentum")
    over = interval([one - one[momentum] for one, _ in drawn])
    rows = []
    for i, method in enumerate(METHODS):
        known = predicted(alpha, beta, method)
        rows.append(
            [
                f"{alpha:g}, {beta:g}",
                method,
                f"{found[i]:.3f} ({own[0][i]:.3f} to {own[1][i]:.3f})",
                f"{exact[i]:.3f}",
                f"{found[i] - exact[i]:+.3f} ({rest[0][i]:+.3f} to {rest[1][i]:+.3f})",
                "" if known is None else f"{known:.3f}",
                ""
                if i == momentum
                else f"{found[i] - found[momentum]:+.3f} ({over[0][i]:+.3f} to {over[1][i]:+.3f})",
            ]
        )
    return rows


def crossings(
    alpha: float,
    beta: float,
    d: int,
    steps: np.ndarray,
    exact: Float[np.ndarray, "times draws methods"],
    config: DictConfig,
    rng: np.random.Generator,
) -> list[list[str]]:
    """A row for both kinds of DANA: when each leaves and is back, by the mean of the draws."""
    draws = exact.shape[1]
    cells = []
    for method in METHODS[3:]:
        found = [ahead(steps, exact.mean(1), method, config.below)]
        for _ in range(config.resamples):
            mean = exact[:, rng.integers(draws, size=draws)].mean(1)
            found.append(ahead(steps, mean, method, config.below))
        for end in range(2):
            # Infinite numbers have no quantile between them and others.
            values = np.sort([one[end] for one in found[1:]])
            low, high = (values[int(q * (len(values) - 1))] for q in (0.025, 0.975))
            mean = step_text(found[0][end])
            between = f" ({step_text(low)} to {step_text(high)})"
            cells.append(mean if low == high == found[0][end] else mean + between)
    return [[f"{alpha:g}, {beta:g}", f"{d:,}", *cells]]


def step_text(step: float) -> str:
    return f"{step:,.0f}" if np.isfinite(step) else "never"


def text(
    config: DictConfig,
    raw: Sequence[Curves],
    large: Sequence[Curves],
    exponent_rows: Sequence[Sequence[str]],
    crossing_rows: Sequence[Sequence[str]],
) -> str:
    def deviations(curves: Sequence[Curves], d: int, space: str) -> list[str]:
        z = np.concatenate([one.z().ravel() for one in curves])
        simulated = curves[0].simulated
        assert simulated is not None
        runs = simulated.shape[1] * simulated.shape[2]
        return [
            space,
            f"{d:,}",
            f"{runs}",
            f"{curves[0].steps[-1]:,}",
            f"{z.size}",
            f"{np.sqrt((z**2).mean()):.2f}",
            f"{(abs(z) > 2).mean():.3f}",
            f"{abs(z).max():.2f}",
        ]

    agreement = markdown(
        ["space", "d", "runs", "steps", "comparisons", "root mean square z", "above 2", "largest"],
        [
            deviations(raw, config.raw.d, "of the data"),
            deviations(large, config.large.d, "along eigenvectors"),
        ],
        texts=1,
    )
    low, high = config.large.window
    fits = markdown(
        [
            "alpha, beta",
            "method",
            f"exponent, steps {low:,} to {high:,}, d = {config.large.d:,}",
            "of the recursion",
            "difference",
            "predicted",
            "over momentum's",
        ],
        exponent_rows,
        texts=2,
    )
    left = markdown(
        [
            "alpha, beta",
            "d",
            *(f"{name} {what} at step" for name in METHODS[3:] for what in ("leaves", "is back")),
        ],
        crossing_rows,
        texts=1,
    )
    return f"{agreement}\n{fits}\n{left}"


def figure(config: DictConfig, raw: Sequence[Curves], large: Sequence[Curves]) -> Figure:
    """A column for each point: above large d along eigenvectors, below in the data's space."""
    drawn = Figure(figsize=(3.6 * len(raw) + 0.4, 7), layout="constrained")
    grid = drawn.subplots(2, len(raw), squeeze=False)
    rows = ((large, config.large.d), (raw, config.raw.d))
    for axes_row, (row, d) in zip(grid, rows, strict=True):
        for axes, curves, (alpha, beta) in zip(axes_row, row, config.points, strict=True):
            assert curves.simulated is not None
            simulated = curves.simulated.mean((1, 2))
            for i, (name, color) in enumerate(zip(METHODS, COLORS, strict=True)):
                axes.loglog(curves.steps, curves.exact.mean(1)[:, i], color=color, label=name)
                axes.loglog(curves.steps, simulated[:, i], "o", color=color, markersize=3)
            axes.set_title(f"alpha {alpha:g}, beta {beta:g}, d {d:,}", fontsize=10)
            axes.grid(alpha=0.3)
        axes_row[0].set_ylabel("risk above its floor")
    for axes in grid[0]:
        axes.axvspan(*config.large.window, color="#000000", alpha=0.05)
    for axes in grid[1]:
        axes.set_xlabel("steps (lines: exact, points: simulated)")
    grid[0, 0].legend(fontsize=8)
    return drawn


if __name__ == "__main__":
    main()
