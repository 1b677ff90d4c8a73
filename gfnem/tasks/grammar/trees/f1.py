"""Unlabelled span F1, as grammar induction reports it.

Trivial spans, single words and whole sentences, are left out. A sentence without any other gold
span counts 100 where the prediction has none either (two words) and 0 otherwise. This is how
harvardnlp/compound-pcfg (`compare_trees.py`, arXiv 1906.10225) scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gfnem.tasks.grammar.trees.tree import Trees

Span = tuple[int, int]


@dataclass(frozen=True)
class SpanCounts:
    """How many non-trivial spans some trees share with the gold trees of their sentences.

    correct: spans of the predicted tree that are in the gold tree too.
    predicted, gold: spans of each.
    """

    correct: Int[Tensor, "trees"]
    predicted: Int[Tensor, "trees"]
    gold: Int[Tensor, "trees"]

    @staticmethod
    def of(trees: Trees, gold: Sequence[Iterable[Span]]) -> SpanCounts:
        """All samples of all sentences, each tree on its own.

        gold: spans (start, end) of each sentence's gold tree, trivial ones allowed.
        """
        table = non_trivial(gold, trees.lengths)
        sentence = torch.arange(len(table), device=table.device)[:, None, None]
        correct = table[sentence, trees.start, trees.end].sum(-1)
        return SpanCounts(
            correct=correct.flatten(),
            predicted=(trees.lengths - 2)[:, None].expand_as(correct).flatten(),
            gold=table.sum((1, 2))[:, None].expand_as(correct).flatten(),
        )

    @staticmethod
    def cat(parts: Sequence[SpanCounts]) -> SpanCounts:
        return SpanCounts(
            correct=torch.cat([part.correct for part in parts]),
            predicted=torch.cat([part.predicted for part in parts]),
            gold=torch.cat([part.gold for part in parts]),
        )

    def cpu(self) -> SpanCounts:
        return SpanCounts(self.correct.cpu(), self.predicted.cpu(), self.gold.cpu())

    def select(self, chosen: Bool[Tensor, "sentences"]) -> SpanCounts:
        """Those of chosen sentences, where every sentence has the same number of trees."""
        trees = chosen.repeat_interleave(len(self.correct) // len(chosen))
        return SpanCounts(self.correct[trees], self.predicted[trees], self.gold[trees])

    @property
    def f1(self) -> Float[Tensor, "trees"]:
        """Of each tree, in percent."""
        return _f1(self.correct, self.predicted, self.gold)

    @property
    def sentence_f1(self) -> float:
        """The mean over trees, in percent."""
        return float(self.f1.mean())

    @property
    def corpus_f1(self) -> float:
        """Of all trees' spans together, in percent."""
        return float(_f1(self.correct.sum(), self.predicted.sum(), self.gold.sum()))


def non_trivial(
    spans: Sequence[Iterable[Span]], lengths: Int[Tensor, "batch"]
) -> Bool[Tensor, "batch length+1 length+1"]:
    """Whether (start, end) is one of a sentence's spans, single words and the whole left out."""
    longest = int(lengths.max())
    table = torch.zeros(len(lengths), longest + 1, longest + 1, dtype=torch.bool)
    index = [
        (sentence, start, end)
        for sentence, (found, length) in enumerate(zip(spans, lengths.tolist(), strict=True))
        for start, end in found
        if 1 < end - start < length
    ]
    if index:
        table[tuple(torch.tensor(index).t())] = True
    return table.to(lengths.device)


def _f1(
    correct: Int[Tensor, "*trees"], predicted: Int[Tensor, "*trees"], gold: Int[Tensor, "*trees"]
) -> Float[Tensor, "*trees"]:
    total = predicted + gold
    return torch.where(total > 0, 200.0 * correct / total.clamp(min=1), 100.0)
