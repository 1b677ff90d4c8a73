"""Trees by the average of several trained grammars' span marginals.

Each run tells how probable a span is in a sentence's tree. The tree with the highest sum of
marginals has the most expected correct spans (Goodman 1996, "Parsing algorithms and metrics"); with
the average over runs, expected under an equal mixture of their posteriors.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.inference import device_of
from gfnem.tasks.grammar.decode import decode_marginals, span_marginals
from gfnem.tasks.grammar.text.corpus import GrammarData, Sentences, check_least
from gfnem.tasks.grammar.trees.f1 import SpanCounts
from gfnem.training.parts import Metrics

if TYPE_CHECKING:
    from nltk import Tree

BATCH = 64


def marginals_of_runs(
    runs: Iterable[EM], sentences: Sequence[Sequence[str]], samples: int
) -> Float[Tensor, "runs batch length+1 length+1"]:
    """The span marginals that each run gives sentences, which it encodes by itself; on the CPU."""
    return torch.stack(
        [
            span_marginals(
                em.model,
                em.posterior,
                encode(sentences, data_of(em)).to(device_of(em.model)),
                samples,
            ).cpu()
            for em in runs
        ]
    )


def parse(runs: Iterable[EM], sentences: Sequence[Sequence[str]], samples: int = 16) -> list[Tree]:
    """One tree for each sentence by the average of the runs' span marginals; nodes are called X."""
    marginals = marginals_of_runs(runs, sentences, samples).mean(0)
    trees = decode_marginals(marginals, torch.tensor(list(map(len, sentences))))
    return [trees.to_nltk(sentence, words) for sentence, words in enumerate(sentences)]


def evaluate(
    runs: Mapping[str, EM],
    /,
    split: str = "test",
    samples: int = 16,
) -> Metrics:
    """F1 of the trees of an ensemble, beside that of each of its runs; unlabelled, in percent.

    sentence_f1_ensemble, corpus_f1_ensemble: of the average of all runs' span marginals.
    sentence_f1_marginals/RUN, corpus_f1_marginals/RUN: of the run's own, on the same sentences.

    runs: by name. The split's sentences and trees are those of the first; sentences that are too
        long for one of the others are left out, with a note on standard error.
    samples: see `span_marginals`.

    Raises UserError for samples below 1, for sentences without trees and where none is left.
    """
    check_least("samples", samples, 1)
    first = next(iter(runs))
    corpus = data_of(runs[first]).split(split)
    if corpus.gold is None:
        raise UserError(f"the {split} sentences of {first} have no trees: name another run first")
    limits = {name: data_of(em).max_length for name, em in runs.items()}
    shortest = min(limits, key=limits.__getitem__)
    fits = (corpus.lengths <= limits[shortest]).tolist()
    if not any(fits):
        raise UserError(
            f"all {split} sentences of {first} are longer than {limits[shortest]} words, for which "
            f"{shortest} was made"
        )
    if not all(fits):
        print(
            f"{fits.count(False)} of {len(fits)} sentences are left out: {shortest} was made for "
            f"at most {limits[shortest]} words",
            file=sys.stderr,
        )
    counts: dict[str, list[SpanCounts]] = {}
    for x in corpus.batches(BATCH):
        chosen = [i for i in x.ids.tolist() if fits[i]]
        if not chosen:
            continue
        gold = [corpus.gold[i] for i in chosen]
        marginals = marginals_of_runs(runs.values(), [corpus.sentences[i] for i in chosen], samples)
        rated = {"ensemble": marginals.mean(0)}
        rated |= {f"marginals/{name}": own for name, own in zip(runs, marginals, strict=True)}
        for name, scores in rated.items():
            trees = decode_marginals(scores, corpus.lengths[chosen])
            counts.setdefault(name, []).append(SpanCounts.of(trees, gold))
    metrics = {}
    for name, parts in counts.items():
        total = SpanCounts.cat(parts)
        metrics[f"{split}/sentence_f1_{name}"] = total.sentence_f1
        metrics[f"{split}/corpus_f1_{name}"] = total.corpus_f1
    return metrics


def data_of(em: EM) -> GrammarData:
    """The sentences that a grammar was trained on, and its vocabulary."""
    assert isinstance(em.data, GrammarData)
    return em.data


def encode(sentences: Sequence[Sequence[str]], data: GrammarData) -> Sentences:
    """A batch of sentences that are in no corpus."""
    word_ids = data.encode(sentences)
    lengths = torch.tensor([len(words) for words in word_ids])
    ids = torch.full_like(lengths, -1)
    return Sentences(pad_sequence(word_ids, batch_first=True), lengths, ids)
