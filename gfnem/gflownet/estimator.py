"""Policies as torchgfn estimators, which may be asked about any state."""

from __future__ import annotations

from typing import Any

from gfn.estimators import DiscretePolicyEstimator
from torch import nn


class PolicyEstimator(DiscretePolicyEstimator):
    """P_F or P_B at given states, for torchgfn's objectives and samplers.

    Args:
        policy: whose probabilities they are.
        condition: the batch, as the policy has encoded it; the first condition of a state is the
            row of its data point there.
        is_backward: whether it is P_B.
        actions: of the environment; 0 where they change from batch to batch.
    """

    def __init__(self, policy: Any, condition: Any, is_backward: bool, actions: int = 0):
        module: Any = nn.Identity()
        module.input_dim = 1
        super().__init__(module, n_actions=actions, is_backward=is_backward)
        # Not a submodule: the policy owns its parameters.
        self._policy = (policy,)
        self.condition = condition

    @property
    def policy(self) -> Any:
        return self._policy[0]

    @property
    def expected_output_dim(self) -> int | None:
        return self.n_actions or None
