"""Momentum on features that are rarely active, global and lazy: simulated and exact.

    python scripts/sparse_momentum.py
    python scripts/sparse_momentum.py out=FOLDER settings.runs=100

Options are in conf/sparse_momentum.yaml, formulas in `gfnem.optim.theory`. It ends in
sparse_momentum.md and sparse_momentum.png:

- sparse least squares at all settings of sparsity, batch and momentum decay, with `gfnem.optim.SGD`
  itself, beside the recursion of second moments. z is the mean difference over runs in standard
  errors;
- its phases at one learning rate: time to reduce the squared error, where it grows, the lines of
  oscillation and of stability, and where learning takes as many active updates as the momentum
  survives;
- features with Zipf's frequencies: the best learning rate and momentum of each kind, by the
  recursion, and the error that they leave;
- logistic regression with a rare class: how far its three descriptions hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
import torch
from jaxtyping import Float
from jobs import markdown
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor, nn

from gfnem.optim import SGD
from gfnem.optim.theory import (
    Moments,
    Overlaps,
    active_share,
    learning,
    oscillation_lr,
    rare_bias_stationary,
    rare_features_loss,
    rare_features_step,
    rare_weight_step,
    retention,
    sparse_step,
    stability_lr,
)

KINDS = {False: "global", True: "lazy"}


class Setting(NamedTuple):
    """A feature's optimizer."""

    momentum: float
    lr: float
    lazy: bool


def start(error: Any) -> Moments:
    return Moments(error, 0 * error, 0 * error)


# Settings beside the recursion.


def simulate(
    p: Float[Tensor, "d"],
    settings: Sequence[Setting],
    batch: int,
    noise: float,
    runs: int,
    steps: Sequence[int],
    generator: torch.Generator,
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """After some of the steps, e and m of each setting, [runs, d], all from 1 on the same data."""
    d = len(p)
    draw: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    # Each feature of each run is a row of the table.
    tables = [nn.Parameter(torch.ones(runs * d, 1, dtype=torch.float64)) for _ in settings]
    optimizers = [
        SGD([table], lr=own.lr, momentum=own.momentum, lazy=own.lazy)
        for table, own in zip(tables, settings, strict=True)
    ]
    for t in range(1, max(steps) + 1):
        x = torch.randn(runs, batch, d, **draw) * (torch.rand(runs, batch, d, **draw) < p)
        rest = noise * torch.randn(runs, batch, 1, **draw)
        for table, optimizer in zip(tables, optimizers, strict=True):
            residual = x @ table.detach().view(runs, d, 1) - rest
            table.grad = (x.mT @ residual).view(-1, 1) / batch
            optimizer.step()
        if t in steps:
            yield [
                (table.detach().view(runs, d), optimizer.state[table]["momentum"].view(runs, d))
                for table, optimizer in zip(tables, optimizers, strict=True)
            ]


Deviations = dict[tuple[bool, float], list[float]]


def deviations(config: DictConfig, generator: torch.Generator) -> Deviations:
    """z of E e^2, E m^2 and E[e m] at three times of all settings, by kind and momentum."""
    own = config.settings
    steps = [own.steps // 20, own.steps // 4, own.steps]
    found: Deviations = {}
    for p, batch in product(own.p, own.batch):
        settings = [
            Setting(momentum, own.share * stability_lr(p, momentum, batch, own.d, lazy), lazy)
            for momentum in own.momentum
            for lazy in KINDS
        ]
        frequencies = torch.full((own.d,), p, dtype=torch.float64)
        simulated = simulate(frequencies, settings, batch, own.noise, own.runs, steps, generator)
        exact = [start(np.ones(own.d)) for _ in settings]
        done = 0
        for step, states in zip(steps, simulated, strict=True):
            for i, (setting, (e, m)) in enumerate(zip(settings, states, strict=True)):
                for _ in range(done, step):
                    exact[i] = sparse_step(
                        exact[i], frequencies.numpy(), setting.lr, setting.momentum, batch,
                        own.noise, setting.lazy,
                    )  # fmt: skip
                key = setting.lazy, setting.momentum
                for drawn, value in zip((e**2, m**2, e * m), exact[i], strict=True):
                    # Features of one run share its data.
                    of_runs = drawn.mean(1)
                    z = (of_runs.mean() - value.mean()) / (of_runs.std() / own.runs**0.5)
                    found.setdefault(key, []).append(float(z))
            done = step
    return found


def deviation_table(found: Deviations) -> str:
    rows = []
    for (lazy, momentum), numbers in sorted(found.items()):
        z = np.array(numbers)
        rows.append(
            [
                KINDS[lazy],
                f"{momentum:g}",
                f"{z.size}",
                f"{np.sqrt((z**2).mean()):.2f}",
                f"{(abs(z) > 2).mean():.3f}",
                f"{abs(z).max():.2f}",
            ]
        )
    head = ["momentum", "decay", "comparisons", "root mean square z", "above 2", "largest"]
    return markdown(head, rows, texts=1)


# Phases.


def growth(p: np.ndarray, lr: float, momentum: np.ndarray, batch: int, d: int, lazy: bool) -> Any:
    """The factor of the second moments in a step, by the recursion without noise."""
    shape = np.broadcast_shapes(p.shape, momentum.shape)
    same = np.broadcast_to(p, shape)[..., None].repeat(d, -1)
    columns = []
    for unit in np.eye(3):
        moments = Moments(*(np.full(same.shape, value) for value in unit))
        after = sparse_step(moments, same, lr, momentum[..., None], batch, lazy=lazy)
        columns.append(np.stack([value[..., 0] for value in after], -1))
    return np.abs(np.linalg.eigvals(np.stack(columns, -1))).max(-1)


def phase_panel(axes: Axes, config: DictConfig, batch: int, lazy: bool) -> Any:
    """Active updates to reduce the squared error by e over frequency and momentum decay."""
    own = config.phases
    p, rest = phase_axes(own.points)
    momentum = 1 - rest
    factor = growth(p, own.lr, momentum, batch, own.d, lazy)
    active = active_share(p, batch) * np.ones_like(factor)
    with np.errstate(divide="ignore"):
        updates = np.where(factor < 1, active / -np.log(np.minimum(factor, 1)), np.nan)
    drawn = axes.pcolormesh(p[0], rest[:, 0], updates, norm=LogNorm(1, 1e4), cmap="viridis_r")
    axes.set_facecolor("#d9a0a0")
    lines = {
        "oscillation": oscillation_lr(p, momentum, batch, lazy) / own.lr,
        "stability": stability_lr(p, momentum, batch, own.d, lazy) / own.lr,
        "learning = retention": learning(p, own.lr, momentum, batch)
        / retention(p, momentum, batch, lazy),
    }
    for (name, values), style in zip(lines.items(), ("-", "--", ":"), strict=True):
        values = values * np.ones_like(factor)
        axes.contour(p[0], rest[:, 0], np.log(values), [0.0], colors="black", linestyles=style)
        axes.plot([], [], color="black", linestyle=style, label=name)
    axes.set(xscale="log", yscale="log", title=f"{KINDS[lazy]}, batch {batch}")
    return drawn


def phase_axes(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies along columns, 1 - momentum along rows."""
    return np.geomspace(1e-4, 0.9, points)[None], np.geomspace(1e-3, 1, points)[:, None]


def phase_table(config: DictConfig) -> str:
    """What is where in the diagram, and the ratio of time scales along the line of stability."""
    own = config.phases
    p, rest = phase_axes(own.points)
    momentum = 1 - rest
    rows = []
    for lazy, batch in product(KINDS, own.batch):
        grows = growth(p, own.lr, momentum, batch, own.d, lazy) >= 1
        swings = oscillation_lr(p, momentum, batch, lazy) < own.lr
        # On the line itself, at all learning rates: those of each frequency and momentum.
        line = stability_lr(p, momentum, batch, own.d, lazy)
        ratio = learning(p, line, momentum, batch) / retention(p, momentum, batch, lazy)
        low, high = np.quantile(ratio[(line > 0) & np.isfinite(ratio)], [0.0, 1.0])
        said = grows == (line <= own.lr)
        rows.append(
            [
                KINDS[lazy],
                f"{batch}",
                *(
                    f"{100 * part.mean():.0f} %"
                    for part in (~swings & ~grows, swings & ~grows, ~swings & grows, swings & grows)
                ),
                f"{low:.2g} to {high:.2g}",
                f"{100 * said.mean():.1f} %",
            ]
        )
    return markdown(
        [
            "momentum",
            "batch",
            "calm and stable",
            "swings, stable",
            "calm, grows",
            "swings and grows",
            "learning / retention where growth begins",
            "growth as the formula says",
        ],
        rows,
        texts=1,
    )


# Zipf's frequencies.


class Tuned(NamedTuple):
    """The best of a kind of momentum, and what it leaves of the squared error."""

    name: str
    setting: Setting
    error: Float[np.ndarray, "d"]


def frequencies_of(config: DictConfig) -> Float[np.ndarray, "d"]:
    return config.tokens.top / np.arange(1, config.tokens.d + 1)


def tune(config: DictConfig) -> list[Tuned]:
    """For each kind of momentum the least mean squared error after the steps."""
    own = config.tokens
    p = frequencies_of(config)
    best: list[Tuned] = []
    for name, momenta, lazy in (
        ("none", [0.0], False),
        ("global", own.momentum, False),
        ("lazy", own.momentum, True),
    ):
        grid = np.array(list(product(momenta, own.lr)))
        momentum, lr = grid[:, :1], grid[:, 1:] * (1 - grid[:, :1])
        moments = start(np.ones((len(grid), own.d)))
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(own.steps):
                moments = sparse_step(moments, p, lr, momentum, own.batch, own.noise, lazy)
        i = int(np.nanargmin(moments.error.mean(1)))
        setting = Setting(float(momentum[i, 0]), float(lr[i, 0]), lazy)
        best.append(Tuned(name, setting, moments.error[i]))
    return best


def token_table(config: DictConfig, tuned: Sequence[Tuned], simulated: Sequence[Any]) -> str:
    """Squared error left, exact and simulated, by frequency."""
    p = frequencies_of(config)
    groups = {
        "p above 0.05": p > 0.05,
        "0.005 to 0.05": (p > 0.005) & (p <= 0.05),
        "below 0.005": p <= 0.005,
    }
    rows = []
    for one, errors in zip(tuned, simulated, strict=True):
        cells = []
        for chosen in (np.full(len(p), True), *groups.values()):
            of_runs = errors[:, chosen].mean(1)
            deviation = of_runs.std(ddof=1) / len(of_runs) ** 0.5
            cells.append(f"{one.error[chosen].mean():.4f} ({of_runs.mean():.4f} ± {deviation:.4f})")
        setting = one.setting
        rows.append([one.name, f"{setting.momentum:g}", f"{setting.lr:.3g}", *cells])
    return markdown(
        ["momentum", "decay", "learning rate", "squared error left, all", *groups], rows, texts=1
    )


# A rare class.


def bias_errors(
    config: DictConfig, p: float, momentum: float, step: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Stationary E e^2 of a class' bias: simulated, over that of the expansion; standard error.

    Not a number where the expansion is unstable.
    """
    own = config.rare
    lr = step * (1 - momentum) * own.batch
    described = rare_bias_stationary(p, lr, momentum, own.batch)
    if described < 0:
        return math.nan, math.nan
    optimum = math.log(p / (1 - p))
    bias, m = np.full(own.runs, optimum), np.zeros(own.runs)
    # Averaged over as long as it takes to forget, behind three times that.
    forget = math.ceil((1 - momentum) / (lr * p * (1 - p)) + 1 / (1 - momentum))
    total = np.zeros(own.runs)
    for t in range(6 * forget):
        share = rng.binomial(own.batch, p, own.runs) / own.batch
        m = momentum * m + 1 / (1 + np.exp(-bias)) - share
        bias = bias - lr * m
        if t >= 3 * forget:
            total += (bias - optimum) ** 2
    errors = total / (3 * forget) / described
    return float(errors.mean()), float(errors.std(ddof=1) / own.runs**0.5)


def weight_errors(
    config: DictConfig, p: float, step: float, rng: np.random.Generator
) -> tuple[float, float]:
    """E w far from the optimum: simulated, over that of the limit of p towards 0."""
    own = config.rare
    lr = step * own.batch
    optimum = math.log(p / (1 - p))
    steps = math.ceil(2 / (lr * p))
    bias = np.full(own.runs, optimum + 1.0)
    mean, square = math.exp(-1), math.exp(-2)
    for _ in range(steps):
        share = rng.binomial(own.batch, p, own.runs) / own.batch
        bias = bias - lr * (1 / (1 + np.exp(-bias)) - share)
        mean, square = rare_weight_step(mean, square, p, lr, own.batch)
    w = np.exp(optimum - bias) / mean
    return float(w.mean()), float(w.std(ddof=1) / own.runs**0.5)


def feature_losses(
    config: DictConfig, d: int, p: float, momentum: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Loss above the least one at four times: of the limit, and of each run."""
    own = config.rare
    lr, steps = own.features_lr * (1 - momentum) / d, own.features_steps * d
    optimum = Overlaps(own.signal, own.signal, math.log(p / (1 - p)) - own.signal / 2)
    least = rare_features_loss(optimum, p)
    mean = np.zeros(d)
    mean[0] = math.sqrt(own.signal)
    runs = own.features_runs
    begin = math.log(p / (1 - p))
    weights, m = np.zeros((runs, d)), np.zeros((runs, d))
    bias, of_bias = np.full(runs, begin), np.zeros(runs)
    overlaps = Overlaps(0.0, 0.0, begin)
    limit, simulated = [], []
    for t in range(1, steps + 1):
        labels = (rng.random((runs, own.batch)) < p).astype(float)
        x = rng.standard_normal((runs, own.batch, d)) + labels[..., None] * mean
        logits = (x @ weights[..., None])[..., 0] + bias[:, None]
        rest = 1 / (1 + np.exp(-logits)) - labels
        m = momentum * m + (rest[:, None] @ x)[:, 0] / own.batch
        of_bias = momentum * of_bias + rest.mean(1)
        weights, bias = weights - lr * m, bias - lr * of_bias
        overlaps = rare_features_step(overlaps, p, lr, momentum, own.batch, d, own.signal)
        if t % (steps // 4) == 0:
            limit.append(rare_features_loss(overlaps, p) - least)
            states = zip(weights @ mean, (weights**2).sum(1), bias, strict=True)
            simulated.append([rare_features_loss(Overlaps(*state), p) - least for state in states])
    return np.array(limit), np.array(simulated)


Cells = dict[tuple[str, float], list[tuple[float, float]]]


def rare_ratios(config: DictConfig, rng: np.random.Generator) -> Cells:
    """Simulated over described, with standard errors, over the sizes of a step."""
    own = config.rare
    found: Cells = {}
    for p in own.p:
        for momentum in own.momentum:
            found[f"bias, momentum {momentum:g}", p] = [
                bias_errors(config, p, momentum, step, rng) for step in own.step
            ]
        found["far from the optimum", p] = [
            weight_errors(config, p, step, rng) for step in own.step
        ]
    return found


def rare_table(config: DictConfig, ratios: Cells) -> str:
    rows = [
        [name, f"{p:g}", *(ratio_text(mean, deviation) for mean, deviation in cells)]
        for (name, p), cells in sorted(ratios.items(), key=lambda item: item[0][0])
    ]
    head = [
        "simulated / described, by learning rate / ((1 - momentum) batch)",
        "p",
        *(f"{step:g}" for step in config.rare.step),
    ]
    return markdown(head, rows, texts=1)


def ratio_text(mean: float, deviation: float) -> str:
    if not math.isfinite(mean):
        return "unstable"
    return f"{mean:.3f} ± {deviation:.3f}" if mean < 100 else "over 100"


def features_table(config: DictConfig, rng: np.random.Generator) -> str:
    rows = []
    for p, momentum, d in product(config.rare.p[1:], config.rare.momentum, config.rare.d):
        limit, simulated = feature_losses(config, d, p, momentum, rng)
        deviation = simulated.std(1, ddof=1) / simulated.shape[1] ** 0.5
        cells = [
            ratio_text(mean / exact, error / exact)
            for mean, error, exact in zip(simulated.mean(1), deviation, limit, strict=True)
        ]
        rows.append([f"{p:g}", f"{momentum:g}", f"{d}", *cells])
    times = [f"{config.rare.features_steps * part // 4} d steps" for part in range(1, 5)]
    head = ["p", "momentum", "d", *(f"simulated / limit, {time}" for time in times)]
    return markdown(head, rows, texts=0)


@hydra.main(version_base="1.3", config_path="conf", config_name="sparse_momentum")
def main(config: DictConfig) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    settings = deviations(config, generator)
    print("settings: done", flush=True)
    tuned = tune(config)
    own = config.tokens
    p = torch.from_numpy(frequencies_of(config))
    (states,) = simulate(
        p, [one.setting for one in tuned], own.batch, own.noise, own.runs, [own.steps], generator
    )
    tokens = [e.square().numpy() for e, _ in states]
    print("tokens: done", flush=True)
    ratios = rare_ratios(config, rng)
    parts = [
        deviation_table(settings),
        phase_table(config),
        token_table(config, tuned, tokens),
        rare_table(config, ratios),
        features_table(config, rng),
    ]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "sparse_momentum.md").write_text("\n".join(parts))
    figure(config, tuned, tokens, ratios).savefig(out / "sparse_momentum.png", dpi=100)
    print(f"written to {out}: sparse_momentum.md, sparse_momentum.png")


def figure(
    config: DictConfig, tuned: Sequence[Tuned], tokens: Sequence[Any], ratios: Cells
) -> Figure:
    """Phases of both kinds of momentum, what is left by frequency, and the rare class."""
    batches = config.phases.batch
    drawn = Figure(figsize=(4 * (len(batches) + 1), 7.4), layout="constrained")
    grid = drawn.subplots(2, len(batches) + 1)
    image = None
    for row, lazy in zip(grid, KINDS, strict=True):
        for axes, batch in zip(row, batches, strict=False):
            image = phase_panel(axes, config, batch, lazy)
            axes.set_xlabel("frequency of the feature")
        row[0].set_ylabel("1 - momentum")
    grid[0, 0].legend(fontsize=8, loc="lower left")
    assert image is not None
    drawn.colorbar(
        image,
        ax=grid[:, :-1],
        location="bottom",
        aspect=60,
        label=f"active updates to reduce the squared error by e at learning rate "
        f"{config.phases.lr:g}; red: it grows",
    )
    left_panel(grid[0, -1], config, tuned, tokens)
    rare_panel(grid[1, -1], config, ratios)
    return drawn


def left_panel(axes: Axes, config: DictConfig, tuned: Sequence[Tuned], tokens: Any) -> None:
    p = frequencies_of(config)
    for one, errors, color in zip(tuned, tokens, ("#888888", "#d1601f", "#1f6fb4"), strict=True):
        setting = one.setting
        label = f"{one.name}: {setting.momentum:g}, {setting.lr:.2g}"
        axes.loglog(p, one.error, color=color, label=label)
        axes.loglog(p, errors.mean(0), ".", color=color, markersize=3)
    axes.set(
        title=f"Zipf: left after {config.tokens.steps:,} steps",
        xlabel="frequency of the feature (lines: exact)",
        ylabel="squared error",
    )
    axes.legend(fontsize=8, title="momentum, learning rate", title_fontsize=8)
    axes.grid(alpha=0.3)


def rare_panel(axes: Axes, config: DictConfig, ratios: Cells) -> None:
    names = list(dict.fromkeys(name for name, _ in ratios))
    for name, p in ratios:
        style = ("-", "--", ":")[names.index(name)]
        color = ("#1f6fb4", "#3a8f4d", "#d1601f")[list(config.rare.p).index(p)]
        axes.plot(
            config.rare.step,
            [mean for mean, _ in ratios[name, p]],
            style,
            color=color,
            marker=".",
            label=f"{name}, p {p:g}",
        )
    axes.axhspan(0.9, 1.1, color="#000000", alpha=0.08)
    axes.set(
        xscale="log",
        ylim=(0.8, 2),
        title="rare class: simulated / described",
        xlabel="learning rate / ((1 - momentum) batch)",
    )
    axes.legend(fontsize=6)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
