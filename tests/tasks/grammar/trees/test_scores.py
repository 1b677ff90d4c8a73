from __future__ import annotations

import pytest
import torch

from gfnem.tasks.grammar.trees.f1 import SpanCounts
from gfnem.tasks.grammar.trees.scores import SentenceScores, baseline


def counts(correct: list[int], predicted: list[int], gold: list[int]) -> SpanCounts:
    return SpanCounts(torch.tensor(correct), torch.tensor(predicted), torch.tensor(gold))


# F1 of 100, 50 and 0; right-branching trees have 50, 50 and 100. Two random trees a sentence.
SCORES = SentenceScores(
    ids=torch.tensor([2, 0, 1]),
    words=torch.tensor([4, 6, 6]),
    ways={"_mbr": counts([2, 2, 0], [2, 4, 4], [2, 4, 4])},
    baselines={
        "right": counts([1, 2, 4], [2, 4, 4], [2, 4, 4]),
        "random": counts([2, 0, 4, 0, 0, 0], [2, 2, 4, 4, 4, 4], [2, 2, 4, 4, 4, 4]),
    },
)


def test_final_metrics_by_hand():
    metrics = SCORES.final_metrics("test")
    assert metrics["test/sentence_f1_mbr"] == 50
    assert metrics["test/corpus_f1_mbr"] == 40
    assert metrics["test/sentence_f1_mbr_over_right"] == pytest.approx(50 - 200 / 3)
    assert metrics["baseline/right_f1"] == pytest.approx(200 / 3)
    assert metrics["baseline/random_f1"] == pytest.approx(200 / 6)
    # Of three draws all are of the worst or of the best sentence with probability 1/27 each.
    assert metrics["test/sentence_f1_mbr_low"] == 0
    assert metrics["test/sentence_f1_mbr_high"] == 100
    assert metrics["test/sentence_f1_mbr_over_right_low"] == -100
    assert metrics["test/sentence_f1_mbr_over_right_high"] == 50
    assert set(SCORES.metrics("test")) == {"test/sentence_f1_mbr", "test/corpus_f1_mbr"}


def test_sentences_of_some_lengths():
    metrics = SCORES.select(SCORES.words <= 4).final_metrics("test_to_4")
    for end in ("", "_low", "_high"):
        assert metrics[f"test_to_4/sentence_f1_mbr{end}"] == 100
        assert metrics[f"test_to_4/sentence_f1_mbr_over_right{end}"] == 50
    assert metrics["test_to_4/baseline_random_f1"] == 50


def test_parts_make_a_whole():
    parts = [SCORES.select(SCORES.words == words) for words in (4, 6)]
    assert SentenceScores.cat(parts).final_metrics("test") == SCORES.final_metrics("test")


def test_a_table_is_in_the_order_of_the_corpus():
    columns, rows = SCORES.table()
    assert columns == ["sentence", "words", "sentence_f1_mbr", "right_f1"]
    assert rows == [[0, 6, 50, 50], [1, 6, 0, 100], [2, 4, 100, 50]]


def test_names_of_baselines():
    assert baseline("valid", "left_f1") == "baseline/left_f1"
    assert baseline("seen_text", "left_f1") == "seen_text/baseline_left_f1"
