"""What more text of training gives a context-free grammar: F1 and likelihood over its amount.

    gfnem --multirun experiment=brown posterior=exact seed=0,1,2 run_dir=runs/brown/all
    gfnem --multirun experiment=brown posterior=exact data.brown_sentences=0,5000,15000 \
        seed=0,1,2 run_dir=runs/brown/some
    gfnem --multirun experiment=brown posterior=exact data.treebank_text=false \
        seed=0,1,2 run_dir=runs/brown/alone
    python scripts/text_amount.py runs/brown/all runs/brown/some runs/brown/alone --out figures

writes text_amount.md and text_amount.png. Runs that differ in their seeds alone are a row.

Every run has the vocabulary of its own text, so that its own likelihood compares with no other's.
Here all are rated with one vocabulary, of the words that all runs know: a grammar emits "unknown
word" with the sum of the probabilities of the words that are no part of it, which is exact. F1 is
that of the minimum-Bayes-risk trees of exact span marginals. Both are of the first run's test.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from jobs import RIGHT_BRANCHING, column, markdown, right_branching_f1
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from gfnem.app.build import load_data, make
from gfnem.app.composition import compose_stored
from gfnem.errors import UserError
from gfnem.run import Run
from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.rules.grammar import Grammar
from gfnem.tasks.grammar.text.corpus import Corpus, GrammarData, Vocabulary
from gfnem.tasks.grammar.trees.f1 import SpanCounts

SENTENCES, NATS, F1 = "training sentences", "nats per word, common vocabulary", "sentence F1"


@dataclass(frozen=True)
class Trained:
    """A run's grammar and what it was trained on."""

    text: str
    data: GrammarData
    grammar: Grammar


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="runs, or folders of some")
    parser.add_argument("--out", type=Path, default=Path("figures"))
    given = parser.parse_args(arguments)
    try:
        runs = list(trained(given.runs))
    except UserError as error:
        parser.error(str(error))
    known = set.intersection(*(set(run.data.vocabulary.words) for run in runs))
    vocabulary = Vocabulary([word for word in runs[0].data.vocabulary.words if word in known])
    rows: dict[tuple[int, str], list[dict[str, float]]] = {}
    for run in runs:
        numbers = rate(run, vocabulary, runs[0].data.test)
        rows.setdefault((len(run.data.train), run.text), []).append(numbers)
    rows = dict(sorted(rows.items()))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "text_amount.md").write_text(table(rows, right_branching_f1(runs[0].data.test)))
    figure(rows).savefig(given.out / "text_amount.png", dpi=100)
    print(f"written to {given.out}: {len(vocabulary) - 1:,} words are common to all runs")
    return 0


def trained(places: Sequence[Path]) -> Iterator[Trained]:
    """Read the runs; data that several were trained on is read once."""
    paths = sorted({file.parent for place in places for file in place.rglob("config.yaml")})
    if not paths:
        raise UserError(f"{', '.join(map(str, places))} hold no runs: give directories of runs")
    read: dict[str, GrammarData] = {}
    for path in paths:
        run = Run.open(path)
        config, options = run.config, run.config["data"]
        key = repr(options)
        if key not in read:
            read[key] = load_data(compose_stored(Run.open(path), []))[1]
        model = make(config["model"])
        if not isinstance(model, GrammarModel):
            raise UserError(f"{path} is no run of a grammar: leave it out")
        model.load_state_dict(run.load_checkpoint("best")["model"])
        text = "the treebank's and Brown's" if options.get("treebank_text") else "Brown's alone"
        if options.get("brown_sentences") == 0:
            text = "the treebank's alone"
        with torch.no_grad():
            yield Trained(text, read[key], model.grammar())


@torch.no_grad()
def rate(run: Trained, vocabulary: Vocabulary, corpus: Corpus) -> dict[str, float]:
    """Rate a grammar on a corpus, with its own vocabulary and with a smaller one."""
    merged = merge(run.grammar, run.data.vocabulary, vocabulary)
    log_likelihood, words, counts = 0.0, 0, []
    assert corpus.gold is not None
    for x in corpus.batches(64):
        said = [corpus.sentences[i] for i in x.ids.tolist()]
        for ids, sentence in zip(x.words, said, strict=True):
            ids[: len(sentence)] = vocabulary.ids(sentence)
        log_likelihood += float(inside.log_partition(merged.potentials(x.words, x.lengths)).sum())
        words += int(x.lengths.sum())
        for ids, sentence in zip(x.words, said, strict=True):
            ids[: len(sentence)] = run.data.vocabulary.ids(sentence)
        marginals = inside.span_marginals(run.grammar.potentials(x.words, x.lengths))
        trees = inside.minimum_bayes_risk(marginals, x.lengths)
        counts.append(SpanCounts.of(trees, [corpus.gold[i] for i in x.ids.tolist()]))
    return {NATS: -log_likelihood / words, F1: SpanCounts.cat(counts).sentence_f1}


def merge(grammar: Grammar, own: Vocabulary, common: Vocabulary) -> Grammar:
    """Give a grammar a smaller vocabulary; words that are no part of it are "unknown"."""
    ids = common.ids(own.words)
    emission = grammar.emission.new_zeros(*grammar.emission.shape[:2], len(common))
    emission.index_add_(2, ids, grammar.emission.exp())
    return grammar.with_emission(emission.log())


def table(rows: dict[tuple[int, str], list[dict[str, float]]], right_f1: float) -> str:
    """A row for each text, mean and deviation over seeds, and one for right-branching trees."""
    columns = {name: column(name, list(rows.values())) for name in (NATS, F1)}
    lines = [
        [text, str(len(seeds)), f"{sentences:,}", columns[NATS][i], columns[F1][i]]
        for i, ((sentences, text), seeds) in enumerate(rows.items())
    ]
    lines.append([RIGHT_BRANCHING, "", "", "", f"{right_f1:.1f}"])
    return markdown(["text", "seeds", SENTENCES, NATS, F1], lines, texts=1)


def figure(rows: dict[tuple[int, str], list[dict[str, float]]]) -> Figure:
    """Both numbers over the training sentences; every seed is a point, means are connected."""
    drawn = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(drawn.subplots(1, 2), (F1, NATS), strict=True):
        for color, alone in (("#1f6fb4", False), ("#d1601f", True)):
            chosen = {k: v for k, v in rows.items() if (k[1] == "Brown's alone") == alone}
            if not chosen:
                continue
            sizes = [sentences for sentences, _ in chosen]
            values = [[numbers[name] for numbers in seeds] for seeds in chosen.values()]
            label = "Brown's text alone" if alone else "with the treebank's text"
            deviations = [stdev(seeds) if len(seeds) > 1 else 0.0 for seeds in values]
            axes.errorbar(
                sizes, list(map(fmean, values)), deviations, color=color,
                marker="s" if alone else "o", capsize=3, label=label,
            )  # fmt: skip
            for size, seeds in zip(sizes, values, strict=True):
                axes.plot([size] * len(seeds), seeds, ".", color=color, alpha=0.5)
        axes.set(xscale="log", xlabel=SENTENCES, ylabel=name)
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.legend()
    return drawn


if __name__ == "__main__":
    sys.exit(main())
