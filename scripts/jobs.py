"""The runs of a study: each in a directory of its own, several at a time, none of them twice."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

from gfnem.app.build import build
from gfnem.app.composition import compose
from gfnem.errors import UserError
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.run import Run
from gfnem.run.compare import mean_and_deviation, result_texts
from gfnem.run.finished import FinishedRun
from gfnem.tasks.grammar.text.corpus import Corpus
from gfnem.tasks.grammar.trees.f1 import SpanCounts
from gfnem.tasks.grammar.trees.tree import Trees
from gfnem.training.parts import Evaluator, Metrics

INTERRUPTED = "interrupted"
RIGHT_BRANCHING = "right-branching trees"
TOTAL_SECONDS = "time/total_seconds"
"""In the summary of a job's run: all of it, the final evaluation too."""


@dataclass(frozen=True)
class Job:
    """A run of a study.

    overrides: as on the command line, run_dir left out.
    """

    overrides: tuple[str, ...]
    directory: Path

    def finished(self) -> FinishedRun | None:
        """What it left; None where it is not complete."""
        try:
            return FinishedRun.read(self.directory)
        except UserError:
            return None

    def train(self) -> str | None:
        """Returns why it is not complete; None where it is."""
        shutil.rmtree(self.directory, ignore_errors=True)
        began = time.monotonic()
        try:
            built = build(compose((*self.overrides, f"run_dir={self.directory}")))
            # A report's figures, one set for each run, would take longer than all else.
            built.em.rating.evaluator = Unreported(built.em.rating.evaluator)
            run = built.em.record.run = Run.create(self.directory, built.config)
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                summary = built.em.fit()
        except UserError as error:
            return str(error)
        if built.em.stopped:
            return INTERRUPTED
        run.write_summary({**summary, TOTAL_SECONDS: time.monotonic() - began})
        return None


class Unreported:
    """An evaluator that draws no figures."""

    def __init__(self, evaluator: Evaluator | None):
        assert evaluator is not None
        self.evaluator = evaluator
        self.selection = evaluator.selection

    def __call__(
        self, model: LatentVariableModel, posterior: Posterior, split: str, final: bool = False
    ) -> Metrics:
        return self.evaluator(model, posterior, split, final)

    def report(self, model: LatentVariableModel, posterior: Posterior, run: Run) -> None:
        """Nothing."""


def complete(jobs: Sequence[Job], processes: int) -> bool:
    """Run those that are not complete; whether all are then. Problems go to standard error.

    processes: at a time; 1 for this one alone.
    """
    missing = [job for job in jobs if job.finished() is None]
    print(f"{len(jobs)} runs, {len(missing)} of them to be done", flush=True)
    problems = 0
    for number, (job, problem) in enumerate(_trained(missing, processes), 1):
        print(f"{number} of {len(missing)}: {' '.join(job.overrides)}", flush=True)
        if problem is not None:
            problems += 1
            print(f"{job.directory}: {problem}", file=sys.stderr)
            if problem == INTERRUPTED:
                break
    if problems:
        print("some runs are missing; start again to go on", file=sys.stderr)
    return problems == 0


def _trained(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, str | None]]:
    if processes == 1:
        for job in jobs:
            yield job, job.train()
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"))
    try:
        yield from zip(jobs, pool.map(_train, jobs), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _train(job: Job) -> str | None:
    return job.train()


def seconds_per_step(run: FinishedRun, counter: str) -> float:
    """The median over all logged lines: between two there may be an evaluation, but not between
    most.

    counter: "train/m_steps" or "train/e_steps".
    """
    lines = [line for line in run.lines if "time/seconds" in line]
    return median(
        (after["time/seconds"] - before["time/seconds"]) / made
        for before, after in pairwise(lines)
        if (made := after[counter] - before[counter]) > 0
    )


def column(name: str, rows: Sequence[Sequence[Mapping[str, float]]]) -> list[str]:
    """A column of a table: mean and deviation over the seeds of each row.

    rows: the numbers of each seed, by names.
    """
    return result_texts(
        [
            mean_and_deviation([numbers.get(name, math.nan) for numbers in seeds])
            if any(name in numbers for numbers in seeds)
            else None
            for seeds in rows
        ]
    )


def right_branching_f1(corpus: Corpus) -> float:
    """Sentence F1 of right-branching trees, in percent: what a table of F1 is held against."""
    assert corpus.gold is not None
    lengths = torch.tensor([len(sentence) for sentence in corpus.sentences])
    return SpanCounts.of(Trees.right_branching(lengths), corpus.gold).sentence_f1


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int) -> str:
    """A table whose first columns, so many, are text and whose others are numbers."""
    rule = ["---"] * texts + ["---:"] * (len(head) - texts)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))
