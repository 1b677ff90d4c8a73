"""Bracketed trees as they stand in a text, before anything is removed.

Files differ in what a bracket means. Two things are told from the whole of a file, the third from
each tree:

- whether trees have labels: `( ( the dog ) barks )` has none, all of it is words;
- what a name alone in brackets is: `(Dia)` a word whose tag is missing, or `(NP)` an empty
  constituent;
- whether a backslash before a bracket makes a character of it, as in `(NN foo\\))`, or stands for
  itself, as in `(UH :\\)`: whichever closes the tree.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gfnem.errors import UserError
from gfnem.tasks.grammar.text.walk import nodes_of

if TYPE_CHECKING:
    from nltk import Tree

NO_LABEL = "X"
# Characters behind a tree in which it must show whether it was cut off by an escaped bracket.
LOOK_AHEAD = 10_000

_SOMETHING = re.compile(r"\S")
_BRACKET = re.compile(r"\\?[()]")
_ESCAPED_BRACKET = re.compile(r"\\([()])")
_ANOTHER = re.compile(r"\s*(\(|\Z)")
_NEW_LINE = re.compile(r"\s*(\n\(|\Z)")
# The token right behind an opening bracket is its label.
_TOKENS = {
    True: re.compile(r"\(\s*((?:\\[()]|[^\s()])*)|\)|(?:\\[()]|[^\s()])+"),
    False: re.compile(r"\(\s*([^\s()]*)|\)|[^\s()]+"),
}


def parse_trees(text: str, name: str) -> list[Tree]:
    """The trees of a text. Words in brackets of their own are words; empty constituents stay.

    name: of the text in messages.

    Raises UserError as `split_trees` does.
    """
    trees = [_tree(piece, escapes) for piece, escapes in split_trees(text, name)]
    nodes = [node for tree in trees for node in nodes_of(tree)]
    if _without_labels(nodes):
        for node in nodes:
            if node.label():
                node.insert(0, node.label())
            node.set_label(NO_LABEL)
    elif _words_alone(nodes):
        labels = {"", *(node.label() for node in nodes if node)}
        for node in nodes:
            for place, child in enumerate(node):
                if not child and child.label() not in labels:
                    node[place] = child.label()
    return trees


def split_trees(text: str, name: str) -> Iterator[tuple[str, bool]]:
    """The balanced pieces of a text of bracketed trees, and whether backslashes escape in each.

    name: of the text in messages.

    Raises UserError, with the line where the broken tree starts, for a bracket that is not
    closed or not opened and for words outside of all brackets.
    """
    line, counted, end = 1, 0, 0
    while found := _SOMETHING.search(text, end):
        start = found.start()
        line += text.count("\n", counted, start)
        counted = start
        if text[start] == ")":
            raise UserError(f"{name}, line {line}: a bracket is closed that was never opened")
        if text[start] != "(":
            token = re.split(r"[\s()]", text[start : start + 40])[0]
            raise UserError(f"{name}, line {line}: {token!r} is not within brackets")
        closed = _end(text, start)
        if closed is None:
            raise UserError(f"{name}, line {line}: the tree that starts here is not closed")
        end, escapes = closed
        yield text[start:end], escapes


def _end(text: str, start: int) -> tuple[int, bool] | None:
    """Where the tree that starts here ends, and whether backslashes escape brackets in it.

    They do where that closes the tree, unless the tree closes without it and another one begins
    on the next line, or nothing follows.
    """
    as_they_stand = escaping = 0.0
    first = None
    for found in _BRACKET.finditer(text, start):
        step = 1 if found.group()[-1] == "(" else -1
        as_they_stand += step
        escaping += step if len(found.group()) == 1 else 0
        if escaping == 0:
            if as_they_stand <= 0 or _ANOTHER.match(text, found.end()):
                return found.end(), True
            escaping = math.inf
        if as_they_stand == 0:
            first = first or found.end()
            if escaping == math.inf or _NEW_LINE.match(text, found.end()):
                return first, False
        elif as_they_stand < 0:
            as_they_stand = -math.inf
        elif first and found.end() - first > LOOK_AHEAD:
            return first, False
    return (first, False) if first and as_they_stand == 0 else None


def _tree(piece: str, escapes: bool) -> Tree:
    """The tree of a balanced piece, without brackets around all of it and no more."""
    from nltk import Tree

    above = [Tree("", [])]
    for found in _TOKENS[escapes].finditer(piece):
        token = found.group()
        if token[0] == "(":
            above.append(Tree(_unescaped(found[1], escapes), []))
        elif token == ")":
            node = above.pop()
            above[-1].append(node)
        else:
            above[-1].append(_unescaped(token, escapes))
    (tree,) = above[0]
    while not tree.label() and len(tree) == 1 and isinstance(tree[0], Tree):
        (tree,) = tree
    return tree


def _unescaped(token: str, escapes: bool) -> str:
    return _ESCAPED_BRACKET.sub(r"\1", token) if escapes and "\\" in token else token


def _without_labels(nodes: list[Tree]) -> bool:
    """Whether what stands in a label's place is words.

    Then more brackets begin with a bracket than have a label and two brackets or more below it.
    Where there are as many, none perhaps, it is told by what is written above other brackets:
    labels are in capitals.
    """
    above = [node for node in nodes if any(not isinstance(child, str) for child in node)]
    begun = sum(not node.label() for node in above)
    labelled = sum(
        bool(node.label()) and sum(not isinstance(child, str) for child in node) > 1
        for node in above
    )
    if begun != labelled:
        return begun > labelled
    capitals = Counter(_in_capitals(node.label()) for node in above if node.label())
    return capitals[False] > capitals[True]


def _in_capitals(label: str) -> bool:
    return label.isascii() and label == label.upper()


def _words_alone(nodes: list[Tree]) -> bool:
    """Whether more names stand alone in brackets than beside a word, as its tag."""
    alone = sum(not node and bool(node.label()) for node in nodes)
    return alone > sum(len(node) == 1 and isinstance(node[0], str) for node in nodes)
