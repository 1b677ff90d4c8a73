"""Figures and tables of a run that trained a grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.run import Run
from gfnem.run.plots import bar_table, learning_curves
from gfnem.tasks.grammar.decode import parse
from gfnem.tasks.grammar.drawing import draw_trees
from gfnem.tasks.grammar.text.corpus import Corpus
from gfnem.tasks.grammar.text.walk import bracketed, depth_of
from gfnem.tasks.grammar.trees.scores import SentenceScores
from gfnem.training.parts import Metrics

PANELS: Mapping[str, Sequence[str]] = {
    "E-step loss": ("train/e_loss*", "schedule/*"),
    "M-step loss": ("train/m_loss*",),
    "Negative log-likelihood (nats)": ("*/*nll*",),
    "Sentence F1": ("*/*sentence_f1*",),
    "Corpus F1": ("*/*corpus_f1*",),
    "Posterior gap (nats)": ("*/*gap*",),
    "Distinct latents": ("*/*distinct*",),
    "Spans ending at the right edge": ("*/*right*edge*",),
}
"""Panels of a run's learning curves -> patterns of the metrics in them."""

# The sentences that are shown: enough words to have structure, few enough to be drawn.
SHOWN, SHOWN_LENGTHS = 6, range(5, 16)

# Ways to choose a sentence's tree: end of the F1's name -> what it is called here.
DECODED = {
    "": "posterior, sample",
    "_mbr": "posterior, MBR",
    "_exact_mbr": "exact posterior, MBR",
    "_grammar_mbr": "grammar without the prior, MBR",
    "_viterbi": "Viterbi",
}
DRAWN_LEVELS = 100  # of a gold tree, at most
BASELINES = {"left": "left-branching", "right": "right-branching", "random": "random"}


def add_curves(run: Run) -> None:
    """Add the learning curves."""
    run.add_figure("learning_curves", learning_curves(run.metrics(), PANELS))


def add_parses(
    run: Run, corpus: Corpus, model: LatentVariableModel, posterior: Posterior, samples: int
) -> None:
    """Add parses of a few of a corpus's sentences.

    samples: draws of q for a minimum-Bayes-risk tree.
    """
    chosen = _shown(corpus)
    words = [corpus.sentences[i] for i in chosen]
    x = corpus.batch(chosen)
    mbr = parse(model, posterior, x, words, "mbr", samples)
    sample = parse(model, posterior, x, words, "sample")
    gold = [corpus.gold_trees[i] if corpus.gold_trees else None for i in chosen]
    drawable = [tree if tree is None or depth_of(tree) <= DRAWN_LEVELS else None for tree in gold]
    run.add_figure(
        "trees",
        draw_trees(
            [
                (f"test sentence {i}", predicted, right)
                for i, predicted, right in zip(chosen, mbr, drawable, strict=True)
            ]
        ),
    )
    run.add_table(
        "trees",
        ("sentence", "MBR tree", "sampled tree", "gold tree"),
        [
            (" ".join(said), bracketed(best), bracketed(drawn), bracketed(right) if right else "")
            for said, best, drawn, right in zip(words, mbr, sample, gold, strict=True)
        ],
    )


def add_f1(run: Run, metrics: Metrics) -> None:
    """Add the test's F1 values beside those of trivial trees.

    metrics: of a final evaluation.
    """
    keys = {
        shown: (f"baseline/{name}_f1", f"baseline/{name}_corpus_f1")
        for name, shown in BASELINES.items()
    } | {
        shown: (f"test/sentence_f1{name}", f"test/corpus_f1{name}")
        for name, shown in DECODED.items()
        if f"test/sentence_f1{name}" in metrics
    }
    rows = {shown: [metrics[key] for key in pair] for shown, pair in keys.items()}
    columns = ("sentence F1", "corpus F1")
    figure = bar_table(
        {shown: dict(zip(columns, f1, strict=True)) for shown, f1 in rows.items()},
        title="F1 of unlabelled spans (%)",
        own=DECODED["_mbr"],
    )
    run.add_figure("f1", figure)
    run.add_table("f1", ("trees", *columns), [(shown, *f1) for shown, f1 in rows.items()])


def add_scores(run: Run, scores: Mapping[str, SentenceScores]) -> None:
    """Add a table of every sentence's F1 for each test by name, as `gfnem compare` reads them."""
    for split, of_split in scores.items():
        run.add_table(f"scores_{split}", *of_split.table())


def _shown(corpus: Corpus) -> list[int]:
    """The sentences of a corpus to be shown: some that are good to draw, or the shortest ones."""
    numbers = range(len(corpus.sentences))
    fitting = [i for i in numbers if len(corpus.sentences[i]) in SHOWN_LENGTHS]
    return (fitting or sorted(numbers, key=lambda i: len(corpus.sentences[i])))[:SHOWN]
