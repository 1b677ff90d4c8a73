"""The root-flow policy: a state's flow is a product of flows of its roots.

A root v over words i, ..., j - 1 has flow g(v) = log sum_A exp(o(i, j, A)) in_v[A], where in_v are
the grammar's own messages and o comes from one encoder pass. Merging l and r into v has the logit
g(v) - g(l) - g(r) + log size(v), the change of log flow plus the logit of the order-uniform P_B,
and what the node adds to a tree prior's -E(shape) / T, which every flow has of the nodes below.
No network runs along a trajectory, and the policy follows every M-step at once.

Where rules see the parent, in_v[A] = sum_P w(i, j, P) in_v[A | P]: what may stand above the root
has weights from the same encoder pass, equal ones to begin with. Above the whole sentence is S.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.tasks.grammar.policies.env import Forest
from gfnem.tasks.grammar.policies.forest import ForestPolicy
from gfnem.tasks.grammar.policies.merges import LOG_ZERO, ForestCondition, Merges, ScoresAtOnce


class RootFlowPolicy(ForestPolicy):
    """See the module's description; takes the arguments of `ForestPolicy`.

    Its span scores o(0, n, A) are not learned: the whole sentence's flow is p(x, z) itself.
    """

    scores_at_once = True

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        # Nothing is drawn for it: where rules see no parent, random numbers stay as they are.
        above = nn.Linear(self.encoder.hidden.out_features, self.nonterminals, device="meta")
        self.above = above.to_empty(device="cpu")
        nn.init.zeros_(self.above.weight)
        nn.init.zeros_(self.above.bias)

    def scores(self, condition: ForestCondition, forest: Forest) -> ScoresAtOnce:
        return _RootFlowScores(self, condition, forest)

    def weights_above(
        self, condition: ForestCondition
    ) -> Float[Tensor, "batch spans nonterminals"] | None:
        """Of what may stand above each span; None where rules do not see it."""
        if condition.potentials.contexts.total == 1:
            return None
        return self.above(condition.encoding.spans).softmax(-1)


class _RootFlowScores(ScoresAtOnce):
    """Keeps the flow of each gap's node and every version of it that a rollout has seen.

    A gap's node changes when one of the roots beside it does. Each version is a candidate; the
    gradient pass scores all candidates of all rows in one go.
    """

    def __init__(self, policy: RootFlowPolicy, condition: ForestCondition, forest: Forest):
        super().__init__(condition, forest)
        self.policy = policy
        self.weights = policy.weights_above(condition)
        rows, slots = forest.start.shape
        self.length = slots
        steps = forest.steps
        device = forest.rows.device
        candidates = slots + 2 * steps
        self.candidate = torch.arange(slots, device=device).repeat(rows, 1)
        self.made = slots
        self.start = torch.zeros(rows, candidates, dtype=torch.long, device=device)
        self.end = torch.full_like(self.start, 2)
        self.left = torch.zeros_like(self.start)
        self.right = torch.zeros_like(self.start)
        self.labels = torch.zeros_like(self.start)
        self.message = forest.message.new_zeros(rows, candidates, *forest.message.shape[2:])
        self.log_scale = forest.log_scale.new_zeros(rows, candidates)
        self.seen: list[Tensor] = []
        self.prior = condition.model.tree_prior
        # What the nodes of candidates add to the prior; its states are of words, then candidates.
        self.log_prior = forest.log_scale.new_zeros(rows, candidates)
        if self.prior is not None:
            self.prior_state = self.prior.energy.word().repeat(rows, slots + candidates, 1)
        self.value = forest.log_scale.new_zeros(rows, slots + candidates)
        word = condition.potentials.log_word + condition.encoding.word_score.detach()
        self.value[:, :slots] = word[forest.sentence]
        self.label_logit = forest.message.new_zeros(rows, slots, forest.message.shape[-1])
        gap = torch.arange(slots - 1, device=device).repeat(rows)
        self._score(forest.rows.repeat_interleave(slots - 1), gap, gap)

    def _score(
        self, rows: Int[Tensor, "nodes"], gap: Int[Tensor, "nodes"], candidate: Int[Tensor, "nodes"]
    ) -> None:
        """Enter the nodes of some gaps of some rows as candidates and keep their logits."""
        forest = self.forest
        start, end = forest.start[rows, gap], forest.end[rows, gap]
        left, right = forest.left[rows, gap], forest.right[rows, gap]
        left = torch.where(left < 0, gap, self.length + self.candidate[rows, left.clamp(min=0)])
        right = torch.where(
            right < 0, gap + 1, self.length + self.candidate[rows, right.clamp(min=0)]
        )
        real = gap != forest.exit
        end = torch.where(real, end, start + 2).clamp(max=self.length)
        start = torch.minimum(start, end - 2)
        right = right.clamp(max=self.value.shape[1] - 1)
        self.start[rows, candidate], self.end[rows, candidate] = start, end
        self.left[rows, candidate], self.right[rows, candidate] = left, right
        self.message[rows, candidate] = forest.message[rows, gap]
        self.log_scale[rows, candidate] = forest.log_scale[rows, gap].clamp(min=LOG_ZERO)
        self.candidate[rows, gap] = candidate
        label = self._label_scores(rows, candidate)
        self.value[rows, self.length + candidate] = label.logsumexp(-1)
        size = (end - start - 1).to(label.dtype)
        below = self.value[rows, left] + self.value[rows, right]
        if self.prior is not None:
            left, right = self.prior_state[rows, left], self.prior_state[rows, right]
            state, log_prior = self.prior.node(left, right, forest.lengths[rows])
            self.prior_state[rows, self.length + candidate] = state
            self.log_prior[rows, candidate] = log_prior.to(label.dtype)
        below = below - self.log_prior[rows, candidate]
        self.label_logit[rows, gap] = label + (size.log() - below)[:, None]

    def _label_scores(
        self, rows: Int[Tensor, "nodes"], candidate: Int[Tensor, "nodes"]
    ) -> Float[Tensor, "nodes nonterminals"]:
        """log flow of some candidates under each label, without gradients."""
        at = rows, candidate
        start, end, message, log_scale = (
            field[at] for field in (self.start, self.end, self.message, self.log_scale)
        )
        return self._log_flow(rows, start, end, message, log_scale, self.weights).detach()

    def _log_flow(
        self,
        rows: Int[Tensor, "#*nodes"],
        start: Int[Tensor, "*nodes"],
        end: Int[Tensor, "*nodes"],
        message: Float[Tensor, "*nodes contexts nonterminals"],
        log_scale: Float[Tensor, "*nodes"],
        weights: Float[Tensor, "batch spans nonterminals"] | None,
    ) -> Float[Tensor, "*nodes nonterminals"]:
        encoding, potentials = self.condition.encoding, self.condition.potentials
        at = self.forest.sentence[rows], encoding.index[start, end]
        whole = (start == 0) & (end == self.forest.lengths[rows])
        root = potentials.root.clamp(min=1e-30).log()
        scores = torch.where(whole[..., None], root, encoding.scores[at])
        message = potentials.average(message, whole, None if weights is None else weights[at])
        return scores + message.clamp(min=1e-30).log() + log_scale[..., None]

    def logits(self, rows: Int[Tensor, "rows"] | None) -> Float[Tensor, "rows slots labels"]:
        logit = self.label_logit if rows is None else self.label_logit[rows]
        return logit if self.forest.labelled else logit.logsumexp(-1, keepdim=True)

    def merged(self, gap: Tensor, label: Tensor, before: Tensor, after: Tensor) -> None:
        rows = self.forest.rows
        self.seen.append(self.candidate.clone())
        if self.forest.labelled:
            candidate = self.candidate[rows, gap]
            self.labels[rows, candidate] = label
            chosen = self._label_scores(rows, candidate)
            self.value[rows, self.length + candidate] = chosen[rows, label]
        made = torch.full_like(gap, self.made)
        self._score(rows.repeat(2), torch.cat([before, after]), torch.cat([made, made + 1]))
        self.made += 2

    def log_forward(self, merges: Merges) -> Float[Tensor, "steps rows"]:
        forest, condition = self.forest, self.condition
        rows = forest.rows[:, None]
        label = self._log_flow(
            rows,
            self.start,
            self.end,
            self.message,
            self.log_scale,
            self.policy.weights_above(condition),
        )
        total = label.logsumexp(-1)
        value = total
        if forest.labelled:
            value = label.gather(-1, self.labels[..., None]).squeeze(-1)
        word = condition.potentials.log_word + condition.encoding.word_score
        values = torch.cat([word[forest.sentence], value], 1)
        size = (self.end - self.start - 1).to(total.dtype).log()
        logit = total + size - values.gather(1, self.left) - values.gather(1, self.right)
        logit = logit + self.log_prior
        seen = torch.stack(self.seen, 1)
        step = torch.arange(forest.steps, device=seen.device)[:, None]
        is_open = forest.exists[:, None] & (forest.time[:, None] >= step)
        is_open[..., forest.exit] = step.squeeze(1) >= forest.lengths[:, None] - 1
        # The exit is certain where it is open.
        logits = logit.gather(1, seen.flatten(1)).view(seen.shape)
        logits = torch.where(is_open, logits, -torch.inf)
        logits = torch.cat([logits[..., :-1], torch.where(is_open[..., -1:], 0.0, -torch.inf)], -1)
        chosen = logits.gather(-1, merges.gaps[..., None]).squeeze(-1)
        log_p = chosen - logits.logsumexp(-1)
        if forest.labelled:
            candidate = seen.gather(-1, merges.gaps[..., None]).squeeze(-1)
            conditional = (value - total).gather(1, candidate)
            log_p = log_p + torch.where(merges.gaps == forest.exit, 0.0, conditional)
        return log_p.t()
