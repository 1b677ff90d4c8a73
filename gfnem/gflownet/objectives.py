"""Objectives of the E-step: torchgfn's, ready for conditional use, and its neighbours.

Every objective here takes trajectories that carry what their policy already knows about them, so
no network is evaluated a second time, and knows that each data point has a normaliser of its own.

The balances (tb, subtb, db, fl_db, vargrad) hold for every trajectory at the optimum, so they may
learn from any of them, off-policy too. reverse_kl and forward_kl are expectations over draws of
P_F: they would need the probabilities with which trajectories were drawn, and refuse others. sleep
draws from the model and asks for no trajectories of x at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gfn.containers import Trajectories
from gfn.env import Env
from gfn.estimators import Estimator, ScalarEstimator
from gfn.gflownet import (
    DBGFlowNet,
    LogPartitionVarianceGFlowNet,
    SubTBGFlowNet,
    TBGFlowNet,
)
from gfn.gflownet.base import TrajectoryBasedGFlowNet, loss_reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.errors import UserError
from gfnem.gflownet.losses import Loss, make_loss
from gfnem.gflownet.trajectories import ScoredTrajectories


class ScoredObjective(TrajectoryBasedGFlowNet):
    """An objective that takes log P_F and log P_B from the trajectories.

    name: of the objective in messages.
    least_samples: trajectories that it needs of each data point.
    off_policy: whether they may be drawn from something else than P_F.
    """

    name: str
    least_samples = 1
    off_policy = True

    def get_pfs_and_pbs(
        self, trajectories: Trajectories, recalculate_all_logprobs: bool = False
    ) -> tuple[Tensor, Tensor]:
        if recalculate_all_logprobs or not isinstance(trajectories, ScoredTrajectories):
            return super().get_pfs_and_pbs(trajectories, recalculate_all_logprobs)
        assert trajectories.log_probs is not None
        return trajectories.log_probs, trajectories.log_pb


class VarGrad(ScoredObjective, LogPartitionVarianceGFlowNet):
    """Log-variance objective (arXiv 2302.05446), grouped by data point.

    log Z(x) is estimated by the mean of log p(x, z) + log P_B - log P_F over the trajectories of
    the same x. torchgfn's own objective takes one mean over all conditions, which is wrong when
    they are mixed in a batch.
    """

    name = "vargrad"
    least_samples = 2

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
        point, count = trajectories.data_points()
        mean = _total(scores, point, count) / count
        return loss_reduce(self.loss_fn(scores - mean[point]), reduction)


class TrajectoryBalance(ScoredObjective, TBGFlowNet):
    """Trajectory balance (arXiv 2201.13259) with a conditional log Z(x).

    log Z(x) is the log flow of the initial state.
    """

    name = "tb"

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
        log_z = trajectories.log_flows(forward_looking=True)[0]
        return loss_reduce(self.loss_fn(scores + log_z), reduction)


class SubTrajectoryBalance(ScoredObjective, SubTBGFlowNet):
    """SubTB(lambda) (arXiv 2209.12782), forward-looking (arXiv 2302.01687) by default."""

    name = "subtb"

    def calculate_log_state_flows(
        self, env: Env, trajectories: Trajectories, log_pf_trajectories: Tensor
    ) -> Tensor:
        assert isinstance(trajectories, ScoredTrajectories)
        flows = trajectories.log_flows(self.forward_looking)
        return torch.where(trajectories.actions.is_dummy, -torch.inf, flows)

    def calculate_masks(
        self, log_state_flows: Tensor, trajectories: Trajectories
    ) -> tuple[Tensor, Tensor]:
        # torchgfn takes each state of flow 0 for the sink: others have it where p(x, z) is 0.
        return trajectories.actions.is_dummy, trajectories.actions.is_exit


# torchgfn's is typed as one of transitions; this one learns from trajectories.
class DetailedBalance(ScoredObjective, DBGFlowNet):  # type: ignore[misc]
    """Detailed balance (arXiv 2111.09266) of every transition, exits included.

    torchgfn's own sorts trajectories into transitions first, and with `forward_looking` it neither
    accepts given rewards nor does without an environment that knows those of partial states.
    """

    name = "db"

    def get_scores(
        self,
        env: Env,
        trajectories: Trajectories,
        recalculate_all_logprobs: bool = False,
        *,
        log_rewards: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(trajectories, ScoredTrajectories)
        log_pf, log_pb = self.get_pfs_and_pbs(trajectories, recalculate_all_logprobs)
        actions = trajectories.actions
        before = trajectories.log_flows(self.forward_looking)
        end = trajectories.log_rewards if log_rewards is None else log_rewards
        assert end is not None
        after = torch.where(actions.is_exit, end, before.roll(-1, 0))
        return (before + log_pf - after - log_pb)[~actions.is_dummy]


class ReverseKL(ScoredObjective):
    """KL(P_F || p(z | x) P_B), hierarchical variational inference (arXiv 2210.00580).

    P_F learns by the score function, with the mean over the other trajectories of the same x as
    baseline (arXiv 1602.06725), a learned P_B by its own gradient. The loss is the divergence up
    to log p(x): the mean of log P_F - log P_B - log p(x, z), in nats. It may be as low as
    -log p(x).
    """

    name = "reverse_kl"
    least_samples = 2
    off_policy = False

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
        scores = scores.detach()
        log_pf, log_pb = self.get_pfs_and_pbs(trajectories, recalculate_all_logprobs)
        point, count = trajectories.data_points()
        others = (_total(scores, point, count)[point] - scores) / (count[point] - 1)
        slope = (scores - others) * log_pf.sum(0) - log_pb.sum(0)
        return loss_reduce(scores + slope - slope.detach(), reduction)


class ForwardKL(ScoredObjective):
    """KL(p(z | x) P_B || P_F), the wake phase for q of reweighted wake-sleep (arXiv 1406.2751).

    -log P_F of the trajectories of each x, weighted by w = p(x, z) P_B / P_F, normalised to sum to
    1 over them: its bias goes with the number of trajectories. Nothing of it teaches P_B.
    """

    name = "forward_kl"
    least_samples = 2
    off_policy = False

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
        log_pf, _ = self.get_pfs_and_pbs(trajectories, recalculate_all_logprobs)
        point, count = trajectories.data_points()
        log_weights = -scores.detach()
        largest = torch.full_like(count, -torch.inf).scatter_reduce(0, point, log_weights, "amax")
        weights = (log_weights - largest[point]).exp()
        weights = weights * (count / _total(weights, point, count))[point]
        return loss_reduce(-weights * log_pf.sum(0), reduction)


@dataclass(frozen=True)
class WeightedSum:
    """A weighted sum of objectives.

    wake: objectives of trajectories of x, with their weights.
    sleep: weight of the sleep phase.
    """

    wake: tuple[tuple[ScoredObjective, float], ...]
    sleep: float = 0.0

    @staticmethod
    def of(objective: ScoredObjective | WeightedSum) -> WeightedSum:
        """Any objective as a sum."""
        return objective if isinstance(objective, WeightedSum) else WeightedSum(((objective, 1.0),))


Objective = Callable[[Estimator, Estimator], ScoredObjective | WeightedSum]


def vargrad(pf: Estimator, pb: Estimator, loss: Loss = "squared", alpha: float = 1.0) -> VarGrad:
    """Needs at least two trajectories of each data point; four are better.

    loss: of the residual log P_F - log P_B - log p(x, z), less its mean; see `losses.py`.
    alpha: of loss="linex"; 1 for the forward KL, -1 for chi^2(P_F || p), on-policy.
    """
    return VarGrad(pf=pf, pb=pb, loss_fn=make_loss(loss, alpha))


def tb(
    pf: Estimator, pb: Estimator, loss: Loss = "squared", alpha: float = 1.0
) -> TrajectoryBalance:
    """Learns log Z(x).

    loss: of the residual log Z + log P_F - log P_B - log p(x, z); see `gfnem.gflownet.losses`.
    alpha: of loss="linex"; 1 for the forward KL, -1 for chi^2(P_F || p), on-policy.
    """
    return TrajectoryBalance(pf=pf, pb=pb, loss_fn=make_loss(loss, alpha))


def subtb(
    pf: Estimator,
    pb: Estimator,
    lamda: float = 0.9,
    forward_looking: bool = True,
    loss: Loss = "squared",
    alpha: float = 1.0,
) -> SubTrajectoryBalance:
    """Learns the log flow of every state.

    lamda: weight of a sub-trajectory of n steps is lamda^n, normalised within each trajectory.
    loss: of each sub-trajectory's residual; see `gfnem.gflownet.losses`.
    alpha: of loss="linex".
    """
    return SubTrajectoryBalance(
        pf=pf,
        pb=pb,
        logF=_flows_travel_with_trajectories(),
        weighting="geometric_within",
        lamda=lamda,
        forward_looking=forward_looking,
        loss_fn=make_loss(loss, alpha),
    )


def db(pf: Estimator, pb: Estimator, loss: Loss = "squared", alpha: float = 1.0) -> DetailedBalance:
    """Detailed balance; learns the log flow of every state.

    loss: of each transition's residual; see `gfnem.gflownet.losses`.
    alpha: of loss="linex".
    """
    return _detailed_balance(pf, pb, False, loss, alpha)


def fl_db(
    pf: Estimator, pb: Estimator, loss: Loss = "squared", alpha: float = 1.0
) -> DetailedBalance:
    """Forward-looking detailed balance (arXiv 2302.01687).

    Learns what the log flow of every state is beside the part of log p(x, z) that is fixed there.

    loss: of each transition's residual; see `gfnem.gflownet.losses`.
    alpha: of loss="linex".
    """
    return _detailed_balance(pf, pb, True, loss, alpha)


def reverse_kl(pf: Estimator, pb: Estimator) -> ReverseKL:
    """Needs at least two trajectories of each data point, drawn from P_F itself."""
    return ReverseKL(pf=pf, pb=pb)


def forward_kl(pf: Estimator, pb: Estimator) -> ForwardKL:
    """Needs at least two trajectories of each data point, drawn from P_F itself."""
    return ForwardKL(pf=pf, pb=pb)


def sleep(pf: Estimator, pb: Estimator) -> WeightedSum:
    """The sleep phase alone (arXiv 1406.2751): KL(p(z | x) P_B || P_F) for x of the model's own.

    Latents and data are drawn from p(x, z), trajectories to them from P_B, and -log P_F of these is
    minimised. Neither data nor rewards are asked for, and nothing of it teaches P_B.
    """
    return WeightedSum((), sleep=1.0)


def weighted_sum(
    pf: Estimator, pb: Estimator, parts: Mapping[str, Objective], weights: Mapping[str, float]
) -> WeightedSum:
    """Several objectives on the same trajectories, and the sleep phase where it is one of them.

    parts: objectives by names of any kind.
    weights: of each part, by the same names.

    Raises UserError for names that are not the same and weights that are not positive.
    """
    if not parts or parts.keys() != weights.keys():
        raise UserError(
            f"objective.parts has {_listed(parts)} and objective.weights {_listed(weights)}: give "
            "each part a weight"
        )
    wake: list[tuple[ScoredObjective, float]] = []
    asleep = 0.0
    for name, part in parts.items():
        weight = weights[name]
        if not (isinstance(weight, (int, float)) and weight > 0):
            raise UserError(f"objective.weights.{name} is {weight}; it must be a positive number")
        one = WeightedSum.of(part(pf, pb))
        wake += [(objective, weight * inner) for objective, inner in one.wake]
        asleep += weight * one.sleep
    return WeightedSum(tuple(wake), asleep)


def _detailed_balance(
    pf: Estimator, pb: Estimator, forward_looking: bool, loss: Loss, alpha: float
) -> DetailedBalance:
    return DetailedBalance(
        pf=pf,
        pb=pb,
        logF=_flows_travel_with_trajectories(),
        forward_looking=forward_looking,
        loss_fn=make_loss(loss, alpha),
    )


def _flows_travel_with_trajectories() -> ScalarEstimator:
    """Stands where torchgfn asks for a flow estimator; nothing ever calls it."""
    module: Any = nn.Identity()
    module.input_dim = 1
    return ScalarEstimator(module)


def _total(
    values: Float[Tensor, "batch"], point: Int[Tensor, "batch"], count: Float[Tensor, "points"]
) -> Float[Tensor, "points"]:
    """Sums over the trajectories of each data point."""
    return torch.zeros_like(count).index_add(0, point, values)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "nothing"
