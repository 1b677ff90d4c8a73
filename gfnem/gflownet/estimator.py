"""Policies as torchgfn estimators, which may be asked about any state."""

from __future__ import annotations

from typing import Any

from gfn.estimators import DiscretePolicyEstimator
from torch import nn


class PolicyEstimator(DiscretePolicyEstimator):
    """P_F or P_B at given states, for torchgfn's samplers and its recomputation of probabilities.

    The states' data points are rows of the batch that the policy has last seen (`condition`).

    actions: of the environment; 0 where they change from batch to batch.
    """

    def __init__(self, policy: Any, is_backward: bool, actions: int = 0):
        module: Any = nn.Identity()
        module.input_dim = 1
        super().__init__(module, n_actions=actions, is_backward=is_backward)
        # Not a submodule: the policy owns its parameters.
        self._policy = (policy,)

    @property
    def policy(self) -> Any:
        return self._policy[0]

    @property
    def condition(self) -> Any:
        """What the policy has last seen."""
        condition = self.policy.last_condition
        assert condition is not None, "the policy has seen no batch yet"
        return condition

    @property
    def expected_output_dim(self) -> int | None:
        return self.n_actions or None
