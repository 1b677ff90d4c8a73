"""Messages along given trees: log p(x, tree) with labels given or summed out, and labels drawn.

A node's message in[A] is the probability of the words under it given label A, summed over the
labels below. Messages go bottom-up, one level of all trees of the batch at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gfnem.categorical import sample_categorical
from gfnem.tasks.grammar.rules.annotated import AnnotatedPotentials, ContextPotentials
from gfnem.tasks.grammar.rules.potentials import MergePotentials, Potentials
from gfnem.tasks.grammar.rules.products import matrix_vector, times_narrow
from gfnem.tasks.grammar.trees.levels import INNER, LEAVES, WORD_LEFT, WORD_RIGHT, Levels
from gfnem.tasks.grammar.trees.tree import Trees


class NodeMessages(NamedTuple):
    """Of nodes in some order.

    message: scaled to maximum 1.
    log_scale: the logarithm of what it was divided by.
    """

    message: Float[Tensor, "total ..."]
    log_scale: Float[Tensor, "total"]

    def select(self, nodes: slice | Int[Tensor, "nodes"]) -> NodeMessages:
        return NodeMessages(self.message[nodes], self.log_scale[nodes])

    def log_whole(
        self, levels: Levels, root: Float[Tensor, "nonterminals"]
    ) -> Float[Tensor, "rows"]:
        """log-probability of each tree and its words, up to their scales, given p(S -> A)."""
        # Where rules see the parent, that of a tree's root is S, which comes last.
        top = self.message[levels.root].reshape(len(levels.root), -1, len(root))[:, -1]
        return (top @ root).log() + self.log_scale[levels.root]


def _word_left(levels: Levels, table: Tensor, chosen: slice) -> Tensor:
    """Entries [A, C] of the nodes whose left child is a word."""
    return table[levels.sentence[chosen], levels.start[chosen]]


def _word_right(levels: Levels, table: Tensor, chosen: slice) -> Tensor:
    """Entries [A, B] of the nodes whose right child is a word."""
    return table[levels.sentence[chosen], levels.end[chosen] - 1]


def positive(x: Tensor) -> Tensor:
    """x where it may be divided by, 1 where a probability of zero made it zero."""
    return torch.where(x > 0, x, 1.0)


def upward(
    potentials: Potentials, levels: Levels, known: NodeMessages | None = None
) -> NodeMessages:
    """Messages of all nodes, given those of the nodes that `levels` says are known."""
    p = potentials
    message, _, log_scale = _upward(levels, p.rules, p.left, p.right, p.both, known)
    return NodeMessages(message, log_scale)


def _upward(
    levels: Levels,
    rules: Tensor,
    left: Tensor,
    right: Tensor,
    both: Tensor,
    known: NodeMessages | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Messages scaled to maximum 1, the factors that scaled them, and their total log-scales."""
    total, nonterminals = len(levels.row), rules.shape[0]
    message = rules.new_empty(total, nonterminals)
    factor = rules.new_empty(total, 1)
    log_scale = rules.new_zeros(total, 1)
    if known is not None:
        message[: levels.known] = known.message
        log_scale[: levels.known, 0] = known.log_scale
    flat_rules = rules.reshape(nonterminals, -1).t()
    for kind, first, behind in levels.slices:
        nodes = slice(first, behind)
        if kind == LEAVES:
            raw = both[levels.sentence[nodes], levels.gap[nodes]]
        elif kind == WORD_LEFT:
            child = levels.right[nodes]
            raw = matrix_vector(_word_left(levels, left, nodes), message[child])
            log_scale[nodes] = log_scale[child]
        elif kind == WORD_RIGHT:
            child = levels.left[nodes]
            raw = matrix_vector(_word_right(levels, right, nodes), message[child])
            log_scale[nodes] = log_scale[child]
        else:
            a, b = levels.left[nodes], levels.right[nodes]
            pairs = (message[a][:, :, None] * message[b][:, None]).flatten(1)
            raw = times_narrow(pairs, flat_rules)
            log_scale[nodes] = log_scale[a] + log_scale[b]
        largest = raw.amax(-1, keepdim=True)
        factor[nodes] = positive(largest)
        message[nodes] = raw / factor[nodes]
        log_scale[nodes] += largest.log()
    return message, factor, log_scale.squeeze(1)


class _LogJointShape(torch.autograd.Function):
    """log p(x, shape) up to the words' scales, with an outside pass as its backward pass.

    The gradient of log p with respect to a rule is its expected count, sum over nodes of
    out[A] l[B] r[C] / p, which is one matrix product over all nodes; nothing of the size of the
    rules is built for any single node.
    """

    @staticmethod
    def forward(ctx, root, rules, left, right, both, levels: Levels):  # pyright: ignore
        message, factor, log_scale = _upward(levels, rules, left, right, both)
        ctx.save_for_backward(root, rules, left, right, both, message, factor)
        ctx.levels = levels
        return NodeMessages(message, log_scale).log_whole(levels, root)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # pyright: ignore
        (grad,) = grads
        root, rules, left, right, both, message, factor = ctx.saved_tensors
        levels: Levels = ctx.levels
        nonterminals = rules.shape[0]
        flat_rules = rules.reshape(nonterminals, -1)
        top = message[levels.root]
        probability = top @ root
        # A tree of probability zero has no gradient.
        weight = torch.where(probability > 0, grad, 0.0)
        # outside[v] is kept such that outside[v] . message[v] = 1.
        outside = torch.zeros_like(message)
        outside[levels.root] = root / positive(probability)[:, None]
        grad_root = (weight / positive(probability)) @ top

        def descend(child: Tensor, value: Tensor) -> None:
            inner = (value * message[child]).sum(-1, keepdim=True)
            outside[child] = value / positive(inner)

        for kind, first, behind in reversed(levels.slices):
            nodes = slice(first, behind)
            out = outside[nodes]
            if kind == WORD_LEFT:
                table = _word_left(levels, left, nodes)
                descend(levels.right[nodes], matrix_vector(table.mT, out))
            elif kind == WORD_RIGHT:
                table = _word_right(levels, right, nodes)
                descend(levels.left[nodes], matrix_vector(table.mT, out))
            elif kind == INNER:
                a, b = levels.left[nodes], levels.right[nodes]
                pair = (out @ flat_rules).unflatten(1, (nonterminals, nonterminals))
                descend(a, matrix_vector(pair, message[b]))
                descend(b, matrix_vector(pair.mT, message[a]))

        share = outside * (weight[levels.row, None] / factor)
        grad_left, grad_right = torch.zeros_like(left), torch.zeros_like(right)
        grad_both, grad_rules = torch.zeros_like(both), torch.zeros_like(rules)
        length = left.shape[1]
        for kind in (LEAVES, WORD_LEFT, WORD_RIGHT, INNER):
            nodes = levels.of_kind(kind)
            out, sentence = share[nodes], levels.sentence[nodes]
            if kind == LEAVES:
                at = sentence * both.shape[1] + levels.gap[nodes]
                grad_both.flatten(0, 1).index_add_(0, at, out)
            elif kind == WORD_LEFT:
                at = sentence * length + levels.start[nodes]
                counts = out[:, :, None] * message[levels.right[nodes]][:, None]
                grad_left.flatten(0, 1).index_add_(0, at, counts)
            elif kind == WORD_RIGHT:
                at = sentence * length + levels.end[nodes] - 1
                counts = out[:, :, None] * message[levels.left[nodes]][:, None]
                grad_right.flatten(0, 1).index_add_(0, at, counts)
            else:
                a, b = message[levels.left[nodes]], message[levels.right[nodes]]
                counts = out.t() @ (a[:, :, None] * b[:, None]).flatten(1)
                grad_rules += counts.view_as(rules)
        return grad_root, grad_rules, grad_left, grad_right, grad_both, None


def log_joint_shape(potentials: Potentials, trees: Trees) -> Float[Tensor, "batch samples"]:
    """log p(x, shape), labels summed exactly by messages along each tree.

    Its gradient costs about as much as the value and is exact; -inf, with gradient zero, where the
    grammar gives a shape no probability.
    """
    value = _LogJointShape.apply(
        potentials.root,
        potentials.rules,
        potentials.left,
        potentials.right,
        potentials.both,
        Levels.of(trees),
    )
    return value.view(trees.start.shape[:2]) + potentials.total_log_scale[:, None]


def log(x: Tensor) -> Tensor:
    """log x with gradient zero, not NaN, where x is zero."""
    return torch.where(x > 0, positive(x).log(), -torch.inf)


def log_joint_labelled(potentials: Potentials, trees: Trees) -> Float[Tensor, "batch samples"]:
    """log p(x, labelled tree), preterminals summed over each word, by gathers.

    Raises ValueError when the trees have no labels.
    """
    rules = rule_scores(potentials, trees).sum(-1)
    return rules + root_score(potentials, trees) + potentials.total_log_scale[:, None]


def root_score(
    potentials: Potentials | ContextPotentials, trees: Trees
) -> Float[Tensor, "batch samples"]:
    """log p(S -> A) of each tree's topmost label."""
    return log(potentials.root[trees.top_labels()])


def rule_scores(
    potentials: Potentials | ContextPotentials,
    trees: Trees,
    context: Int[Tensor, "batch samples nodes"] | None = None,
) -> Float[Tensor, "batch samples nodes"]:
    """log-probability of the rule at each node, up to the scales of its words; 0 for no node.

    context: the symbol above each node; None where rules do not see it.

    Raises ValueError when the trees have no labels.
    """
    if trees.labels is None:
        raise ValueError("labelled trees are needed; these are shapes")
    if isinstance(potentials, Potentials):
        potentials = AnnotatedPotentials.of_context_free(potentials)
        context = torch.zeros_like(trees.labels)
    assert context is not None
    exists = trees.exists
    sentence = torch.arange(len(exists), device=exists.device)[:, None, None].expand_as(exists)
    at = (sentence, trees.start, trees.end, trees.labels, context, *trees.child_labels())
    values = log(potentials.rule_probabilities(*(index[exists] for index in at)))
    return values.new_zeros(exists.shape).masked_scatter(exists, values)


def inside_scores(
    potentials: Potentials, trees: Trees
) -> tuple[Float[Tensor, "batch samples nodes"], Float[Tensor, "batch samples"]]:
    """What the grammar says of the words under each node, and log p(x, tree); no gradients.

    The former is log sum over A of p(words under the node, shape below it | A) for shapes and
    log p(words, labels below | the node's label) for labelled trees.
    """
    words = scales_under(potentials, trees)
    if trees.labels is not None:
        rules = rule_scores(potentials, trees)
        scores = torch.where(under(trees), rules[..., None, :], 0.0).sum(-1) + words
        top = scores.gather(-1, trees.sizes.argmax(-1, keepdim=True)).squeeze(-1)
        return scores, top + root_score(potentials, trees)
    levels = Levels.of(trees)
    messages = upward(potentials, levels)
    nodes = levels.by_gap(messages.message.sum(-1).log() + messages.log_scale, trees)
    whole = messages.log_whole(levels, potentials.root).view(words.shape[:2])
    return nodes + words, whole + potentials.total_log_scale[:, None]


def scales_under(potentials: MergePotentials, trees: Trees) -> Float[Tensor, "batch samples nodes"]:
    """The sum of the scales of the words under each node."""
    word = torch.arange(potentials.log_scale.shape[1], device=trees.start.device)
    below = (word >= trees.start[..., None]) & (word < trees.end[..., None])
    return (below * potentials.log_scale[:, None, None]).sum(-1)


def under(trees: Trees) -> Bool[Tensor, "batch samples nodes nodes"]:
    """Which nodes, along the last axis, lie under each node; a node lies under itself."""
    inside = (trees.start[..., None, :] >= trees.start[..., None]) & (
        trees.end[..., None, :] <= trees.end[..., None]
    )
    return inside & trees.exists[..., None, :]


def sample_labels(
    potentials: Potentials, trees: Trees, generator: torch.Generator | None = None
) -> Trees:
    """The same trees with nonterminals drawn from the exact p(labels | shape, x), top-down."""
    levels = Levels.of(trees)
    rules, nonterminals = potentials.rules, potentials.rules.shape[0]
    message, _ = upward(potentials, levels)
    label = torch.zeros_like(levels.row)
    label[levels.root] = sample_categorical(potentials.root * message[levels.root], generator)
    for kind, first, behind in reversed(levels.slices):
        nodes = slice(first, behind)
        above, row = label[nodes], torch.arange(behind - first, device=label.device)
        if kind == WORD_LEFT:
            child = levels.right[nodes]
            table = _word_left(levels, potentials.left, nodes)[row, above]
            label[child] = sample_categorical(table * message[child], generator)
        elif kind == WORD_RIGHT:
            child = levels.left[nodes]
            table = _word_right(levels, potentials.right, nodes)[row, above]
            label[child] = sample_categorical(table * message[child], generator)
        elif kind == INNER:
            a, b = levels.left[nodes], levels.right[nodes]
            weights = rules[above] * message[a][:, :, None] * message[b][:, None]
            drawn = sample_categorical(weights.flatten(1), generator)
            label[a], label[b] = drawn // nonterminals, drawn % nonterminals
    return levels.labelled(trees, label)
