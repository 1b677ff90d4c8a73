"""Treebanks and text as people have them; right values are worked by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gfnem.errors import UserError
from gfnem.tasks.grammar.text.brackets import split_trees
from gfnem.tasks.grammar.text.reading import Reading, read_trees
from gfnem.tasks.grammar.text.sources import bracketed, text
from gfnem.tasks.grammar.text.walk import bracketed as on_one_line
from gfnem.tasks.grammar.text.walk import depth_of, gold_spans
from gfnem.tasks.grammar.text.words import PLAIN, WordForms

KEPT = WordForms(punctuation="keep")


def read(folder: Path, content: str, **options: Any) -> Reading:
    file = folder / "own.mrg"
    file.write_text(content, encoding="utf-8")
    return read_trees(file, **options)


def lines_of(reading: Reading) -> list[str]:
    assert reading.trees is not None
    return [on_one_line(tree) for tree in reading.trees]


def total(reading: Reading) -> Counter[tuple[str, str]]:
    return sum(reading.dropped, Counter())


# Punctuation.


@pytest.mark.parametrize(
    ("tree", "marks"),
    [
        ("(IP (NP (NR 上海)) (PU ，) (VP (VV 开放)) (PU 。))", ["，", "。"]),
        ("(S (ART Der) (NN Hund) ($( -) ($, ,) (VVFIN bellt) ($. .))".replace("$(", "$["), "-,."),
        ("(SENT (NP (NC chien)) (PONCT ,) (V aboie) (PONCT .))", [",", "."]),
        ("(S (NOUN dog) (PUNCT ...) (VERB barks) (PUNCT |))", ["...", "|"]),
        ("(S (n perro) (F ¿) (v ladra) (fp ?))", ["¿", "?"]),
        ("(S (A *LRB*) (NN dog) (B -RSB-) (VB barks))", ["*LRB*", "-RSB-"]),
    ],
)
def test_punctuation_under_tags_of_any_treebank(tmp_path: Path, tree: str, marks: str):
    reading = read(tmp_path, tree)
    assert len(reading.sentences[0]) in (2, 3)
    assert total(reading) == Counter(("punctuation", mark) for mark in marks)
    kept = read(tmp_path, tree, forms=KEPT)
    assert len(kept.sentences[0]) == len(reading.sentences[0]) + len(marks)
    assert not total(kept)


def test_marks_that_are_words(tmp_path: Path):
    tree = "(S (NP (NNS boys) (POS ')) (SYM -) (CD 5) (NN %) (NN ％) (CC &) (SYM *))"
    assert read(tmp_path, tree).sentences == [["boys", "'", "-", "5", "%", "％", "&", "*"]]


def test_traces_go_even_if_punctuation_stays(tmp_path: Path):
    tree = "(S (NP *) (NP (NP *T*-1) (X *pro*)) (V go) (-NONE- 0) (: *) (. .))"
    reading = read(tmp_path, tree, forms=KEPT)
    assert reading.sentences == [["go", "*", "."]]
    assert total(reading) == {
        ("traces", "*"): 1,
        ("traces", "*T*-1"): 1,
        ("traces", "*pro*"): 1,
        ("traces", "0"): 1,
    }


def test_currency_signs_without_tags_can_be_removed(tmp_path: Path):
    tree = "(S (NP it costs $ 5) ($ US$))"
    assert read(tmp_path, tree, keep_currency=False).sentences == [["it", "costs", "5"]]
    assert read(tmp_path, tree).sentences == [["it", "costs", "$", "5", "us$"]]


# Every source takes the options.

GERMAN = "(S (NP (ART Der) (NN Hund)) ($, ,) (VVFIN bellt) ($. .))\n"


@pytest.mark.parametrize("source", [bracketed, text])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["der", "hund", "bellt"]),
        ({"lowercase": False}, ["Der", "Hund", "bellt"]),
        ({"punctuation": "keep"}, ["der", "hund", ",", "bellt", "."]),
    ],
)
def test_options_of_words(tmp_path: Path, source: Any, options: dict[str, Any], words: list[str]):
    file, raw = tmp_path / "trees.mrg", tmp_path / "raw.txt"
    file.write_text(GERMAN)
    raw.write_text("Der Hund , bellt .\n")
    files = [str(file)]
    data = source(train=files, valid=files, test=files, min_count=1, **options)
    assert data.train.sentences == [words]
    assert data.encode([words])[0].tolist() == data.train.word_ids[0].tolist()
    assert 0 not in data.train.word_ids[0]
    if source is text:
        mixed = text(train=str(raw), valid=files, test=files, min_count=1, **options)
        assert mixed.train.sentences == mixed.valid.sentences == [words]


def test_brackets_that_are_kept_are_written_alike(tmp_path: Path):
    file, raw = tmp_path / "trees.mrg", tmp_path / "raw.txt"
    file.write_text("(S (NP (-LRB- -LRB-) (NN dog) (-RRB- -RRB-)) (V barks))")
    raw.write_text("( dog ) barks\n-LRB- dog -RRB- barks\n")
    data = text(train=str(raw), valid=str(file), test=str(file), min_count=1, punctuation="keep")
    assert data.vocabulary.words == ["<unk>", "(", ")", "barks", "dog"]
    assert data.valid.word_ids[0].tolist() == data.train.word_ids[0].tolist() == [1, 4, 2, 3]


def test_punctuation_is_kept_or_removed(tmp_path: Path):
    (tmp_path / "trees.mrg").write_text(GERMAN)
    with pytest.raises(UserError, match="^punctuation is 'all'; use 'keep' or 'remove'$"):
        bracketed(train=str(tmp_path / "trees.mrg"), punctuation="all")  # pyright: ignore


# Trees without labels, tags or balance.


@pytest.mark.parametrize(
    ("content", "trees"),
    [
        # No labels: the file has more trees that begin with two brackets.
        (
            "( ( The ( old dog ) ) barks )\n( It ( ( barks , loudly ) . ) )",
            ["(X (X the (X old dog)) barks)", "(X it (X (X barks loudly)))"],
        ),
        # Labels: brackets around the tree, or around several, have none.
        (
            "( (S (NP (DT the) (NN dog)) (VP (VB barks))) )\n( (NP (NN dog)) (VP (VB barks)) )",
            [
                "(S (NP (DT the) (NN dog)) (VP (VB barks)))",
                "( (NP (NN dog)) (VP (VB barks)))",
            ],
        ),
        # No labels: none of the brackets above others is in capitals.
        (
            "( He ( sings ( to ( the crowd ) ) ) )\n( I ( sleep well ) )",
            ["(X he (X sings (X to (X the crowd))))", "(X i (X sleep well))"],
        ),
        ("( ( THE DOG ) ( SEES ( A CAT ) ) )", ["(X (X the dog) (X sees (X a cat)))"]),
        # Labels: more of them are above two brackets or more.
        (
            "( (s (sn (d el) (n perro)) (gv (v ladra))) (punt .) )",
            ["( (s (sn (d el) (n perro)) (gv (v ladra))))"],
        ),
        # Labels: in capitals.
        (
            "(FRAG (NP (NN yes)))\n(FRAG (INTJ (UH well then)))",
            ["(FRAG (NP (NN yes)))", "(FRAG (INTJ (UH well then)))"],
        ),
        ("(s el perro)", ["(s el perro)"]),
        # A word in brackets of its own is a word if most are, a label in them never.
        (
            "(S (NP (PRP (Dia))) (VP (VB (pergi)) (NP) (ADVP ())))\n(S (NP (A a)) (VP (B b)))",
            ["(S (NP (PRP dia)) (VP (VB pergi)))", "(S (NP (A a)) (VP (B b)))"],
        ),
    ],
)
def test_labels_tags_and_words(tmp_path: Path, content: str, trees: list[str]):
    assert lines_of(read(tmp_path, content)) == trees


def test_empty_constituents_are_counted(tmp_path: Path):
    for content in ("(S (NP) (VP (A a) (B b)))", "(S (NP (A (a)) (NP)) (VP (B (b))))"):
        reading = read(tmp_path, content)
        assert reading.sentences == [["a", "b"]]
        assert total(reading) == {("empty constituents", "NP"): 1}


def test_words_stand_between_white_space_of_any_kind(tmp_path: Path):
    space = "\u00a0"  # no break, as str.split and NLTK's trees take it
    assert read(tmp_path, f"(S{space}(A{space}a) (CD 10{space}000))").sentences == [
        ["a", "10", "000"]
    ]
    assert PLAIN.words(f"10{space}000 mots{space}!") == ["10", "000", "mots"]


@pytest.mark.parametrize(
    ("content", "pieces"),
    [
        # As they stand: another tree follows.
        (r"(S (A a) (UH x\))(S (A a))", [(r"(S (A a) (UH x\))", False), ("(S (A a))", True)]),
        (r"(S (UH x\))", [(r"(S (UH x\))", False)]),
        # Escapes: otherwise a bracket too many, or too few.
        (r"(S (A x\)) (B b)) (S a)", [(r"(S (A x\)) (B b))", True), ("(S a)", True)]),
        (r"(S (A \() (B b)) (S a)", [(r"(S (A \() (B b))", True), ("(S a)", True)]),
        # Both close.
        (r"(S (A \() (B \)))", [(r"(S (A \() (B \)))", True)]),
    ],
)
def test_backslashes_before_brackets(content: str, pieces: list[tuple[str, bool]]):
    assert list(split_trees(content, "own")) == pieces


def test_words_with_escaped_brackets(tmp_path: Path):
    reading = read(tmp_path, r"(S (NN foo\)) (NN \(bar) (: \()) (S (A x\) (B b))")
    assert reading.sentences == [["foo)", "(bar"], ["x\\", "b"]]
    assert lines_of(reading)[0] == "(S (NN foo-RRB-) (NN -LRB-bar))"


def test_broken_trees_are_named_by_their_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"own.mrg, line 2: the tree that starts here is not clos"):
        read(tmp_path, "(S (A a) (B b))\n(S (A \\() (B b)\n(S (A a) (B b))")


@pytest.mark.parametrize("depth", [500, 5_000])
def test_deep_trees(tmp_path: Path, depth: int):
    deep = "".join(f"(X (W w{i}) " for i in range(depth)) + "(W end)" + ")" * depth
    chain = "(X " * depth + "(A a) (B b)" + ")" * depth
    reading = read(tmp_path, deep + chain)
    assert [len(words) for words in reading.sentences] == [depth + 1, 2]
    assert reading.trees is not None
    assert gold_spans(reading.trees[0]) == {(i, depth + 1) for i in range(depth)}
    assert gold_spans(reading.mirrored().trees[0]) == {(0, i + 2) for i in range(depth)}  # pyright: ignore
    assert gold_spans(reading.as_text(KEPT).trees[1]) == {(0, 2)}  # pyright: ignore
    assert lines_of(reading)[1].count("(X") == depth
    assert [depth_of(tree) for tree in reading.trees] == [depth + 1, depth + 1]


def test_many_trees_on_one_line_close_as_they_stand(tmp_path: Path):
    reading = read(tmp_path, "(S (A x\\) (B b)) " * 1_000)
    assert reading.sentences == [["x\\", "b"]] * 1_000


def test_hidden_files_with_trees_are_passed_over(tmp_path: Path):
    for name in ("a.mrg", "._a.mrg", ".ipynb_checkpoints/a.mrg", "a.doc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("(S (A a) (B b))")
    folder = str(tmp_path)
    for source in (bracketed, text):
        data = source(train=folder, valid=folder, test=folder)
        assert len(data.train) == 1
        assert data.describe().endswith(f"; not read in {folder}: 1 .doc")


# What is said of it.


def test_what_was_dropped_is_said(tmp_path: Path):
    file = tmp_path / "own.mrg"
    file.write_text("(S (A a) (B b) (, ,) (. .) (: :) (: ;) (. .) (C *-1))\n" * 2)
    data = bracketed(train=str(file), valid=str(file), test=str(file), max_test_length=40)
    assert data.describe().endswith(
        "dropped 30 punctuation (. , : ...), 6 traces (*-1)"  # three splits of two trees
    )


def test_limits_are_not_blamed_alone(tmp_path: Path):
    file = tmp_path / "own.mrg"
    file.write_text("(S (NP (-NONE- *)) (VP (-NONE- *) (. .)))\n(S (A a))")
    message = (
        r"none of the 2 train sentences has 2 to 20 words \(left out: 1 without words, 1 of one "
        r"word\), dropped 2 traces \(\*\), 1 punctuation \(\.\): change min_length"
    )
    with pytest.raises(UserError, match=message):
        bracketed(train=str(file), valid=str(file), test=str(file))


# Inputs of people.


@pytest.mark.parametrize(
    ("name", "number", "tree"),
    [
        ("backslash_word_corpus.mrg", 20, "(S (NP (PRP i)) (VP (VBP like) (NP (PRP it))))"),
        ("backslash_word_corpus.mrg", 21, "(S (A a) (B b))"),
        ("bom_crlf.mrg", 0, "(S (NP (DT the) (NN dog)) (VP (VBZ barks) (ADVP (RB loudly))))"),
        ("ctb_corpus.mrg", 0, "(IP (NP (NR 上海) (NN 学校0)) (VP (VV 开放) (NP (NN 课程0))))"),
        (
            "ftb_ponct.mrg",
            0,
            "(SENT (NP-SUJ (DET le) (NC chien)) (VN (V aboie)) (ADV fort))",
        ),
        (
            "idn_corpus.mrg",
            29,
            "(S (NP (PRP dia)) (ADVP (RB juga)) (VP (VB pergi)))",
        ),
        (
            "nltk1706_escaped_corpus.mrg",
            20,
            "(S (NP (DT the) (NN chorus)) (VP (VBZ sings) (NP (NN foo-RRB-) (NN bar))))",
        ),
        (
            "snli_corpus.mrg",
            0,
            "(X (X the (X old chorus0)) (X sings (X to (X the crowd))))",
        ),
        (
            "vocab_v1.mrg",
            0,
            "(S (NP (DT a) (NN queen)) (VP (VBZ sees) (NP (DT a) (NN queen))))",
        ),
        (
            "vocab_v2.mrg",
            2,
            "(S (NP (DT zum) (NN king)) (VP (VBZ sees) (NP (DT zum) (NN king))))",
        ),
    ],
)
def test_trees_of_people(cases: Path, name: str, number: int, tree: str):
    reading = read_trees(cases / name)
    assert lines_of(reading)[number] == tree
    # One tree a line in these files, but for the one of three lines.
    lines = (cases / name).read_text(encoding="utf-8").strip().count("\n") + 1
    assert len(reading) == (1 if name == "bom_crlf.mrg" else lines)


def test_a_tree_500_deep(cases: Path):
    reading = read_trees(cases / "deep_500.mrg")
    assert reading.sentences[-1] == [f"w{i}" for i in range(500)]
    assert reading.sentences[:-1] == [["a", "b"]] * 20


def test_right_branching_trees_of_chinese(cases: Path):
    """One of the two spans within the sentence is right, whichever tree it is."""
    trees = read_trees(cases / "ctb_corpus.mrg").trees
    assert trees is not None
    assert {gold_spans(tree) & {(1, 4), (2, 4)} == {(2, 4)} for tree in trees} == {True}
    assert {len(gold_spans(tree)) for tree in trees} == {3}


# Raw text.


def write(folder: Path, content: str) -> str:
    file = folder / "raw.txt"
    file.write_text(content, encoding="utf-8")
    return str(file)


def test_lines_end_at_newlines_alone(tmp_path: Path):
    file = write(tmp_path, "\ufeffthe dog\x0cbarks\x85\nat\u2028the\u2029\x1ccat\n")
    data = text(train=file, valid=file, test=file)
    assert data.train.sentences == [["the", "dog", "barks"], ["at", "the", "cat"]]


def test_raw_text_as_people_write_it(tmp_path: Path):
    file = write(tmp_path, 'She wrote a letter.\n"Don\'t you see?", he said (twice)!\n')
    plain = text(train=file, valid=file, test=file, min_count=1)
    assert plain.describe().endswith(
        'warning: marks look glued to 12 words, such as letter. "don\'t see?",: tokenize=true '
        "splits them off"  # three splits of four words
    )
    data = text(train=file, valid=file, test=file, min_count=1, tokenize=True)
    assert data.train.sentences == [
        ["she", "wrote", "a", "letter"],
        ["do", "n't", "you", "see", "he", "said", "twice"],
    ]
    assert "glued" not in data.describe()
    kept = text(train=file, valid=file, test=file, tokenize=True, punctuation="keep")
    assert kept.train.sentences[0] == ["she", "wrote", "a", "letter", "."]


@pytest.mark.parametrize(
    "content",
    [
        "Mr. Smith of the U.S. paid 5 % , at 10:30 .\nIt 's Corp. , of dogs' .\n",
        "no marks at all\n",
        "hi! there , now .\n",  # one of three
    ],
)
def test_text_that_is_split_already(tmp_path: Path, content: str):
    file = write(tmp_path, content)
    for punctuation in ("keep", "remove"):
        data = text(train=file, valid=file, test=file, punctuation=punctuation)
        assert "glued" not in data.describe()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("ctb_corpus_raw.txt", ["上海", "学校0", "开放", "课程0"]),
        ("text_u2028.txt", ["the", "dog", "number0", "barks", "at", "the", "cat"]),
        ("parse_bom.txt", ["the", "old", "king", "saw", "a", "cat"]),
    ],
)
def test_text_of_people(cases: Path, name: str, sentence: list[str]):
    file = str(cases / name)
    data = text(train=file, valid=file, test=file)
    assert data.train.sentences[0] == sentence
    assert len(data.train) == (cases / name).read_bytes().count(b"\n")


def test_text_of_people_that_is_not_utf_8(cases: Path):
    with pytest.raises(UserError, match="parse_latin1.txt, line 1: not UTF-8 text; convert"):
        text(train=str(cases / "parse_latin1.txt"))
