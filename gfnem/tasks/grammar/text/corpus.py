"""Corpora of sentences with one vocabulary, and batches of them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypedDict

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gfnem.errors import UserError
from gfnem.splits import named_split
from gfnem.tasks.grammar.text.reading import Reading, said_of
from gfnem.tasks.grammar.text.walk import Span, gold_spans
from gfnem.tasks.grammar.text.words import PLAIN, WordForms

if TYPE_CHECKING:
    from nltk import Tree

UNKNOWN = "<unk>"


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

    sentences: words as read, in the form that the vocabulary has them.
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

    def batches(self, batch_size: int, above: int = 0) -> list[Sentences]:
        """All sentences of more than `above` words in a fixed order, from short to long."""
        order = torch.argsort(self.lengths, stable=True)
        order = order[self.lengths[order] > above].tolist()
        return [self.batch(indices) for indices in _chunks(order, batch_size)]


class DataOptions(TypedDict, total=False):
    """What sources hand over to `GrammarData` as it is given to them."""

    min_length: int
    max_length: int
    max_test_length: int | None
    min_count: int
    batch_size: int
    seed: int


class GrammarData:
    """A training, a validation and a test corpus with one vocabulary.

    name: of the source.
    train, valid, test: what was read; sentences of one word or none, shorter than `min_length` or
        longer than `max_length` words are left out.
    min_count: words that are rarer among the training sentences become "<unk>".
    batch_size: of the training batches.
    seed: of the order of the training batches.
    vocabulary: None for that of the training sentences.
    forms: how words are written that are looked up, such as those of sentences to be parsed.
    more_tests: further test corpora by name.
    new_tests: whether test sentences that are among the training sentences, word for word, are left
        out; those of `more_tests` stay.
    mix_lengths: whether a training batch has sentences of all lengths, not of one.
    max_test_length: where it is above `max_length`, there is a further test corpus, named
        `test_to_40` for 40: the test sentences of up to so many words, of which those of `test` are
        the first part in length. Neither training nor a model's sizes know of it. None for none.

    Attributes:
        corpora: all of them by name.
        more_tests: names of the test corpora beside `test` and the longer one.
        long_test: name of the test corpus of longer sentences; None for none.

    Raises UserError for an option out of its range and for a split without sentences.
    """

    def __init__(
        self,
        name: str,
        train: Reading,
        valid: Reading,
        test: Reading,
        min_length: int = 2,
        max_length: int = 20,
        min_count: int = 2,
        batch_size: int = 16,
        seed: int = 0,
        vocabulary: Vocabulary | None = None,
        forms: WordForms = PLAIN,
        more_tests: Mapping[str, Reading] | None = None,
        new_tests: bool = False,
        mix_lengths: bool = False,
        max_test_length: int | None = None,
    ):
        check_least("min_length", min_length, 2)
        check_least("max_length", max_length, min_length)
        check_least("min_count", min_count, 1)
        check_least("batch_size", batch_size, 1)
        self.name = name
        self.max_length = max_length
        self.min_count = min_count
        self.batch_size = batch_size
        self.seed = seed
        self.forms = forms
        self.mix_lengths = mix_lengths
        readings = {"train": train, "valid": valid, "test": test, **(more_tests or {})}
        limits = dict.fromkeys(readings, max_length)
        tests = ["test"]
        self.more_tests = list(more_tests or {})
        self.long_test: str | None = None
        if max_test_length is not None:
            check_least("max_test_length", max_test_length, max_length)
            if max_test_length > max_length:
                self.long_test = f"test_to_{max_test_length}"
                readings[self.long_test] = test
                limits[self.long_test] = max_test_length
                tests.append(self.long_test)
        kept = {
            split: _within(split, reading, min_length, limits[split])
            for split, reading in readings.items()
        }
        if new_tests:
            for split in tests:
                kept[split] = _without_known(*kept[split], kept["train"][0])
        self.vocabulary = vocabulary or Vocabulary.from_sentences(
            kept["train"][0].sentences, min_count
        )
        self.corpora = {split: self._corpus(*kept[split]) for split in kept}
        read = [reading for split, reading in readings.items() if split != self.long_test]
        dropped = said_of([gone for reading in read for gone in reading.dropped])
        self._notes = [f"dropped {dropped}"] if dropped else []
        self._notes += dict.fromkeys(note for reading in read for note in reading.notes)

    def _corpus(self, reading: Reading, left_out: Mapping[str, int]) -> Corpus:
        return Corpus(
            sentences=reading.sentences,
            word_ids=self.encode(reading.sentences),
            gold=None if reading.trees is None else [gold_spans(tree) for tree in reading.trees],
            gold_trees=reading.trees,
            left_out=left_out,
        )

    @property
    def train(self) -> Corpus:
        return self.corpora["train"]

    @property
    def valid(self) -> Corpus:
        return self.corpora["valid"]

    @property
    def test(self) -> Corpus:
        return self.corpora["test"]

    def split(self, name: str) -> Corpus:
        """Give a corpus by its name; raises UserError for a name that there is not."""
        return named_split(self.corpora, name)

    def encode(self, sentences: Iterable[Iterable[str]]) -> list[Int[Tensor, "length"]]:
        """Look up the ids of sentences' words, in the form that the vocabulary has them."""
        form = self.forms.form
        return [self.vocabulary.ids(map(form, sentence)) for sentence in sentences]

    def train_batches(self, epoch: int) -> list[Sentences]:
        """All training sentences once, those of one batch of (nearly) one length.

        With `mix_lengths` a batch has sentences of any. Which sentences share a batch and the order
        of the batches depend on `seed` and epoch.
        """
        # Text as a seed is hashed the same way in every process.
        generator = random.Random(f"{self.seed} {epoch}")
        order = list(range(len(self.train)))
        generator.shuffle(order)
        if not self.mix_lengths:
            order.sort(key=lambda i: len(self.train.sentences[i]))
        chunks = _chunks(order, self.batch_size)
        generator.shuffle(chunks)
        return [self.train.batch(indices) for indices in chunks]

    def sizes(self) -> dict[str, int]:
        """What models of this data need to know of it."""
        return {"vocabulary": len(self.vocabulary), "max_length": self.max_length}

    def describe(self) -> str:
        """What was read, what was left out and what was dropped of sentences, in one line."""
        splits = [
            f"{name} {len(corpus):,} sentences, {int(corpus.lengths.sum()):,} words"
            f"{_said(corpus.left_out)}"
            for name, corpus in self.corpora.items()
        ]
        words = f"{len(self.vocabulary) - 1:,} words known"
        if self.min_count > 1:
            words += f" (seen {self.min_count} times or more)"
        return "; ".join([f"{self.name}: {splits[0]}", *splits[1:], words, *self._notes])


def _within(
    name: str, reading: Reading, min_length: int, max_length: int
) -> tuple[Reading, dict[str, int]]:
    """The sentences within the limits, and how many were left out for which reason."""
    reasons = [_reason(len(words), min_length, max_length) for words in reading.sentences]
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    left_out = dict(Counter(reason for reason in reasons if reason is not None))
    if not kept:
        dropped = said_of(reading.dropped)
        raise UserError(
            f"none of the {len(reading)} {name} sentences has {min_length} to {max_length} words"
            f"{_said(left_out)}{f', dropped {dropped}' if dropped else ''}: change min_length and "
            f"max_length, or give more sentences"
        )
    return reading.select(kept), left_out


def _without_known(
    reading: Reading, left_out: Mapping[str, int], train: Reading
) -> tuple[Reading, dict[str, int]]:
    """What is not among the training sentences, and all that was left out for which reason."""
    known = set(map(tuple, train.sentences))
    new = [i for i, words in enumerate(reading.sentences) if tuple(words) not in known]
    if not new:
        raise UserError("every test sentence is among the training sentences: give others")
    if len(new) < len(reading):
        left_out = {**left_out, "in the training text": len(reading) - len(new)}
    return reading.select(new), dict(left_out)


def _reason(length: int, min_length: int, max_length: int) -> str | None:
    """Why a sentence of this length is left out; None if it is kept."""
    if length < 2:
        return "of one word" if length == 1 else "without words"
    if length < min_length:
        return f"shorter than {min_length}"
    return f"longer than {max_length}" if length > max_length else None


def _said(left_out: Mapping[str, int]) -> str:
    if not left_out:
        return ""
    return f" (left out: {', '.join(f'{n:,} {why}' for why, n in left_out.items())})"


def _chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[first : first + size] for first in range(0, len(order), size)]


def check_least(name: str, value: int, least: int) -> None:
    """Raise UserError for an option that is too small."""
    if value < least:
        raise UserError(f"{name} is {value}; it must be at least {least}")
