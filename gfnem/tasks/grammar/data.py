"""Sentences to induce a grammar from, with gold trees to rate it by.

Six sources make a `GrammarData`: `toy_english` (sampled, needs no files), `treebank` (NLTK's
Penn Treebank sample), `penn_treebank` (the whole of it), `gum`, `bracketed` (files of trees) and
`text` (raw sentences). What becomes of words and trees on the way is told in `brackets.py`.

    data = toy_english(seed=0)
"""

from __future__ import annotations

import io
import os
import random
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gfnem.errors import UserError
from gfnem.tasks.grammar.brackets import (
    Reading,
    Span,
    gold_spans,
    read_lines,
    read_trees,
    tree_files,
)
from gfnem.tasks.grammar.toy_english import sample_trees

if TYPE_CHECKING:
    from nltk import Tree

SplitName = Literal["train", "valid", "test"]

UNKNOWN = "<unk>"

TRAIN_SECTIONS, VALID_SECTIONS, TEST_SECTIONS = range(2, 22), (22,), (23,)
# Where the sections are in the folder of the Penn Treebank, version 3 or 2, or of a part of it.
SECTIONS_IN = (".", "wsj", "parsed/mrg/wsj", "treebank_3/parsed/mrg/wsj", "combined/wsj")


@dataclass(frozen=True)
class Sentences:
    """A batch of sentences, each two words or longer.

    words: word ids, padded with 0 behind the sentence.
    ids: where the sentences are in their corpus; -1 for sentences that are in none.
    """

    words: Int[Tensor, "batch length"]
    lengths: Int[Tensor, "batch"]
    ids: Int[Tensor, "batch"]

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str) -> Sentences:
        return Sentences(self.words.to(device), self.lengths.to(device), self.ids.to(device))


class Vocabulary:
    """Words and their ids. Id 0 is "<unk>", which stands for every other word.

    words: in the order of their ids, "<unk>" first. `Vocabulary(vocabulary.words)` is a copy.

    Raises ValueError if "<unk>" is not the first word or a word occurs twice.
    """

    def __init__(self, words: Sequence[str]):
        self.words = list(words)
        self._ids = {word: i for i, word in enumerate(self.words)}
        if self.words[:1] != [UNKNOWN]:
            raise ValueError(f"the first word of a vocabulary must be {UNKNOWN!r}")
        if len(self._ids) < len(self.words):
            raise ValueError("a word occurs twice in the vocabulary")

    @classmethod
    def from_sentences(cls, sentences: Iterable[Sequence[str]], min_count: int = 1) -> Vocabulary:
        """All words that occur at least `min_count` times, the most frequent first."""
        counts = Counter(word for sentence in sentences for word in sentence)
        del counts[UNKNOWN]
        frequent = [word for word, count in counts.items() if count >= min_count]
        return cls([UNKNOWN, *sorted(frequent, key=lambda word: (-counts[word], word))])

    def __len__(self) -> int:
        return len(self.words)

    def id(self, word: str) -> int:
        return self._ids.get(word, 0)

    def ids(self, words: Iterable[str]) -> Int[Tensor, "length"]:
        return torch.tensor([self.id(word) for word in words], dtype=torch.long)

    def word(self, id: int) -> str:
        return self.words[id]


@dataclass(frozen=True)
class Corpus:
    """One split of the data.

    sentences: words as read: lower-cased, without punctuation and traces.
    word_ids: the same as ids.
    gold: unlabelled spans (start, end) of two or more words, the whole sentence included; None
        for raw text.
    gold_trees: with the words as leaves; None for raw text.
    left_out: why sentences were left out -> how many.
    """

    sentences: list[list[str]]
    word_ids: list[Int[Tensor, "length"]]
    gold: list[frozenset[Span]] | None
    gold_trees: list[Tree] | None
    left_out: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.sentences)

    @cached_property
    def lengths(self) -> Int[Tensor, "sentences"]:
        return torch.tensor([len(ids) for ids in self.word_ids], dtype=torch.long)

    def batch(self, indices: Sequence[int]) -> Sentences:
        """Some of the sentences, padded to the longest of them."""
        ids = torch.tensor(indices, dtype=torch.long)
        words = pad_sequence([self.word_ids[i] for i in indices], batch_first=True)
        return Sentences(words, self.lengths[ids], ids)

    def batches(self, batch_size: int) -> list[Sentences]:
        """All sentences in a fixed order, from short to long."""
        order = torch.argsort(self.lengths, stable=True).tolist()
        return [self.batch(indices) for indices in _chunks(order, batch_size)]


class GrammarData:
    """A training, a validation and a test corpus with one vocabulary.

    name: of the source.
    train, valid, test: what was read; sentences of one word or none, shorter than `min_length` or
        longer than `max_length` words are left out.
    min_count: words that are rarer among the training sentences become "<unk>".
    batch_size: of the training batches.
    seed: of the order of the training batches.
    vocabulary: None for that of the training sentences.

    Raises UserError for an option out of its range and for a split without sentences.
    """

    def __init__(
        self,
        name: str,
        train: Reading,
        valid: Reading,
        test: Reading,
        min_length: int,
        max_length: int,
        min_count: int,
        batch_size: int,
        seed: int,
        vocabulary: Vocabulary | None = None,
    ):
        _check_least("min_length", min_length, 2)
        _check_least("max_length", max_length, min_length)
        _check_least("min_count", min_count, 1)
        _check_least("batch_size", batch_size, 1)
        self.name = name
        self.max_length = max_length
        self.min_count = min_count
        self.batch_size = batch_size
        self.seed = seed
        readings = {"train": train, "valid": valid, "test": test}
        kept = {
            split: _within(split, reading, min_length, max_length)
            for split, reading in readings.items()
        }
        self.vocabulary = vocabulary or Vocabulary.from_sentences(
            kept["train"][0].sentences, min_count
        )
        corpora = {split: self._corpus(*kept[split]) for split in kept}
        self.train, self.valid, self.test = (corpora[split] for split in ("train", "valid", "test"))

    def _corpus(self, reading: Reading, left_out: Mapping[str, int]) -> Corpus:
        return Corpus(
            sentences=reading.sentences,
            word_ids=self.encode(reading.sentences),
            gold=None if reading.trees is None else [gold_spans(tree) for tree in reading.trees],
            gold_trees=reading.trees,
            left_out=left_out,
        )

    def split(self, name: SplitName) -> Corpus:
        return {"train": self.train, "valid": self.valid, "test": self.test}[name]

    def encode(self, sentences: Iterable[Iterable[str]]) -> list[Int[Tensor, "length"]]:
        """Word ids of sentences; words are looked up as they are, so lower-case them before."""
        return [self.vocabulary.ids(sentence) for sentence in sentences]

    def train_batches(self, epoch: int) -> list[Sentences]:
        """All training sentences once, those of one batch of (nearly) one length.

        Which sentences share a batch and the order of the batches depend on `seed` and epoch.
        """
        # Text as a seed is hashed the same way in every process.
        generator = random.Random(f"{self.seed} {epoch}")
        order = list(range(len(self.train)))
        generator.shuffle(order)
        order.sort(key=lambda i: len(self.train.sentences[i]))
        chunks = _chunks(order, self.batch_size)
        generator.shuffle(chunks)
        return [self.train.batch(indices) for indices in chunks]

    def sizes(self) -> dict[str, int]:
        """What models of this data need to know of it."""
        return {"vocabulary": len(self.vocabulary), "max_length": self.max_length}

    def describe(self) -> str:
        """What was read and what was left out, in one line."""
        splits = [
            f"{name} {len(corpus):,} sentences, {int(corpus.lengths.sum()):,} words{_rest(corpus)}"
            for name, corpus in (("train", self.train), ("valid", self.valid), ("test", self.test))
        ]
        words = f"{len(self.vocabulary) - 1:,} words known"
        if self.min_count > 1:
            words += f" (seen {self.min_count} times or more)"
        return "; ".join([f"{self.name}: {splits[0]}", *splits[1:], words])


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
        _check_least(f"{name}_sentences", count, 1)
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
    min_length: int = 2,
    max_length: int = 20,
    min_count: int = 2,
    batch_size: int = 16,
    seed: int = 0,
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
    min_length, max_length, min_count, batch_size, seed: as for `GrammarData`.

    Raises UserError if the data is neither found nor downloaded, or damaged.
    """
    folder = _find_treebank(dir)
    numbers = {"train": range(1, 160), "valid": range(160, 180), "test": range(180, 200)}
    train, valid, test = (
        _read_trees((folder / f"wsj_{number:04}.mrg" for number in numbers[split]), keep_currency)
        for split in ("train", "valid", "test")
    )
    return GrammarData(
        "treebank", train, valid, test, min_length, max_length, min_count, batch_size, seed
    )


def penn_treebank(
    dir: str | None = None,
    keep_currency: bool = False,
    min_length: int = 2,
    max_length: int = 20,
    min_count: int = 2,
    batch_size: int = 16,
    seed: int = 0,
) -> GrammarData:
    """The Wall Street Journal part of the Penn Treebank (LDC99T42), which is not free.

    Sections 02 to 21 are for training, 22 for validation, 23 for tests, as is usual.

    dir: folder with the sections' folders in it, or the treebank's own folder, in which they are
        in `parsed/mrg/wsj`. None looks in the subfolder `ptb` of the folder that GFNEM_DATA names.
    keep_currency: take `$` and `#` for words; the field removes them (compound-pcfg).
    min_length, max_length, min_count, batch_size, seed: as for `GrammarData`.

    Raises UserError if the folder or one of the sections is not there.
    """
    sections = _find_sections(_data_folder("ptb", dir))
    train, valid, test = (
        _read_bracketed([str(sections / f"{number:02}") for number in numbers], keep_currency)
        for numbers in (TRAIN_SECTIONS, VALID_SECTIONS, TEST_SECTIONS)
    )
    return GrammarData(
        "ptb", train, valid, test, min_length, max_length, min_count, batch_size, seed
    )


def gum(
    dir: str | None = None,
    valid_fraction: float = 0.1,
    keep_currency: bool = True,
    min_length: int = 2,
    max_length: int = 20,
    min_count: int = 2,
    batch_size: int = 16,
    seed: int = 0,
) -> GrammarData:
    """Constituency trees of GUM, English of many genres: `train.ptb` and `dev.ptb`.

    The trees of dev.ptb are for tests. What is chosen, the best checkpoint first of all, is chosen
    on the last trees of train.ptb, from which nothing is learned.

    dir: folder of the two files. None looks in the subfolder `gum` of the folder that GFNEM_DATA
        names.
    valid_fraction: share of the trees of train.ptb that are for validation, the last ones.
    keep_currency: take `$` and `#` for words; compound-pcfg removes them.
    min_length, max_length, min_count, batch_size, seed: as for `GrammarData`.

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
    train, test = (_read_trees([file], keep_currency) for file in files)
    kept = len(train) - round(valid_fraction * len(train))
    return GrammarData(
        "gum",
        train.select(range(kept)),
        train.select(range(kept, len(train))),
        test,
        min_length,
        max_length,
        min_count,
        batch_size,
        seed,
    )


def bracketed(
    train: str | Sequence[str],
    valid: str | Sequence[str] | None = None,
    test: str | Sequence[str] | None = None,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    keep_currency: bool = True,
    min_length: int = 2,
    max_length: int = 20,
    min_count: int = 2,
    batch_size: int = 16,
    seed: int = 0,
) -> GrammarData:
    """Bracketed trees as in the Penn Treebank, from files.

    train, valid, test: files, or folders with files in them at any depth that end in .mrg, .ptb,
        .prd, .tree, .trees, .bracket, .brackets or .txt.
    valid_fraction, test_fraction: shares of the training trees that are kept out for a split that
        is not given, evenly spread over the files and the same for every seed.
    keep_currency: take `$` and `#` for words; compound-pcfg removes them.
    min_length, max_length, min_count, batch_size, seed: as for `GrammarData`.

    Raises UserError for what cannot be read: it names the file and the line.
    """
    splits = _cut(
        _read_bracketed(train, keep_currency),
        None if valid is None else _read_bracketed(valid, keep_currency),
        None if test is None else _read_bracketed(test, keep_currency),
        valid_fraction,
        test_fraction,
    )
    return GrammarData("bracketed", *splits, min_length, max_length, min_count, batch_size, seed)


def text(
    train: str,
    valid: str | None = None,
    test: str | None = None,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    min_length: int = 2,
    max_length: int = 20,
    min_count: int = 2,
    batch_size: int = 16,
    seed: int = 0,
) -> GrammarData:
    """Raw sentences from text files, one a line, words between spaces. There are no gold trees.

    train, valid, test: files.
    valid_fraction, test_fraction: shares of the training sentences that are kept out for a split
        that is not given, evenly spread over the file and the same for every seed.
    min_length, max_length, min_count, batch_size, seed: as for `GrammarData`.

    Raises UserError for what cannot be read: it names the file and the line.
    """
    splits = _cut(
        read_lines(Path(train)),
        None if valid is None else read_lines(Path(valid)),
        None if test is None else read_lines(Path(test)),
        valid_fraction,
        test_fraction,
    )
    return GrammarData("text", *splits, min_length, max_length, min_count, batch_size, seed)


def _within(
    name: str, reading: Reading, min_length: int, max_length: int
) -> tuple[Reading, dict[str, int]]:
    """The sentences within the limits, and how many were left out for which reason."""
    reasons = [_reason(len(words), min_length, max_length) for words in reading.sentences]
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    if not kept:
        raise UserError(
            f"none of the {len(reading)} {name} sentences has {min_length} to {max_length} words: "
            f"change min_length and max_length, or give more sentences"
        )
    return reading.select(kept), dict(Counter(reason for reason in reasons if reason is not None))


def _reason(length: int, min_length: int, max_length: int) -> str | None:
    """Why a sentence of this length is left out; None if it is kept."""
    if length < 2:
        return "of one word" if length == 1 else "without words"
    if length < min_length:
        return f"shorter than {min_length}"
    return f"longer than {max_length}" if length > max_length else None


def _rest(corpus: Corpus) -> str:
    if not corpus.left_out:
        return ""
    return f" (left out: {', '.join(f'{n:,} {why}' for why, n in corpus.left_out.items())})"


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
    # Multiples of the golden ratio, modulo 1, lie evenly; so do the sentences that have the least.
    order = sorted(range(len(train)), key=lambda i: i * 0.6180339887498949 % 1)
    first = round(valid_fraction * len(train)) if valid is None else 0
    second = first + (round(test_fraction * len(train)) if test is None else 0)
    return (
        train.select(sorted(order[second:])),
        train.select(sorted(order[:first])) if valid is None else valid,
        train.select(sorted(order[first:second])) if test is None else test,
    )


def _read_trees(files: Iterable[Path | zipfile.Path], keep_currency: bool) -> Reading:
    return Reading.of_trees([tree for file in files for tree in read_trees(file, keep_currency)])


def _read_bracketed(paths: str | Sequence[str], keep_currency: bool) -> Reading:
    paths = [paths] if isinstance(paths, str) else paths
    return _read_trees((file for path in paths for file in tree_files(Path(path))), keep_currency)


def _data_folder(name: str, dir: str | None) -> Path:
    """The folder of data that comes with nothing: the one given, or one in GFNEM_DATA."""
    if dir is None and not (root := os.environ.get("GFNEM_DATA")):
        raise UserError(
            f"data={name} is not found: set data.dir to its folder, or GFNEM_DATA to a folder with "
            f"{name} in it"
        )
    folder = Path(dir) if dir is not None else Path(root, name)
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


def _find_treebank(dir: str | None) -> Path | zipfile.Path:
    """The folder of the treebank's .mrg files, which may be within its archive.

    NLTK only says where to look: its own readers refuse files that other accounts may write.
    """
    import nltk

    roots = [str(root) for root in nltk.data.path] if dir is None else [dir]
    found = _treebank_below(roots)
    if found is None and dir is None:
        _download_treebank()
        found = _treebank_below(roots)
    if found is None:
        failed = " and cannot be downloaded" if dir is None else ""
        raise UserError(
            f"NLTK's treebank sample, corpora/treebank.zip, is not in {', '.join(roots)}{failed}: "
            f"get it with `python -m nltk.downloader treebank` and set dir or NLTK_DATA to the "
            f"folder that it prints"
        )
    return found


def _treebank_below(roots: Iterable[str]) -> Path | zipfile.Path | None:
    for root in roots:
        folder = Path(root, "corpora", "treebank", "combined")
        if os.path.isdir(folder):
            return folder
        archive = Path(root, "corpora", "treebank.zip")
        if os.path.isfile(archive):
            try:
                return zipfile.Path(archive, "treebank/combined/")
            except zipfile.BadZipFile:
                raise UserError(f"{archive} is damaged: delete it and get it again") from None
    return None


def _download_treebank() -> None:
    """Try to; without a network nothing happens."""
    import nltk

    with warnings.catch_warnings(), suppress(OSError, ValueError):
        warnings.simplefilter("ignore")
        nltk.download("treebank", quiet=True, print_error_to=io.StringIO())


def _chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[first : first + size] for first in range(0, len(order), size)]


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{name} is {value}; it must be at least {least}")
