"""P_B of policies over forests: in which order the merges of a tree were made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.categorical import sample_categorical
from gfnem.gflownet.policy import ON_POLICY
from gfnem.tasks.grammar.policies.env import LATER, parents_time
from gfnem.tasks.grammar.policies.merges import ForestCondition, Merges, flat, sentence_of
from gfnem.tasks.grammar.trees.tree import Trees


@dataclass(frozen=True)
class MergeOrders:
    """P_B undoes one of a forest's roots after the other; uniform over orders unless `learned`."""

    learned: bool

    def draw(self, condition: ForestCondition, z: Trees) -> Merges:
        """Merge orders of given trees."""
        trees = flat(z)
        draw = self._learned_order if self.learned else _uniform_order
        with torch.no_grad():
            rank = draw(condition, trees, z.start.shape[1])
        exists = trees.exists.squeeze(1)
        time = torch.where(exists, rank, LATER)
        labels = trees.labels.squeeze(1) if trees.labels is not None else None
        return Merges.of(time, labels)

    def _learned_order(
        self, condition: ForestCondition, trees: Trees, samples: int
    ) -> Int[Tensor, "rows gaps"]:
        """Undo merges one by one, each root with the probability that the learned P_B gives it."""
        start, end = trees.start.squeeze(1), trees.end.squeeze(1)
        logit = self.logit(condition, start, end, samples)
        rows = torch.arange(len(start), device=start.device)
        remaining = trees.exists.squeeze(1)
        count = remaining.sum(-1)
        rank = torch.full_like(start, LATER)
        for _ in range(start.shape[1]):
            done = count == 0
            # A root lies inside no other remaining node.
            time = torch.where(remaining, 0, LATER)
            is_root = remaining & (parents_time(start, end, time, trees.lengths) == LATER)
            weights = torch.where(is_root, logit, -torch.inf)
            weights[done, 0] = 0.0
            gap = sample_categorical(ON_POLICY.probabilities(weights))
            count = count - 1
            rank[rows, gap] = torch.where(done, rank[rows, gap], count)
            remaining[rows, gap] = remaining[rows, gap] & done
            count = count.clamp(min=0)
        return rank

    def logit(
        self, condition: ForestCondition, start: Tensor, end: Tensor, samples: int
    ) -> Float[Tensor, "rows gaps"]:
        """P_B's logits of undoing each node; log size alone makes merge orders uniform."""
        size = (end - start - 1).clamp(min=1).to(condition.potentials.root.dtype)
        if not self.learned:
            return size.log()
        encoding = condition.encoding
        sentence = sentence_of(condition, samples)[:, None]
        return size.log() + encoding.backward[sentence, encoding.index[start, end]]

    def log_backward(
        self, condition: ForestCondition, trees: Trees, merges: Merges
    ) -> Float[Tensor, "steps rows"]:
        """log P_B of each merge of these trees in this order; 0 behind the last."""
        rows = flat(trees)
        start, end = rows.start.squeeze(1), rows.end.squeeze(1)
        steps = torch.arange(start.shape[1], device=start.device)
        made = steps < (rows.lengths - 1)[:, None]
        at = merges.gaps.clamp(max=start.shape[1] - 1)
        if not self.learned:
            size = (end - start - 1).gather(1, at).clamp(min=1)
            log_p = (size / (steps + 1)).log().to(condition.potentials.root.dtype)
        else:
            logit = self.logit(condition, start, end, trees.start.shape[1])
            parent = parents_time(start, end, merges.time, rows.lengths)
            after = steps[:, None]
            is_root = (merges.time[:, None] <= after) & (parent[:, None] > after)
            is_root &= rows.exists
            total = torch.where(is_root, logit[:, None], -torch.inf)
            total = torch.where(made[..., None], total, 0.0).logsumexp(-1)
            log_p = logit.gather(1, at) - total
        return torch.where(made, log_p, 0.0).t()


def _uniform_order(
    condition: ForestCondition, trees: Trees, samples: int
) -> Int[Tensor, "rows gaps"]:
    """Uniformly random merge orders.

    Give every node a time, uniform in [0, 1] and later than all below it: a node over s nodes has
    the largest of s uniform numbers below its parent's time, which is that time * U^(1/s).
    """
    start, end = trees.start, trees.end
    above = (start.transpose(1, 2) >= start) & (end.transpose(1, 2) <= end)
    above &= trees.exists & trees.exists.transpose(1, 2)
    uniform = torch.rand(start.squeeze(1).shape, dtype=torch.float64, device=start.device)
    log_factor = uniform.log() / trees.sizes.squeeze(1).clamp(min=1)
    log_time = (above.to(torch.float64) @ log_factor[..., None]).squeeze(-1)
    log_time = torch.where(trees.exists.squeeze(1), log_time, torch.inf)
    return log_time.argsort(-1).argsort(-1)
