"""A policy over forests as torchgfn estimators, which may be asked about any state.

Training does not need them: trajectories bring their scores along. They open the policy to
torchgfn's samplers and to its recomputation of log-probabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from gfn.states import DiscreteStates
from jaxtyping import Float
from torch import Tensor

from gfnem.gflownet.estimator import PolicyEstimator
from gfnem.tasks.grammar.env import LATER, Forest

if TYPE_CHECKING:
    from gfnem.tasks.grammar.policy import ForestPolicy


class ForestEstimator(PolicyEstimator):
    """P_F or P_B at given states of a `ForestEnv`, by rebuilding each state's forest.

    The states' sentences are rows of the batch that the policy has last seen (`condition`).
    """

    def forward(
        self, states: DiscreteStates, conditions: Float[Tensor, "*batch 2"]
    ) -> Float[Tensor, "*batch actions"]:
        policy: ForestPolicy = self.policy
        shape = states.batch_shape
        sentence = conditions[..., 0].long().flatten()
        condition = self.condition.select(sentence)
        fields = states.tensor.reshape(len(sentence), -1, 3)
        start, end, label = fields.unbind(-1)
        made = start >= 0
        if self.is_backward:
            logit = policy.backward_logit(condition, start.clamp(min=0), end.clamp(min=2), 1)
            return logit.repeat_interleave(policy.symbols, -1).view(*shape, -1)
        forest = Forest(condition.potentials, 1, policy.labelled)
        scores = policy.scores(condition, forest)
        order = torch.where(made, end - start, LATER).argsort(dim=-1, stable=True)
        count = made.sum(-1)
        for step in range(int(count.max())):
            inside = step < count
            gap = torch.where(inside, order[:, step], forest.exit)
            chosen = label.gather(1, order[:, step : step + 1]).squeeze(1)
            chosen = torch.where(inside, chosen, 0)
            before, after = forest.merge(gap, chosen if policy.labelled else None)
            scores.merged(gap, chosen, before, after)
        logits = scores.logits(None)
        merges, exit_logit = logits[:, :-1].flatten(1), torch.zeros_like(logits[:, 0, :1])
        return torch.cat([merges, exit_logit], -1).view(*shape, -1)
