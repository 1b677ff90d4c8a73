"""Figures of trees."""

from __future__ import annotations

import pytest
from matplotlib.colors import same_color
from nltk import Tree

from gfnem.tasks.grammar.drawing import draw_trees
from tests.run.test_plots import png, texts


def test_trees_are_laid_out_above_one_line_of_words() -> None:
    tree = Tree.fromstring("(S (NP the cat) (VP sat (PP on (NP $a $mat))))")
    figure = draw_trees([("sample", tree, None)])
    written = texts(figure)
    words = [written[word].get_position() for word in tree.leaves()]
    assert len({y for _, y in words}) == 1
    assert [x for x, _ in words] == sorted(x for x, _ in words)
    heights = {name: written[name].get_position()[1] for name in ("S", "VP", "PP")}
    assert heights["S"] > heights["VP"] > heights["PP"] > words[0][1]
    vp, sat, pp = (written[name].get_position()[0] for name in ("VP", "sat", "PP"))
    assert vp == pytest.approx((sat + pp) / 2)
    assert png(figure).startswith(b"\x89PNG")


def test_no_text_covers_another() -> None:
    sentence = "an internationally known manufacturer of it all is up to no good in a i o u we be"
    words = sentence.split()
    right = left = None
    for index, word in enumerate(words):
        left = word if left is None else Tree(f"NT-{index}", [left, word])
    for index, word in enumerate(reversed(words)):
        right = word if right is None else Tree(f"NT-{index}", [word, right])
    tagged = Tree("S", [Tree("ADJP-TMP", [Tree("PRP$", [word])]) for word in words])
    for predicted, gold in ((left, right), (tagged, right)):
        assert isinstance(predicted, Tree) and isinstance(gold, Tree)
        figure = draw_trees([("title", predicted, gold)])
        png(figure)
        boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
        for index, box in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert not any(box.overlaps(other) for other in boxes[:index])


def test_spans_of_the_gold_tree_are_blue() -> None:
    predicted = Tree.fromstring("(A (B a b) (C c d))")
    gold = Tree.fromstring("(S (X a b c) (Y d))")
    written = texts(draw_trees([("", predicted, gold)]))
    blue = written["A"].get_color()
    assert same_color(written["S"].get_color(), blue)
    for other in "BCX":
        assert not same_color(written[other].get_color(), blue)
    gold = Tree.fromstring("(S (X a b) c d)")
    written = texts(draw_trees([("", predicted, gold)]))
    assert same_color(written["B"].get_color(), blue) and same_color(written["X"].get_color(), blue)
    assert not same_color(written["C"].get_color(), blue)


def test_deep_trees_and_long_words() -> None:
    deep: Tree | str = "a" * 500
    for _ in range(1_100):
        deep = Tree("", [deep])
    assert isinstance(deep, Tree)
    assert draw_trees([("", deep, None)]).get_figheight() > 300
    assert f"{'a' * 39}…" in texts(draw_trees([("", Tree("S", ["a" * 500]), None)]))


def test_drawing_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one tree"):
        draw_trees([])
