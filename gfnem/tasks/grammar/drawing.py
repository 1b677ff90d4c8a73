"""Trees beside gold trees, as figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gfnem.run.plots import BLUE, INK, PALE, text_width, write
from gfnem.tasks.grammar.text.walk import events

if TYPE_CHECKING:
    from nltk import Tree

# All lengths are inches, so that a word takes the room that it needs whatever the tree.
_LEVEL = 0.34  # from a node up to its parent
_WORD_SIZE, _LABEL_SIZE = 10, 8  # points
_WORD_GAP = 0.16  # between two words
_MARGIN = 0.25
_TREE_GAP = 0.6  # between the predicted tree and the gold one
_TITLE, _SUBTITLE = 0.4, 0.24  # from the top of a title to the tree; to "predicted" and "gold"
_ROW_GAP = 0.5
_MIN_WIDTH = 3.0
_LONGEST = 40  # characters of a word or a label; what is longer is cut

Span = tuple[int, int]


@dataclass
class _Node:
    """A node with its place: `x` from the left edge of its tree, `height` in levels."""

    label: str
    span: Span
    x: float
    height: int
    children: list[_Node]


def draw_trees(pairs: Sequence[tuple[str, Tree, Tree | None]]) -> Figure:
    """Draw predicted trees, each beside its gold tree.

    The words stand on one line under the tree. Spans that the predicted and the gold tree have
    in common, whatever their labels, are blue and the others grey. Without a gold tree all is
    black.

    Args:
        pairs: (title, predicted tree, gold tree or None), drawn one below the other.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not pairs:
        raise ValueError("draw_trees needs at least one tree")
    rows = [
        (title, [_layout(tree) for tree in (predicted, gold) if tree is not None])
        for title, predicted, gold in pairs
    ]
    heights = [
        _TITLE + _SUBTITLE * (len(trees) - 1) + max(root.height for root, _ in trees) * _LEVEL
        for _, trees in rows
    ]
    widths = [sum(wide for _, wide in trees) + _TREE_GAP * (len(trees) - 1) for _, trees in rows]
    width = max(_MIN_WIDTH, *widths) + 2 * _MARGIN
    top = sum(heights) + _ROW_GAP * (len(rows) - 1) + 2 * _MARGIN
    figure = Figure(figsize=(width, top))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, top))
    axes.set_axis_off()
    top -= _MARGIN
    for (title, trees), height in zip(rows, heights, strict=True):
        write(axes, _MARGIN, top, title, va="top", fontsize=10, fontweight="bold")
        left, bottom = _MARGIN, top - height
        spans = [{node.span for node in _nodes(root)} for root, _ in trees]
        common = set.intersection(*spans) if len(trees) == 2 else None
        names = ("predicted (blue: as in gold)", "gold") if len(trees) == 2 else ("",)
        for name, (root, wide) in zip(names, trees, strict=True):
            write(axes, left, top - _SUBTITLE, name, va="top", fontsize=9, color=PALE)
            _draw(axes, root, left, bottom, common)
            left += wide + _TREE_GAP
        top -= height + _ROW_GAP
    return figure


def _layout(tree: Tree) -> tuple[_Node, float]:
    """Place the nodes of a tree; returns its root and its width."""
    right = 0.0
    position = 0
    above = [_Node("", (0, 0), 0.0, 0, [])]
    rooms = [0.0]  # that the only word below each open node needs for the labels above it
    for met in events(tree):
        if met is None:
            node = above.pop()
            rooms.pop()
            first, last = node.children[0], node.children[-1]
            node.span = first.span[0], last.span[1]
            node.x = (first.x + last.x) / 2
            node.height = 1 + max(child.height for child in node.children)
            above[-1].children.append(node)
        elif isinstance(met, str):
            word = _shortened(met)
            wide = max(text_width(word, _WORD_SIZE), rooms[-1])
            span = position, position + 1
            above[-1].children.append(_Node(word, span, right + wide / 2, 0, []))
            right += wide + _WORD_GAP
            position += 1
        else:
            label = _shortened(str(met.label()))
            alone = len(met) == 1
            rooms.append(max(rooms[-1], text_width(label, _LABEL_SIZE)) if alone else 0.0)
            above.append(_Node(label, (0, 0), 0.0, 0, []))
    (root,) = above[0].children
    return root, right - _WORD_GAP


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _nodes(root: _Node) -> Iterator[_Node]:
    left = [root]
    while left:
        node = left.pop()
        yield node
        left += node.children


def _draw(axes: Axes, root: _Node, left: float, bottom: float, common: set[Span] | None) -> None:
    for node in _nodes(root):
        x, y = left + node.x, bottom + node.height * _LEVEL
        if not node.children:
            write(axes, x, y, node.label, ha="center", va="center", fontsize=_WORD_SIZE)
            continue
        shared = common is not None and node.span in common
        color = INK if common is None else BLUE if shared else PALE
        for child in node.children:
            # Aslant down one level, then straight: lines of different nodes never cross.
            below = bottom + child.height * _LEVEL + (0 if child.children else 0.12)
            axes.plot(
                [x, left + child.x, left + child.x],
                [y, max(y - _LEVEL, below), below],
                color=color,
                linewidth=1.8 if shared else 1.1,
                solid_joinstyle="round",
                zorder=1,
            )
        if node.label:
            write(
                axes,
                x,
                y,
                node.label,
                ha="center",
                va="center",
                fontsize=_LABEL_SIZE,
                color=color,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
                zorder=2,
            )
