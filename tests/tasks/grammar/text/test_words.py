"""How words are written."""

from __future__ import annotations

import pytest
from nltk.tokenize import TreebankWordTokenizer

from gfnem.tasks.grammar.text.words import NUMBER, PLAIN, WordForms, unescaped

AS_TREEBANK = WordForms(merge_numbers=True, split_clitics=True)


def test_tokens_that_are_punctuation_alone_are_removed():
    line = "The U.S. -LRB- `` it 's 5 % '' -RRB- — well-known … & $ 3 ."
    assert PLAIN.words(line) == ["the", "u.s.", "it", "'s", "5", "%", "well-known", "&", "$", "3"]


@pytest.mark.parametrize(
    "number",
    ["7", "1,000", "3.5", ".5", "3/4", r"3\/4", "1-1/2", "1960-61", "10:30", "-2", "$100", "5%"],
)
def test_numbers_become_one_word(number: str):
    assert AS_TREEBANK.form(number) == NUMBER == AS_TREEBANK.form(NUMBER)
    assert PLAIN.form(number) == number


@pytest.mark.parametrize("word", ["-", ".", "$", "%", "7th", "1980s", "'30s", "b-52", "one", ","])
def test_words_that_are_no_numbers(word: str):
    assert AS_TREEBANK.form(word) == word


@pytest.mark.parametrize(
    "line",
    [
        "Don't they say he'll go ?",
        "I'd thought it wasn't the man's",
        "She cannot pay $3.50 , 5% of it",
        "They gotta lemme go , 'tis gonna rain",
        "We're sure you've seen O'Hara at five o'clock",
        "Isn't it what he's said ?",
    ],
)
def test_clitics_are_split_as_by_nltk(line: str):
    expected = PLAIN.words(" ".join(TreebankWordTokenizer().tokenize(line)))
    assert WordForms(split_clitics=True).words(line) == expected


def test_apostrophes_of_typesetters_and_clitics_that_stand_alone():
    assert WordForms(split_clitics=True).words("I don’t n't 's") == ["i", "do", "n't", "n't", "'s"]
    assert PLAIN.words("I don't") == ["i", "don't"]


def test_backslashes_of_treebanks():
    assert unescaped(r"and\/or \*") == "and/or *"
