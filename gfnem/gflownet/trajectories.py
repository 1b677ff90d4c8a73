"""torchgfn's trajectories with what policies and the model have said of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from gfn.containers import Trajectories
from jaxtyping import Float, Int
from torch import Tensor


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

    def log_flows(self, forward_looking: bool) -> Float[Tensor, "steps batch"]:
        """Log flow of each state that an action leaves.

        forward_looking: add what is fixed of log p(x, z) (arXiv 2302.01687); otherwise only the
            complete state's is.
        """
        learned, partial = self.flows()
        if not forward_looking:
            partial = torch.where(self.actions.is_exit, partial, 0.0)
        return learned + partial

    @staticmethod
    def join(parts: Sequence[ScoredTrajectories]) -> ScoredTrajectories:
        """All trajectories of several groups, of the same data points and equally many steps."""
        first = parts[0]
        if len(parts) == 1:
            return first

        def beside(tensors: Iterable[Tensor | None]) -> Tensor:
            found = [tensor for tensor in tensors if tensor is not None]
            assert len(found) == len(parts)
            return torch.cat(found, 1)

        def flows() -> tuple[Tensor, Tensor]:
            learned, partial = zip(*(part.flows() for part in parts), strict=True)
            return beside(learned), beside(partial)

        env: Any = first.env
        return ScoredTrajectories(
            env=env,
            states=env.States(
                beside(part.states.tensor for part in parts),
                conditions=beside(part.states.conditions for part in parts),
            ),
            actions=env.actions_from_tensor(beside(part.actions.tensor for part in parts)),
            terminating_idx=torch.cat([part.terminating_idx for part in parts]),
            log_rewards=torch.cat([_given(part.log_rewards) for part in parts]),
            log_probs=beside(part.log_probs for part in parts),
            log_pb=beside(part.log_pb for part in parts),
            flows=flows,
        )

    def data_points(self) -> tuple[Int[Tensor, "batch"], Float[Tensor, "points"]]:
        """The data point of each trajectory, and how many trajectories each data point has."""
        conditions = self.states.conditions
        assert conditions is not None and self.log_probs is not None
        _, point = conditions[0, :, 0].unique(return_inverse=True)
        return point, torch.bincount(point).to(self.log_probs.dtype)


def _given(values: Tensor | None) -> Tensor:
    assert values is not None
    return values
