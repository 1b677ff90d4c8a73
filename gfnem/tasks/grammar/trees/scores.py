"""Trees against gold trees, sentence by sentence: F1 of all, of short ones, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gfnem import bootstrap
from gfnem.tasks.grammar.trees.f1 import Span, SpanCounts
from gfnem.tasks.grammar.trees.tree import Trees
from gfnem.training.parts import Metrics


@dataclass(frozen=True)
class SentenceScores:
    """How many spans some sentences' trees share with their gold trees.

    ids: where the sentences are in their corpus.
    words: of each sentence.
    ways: ways of choosing a tree, by the end of the F1's name; a tree for each sentence.
    baselines: trees that take no notice of the words, by name; `right` has a tree for each
        sentence, others may have more.
    """

    ids: Int[Tensor, "sentences"]
    words: Int[Tensor, "sentences"]
    ways: dict[str, SpanCounts]
    baselines: dict[str, SpanCounts] = field(default_factory=dict)

    @staticmethod
    def cat(parts: Sequence[SentenceScores]) -> SentenceScores:
        """Put sentences behind each other that were rated in the same ways."""
        return SentenceScores(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.words for part in parts]),
            _cat([part.ways for part in parts]),
            _cat([part.baselines for part in parts]),
        )

    def select(self, chosen: Bool[Tensor, "sentences"]) -> SentenceScores:
        return SentenceScores(
            self.ids[chosen],
            self.words[chosen],
            {name: counts.select(chosen) for name, counts in self.ways.items()},
            {name: counts.select(chosen) for name, counts in self.baselines.items()},
        )

    def with_baselines(
        self, gold: Sequence[Iterable[Span]], samples: int, batch_size: int
    ) -> SentenceScores:
        """The same with left-branching, right-branching and random trees beside.

        gold: spans of each tree of the whole corpus, as in `SpanCounts`.
        samples: random trees for each sentence.
        """
        parts = []
        for chosen in torch.arange(len(self.ids)).split(batch_size):
            these = [gold[i] for i in self.ids[chosen].tolist()]
            lengths = self.words[chosen]
            shapes = {
                "left": Trees.left_branching(lengths),
                "right": Trees.right_branching(lengths),
                "random": Trees.random(lengths, samples),
            }
            parts.append({name: SpanCounts.of(trees, these) for name, trees in shapes.items()})
        return replace(self, baselines=_cat(parts))

    def metrics(self, split: str) -> Metrics:
        """Sentence and corpus F1, named `split/...`."""
        found = {}
        for name, counts in self.ways.items():
            found[f"{split}/sentence_f1{name}"] = counts.sentence_f1
            found[f"{split}/corpus_f1{name}"] = counts.corpus_f1
        return found

    def final_metrics(self, split: str) -> Metrics:
        """The same with intervals, what is above right-branching trees, and the baselines."""
        found = self.metrics(split)
        right = self.baselines["right"].f1
        f1 = torch.stack([counts.f1 for counts in self.ways.values()], -1)
        both = torch.cat([f1, f1 - right[:, None]], -1).double()
        low, high = bootstrap.mean_interval(both.numpy())
        names = [f"{split}/sentence_f1{name}" for name in self.ways]
        over = [f"{name}_over_right" for name in names]
        found |= dict(zip(over, both[:, len(names) :].mean(0).tolist(), strict=True))
        for name, *ends in zip([*names, *over], low.tolist(), high.tolist(), strict=True):
            found[f"{name}_low"], found[f"{name}_high"] = ends
        for name, counts in self.baselines.items():
            found[baseline(split, f"{name}_f1")] = counts.sentence_f1
            found[baseline(split, f"{name}_corpus_f1")] = counts.corpus_f1
        return found

    def table(self) -> tuple[list[str], list[list[float]]]:
        """Columns and rows, a sentence each in the order of the corpus, F1 in percent."""
        f1 = {f"sentence_f1{name}": counts.f1 for name, counts in self.ways.items()}
        f1["right_f1"] = self.baselines["right"].f1
        columns = [[round(value, 4) for value in values.tolist()] for values in f1.values()]
        rows = zip(self.ids.tolist(), self.words.tolist(), *columns, strict=True)
        return ["sentence", "words", *f1], sorted(map(list, rows))


def baseline(split: str, name: str) -> str:
    """The name of a metric of trees that take no notice of the words.

    It is `baseline/...` for the three splits that all data has, of which one evaluation rates one.
    """
    if split in ("train", "valid", "test"):
        return f"baseline/{name}"
    return f"{split}/baseline_{name}"


def _cat(parts: Sequence[dict[str, SpanCounts]]) -> dict[str, SpanCounts]:
    return {name: SpanCounts.cat([part[name] for part in parts]) for name in parts[0]}
