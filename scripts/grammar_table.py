"""What grammars and ways to train them reach on one set of sentences: a table.

    python scripts/grammar_table.py
    python scripts/grammar_table.py --data treebank --max-length 20 --rows marginal,gflownet
    python scripts/grammar_table.py --experiments grammar_ncfg --m-steps 1000 model.rank=64

A row is an experiment (conf/experiment/grammar_*.yaml) with a posterior: `marginal` climbs log p(x)
itself, `exact_sampling` log p(x, z) on draws of the exact posterior, `mcem` on Markov chains, and
`gflownet` on draws of q. Runs that are complete are not run again, so that it goes on where it was
stopped; they are known by data, longest sentence, M-steps, row and seed, and overrides, which go to
all runs, want a folder of their own (--runs).

Of each run's best checkpoint on validation data, on test data, mean and standard deviation over
seeds. Nats are exact; where they are behind a "≤" the likelihood is intractable and they are the
bound of so many importance-weighted draws. F1 is of the minimum-Bayes-risk trees of 16 draws, of
those of the exact posterior or of one draw; the draws of `mcem` are where chains are after 20
transitions, which is early. Seconds are those of an M-step with its E-step, as the clock on the
wall saw them; minutes are those of the whole run with all evaluations.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs import TOTAL_SECONDS, Job, column, complete, markdown, seconds_per_step

from gfnem.app.composition import compose
from gfnem.errors import UserError
from gfnem.run.compare import mean_and_deviation, result_texts
from gfnem.run.finished import FinishedRun

POSTERIORS = {
    "marginal": ("posterior=exact",),
    "exact_sampling": ("posterior=exact", "posterior.m_step=sample"),
    # Chains that begin, as all do in evaluations, would take most of the time.
    "mcem": ("posterior=mcmc", "posterior.burn_in=20"),
    "gflownet": ("posterior=gflownet",),
}

NATS, SECONDS, MINUTES = "nats per word", "seconds per M-step", "minutes"
SENTENCE_F1, CORPUS_F1 = "sentence F1", "corpus F1"
RIGHT_EDGE = "right edge, q"
COLUMNS = {
    "M-steps": "train/m_steps",
    NATS: "test/nll_per_token",
    SENTENCE_F1: "test/sentence_f1_mbr",
    CORPUS_F1: "test/corpus_f1_mbr",
    "sentence F1, exact": "test/sentence_f1_exact_mbr",
    "sentence F1, one draw": "test/sentence_f1",
    "distinct trees, q": "test/distinct_trees",
    "distinct trees, exact": "test/distinct_exact_trees",
    RIGHT_EDGE: "test/right_edge",
    "right edge, exact": "test/right_exact_edge",
    "posterior gap": "test/posterior_gap",
    SECONDS: "",
    MINUTES: "",
}
"""Column -> the number in a run's summary, where it is one."""

BOUND, BOUND_DRAWS = "test/iw_nll_per_token", "test/iw_samples"
# What is beside the runs: the number in their summaries for each column.
BESIDE = {
    f"{shown} trees": {
        SENTENCE_F1: f"baseline/{name}_f1",
        CORPUS_F1: f"baseline/{name}_corpus_f1",
    }
    for name, shown in {
        "left": "left-branching",
        "right": "right-branching",
        "random": "random",
    }.items()
} | {"gold trees": {RIGHT_EDGE: "baseline/gold_right_edge"}}


@dataclass(frozen=True)
class TableJob(Job):
    """A run of the table."""

    experiment: str
    posterior: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="gum", help="treebank, gum, ptb or another option")
    parser.add_argument("--max-length", type=int, default=15, help="words of a sentence")
    parser.add_argument("--experiments", default="grammar_cfg,grammar_ncfg")
    parser.add_argument("--rows", default=",".join(POSTERIORS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--m-steps", type=int, help="those of the experiments by default")
    parser.add_argument("--runs", type=Path, default=Path("runs/grammar_table"))
    parser.add_argument(
        "--out", type=Path, help="scripts/results/grammar_DATA_LENGTH.md by default"
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)
    unknown = [row for row in given.rows.split(",") if row not in POSTERIORS]
    if unknown:
        parser.error(f"--rows {','.join(unknown)}: choose of {', '.join(POSTERIORS)}")
    try:
        jobs = list(all_jobs(given))
    except UserError as error:
        parser.error(str(error))
    # The dearest runs of a seed come first, so that no process waits long for the last.
    if not complete(jobs[::-1], given.processes):
        return 1
    name = f"grammar_{given.data}_{given.max_length}.md"
    out = given.out or Path(__file__).parent / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"data={given.data} data.max_length={given.max_length}\n\n{table(jobs)}")
    print(f"written to {out}")
    return 0


def all_jobs(given: argparse.Namespace) -> Iterator[TableJob]:
    """Seeds come last: a table that is stopped has some of all rows' seeds."""
    base = [f"data={given.data}", f"data.max_length={given.max_length}", *given.overrides]
    if given.m_steps is not None:
        base.append(f"em.m_steps={given.m_steps}")
    for seed in given.seeds.split(","):
        for experiment in given.experiments.split(","):
            for posterior in given.rows.split(","):
                choices = [f"experiment={experiment}", *POSTERIORS[posterior], *base]
                choices.append(f"seed={seed}")
                m_steps = compose(choices).em.m_steps
                folder = f"{given.data}_{given.max_length}", f"{experiment}_{m_steps}", posterior
                directory = given.runs.joinpath(*folder, seed)
                yield TableJob(tuple(choices), directory, experiment, posterior)


def table(jobs: Sequence[TableJob]) -> str:
    rows: dict[tuple[str, str], list[FinishedRun]] = {}
    for job in jobs:
        run = job.finished()
        assert run is not None
        rows.setdefault((job.experiment, job.posterior), []).append(run)
    numbers = [[numbers_of(run) for run in runs] for runs in rows.values()]
    columns = {name: texts(name, numbers) for name in COLUMNS}
    lines = [
        [experiment, posterior, str(len(runs)), *(columns[name][i] for name in COLUMNS)]
        for i, ((experiment, posterior), runs) in enumerate(rows.items())
    ]
    (*_, any_runs) = rows.values()
    head = ["grammar", "training", "seeds", *COLUMNS]
    return markdown(head, [*lines, *beside(any_runs)], texts=2)


def numbers_of(run: FinishedRun) -> Mapping[str, float]:
    """The run's number in each column; those that it lacks are left out."""
    found = {name: run.numbers[key] for name, key in COLUMNS.items() if key in run.numbers}
    if NATS not in found and BOUND in run.numbers:
        found |= {NATS: run.numbers[BOUND], BOUND_DRAWS: run.numbers[BOUND_DRAWS]}
    found[MINUTES] = run.numbers[TOTAL_SECONDS] / 60
    found[SECONDS] = seconds_per_step(run, "train/m_steps")
    return found


def texts(name: str, rows: Sequence[Sequence[Mapping[str, float]]]) -> list[str]:
    """A column's cells."""
    cells = column(name, rows)
    if name == NATS:
        bounds = [seeds[0].get(BOUND_DRAWS) for seeds in rows]
        cells = [
            cell if draws is None else f"≤ {cell} (K = {draws:.0f})"
            for cell, draws in zip(cells, bounds, strict=True)
        ]
    return cells


def beside(runs: Sequence[FinishedRun]) -> Iterator[list[str]]:
    """Rows of trees that take no notice of the words, and of the gold trees."""
    for shown, keys in BESIDE.items():
        results = {
            column: mean_and_deviation([run.numbers.get(key, math.nan) for run in runs])
            for column, key in keys.items()
        }
        cells = (
            result_texts([results[column]])[0] if column in results else "" for column in COLUMNS
        )
        yield [shown, "", "", *cells]


if __name__ == "__main__":
    sys.exit(main())
