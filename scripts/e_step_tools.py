"""Tools of the E-step, each alone: on a grammar that does not move, and in EM.

    python scripts/e_step_tools.py
    python scripts/e_step_tools.py --seeds 0 --runs FOLDER --out FILE

First a grammar of 12 nonterminals and 24 preterminals is trained exactly on sentences of up to 10
words of NLTK's treebank sample, and posteriors for it, which may see nothing else, are trained for
so many E-steps. Then grammars of the same size are trained by EM with each tool on sentences of up
to 20 words. Runs that are complete are not run again. It ends in e_step_tools.md: numbers of the
last evaluation on validation data, mean and standard deviation over seeds; the best gap is that of
the checkpoint that is best on validation data, on 256 training sentences. Seconds are those of the
CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs import (
    RIGHT_BRANCHING,
    Job,
    column,
    complete,
    markdown,
    right_branching_f1,
    seconds_per_step,
)

from gfnem.app.build import load_data
from gfnem.app.composition import compose
from gfnem.run.finished import FinishedRun
from gfnem.tasks.grammar.text.corpus import GrammarData

SIZES = ("model.nonterminals=12", "model.preterminals=24")
E_STEPS, M_STEPS = 400, 300
EARLY = 100  # E-steps

TOOLS: dict[str, tuple[str, ...]] = {
    "none": (),
    "8 samples": ("posterior.samples=8",),
    "temperature 1.5": ("posterior.behaviour.temperature=1.5",),
    "epsilon 0.05": ("posterior.behaviour.epsilon=0.05",),
    "SubTB 0.9": ("objective=subtb", "objective.lamda=0.9"),
    "SubTB 1": ("objective=subtb", "objective.lamda=1.0"),
    "symbol dropout 0.1": ("policy.symbol_dropout=0.1",),
    "replay of 4": ("posterior.replay=4",),
    "local search": ("local_search=back_and_forth",),
    "replay and local search": ("posterior.replay=4", "local_search=back_and_forth"),
}
ONLY_IN_EM = {
    "resampled M-step": ("refinement=resampling",),
    "adaptive threshold": ("schedule=adaptive",),
    "exact training": ("posterior=exact",),
}

F1 = "sentence F1"
FIXED = {
    f"gap, {EARLY} E-steps": "",
    f"gap, {E_STEPS} E-steps": "last/valid/posterior_gap",
    "best gap, training": "train/posterior_gap",
    "distinct trees, q": "last/valid/distinct_trees",
    "distinct trees, exact": "last/valid/distinct_exact_trees",
    "effective samples": "last/valid/effective_samples",
    "ms per E-step": "",
}
MOVING = {
    "nats per word": "last/valid/nll_per_token",
    "gap": "last/valid/posterior_gap",
    "distinct trees, q": "last/valid/distinct_trees",
    "distinct trees, exact": "last/valid/distinct_exact_trees",
    "right edge, q": "last/valid/right_edge",
    "right edge, exact": "last/valid/right_exact_edge",
    F1: "last/valid/sentence_f1_mbr",
    "E-steps": "train/e_steps",
    "ms per M-step": "",
}
"""Column -> the number of a run, where it has it by a name."""


@dataclass(frozen=True)
class ToolJob(Job):
    """A run of the study."""

    tool: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/e_step_tools"))
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/e_step_tools.md"
    )
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="of all runs")
    given = parser.parse_args(arguments)
    seeds, more = given.seeds.split(","), tuple(given.overrides)
    grammar = exact_grammar(given.runs, more)
    of_seeds = [
        (
            list(fixed_jobs(given.runs, grammar.directory, seed, more)),
            list(moving_jobs(given.runs, seed, more)),
        )
        for seed in seeds
    ]
    # The grammar is what others begin with. A study that is stopped has some of all tools.
    jobs = [job for parts in of_seeds for part in parts for job in part]
    if not (complete([grammar], 1) and complete(jobs, given.processes)):
        return 1
    fixed, moving = (
        [job for part in parts for job in part] for parts in zip(*of_seeds, strict=True)
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(
        f"An exactly trained grammar that does not move, sentences of up to 10 words:\n\n"
        f"{table(fixed, FIXED)}\n"
        f"EM, {M_STEPS} M-steps, sentences of up to 20 words:\n\n"
        f"{table(moving, MOVING, right_branching_f1(_data_of(moving[0]).valid))}"
    )
    print(f"written to {given.out}")
    return 0


def exact_grammar(runs: Path, more: tuple[str, ...]) -> Job:
    of_sentences = ("data=treebank", "data.max_length=10", *SIZES)
    training = ("posterior=exact", "em.m_steps=200", "evaluator.iw_samples=16", "seed=0")
    return Job((*of_sentences, *training, *more), runs / "grammar")


def fixed_jobs(runs: Path, grammar: Path, seed: str, more: tuple[str, ...]) -> Iterator[ToolJob]:
    base = (
        "experiment=rate_posterior",
        f"model_from={grammar}",
        "data.max_length=10",
        *SIZES,
        "em.max_seconds=null",
        f"em.max_e_steps={E_STEPS}",
        f"em.evaluate_every={EARLY}",
        "em.log_every=20",
        "evaluator.iw_samples=16",
    )
    yield from jobs_of(TOOLS, runs / "fixed", base, seed, more)


def moving_jobs(runs: Path, seed: str, more: tuple[str, ...]) -> Iterator[ToolJob]:
    base = (
        "experiment=treebank",
        "data.max_length=20",
        *SIZES,
        f"em.m_steps={M_STEPS}",
        f"em.evaluate_every={M_STEPS}",
        "evaluator.iw_samples=16",
    )
    yield from jobs_of(TOOLS | ONLY_IN_EM, runs / "em", base, seed, more)


def jobs_of(
    tools: Mapping[str, tuple[str, ...]],
    runs: Path,
    base: tuple[str, ...],
    seed: str,
    more: tuple[str, ...],
) -> Iterator[ToolJob]:
    for tool, options in tools.items():
        overrides = (*base, *options, "em.clock=cpu", f"seed={seed}", *more)
        yield ToolJob(overrides, runs / f"{tool.replace(' ', '_')}_{seed}", tool)


def _data_of(job: Job) -> GrammarData:
    return load_data(compose(job.overrides))[1]


def table(
    jobs: Sequence[ToolJob], columns: Mapping[str, str], right_f1: float | None = None
) -> str:
    """A row for each tool, mean and deviation over seeds.

    right_f1: F1 of right-branching trees, which get a row then.
    """
    rows: dict[str, list[Mapping[str, float]]] = {}
    for job in jobs:
        run = job.finished()
        assert run is not None
        rows.setdefault(job.tool, []).append(numbers_of(run, columns))
    cells = [column(name, list(rows.values())) for name in columns]
    lines = [
        [tool, str(len(seeds)), *(texts[i] for texts in cells)]
        for i, (tool, seeds) in enumerate(rows.items())
    ]
    if right_f1 is not None:
        theirs = [f"{right_f1:.2f}" if name == F1 else "" for name in columns]
        lines.append([RIGHT_BRANCHING, "", *theirs])
    return markdown(["tool", "seeds", *columns], lines, texts=1)


def numbers_of(run: FinishedRun, columns: Mapping[str, str]) -> Mapping[str, float]:
    found = {name: run.numbers[key] for name, key in columns.items() if key in run.numbers}
    for name, counter in (("ms per E-step", "train/e_steps"), ("ms per M-step", "train/m_steps")):
        if name in columns:
            found[name] = 1000 * seconds_per_step(run, counter)
    for line in run.lines:
        if line.get("train/e_steps") == EARLY and "valid/posterior_gap" in line:
            found[f"gap, {EARLY} E-steps"] = line["valid/posterior_gap"]
    return found


if __name__ == "__main__":
    sys.exit(main())
