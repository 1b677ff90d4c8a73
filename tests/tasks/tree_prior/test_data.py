from __future__ import annotations

import pytest
import torch

from gfnem.errors import UserError
from gfnem.tasks.grammar.text.sources import text, toy_english
from gfnem.tasks.grammar.text.walk import gold_spans
from gfnem.tasks.tree_prior.data import ShapeData, binary_shapes


@pytest.mark.parametrize(
    "binarization, flat, nested",
    [
        ("right", {(0, 4), (1, 4), (2, 4)}, {(0, 6), (1, 6), (1, 4), (2, 4), (4, 6)}),
        ("left", {(0, 4), (0, 3), (0, 2)}, {(0, 6), (0, 5), (0, 4), (1, 4), (1, 3)}),
    ],
)
def test_hand_worked_trees(binarization, flat, nested):
    """(a b c d) and (a (b c d) e f)."""
    gold = [{(0, 4)}, {(0, 6), (1, 4)}]
    trees = binary_shapes(gold, torch.tensor([4, 6]), binarization)
    assert trees.spans(0) == flat
    assert trees.spans(1) == nested


@pytest.mark.parametrize("binarization", ["right", "left"])
def test_shapes_are_those_of_nltk(binarization):
    data = toy_english(train_sentences=200, valid_sentences=1, test_sentences=1).train
    assert data.gold is not None and data.gold_trees is not None
    trees = binary_shapes(data.gold, data.lengths, binarization)
    flat = 0
    for row, tree in enumerate(data.gold_trees):
        binary = tree.copy(deep=True)
        binary.chomsky_normal_form(factor=binarization)
        assert trees.spans(row) == gold_spans(binary)
        flat += trees.spans(row) != data.gold[row]
    assert flat > 20


def test_batches_have_every_shape_once():
    corpora = toy_english(train_sentences=50, valid_sentences=9, test_sentences=1)
    data = ShapeData(corpora, batch_size=20)
    assert corpora.train.gold is not None
    for batches, corpus in (
        (data.train_batches(0), corpora.train),
        (data.batches("valid"), corpora.valid),
    ):
        ids = torch.cat([x.ids for x in batches])
        assert ids.sort().values.tolist() == list(range(len(corpus)))
        assert corpus.gold is not None
        for x in batches:
            assert x.lengths.equal(corpus.lengths[x.ids])
            for row, i in enumerate(x.ids.tolist()):
                assert x.trees.spans(row) >= corpus.gold[i]
    assert not data.train_batches(0)[0].ids.equal(data.train_batches(1)[0].ids)
    assert data.train_batches(1)[0].ids.equal(data.train_batches(1)[0].ids)


def test_what_makes_no_shapes(tmp_path):
    (tmp_path / "raw.txt").write_text(20 * "the old king saw a cat\n")
    with pytest.raises(UserError, match="^data.trees is text, which has no gold trees to take"):
        ShapeData(text(str(tmp_path / "raw.txt")))
    corpora = toy_english(train_sentences=2, valid_sentences=1, test_sentences=1)
    with pytest.raises(UserError, match="^data.binarization is 'up'; use 'right' or 'left'$"):
        ShapeData(corpora, binarization="up")  # pyright: ignore
    with pytest.raises(UserError, match="^data.batch_size is 0; it must be at least 1$"):
        ShapeData(corpora, batch_size=0)
