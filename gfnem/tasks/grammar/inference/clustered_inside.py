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

from gfnem.tasks.grammar.inference.spans import SpanTable
from gfnem.tasks.grammar.rules.annotated import AveragedRules
from gfnem.tasks.grammar.rules.products import matrix_vector, times_narrow


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
    # Labels by their cluster: what they become, [pair of children, label and cluster], and what
    # words do beside a child, [position, sentence, label and cluster, the child's label].
    members = [(below == cluster).nonzero().squeeze(1) for cluster in range(count)]
    rules = [grammar.rules[labels].flatten(0, 1).flatten(1).t() for labels in members]
    left_words, right_words = (
        [table.transpose(0, 1).index_select(2, labels).flatten(2, 3) for labels in members]
        for table in (grammar.left, grammar.right)
    )
    vectors = SpanTable.zeros(grammar.both, length, batch, count, nonterminals)
    scales = SpanTable.zeros(grammar.both, length, batch)
    scores, largest = grammar.both.permute(1, 0, 3, 2), grammar.both.new_zeros(())
    for width in range(2, length + 1):
        if width > 2:
            weights, largest = scales.split_weights(width)
            weights = weights[..., None, None]
            left, right = vectors.left(width), vectors.right(width)
            scores = weights.new_empty(*left.shape[:2], nonterminals, count)
            weighted = weights[:, :, 1:-1] * left[:, :, 1:-1]
            for cluster, labels in enumerate(members):
                on_right = matrix_vector(left_words[cluster][: len(left)], right[:, :, 0, cluster])
                on_left = matrix_vector(right_words[cluster][width - 1 :], left[:, :, -1, cluster])
                score = weights[:, :, 0, 0] * on_right + weights[:, :, -1, 0] * on_left
                if width > 3:
                    pairs = weighted[:, :, :, cluster].mT @ right[:, :, 1:-1, cluster]
                    pairs = pairs.flatten(0, 1).flatten(1)
                    score += times_narrow(pairs, rules[cluster]).unflatten(0, left.shape[:2])
                scores[:, :, labels] = score.unflatten(-1, (len(labels), count))
            scores = scores.mT
        peak = scores.amax((-1, -2))
        vectors.put(width, scores / torch.where(peak > 0, peak, 1.0)[..., None, None])
        scales.put(width, largest + peak.log())
    return vectors, scales
