"""What the command line does with a trained grammar: `gfnem parse` and `gfnem generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.tasks.grammar.decode import Decode, bracketed
from gfnem.tasks.grammar.decode import parse as parse_batch
from gfnem.tasks.grammar.text.corpus import GrammarData, Sentences

BATCH = 64


def parse(
    em: EM, file: str | None = None, decode: Decode = "mbr", samples: int = 16
) -> Iterator[str]:
    """Bracketed trees of sentences, a line each.

    file: the sentences, one a line, words between spaces; standard input when None.
    decode, samples: see `decode.parse`.

    A sentence that has no tree gives an empty line, so that input and output agree line by line,
    and a note on standard error. Unknown words are parsed, with a note.

    Raises UserError for a file that cannot be read and for samples below 1.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be at least 1")
    data = _data(em)
    sentences = [line.split() for line in _lines(file)]
    for first in range(0, len(sentences), BATCH):
        some = sentences[first : first + BATCH]
        notes = [_note(words, data) for words in some]
        for number, (note, _) in enumerate(notes, first + 1):
            if note:
                print(f"line {number}: {note}", file=sys.stderr)
        fit = [words for words, (_, fits) in zip(some, notes, strict=True) if fits]
        trees = iter(
            parse_batch(em.model, em.posterior, _batch(fit, data), fit, decode, samples)
            if fit
            else []
        )
        for _, fits in notes:
            yield bracketed(next(trees)) if fits else ""


def generate(em: EM, n: int = 16) -> Iterator[str]:
    """Sentences drawn from the grammar: words, a tab and the bracketed tree, a line each.

    A tree prior has no part in it, as a note on standard error says where there is one.

    Raises UserError for n below 1.
    """
    if n < 1:
        raise UserError(f"n is {n}; it must be at least 1")
    data = _data(em)
    if not em.model.normalised:
        print("drawn from the grammar alone, without its tree prior", file=sys.stderr)
    x, z = em.model.sample(n)
    for sentence, length in enumerate(x.lengths.tolist()):
        ids = x.words[sentence, :length].tolist()
        words = [data.vocabulary.word(i) for i in ids]
        yield f"{' '.join(words)}\t{bracketed(z.to_nltk(sentence, words))}"
    if len(x) < n:
        print(
            f"{n - len(x)} of {n} sentences are missing: the grammar kept drawing ones longer than "
            f"{data.max_length} words",
            file=sys.stderr,
        )


def _data(em: EM) -> GrammarData:
    assert isinstance(em.data, GrammarData)
    return em.data


def _lines(file: str | None) -> Iterable[str]:
    try:
        if file is None:
            return list(sys.stdin)
        with Path(file).open(encoding="utf-8") as opened:
            return list(opened)
    except OSError as error:
        raise UserError(f"file={file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"file={file} is not UTF-8 text: convert it") from None


def _note(words: list[str], data: GrammarData) -> tuple[str, bool]:
    """What there is to say of a sentence, and whether it can be parsed."""
    if not words:
        return "", False
    if len(words) == 1:
        return f"{words[0]!r} is one word, which has no tree", False
    if len(words) > data.max_length:
        return f"{len(words)} words, the model was made for at most {data.max_length}", False
    unknown = [word for word in words if data.vocabulary.id(data.forms.form(word)) == 0]
    if len(unknown) == len(words):
        return "no word of it is known", True
    return f"unknown: {' '.join(unknown)}" if unknown else "", True


def _batch(sentences: list[list[str]], data: GrammarData) -> Sentences:
    word_ids = data.encode(sentences)
    lengths = torch.tensor([len(words) for words in word_ids])
    ids = torch.full_like(lengths, -1)
    return Sentences(pad_sequence(word_ids, batch_first=True), lengths, ids)
