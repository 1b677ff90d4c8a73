"""How soon policies fit grammars that do not move: the posterior gap against seconds of training.

    python scripts/policies_study.py
    python scripts/policies_study.py --runs FOLDER --out FOLDER --seconds 60 threads=1

Grammars, context-free and with rules that see the parent, are trained exactly on the treebank
sample, sentences of up to 10 and up to 20 words, and then stay as they are (`model_from`). Every
policy trains for the same CPU time on each; evaluations do not count. What is complete is not done
again. It ends in policies.md and policies.png. Overrides go to all runs.

The gap is exact, in nats for each validation sentence. Distinct trees are those among 16 draws for
sentences of 8 words or more, of the policy at the end and of the exact posterior.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from jobs import INTERRUPTED, Job, markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gfnem.app.build import build
from gfnem.app.composition import compose
from gfnem.errors import UserError

# The grammars and how they are trained.
MODELS = {
    "cfg": ("model=pcfg", "model.nonterminals=29", "model.preterminals=60", "em.m_steps=600"),
    "ncfg": ("model=ncfg", "model.nonterminals=12", "model.preterminals=24", "em.m_steps=600"),
}
LENGTHS = (10, 20)
# The policies of each. The chart of a context-free grammar is exact; that of another tells clusters
# of parents apart or sees none.
OF_ALL = {
    "chart": ("policy=chart", "policy.guide=relaxation"),
    "chart-unguided": ("policy=chart", "policy.guide=none"),
    "root-flow": ("policy=root_flow",),
    "light": ("policy=light",),
    "transformer": ("policy=transformer",),
}
POLICIES = {
    "cfg": OF_ALL,
    "ncfg": OF_ALL | {"chart-context-free": ("policy=chart", "policy.clusters=1")},
}
COLORS = {
    "chart": "#1f6fb4",
    "chart-context-free": "#0b3c66",
    "chart-unguided": "#6db3e8",
    "root-flow": "#d1601f",
    "light": "#3a8f4d",
    "transformer": "#8a4fb0",
}

# Seconds after which the gap is measured, and those that the table shows.
MEASURED = (0, 1, 2, 5, 10, 20, 30, 45, 60, 90, 120)
SHOWN = (0, 10, 30, 60, 120)

GAP, DISTINCT, EXACT = (
    f"valid/{name}" for name in ("posterior_gap", "distinct_trees", "distinct_exact_trees")
)


@dataclass(frozen=True)
class Trained(Job):
    """A grammar to be trained exactly.

    options: of its model and data, without those of its training.
    """

    model: str
    length: int
    options: tuple[str, ...]

    @staticmethod
    def of(model: str, length: int, overrides: Sequence[str], directory: Path) -> Trained:
        kind, *sizes, m_steps = MODELS[model]
        options = (kind, *sizes, f"data.max_length={length}")
        run = ("experiment=treebank", "posterior=exact", *options, m_steps, *overrides)
        return Trained(run, directory, model, length, options)


@dataclass(frozen=True)
class Rated:
    """A policy to be trained on a grammar that stays as it is."""

    grammar: Trained
    policy: str
    seconds: int
    overrides: tuple[str, ...]
    file: Path

    @property
    def points(self) -> list[float]:
        """Seconds after which the gap is measured."""
        return [point for point in MEASURED if point <= self.seconds]

    def results(self) -> list[dict[str, float]]:
        """Metrics after the seconds of `points`, as far as there are any."""
        lines = json.loads(self.file.read_text()) if self.file.exists() else []
        return [line for line in lines if line["seconds"] <= self.seconds]

    def finished(self) -> list[dict[str, float]] | None:
        """What it left; None where it is not complete."""
        results = self.results()
        return results if [line["seconds"] for line in results] == self.points else None

    def train(self) -> str | None:
        """Returns why it is not complete; None where it is."""
        try:
            built = build(
                compose(
                    [
                        "experiment=rate_posterior",
                        f"model_from={self.grammar.directory}",
                        "em.clock=cpu",
                        "evaluator.iw_samples=16",
                        *self.grammar.options,
                        *POLICIES[self.grammar.model][self.policy],
                        *self.overrides,
                    ]
                )
            )
        except UserError as error:
            return str(error)
        em, evaluator = built.em, built.em.rating.evaluator
        lines = []
        for point in self.points:
            if point:
                # The clock stands still between one fit and the next.
                em.rating.evaluator, em.limits.seconds = None, point
                em.fit()
                if em.stopped:
                    return INTERRUPTED
            em.rating.evaluator = evaluator
            # Draws of the exact posterior cost much and never change.
            rated = em.evaluate("valid", final=point == self.points[-1])
            kept = {name: rated[name] for name in (GAP, DISTINCT, EXACT) if name in rated}
            lines.append({"seconds": point, "e_steps": em.done.e_steps, **kept})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(lines, indent=1))
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/policies"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=int, default=MEASURED[-1])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)
    overrides = tuple(given.overrides)
    grammars = [
        Trained.of(model, length, overrides, given.runs / f"{model}_{length}" / "exact")
        for model in MODELS
        for length in LENGTHS
    ]
    rated = [
        Rated(
            grammar, policy, given.seconds, overrides, grammar.directory.parent / f"{policy}.json"
        )
        for grammar in grammars
        for policy in POLICIES[grammar.model]
    ]
    with ProcessPoolExecutor(given.processes, get_context("spawn")) as pool:
        for what, jobs in (("grammars", grammars), ("policies", rated)):
            if not done(pool, what, jobs):
                return 1
    results = {(r.grammar.model, r.grammar.length, r.policy): r.results() for r in rated}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "policies.md").write_text(table(results))
    figure(results).savefig(given.out / "policies.png", dpi=130)
    print(f"written to {given.out}: policies.md, policies.png")
    return 0


def done(pool: Executor, what: str, jobs: Sequence[Trained | Rated]) -> bool:
    """Do what is missing; whether all is complete then."""
    missing = [job for job in jobs if job.finished() is None]
    print(f"{len(jobs)} {what}, {len(missing)} of them to be trained", flush=True)
    for number, problem in enumerate(pool.map(train, missing), 1):
        print(f"{number} of {len(missing)}", flush=True)
        if problem is not None:
            print(f"{problem}; start again to go on", file=sys.stderr)
            pool.shutdown(cancel_futures=True)
            return False
    return True


def train(job: Trained | Rated) -> str | None:
    return job.train()


Results = Mapping[tuple[str, int, str], Sequence[Mapping[str, float]]]
"""Model, length and policy -> metrics after some seconds."""


def table(results: Results) -> str:
    seconds = [line["seconds"] for line in next(iter(results.values()))]
    shown = [second for second in seconds if second in SHOWN]
    head = ["grammar", "words", "policy", *(f"gap, {second} s" for second in shown)]
    head += ["distinct trees", "exact", "E-steps"]
    rows = []
    for (model, length, policy), lines in results.items():
        gaps = [f"{line[GAP]:.2f}" for line in lines if line["seconds"] in shown]
        last = lines[-1]
        trees = [f"{last[name]:.1f}" for name in (DISTINCT, EXACT)]
        rows.append([model, f"to {length}", policy, *gaps, *trees, f"{last['e_steps']:,}"])
    return markdown(head, rows, texts=3)


def figure(results: Results) -> Figure:
    """A row of panels for each length, a column for each model, a line for each policy."""
    models = list(dict.fromkeys(model for model, _, _ in results))
    lengths = list(dict.fromkeys(length for _, length, _ in results))
    drawn = Figure(figsize=(4.5 * len(models), 3.2 * len(lengths)), layout="constrained")
    grid = drawn.subplots(len(lengths), len(models), sharex=True, squeeze=False)
    for row, length in zip(grid, lengths, strict=True):
        for axes, model in zip(row, models, strict=True):
            panel(axes, model, length, results)
    for axes in grid[-1]:
        axes.set_xlabel("CPU seconds of training")
    for axes in grid[:, 0]:
        axes.set_ylabel("posterior gap, nats")
    lines = {line.get_label(): line for axes in grid.flat for line in axes.lines}
    lines = {policy: lines[policy] for policy in COLORS if policy in lines}
    drawn.legend(lines.values(), lines, loc="outside lower left", ncols=len(lines), frameon=False)
    return drawn


def panel(axes: Axes, model: str, length: int, results: Results) -> None:
    axes.set_title(f"{model}, to {length} words", loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    # Logarithmic, but for gaps of about nothing.
    axes.set_yscale("symlog", linthresh=0.1)
    axes.axhline(0, color="#aaaaaa", linewidth=0.8)
    for (of_model, of_length, policy), lines in results.items():
        if (of_model, of_length) == (model, length):
            axes.plot(
                [line["seconds"] for line in lines],
                [line[GAP] for line in lines],
                "o-",
                color=COLORS[policy],
                markersize=3,
                label=policy,
            )


if __name__ == "__main__":
    sys.exit(main())
