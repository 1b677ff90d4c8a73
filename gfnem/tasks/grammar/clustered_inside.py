"""Inside scores of a grammar whose rules see which cluster the parent is in.

beta(i, j, A | c) is the score of words i, ..., j - 1 under nonterminal A with a parent of cluster c
above it. The children of all labels of one cluster stand in the same context, so that

    pairs(i, j, c, B, C) = sum_k beta(i, k, B | c) beta(k, j, C | c)

is needed for clusters only, where `annotated_inside` has it for all labels, and then

    beta(i, j, A | c) = sum_BC rules[A, c, B, C] pairs(i, j, cluster of A, B, C)

beside the two terms with a word as child.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from gfnem.tasks.grammar.annotated import AveragedRules
from gfnem.tasks.grammar.spans import SpanTable


@torch.no_grad()
def inside_scores(
    grammar: AveragedRules, clusters: Int[Tensor, "parents"], lengths: Int[Tensor, "batch"]
) -> tuple[SpanTable, SpanTable]:
    """beta of all spans of at least two words, [cluster, label], and the logarithms of its scales.

    Both are 0 for single words.

    clusters: of each parent; S comes last.
    """
    batch, length, nonterminals, count, _ = grammar.left.shape
    below = clusters[:-1]
    # Labels by their cluster: what they become, [pair of children, label and cluster].
    members = [(below == cluster).nonzero().squeeze(1) for cluster in range(count)]
    rules = [grammar.rules[labels].flatten(0, 1).flatten(1).t() for labels in members]
    left_words = grammar.left.transpose(0, 1).contiguous()
    right_words = grammar.right.transpose(0, 1).contiguous()
    vectors = SpanTable.zeros(grammar.both, length, batch, count, nonterminals)
    scales = SpanTable.zeros(grammar.both, length, batch)
    scores, largest = grammar.both.permute(1, 0, 3, 2), grammar.both.new_zeros(())
    for width in range(2, length + 1):
        if width > 2:
            weights, largest = scales.split_weights(width)
            weights = weights[..., None, None]
            left, right = vectors.left(width), vectors.right(width)
            # A child beside a word: [..., label of the parent, cluster above it].
            on_right = (left_words[: len(left)] @ right[:, :, 0, below, :, None]).squeeze(-1)
            on_left = (right_words[width - 1 :] @ left[:, :, -1, below, :, None]).squeeze(-1)
            scores = weights[:, :, 0] * on_right + weights[:, :, -1] * on_left
            if width > 3:
                weighted = weights[:, :, 1:-1] * left[:, :, 1:-1]
                children = (x.permute(3, 0, 1, 2, 4) for x in (weighted, right[:, :, 1:-1]))
                for labels, becomes, first, second in zip(members, rules, *children, strict=True):
                    pairs = (first.mT @ second).flatten(-2)
                    scores[:, :, labels] += (pairs @ becomes).unflatten(-1, (len(labels), count))
            scores = scores.mT
        peak = scores.amax((-1, -2))
        vectors.put(width, scores / torch.where(peak > 0, peak, 1.0)[..., None, None])
        scales.put(width, largest + peak.log())
    return vectors, scales
