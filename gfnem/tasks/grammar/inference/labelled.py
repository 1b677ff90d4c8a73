"""Labelled trees, rule by rule: log p(x, labelled tree), preterminals summed over each word."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gfnem.tasks.grammar.inference.messages import positive, scales_under
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.rules.grammar import Potentials
from gfnem.tasks.grammar.trees.tree import Trees


def log(x: Tensor) -> Tensor:
    """log x with gradient zero, not NaN, where x is zero."""
    return torch.where(x > 0, positive(x).log(), -torch.inf)


def labels_above(trees: Trees, labels: int) -> Int[Tensor, "batch samples nodes"]:
    """The label of each node's parent; that of S, which is `labels`, for roots.

    Raises ValueError when the trees have no labels.
    """
    if trees.labels is None:
        raise ValueError("labelled trees are needed; these are shapes")
    # One place more takes what is written for words.
    nodes = trees.labels.shape[-1]
    above = trees.labels.new_full((*trees.labels.shape[:-1], nodes + 1), labels)
    for child in trees.children():
        above.scatter_(-1, torch.where(child >= 0, child, nodes), trees.labels)
    return above[..., :nodes]


def log_joint_labelled(potentials: Potentials, trees: Trees) -> Float[Tensor, "batch samples"]:
    """log p(x, labelled tree), by gathers of the words' tables.

    Raises ValueError when the trees have no labels.
    """
    rules = rule_scores(potentials, trees).sum(-1)
    return rules + root_score(potentials, trees) + potentials.total_log_scale[:, None]


def root_score(potentials: Potentials, trees: Trees) -> Float[Tensor, "batch samples"]:
    """log p(S -> A) of each tree's topmost label."""
    top = trees.top_labels()
    if potentials.grammar is None:
        return log(potentials.root[top])
    return potentials.grammar.root[top]


def rule_scores(potentials: Potentials, trees: Trees) -> Float[Tensor, "batch samples nodes"]:
    """log-probability of the rule at each node, up to the scales of its words; 0 for no node.

    Raises ValueError when the trees have no labels.
    """
    contexts, dtype = potentials.contexts, potentials.root.dtype
    potentials = potentials.of_rules()
    context = contexts.under(labels_above(trees, contexts.labels))
    assert trees.labels is not None
    exists = trees.exists
    sentence = torch.arange(len(exists), device=exists.device)[:, None, None].expand_as(exists)
    at = (sentence, trees.start, trees.end, trees.labels, context, *trees.child_labels())
    values = log(potentials.rule_probabilities(*(index[exists] for index in at))).to(dtype)
    return values.new_zeros(exists.shape).masked_scatter(exists, values)


def labelled_scores(
    potentials: Potentials, trees: Trees
) -> tuple[Float[Tensor, "batch samples nodes"], Float[Tensor, "batch samples"]]:
    """What the grammar says of the words under each node of labelled trees, and log p(x, tree).

    The former is the log-probability of the words and labels below given the node's own label: of
    all rules below, and of its own where that sees no context. No gradients.
    """
    rules, counted = rule_scores(potentials, trees), under(trees)
    if potentials.contexts.total > 1:
        counted &= ~torch.eye(rules.shape[-1], dtype=torch.bool, device=rules.device)
    scores = torch.where(counted, rules[..., None, :], 0.0).sum(-1)
    log_joint = rules.sum(-1) + root_score(potentials, trees) + potentials.total_log_scale[:, None]
    return scores + scales_under(potentials, trees), log_joint


def under(trees: Trees) -> Bool[Tensor, "batch samples nodes nodes"]:
    """Which nodes, along the last axis, lie under each node; a node lies under itself."""
    inside = (trees.start[..., None, :] >= trees.start[..., None]) & (
        trees.end[..., None, :] <= trees.end[..., None]
    )
    return inside & trees.exists[..., None, :]


def log_joint_by_gathers(
    grammar: DenseGrammar, words: Int[Tensor, "batch length"], trees: Trees
) -> Float[Tensor, "batch samples"]:
    """`log_joint_labelled` without tables of the words: of each rule just what it needs.

    Much less work for a few trees of each sentence.

    Raises ValueError when the trees have no labels.
    """
    contexts = grammar.contexts
    context = contexts.under(labels_above(trees, grammar.nonterminals))
    assert trees.labels is not None
    exists, nonterminals = trees.exists, grammar.nonterminals
    label = trees.labels[exists]
    rule_row, below = context[exists] * nonterminals + label, contexts.under(label)
    symbols = nonterminals + grammar.preterminals
    preterminal = torch.arange(grammar.preterminals, device=words.device)
    left_label, right_label = (labels[exists] for labels in trees.child_labels())
    sentence = torch.arange(len(words), device=words.device)[:, None, None]
    sentence = sentence.expand_as(exists)[exists]
    first, last = words[sentence, trees.start[exists]], words[sentence, trees.end[exists] - 1]

    def emissions(is_word: bool, word: Tensor, nodes: Tensor) -> Tensor:
        """Where log p(T -> w) under A is of each T; nothing for a child that is no word."""
        if not is_word:
            return word.new_empty(len(nodes), 0)
        row = below[nodes, None] * grammar.preterminals + preterminal
        return row * grammar.emission.shape[-1] + word[nodes, None]

    # The nodes of each kind, their rules [node, left child, right child] and what words ask.
    kinds, rule_places, emission_places = [], [], []
    for word_left, word_right in product((True, False), repeat=2):
        kind = ((left_label < 0) == word_left) & ((right_label < 0) == word_right)
        nodes = kind.nonzero().squeeze(-1)
        left, right = (
            nonterminals + preterminal[None] if is_word else child[nodes, None]
            for is_word, child in ((word_left, left_label), (word_right, right_label))
        )
        above = rule_row[nodes, None, None] * symbols
        kinds.append(nodes)
        rule_places.append((above + left[:, :, None]) * symbols + right[:, None])
        emission_places.append(emissions(word_left, first, nodes))
        emission_places.append(emissions(word_right, last, nodes))
    # One look-up for all: the gradient of each is as large as the table.
    rules = _looked_up(grammar.binary, rule_places)
    emitted = _looked_up(grammar.emission, emission_places)
    score = grammar.root.new_zeros(len(label))
    for nodes, joint, on_left, on_right in zip(
        kinds, rules, emitted[::2], emitted[1::2], strict=True
    ):
        if on_left.shape[1]:
            joint = joint + on_left[:, :, None]
        if on_right.shape[1]:
            joint = joint + on_right[:, None]
        joint = joint.flatten(1)
        largest = joint.detach().amax(-1)
        largest = torch.where(largest.isfinite(), largest, 0.0)
        value = log((joint - largest[:, None]).exp().sum(-1)) + largest
        score = score.index_put((nodes,), value)
    by_node = score.new_zeros(exists.shape).masked_scatter(exists, score)
    return by_node.sum(-1) + grammar.root[trees.top_labels()]


def _looked_up(table: Tensor, places: Sequence[Int[Tensor, "..."]]) -> list[Tensor]:
    """Of a table's entries in their order those at some places."""
    values = table.flatten()[torch.cat([place.flatten() for place in places])]
    parts = values.split([place.numel() for place in places])
    return [part.view(place.shape) for part, place in zip(parts, places, strict=True)]
