"""Walks through trees of any depth, which recursion would not reach the bottom of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nltk import Tree

Span = tuple[int, int]


def events(tree: Tree, mirrored: bool = False) -> Iterator[Tree | str | None]:
    """What is met on the way: each node when it begins, each word, and None where a node ends.

    mirrored: walk from right to left.
    """
    open_nodes = [iter([tree])]
    while open_nodes:
        met = next(open_nodes[-1], None)
        if met is None:
            open_nodes.pop()
            if open_nodes:
                yield None
        else:
            yield met
            if not isinstance(met, str):
                open_nodes.append(reversed(met) if mirrored else iter(met))


def nodes_of(tree: Tree) -> Iterator[Tree]:
    """The nodes of a tree in no order to rely on."""
    left = [tree]
    while left:
        node = left.pop()
        yield node
        left += [child for child in node if not isinstance(child, str)]


def depth_of(tree: Tree) -> int:
    """How many nodes are above the deepest word, or lie on the way to the deepest empty node."""
    depth = deepest = 0
    for met in events(tree):
        if met is None:
            depth -= 1
        elif not isinstance(met, str):
            depth += 1
            deepest = max(deepest, depth)
    return deepest


def words_of(tree: Tree) -> list[str]:
    """The words of a tree from left to right."""
    return [met for met in events(tree) if isinstance(met, str)]


def gold_spans(tree: Tree) -> frozenset[Span]:
    """The unlabelled spans (start, end) of two or more words, the whole sentence included."""
    spans: set[Span] = set()
    starts: list[int] = []
    end = 0
    for met in events(tree):
        if met is None:
            start = starts.pop()
            if end - start > 1:
                spans.add((start, end))
        elif isinstance(met, str):
            end += 1
        else:
            starts.append(end)
    return frozenset(spans)


def rewritten(tree: Tree, form: Callable[[str], str | None], mirrored: bool = False) -> Tree:
    """Write each word of a tree in another form; None leaves it out, and empty constituents.

    mirrored: put it in the mirror, too.
    """
    kind = tree.__class__
    above = [kind("", [])]
    for met in events(tree, mirrored):
        if met is None:
            node = above.pop()
            if node:
                above[-1].append(node)
        elif isinstance(met, str):
            word = form(met)
            if word is not None:
                above[-1].append(word)
        else:
            above.append(kind(met.label(), []))
    return next(iter(above[0]), kind(tree.label(), []))


def bracketed(tree: Tree) -> str:
    """The tree on one line; round brackets in words become -LRB- and -RRB-."""
    line = ""
    for met in events(tree):
        if met is None:
            line += ")"
        elif isinstance(met, str):
            line += f" {met.replace('(', '-LRB-').replace(')', '-RRB-')}"
        else:
            line += f" ({met.label()}"
    return line.removeprefix(" ")
