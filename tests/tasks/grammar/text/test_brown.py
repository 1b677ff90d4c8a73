"""The Brown corpus as training text."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from gfnem.errors import UserError
from gfnem.tasks.grammar.text.brown import brown
from gfnem.tasks.grammar.text.corpus import GrammarData

TEXT = """

\tThe/at man's/nn$ dogs/nns do/do not/* bark/vb ./.


\tHe/pps ``/`` cannot/md* ''/'' pay/vb $100/nns for/in 3/4/cd of/in boys'/nns$-tl (/( 6''/nn )/)
"""
TREES = {
    1: ["(S (NP (NN dogs)) (VP (VBD paid) ($ $) (CD 3\\/4)) (. .))"],
    160: ["(S (NP (PRP He)) (VP (VBD barked)))"],
    180: [
        "(S (NP (NN Dogs)) (VP (VBD paid) ($ $) (CD 1,000)))",
        "(S (NP (NN men)) (VP (VB bark)))",
    ],
}


def write_corpora(folder: Path) -> None:
    """NLTK's folder with a Brown corpus of two sentences and a treebank of four."""
    (folder / "corpora" / "treebank" / "combined").mkdir(parents=True)
    for number in range(1, 200):
        trees = TREES.get(number, ["(S one)"])
        file = folder / "corpora" / "treebank" / "combined" / f"wsj_{number:04}.mrg"
        file.write_text("\n".join(trees))
    with zipfile.ZipFile(folder / "corpora" / "brown.zip", "w") as archive:
        archive.writestr("brown/ca01", TEXT)
        archive.writestr("brown/cats.txt", "ca01 news")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpora(tmp_path)
    return tmp_path


def read(folder: Path, **options: object) -> GrammarData:
    return brown(**{"dir": str(folder), "min_count": 1, **options})  # pyright: ignore


def test_text_is_written_as_the_treebank_is(folder: Path):
    data = read(folder)
    assert data.train.sentences == [
        ["the", "man", "'s", "dogs", "do", "not", "bark"],
        [*["he", "can", "not", "pay", "$", "<num>", "for", "<num>", "of", "boys"], "'", "<num>"],
        ["dogs", "paid", "$", "<num>"],
    ]
    assert data.train.gold is None
    assert data.valid.sentences == [["he", "barked"]]
    assert data.more_tests == ["seen_text"]
    assert data.split("seen_text").sentences == [["dogs", "paid", "$", "<num>"]]
    assert data.split("seen_text").gold == [frozenset({(0, 4), (1, 4)})]
    assert data.encode([["Dogs", "paid", "$2"]])[0].tolist() == [
        data.vocabulary.id(word) for word in ("dogs", "paid", "<num>")
    ]


def test_test_sentences_are_not_in_the_training_text(folder: Path):
    data = read(folder)
    assert data.test.sentences == [["men", "bark"]]
    assert data.test.left_out["in the training text"] == 1
    told = "; seen_text 1 sentences, 4 words (left out: 158 of one word)"
    assert told in data.describe()


def test_options_of_words(folder: Path):
    data = read(folder, keep_currency=False, merge_numbers=False, split_clitics=False)
    assert data.train.sentences == [
        ["the", "man's", "dogs", "do", "not", "bark"],
        ["he", "cannot", "pay", "$100", "for", "3/4", "of", "boys'", "6"],
        ["dogs", "paid", "3/4"],
    ]


def test_marks_and_capitals_can_be_kept(folder: Path):
    data = read(folder, punctuation="keep", lowercase=False)
    assert data.train.sentences == [
        ["The", "man", "'s", "dogs", "do", "not", "bark", "."],
        ["He", "``", "can", "not", "''", "pay", "$", "<num>", "for", "<num>", "of", "boys"]
        + ["'", "(", "<num>", ")"],
        ["dogs", "paid", "$", "<num>", "."],
    ]
    assert data.test.sentences == [["Dogs", "paid", "$", "<num>"], ["men", "bark"]]


def test_brown_without_the_text_of_the_treebank(folder: Path):
    data = read(folder, treebank_text=False)
    assert len(data.train) == 2 and data.more_tests == []
    assert [len(words) for words in data.test.sentences] == [4, 4, 2]


def test_mirrored_text_and_trees(folder: Path):
    data, mirrored = read(folder), read(folder, mirror=True)
    for name in data.corpora:
        said = [words[::-1] for words in data.split(name).sentences]
        assert mirrored.split(name).sentences == said
    assert mirrored.split("seen_text").gold == [frozenset({(0, 4), (0, 3)})]
    trees = mirrored.split("seen_text").gold_trees
    assert trees is not None and trees[0].leaves() == ["<num>", "$", "paid", "dogs"]


def test_amounts_of_brown(folder: Path):
    assert len(read(folder, brown_sentences=1).train) == 2
    assert len(read(folder, brown_sentences=0).train) == 1
    # One of Brown's two sentences has seven words.
    assert len(read(folder, brown_sentences=5, max_length=7).train) == 2
    with pytest.raises(UserError, match="brown_sentences is -1; it must be at least 0"):
        read(folder, brown_sentences=-1)
    with pytest.raises(UserError, match="brown_sentences=0 and treebank_text=false leave no text"):
        read(folder, brown_sentences=0, treebank_text=False)


def test_corpora_that_are_not_there(folder: Path):
    archive = folder / "corpora" / "brown.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("brown/README", "nothing")
    with pytest.raises(UserError, match="has no files of the Brown corpus, ca01 to cr09: get it"):
        read(folder)
    archive.unlink()
    message = "NLTK's Brown corpus, corpora/brown.zip, is not in .*: get it with `python -m nltk.d"
    with pytest.raises(UserError, match=message):
        read(folder)


def test_tests_that_are_all_in_the_training_text(folder: Path):
    (folder / "corpora" / "treebank" / "combined" / "wsj_0180.mrg").write_text(TREES[180][0])
    with pytest.raises(UserError, match="every test sentence is among the training sentences"):
        read(folder)


def test_batches_of_all_lengths(folder: Path):
    lengths = {len(x) for x in read(folder, batch_size=3, mix_lengths=True).train_batches(0)}
    assert lengths == {3}
    mixed = read(folder, batch_size=2, mix_lengths=True)
    firsts = {frozenset(mixed.train_batches(e)[0].lengths.tolist()) for e in range(40)}
    assert {len(lengths) for lengths in firsts} == {1, 2}
    assert {4, 12} in firsts and {4, 7} in firsts and {7, 12} in firsts


def test_counts_of_the_real_corpora(real_data: Path):
    data = brown(dir=str(real_data / "nltk_data"))
    counts = [len(data.split(name)) for name in ("train", "valid", "test", "seen_text")]
    assert counts == [37999, 145, 110, 1737]
    assert len(data.vocabulary) == 9538
    assert data.train.sentences[30000] == ["jess", "did", "n't", "seem", "too", "sure", "himself"]
