"""Sentences that a trained grammar is asked to parse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.posteriors.exact import ExactPosterior
from gfnem.tasks.grammar.text.corpus import GrammarData, Vocabulary
from gfnem.tasks.grammar.text.reading import Reading
from gfnem.tasks.grammar.text.words import PLAIN, WordForms
from gfnem.tasks.grammar.verbs import parse, parse_ensemble

from . import oracle
from .tiny import FixedModel

WORDS = ["the", "old", "king", "saw", "a", "cat", "dog", "barks", "at"]


def run(forms: WordForms = PLAIN) -> EM:
    reading = Reading([WORDS[:2]], None)
    vocabulary = Vocabulary(["<unk>", *WORDS])
    data = GrammarData("tiny", reading, reading, reading, vocabulary=vocabulary, forms=forms)
    rules = oracle.random_grammar(2, 2, len(vocabulary), seed=0, temperature=0.5)
    return EM(FixedModel(rules), ExactPosterior(), data, m_steps=1)


def words_of(trees: Sequence[str]) -> list[list[str]]:
    """What is no label: labels stand behind a bracket."""
    return [
        [token.rstrip(")") for token in tree.split() if not token.startswith("(")] for tree in trees
    ]


def test_sentences_as_people_write_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "own.txt"
    file.write_text('"The king saw a cat."\n\nThe dog barks, at the cat!\n')
    trees = list(parse(run(WordForms(tokenize=True)), str(file), decode="viterbi"))
    assert words_of(trees) == [
        ["The", "king", "saw", "a", "cat"],
        [],
        ["The", "dog", "barks", "at", "the", "cat"],
    ]
    assert capsys.readouterr().err == ""
    (first, *_) = parse(run(), str(file), decode="viterbi")
    assert words_of([first]) == [['"The', "king", "saw", "a", 'cat."']]
    assert capsys.readouterr().err.startswith('line 1: unknown: "The cat."\n')


def test_runs_that_split_words_differently_are_not_parsed_with_together(tmp_path: Path):
    runs = {"one": run(), "other": run(WordForms(tokenize=True))}
    with pytest.raises(UserError, match="some of the runs were trained with tokenize=true"):
        list(parse_ensemble(runs, file=str(tmp_path / "own.txt"), decode="marginals"))


@pytest.mark.parametrize(
    ("name", "sentences"),
    [
        ("parse_bom.txt", [["the", "old", "king", "saw", "a", "cat"]] * 2),
        (
            "text_u2028.txt",
            [f"the dog number{i} barks at the cat".split() for i in range(20)],
        ),
    ],
)
def test_sentences_of_people(cases: Path, name: str, sentences: list[list[str]]):
    assert words_of(list(parse(run(), str(cases / name), decode="viterbi"))) == sentences


def test_sentences_that_are_not_utf_8(cases: Path):
    with pytest.raises(UserError, match="parse_latin1.txt, line 1: not UTF-8 text; convert"):
        list(parse(run(), str(cases / "parse_latin1.txt")))
