"""Reading, cleaning and batching of sentences, and the errors of what cannot be read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nltk
import pytest
from hydra.utils import get_object
from nltk import Tree
from omegaconf import OmegaConf

from gfnem.app.signatures import annotations_of, fits
from gfnem.errors import UserError
from gfnem.tasks.grammar.text import sources as data_module
from gfnem.tasks.grammar.text.corpus import GrammarData, Vocabulary
from gfnem.tasks.grammar.text.reading import Reading, read_trees
from gfnem.tasks.grammar.text.sources import (
    SECTIONS_IN,
    bracketed,
    gum,
    penn_treebank,
    text,
    toy_english,
    treebank,
)
from gfnem.tasks.grammar.text.toy_english import RULES, WORDS
from gfnem.tasks.grammar.text.walk import gold_spans
from gfnem.tasks.grammar.text.words import PLAIN

# Two trees over several lines, the first with a trace under an empty constituent, quotes,
# brackets, a currency sign and a unary chain.
TREES = """
( (S
    (`` ``)
    (NP-SBJ-1 (DT The) (NN Dog) )
    (VP (VBD Cost)
      (NP (QP ($ $) (CD 1,000) ) (-NONE- *U*) )
      (S (NP-SBJ (-NONE- *-1) ) )
      (PRN (-LRB- -LRB-) (ADVP (RB Roughly) ) (-RRB- -RRB-) ))
    (. .) ))
( (S (NP (NP (PRP It) )) (VP (VBD slept) ) (. .) ))
"""


@pytest.fixture
def trees_file(tmp_path: Path) -> Path:
    file = tmp_path / "two.mrg"
    file.write_text(TREES)
    return file


@pytest.fixture(scope="module")
def toy() -> GrammarData:
    return toy_english(train_sentences=90, valid_sentences=10, test_sentences=20, batch_size=8)


def write(folder: Path, name: str, content: str | bytes) -> str:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def trees_of(file: Path, **options: Any) -> list[Tree]:
    trees = read_trees(file, **options).trees
    assert trees is not None
    return trees


def all_sentences(data: GrammarData) -> list[list[str]]:
    return [sentence for part in (data.train, data.valid, data.test) for sentence in part.sentences]


# Preprocessing, worked by hand.


def test_punctuation_traces_and_empty_constituents_are_removed(trees_file: Path):
    first, second = trees_of(trees_file)
    assert first == Tree.fromstring(
        "(S (NP-SBJ-1 (DT the) (NN dog)) (VP (VBD cost) (NP (QP ($ $) (CD 1,000)))"
        " (PRN (ADVP (RB roughly)))))"
    )
    # the dog | cost $ 1,000 roughly; $ 1,000 within it
    assert gold_spans(first) == {(0, 2), (2, 6), (3, 5), (0, 6)}
    assert second.leaves() == ["it", "slept"]
    assert gold_spans(second) == {(0, 2)}


def test_currency_signs_can_be_removed(trees_file: Path):
    first, _ = trees_of(trees_file, keep_currency=False)
    assert first.leaves() == ["the", "dog", "cost", "1,000", "roughly"]
    assert gold_spans(first) == {(0, 2), (2, 5), (0, 5)}


def test_flat_trees_and_words_without_tags(tmp_path: Path):
    file = tmp_path / "untagged.txt"
    file.write_text("(S (NP the Old (N king)) , slept (ADVP well) .)")
    (tree,) = trees_of(file)
    assert tree.leaves() == ["the", "old", "king", "slept", "well"]
    assert gold_spans(tree) == {(0, 3), (0, 5)}


@pytest.mark.parametrize("tag", ["HYPH", "NFP", "-LSB-", ":"])
def test_tags_of_punctuation(tmp_path: Path, tag: str):
    file = tmp_path / "tag.ptb"
    file.write_text(f"(NP (NN eye) ({tag} -) (NN test) (SYM /))")
    assert trees_of(file)[0].leaves() == ["eye", "test", "/"]


def test_tokenize_removes_punctuation_alone():
    line = "The U.S. -LRB- `` it 's 5 % '' -RRB- — well-known … & $ 3 ."
    assert PLAIN.words(line) == ["the", "u.s.", "it", "'s", "5", "%", "well-known", "&", "$", "3"]


# Vocabulary and batches.


def test_rare_words_become_unknown(tmp_path: Path):
    train = write(tmp_path, "train", "A a b c\nb a d\n")
    other = write(tmp_path, "other", "c a new\n")
    data = text(train=train, valid=other, test=other)
    assert data.vocabulary.words == ["<unk>", "a", "b"]
    assert data.train.word_ids[0].tolist() == [1, 1, 2, 0]
    assert data.valid.word_ids[0].tolist() == [0, 1, 0]
    assert data.valid.sentences == [["c", "a", "new"]]
    assert [ids.tolist() for ids in data.encode([["b", "zebra"], ["a"]])] == [[2, 0], [1]]


def test_a_vocabulary_survives_json(toy: GrammarData):
    copy = Vocabulary(words=json.loads(json.dumps(toy.vocabulary.words)))
    assert len(copy) == len(toy.vocabulary) == toy.sizes()["vocabulary"]
    for i, word in enumerate(toy.vocabulary.words):
        assert copy.id(word) == i and copy.word(i) == word
    assert copy.id("zebra") == 0


def test_an_unknown_word_in_the_text_is_the_unknown_word():
    vocabulary = Vocabulary.from_sentences([["<unk>", "a", "<unk>"]])
    assert vocabulary.words == ["<unk>", "a"]
    assert vocabulary.ids(["a", "<unk>"]).tolist() == [1, 0]


@pytest.mark.parametrize("words", [["a", "<unk>"], [], ["<unk>", "a", "a"]])
def test_a_vocabulary_that_is_none(words: list[str]):
    with pytest.raises(ValueError):
        Vocabulary(words)


def test_every_training_sentence_comes_once_in_an_epoch(toy: GrammarData):
    for epoch in (0, 1):
        batches = toy.train_batches(epoch)
        ids = [i for x in batches for i in x.ids.tolist()]
        assert sorted(ids) == list(range(len(toy.train)))
        assert all(len(x) <= 8 for x in batches)
        for x in batches:
            assert x.words.shape == (len(x), int(x.lengths.max()))
            for words, length, i in zip(x.words, x.lengths.tolist(), x.ids.tolist(), strict=True):
                assert words[:length].tolist() == toy.train.word_ids[i].tolist()
                assert not words[length:].any()


def test_batches_hold_neighbouring_lengths(toy: GrammarData):
    spans = sorted((int(x.lengths.min()), int(x.lengths.max())) for x in toy.train_batches(epoch=0))
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))


def test_batches_depend_on_seed_and_epoch_alone(toy: GrammarData):
    def composition(data: GrammarData, epoch: int) -> list[list[int]]:
        return [x.ids.tolist() for x in data.train_batches(epoch)]

    again = toy_english(train_sentences=90, valid_sentences=10, test_sentences=20, batch_size=8)
    again.train_batches(5)
    assert composition(again, 3) == composition(toy, 3)
    together = [{frozenset(ids) for ids in composition(toy, epoch)} for epoch in (0, 1)]
    assert together[0] != together[1]
    reading = Reading(toy.train.sentences, None)
    seeds = [GrammarData("x", reading, reading, reading, 2, 12, 1, 8, seed) for seed in (0, 1)]
    assert composition(seeds[0], 0) != composition(seeds[1], 0)


def test_evaluation_batches_leave_nothing_out(toy: GrammarData):
    batches = toy.test.batches(batch_size=3)
    lengths = [length for x in batches for length in x.lengths.tolist()]
    assert lengths == sorted(toy.test.lengths.tolist())
    ids = [i for x in batches for i in x.ids.tolist()]
    assert sorted(ids) == list(range(20)) and [len(x) for x in batches] == [3] * 6 + [2]
    assert ids == [i for x in toy.test.batches(batch_size=3) for i in x.ids.tolist()]


# The sources.


@pytest.mark.parametrize(
    "name", ["toy_english", "treebank", "ptb", "gum", "bracketed", "text", "brown"]
)
def test_configuration_has_all_options(root: Path, name: str):
    options = OmegaConf.to_container(OmegaConf.load(root / "conf" / "data" / f"{name}.yaml"))
    assert isinstance(options, dict)
    annotations = annotations_of(get_object(options["data"].pop("_target_")))
    assert options["data"].keys() == annotations.keys()
    given = {key: value for key, value in options["data"].items() if value != "???"}
    assert all(fits(value, annotations[key]) for key, value in given.items())
    assert not fits("long", annotations["max_length"])


def test_toy_english_keeps_to_its_sizes_and_repeats_no_sentence(toy: GrammarData):
    assert (len(toy.train), len(toy.valid), len(toy.test)) == (90, 10, 20)
    sentences = all_sentences(toy)
    assert len({tuple(sentence) for sentence in sentences}) == len(sentences) == 120
    assert all(2 <= len(sentence) <= 12 for sentence in sentences)
    assert toy.split("test") is toy.test
    with pytest.raises(UserError, match="split is 'tset'; use one of train, valid, test"):
        toy.split("tset")


def test_toy_english_is_the_same_for_the_same_seed(toy: GrammarData):
    sizes = {"train_sentences": 90, "valid_sentences": 10, "test_sentences": 20}
    assert toy_english(**sizes, seed=0).train.sentences == toy.train.sentences
    assert toy_english(**sizes, seed=1).train.sentences != toy.train.sentences


def test_toy_english_trees_belong_to_their_sentences(toy: GrammarData):
    assert toy.train.gold_trees is not None and toy.train.gold is not None
    for sentence, tree, spans in zip(
        toy.train.sentences, toy.train.gold_trees, toy.train.gold, strict=True
    ):
        assert tree.leaves() == sentence
        assert (0, len(sentence)) in spans
        # A tree's brackets never cross.
        assert not any(a < c < b < d for a, b in spans for c, d in spans)


def test_the_toy_grammar_is_a_grammar():
    for expansions in RULES.values():
        assert sum(probability for probability, _ in expansions) == pytest.approx(1)
        assert all(symbol in RULES | WORDS for _, right in expansions for symbol in right)
    words = [word for some in WORDS.values() for word in some]
    assert len(words) == len(set(words)), "a word has two parts of speech"


def test_toy_english_branches_to_neither_side():
    test = toy_english(train_sentences=1, valid_sentences=1, test_sentences=400).test
    trees = test.gold
    assert trees is not None

    def f1(branching: Callable[[int], set[tuple[int, int]]]) -> float:
        scores = []
        for gold, length in zip(trees, test.lengths.tolist(), strict=True):
            inner = gold - {(0, length)}
            found = branching(length) - {(0, length)}
            total = len(inner) + len(found)
            scores.append(200 * len(inner & found) / total if total else 100)
        return sum(scores) / len(scores)

    assert 40 < f1(lambda length: {(start, length) for start in range(length - 1)}) < 60
    assert f1(lambda length: {(0, end) for end in range(2, length + 1)}) < 40


def test_raw_text_has_no_gold_trees(tmp_path: Path):
    file = write(tmp_path, "raw.txt", "\ufeff" + "The old king slept .\n" * 30 + "\nYes !\n")
    data = text(train=file)
    assert data.train.gold is None and data.train.gold_trees is None
    assert data.train.sentences[0] == ["the", "old", "king", "slept"]
    assert len(all_sentences(data)) == 30
    left_out = [dict(part.left_out) for part in (data.train, data.valid, data.test)]
    assert sum(reasons.get("without words", 0) for reasons in left_out) == 1
    assert sum(reasons.get("of one word", 0) for reasons in left_out) == 1


def test_splits_that_are_not_given_are_cut_from_the_training_trees(tmp_path: Path):
    trees = [f"(S (A x{number}) (B y))" for number in range(100)]
    file = write(tmp_path, "trees.ptb", "\n".join(trees))
    data = bracketed(train=file, valid_fraction=0.2, test_fraction=0.1, min_count=1)
    assert (len(data.train), len(data.valid), len(data.test)) == (70, 20, 10)
    assert sorted(words[0] for words in all_sentences(data)) == sorted(
        f"x{number}" for number in range(100)
    )
    other = bracketed(train=file, valid_fraction=0.2, test_fraction=0.1, seed=5)
    assert other.test.sentences == data.test.sentences
    given = bracketed(train=file, valid=file, test=[file, file])
    assert (len(given.train), len(given.valid), len(given.test)) == (100, 100, 200)


def test_folders_are_read_at_any_depth(tmp_path: Path, trees_file: Path):
    deep = tmp_path / "corpus" / "b" / "c"
    deep.mkdir(parents=True)
    shutil.copy(trees_file, deep / "two.mrg")
    write(tmp_path / "corpus", "README", "no trees")
    folder = str(tmp_path / "corpus")
    data = bracketed(train=folder, valid=folder, test=folder)
    assert [len(sentence) for sentence in data.train.sentences] == [6, 2]


def test_describe_accounts_for_all_that_was_read(tmp_path: Path):
    lines = ["a b c d e f", "a b c", "a b", "a", "."]
    file = write(tmp_path, "raw", "\n".join(lines))
    data = text(train=file, valid=file, test=file, min_length=3, max_length=5, min_count=1)
    part = (
        "1 sentences, 3 words (left out: 1 longer than 5, 1 shorter than 3, 1 of one word, "
        "1 without words)"
    )
    assert data.describe() == (
        f"text: train {part}; valid {part}; test {part}; 3 words known; dropped 3 punctuation (.)"
    )


def test_longer_sentences_for_a_further_test(tmp_path: Path):
    lines = ["a b c d e f", "a b c", "a b c d", "a b", "a b c d e f g h"]
    file = write(tmp_path, "raw", "\n".join(lines))
    plain = text(train=file, valid=file, test=file, max_length=4, min_count=1)
    data = text(train=file, valid=file, test=file, max_length=4, max_test_length=6, min_count=1)
    assert (plain.long_test, data.long_test) == (None, "test_to_6")
    assert data.sizes() == plain.sizes() == {"vocabulary": 5, "max_length": 4}
    assert data.test.sentences == plain.test.sentences
    longer = data.split("test_to_6")
    assert longer.lengths.tolist() == [6, 3, 4, 2]
    assert longer.word_ids[0].tolist() == [*longer.word_ids[2].tolist(), 0, 0]  # e and f unknown
    assert longer.left_out == {"longer than 6": 1}
    assert [x.lengths.tolist() for x in longer.batches(2, above=2)] == [[3, 4], [6]]
    assert data.more_tests == []
    at_most = text(train=file, valid=file, test=file, max_length=4, max_test_length=4)
    assert at_most.long_test is None
    with pytest.raises(UserError, match="max_test_length is 3; it must be at least 4"):
        text(train=file, valid=file, test=file, max_length=4, max_test_length=3)


# Raw text and trees from different files.


def test_raw_text_with_trees_to_rate_by(tmp_path: Path):
    raw = write(tmp_path, "raw.txt", "The dogs' owner can't pay $5 .\nboys bark\n")
    trees = write(
        tmp_path,
        "valid.ptb",
        "(S (NP (NNS boys) (POS ') (NN dogs)) (VP (MD ca) (RB n't) (VB bark)))\n"
        "(S (NP (NN and\\/or)) (VP (CD 1\\/2)))",
    )
    data = text(train=raw, valid=trees, test=raw, min_count=1, split_clitics=True)
    assert data.train.sentences[0] == ["the", "dogs", "owner", "ca", "n't", "pay", "$", "5"]
    assert (data.train.gold, data.test.gold) == (None, None)
    # The possessive is no word of raw text, nor are the treebank's backslashes.
    assert data.valid.sentences == [["boys", "dogs", "ca", "n't", "bark"], ["and/or", "1/2"]]
    assert data.valid.gold == [frozenset({(0, 5), (0, 2), (2, 5)}), frozenset({(0, 2)})]
    merged = text(train=raw, valid=trees, test=raw, min_count=1, merge_numbers=True)
    assert merged.valid.sentences[1] == ["and/or", "<num>"]
    assert merged.train.sentences[0] == ["the", "dogs'", "owner", "can't", "pay", "<num>"]


def test_trees_alone_keep_their_words(tmp_path: Path):
    trees = write(tmp_path, "a.ptb", "(S (NP (NNS boys) (POS ')) (VBP bark))")
    data = text(train=trees, valid=trees, test=trees, min_count=1)
    assert data.train.sentences == [["boys", "'", "bark"]]
    assert data.train.gold == [frozenset({(0, 3), (0, 2)})]
    lines = write(tmp_path, "raw.txt", "( not a tree )\n( S x )")
    both = text(train=[trees, lines], valid=trees, test=trees, min_count=1)
    assert both.train.sentences == [["boys", "bark"], ["not", "a", "tree"], ["s", "x"]]
    assert both.train.gold is None and both.valid.gold == [frozenset({(0, 2)})]


def test_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trees = write(tmp_path, "a.ptb", "(S (NP (NNS boys)) (VBP bark))")
    lines = write(tmp_path, "raw.txt", "boys bark")
    read: list[str] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: read.append(str(file)) or read_bytes(file))
    text(train=lines, valid=trees, test=lines)
    assert read == [lines, trees, lines]


# Real data.


def test_counts_of_the_treebank(real_data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(nltk.data, "path", [str(real_data / "nltk_data")])
    everything = treebank(max_length=1000, min_count=1)
    lengths = [len(sentence) for sentence in all_sentences(everything)]
    one_word = [part.left_out["of one word"] for part in (everything.train, everything.valid)]
    assert len(lengths) + sum(one_word) == 3914
    assert [sum(length <= most for length in lengths) for most in (10, 15, 20, 40)] == [
        *(524, 1201, 1997, 3741)
    ]
    data = treebank()
    assert (len(data.train), len(data.valid), len(data.test)) == (1737, 145, 115)
    assert len(data.vocabulary) == 2267
    assert data.train.sentences[0][:4] == ["pierre", "vinken", "61", "years"]
    fewer = treebank(keep_currency=False)
    assert (len(fewer.train), len(fewer.valid), len(fewer.test)) == (1752, 152, 119)


def test_word_types_of_the_treebank(real_data: Path):
    archive = real_data / "nltk_data" / "corpora" / "treebank.zip"
    folder = zipfile.Path(archive, "treebank/combined/")
    words = {
        word
        for number in range(1, 200)
        for sentence in read_trees(folder / f"wsj_{number:04}.mrg").sentences
        for word in sentence
    }
    assert len(words) == 10931


def test_the_treebank_is_read_where_nltk_refuses(real_data: Path, tmp_path: Path):
    """As an archive, or unpacked, in a folder that all accounts may write."""
    archive = real_data / "nltk_data" / "corpora" / "treebank.zip"
    corpora = tmp_path / "corpora"
    corpora.mkdir()
    with zipfile.ZipFile(archive) as opened:
        members = [name for name in opened.namelist() if name.startswith("treebank/combined/")]
        opened.extractall(corpora, members)
    tmp_path.chmod(0o777)
    corpora.chmod(0o777)
    data = treebank(dir=str(tmp_path))
    assert (len(data.train), len(data.valid), len(data.test)) == (1737, 145, 115)


def test_gum_is_read_completely(real_data: Path):
    train, valid = (real_data / "gum" / name for name in ("train.ptb", "dev.ptb"))
    limit = 10_000
    data = bracketed(
        train=str(train), valid=str(valid), test=str(valid), max_length=limit, min_count=1
    )
    for file, part in ((train, data.train), (valid, data.valid)):
        # GUM starts every tree, and nothing else, with ROOT.
        roots = file.read_text(encoding="utf-8").count("(ROOT")
        assert len(part) + sum(part.left_out.values()) == roots
        assert set(part.left_out) <= {"of one word", "without words"}


def test_gum_keeps_its_last_training_trees_for_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "gum").mkdir()
    for name, numbers in (("train.ptb", range(10)), ("dev.ptb", range(10, 12))):
        trees = "".join(f"(ROOT\n  (S (NN sentence) (CD {n})))\n\n" for n in numbers)
        write(tmp_path / "gum", name, trees)
    monkeypatch.setenv("GFNEM_DATA", str(tmp_path))
    for data in (gum(valid_fraction=0.3), gum(dir=str(tmp_path / "gum"), valid_fraction=0.3)):
        numbers = [
            [int(words[1]) for words in corpus.sentences]
            for corpus in (data.train, data.valid, data.test)
        ]
        assert numbers == [list(range(7)), [7, 8, 9], [10, 11]]


def write_sections(folder: Path, numbers: Iterable[int]) -> None:
    """A sentence for each section, whose second word is the section's number."""
    for number in numbers:
        section = folder / f"{number:02}"
        section.mkdir(parents=True)
        tree = f"( (S (NN section) (CD {number}) ($ $) (. .)) )"
        (section / f"WSJ_{number:02}01.MRG").write_text(tree)


@pytest.mark.parametrize("place", SECTIONS_IN)
def test_sections_of_the_penn_treebank(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_sections(tmp_path / "ptb" / place, range(25))
    data = penn_treebank(dir=str(tmp_path / "ptb"))
    numbers = [
        [int(words[1]) for words in corpus.sentences]
        for corpus in (data.train, data.valid, data.test)
    ]
    assert numbers == [list(range(2, 22)), [22], [23]]
    monkeypatch.setenv("GFNEM_DATA", str(tmp_path))
    spoken = penn_treebank(keep_currency=True)
    assert spoken.valid.sentences == [["section", "22", "$"]]


# What cannot be used.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("(S (A a) (B b))\n\n(S (A a)\n  (B b)\n(S (A a) (B b))\n", "line 3: the tree that starts"),
        ("(S (A a) (B b)))\n", "line 1: a bracket is closed that was never opened"),
        ("(S (A a) (B b))\nstray (S (A a) (B b))", "line 2: 'stray' is not within brackets"),
        (b"(S (A a)\n (B \xe9t\xe9))", "line 2: not UTF-8 text"),
        (" \n", "is empty"),
    ],
)
def test_broken_files(tmp_path: Path, content: str | bytes, message: str):
    file = write(tmp_path, "broken.ptb", content)
    with pytest.raises(UserError, match=message) as caught:
        bracketed(train=file)
    assert "broken.ptb" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files(tmp_path: Path):
    with pytest.raises(UserError, match="nosuch.ptb cannot be read: No such file"):
        bracketed(train=str(tmp_path / "nosuch.ptb"))
    with pytest.raises(UserError, match="nosuch.txt cannot be read: No such file"):
        text(train=str(tmp_path / "nosuch.txt"))


def test_folders_without_trees(tmp_path: Path):
    with pytest.raises(UserError, match="has no files with trees in it"):
        bracketed(train=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_length": 1}, "min_length is 1; it must be at least 2"),
        ({"max_length": 1}, "max_length is 1; it must be at least 2"),
        ({"min_count": 0}, "min_count is 0; it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"min_length": 9, "max_length": 9}, "none of the .* train sentences has 9 to 9 words"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "valid_fraction=0.5 and test_fraction=0.5"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], message: str):
    file = write(tmp_path, "raw.txt", "a b c\n" * 30)
    with pytest.raises(UserError, match=message):
        text(train=file, **options)


def test_too_many_toy_sentences():
    with pytest.raises(UserError, match="different sentences of 2 to 2 words where 150 are wanted"):
        toy_english(max_length=2, train_sentences=50, valid_sentences=50, test_sentences=50)
    with pytest.raises(UserError, match="valid_sentences is 0; it must be at least 1"):
        toy_english(valid_sentences=0)


def test_a_treebank_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tried = []
    monkeypatch.setattr(nltk, "download", lambda name, **_: tried.append(name))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="cannot be downloaded: get it with") as caught:
        treebank()
    assert tried == ["treebank"]
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is not in nowhere: get it with"):
        treebank(dir="nowhere")
    assert tried == ["treebank"]


@pytest.mark.parametrize(("name", "read"), [("gum", gum), ("ptb", penn_treebank)])
def test_data_of_the_user_that_is_not_there(
    name: str, read: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("GFNEM_DATA", raising=False)
    with pytest.raises(UserError, match=f"data={name} is not found: set data.dir to its folder, "):
        read()
    monkeypatch.setenv("GFNEM_DATA", str(tmp_path))
    for options, folder in (({}, tmp_path / name), ({"dir": "nowhere"}, "nowhere")):
        message = f"data={name} was looked for in {folder}, which is no folder: set data.dir"
        with pytest.raises(UserError, match=f"^{message}$"):
            read(**options)


def test_folders_without_gum(tmp_path: Path):
    with pytest.raises(UserError, match=f"^{tmp_path} has no train.ptb and no dev.ptb: put the"):
        gum(dir=str(tmp_path))
    write(tmp_path, "train.ptb", "(S (A a) (B b))")
    with pytest.raises(UserError, match=f"^{tmp_path} has no dev.ptb: put the trees of GUM's"):
        gum(dir=str(tmp_path))
    with pytest.raises(UserError, match="valid_fraction is 1.0; it must lie between 0 and 1"):
        gum(valid_fraction=1.0)


def test_folders_without_sections(tmp_path: Path):
    message = f"^{tmp_path} has no sections of the Penn Treebank, folders 02 to 23 .* set data.dir"
    with pytest.raises(UserError, match=message):
        penn_treebank(dir=str(tmp_path))
    write_sections(tmp_path / "wsj", (*range(2, 7), *range(8, 22), 23))
    message = f"^{tmp_path / 'wsj'} has no section 07, 22 of the Penn Treebank: each is a folder"
    with pytest.raises(UserError, match=message):
        penn_treebank(dir=str(tmp_path))


def test_a_treebank_that_can_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def download(name: str, **_: object) -> None:
        folder = tmp_path / "corpora" / name / "combined"
        folder.mkdir(parents=True)
        for number in range(1, 200):
            (folder / f"wsj_{number:04}.mrg").write_text("( (S (A a) (B b)) )")

    monkeypatch.setattr(nltk, "download", download)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    data = treebank()
    assert (len(data.train), len(data.valid), len(data.test)) == (159, 20, 20)


def test_damaged_treebanks(tmp_path: Path):
    (tmp_path / "corpora").mkdir()
    archive = tmp_path / "corpora" / "treebank.zip"
    archive.write_bytes(b"half of an archive")
    with pytest.raises(UserError, match="treebank.zip is damaged: delete it"):
        treebank(dir=str(tmp_path))
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("treebank/combined/wsj_0001.mrg", "( (S (A a) (B b)) )")
    with pytest.raises(UserError, match="wsj_0002.mrg cannot be read: there is no such file"):
        treebank(dir=str(tmp_path))
    whole = archive.read_bytes()
    archive.write_bytes(whole.replace(b"(A a)", b"(A c)", 1))
    with pytest.raises(UserError, match="wsj_0001.mrg cannot be read: the archive is damaged"):
        treebank(dir=str(tmp_path))


def test_importing_the_data_leaves_nltk_alone(root: Path):
    code = f"import sys, {data_module.__name__}; sys.exit('nltk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
