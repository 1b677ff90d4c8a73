"""Figures of a run: learning curves, trees, images, points, comparisons of methods.

They are drawn on `matplotlib.figure.Figure` objects of their own, never on pyplot's global state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from torch import Tensor

INK, PALE, BLUE = "#222222", "#858585", "#1f6fb4"
_COLORS = (BLUE, "#d1601f", "#3a8f4d", "#8d5fb0", "#b5892b", "#5b6770")
_STYLES = ("-", "--", ":", "-.")
_SMOOTHED_FROM = 60  # points; a curve of more is drawn pale, with its running mean on top


def learning_curves(
    metrics: Sequence[Mapping[str, float]],
    panels: Mapping[str, Sequence[str]],
    step: str = "train/m_steps",
) -> Figure:
    """Draw the metrics of a run over its M-steps, one panel for each kind of metric.

    Panels without any finite value are left out. Where several lines have the same step, the
    last one counts.

    Args:
        metrics: the lines of `metrics.jsonl` (`Run.metrics()`).
        panels: panel title -> patterns of the metrics in it.
        step: the metric on the horizontal axis.
    """
    curves = {title: _curves(metrics, patterns, step) for title, patterns in panels.items()}
    curves = {title: found for title, found in curves.items() if found}
    columns = min(3, max(1, len(curves)))
    rows = max(1, math.ceil(len(curves) / columns))
    figure = Figure(
        figsize=(4.6 * columns, 3.2 * rows),
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
    )
    first: Axes | None = None
    for index, (title, found) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(rows, columns, index, sharex=first)
        first = first or axes
        _style_curves(axes, title, "M-steps")
        for number, (key, (steps, values)) in enumerate(found.items()):
            _curve(axes, steps, values, key, _COLORS[number % len(_COLORS)])
        _scale(axes, [value for _, curve in found.values() for value in curve])
        if len(found) > 1:
            axes.legend(fontsize=8, framealpha=0.8, edgecolor="none")
        else:
            axes.set_ylabel(next(iter(found)), fontsize=8, color=PALE)
    return figure


def _curves(
    metrics: Sequence[Mapping[str, float]], patterns: Sequence[str], step: str
) -> dict[str, tuple[list[float], list[float]]]:
    """Collect the finite values of the metrics that fit a pattern: name -> (steps, values)."""
    points: dict[str, dict[float, float]] = {}
    for line in metrics:
        for key, value in line.items():
            fits = key != step and any(fnmatchcase(key, pattern) for pattern in patterns)
            if fits and step in line and math.isfinite(value):
                points.setdefault(key, {})[line[step]] = value
    return {key: (list(curve), list(curve.values())) for key, curve in points.items()}


def _curve(
    axes: Axes, steps: Sequence[float], values: Sequence[float], label: str, color: str
) -> None:
    if len(values) < _SMOOTHED_FROM:
        axes.plot(steps, values, color=color, linewidth=1.6, marker="o", markersize=3, label=label)
        return
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
    half = len(values) // 40
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    means = [sum(window) / len(window) for window in windows]
    axes.plot(steps, means, color=color, linewidth=1.8, label=label)


def banded_curves(
    settings: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    names: Sequence[str],
    steps: Mapping[str, str],
) -> Figure:
    """Draw metrics of several settings, each as the mean over its runs in a band.

    The band is one standard deviation (n - 1) wide to either side. Runs are interpolated to each
    other's steps, and drawn as far as all runs of a setting go.

    Args:
        settings: label -> the lines of `metrics.jsonl` of each of its runs.
        names: the metrics, each with a row of panels.
        steps: the metrics on the horizontal axes, with a column of panels each -> what they are
            called.
    """
    height = 2.8 * len(names) + 0.26 * len(settings)
    figure = Figure(
        figsize=(4.6 * len(steps), height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    )
    panels = figure.subplots(len(names), len(steps), sharex="col", sharey="row", squeeze=False)
    lines = {}
    for row, name in zip(panels, names, strict=True):
        drawn: list[float] = []
        for axes, (step, label) in zip(row, steps.items(), strict=True):
            _style_curves(axes, name, label, integer=step != "time/seconds")
            axes.tick_params(labelbottom=True)
            for number, (setting, runs) in enumerate(settings.items()):
                found = [_curves(run, (name,), step).get(name) for run in runs]
                x, mean, deviation = _band([curve for curve in found if curve is not None])
                color = _COLORS[number % len(_COLORS)]
                style = _STYLES[number // len(_COLORS) % len(_STYLES)]
                (lines[setting],) = axes.plot(
                    x,
                    mean,
                    style,
                    color=color,
                    linewidth=1.6,
                    marker="o" if len(x) < _SMOOTHED_FROM else None,
                    markersize=3,
                )
                axes.fill_between(
                    x, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0
                )
                drawn += mean.tolist()
        if drawn:
            _scale(row[0], drawn)
    legend = figure.legend(
        list(lines.values()), list(lines), loc="outside lower left", fontsize=8, edgecolor="none"
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _band(
    curves: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean and standard deviation of curves, where all of them are."""
    if not curves:
        return np.empty(0), np.empty(0), np.empty(0)
    first, last = max(min(steps) for steps, _ in curves), min(max(steps) for steps, _ in curves)
    x = np.unique(np.concatenate([steps for steps, _ in curves]))
    x = x[(first <= x) & (x <= last)]
    values = np.stack([np.interp(x, steps, values) for steps, values in curves])
    deviation = values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros_like(x)
    return x, values.mean(axis=0), deviation


def bar_table(rows: Mapping[str, Mapping[str, float]], title: str = "", own: str = "") -> Figure:
    """Draw a table of methods and their scores as bars with the numbers beside them.

    Args:
        rows: method -> score name -> value, in percent. A score that a method lacks leaves a
            gap.
        title: stands over the figure.
        own: the method to set off from the others.
    """
    scores = list(dict.fromkeys(score for row in rows.values() for score in row))
    figure = Figure(figsize=(1.6 + 2.6 * len(scores), 1.0 + 0.36 * len(rows)), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    places = {method: len(rows) - 1 - index for index, method in enumerate(rows)}
    for column, score in enumerate(scores, start=1):
        axes = figure.add_subplot(1, len(scores), column)
        _style(axes, score)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.set_yticks(list(places.values()), list(places) if column == 1 else [""] * len(rows))
        axes.set_ylim(-0.6, len(rows) - 0.4)
        values = {method: row[score] for method, row in rows.items() if score in row}
        axes.set_xlim(0, 1.25 * max(values.values()) or 1)
        for method, value in values.items():
            mine = method == own
            axes.barh(places[method], value, height=0.62, color=BLUE if mine else "#c9ced3")
            axes.annotate(
                f"{value:.1f}",
                (value, places[method]),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                color=INK,
                fontweight="bold" if mine else "normal",
            )
    return figure


def _style_curves(axes: Axes, title: str, label: str, integer: bool = True) -> None:
    _style(axes, title)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=integer))
    axes.set_xlabel(label, fontsize=9, color=INK)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Draw wide ranges on a logarithmic scale."""
    if min(values) > 0 and max(values) / min(values) > 50:
        axes.set_yscale("log")


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(colors=INK, labelsize=8, color=PALE)


def write(axes: Axes, x: float, y: float, text: str, color: str = INK, **style: Any) -> None:
    """Write a text as it is, dollar signs included."""
    axes.text(x, y, text, color=color, parse_math=False, **style)


def text_width(text: str, points: float) -> float:
    """Return the width of a text in inches, at a font size in points."""
    font = FontProperties(size=points)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


# Images, in inches.
_MARGIN = 0.25
_IMAGE = 0.55  # height of an image
_IMAGE_GAP = 0.06
_IMAGE_TITLE = 0.26


def image_grid(
    rows: Sequence[tuple[str, Float[Tensor, "images channels height width"]]],
) -> Figure:
    """Draw rows of images, one below the other.

    Args:
        rows: (title, images), the images side by side under their title; an empty title takes no
            room. Intensities lie between 0, black, and 1; one channel is grey, three are RGB.

    Raises:
        ValueError: there is nothing to draw, or images have neither one channel nor three.
    """
    if not rows or any(len(images) == 0 for _, images in rows):
        raise ValueError("image_grid needs at least one image in each row")
    for _, images in rows:
        if images.shape[1] not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels, not {images.shape[1]}")
    widths = [_IMAGE * images.shape[3] / images.shape[2] for _, images in rows]
    heights = [_IMAGE + (_IMAGE_TITLE if title else 0) for title, _ in rows]
    width = 2 * _MARGIN + max(
        max(len(images) * (wide + _IMAGE_GAP) - _IMAGE_GAP, text_width(title, 9) if title else 0)
        for wide, (title, images) in zip(widths, rows, strict=True)
    )
    top = 2 * _MARGIN + sum(heights) + _IMAGE_GAP * (len(rows) - 1)
    # Grey, so that both black and white images have an edge.
    figure = Figure(figsize=(width, top), facecolor="#c9ced3")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    y = top - _MARGIN
    for (title, images), wide, height in zip(rows, widths, heights, strict=True):
        y -= height
        if title:
            write(axes, _MARGIN, y + _IMAGE + 0.05, title, va="bottom", fontsize=9)
        for number, image in enumerate(images):
            x = _MARGIN + number * (wide + _IMAGE_GAP)
            axes.imshow(
                np.broadcast_to(image.cpu().movedim(0, -1).numpy(), (*image.shape[1:], 3)),
                extent=(x, x + wide, y, y + _IMAGE),
                interpolation="nearest",
            )
        y -= _IMAGE_GAP
    axes.set(xlim=(0, width), ylim=(0, top), aspect="auto")
    return figure


def labelled_points(
    points: Float[Tensor, "points 2"],
    panels: Sequence[tuple[str, Int[Tensor, "points"], Float[Tensor, "centers 2"]]],
    columns: int = 2,
) -> Figure:
    """Draw the same points several times, colored by labels.

    Args:
        points: on the plane.
        panels: (title, label of each point, from 0, and centers, drawn as crosses). Of more labels
            than colors there are, some share one.
        columns: panels in a row.
    """
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 4.2 * rows), layout="constrained")
    for number, (title, labels, centers) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        _style(axes, title)
        axes.set_aspect("equal", adjustable="datalim")
        colors = [_COLORS[label % len(_COLORS)] for label in labels.tolist()]
        axes.scatter(*points.cpu().numpy().T, s=4, c=colors, linewidths=0)
        axes.plot(*centers.cpu().numpy().T, "x", color=INK, markersize=8, markeredgewidth=2)
    return figure


def paths(
    points: Float[Tensor, "points 2"],
    panels: Sequence[tuple[str, Sequence[Sequence[Sequence[float]]]]],
) -> Figure:
    """Draw ways across a cloud of points: a ring where each begins, a cross where it ends.

    Args:
        points: on the plane.
        panels: side by side, (title, of each way its points in order).
    """
    figure = Figure(figsize=(4.2 * len(panels), 4.2), layout="constrained")
    for panel, (title, ways) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), panel)
        _style(axes, title)
        axes.set_aspect("equal", adjustable="datalim")
        axes.scatter(*points.cpu().numpy().T, s=4, color="#c9ced3", linewidths=0)
        for number, way in enumerate(ways):
            color = _COLORS[number % len(_COLORS)]
            x, y = zip(*way, strict=True)
            axes.plot(x, y, color=color, linewidth=1.4, marker=".", markersize=3)
            axes.plot(x[:1], y[:1], "o", color=color, markersize=9, fillstyle="none")
            axes.plot(x[-1:], y[-1:], "x", color=color, markersize=9, markeredgewidth=2.4)
    return figure
