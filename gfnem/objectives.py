"""torchgfn's objectives, ready for conditional use.

Every objective here takes trajectories that carry what their policy already knows about them, so
no network is evaluated a second time, and knows that each data point has a normaliser of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gfn.containers import Trajectories
from gfn.env import Env
from gfn.estimators import Estimator, ScalarEstimator
from gfn.gflownet import (
    LogPartitionVarianceGFlowNet,
    PFBasedGFlowNet,
    SubTBGFlowNet,
    TBGFlowNet,
)
from gfn.gflownet.base import TrajectoryBasedGFlowNet, loss_reduce
from jaxtyping import Float
from torch import Tensor, nn


class ScoredTrajectories(Trajectories):
    """torchgfn trajectories with all that an objective asks of policies and of the model.

    log_probs: log P_F of each action, differentiable; [steps, batch].
    log_pb: log P_B of each action, differentiable where P_B is learned; [steps, batch].
    flows: gives the learned part of the log flow of each state that an action leaves, and the part
        of log p(x, z) already fixed there; both [steps, batch]. The complete state, left by the
        exit action, has flow p(x, z), so there the learned part is 0.
    """

    def __init__(
        self,
        *args: Any,
        log_pb: Float[Tensor, "steps batch"],
        flows: Callable[[], tuple[Float[Tensor, "steps batch"], Float[Tensor, "steps batch"]]],
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.log_pb = log_pb
        self.flows = flows


class _Scored(TrajectoryBasedGFlowNet):
    """Takes log P_F and log P_B from the trajectories."""

    def get_pfs_and_pbs(
        self, trajectories: Trajectories, recalculate_all_logprobs: bool = False
    ) -> tuple[Tensor, Tensor]:
        if recalculate_all_logprobs or not isinstance(trajectories, ScoredTrajectories):
            return super().get_pfs_and_pbs(trajectories, recalculate_all_logprobs)
        assert trajectories.log_probs is not None
        return trajectories.log_probs, trajectories.log_pb


class VarGrad(_Scored, LogPartitionVarianceGFlowNet):
    """Log-variance objective (arXiv 2302.05446), grouped by data point.

    log Z(x) is estimated by the mean of log p(x, z) + log P_B - log P_F over the trajectories of
    the same x. torchgfn's own objective takes one mean over all conditions, which is wrong when
    they are mixed in a batch.
    """

    def loss(
        self,
        env: Env,
        trajectories: Trajectories,
        recalculate_all_logprobs: bool = False,
        reduction: str = "mean",
        *,
        log_rewards: Tensor | None = None,
    ) -> Tensor:
        scores = self.get_scores(trajectories, recalculate_all_logprobs, log_rewards=log_rewards)
        conditions = trajectories.states.conditions
        assert conditions is not None
        _, group = conditions[0, :, 0].unique(return_inverse=True)
        count = torch.bincount(group).to(scores.dtype)
        mean = torch.zeros_like(count).index_add(0, group, scores) / count
        return loss_reduce(self.loss_fn(scores - mean[group]), reduction)


class TrajectoryBalance(_Scored, TBGFlowNet):
    """Trajectory balance (arXiv 2201.13259) with a conditional log Z(x).

    log Z(x) is the log flow of the initial state.
    """

    def loss(
        self,
        env: Env,
        trajectories: Trajectories,
        recalculate_all_logprobs: bool = False,
        reduction: str = "mean",
        *,
        log_rewards: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(trajectories, ScoredTrajectories)
        scores = self.get_scores(trajectories, recalculate_all_logprobs, log_rewards=log_rewards)
        learned, partial = trajectories.flows()
        return loss_reduce(self.loss_fn(scores + learned[0] + partial[0]), reduction)


class SubTrajectoryBalance(_Scored, SubTBGFlowNet):
    """SubTB(lambda) (arXiv 2209.12782), forward-looking (arXiv 2302.01687) by default."""

    def calculate_log_state_flows(
        self, env: Env, trajectories: Trajectories, log_pf_trajectories: Tensor
    ) -> Tensor:
        assert isinstance(trajectories, ScoredTrajectories)
        flow, partial = trajectories.flows()
        if not self.forward_looking:
            partial = torch.where(trajectories.actions.is_exit, partial, 0.0)
        return torch.where(trajectories.actions.is_dummy, -torch.inf, flow + partial)


def _flows_travel_with_trajectories() -> ScalarEstimator:
    """Stands where torchgfn asks for a flow estimator; nothing ever calls it."""
    module: Any = nn.Identity()
    module.input_dim = 1
    return ScalarEstimator(module)


Objective = Callable[[Estimator, Estimator], PFBasedGFlowNet]


def vargrad(pf: Estimator, pb: Estimator) -> VarGrad:
    """Needs at least two trajectories of each data point; four are better."""
    return VarGrad(pf=pf, pb=pb)


def tb(pf: Estimator, pb: Estimator) -> TrajectoryBalance:
    """Learns log Z(x)."""
    return TrajectoryBalance(pf=pf, pb=pb)


def subtb(
    pf: Estimator, pb: Estimator, lamda: float = 0.9, forward_looking: bool = True
) -> SubTrajectoryBalance:
    """Learns the log flow of every state.

    lamda: weight of a sub-trajectory of n steps is lamda^n, normalised within each trajectory.
    """
    return SubTrajectoryBalance(
        pf=pf,
        pb=pb,
        logF=_flows_travel_with_trajectories(),
        weighting="geometric_within",
        lamda=lamda,
        forward_looking=forward_looking,
    )
