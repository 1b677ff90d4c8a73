"""Objectives of the E-step and ways to draw its trajectories, on models that do not move.

    python scripts/objectives_study.py
    python scripts/objectives_study.py --runs FOLDER --out FOLDER objective=tb,vargrad seed=0,1

Every objective, on-policy and, where it can, tempered and with uniform actions mixed in, with five
seeds, on a mixture whose posteriors have several modes and on a small grammar (`gfnem --multirun
experiment=objectives` and `experiment=objectives_grammar`). Runs that are complete are not run
again. It ends in objectives.md and objectives.png. Overrides go to all runs.

Of each run's best checkpoint, on test data, exact: KL(p || q), KL(q || p), in nats, and the share
of the posterior's modes that q covers (see gfnem/divergences.py). The gradient's noise (see
gfnem/gradients.py) is measured at the first evaluation, when all are about where they began, and of
the best checkpoint. Steps are E-steps to the first evaluation with a posterior gap below 0.1
nats. Numbers are means and standard deviations over seeds, steps are medians.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jobs import Job, complete, markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gfnem.app.composition import combinations
from gfnem.run.compare import Target

MODELS = {"mixture": "objectives", "grammar": "objectives_grammar"}
ON_POLICY = "on-policy"
OFF_POLICY = {
    "temperature 2": "posterior.behaviour.temperature=2",
    "epsilon 0.1": "posterior.behaviour.epsilon=0.1",
}
# The others need draws of the policy itself, or none.
BALANCES = "objective=tb,subtb,db,fl_db,vargrad,tb_sleep"

GAP = Target("valid/posterior_gap", falling=True, value=0.1)
NOISE = "train/gradient_noise"
FROM_SUMMARY = {
    "KL(p \N{DOUBLE VERTICAL LINE} q)": "test/kl_p_q",
    "KL(q \N{DOUBLE VERTICAL LINE} p)": "test/kl_q_p",
    "modes covered": "test/modes_covered",
}
EARLY, LATE, STEPS = (
    "gradient noise, early",
    "gradient noise, late",
    f"steps to a gap of {GAP.value:g}",
)
LOGARITHMIC = (*list(FROM_SUMMARY)[:2], EARLY)
COLORS = {ON_POLICY: "#1f6fb4", "temperature 2": "#d1601f", "epsilon 0.1": "#3a8f4d"}


@dataclass(frozen=True)
class StudyJob(Job):
    """A run of the study."""

    model: str
    objective: str
    behaviour: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)
    jobs = list(all_jobs(given.runs, given.overrides))
    if not complete(jobs, given.processes):
        return 1
    results = results_of(jobs)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "objectives.md").write_text(table(results))
    figure(results).savefig(given.out / "objectives.png", dpi=130)
    print(f"written to {given.out}: objectives.md, objectives.png")
    return 0


def all_jobs(runs: Path, overrides: Sequence[str]) -> Iterator[StudyJob]:
    for model, experiment in MODELS.items():
        for behaviour in (ON_POLICY, *OFF_POLICY):
            base = [f"experiment={experiment}"]
            if behaviour != ON_POLICY:
                base += [BALANCES, OFF_POLICY[behaviour]]
            for choices in combinations([*base, *overrides]):
                chosen = dict(choice.split("=", 1) for choice in choices)
                name = f"{chosen['objective']} {behaviour} {chosen['seed']}".replace(" ", "_")
                directory = runs / model / name
                yield StudyJob(tuple(choices), directory, model, chosen["objective"], behaviour)


Results = Mapping[tuple[str, str, str], Mapping[str, Sequence[float]]]
"""Model, objective and behaviour -> name of a number -> its value with each seed."""


def results_of(jobs: Sequence[StudyJob]) -> Results:
    results: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for job in jobs:
        run = job.finished()
        assert run is not None
        row = results.setdefault((job.model, job.objective, job.behaviour), {})
        numbers = {name: run.numbers[key] for name, key in FROM_SUMMARY.items()}
        numbers[EARLY] = next(line[NOISE] for line in run.lines if NOISE in line)
        numbers[LATE] = run.numbers[NOISE]
        numbers[STEPS] = GAP.steps(run) or math.inf
        for name, value in numbers.items():
            row.setdefault(name, []).append(value)
    return results


def table(results: Results) -> str:
    names = list(next(iter(results.values())))
    head = ["model", "objective", "trajectories", *names]
    rows = [
        [*setting, *(text(name, np.array(values)) for name, values in numbers.items())]
        for setting, numbers in results.items()
    ]
    return markdown(head, rows, texts=3)


def text(name: str, values: np.ndarray) -> str:
    if name == STEPS:
        reached = int(np.isfinite(values).sum())
        median = float(np.median(values))
        if not reached:
            return "never"
        shown = f"{median:.0f}" if math.isfinite(median) else "never"
        return shown if reached == len(values) else f"{shown} ({reached} of {len(values)})"
    digits = 3 if name in FROM_SUMMARY else 2
    deviation = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def figure(results: Results) -> Figure:
    """A row of panels for each model: objectives below each other, a mark for each behaviour."""
    models = list(dict.fromkeys(model for model, _, _ in results))
    panels = [*FROM_SUMMARY, EARLY, STEPS]
    objectives = list(dict.fromkeys(objective for _, objective, _ in results))
    drawn = Figure(figsize=(14, 0.9 + 0.34 * len(objectives) * len(models)), layout="constrained")
    grid = drawn.subplots(len(models), len(panels), sharey=True, squeeze=False)
    for row, model in zip(grid, models, strict=True):
        for axes, name in zip(row, panels, strict=True):
            panel(axes, model, name, objectives, results)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower left", ncols=len(COLORS), frameon=False)
    return drawn


def panel(axes: Axes, model: str, name: str, objectives: Sequence[str], results: Results) -> None:
    axes.set_title(f"{model}: {name}", loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_yticks(range(len(objectives)), objectives)
    axes.tick_params(which="both", labelsize=7)
    axes.set_ylim(len(objectives) - 0.5, -0.5)
    if name in LOGARITHMIC:
        axes.set_xscale("log")
    for number, (behaviour, color) in enumerate(COLORS.items()):
        found = [
            (place + 0.25 * (number - 1), np.array(results[model, objective, behaviour][name]))
            for place, objective in enumerate(objectives)
            if (model, objective, behaviour) in results
        ]
        for place, values in found:
            finite = values[np.isfinite(values)]
            # Every seed pale, their mean, or the median of steps, on top.
            axes.plot(
                finite, np.full(len(finite), place), "o", color=color, alpha=0.3, markersize=3
            )
        middle = np.median if name == STEPS else np.mean
        axes.plot(
            [middle(values) for _, values in found],
            [place for place, _ in found],
            "D",
            color=color,
            markersize=5,
            label=behaviour,
        )
    if not any(np.isfinite(line.get_xdata()).any() for line in axes.lines):
        axes.set_xticks([])
        axes.text(0.5, 0.5, "never", transform=axes.transAxes, ha="center", fontsize=9)


if __name__ == "__main__":
    sys.exit(main())
