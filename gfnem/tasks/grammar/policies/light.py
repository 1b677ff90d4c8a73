"""A light network over composed root embeddings, added to the grammar's own merge scores.

The embedding of a new root is composed of its children's and the encoder's view of its span. A
merge has as logit what the grammar says of it, by how much log sum_A in_v[A] rises, plus a small
network's correction that starts at zero. Where rules see the parent, in_v[A] is a mean over what
may stand above v.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.tasks.grammar.policies.encoder import zero_linear
from gfnem.tasks.grammar.policies.env import Forest
from gfnem.tasks.grammar.policies.forest import ForestPolicy
from gfnem.tasks.grammar.policies.merges import LOG_ZERO, ActionScores, ForestCondition


class LightPolicy(ForestPolicy):
    """See the module's description; takes the arguments of `ForestPolicy`."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        width = self.encoder.hidden.out_features
        self.label = nn.Embedding(self.symbols, width)
        self.compose = nn.Linear(3 * width, width)
        self.judge = nn.Linear(3 * width, width)
        self.correction = zero_linear(width, self.symbols)

    def scores(self, condition: ForestCondition, forest: Forest) -> ActionScores:
        return _LightScores(self, condition, forest)


class _LightScores(ActionScores):
    """Keeps the embedding of every root and the logits of every gap.

    A gap's logits change only when one of the roots beside it does.
    """

    def __init__(self, policy: LightPolicy, condition: ForestCondition, forest: Forest):
        super().__init__(condition, forest)
        self.policy = policy
        rows, slots = forest.start.shape
        self.length = slots
        words = condition.encoding.words[forest.sentence]
        # Words first, then the node of each gap.
        self.embedding = torch.cat([words, torch.zeros_like(words)], 1)
        word = condition.potentials.log_word[forest.sentence]
        self.fixed = torch.cat([word, torch.zeros_like(word)], 1)
        gaps = torch.arange(slots - 1, device=forest.rows.device)
        row = forest.rows[:, None].expand(rows, slots - 1)
        logits = self._judged(row, gaps.expand(rows, -1))
        nothing = logits.new_zeros(rows, 1, logits.shape[-1])
        self.gap_logits = torch.cat([logits, nothing], 1)

    def _children(self, row: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        """Positions among words and nodes of the roots that meet in a gap."""
        left, right = self.forest.left[row, gap], self.forest.right[row, gap]
        last_word = self.length - 1
        return (
            torch.where(left < 0, gap, self.length + left),
            torch.where(right < 0, (gap + 1).clamp(max=last_word), self.length + right),
        )

    def _span(self, row: Tensor, gap: Tensor) -> Float[Tensor, "*batch width"]:
        start = self.forest.start[row, gap].clamp(max=self.length - 2)
        end = torch.maximum(self.forest.end[row, gap].clamp(max=self.length), start + 2)
        encoding = self.condition.encoding
        return encoding.spans[self.forest.sentence[row], encoding.index[start, end]]

    def _judged(self, row: Tensor, gap: Tensor) -> Float[Tensor, "*batch symbols"]:
        """Logits of merging in these gaps."""
        forest = self.forest
        left, right = self._children(row, gap)
        features = torch.cat(
            [self.embedding[row, left], self.embedding[row, right], self._span(row, gap)], -1
        )
        correction = self.policy.correction(self.policy.judge(features).relu())
        message = forest.average_message(row, gap).clamp(min=1e-30).log()
        if not forest.labelled:
            message = message.logsumexp(-1, keepdim=True)
        size = (forest.end[row, gap] - forest.start[row, gap] - 1).clamp(min=1)
        rise = forest.log_scale[row, gap].clamp(min=LOG_ZERO)
        rise = rise - self.fixed[row, left] - self.fixed[row, right] + size.to(rise.dtype).log()
        return message + rise[..., None] + correction

    def logits(self, rows: Int[Tensor, "rows"] | None) -> Float[Tensor, "rows slots labels"]:
        return self.gap_logits if rows is None else self.gap_logits[rows]

    def merged(self, gap: Tensor, label: Tensor, before: Tensor, after: Tensor) -> None:
        forest, rows = self.forest, self.forest.rows
        left, right = self._children(rows, gap)
        features = torch.cat(
            [self.embedding[rows, left], self.embedding[rows, right], self._span(rows, gap)], -1
        )
        made = (self.policy.compose(features) + self.policy.label(label)).tanh()
        at = self.length + gap
        self.embedding = self.embedding.index_put((rows, at), made)
        total = forest.average_message(rows, gap).sum(-1).clamp(min=1e-30).log()
        self.fixed[rows, at] = (total + forest.log_scale[rows, gap]).clamp(min=LOG_ZERO)
        row, sides = rows.repeat(2), torch.cat([before, after])
        self.gap_logits = self.gap_logits.index_put((row, sides), self._judged(row, sides))
