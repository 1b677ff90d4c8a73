"""Sentences and gold trees from text: bracketed trees, and raw sentences one a line.

What is removed follows the field (harvardnlp/compound-pcfg, `process_ptb.py`, arXiv 1906.10225):
traces and punctuation, empty constituents with them, and words are lower-cased. It differs in two
points. Currency signs, `$` and `#`, are words unless `keep_currency` is false: they are spoken, and
NLTK's sample is usually counted with them. Numbers stay as they are: compound-pcfg replaces them by
N when it makes word ids.

Punctuation is known by its characters under any tag of any treebank, but for the tags POS and SYM:
the possessive `'` of a plural is a word, and so is a mark that is spoken. It is known by its tag,
too, where the tag is one of the Penn Treebank's, of OntoNotes and GUM (hyphens HYPH, superfluous
marks NFP), of Universal Dependencies, TIGER, and the Chinese and French treebanks.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gfnem.errors import UserError
from gfnem.files import find_files, read_text, user_path
from gfnem.tasks.grammar.text.brackets import parse_trees
from gfnem.tasks.grammar.text.walk import events, rewritten, words_of
from gfnem.tasks.grammar.text.words import BRACKETS, PLAIN, WordForms, unescaped

if TYPE_CHECKING:
    from nltk import Tree

# What was removed, as kind and form -> how often.
Dropped = Counter[tuple[str, str]]

TRACE = "-NONE-"
CURRENCY = frozenset({"$", "#"})
PUNCTUATION = (
    frozenset({",", ".", ":", "``", "''", '"', "HYPH", "NFP", "PUNCT", "PU", "PONCT"})
    | frozenset({"$,", "$.", "$[", "$*LRB*"})
    | BRACKETS.keys()
)
MARKS_ARE_WORDS = frozenset({"POS", "SYM"})
# Traces under other tags than their own: *, *-1, *T*-1, *pro*.
_TRACE = re.compile(r"\*(?:[A-Za-z?]+\*)?(?:-\d+)*")

TREE_FILES = frozenset({".mrg", ".ptb", ".prd", ".tree", ".trees", ".bracket", ".brackets", ".txt"})
NAMED = 3


@dataclass(frozen=True)
class Reading:
    """What was read, before anything is left out for its length.

    sentences: words, as `WordForms` says; without traces. May be empty.
    trees: of the same sentences, with the words as leaves; None where there are none. The tree of
        a sentence without words has no children.
    dropped: what was removed from each sentence.
    notes: what else there is to say, for people.
    """

    sentences: list[list[str]]
    trees: list[Tree] | None
    dropped: list[Dropped] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.dropped:
            self.dropped.extend(Counter() for _ in self.sentences)

    def __len__(self) -> int:
        return len(self.sentences)

    def select(self, indices: Sequence[int]) -> Reading:
        return Reading(
            [self.sentences[i] for i in indices],
            None if self.trees is None else [self.trees[i] for i in indices],
            [self.dropped[i] for i in indices],
            self.notes,
        )

    def __add__(self, other: Reading) -> Reading:
        """Put others behind these; without trees where either has none."""
        return Reading(
            self.sentences + other.sentences,
            None if self.trees is None or other.trees is None else self.trees + other.trees,
            self.dropped + other.dropped,
            tuple(dict.fromkeys(self.notes + other.notes)),
        )

    def as_text(self, forms: WordForms) -> Reading:
        """Write the words of trees as those of raw text are written.

        What raw text cannot tell from punctuation is no word here either.
        """
        return self.written(
            lambda word: None if forms.removes(word) else forms.form(unescaped(word))
        )

    def written(self, form: Callable[[str], str | None]) -> Reading:
        """Write each word of the trees in another form; None leaves it out."""
        if self.trees is None:
            return self
        trees = [rewritten(tree, form) for tree in self.trees]
        return Reading.of_trees(trees, self.dropped, self.notes)

    def mirrored(self) -> Reading:
        """Read every sentence, and its tree, from right to left."""
        trees = None
        if self.trees is not None:
            trees = [rewritten(tree, lambda word: word, mirrored=True) for tree in self.trees]
        return Reading([words[::-1] for words in self.sentences], trees, self.dropped, self.notes)

    @staticmethod
    def of_trees(
        trees: list[Tree], dropped: Sequence[Dropped] = (), notes: tuple[str, ...] = ()
    ) -> Reading:
        return Reading([words_of(tree) for tree in trees], trees, list(dropped), notes)


def read_sentences(file: Path, forms: WordForms = PLAIN, keep_currency: bool = True) -> Reading:
    """Read raw sentences, one a line, without trees, or what `read_trees` reads.

    Bracketed trees are known by their beginning: two brackets and no more than a word between.

    Raises UserError as `read_trees` does.
    """
    text = read_text(file)
    if re.match(r"\s*\(\s*[^\s()]*\s*\(", text):
        return _trees(text, str(file), forms, keep_currency)
    lines = [forms.read(line) for line in text.removesuffix("\n").split("\n")]
    return Reading(
        [words for words, _ in lines],
        None,
        [Counter(("punctuation", mark) for mark in marks) for _, marks in lines],
    )


def read_trees(
    file: Path | zipfile.Path, forms: WordForms = PLAIN, keep_currency: bool = True
) -> Reading:
    """All bracketed trees of a file, cleaned; they may span lines.

    Raises UserError for a file that is missing, empty, not UTF-8 or has unbalanced brackets.
    """
    return _trees(read_text(file), str(file), forms, keep_currency)


def _trees(text: str, name: str, forms: WordForms, keep_currency: bool) -> Reading:
    trees = parse_trees(text, name)
    dropped: list[Dropped] = [Counter() for _ in trees]
    cleaned = [
        clean(tree, forms, keep_currency, gone) for tree, gone in zip(trees, dropped, strict=True)
    ]
    return Reading.of_trees(cleaned, dropped)


def tree_files(name: str) -> tuple[list[Path], str]:
    """The file itself, or all files with trees below a folder, in the order of their paths.

    Copies of the Penn Treebank may have names in capitals. Beside the files it is said what is in
    the folder and is not read.

    Raises UserError for a folder without such files.
    """
    path = user_path(name)
    if not path.is_dir():
        return [path], ""
    files, others = find_files(path, TREE_FILES)
    if not files:
        raise UserError(
            f"{path} has no files with trees in it: their names must end in one of "
            f"{', '.join(sorted(TREE_FILES))}"
        )
    return files, others


def clean(tree: Tree, forms: WordForms, keep_currency: bool, dropped: Dropped) -> Tree:
    """A tree without traces, what `forms` says is no word, and empty constituents.

    dropped: counts what is removed.
    """
    kind = tree.__class__
    above = [kind("", [])]
    tags: list[str | None] = []
    for met in events(tree):
        if met is None:
            tags.pop()
            node = above.pop()
            if node:
                above[-1].append(node)
        elif isinstance(met, str):
            reason = _removed_as(met, tags[-1], forms, keep_currency)
            if reason:
                dropped[reason, met] += 1
            else:
                above[-1].append(met.lower() if forms.lowercase else met)
        else:
            # A word without a tag stands beside others.
            tags.append(met.label() if len(met) == 1 else None)
            if not met and met.label():
                dropped["empty constituents", met.label()] += 1
            above.append(kind(met.label(), []))
    return next(iter(above[0]), kind(tree.label(), []))


def _removed_as(word: str, tag: str | None, forms: WordForms, keep_currency: bool) -> str | None:
    """What a word of a tree is that is removed; None for what stays."""
    if tag == TRACE:
        return "traces"
    if tag in PUNCTUATION:
        return "punctuation" if forms.punctuation == "remove" else None
    if tag not in MARKS_ARE_WORDS:
        if _TRACE.fullmatch(word) and word.upper() not in BRACKETS:
            return "traces"
        if forms.removes(word):
            return "punctuation"
    if not keep_currency and (tag in CURRENCY or (tag is None and word in CURRENCY)):
        return "currency signs"
    return None


def said_of(dropped: Sequence[Dropped]) -> str:
    """What was removed from sentences: how much of which kind, and the most frequent by name."""
    kinds: dict[str, Counter[str]] = {}
    for some in dropped:
        for (kind, mark), count in some.items():
            kinds.setdefault(kind, Counter())[mark] += count
    return ", ".join(
        f"{marks.total():,} {kind} ({' '.join(mark for mark, _ in marks.most_common(NAMED))}"
        f"{' ...' if len(marks) > NAMED else ''})"
        for kind, marks in kinds.items()
    )
