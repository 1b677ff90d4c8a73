"""Objectives of the E-step, for many data points at once.

An objective takes what policy and model say of `samples` trajectories of each data point, so no
network is evaluated a second time, and each data point has a normaliser of its own. torchgfn's own
objectives take `policy.trajectories(...)` and `policy.estimators(...)` as they are.

The balances (tb, subtb, db, fl_db, vargrad) hold for every trajectory at the optimum, so they may
learn from any of them, off-policy too. reverse_kl and forward_kl are expectations over draws of
P_F: they would need the probabilities with which trajectories were drawn, and refuse others. sleep
draws from the model and asks for no trajectories of x at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gfnem.errors import UserError
from gfnem.gflownet.losses import Loss, make_loss
from gfnem.gflownet.paths import Scores


class Objective(ABC):
    """What an E-step minimises, a number of given trajectories.

    Attributes:
        name: of the objective in messages.
        least_samples: trajectories that it needs of each data point.
        off_policy: whether they may be drawn from something else than P_F.
    """

    name: str
    least_samples = 1
    off_policy = True

    @abstractmethod
    def __call__(self, paths: Scores) -> Float[Tensor, ""]:
        """Return the mean loss of the trajectories."""


class Balance(Objective):
    """A balance that each trajectory, or each part of it, keeps at the optimum.

    Args:
        loss: of the residual, the logarithm of a ratio; see `gfnem.gflownet.losses`.
        alpha: of loss="linex"; 1 for the forward KL, -1 for chi^2(P_F || p), on-policy.
    """

    def __init__(self, loss: Loss = "squared", alpha: float = 1.0):
        self.loss = make_loss(loss, alpha)


class VarGrad(Balance):
    """Log-variance objective (arXiv 2302.05446), grouped by data point.

    log Z(x) is estimated by the mean of log p(x, z) + log P_B - log P_F over the trajectories of
    the same x. It needs at least two of each data point; four are better.

    Args:
        loss: of the residual log P_F - log P_B - log p(x, z), less its mean.
        alpha: as for `Balance`.
    """

    name = "vargrad"
    least_samples = 2

    def __call__(self, paths: Scores) -> Float[Tensor, ""]:
        residual = -paths.log_weights
        return self.loss(residual - residual.mean(1, keepdim=True)).mean()


class TrajectoryBalance(Balance):
    """Trajectory balance (arXiv 2201.13259); learns log Z(x), the log flow of the initial state.

    Args:
        loss: of the residual log Z + log P_F - log P_B - log p(x, z).
        alpha: as for `Balance`.
    """

    name = "tb"

    def __call__(self, paths: Scores) -> Float[Tensor, ""]:
        log_z = paths.log_flows(forward_looking=True)[0]
        return self.loss(log_z - paths.log_weights).mean()


class SubTrajectoryBalance(Balance):
    """SubTB(lambda) (arXiv 2209.12782), forward-looking (arXiv 2302.01687) by default.

    Learns the log flow of every state.

    Args:
        lamda: weight of a sub-trajectory of n steps is lamda^n, normalised in each trajectory.
        forward_looking: whether flows have the part of log p(x, z) that is fixed beside them.
        loss: of each sub-trajectory's residual.
        alpha: as for `Balance`.
    """

    name = "subtb"

    def __init__(
        self,
        lamda: float = 0.9,
        forward_looking: bool = True,
        loss: Loss = "squared",
        alpha: float = 1.0,
    ):
        super().__init__(loss, alpha)
        self.lamda = lamda
        self.forward_looking = forward_looking

    def __call__(self, paths: Scores) -> Float[Tensor, ""]:
        flow = _flows_and_end(paths, self.forward_looking)
        log_ratio = (paths.log_forward - paths.log_backward).cumsum(0)
        log_ratio = torch.cat([torch.zeros_like(log_ratio[:1]), log_ratio])
        # The residual of the sub-trajectory from state i to state j is value[i] - value[j].
        state = torch.arange(len(flow), device=flow.device)
        exists = state[:, None] <= paths.exits + 1
        value = torch.where(exists[..., None], flow - log_ratio, 0.0)
        steps = state - state[:, None]
        is_part = (steps > 0)[..., None] & exists
        weight = is_part * (self.lamda ** steps.clamp(min=0).to(flow.dtype))[..., None]
        weight = weight / weight.sum((0, 1))
        return (weight[..., None] * self.loss(value[:, None] - value)).sum((0, 1)).mean()


class DetailedBalance(Balance):
    """Detailed balance (arXiv 2111.09266) of every transition, exits included.

    Learns the log flow of every state, or with `forward_looking` (arXiv 2302.01687) what it is
    beside the part of log p(x, z) that is fixed there.

    Args:
        forward_looking: whether flows have the part of log p(x, z) that is fixed beside them.
        loss: of each transition's residual.
        alpha: as for `Balance`.
    """

    def __init__(self, forward_looking: bool = False, loss: Loss = "squared", alpha: float = 1.0):
        super().__init__(loss, alpha)
        self.forward_looking = forward_looking
        self.name = "fl_db" if forward_looking else "db"

    def __call__(self, paths: Scores) -> Float[Tensor, ""]:
        flow = _flows_and_end(paths, self.forward_looking)
        residual = flow[:-1] + paths.log_forward - flow[1:] - paths.log_backward
        # Losses are 0 at 0.
        loss = self.loss(torch.where(paths.is_action, residual, 0.0))
        return loss.sum() / (paths.is_action.sum() * loss.shape[-1])


class ReverseKL(Objective):
    """KL(P_F || p(z | x) P_B), hierarchical variational inference (arXiv 2210.00580).

    P_F learns by the score function, with the mean over the other trajectories of the same x as
    baseline (arXiv 1602.06725), a learned P_B by its own gradient. The loss is the divergence up
    to log p(x): the mean of log P_F - log P_B - log p(x, z), in nats. It may be as low as
    -log p(x). It needs at least two trajectories of each data point, drawn from P_F itself.
    """

    name = "reverse_kl"
    least_samples = 2
    off_policy = False

    def __call__(self, paths: Scores) -> Float[Tensor, ""]:
        score = -paths.log_weights.detach()
        others = (score.sum(1, keepdim=True) - score) / (score.shape[1] - 1)
        slope = (score - others) * paths.log_forward.sum(0) - paths.log_backward.sum(0)
        return (score + slope - slope.detach()).mean()


class ForwardKL(Objective):
    """KL(p(z | x) P_B || P_F), the wake phase for q of reweighted wake-sleep (arXiv 1406.2751).

    -log P_F of the trajectories of each x, weighted by w = p(x, z) P_B / P_F, normalised to sum to
    1 over them: its bias goes with the number of trajectories. Nothing of it teaches P_B. It needs
    at least two trajectories of each data point, drawn from P_F itself.
    """

    name = "forward_kl"
    least_samples = 2
    off_policy = False

    def __call__(self, paths: Scores) -> Float[Tensor, ""]:
        weights = paths.log_weights.detach().softmax(1)
        return -(weights * paths.log_forward.sum(0)).sum(1).mean()


@dataclass(frozen=True)
class WeightedSum:
    """A weighted sum of objectives.

    Attributes:
        wake: objectives of trajectories of x, with their weights.
        sleep: weight of the sleep phase.
    """

    wake: tuple[tuple[Objective, float], ...]
    sleep: float = 0.0

    @staticmethod
    def of(objective: Objective | WeightedSum) -> WeightedSum:
        """Return any objective as a sum."""
        return objective if isinstance(objective, WeightedSum) else WeightedSum(((objective, 1.0),))

    def __call__(self, paths: Scores) -> Float[Tensor, ""]:
        """Return the mean loss of the trajectories; the sleep phase asks for others."""
        loss = paths.log_joint.new_zeros(())
        for objective, weight in self.wake:
            loss = loss + weight * objective(paths)
        return loss


def sleep() -> WeightedSum:
    """Make the sleep phase alone (arXiv 1406.2751): KL(p(z | x) P_B || P_F) for x of the model.

    Latents and data are drawn from p(x, z), trajectories to them from P_B, and -log P_F of these is
    minimised. Neither data nor rewards are asked for, and nothing of it teaches P_B.
    """
    return WeightedSum((), sleep=1.0)


def weighted_sum(
    parts: Mapping[str, Objective | WeightedSum], weights: Mapping[str, float]
) -> WeightedSum:
    """Add several objectives on the same trajectories, and the sleep phase where it is one of them.

    Args:
        parts: objectives by names of any kind.
        weights: of each part, by the same names.

    Raises:
        UserError: the names are not the same, or a weight is not positive.
    """
    if not parts or parts.keys() != weights.keys():
        raise UserError(
            f"objective.parts has {_listed(parts)} and objective.weights {_listed(weights)}: give "
            "each part a weight"
        )
    wake: list[tuple[Objective, float]] = []
    asleep = 0.0
    for name, part in parts.items():
        weight = weights[name]
        if not (isinstance(weight, (int, float)) and weight > 0):
            raise UserError(f"objective.weights.{name} is {weight}; it must be a positive number")
        one = WeightedSum.of(part)
        wake += [(objective, weight * inner) for objective, inner in one.wake]
        asleep += weight * one.sleep
    return WeightedSum(tuple(wake), asleep)


def _flows_and_end(paths: Scores, forward_looking: bool) -> Float[Tensor, "states batch samples"]:
    """Log flows of the states before each action, and behind the exit log p(x, z)."""
    flow = paths.log_flows(forward_looking)
    flow = torch.cat([flow, paths.log_joint[None]])
    behind_exit = torch.nn.functional.pad(paths.is_exit, (0, 0, 0, 0, 1, 0))
    return torch.where(behind_exit, paths.log_joint, flow)


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names) or "nothing"
