"""Sentences and their labelled trees drawn from a grammar, in tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gfnem.categorical import sample_categorical
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.tree import Trees


class Rules(NamedTuple):
    """How a grammar's rules are drawn.

    root: p(S -> A).
    expand: nonterminals and the labels above, of which S is the last -> left and right children.
    emit: preterminals and the labels above -> words.
    """

    root: Float[Tensor, "nonterminals"]
    expand: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    emit: Callable[[Tensor, Tensor], Tensor]


def draw_sentences(
    rules: Rules, n: int, max_length: int, tries: int, generator: torch.Generator | None
) -> tuple[Sentences, Trees, int]:
    """At most n sentences with their labelled trees, and how many did not fit in max_length words.

    A draw that cannot fit any more is rejected at once and drawn again, `tries` times at most.
    """
    found: list[tuple[Tensor, ...]] = []
    missing, rejected = n, 0
    for _ in range(tries):
        words, lengths, times, labels = _derive(rules, missing, max_length, generator)
        fits = lengths > 0
        found.append((words[fits], lengths[fits], times[fits], labels[fits]))
        kept = int(fits.sum())
        missing -= kept
        rejected += missing
        if missing == 0:
            break
    words, lengths, times, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    longest = max(int(lengths.max()) if len(lengths) else 0, 2)
    ids = torch.full_like(lengths, -1)
    x = Sentences(words[:, :longest], lengths, ids)
    z = Trees.from_merge_times(times[:, None, : longest - 1], lengths)
    labels = torch.where(z.exists, labels[:, None, : longest - 1], -1)
    return x, Trees(z.start, z.end, z.lengths, labels), rejected


def _derive(
    rules: Rules, n: int, max_length: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n leftmost derivations side by side, each with a stack of symbols still to be expanded.

    Returns words [n, max_length], lengths [n] (0 where the sentence would be too long), and for
    each gap the (negated) step at which its node was expanded and the node's label.
    """
    device, nonterminals = rules.root.device, len(rules.root)
    rows = torch.arange(n, device=device)
    # Every symbol on a stack gives at least one word; one slot more takes what does not fit.
    stack = torch.zeros(n, max_length + 2, dtype=torch.long, device=device)
    context = torch.full_like(stack, nonterminals)
    # The step at which a right child's parent was expanded; -1 for others.
    parent = torch.full_like(stack, -1)
    stack[:, 0] = sample_categorical(rules.root.expand(n, -1), generator)
    depth = torch.ones(n, dtype=torch.long, device=device)
    words = torch.zeros(n, max_length, dtype=torch.long, device=device)
    lengths = torch.zeros(n, dtype=torch.long, device=device)
    times = torch.zeros(n, max_length, dtype=torch.long, device=device)
    labels = torch.full_like(times, -1)
    alive = torch.ones(n, dtype=torch.bool, device=device)
    for step in range(2 * max_length - 1):
        row = rows[alive & (depth > 0)]
        if len(row) == 0:
            break
        depth[row] -= 1
        top = depth[row]
        symbol, above, origin = stack[row, top], context[row, top], parent[row, top]
        is_right = origin >= 0
        right, gap = row[is_right], lengths[row][is_right] - 1
        times[right, gap] = -origin[is_right]
        labels[right, gap] = above[is_right]
        expands = symbol < nonterminals
        grow, at, head = row[expands], top[expands], symbol[expands]
        left_child, right_child = rules.expand(head, above[expands])
        fits = lengths[grow] + at + 2 <= max_length
        alive[grow[~fits]] = False
        stack[grow, at], stack[grow, at + 1] = right_child, left_child
        parent[grow, at], parent[grow, at + 1] = step, -1
        context[grow, at] = context[grow, at + 1] = head
        depth[grow] += 2
        emit, kind = row[~expands], symbol[~expands] - nonterminals
        words[emit, lengths[emit]] = rules.emit(kind, above[~expands])
        lengths[emit] += 1
    finished = alive & (depth == 0)
    return words, torch.where(finished, lengths, 0), times, labels
