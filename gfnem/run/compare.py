"""Runs beside each other: `gfnem compare`."""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gfnem.errors import UserError
from gfnem.run.checkpoint import atomic_write
from gfnem.run.finished import FinishedRun, finished_runs
from gfnem.run.paired import Differences
from gfnem.run.patterns import patterns_for
from gfnem.run.settings import differences, settings_of
from gfnem.run.shown import csv_cell, markdown_cell, printable
from gfnem.run.tracking import FilesTracker, Tracker, id_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

METRICS = ("test/*", "train/m_steps", "time/seconds")
"""What is compared by default, of what all runs have."""

Result = tuple[float, float]
"""Mean and standard deviation (n - 1) over seeds, NaN for one seed."""


def compare(
    places: Sequence[str],
    project: str | None = None,
    metrics: str | None = None,
    out: str = "comparison",
    tracker: Tracker | None = None,
    reach: str | None = None,
) -> None:
    """Put runs beside each other: print a table, and write it to a folder with curves.

    Args:
        places: directories of runs, folders that hold some at any depth, or patterns of both.
        project: runs of this project of Weights & Biases, ENTITY/PROJECT, come in addition.
        metrics: patterns of names, comma-separated; by default the results on test data that all
            runs have, M-steps and seconds.
        out: the folder of table.md, table.csv and curves.png, which replace those of before. Where
            settings have scores of the same test sentences for one of the metrics, differences.md
            and differences.csv say how much they differ, with intervals; see `Differences`.
        tracker: who is told of the comparison beside the files, as of a run of its own.
        reach: a further column says after how many steps this held first, as in
            `valid/posterior_gap<0.1`; see `Target`.

    Raises:
        UserError: a place holds no runs, the project cannot be read, no run is complete, a
            pattern fits no metric, `reach` is no target or one of a metric that no run has, or the
            folder holds a run or cannot be written.
    """
    if not places and project is None:
        raise UserError("compare needs folders of runs, DIR DIR ..., or wandb=ENTITY/PROJECT")
    folder = Path(out)
    if (folder / "config.yaml").exists():
        raise UserError(f"out={out} holds a run: name another folder")
    target = None if reach is None else Target.read(reach)
    comparison = Comparison(finished_runs(places, project), metrics, target)
    comparison.show()
    try:
        figure = comparison.write(folder)
    except OSError as error:
        raise UserError(f"out={out} cannot be written ({error.strerror}): name another") from None
    print(f"written to {folder}")
    tracker = tracker or FilesTracker()
    id_file(folder).unlink(missing_ok=True)  # made again, it is another run of the service
    names = [run.name for row in comparison.rows for run in row]
    tracker.start(folder, {"compare": names, "metrics": comparison.metrics})
    tracker.table("comparison", *comparison.numbers())
    if comparison.differences.rows:
        tracker.table("differences", *comparison.difference_numbers())
    if figure is not None:
        tracker.figure("curves", figure)
    tracker.finish("finished")


@dataclass(frozen=True)
class Target:
    """A value of a metric, to be reached from above or from below.

    Steps are M-steps, or E-steps where the model did not move.
    """

    metric: str
    falling: bool
    value: float

    @classmethod
    def read(cls, text: str) -> Target:
        """Of NAME<VALUE or NAME>VALUE. Raises UserError for anything else."""
        parts = re.fullmatch(r"([^<>]+)([<>])([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", text)
        if parts is None:
            raise UserError(
                f"reach={text} is not of the form NAME<VALUE or NAME>VALUE, as in "
                "'reach=valid/posterior_gap<0.1'"
            )
        return cls(parts[1], parts[2] == "<", float(parts[3]))

    def __str__(self) -> str:
        return f"steps to {self.metric}{'<' if self.falling else '>'}{self.value:g}"

    def steps(self, run: FinishedRun) -> float | None:
        """Steps of the first line where it is reached; infinite where it never is, None where the
        run has no such metric.
        """
        lines = [line for line in run.lines if self.metric in line]
        if not lines:
            return None
        counter = "train/m_steps" if run.numbers.get("train/m_steps") else "train/e_steps"
        sign = 1 if self.falling else -1
        reached = (line[counter] for line in lines if sign * (line[self.metric] - self.value) < 0)
        return next(reached, math.inf)


class Comparison:
    """A table of settings and their results.

    Attributes:
        rows: the runs of each setting, one for each seed.
        settings: what differs between the rows: name -> the value in each row, or "".
        metrics: names of the results.
        differences: of settings on the same sentences, of those results that have scores of each.

    Args:
        runs: those to compare. Of several with the same configuration and seed the first counts,
            the others are named on standard error.
        patterns: as in `compare`.
        target: what is to be reached; adds a column.

    Raises:
        UserError: a pattern fits no metric, or no run has the target's.
    """

    def __init__(
        self,
        runs: Sequence[FinishedRun],
        patterns: str | None = None,
        target: Target | None = None,
    ) -> None:
        settings = settings_of([run.config for run in runs])
        self.rows = [_one_of_each_seed([runs[i] for i in setting.runs]) for setting in settings]
        self.settings = differences([setting.options for setting in settings])
        runs = [run for row in self.rows for run in row]
        if patterns is None:
            shared = (n for n in runs[0].numbers if all(n in run.numbers for run in runs))
            details = set(_matching(runs[0].numbers, _patterns(runs, "details")))
            self.metrics = [n for n in _matching(shared, METRICS) if n not in details]
            self.curves = self._usual_curves()
        else:
            self.metrics = _chosen(runs, patterns.split(","))
            # The curve of a final number has the name of its split alone.
            bare = (re.sub("^(last/)?(test|valid)/", "", name) for name in self.metrics)
            names = dict.fromkeys(f"valid/{name}" for name in bare)
            self.curves = [name for name in names if self._rows_with_curve(name)]
        scores = [[run.scores for run in row] for row in self.rows]
        self.differences = Differences(scores, self.labels(), self.metrics)
        if target is not None:
            self._add(target)

    def _add(self, target: Target) -> None:
        """A column that says when the target was reached."""
        steps = [[target.steps(run) for run in row] for row in self.rows]
        if all(known is None for row in steps for known in row):
            raise UserError(f"no run has a curve of {target.metric}: see their metrics.jsonl")
        name = str(target)
        self.metrics.append(name)
        self.rows = [
            [
                run if known is None else replace(run, numbers={**run.numbers, name: known})
                for run, known in zip(row, known_of_row, strict=True)
            ]
            for row, known_of_row in zip(self.rows, steps, strict=True)
        ]

    def result(self, row: int, metric: str) -> Result | None:
        """What the seeds of a row have of a metric; None where none has it.

        A number that one of them lacks, or that is not finite, leaves the others without a mean;
        infinitely many steps are their mean, too.
        """
        runs = self.rows[row]
        if all(metric not in run.numbers for run in runs):
            return None
        return mean_and_deviation([run.numbers.get(metric, math.nan) for run in runs])

    def texts(self) -> tuple[list[str], list[list[str]]]:
        """The table for people: its columns and its rows."""
        cells = {name: [value or "–" for value in shown] for name, shown in self.settings.items()}
        cells["seeds"] = [str(len(row)) for row in self.rows]
        for metric in self.metrics:
            results = [self.result(row, metric) for row in range(len(self.rows))]
            cells[metric] = result_texts(results)
        return list(cells), [list(row) for row in zip(*cells.values(), strict=True)]

    def numbers(self) -> tuple[list[str], list[list[str | float]]]:
        """The table for programs: its columns and its rows, with a column for each deviation."""
        columns = [*self.settings, "seeds"]
        columns += [f"{metric}{end}" for metric in self.metrics for end in ("", " sd")]
        rows: list[list[str | float]] = []
        for number, row in enumerate(self.rows):
            cells: list[str | float] = [shown[number] for shown in self.settings.values()]
            cells.append(len(row))
            for metric in self.metrics:
                result = self.result(number, metric) or ("", "")
                cells += ["" if value != value else value for value in result]  # NaN
            rows.append(cells)
        return columns, rows

    def labels(self) -> list[str]:
        """A name for each row."""
        if not self.settings:
            (row,) = self.rows
            return [f"{len(row)} seeds" if len(row) > 1 else row[0].name]
        labels = []
        for row in range(len(self.rows)):
            values = {name: shown[row] for name, shown in self.settings.items()}
            told = {name: value for name, value in values.items() if value}
            told = told or dict.fromkeys(values, "–")
            labels.append(", ".join(f"{name}={value}" for name, value in told.items()))
        return labels

    def difference_texts(self) -> tuple[list[str], list[list[str]]]:
        """The table of differences for people: its columns and its rows."""
        metrics = self.differences.metrics
        rows = [
            [
                *(shown[number] or "–" for shown in self.settings.values()),
                *(str(row.get(metric, "–")) for metric in metrics),
            ]
            for number, row in self.differences.rows.items()
        ]
        return [*self.settings, *metrics], rows

    def difference_numbers(self) -> tuple[list[str], list[list[str | float]]]:
        """The same for programs, with two columns for each interval."""
        metrics = self.differences.metrics
        columns = [*self.settings]
        columns += [f"{metric}{end}" for metric in metrics for end in ("", " low", " high")]
        rows: list[list[str | float]] = []
        for number, row in self.differences.rows.items():
            cells: list[str | float] = [shown[number] for shown in self.settings.values()]
            for metric in metrics:
                known = row.get(metric)
                cells += [known.mean, known.low, known.high] if known else ["", "", ""]
            rows.append(cells)
        return columns, rows

    @property
    def difference_title(self) -> str:
        first = self.labels()[self.differences.first]
        return f"differences to {first}, with 95 % intervals over sentences"

    def markdown(self) -> str:
        return _markdown(*self.texts(), len(self.settings))

    def figure(self) -> Figure | None:
        """Curves of all rows, over M-steps and over seconds; None where there are none."""
        if not self.curves:
            return None
        from gfnem.run.plots import banded_curves

        trained = any(run.numbers.get("train/m_steps") for row in self.rows for run in row)
        # Where posteriors of fixed models are rated, there are no M-steps.
        count = {"train/m_steps": "M-steps"} if trained else {"train/e_steps": "E-steps"}
        lines = ([run.lines for run in row] for row in self.rows)
        # A dollar would begin a formula.
        labels = (printable(label).replace("$", r"\$") for label in self.labels())
        curves = dict(zip(labels, lines, strict=True))
        return banded_curves(curves, self.curves, {**count, "time/seconds": "seconds"})

    def write(self, folder: Path) -> Path | None:
        """Write the files of `compare`; returns the path of the figure where there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        files = {"table.md": self.markdown(), "table.csv": _csv(*self.numbers())}
        if self.differences.rows:
            table = _markdown(*self.difference_texts(), len(self.settings))
            files["differences.md"] = f"{self.difference_title}:\n\n{table}"
            files["differences.csv"] = _csv(*self.difference_numbers())
        for name in ("differences.md", "differences.csv"):
            (folder / name).unlink(missing_ok=True)
        for name, content in files.items():
            with atomic_write(folder / name) as file:
                file.write(content.encode())
        figure, path = self.figure(), folder / "curves.png"
        if figure is None:
            path.unlink(missing_ok=True)
            return None
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=150)
        return path

    def show(self) -> None:
        """Print the table, and that of differences where there is one."""
        _show(*self.texts())
        if self.differences.rows:
            print(f"\n{self.difference_title}:")
            _show(*self.difference_texts())

    def _usual_curves(self) -> list[str]:
        runs = [run for row in self.rows for run in row]
        names = dict.fromkeys(name for run in runs for line in run.lines for name in line)
        found = (_matching(names, (pattern,)) for pattern in _patterns(runs, "curves"))
        chosen = (max(some, key=self._rows_with_curve) for some in found if some)
        return list(dict.fromkeys(chosen))

    def _rows_with_curve(self, name: str) -> int:
        return sum(any(name in line for run in row for line in run.lines) for row in self.rows)


def mean_and_deviation(values: Sequence[float]) -> Result:
    if len(values) == 1:
        return values[0], math.nan
    if len(set(values)) == 1:  # without the rounding of a mean
        return values[0], 0.0
    with np.errstate(invalid="ignore"):
        return float(np.mean(values)), float(np.std(values, ddof=1))


def _one_of_each_seed(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    kept: dict[str, FinishedRun] = {}
    for run in runs:
        # Runs without a seed are not known to be the same.
        first = kept.setdefault(repr(run.config.get("seed", run.name)), run)
        if first is not run:
            print(
                f"left out: {printable(run.name)} repeats {printable(first.name)}, with the same "
                "configuration and seed",
                file=sys.stderr,
            )
    return list(kept.values())


def _patterns(runs: Sequence[FinishedRun], purpose: str) -> list[str]:
    """Those of all runs; see `patterns_for`."""
    return list(dict.fromkeys(p for run in runs for p in patterns_for(run.config, purpose)))


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that fit, in the order of the patterns."""
    names = list(names)
    fitting = (name for pattern in patterns for name in names if fnmatchcase(name, pattern))
    return list(dict.fromkeys(fitting))


def _chosen(runs: Sequence[FinishedRun], patterns: Sequence[str]) -> list[str]:
    names = dict.fromkeys(name for run in runs for name in run.numbers)
    for pattern in patterns:
        if not _matching(names, (pattern,)):
            example = next(name for name in names if name.startswith("test/"))
            raise UserError(
                f"metrics={pattern} fits no metric: the names are those of summary.json, such as "
                f"{example}, and last/valid/... for the last evaluation"
            )
    return _matching(names, patterns)


def result_texts(results: Sequence[Result | None]) -> list[str]:
    """The results of a column, with as many decimals as its usual deviation has meaning for."""
    known = [result for result in results if result is not None and math.isfinite(result[0])]
    deviations = [deviation for _, deviation in known if deviation > 0]
    if deviations:
        decimals = 1 - math.floor(math.log10(np.median(deviations)))
    elif all(float(mean).is_integer() for mean, _ in known):
        decimals = 0
    else:
        decimals = 3 - math.floor(math.log10(max(abs(mean) for mean, _ in known)))
    decimals = min(max(decimals, 0), 4)
    texts = []
    for result in results:
        if result is None:
            texts.append("–")
            continue
        mean, deviation = result
        text = f"{mean:.{decimals}f}"
        texts.append(f"{text} ± {deviation:.{decimals}f}" if deviation > 0 else text)
    return texts


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """A table in Markdown whose first columns, `words` of them, have words in place of numbers."""
    lines = [columns, ["---"] * words + ["---:"] * (len(columns) - words), *rows]
    return "".join(f"| {' | '.join(map(markdown_cell, line))} |\n" for line in lines)


def _csv(columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    text = io.StringIO()
    cells = (
        [cell if isinstance(cell, float) else csv_cell(str(cell)) for cell in line]
        for line in (columns, *rows)
    )
    csv.writer(text, lineterminator="\n").writerows(cells)
    return text.getvalue()


def _show(columns: list[str], rows: list[list[str]]) -> None:
    """Print a table: rows as lines, or as columns on a terminal that is too narrow."""
    lines = [[printable(cell) for cell in line] for line in (columns, *rows)]
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print("  ".join(cells).rstrip())
        return
    from rich.console import Console

    console = Console()
    table = _rich(lines)
    unbounded = console.options.update(max_width=sys.maxsize)
    if console.measure(table, options=unbounded).maximum > console.width:
        table = _rich([list(column) for column in zip(*lines, strict=True)])
    console.print(table)


def _rich(lines: Sequence[Sequence[str]]) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    head, *rows = lines
    table = Table(box=SIMPLE, header_style="bold")
    for name in head:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
