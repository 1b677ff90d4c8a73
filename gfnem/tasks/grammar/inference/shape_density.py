"""log p(x, shape) of trees that change little from one look to the next, as those of Markov chains.

The messages of all nodes are kept: where a tree has changed, only the nodes that have other spans
below them are computed anew, which are about as many as the tree is high.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gfnem.tasks.grammar.inference.messages import NodeMessages, upward
from gfnem.tasks.grammar.rules.grammar import Potentials
from gfnem.tasks.grammar.trees.levels import Levels
from gfnem.tasks.grammar.trees.tree import Trees


class _Kept(NamedTuple):
    """Trees and the messages of their nodes, by tree and gap."""

    trees: Trees
    messages: NodeMessages


class _Seen(NamedTuple):
    """Trees that were looked at.

    row, at: of each node computed, its tree over the whole batch, and its place in what is kept.
    """

    trees: Trees
    row: Int[Tensor, "computed"]
    at: Int[Tensor, "computed"]
    messages: NodeMessages


class ShapeDensity:
    """Called with trees it gives log p(x, shape), without gradients.

    potentials: the grammar with the words of a batch summed in.
    """

    def __init__(self, potentials: Potentials):
        self.potentials = potentials
        self._kept: _Kept | None = None
        self._seen: _Seen | None = None

    @torch.no_grad()
    def __call__(self, trees: Trees) -> Float[Tensor, "batch samples"]:
        if self._kept is None:
            levels = Levels.of(trees)
            messages = upward(self.potentials, levels)
            at = levels.places(trees)
            # The first trees are taken at once.
            self._kept = _Kept(
                trees, NodeMessages(*(levels.by_gap(m, trees).flatten(0, 2) for m in messages))
            )
        else:
            is_root = trees.sizes == trees.lengths[:, None, None] - 1
            levels = Levels.of(trees, changed(trees, self._kept.trees) | is_root)
            at = levels.places(trees)
            messages = upward(
                self.potentials, levels, self._kept.messages.select(at[: levels.known])
            )
        computed = slice(levels.known, None)
        self._seen = _Seen(trees, levels.row[computed], at[computed], messages.select(computed))
        whole = messages.log_whole(levels, self.potentials).view(trees.start.shape[:2])
        return whole + self.potentials.total_log_scale[:, None]

    def take(self, taken: Bool[Tensor, "batch samples"]) -> None:
        """Of the trees of the last call these are what the next ones will be like."""
        assert self._seen is not None and self._kept is not None
        seen, kept = self._seen, self._kept
        mine = taken.flatten()[seen.row]
        for old, new in zip(kept.messages, seen.messages, strict=True):
            old[seen.at[mine]] = new[mine]
        self._kept = kept._replace(trees=seen.trees.where(taken, kept.trees))


def changed(trees: Trees, before: Trees) -> Bool[Tensor, "batch samples nodes"]:
    """Nodes that have, themselves included, other spans below them than in the trees before."""
    moved = trees.exists & ((trees.start != before.start) | (trees.end != before.end))
    # The nodes below one are at the gaps between its words.
    count = torch.nn.functional.pad(moved.long().cumsum(-1), (1, 0))
    below = count.gather(-1, (trees.end - 1).clamp(min=0)) - count.gather(-1, trees.start)
    return trees.exists & (below > 0)
