"""Messages along given trees: log p(x, shape), and labels drawn.

A node's message m[P, A] is the probability of the words under it given label A with context P
above it, summed over the labels below. Messages go bottom-up, one level of all trees of the batch
at a time; what rules make of the messages of two children, their families know (`Potentials`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gfnem.categorical import sample_categorical
from gfnem.tasks.grammar.rules.grammar import Potentials
from gfnem.tasks.grammar.rules.messages import Kept
from gfnem.tasks.grammar.trees.levels import INNER, LEAVES, WORD_LEFT, Levels
from gfnem.tasks.grammar.trees.tree import Trees


class NodeMessages(NamedTuple):
    """Of nodes in some order.

    message: scaled to maximum 1.
    log_scale: the logarithm of what it was divided by.
    """

    message: Float[Tensor, "total contexts nonterminals"]
    log_scale: Float[Tensor, "total"]

    def select(self, nodes: slice | Int[Tensor, "nodes"]) -> NodeMessages:
        return NodeMessages(self.message[nodes], self.log_scale[nodes])

    def whole(self, levels: Levels, potentials: Potentials) -> Float[Tensor, "rows"]:
        """Probability of each tree and its words, up to scales."""
        return self.message[levels.root, potentials.contexts.root] @ potentials.root

    def log_whole(self, levels: Levels, potentials: Potentials) -> Float[Tensor, "rows"]:
        """log-probability of each tree and its words, up to the words' scales."""
        return self.whole(levels, potentials).log() + self.log_scale[levels.root]


def positive(x: Tensor) -> Tensor:
    """x where it may be divided by, 1 where a probability of zero made it zero."""
    return torch.where(x > 0, x, 1.0)


@dataclass(frozen=True)
class _Upward:
    """Of all nodes of some trees.

    messages: of all nodes.
    factor: the maxima that their messages were divided by.
    kept: what merges remember, by the first node of their slice.
    least: what `Potentials.in_double` asks.
    """

    potentials: Potentials
    messages: NodeMessages
    factor: Float[Tensor, "total"]
    kept: dict[int, Kept]
    least: Float[Tensor, ""]


def upward(
    potentials: Potentials, levels: Levels, known: NodeMessages | None = None
) -> NodeMessages:
    """Messages of all nodes, given those that `levels` says are known."""
    return _upward(potentials, levels, known).messages


def _all_upward(potentials: Potentials, levels: Levels) -> _Upward:
    """Of all nodes, in double precision where single does not do."""
    up = _upward(potentials, levels)
    double = potentials.in_double(up.least, up.messages.whole(levels, potentials))
    return up if double is None else _upward(double, levels)


@torch.no_grad()
def _upward(potentials: Potentials, levels: Levels, known: NodeMessages | None = None) -> _Upward:
    of_two_words = potentials.two_words()
    message = of_two_words.new_empty(len(levels.row), *of_two_words.shape[2:])
    factor = message.new_empty(len(levels.row))
    # A word's place is -1, the last: its scale is 0.
    log_scale = message.new_zeros(len(levels.row) + 1)
    kept: dict[int, Kept] = {}
    by_context = message.new_ones(message.shape[:2])
    if known is not None:
        message[: levels.known], log_scale[: levels.known] = known
    for kind, first, behind in levels.slices:
        nodes = slice(first, behind)
        sentence, left, right = levels.sentence[nodes], levels.left[nodes], levels.right[nodes]
        if kind == LEAVES:
            raw = of_two_words[sentence, levels.gap[nodes]]
        elif kind == INNER:
            raw, kept[first] = potentials.two_nodes(message[left], message[right])
        elif kind == WORD_LEFT:
            word, child = levels.start[nodes], message[right]
            raw, kept[first] = potentials.word_on_left(sentence, word, child)
        else:
            word, child = levels.end[nodes] - 1, message[left]
            raw, kept[first] = potentials.word_on_right(sentence, word, child)
        by_context[nodes] = of_nodes = raw.amax(2)
        largest = of_nodes.amax(1)
        factor[nodes] = positive(largest)
        message[nodes] = raw / factor[nodes, None, None]
        log_scale[nodes] = log_scale[left] + log_scale[right] + largest.log()
    return _Upward(
        potentials, NodeMessages(message, log_scale[:-1]), factor, kept, by_context.amin()
    )


class _LogJointShape(torch.autograd.Function):
    """log p(x, shape) up to the words' scales, with an outside pass as its backward pass.

    The gradient of log p with respect to a rule is its expected count: one sum over all nodes;
    nothing of the size of the rules is built for any single node.
    """

    @staticmethod
    def forward(ctx, up: _Upward, levels: Levels, *tables: Tensor):  # pyright: ignore
        ctx.up, ctx.levels = up, levels
        return up.messages.log_whole(levels, up.potentials)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore
        up: _Upward = ctx.up
        levels: Levels = ctx.levels
        potentials = up.potentials
        message, context = up.messages.message, potentials.contexts.root
        root, top = potentials.root, message[levels.root, context]
        probability = top @ root
        # A tree of probability zero has no gradient.
        seed = torch.where(probability > 0, grad, 0.0) / positive(probability)
        # The gradients of the scaled messages; of children but in the contexts that labels make.
        outside = torch.zeros_like(message)
        outside[levels.root, context] = seed[:, None] * root
        below = outside[:, : potentials.contexts.inner]
        gradients = potentials.merge_gradients()
        for kind, first, behind in reversed(levels.slices):
            nodes = slice(first, behind)
            sentence, left, right = levels.sentence[nodes], levels.left[nodes], levels.right[nodes]
            out = outside[nodes] / up.factor[nodes, None, None]
            if kind == LEAVES:
                gradients.two_words(sentence, levels.gap[nodes], out)
            elif kind == INNER:
                below[left], below[right] = gradients.two_nodes(
                    message[left], message[right], up.kept[first], out
                )
            elif kind == WORD_LEFT:
                below[right] = gradients.word_on_left(
                    sentence, levels.start[nodes], message[right], up.kept[first], out
                )
            else:
                below[left] = gradients.word_on_right(
                    sentence, levels.end[nodes] - 1, message[left], up.kept[first], out
                )
        return None, None, seed @ top, *gradients.tables()


def log_joint_shape(potentials: Potentials, trees: Trees) -> Float[Tensor, "batch samples"]:
    """log p(x, shape), labels summed exactly by messages along each tree.

    Its gradient costs about as much as the value and is exact; -inf, with gradient zero, where the
    grammar gives a shape no probability.
    """
    levels = Levels.of(trees)
    up = _all_upward(potentials, levels)
    value = _LogJointShape.apply(up, levels, *up.potentials.tables())
    value = value.view(trees.start.shape[:2]) + up.potentials.total_log_scale[:, None]
    return value.to(potentials.root.dtype)


def shape_scores(
    potentials: Potentials, trees: Trees
) -> tuple[Float[Tensor, "batch samples nodes"], Float[Tensor, "batch samples"]]:
    """What the grammar says of the words under each node of shapes, and log p(x, shape).

    The former is the logarithm of sum over A of p(words under the node, shape below it | A, P),
    averaged over the contexts P that labels make. No gradients.
    """
    levels, dtype = Levels.of(trees), potentials.root.dtype
    up = _all_upward(potentials, levels)
    potentials, messages = up.potentials, up.messages
    inner = torch.zeros_like(levels.row, dtype=torch.bool)
    nodes = potentials.average(messages.message, inner).sum(-1).log() + messages.log_scale
    whole = messages.log_whole(levels, potentials).view(trees.start.shape[:2])
    log_joint = whole + potentials.total_log_scale[:, None]
    scores = levels.by_gap(nodes, trees) + scales_under(potentials, trees)
    return scores.to(dtype), log_joint.to(dtype)


def scales_under(potentials: Potentials, trees: Trees) -> Float[Tensor, "batch samples nodes"]:
    """The sum of the scales of the words under each node."""
    word = torch.arange(potentials.log_scale.shape[1], device=trees.start.device)
    below = (word >= trees.start[..., None]) & (word < trees.end[..., None])
    return (below * potentials.log_scale[:, None, None]).sum(-1)


@torch.no_grad()
def sample_labels(
    potentials: Potentials, trees: Trees, generator: torch.Generator | None = None
) -> Trees:
    """The same trees with nonterminals drawn from the exact p(labels | shape, x), top-down."""
    draw = partial(sample_categorical, generator=generator)
    levels, contexts = Levels.of(trees), potentials.contexts
    up = _all_upward(potentials, levels)
    potentials, message = up.potentials, up.messages.message
    label = torch.zeros_like(levels.row)
    above = torch.full_like(label, contexts.labels)
    label[levels.root] = draw(potentials.root * message[levels.root, contexts.root])
    for kind, first, behind in reversed(levels.slices):
        nodes = slice(first, behind)
        sentence, own, context = levels.sentence[nodes], label[nodes], contexts.under(above[nodes])
        left, right, below = levels.left[nodes], levels.right[nodes], contexts.under(own)
        if kind == INNER:
            on_left, on_right = message[left, below], message[right, below]
            label[left], label[right] = potentials.draw_pairs(own, context, on_left, on_right, draw)
            above[left] = above[right] = own
        elif kind == WORD_LEFT:
            rules = potentials.word_left_rules(sentence, levels.start[nodes], own, context)
            label[right], above[right] = draw(rules * message[right, below]), own
        elif kind != LEAVES:
            rules = potentials.word_right_rules(sentence, levels.end[nodes] - 1, own, context)
            label[left], above[left] = draw(rules * message[left, below]), own
    return levels.labelled(trees, label)
