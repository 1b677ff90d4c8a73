"""The chart policy as torchgfn estimators, which may be asked about any state.

Training does not need them: trajectories bring their scores along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from gfn.states import DiscreteStates
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.gflownet.estimator import PolicyEstimator

if TYPE_CHECKING:
    from gfnem.tasks.grammar.chart import ChartPolicy, Spans


class ChartEstimator(PolicyEstimator):
    """P_F or P_B of labelled trees at given states.

    The states' sentences are rows of the batch that the policy has last seen (`condition`).
    """

    def forward(
        self, states: DiscreteStates, conditions: Float[Tensor, "*batch 1"]
    ) -> Float[Tensor, "*batch actions"]:
        policy: ChartPolicy = self.policy
        condition = self.condition
        shape, actions = states.batch_shape, states.n_actions
        if self.is_backward:
            return conditions.new_zeros(*shape, actions - 1)
        sentence = conditions[..., 0].long().flatten()
        choices = states.tensor.reshape(len(sentence), -1)
        spans = self._next(choices, sentence, condition.lengths)
        logits = condition.potentials.root.new_full((len(sentence), actions), -torch.inf)
        # Where there is nothing to choose: two words, or behind a shorter sentence's nodes.
        logits[:, 0] = logits[:, -1] = 0.0
        begins = choices[:, 0] < 0
        logits[begins, : policy.nonterminals] = condition.root_logits()[sentence[begins]]
        wide = (~begins & (spans.width > 2)).nonzero().squeeze(1)
        if len(wide):
            open_ = type(spans)(*(field[wide] for field in spans))
            joint = condition.splits(open_).joint(open_.width).log()
            logits[wide, : joint.shape[1]] = joint
        return logits.view(*shape, actions)

    def _next(self, choices: Int[Tensor, "rows steps"], sentence: Tensor, lengths: Tensor) -> Spans:
        """The span that is split next: the widest, of those the leftmost; one word for none."""
        from gfnem.tasks.grammar.chart import Spans

        policy: ChartPolicy = self.policy
        steps = choices.shape[1]
        row = torch.arange(len(choices), device=choices.device)
        width = choices.new_zeros(len(row), steps)
        label, context = torch.zeros_like(width), torch.full_like(width, policy.nonterminals)
        width[:, 0], label[:, 0] = lengths[sentence], choices[:, 0].clamp(min=0)
        for step in range(1, steps):
            start = width.argmax(-1)
            split, left, right = policy.decoded(choices[:, step].clamp(min=0))
            made = (choices[:, step] >= 0) & (width[row, start] > 1)
            at, begin, size = row[made], start[made], split[made]
            middle, own = begin + size, label[at, begin]
            width[at, middle] = width[at, begin] - size
            width[at, begin] = size
            label[at, begin], label[at, middle] = left[made], right[made]
            context[at, begin] = context[at, middle] = own
        start = width.argmax(-1)
        at = row, start
        return Spans(sentence, start, width[at], label[at], context[at])
