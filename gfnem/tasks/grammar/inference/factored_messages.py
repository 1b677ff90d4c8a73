"""Messages along given trees where rules see the parent and are of low rank; see `messages`.

A node's message m[P, A] is the probability of the words under it given label A with P above it. To
a parent with label A, a child is one vector over r: of a word it is looked up, of a node

    sum over B of p(B | r) m[A, B]   on the left,   sum over C of p(C | r) m[A, C]   on the right,

and with the product s[A, r] of its two children's vectors, a node has
m[P, A] = sum over r of p(r | A, P) s[A, r].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gfnem.categorical import sample_categorical
from gfnem.tasks.grammar.inference.annotated_messages import shape_scores
from gfnem.tasks.grammar.inference.messages import NodeMessages, positive
from gfnem.tasks.grammar.rules.factored import FactoredPotentials
from gfnem.tasks.grammar.trees.levels import Levels
from gfnem.tasks.grammar.trees.tree import Trees


def log_joint_shape(potentials: FactoredPotentials, trees: Trees) -> Float[Tensor, "batch samples"]:
    """log p(x, shape), labels summed exactly by messages along each tree.

    Its gradient costs about as much as the value and is exact; -inf, with gradient zero, where the
    grammar gives a shape no probability.
    """
    p = potentials
    nodes = _Nodes.of(Levels.of(trees), p)
    value = _LogJointShape.apply(
        p.root, p.mixture, p.left, p.right, p.word_left, p.word_right, nodes
    )
    return value.view(trees.start.shape[:2]) + potentials.total_log_scale[:, None]


def inside_scores(
    potentials: FactoredPotentials, trees: Trees
) -> tuple[Float[Tensor, "batch samples nodes"], Float[Tensor, "batch samples"]]:
    """As in `annotated_messages`."""
    levels = Levels.of(trees)
    return shape_scores(potentials, trees, levels, upward(potentials, levels))


def upward(
    potentials: FactoredPotentials, levels: Levels, known: NodeMessages | None = None
) -> NodeMessages:
    """Messages [context, label] of all nodes, given those that `levels` says are known."""
    p = potentials
    nodes = _Nodes.of(levels, p)
    up = _upward(nodes, p.mixture, p.left, p.right, p.word_left, p.word_right, known)
    return NodeMessages(up.message.transpose(0, 1), up.log_scale)


def sample_labels(
    potentials: FactoredPotentials, trees: Trees, generator: torch.Generator | None = None
) -> Trees:
    """The same trees with nonterminals drawn from the exact p(labels | shape, x), top-down."""
    p, levels = potentials, Levels.of(trees)
    nodes = _Nodes.of(levels, p)
    up = _upward(nodes, p.mixture, p.left, p.right, p.word_left, p.word_right)
    label = torch.zeros_like(levels.row)
    context = torch.full_like(label, len(p.root))
    label[levels.root] = sample_categorical(p.root * up.message[-1, levels.root], generator)
    for first, behind in reversed(levels.heights):
        this = slice(first, behind)
        above = label[this]
        products = up.vectors[above, nodes.left[this]] * up.vectors[above, nodes.right[this]]
        rank = sample_categorical(p.mixture[above, context[this]] * products, generator)
        for child, table in ((levels.left[this], p.left), (levels.right[this], p.right)):
            node = (child >= 0).nonzero().squeeze(1)
            child, own = child[node], above[node]
            weights = table[rank[node]] * up.message[own, child]
            label[child], context[child] = sample_categorical(weights, generator), own
    return levels.labelled(trees, label)


@dataclass(frozen=True)
class _Nodes:
    """The nodes of some trees, and where their children are in one list of vectors.

    The list holds all words as left children, all words as right children, then all nodes.

    left, right: places of each node's children.
    is_left: of the nodes that are left children.
    words: number of words; shorter sentences count as the longest one.
    """

    levels: Levels
    left: Int[Tensor, "total"]
    right: Int[Tensor, "total"]
    is_left: Bool[Tensor, "total"]
    words: int

    @staticmethod
    def of(levels: Levels, potentials: FactoredPotentials) -> _Nodes:
        batch, length = potentials.log_scale.shape
        words = batch * length
        word = levels.sentence * length
        left, right = levels.left, levels.right
        is_left = torch.zeros_like(left, dtype=torch.bool)
        is_left[left[left >= 0]] = True
        return _Nodes(
            levels=levels,
            left=torch.where(left >= 0, 2 * words + left, word + levels.start),
            right=torch.where(right >= 0, 2 * words + right, words + word + levels.end - 1),
            is_left=is_left,
            words=words,
        )

    def sides(self, first: int, behind: int) -> tuple[Int[Tensor, "lefts"], Int[Tensor, "rights"]]:
        """Which of these nodes are left children, and which are not."""
        is_left = self.is_left[first:behind]
        left, right = (side.nonzero().squeeze(1) + first for side in (is_left, ~is_left))
        return left, right


@dataclass(frozen=True)
class _Messages:
    """Of all nodes of some trees.

    message: scaled to maximum 1, [context, label, ...].
    vectors: what words and nodes are to their parents, in the order of `_Nodes`, scaled alike.
    factor: the maxima that the raw messages were divided by.
    log_scale: a message's total logarithmic scale.
    """

    message: Float[Tensor, "contexts total nonterminals"]
    vectors: Float[Tensor, "nonterminals children rank"]
    factor: Float[Tensor, "total"]
    log_scale: Float[Tensor, "total"]


def _upward(
    nodes: _Nodes,
    mixture: Float[Tensor, "nonterminals contexts rank"],
    left: Float[Tensor, "rank nonterminals"],
    right: Float[Tensor, "rank nonterminals"],
    word_left: Float[Tensor, "batch length nonterminals rank"],
    word_right: Float[Tensor, "batch length nonterminals rank"],
    known: NodeMessages | None = None,
) -> _Messages:
    levels, words = nodes.levels, nodes.words
    total = len(levels.row)
    nonterminals, contexts, rank = mixture.shape
    message = mixture.new_empty(contexts, total, nonterminals)
    vectors = mixture.new_empty(nonterminals, 2 * words + total, rank)
    vectors[:, :words] = word_left.flatten(0, 1).transpose(0, 1)
    vectors[:, words : 2 * words] = word_right.flatten(0, 1).transpose(0, 1)
    below, factor = message[:nonterminals], mixture.new_empty(total)
    # A word's place is -1, the last: its scale is 0.
    log_scale = mixture.new_zeros(total + 1)

    def to_parents(first: int, behind: int) -> None:
        """What nodes are to their parents, once their messages are there."""
        for side, table in zip(nodes.sides(first, behind), (left, right), strict=True):
            vectors[:, 2 * words + side] = below.index_select(1, side) @ table.t()

    if known is not None:
        message[:, : levels.known] = known.message.transpose(0, 1)
        log_scale[: levels.known] = known.log_scale
        to_parents(0, levels.known)
    for first, behind in levels.heights:
        this = slice(first, behind)
        products = vectors.index_select(1, nodes.left[this])
        products *= vectors.index_select(1, nodes.right[this])
        raw = torch.bmm(products, mixture.mT)
        largest = raw.amax((0, 2))
        factor[this] = positive(largest)
        message[:, this] = (raw / factor[this, None]).permute(2, 1, 0)
        scales = log_scale[levels.left[this]] + log_scale[levels.right[this]]
        log_scale[this] = scales + largest.log()
        to_parents(first, behind)
    return _Messages(message, vectors, factor, log_scale[:-1])


class _LogJointShape(torch.autograd.Function):
    """log p(x, shape) up to the words' scales, with an outside pass as its backward pass.

    Outside scores are the gradients with respect to scaled messages and vectors.
    """

    @staticmethod
    def forward(ctx, root, mixture, left, right, word_left, word_right, nodes: _Nodes):  # pyright: ignore
        up = _upward(nodes, mixture, left, right, word_left, word_right)
        ctx.save_for_backward(root, mixture, left, right)
        ctx.nodes, ctx.up, ctx.size = nodes, up, word_left.shape[:2]
        top = nodes.levels.root
        return (up.message[-1, top] @ root).log() + up.log_scale[top]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore
        root, mixture, left, right = ctx.saved_tensors
        nodes: _Nodes = ctx.nodes
        up: _Messages = ctx.up
        levels, words, nonterminals = nodes.levels, nodes.words, len(root)
        top = up.message[-1, levels.root]
        probability = top @ root
        # A tree of probability zero has no gradient.
        seed = torch.where(probability > 0, grad, 0.0) / positive(probability)
        outside = torch.zeros_like(up.message)
        outside[-1, levels.root] = seed[:, None] * root
        of_vectors, grad_mixture = torch.zeros_like(up.vectors), torch.zeros_like(mixture)
        for first, behind in reversed(levels.heights):
            this = slice(first, behind)
            for side, table in zip(nodes.sides(first, behind), (left, right), strict=True):
                received = of_vectors.index_select(1, 2 * words + side)
                outside[:nonterminals, side] = received @ table
            by_label = (outside[:, this] / up.factor[this, None]).permute(2, 1, 0)
            of_products = torch.bmm(by_label, mixture)
            left_at, right_at = nodes.left[this], nodes.right[this]
            on_left, on_right = (up.vectors.index_select(1, at) for at in (left_at, right_at))
            grad_mixture.baddbmm_(by_label.mT, on_left * on_right)
            of_vectors.index_add_(1, left_at, on_right.mul_(of_products))
            of_vectors.index_add_(1, right_at, on_left.mul_(of_products))

        def of_children(side: Int[Tensor, "nodes"]) -> Float[Tensor, "rank nonterminals"]:
            received = of_vectors.index_select(1, 2 * words + side).flatten(0, 1)
            return received.t() @ up.message[:nonterminals].index_select(1, side).flatten(0, 1)

        def of_words(received: Tensor) -> Float[Tensor, "batch length nonterminals rank"]:
            return received.unflatten(1, ctx.size).permute(1, 2, 0, 3)

        lefts, rights = nodes.sides(0, len(levels.row))
        return (
            seed @ top,
            grad_mixture,
            of_children(lefts),
            of_children(rights),
            of_words(of_vectors[:, :words]),
            of_words(of_vectors[:, words : 2 * words]),
            None,
        )
