"""Sentences and gold trees from text: bracketed trees, and raw sentences one a line.

What is removed follows the field (harvardnlp/compound-pcfg, `process_ptb.py`, arXiv 1906.10225):
traces and punctuation go by their part of speech, empty constituents with them, and words are
lower-cased. It differs in two points. Currency signs, `$` and `#`, are words unless
`keep_currency` is false: they are spoken, and NLTK's sample is usually counted with them. Numbers
stay as they are: compound-pcfg replaces them by N when it makes word ids.

Of the tags that the Penn Treebank does not have, OntoNotes and GUM tag hyphens HYPH and superfluous
marks NFP, which are punctuation; ADD, AFX, GW, SYM and XX are words, like every tag not named here.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gfnem.errors import UserError
from gfnem.tasks.grammar.text.words import BRACKETS, PLAIN, WordForms, is_punctuation, unescaped

if TYPE_CHECKING:
    from nltk import Tree

Span = tuple[int, int]

TRACE = "-NONE-"
CURRENCY = frozenset({"$", "#"})
PUNCTUATION = BRACKETS | {",", ".", ":", "``", "''", '"', "HYPH", "NFP"}

TREE_FILES = frozenset({".mrg", ".ptb", ".prd", ".tree", ".trees", ".bracket", ".brackets", ".txt"})


@dataclass(frozen=True)
class Reading:
    """What was read, before anything is left out for its length.

    sentences: words, lower-cased, without punctuation and traces; may be empty.
    trees: of the same sentences, with the words as leaves; None where there are none. The tree of
        a sentence without words has no children.
    """

    sentences: list[list[str]]
    trees: list[Tree] | None

    def __len__(self) -> int:
        return len(self.sentences)

    def select(self, indices: Sequence[int]) -> Reading:
        return Reading(
            sentences=[self.sentences[i] for i in indices],
            trees=None if self.trees is None else [self.trees[i] for i in indices],
        )

    def __add__(self, other: Reading) -> Reading:
        """Put others behind these; without trees where either has none."""
        both = None if self.trees is None or other.trees is None else self.trees + other.trees
        return Reading(self.sentences + other.sentences, both)

    def as_text(self, forms: WordForms) -> Reading:
        """Write the words of trees as those of raw text are written.

        What raw text cannot tell from punctuation is no word here either.
        """
        if self.trees is None:
            return self
        return Reading.of_trees([_as_text(tree, forms) for tree in self.trees])

    def mirrored(self) -> Reading:
        """Read every sentence, and its tree, from right to left."""
        trees = None if self.trees is None else [_mirrored(tree) for tree in self.trees]
        return Reading([words[::-1] for words in self.sentences], trees)

    @staticmethod
    def of_trees(trees: list[Tree]) -> Reading:
        return Reading([tree.leaves() for tree in trees], trees)


def read_sentences(file: Path, forms: WordForms = PLAIN, keep_currency: bool = True) -> Reading:
    """Read raw sentences, one a line, without trees, or what `read_trees` reads.

    Bracketed trees are known by their beginning: two brackets and no word between.

    Raises UserError as `read_trees` does.
    """
    text = read_text(file)
    if re.match(r"\s*\(\s*[^\s()]*\s*\(", text):
        return Reading.of_trees(_trees(text, str(file), keep_currency))
    return Reading([forms.words(line) for line in text.splitlines()], None)


def read_trees(file: Path | zipfile.Path, keep_currency: bool = True) -> list[Tree]:
    """All bracketed trees of a file, cleaned; they may span lines.

    Raises UserError for a file that is missing, empty, not UTF-8 or has unbalanced brackets.
    """
    return _trees(read_text(file), str(file), keep_currency)


def _trees(text: str, name: str, keep_currency: bool) -> list[Tree]:
    from nltk import Tree

    removed = PUNCTUATION | {TRACE} | (frozenset() if keep_currency else CURRENCY)
    trees = []
    for brackets in split_trees(text, name):
        tree = Tree.fromstring(brackets, remove_empty_top_bracketing=True)
        trees.append(clean(tree, removed) or Tree(tree.label(), []))
    return trees


def tree_files(path: Path) -> list[Path]:
    """The file itself, or all files with trees below a folder, in the order of their paths.

    Copies of the Penn Treebank may have names in capitals.

    Raises UserError for a path that does not exist and for a folder without such files.
    """
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in TREE_FILES)
    if not files:
        raise UserError(
            f"{path} has no files with trees in it: their names must end in one of "
            f"{', '.join(sorted(TREE_FILES))}"
        )
    return files


def read_text(file: Path | zipfile.Path) -> str:
    """Raises UserError for a file that is missing, empty or not UTF-8."""
    try:
        data = file.read_bytes()
    except OSError as error:
        reason = error.strerror or "there is no such file in the archive"
        raise UserError(f"{file} cannot be read: {reason}") from None
    except zipfile.BadZipFile:
        raise UserError(f"{file} cannot be read: the archive is damaged") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {line}: not UTF-8 text; convert the file") from None
    if not text.strip():
        raise UserError(f"{file} is empty: give a file with sentences in it")
    return text


def split_trees(text: str, name: str) -> Iterator[str]:
    """The balanced pieces of a text of bracketed trees, one for each outermost pair of brackets.

    name: of the text in messages.

    Raises UserError, with the line where the broken tree starts, for a bracket that is not
    closed or not opened and for words outside of all brackets.
    """
    depth, line, counted, start = 0, 1, 0, 0
    for found in re.finditer(r"[()]|[^\s()]+", text):
        token = found.group()
        if depth == 0:
            start = found.start()
            line += text.count("\n", counted, start)
            counted = start
            if token == ")":
                raise UserError(f"{name}, line {line}: a bracket is closed that was never opened")
            if token != "(":
                raise UserError(f"{name}, line {line}: {token[:40]!r} is not within brackets")
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth == 0:
            yield text[start : found.end()]
    if depth > 0:
        raise UserError(f"{name}, line {line}: the tree that starts here is not closed")


def clean(tree: Tree, removed: frozenset[str]) -> Tree | None:
    """A tree without the words that have one of the removed tags, or None if no word is left.

    Words are lower-cased, empty constituents are left out. Words without a tag of their own are
    removed when they are punctuation.
    """
    from nltk import Tree

    tagged = len(tree) == 1 and isinstance(tree[0], str)
    if tagged and tree.label() in removed:
        return None
    children = []
    for child in tree:
        if isinstance(child, Tree):
            child = clean(child, removed)
            if child is not None:
                children.append(child)
        elif tagged or not is_punctuation(child):
            children.append(child.lower())
    return Tree(tree.label(), children) if children else None


def with_words(tree: Tree, form: Callable[[str], str | None]) -> Tree:
    """Write each word of a tree in another form; None leaves it out, and empty constituents."""
    return _with_words(tree, form) or tree.__class__(tree.label(), [])


def _with_words(tree: Tree, form: Callable[[str], str | None]) -> Tree | None:
    children = []
    for child in tree:
        child = form(child) if isinstance(child, str) else _with_words(child, form)
        if child is not None:
            children.append(child)
    return tree.__class__(tree.label(), children) if children else None


def _mirrored(tree: Tree) -> Tree:
    children = [child if isinstance(child, str) else _mirrored(child) for child in tree]
    return tree.__class__(tree.label(), children[::-1])


def _as_text(tree: Tree, forms: WordForms) -> Tree:
    return with_words(
        tree, lambda word: None if is_punctuation(word) else forms.form(unescaped(word))
    )


def gold_spans(tree: Tree) -> frozenset[Span]:
    """The unlabelled spans (start, end) of two or more words, the whole sentence included."""
    spans: set[Span] = set()

    def end_of(node: Tree | str, start: int) -> int:
        if isinstance(node, str):
            return start + 1
        end = start
        for child in node:
            end = end_of(child, end)
        if end - start > 1:
            spans.add((start, end))
        return end

    end_of(tree, 0)
    return frozenset(spans)
