"""Where sentences and gold trees come from.

Six sources make a `GrammarData`: `toy_english` (sampled, needs no files), `treebank` (NLTK's
Penn Treebank sample), `penn_treebank` (the whole of it), `gum`, `bracketed` (files of trees) and
`text` (raw sentences, with trees to rate by or without); `brown.py` has another. What becomes of
words and trees on the way is told in `reading.py`, `brackets.py` and `words.py`.

    >>> data = toy_english(seed=0)
"""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from typing_extensions import Unpack

from gfnem.errors import UserError
from gfnem.files import user_path
from gfnem.tasks.grammar.text.corpus import DataOptions, GrammarData, check_least
from gfnem.tasks.grammar.text.nltk_data import find_corpus
from gfnem.tasks.grammar.text.reading import NAMED, Reading, read_sentences, read_trees, tree_files
from gfnem.tasks.grammar.text.toy_english import sample_trees
from gfnem.tasks.grammar.text.words import Punctuation, WordForms, glued, is_punctuation

TRAIN_SECTIONS, VALID_SECTIONS, TEST_SECTIONS = range(2, 22), (22,), (23,)
# Where the sections are in the folder of the Penn Treebank, version 3 or 2, or of a part of it.
SECTIONS_IN = (".", "wsj", "parsed/mrg/wsj", "treebank_3/parsed/mrg/wsj", "combined/wsj")


def toy_english(
    train_sentences: int = 3000,
    valid_sentences: int = 200,
    test_sentences: int = 400,
    min_length: int = 2,
    max_length: int = 12,
    min_count: int = 1,
    batch_size: int = 64,
    seed: int = 0,
) -> GrammarData:
    """Sentences of a small grammar of English, sampled with their trees. No two are the same.

    train_sentences, valid_sentences, test_sentences: how many.
    min_length, max_length: words in a sentence.
    min_count: rarer words become "<unk>".
    batch_size: of the training batches.
    seed: of the sentences and the order of the training batches.

    Raises UserError if there are not that many different sentences of these lengths.
    """
    counts = train_sentences, valid_sentences, test_sentences
    for name, count in zip(("train", "valid", "test"), counts, strict=True):
        check_least(f"{name}_sentences", count, 1)
    reading = Reading.of_trees(sample_trees(sum(counts), min_length, max_length, seed))
    ends = train_sentences, train_sentences + valid_sentences
    return GrammarData(
        "toy_english",
        reading.select(range(ends[0])),
        reading.select(range(*ends)),
        reading.select(range(ends[1], len(reading))),
        min_length,
        max_length,
        min_count,
        batch_size,
        seed,
    )


def treebank(
    dir: str | None = None,
    keep_currency: bool = True,
    punctuation: Punctuation = "remove",
    lowercase: bool = True,
    **options: Unpack[DataOptions],
) -> GrammarData:
    """The sample of the Penn Treebank that NLTK distributes: 3,914 trees of 199 files.

    Files wsj_0001 to 0159 are for training, 0160 to 0179 for validation, 0180 to 0199 for tests.

    dir: folder of NLTK's data, with `corpora/treebank.zip` or `corpora/treebank` in it. None looks
        in NLTK's search path, to which NLTK_DATA belongs, and then tries to download it.
    keep_currency: take `$` and `#` for words. With them there are 10,931 different words, those of
        one-word sentences counted too, and 524, 1,201, 1,997 and 3,741 sentences of 2 to 10, 15,
        20 and 40 words; to length 20 it is 1,737 training, 145 validation and 115 test sentences
        and a vocabulary of 2,267, "<unk>" among them. Without, as in compound-pcfg, it is 1,752,
        152 and 119 sentences and a vocabulary of 2,281 (2,283 where three words are special).
    punctuation, lowercase: as for `bracketed`.
    options: `DataOptions`, as for `GrammarData`.

    Raises UserError if the data is neither found nor downloaded, or damaged.
    """
    forms = WordForms(lowercase=lowercase, punctuation=punctuation)
    splits = treebank_files(dir, forms, keep_currency)
    return GrammarData("treebank", *splits, forms=forms, **options)


def treebank_files(
    dir: str | None, forms: WordForms, keep_currency: bool
) -> tuple[Reading, Reading, Reading]:
    """Read NLTK's sample: files 1 to 159, 160 to 179 and 180 to 199."""
    folder = find_corpus("treebank", "NLTK's treebank sample", dir) / "combined"
    train, valid, test = (
        _read_trees((folder / f"wsj_{number:04}.mrg" for number in numbers), forms, keep_currency)
        for numbers in (range(1, 160), range(160, 180), range(180, 200))
    )
    return train, valid, test


def penn_treebank(
    dir: str | None = None,
    keep_currency: bool = False,
    punctuation: Punctuation = "remove",
    lowercase: bool = True,
    **options: Unpack[DataOptions],
) -> GrammarData:
    """The Wall Street Journal part of the Penn Treebank (LDC99T42), which is not free.

    Sections 02 to 21 are for training, 22 for validation, 23 for tests, as is usual.

    dir: folder with the sections' folders in it, or the treebank's own folder, in which they are
        in `parsed/mrg/wsj`. None looks in the subfolder `ptb` of the folder that GFNEM_DATA names.
    keep_currency: take `$` and `#` for words; the field removes them (compound-pcfg).
    punctuation, lowercase: as for `bracketed`.
    options: `DataOptions`, as for `GrammarData`.

    Raises UserError if the folder or one of the sections is not there.
    """
    forms = WordForms(lowercase=lowercase, punctuation=punctuation)
    sections = _find_sections(_data_folder("ptb", dir))
    train, valid, test = (
        _read_bracketed(
            [str(sections / f"{number:02}") for number in numbers], forms, keep_currency
        )
        for numbers in (TRAIN_SECTIONS, VALID_SECTIONS, TEST_SECTIONS)
    )
    return GrammarData("ptb", train, valid, test, forms=forms, **options)


def gum(
    dir: str | None = None,
    valid_fraction: float = 0.1,
    keep_currency: bool = True,
    punctuation: Punctuation = "remove",
    lowercase: bool = True,
    **options: Unpack[DataOptions],
) -> GrammarData:
    """Constituency trees of GUM, English of many genres: `train.ptb` and `dev.ptb`.

    The trees of dev.ptb are for tests. What is chosen, the best checkpoint first of all, is chosen
    on the last trees of train.ptb, from which nothing is learned.

    dir: folder of the two files. None looks in the subfolder `gum` of the folder that GFNEM_DATA
        names.
    valid_fraction: share of the trees of train.ptb that are for validation, the last ones.
    keep_currency: take `$` and `#` for words; compound-pcfg removes them.
    punctuation, lowercase: as for `bracketed`.
    options: `DataOptions`, as for `GrammarData`.

    Raises UserError if the folder or one of the files is not there.
    """
    if not 0 < valid_fraction < 1:
        raise UserError(f"valid_fraction is {valid_fraction}; it must lie between 0 and 1")
    folder = _data_folder("gum", dir)
    files = [folder / name for name in ("train.ptb", "dev.ptb")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}: put the trees of GUM's splits, from "
            "https://github.com/amir-zeldes/gum, together in these files, or set data.dir to "
            "their folder"
        )
    forms = WordForms(lowercase=lowercase, punctuation=punctuation)
    train, test = (_read_trees([file], forms, keep_currency) for file in files)
    kept = len(train) - round(valid_fraction * len(train))
    return GrammarData(
        "gum",
        train.select(range(kept)),
        train.select(range(kept, len(train))),
        test,
        forms=forms,
        **options,
    )


def bracketed(
    train: str | Sequence[str],
    valid: str | Sequence[str] | None = None,
    test: str | Sequence[str] | None = None,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    keep_currency: bool = True,
    punctuation: Punctuation = "remove",
    lowercase: bool = True,
    **options: Unpack[DataOptions],
) -> GrammarData:
    """Bracketed trees as in the Penn Treebank, from files.

    train, valid, test: files, or folders with files in them at any depth that end in .mrg, .ptb,
        .prd, .tree, .trees, .bracket, .brackets or .txt.
    valid_fraction, test_fraction: shares of the training trees that are kept out for a split that
        is not given, evenly spread over the files and the same for every seed.
    keep_currency: take `$` and `#` for words; compound-pcfg removes them.
    punctuation: "keep" takes marks for words, "remove" removes them.
    lowercase: write all words in small letters.
    options: `DataOptions`, as for `GrammarData`.

    Raises UserError for what cannot be read: it names the file and the line.
    """
    forms = WordForms(lowercase=lowercase, punctuation=punctuation)
    splits = _cut(
        _read_bracketed(train, forms, keep_currency),
        None if valid is None else _read_bracketed(valid, forms, keep_currency),
        None if test is None else _read_bracketed(test, forms, keep_currency),
        valid_fraction,
        test_fraction,
    )
    return GrammarData("bracketed", *splits, forms=forms, **options)


def text(
    train: str | Sequence[str],
    valid: str | Sequence[str] | None = None,
    test: str | Sequence[str] | None = None,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    keep_currency: bool = True,
    punctuation: Punctuation = "remove",
    lowercase: bool = True,
    merge_numbers: bool = False,
    split_clitics: bool = False,
    tokenize: bool = False,
    **options: Unpack[DataOptions],
) -> GrammarData:
    """Raw sentences from text files, one a line, words between spaces, and trees to rate by.

    Any of the files may hold bracketed trees in place of raw sentences, as `bracketed` reads them,
    and is known by its first two brackets. Where raw text is among the files, the words of trees
    are written as raw text is.

    train, valid, test: files, or folders as for `bracketed`.
    valid_fraction, test_fraction: shares of the training sentences that are kept out for a split
        that is not given, evenly spread over the file and the same for every seed.
    keep_currency: take `$` and `#` of trees for words, as they are in raw text.
    punctuation, lowercase: as for `bracketed`.
    merge_numbers: write every number as `<num>`.
    split_clitics: make clitics of raw text words of their own, as the Penn Treebank does: do n't.
    tokenize: split raw text by NLTK's word tokeniser, for text as people write it: `again?`. Each
        line is one sentence. It splits clitics, too.
    options: `DataOptions`, as for `GrammarData`.

    Raises UserError for what cannot be read: it names the file and the line.
    """
    forms = WordForms(merge_numbers, split_clitics, lowercase, punctuation, tokenize)
    given = {"train": train, "valid": valid, "test": test}
    files = {
        split: _read_files(paths, forms, keep_currency)
        for split, paths in given.items()
        if paths is not None
    }
    raw = any(reading.trees is None for readings in files.values() for reading in readings)
    joined = {
        split: _joined([r.as_text(forms) if raw or merge_numbers else r for r in readings])
        for split, readings in files.items()
    }
    if not tokenize:
        note = _glued([r for readings in files.values() for r in readings if r.trees is None])
        joined["train"] = replace(joined["train"], notes=(*joined["train"].notes, *note))
    splits = _cut(
        joined["train"], joined.get("valid"), joined.get("test"), valid_fraction, test_fraction
    )
    return GrammarData("text", *splits, forms=forms, **options)


def _glued(readings: Sequence[Reading]) -> list[str]:
    """What to say of raw text in which more marks are glued to words than stand alone."""
    found = Counter(
        word for reading in readings for words in reading.sentences for word in glued(words)
    )
    alone = sum(gone.total() for reading in readings for gone in reading.dropped)
    alone += sum(
        is_punctuation(word)
        for reading in readings
        for words in reading.sentences
        for word in words
    )
    if found.total() <= alone:
        return []
    such = " ".join(word for word, _ in found.most_common(NAMED))
    return [
        f"warning: marks look glued to {found.total():,} words, such as {such}: tokenize=true "
        f"splits them off"
    ]


def _cut(
    train: Reading,
    valid: Reading | None,
    test: Reading | None,
    valid_fraction: float,
    test_fraction: float,
) -> tuple[Reading, Reading, Reading]:
    """Cut the splits that are not given out of the training sentences."""
    if min(valid_fraction, test_fraction) <= 0 or valid_fraction + test_fraction >= 1:
        raise UserError(
            f"valid_fraction={valid_fraction} and test_fraction={test_fraction}: both must be "
            f"above 0 and their sum below 1"
        )
    order = evenly(len(train))
    first = round(valid_fraction * len(train)) if valid is None else 0
    second = first + (round(test_fraction * len(train)) if test is None else 0)
    return (
        train.select(sorted(order[second:])),
        train.select(sorted(order[:first])) if valid is None else valid,
        train.select(sorted(order[first:second])) if test is None else test,
    )


def evenly(count: int) -> list[int]:
    """Order numbers below `count` such that any first few of them are evenly spread."""
    # Multiples of the golden ratio, modulo 1, lie evenly; so do the numbers that have the least.
    return sorted(range(count), key=lambda i: i * 0.6180339887498949 % 1)


def _read_trees(
    files: Iterable[Path | zipfile.Path], forms: WordForms, keep_currency: bool, note: str = ""
) -> Reading:
    """Read files of trees one after another; note: what there is to say of them."""
    readings = [read_trees(file, forms, keep_currency) for file in files]
    return replace(_joined(readings), notes=(note,) if note else ())


def _read_bracketed(paths: str | Sequence[str], forms: WordForms, keep_currency: bool) -> Reading:
    paths = [paths] if isinstance(paths, str) else paths
    return _joined(
        [_read_trees(files, forms, keep_currency, note) for files, note in map(tree_files, paths)]
    )


def _read_files(paths: str | Sequence[str], forms: WordForms, keep_currency: bool) -> list[Reading]:
    """Read files of raw sentences and of trees, each on its own."""
    readings = []
    for files, note in map(tree_files, [paths] if isinstance(paths, str) else paths):
        some = [read_sentences(file, forms, keep_currency) for file in files]
        some[0] = replace(some[0], notes=(note,) if note else ())
        readings += some
    return readings


def _joined(readings: Sequence[Reading]) -> Reading:
    """Put readings behind one another; without trees where one of them has none."""
    trees = [reading.trees for reading in readings]
    return Reading(
        [words for reading in readings for words in reading.sentences],
        None if None in trees else [tree for some in trees for tree in some or ()],
        [gone for reading in readings for gone in reading.dropped],
        tuple(dict.fromkeys(note for reading in readings for note in reading.notes)),
    )


def _data_folder(name: str, dir: str | None) -> Path:
    """The folder of data that comes with nothing: the one given, or one in GFNEM_DATA."""
    if dir is None and not (root := os.environ.get("GFNEM_DATA")):
        raise UserError(
            f"data={name} is not found: set data.dir to its folder, or GFNEM_DATA to a folder with "
            f"{name} in it"
        )
    folder = user_path(dir) if dir is not None else Path(root, name)
    if not folder.is_dir():
        raise UserError(f"data={name} was looked for in {folder}, which is no folder: set data.dir")
    return folder


def _find_sections(root: Path) -> Path:
    """The folder of all sections of the Penn Treebank that are read."""
    wanted = [f"{n:02}" for n in (*TRAIN_SECTIONS, *VALID_SECTIONS, *TEST_SECTIONS)]
    for place in SECTIONS_IN:
        folder = root / place
        missing = [name for name in wanted if not (folder / name).is_dir()]
        if not missing:
            return folder
        if len(missing) < len(wanted):
            raise UserError(
                f"{folder} has no section {', '.join(missing)} of the Penn Treebank: each is a "
                "folder with .mrg files"
            )
    raise UserError(
        f"{root} has no sections of the Penn Treebank, folders 02 to 23 with .mrg files, neither "
        f"in itself nor in {', '.join(SECTIONS_IN[1:])}: set data.dir to their folder"
    )
