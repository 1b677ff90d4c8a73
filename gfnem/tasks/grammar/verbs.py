"""What the command line does with a trained grammar: `gfnem parse` and `gfnem generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from gfnem.categorical import check_draws
from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.files import read_input
from gfnem.tasks.grammar import ensemble
from gfnem.tasks.grammar.decode import Decode
from gfnem.tasks.grammar.decode import parse as parse_batch
from gfnem.tasks.grammar.ensemble import BATCH, data_of, encode
from gfnem.tasks.grammar.text.corpus import GrammarData, check_least
from gfnem.tasks.grammar.text.walk import bracketed
from gfnem.tasks.grammar.text.words import WordForms

if TYPE_CHECKING:
    from nltk import Tree


def parse(
    em: EM, file: str | None = None, decode: Decode = "mbr", samples: int = 16
) -> Iterator[str]:
    """Print bracketed trees of sentences, a line each.

    A sentence that has no tree gives an empty line, so that input and output agree line by line,
    and a note on standard error. Unknown words are parsed, with a note.

    Args:
        file: the sentences, one a line, words between spaces, or as people write them where the
            model was trained with `tokenize`; standard input when None or "-".
        decode: mbr, the minimum-Bayes-risk tree of the posterior's draws; marginals, that of exact
            span marginals where there are any; sample, one draw of the posterior; viterbi, the best
            tree of the grammar.
        samples: draws for each sentence.

    Raises:
        UserError: the file cannot be read, samples is below 1, or the model cannot decode so.
    """
    check_least("samples", samples, 1)
    data = data_of(em)

    def trees_of(sentences: list[list[str]]) -> list[Tree]:
        x = encode(sentences, data)
        return parse_batch(em.model, em.posterior, x, sentences, decode, samples)

    yield from _parsed(file, data.forms, lambda words: _note(words, data), trees_of)


def parse_ensemble(
    runs: Mapping[str, EM],
    /,
    file: str | None = None,
    decode: Decode = "marginals",
    samples: int = 16,
) -> Iterator[str]:
    """Bracketed trees of sentences by the average of several runs, a line each.

    runs: by name. What one of them has to say of a sentence is noted with its name, and a sentence
        that one of them cannot parse gives an empty line.
    file, samples: see `parse`.

    Raises UserError as `parse` does, and for another `decode` than "marginals".
    """
    if decode != "marginals":
        raise UserError(f"decode={decode} is of one run: several are decoded by decode=marginals")
    check_least("samples", samples, 1)

    def trees_of(sentences: list[list[str]]) -> list[Tree]:
        return ensemble.parse(runs.values(), sentences, samples)

    forms = {data_of(em).forms.tokenize: data_of(em).forms for em in runs.values()}
    if len(forms) > 1:
        raise UserError("some of the runs were trained with tokenize=true: parse with others alone")
    (shared,) = forms.values()
    yield from _parsed(file, shared, lambda words: _notes(words, runs), trees_of)


def generate(em: EM, n: int = 16) -> Iterator[str]:
    """Print sentences drawn from the grammar: words, a tab and the bracketed tree, a line each.

    A tree prior has no part in it, as a note on standard error says where there is one.

    Args:
        n: how many sentences.

    Raises:
        UserError: n is below 1.
    """
    if n < 1:
        raise UserError(f"n is {n}; it must be at least 1")
    data = data_of(em)
    if not em.model.normalised:
        print("drawn from the grammar alone, without its tree prior", file=sys.stderr)
    x, z = em.model.sample(n)
    check_draws()
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


def _parsed(
    file: str | None,
    forms: WordForms,
    note: Callable[[list[str]], tuple[str, bool]],
    trees_of: Callable[[list[list[str]]], list[Tree]],
) -> Iterator[str]:
    """Bracketed trees of a file's sentences; an empty line for those that `note` says have none."""
    lines = read_input(file).split("\n")
    sentences = [_words(line, forms) for line in (lines if lines[-1] else lines[:-1])]
    for first in range(0, len(sentences), BATCH):
        some = sentences[first : first + BATCH]
        notes = [note(words) for words in some]
        for number, (said, _) in enumerate(notes, first + 1):
            if said:
                print(f"line {number}: {said}", file=sys.stderr)
        fit = [words for words, (_, fits) in zip(some, notes, strict=True) if fits]
        trees = iter(trees_of(fit) if fit else [])
        for _, fits in notes:
            yield bracketed(next(trees)) if fits else ""


def _words(line: str, forms: WordForms) -> list[str]:
    """The words of a line as they are written."""
    tokens = forms.tokens(line)
    if not forms.tokenize:
        return tokens
    return [token for token in tokens if not forms.removes(token)]


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


def _notes(words: list[str], runs: Mapping[str, EM]) -> tuple[str, bool]:
    """What each run has to say of a sentence, or the first that cannot parse it."""
    notes = []
    for name, em in runs.items():
        note, fits = _note(words, data_of(em))
        note = f"{name}: {note}" if note else ""
        if not fits:
            return note, False
        notes.append(note)
    return "; ".join(filter(None, notes)), True
