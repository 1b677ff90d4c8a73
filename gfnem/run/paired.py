"""What settings differ by on the same sentences, from runs' tables of each sentence's scores."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from gfnem import bootstrap
from gfnem.errors import UserError

Sentences = tuple[tuple[str, str], ...]
"""Number and words of each, by which tables are known to be of the same test."""

KEY = ["sentence", "words"]
"""The first columns of a table; the others have scores."""


@dataclass(frozen=True)
class Scored:
    """Some sentences and a score of each."""

    sentences: Sentences
    values: Float[np.ndarray, "sentences"]


Scores = Mapping[str, Scored]
"""Scores by the name of the metric that is their mean, test/..."""


@dataclass(frozen=True)
class Difference:
    """Of two settings' means over sentences: itself and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def read_scores(run: Path) -> dict[str, Scored]:
    """Read the tables `scores_TEST.csv` in a run's directory.

    Raises UserError for one that is broken.
    """
    found = {}
    for path in sorted((run / "tables").glob("scores_*.csv")):
        try:
            with path.open(newline="") as file:
                columns, *rows = csv.reader(file)
            if columns[:2] != KEY:
                raise ValueError
            sentences = tuple((number, words) for number, words, *_ in rows)
            values = np.array([row[2:] for row in rows], dtype=float)
            for name, column in zip(columns[2:], values.T, strict=True):
                found[f"{path.stem.removeprefix('scores_')}/{name}"] = Scored(sentences, column)
        except ValueError:
            raise UserError(f"{path} is no table of scores: restore or remove it") from None
    return found


class Differences:
    """Each setting's difference to the first that has scores.

    Of every sentence the mean over a setting's seeds is taken; intervals are over sentences alone,
    by the paired bootstrap, and say nothing of other seeds.

    Settings whose runs have not all scores of the same sentences, and those that have them of other
    sentences than the first setting, are named on standard error and left out.

    Args:
        settings: the scores of each setting's runs.
        labels: of the settings, for messages.
        metrics: of which there are to be differences, where there are scores.

    Attributes:
        first: the number of the setting that others are compared to.
        rows: number of a setting -> its differences by metric. Empty where fewer than two settings
            can be compared.
    """

    def __init__(
        self, settings: Sequence[Sequence[Scores]], labels: Sequence[str], metrics: Sequence[str]
    ) -> None:
        self.first = 0
        self.rows: dict[int, dict[str, Difference]] = {}
        scored = [number for number, runs in enumerate(settings) if any(runs)]
        if len(scored) < 2:
            return
        means = {number: _means(settings[number], metrics) for number in scored}
        comparable = [number for number in scored if means[number]]
        for number in sorted(set(scored) - set(comparable)):
            _left_out(f"{labels[number]}, whose runs have no scores of the same sentences")
        if not comparable:
            return
        self.first, *others = comparable
        for number in others:
            differences = _differences(means[self.first], means[number])
            if differences:
                self.rows[number] = differences
            else:
                _left_out(f"{labels[number]}, with other sentences than {labels[self.first]}")

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))


def _means(runs: Sequence[Scores], metrics: Sequence[str]) -> dict[str, Scored]:
    """Means over a setting's runs, of what all have of the same sentences."""
    means = {}
    for name in metrics:
        of_runs = [run[name] for run in runs if name in run]
        if len(of_runs) == len(runs) and len({scored.sentences for scored in of_runs}) == 1:
            values = np.mean([scored.values for scored in of_runs], axis=0)
            means[name] = Scored(of_runs[0].sentences, values)
    return means


def _differences(first: Scores, other: Scores) -> dict[str, Difference]:
    """By how much the other is above the first, where both are of the same sentences."""
    found = {}
    for name, scored in other.items():
        if name in first and first[name].sentences == scored.sentences:
            above = scored.values - first[name].values
            low, high = bootstrap.mean_interval(above[:, None])
            found[name] = Difference(float(above.mean()), float(low[0]), float(high[0]))
    return found


def _left_out(what: str) -> None:
    print(f"left out of the differences: {what}", file=sys.stderr)
