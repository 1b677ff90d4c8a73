"""Raw sentences of NLTK's Brown corpus, rated by the trees of its treebank sample."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from gfnem.errors import UserError
from gfnem.files import read_text
from gfnem.tasks.grammar.text.corpus import GrammarData, check_least
from gfnem.tasks.grammar.text.nltk_data import find_corpus
from gfnem.tasks.grammar.text.reading import Reading
from gfnem.tasks.grammar.text.sources import evenly, treebank_files
from gfnem.tasks.grammar.text.words import Punctuation, WordForms, unescaped


def brown(
    dir: str | None = None,
    treebank_text: bool = True,
    brown_sentences: int | None = None,
    keep_currency: bool = True,
    punctuation: Punctuation = "remove",
    lowercase: bool = True,
    merge_numbers: bool = True,
    split_clitics: bool = True,
    min_length: int = 2,
    max_length: int = 20,
    max_test_length: int | None = None,
    min_count: int = 4,
    batch_size: int = 16,
    mix_lengths: bool = False,
    mirror: bool = False,
    seed: int = 0,
) -> GrammarData:
    """Train on the words of English text, test on trees of the Penn Treebank.

    The training text is the Brown corpus's and that of the treebank sample's files 1 to 159, whose
    trees training never sees. Files 160 to 179 validate, 180 to 199 test, without the sentences
    that the training text has, word for word; a second test, `seen_text`, has the trees of
    files 1 to 159. To length 20 there are 36,262 sentences of Brown, 1,737 of the treebank.

    dir: folder of NLTK's data, with `corpora/brown.zip` and `corpora/treebank.zip`, unpacked or
        not. None looks in NLTK's search path and then tries to download them.
    treebank_text: take the treebank's sentences for text. Otherwise all trees but those that
        validate are tests, and there is no `seen_text`.
    brown_sentences: how many of Brown's to take, evenly spread over the corpus; None for all.
    keep_currency: take `$` and `#` for words.
    punctuation: "keep" takes marks for words, "remove" removes them.
    lowercase: write all words in small letters.
    merge_numbers: write every number as `<num>`.
    split_clitics: write Brown's clitics as the treebank does, as words of their own: do n't.
    mirror: read all sentences and trees from right to left. What learns grammars finds the same
        trees, mirrored; what prefers trees that branch to one side does not.
    mix_lengths, min_length, max_length, max_test_length, min_count, batch_size, seed: as for
        `GrammarData`.

    Raises UserError where one of the corpora is neither found nor downloaded, or damaged, and where
    no text is left.
    """
    forms = WordForms(merge_numbers, split_clitics, lowercase, punctuation)
    folder = find_corpus("brown", "NLTK's Brown corpus", dir)
    text = Reading([*brown_lines(folder, forms, keep_currency)], None)
    if brown_sentences is not None:
        check_least("brown_sentences", brown_sentences, 0)
        fitting = [
            i for i, words in enumerate(text.sentences) if min_length <= len(words) <= max_length
        ]
        chosen = evenly(len(fitting))[:brown_sentences]
        text = text.select([fitting[i] for i in sorted(chosen)])
    trees, valid, test = (
        reading.written(lambda word: forms.form(unescaped(word)))
        for reading in treebank_files(dir, forms, keep_currency)
    )
    if treebank_text:
        text, more_tests = text + trees, {"seen_text": trees}
    elif not text.sentences:
        raise UserError(
            "brown_sentences=0 and treebank_text=false leave no text to train on: take one of them"
        )
    else:
        test, more_tests = trees + test, {}
    if mirror:
        text, valid, test = text.mirrored(), valid.mirrored(), test.mirrored()
        more_tests = {name: reading.mirrored() for name, reading in more_tests.items()}
    return GrammarData(
        "brown",
        text,
        valid,
        test,
        min_length,
        max_length,
        min_count,
        batch_size,
        seed,
        forms=forms,
        more_tests=more_tests,
        new_tests=True,
        mix_lengths=mix_lengths,
        max_test_length=max_test_length,
    )


def brown_lines(
    folder: Path | zipfile.Path, forms: WordForms, keep_currency: bool
) -> Iterator[list[str]]:
    """Read the words of each sentence of the Brown corpus, in the order of its files.

    folder: of the corpus, with files ca01 to cr09.

    Raises UserError for a folder without such files and for files that cannot be read.
    """
    files = sorted(
        (file for file in folder.iterdir() if re.fullmatch(r"c[a-r]\d\d", file.name)),
        key=lambda file: file.name,
    )
    if not files:
        raise UserError(f"{folder} has no files of the Brown corpus, ca01 to cr09: get it again")
    for file in files:
        for line in read_text(file).split("\n"):
            words = [word for token in line.split() for word in _words(token, forms)]
            if words:
                yield [word for word in words if keep_currency or word not in ("$", "#")]


def _words(token: str, forms: WordForms) -> Iterator[str]:
    """The words of a token word/tag of the Brown corpus."""
    word, _, tag = token.rpartition("/")
    word = word.removesuffix("''") or word  # of inches
    # A plural's possessive; the tag of any possessive is one like nns$ or nns$-tl.
    plural = word.endswith("'") and "$" in tag and forms.split_clitics
    for part in forms.split(word[:-1] if plural else word):
        if not forms.removes(part):
            yield forms.form(part)
    if plural:
        yield "'"
