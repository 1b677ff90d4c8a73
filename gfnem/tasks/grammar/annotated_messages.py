"""Messages along given trees where rules see the parent; see `messages`.

A node's message m[A | P] is the probability of the words under it given label A with P above it,
summed over the labels below.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.categorical import sample_categorical
from gfnem.tasks.grammar.annotated import AnnotatedPotentials
from gfnem.tasks.grammar.messages import (
    INNER,
    LEAVES,
    WORD_LEFT,
    WORD_RIGHT,
    Levels,
    log,
    positive,
    root_score,
    rule_scores,
    scales_under,
    under,
)
from gfnem.tasks.grammar.tree import Trees


def log_joint_labelled(
    potentials: AnnotatedPotentials, trees: Trees
) -> Float[Tensor, "batch samples"]:
    """log p(x, labelled tree), preterminals summed over each word, by gathers.

    Raises ValueError when the trees have no labels.
    """
    rules = rule_scores(potentials, trees, contexts(trees, len(potentials.root)))
    return rules.sum(-1) + root_score(potentials, trees) + potentials.total_log_scale[:, None]


def contexts(trees: Trees, nonterminals: int) -> Int[Tensor, "batch samples nodes"]:
    """The label of each node's parent; that of S, `nonterminals`, for roots.

    Raises ValueError when the trees have no labels.
    """
    if trees.labels is None:
        raise ValueError("labelled trees are needed; these are shapes")
    # One place more takes what is written for words.
    nodes = trees.labels.shape[-1]
    above = trees.labels.new_full((*trees.labels.shape[:-1], nodes + 1), nonterminals)
    for child in trees.children():
        above.scatter_(-1, torch.where(child >= 0, child, nodes), trees.labels)
    return above[..., :nodes]


def log_joint_shape(
    potentials: AnnotatedPotentials, trees: Trees
) -> Float[Tensor, "batch samples"]:
    """log p(x, shape), labels summed exactly by messages along each tree.

    -inf, with gradient zero, where the grammar gives a shape no probability.
    """
    levels = Levels.of(trees)
    message, log_scale = _upward(levels, potentials)
    value = log(message[levels.root, -1] @ potentials.root) + log_scale[levels.root]
    return value.view(trees.start.shape[:2]) + potentials.total_log_scale[:, None]


def inside_scores(
    potentials: AnnotatedPotentials, trees: Trees
) -> tuple[Float[Tensor, "batch samples nodes"], Float[Tensor, "batch samples"]]:
    """What the grammar says of the words under each node, and log p(x, tree); no gradients.

    The former is the logarithm of sum over A of p(words under the node, shape below it | A, P),
    averaged over the nonterminals P, for shapes. In labelled trees it counts the rules whose
    context the node's own label completes: those of the nodes below it, without its own.
    """
    words = scales_under(potentials, trees)
    if trees.labels is not None:
        rules = rule_scores(potentials, trees, contexts(trees, len(potentials.root)))
        log_joint = rules.sum(-1) + root_score(potentials, trees)
        own = torch.eye(rules.shape[-1], dtype=torch.bool, device=rules.device)
        scores = torch.where(under(trees) & ~own, rules[..., None, :], 0.0).sum(-1) + words
    else:
        levels = Levels.of(trees)
        message, log_scale = _upward(levels, potentials)
        some = torch.zeros_like(levels.row, dtype=torch.bool)
        nodes = potentials.average(message, some).sum(-1).log() + log_scale
        scores = levels.by_gap(nodes, trees) + words
        root = (message[levels.root, -1] @ potentials.root).log() + log_scale[levels.root]
        log_joint = root.view(words.shape[:2])
    return scores, log_joint + potentials.total_log_scale[:, None]


def sample_labels(
    potentials: AnnotatedPotentials, trees: Trees, generator: torch.Generator | None = None
) -> Trees:
    """The same trees with nonterminals drawn from the exact p(labels | shape, x), top-down."""
    levels = Levels.of(trees)
    nonterminals = len(potentials.root)
    message, _ = _upward(levels, potentials)
    label = torch.zeros_like(levels.row)
    context = torch.full_like(label, nonterminals)
    top = potentials.root * message[levels.root, -1]
    label[levels.root] = sample_categorical(top, generator)
    for kind, first, behind in reversed(levels.slices):
        nodes = slice(first, behind)
        sentence, above, parent = levels.sentence[nodes], label[nodes], context[nodes]
        left, right = levels.left[nodes], levels.right[nodes]
        if kind == WORD_LEFT:
            table = potentials.left[sentence, levels.start[nodes], above, parent]
            label[right] = sample_categorical(table * message[right, above], generator)
            context[right] = above
        elif kind == WORD_RIGHT:
            table = potentials.right[sentence, levels.end[nodes] - 1, above, parent]
            label[left] = sample_categorical(table * message[left, above], generator)
            context[left] = above
        elif kind == INNER:
            pairs = message[left, above][:, :, None] * message[right, above][:, None]
            weights = (potentials.rules[above, parent] * pairs).flatten(1)
            drawn = sample_categorical(weights, generator)
            label[left], label[right] = drawn // nonterminals, drawn % nonterminals
            context[left] = context[right] = above
    labels = torch.full(trees.start.flatten(0, 1).shape, -1, device=label.device)
    labels[levels.row, levels.gap] = label
    return Trees(trees.start, trees.end, trees.lengths, labels.view_as(trees.start))


def _upward(
    levels: Levels, potentials: AnnotatedPotentials
) -> tuple[Float[Tensor, "total contexts nonterminals"], Float[Tensor, "total"]]:
    """Messages of all nodes, scaled to maximum 1, and their log-scales, which have no gradient."""
    nonterminals, contexts = potentials.rules.shape[:2]
    rules = potentials.rules.flatten(2).mT
    message = rules.new_empty(len(levels.row), contexts, nonterminals)
    log_scale = rules.new_zeros(len(levels.row))
    tables = _tables(levels, potentials)
    for kind, first, behind in levels.slices:
        nodes = slice(first, behind)
        left, right = levels.left[nodes], levels.right[nodes]
        if kind == LEAVES:
            raw = next(tables[kind])
        elif kind == INNER:
            a, b = message[left, :nonterminals], message[right, :nonterminals]
            pairs = (a[..., None] * b[:, :, None]).flatten(2)
            raw = torch.bmm(pairs.transpose(0, 1), rules).transpose(0, 1)
            log_scale[nodes] = log_scale[left] + log_scale[right]
        else:
            child = right if kind == WORD_LEFT else left
            raw = (next(tables[kind]) @ message[child, :nonterminals, :, None]).squeeze(-1)
            log_scale[nodes] = log_scale[child]
        largest = raw.detach().amax((1, 2))
        message[nodes] = raw.mT / positive(largest)[:, None, None]
        log_scale[nodes] += largest.log()
    return message, log_scale


def _tables(levels: Levels, potentials: AnnotatedPotentials) -> dict[int, Iterator[Tensor]]:
    """What rules with words below them look up, by kind, slice by slice of the levels.

    All at once: the backward pass of every look-up is as large as the table.
    """
    tables = {}
    for kind, table, position in (
        (LEAVES, potentials.both, levels.gap),
        (WORD_LEFT, potentials.left, levels.start),
        (WORD_RIGHT, potentials.right, levels.end - 1),
    ):
        slices = [(first, behind) for this, first, behind in levels.slices if this == kind]
        if slices:
            nodes = torch.cat([torch.arange(*ends, device=position.device) for ends in slices])
            found = table[levels.sentence[nodes], position[nodes]]
            tables[kind] = iter(found.split([behind - first for first, behind in slices]))
    return tables
