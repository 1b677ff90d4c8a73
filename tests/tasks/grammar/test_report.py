"""What a final evaluation adds to a run's pictures and tables."""

from __future__ import annotations

from typing import Any, cast

from matplotlib.figure import Figure
from nltk import Tree

from gfnem.posteriors.exact import ExactPosterior
from gfnem.run import Run
from gfnem.tasks.grammar.report import DRAWN_LEVELS, add_parses
from gfnem.tasks.grammar.text.corpus import GrammarData
from gfnem.tasks.grammar.text.reading import Reading
from tests.tasks.grammar import oracle
from tests.tasks.grammar.tiny import FixedModel


class Kept:
    """Keeps the rows of tables and the texts of figures."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.texts: list[str] = []

    def add_figure(self, name: str, figure: Figure) -> None:
        self.texts += [text.get_text() for text in figure.axes[0].texts]

    def add_table(self, name: str, columns: Any, rows: list[Any]) -> None:
        self.rows += rows


def test_gold_trees_too_deep_to_draw_are_in_the_table_alone():
    for levels, drawn in ((DRAWN_LEVELS, True), (5_000, False)):
        gold = Tree("S", ["a", "b", "c"])
        for _ in range(levels - 1):
            gold = Tree("X", [gold])
        reading = Reading([["a", "b", "c"]], [gold])
        data = GrammarData("tiny", reading, reading, reading, min_count=1)
        model = FixedModel(oracle.random_grammar(2, 2, 4, seed=0))
        kept = Kept()
        add_parses(cast(Run, kept), data.test, model, ExactPosterior(), samples=2)
        assert ("gold" in kept.texts) == drawn
        assert kept.rows[0][3].count("(") == levels


def test_the_shortest_sentences_are_shown_where_none_is_good_to_draw():
    reading = Reading([["a"] * length for length in range(30, 20, -1)], None)
    data = GrammarData("tiny", reading, reading, reading, min_count=1, max_length=30)
    kept = Kept()
    model = FixedModel(oracle.random_grammar(2, 2, 4, seed=0))
    add_parses(cast(Run, kept), data.test, model, ExactPosterior(), samples=2)
    assert [len(row[0].split()) for row in kept.rows] == [21, 22, 23, 24, 25, 26]
