"""Which optimizer the M-step should have: grammars of raw text, the E-step exact, equal M-steps.

    python scripts/grammar_optim.py
    python scripts/grammar_optim.py --runs FOLDER --out FOLDER data=treebank em.m_steps=500

Adam, SGD with Polyak's and with Nesterov's momentum, and DANA (`gfnem experiment=grammar_optim
posterior=exact optimizer=...`). Each has as many tries of its learning rate, all other options as
in conf/optimizer; the one with the lowest validation likelihood, in nats per word, goes on with
three seeds that had no part in the choice. Runs that are complete are not run again. It ends in
grammar_optim.md and grammar_optim.png. Overrides go to all runs.

Likelihoods are exact, of the checkpoint that validation chose. The likelihood of single words is
that of a word given all others of its sentence, -log p(x) + log of the sum of p(x) over all words
in its place. The test's words are ordered by how often the training text has them, unknown ones
first, and cut into tenths.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from jobs import Job, column, complete, markdown
from matplotlib.figure import Figure
from torch import Tensor, nn

from gfnem.app.trained import load
from gfnem.run.finished import FinishedRun
from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.rules.grammar import Grammar
from gfnem.tasks.grammar.text.corpus import GrammarData, Sentences

OPTIMIZERS = {
    "Adam": ("optimizer=adam",),
    "momentum": ("optimizer=sgd",),
    "Nesterov": ("optimizer=sgd", "optimizer.model.nesterov=true"),
    "DANA": ("optimizer=dana",),
}
RATES = {
    "Adam": (1e-3, 2e-3, 5e-3, 1e-2),
    "momentum": (0.05, 0.1, 0.2, 0.5),
    "Nesterov": (0.05, 0.1, 0.2, 0.5),
    "DANA": (0.1, 0.2, 0.5, 1.0),
}
COLORS = {"Adam": "#1f6fb4", "momentum": "#d1601f", "Nesterov": "#3a8f4d", "DANA": "#8a4fb0"}
TUNED_WITH = 0
SEEDS = (1, 2, 3)
TENTHS = 10
VALID, TEST, BEST = "valid/nll_per_token", "test/nll_per_token", "train/best_m_steps"
BASE = ("experiment=grammar_optim", "posterior=exact")


@dataclass(frozen=True)
class OptimizerJob(Job):
    """A run of the study."""

    optimizer: str
    rate: float

    @staticmethod
    def of(
        optimizer: str, rate: float, seed: int, runs: Path, overrides: Sequence[str]
    ) -> OptimizerJob:
        chosen = (f"optimizer.model.lr={rate}", f"seed={seed}", *overrides)
        directory = runs / f"{optimizer.lower()}_{rate:g}_{seed}"
        return OptimizerJob((*BASE, *OPTIMIZERS[optimizer], *chosen), directory, optimizer, rate)

    @cached_property
    def run(self) -> FinishedRun:
        run = self.finished()
        assert run is not None
        return run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/grammar_optim"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)

    def job(optimizer: str, rate: float, seed: int) -> OptimizerJob:
        return OptimizerJob.of(optimizer, rate, seed, given.runs, given.overrides)

    tries = [job(name, rate, TUNED_WITH) for name in OPTIMIZERS for rate in RATES[name]]
    if not complete(tries, given.processes):
        return 1
    best = best_rates(tries)
    rated = {name: [job(name, rate, seed) for seed in SEEDS] for name, rate in best.items()}
    if not complete([job for jobs in rated.values() for job in jobs], given.processes):
        return 1
    tenths = {name: [by_frequency(job.directory) for job in jobs] for name, jobs in rated.items()}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "grammar_optim.md").write_text(table(rated, tenths))
    figure(tries, rated, tenths).savefig(given.out / "grammar_optim.png", dpi=110)
    print(f"written to {given.out}: grammar_optim.md, grammar_optim.png")
    return 0


def best_rates(tries: Sequence[OptimizerJob]) -> dict[str, float]:
    """The learning rate of each optimizer with the lowest validation likelihood."""
    best: dict[str, OptimizerJob] = {}
    for job in tries:
        other = best.setdefault(job.optimizer, job)
        if job.run.numbers[VALID] < other.run.numbers[VALID]:
            best[job.optimizer] = job
    return {name: job.rate for name, job in best.items()}


@torch.no_grad()
def by_frequency(directory: Path) -> Float[np.ndarray, "tenths"]:
    """Nats for a word of the test given the others of its sentence, by tenths of frequency."""
    em = load(directory)
    data, model = em.data, em.model
    assert isinstance(data, GrammarData) and isinstance(model, GrammarModel)
    grammar = model.grammar()
    counts = torch.cat(data.train.word_ids).bincount(minlength=len(data.vocabulary))
    # As a word of its own "<unk>" is frequent; the words that it stands for are not.
    counts[0] = 0
    scores, frequencies = [], []
    for x in data.test.batches(32):
        said = torch.arange(x.words.shape[1]) < x.lengths[:, None]
        scores.append(word_scores(grammar, x)[said])
        frequencies.append(counts[x.words][said])
    order = torch.cat(frequencies).argsort(stable=True)
    parts = torch.cat(scores)[order].tensor_split(TENTHS)
    return torch.stack([part.mean() for part in parts]).numpy()


def word_scores(grammar: Grammar, x: Sentences) -> Float[Tensor, "batch length"]:
    """-log p(word | all others of its sentence); anything behind the sentence's end."""
    # One word more, that every preterminal gives with a weight of 1: the sum over all words.
    grammar = grammar.with_emission(nn.functional.pad(grammar.emission, (0, 1)))
    any_word = grammar.emission.shape[-1] - 1
    batch, length = x.words.shape
    masked = x.words[:, None].repeat(1, length, 1)
    masked.diagonal(dim1=1, dim2=2).fill_(any_word)
    lengths = x.lengths.repeat_interleave(length)
    without = inside.log_partition(grammar.potentials(masked.flatten(0, 1), lengths))
    return without.view(batch, length) - inside.log_partition(
        grammar.potentials(x.words, x.lengths)
    ).unsqueeze(1)


def table(
    rated: Mapping[str, Sequence[OptimizerJob]],
    tenths: Mapping[str, Sequence[Float[np.ndarray, "tenths"]]],
) -> str:
    """Means and deviations over seeds, of all words and of their tenths."""
    rows = [[job.run.numbers for job in jobs] for jobs in rated.values()]
    columns = [column(name, rows) for name in (VALID, TEST, BEST)]
    names = ["rarest", *map(str, range(2, TENTHS)), "most frequent"]
    parts = [[dict(zip(names, seed, strict=True)) for seed in seeds] for seeds in tenths.values()]
    overall = markdown(
        ["optimizer", "learning rate", "nats per word, validation", "test", "best M-step"],
        [
            [name, f"{jobs[0].rate:g}", *(texts[i] for texts in columns)]
            for i, (name, jobs) in enumerate(rated.items())
        ],
        texts=1,
    )
    of_words = markdown(
        ["nats for a word given the others, tenth", *tenths],
        [[name, *column(name, parts)] for name in names],
        texts=1,
    )
    return f"{overall}\n{of_words}"


def figure(
    tries: Sequence[OptimizerJob],
    rated: Mapping[str, Sequence[OptimizerJob]],
    tenths: Mapping[str, Sequence[Float[np.ndarray, "tenths"]]],
) -> Figure:
    """The tries, the way down, and what remains by frequency beside Adam."""
    drawn = Figure(figsize=(13, 3.8), layout="constrained")
    tuning, way, words = drawn.subplots(1, 3)
    for name, color in COLORS.items():
        own = [job for job in tries if job.optimizer == name]
        tuning.plot(
            [job.rate for job in own], [job.run.numbers[VALID] for job in own], "o-", color=color
        )
        for number, job in enumerate(rated[name]):
            lines = [line for line in job.run.lines if VALID in line]
            way.plot(
                [line["train/m_steps"] for line in lines],
                [line[VALID] for line in lines],
                ".-",
                color=color,
                alpha=0.7,
                label=name if number == 0 else None,
            )
        over = [one - adam for one, adam in zip(tenths[name], tenths["Adam"], strict=True)]
        words.plot(range(1, TENTHS + 1), np.mean(over, 0), "o-", color=color)
    tuning.set(xscale="log", xlabel="learning rate, one seed", ylabel="nats per word, validation")
    lowest = min(line.get_ydata().min() for line in tuning.lines)
    tuning.set_ylim(lowest - 0.1, lowest + 1.5)  # some rates diverge
    way.set(xlabel="M-steps", ylabel="nats per word, validation")
    way.legend()
    words.set(
        xlabel="tenth of the test's words, rarest first", ylabel="nats for a word, above Adam's"
    )
    for axes in (tuning, way, words):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


if __name__ == "__main__":
    sys.exit(main())
