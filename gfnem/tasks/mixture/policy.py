"""q(z | x) of a mixture: a supercluster given the point, then a petal given both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gfn.states import DiscreteStates
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.categorical import sample_categorical
from gfnem.errors import UserError
from gfnem.gflownet.estimator import PolicyEstimator
from gfnem.gflownet.policy import Behaviour
from gfnem.gflownet.sequence import SequencePolicy
from gfnem.latents import LatentTable
from gfnem.tasks.mixture.components import Components
from gfnem.tasks.mixture.data import PointData, Points
from gfnem.tasks.mixture.env import MixtureEnv
from gfnem.tasks.mixture.model import HierarchicalMixture


@dataclass(frozen=True)
class MixtureCondition:
    """A batch of points as the policy sees it: one pass of its network says all there is.

    supercluster: logits from the initial state.
    petal: logits from the states behind each supercluster.
    flow: learned part of the log flow of the initial state and of those states.
    """

    x: Points
    model: HierarchicalMixture
    supercluster: Float[Tensor, "batch superclusters"]
    petal: Float[Tensor, "batch superclusters petals"]
    flow: Float[Tensor, "batch states"]


class MixturePolicy(SequencePolicy):
    """q(i | x) q(j | i, x), from a network that sees the standardised point alone.

    data: whose training points say how to standardise.
    superclusters, petals: of the model.
    width: of the network's two hidden layers.
    """

    center: Float[Tensor, "dimensions"]
    spread: Float[Tensor, ""]

    def __init__(self, data: PointData, superclusters: int = 4, petals: int = 4, width: int = 64):
        super().__init__(steps=2)
        if width < 1:
            raise UserError(f"policy.width is {width}; it must be at least 1")
        self.superclusters = superclusters
        self.petals = petals
        self.register_buffer("center", data.center)
        # Points that are all the same need no scale.
        self.register_buffer("spread", torch.where(data.spread > 0, data.spread, 1.0))
        self.network = nn.Sequential(
            nn.Linear(len(data.center), width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.supercluster = nn.Linear(width, superclusters)
        self.petal = nn.Linear(width, superclusters * petals)
        self.flow = nn.Linear(width, 1 + superclusters)

    def condition(self, model: HierarchicalMixture, x: Points) -> MixtureCondition:
        hidden = self.network((x.values - self.center) / self.spread)
        return MixtureCondition(
            x,
            model,
            self.supercluster(hidden),
            self.petal(hidden).unflatten(1, (self.superclusters, self.petals)),
            self.flow(hidden),
        )

    def make_env(self, device: torch.device) -> MixtureEnv:
        return MixtureEnv(self.superclusters, self.petals, device)

    def actions(self, choices: Int[Tensor, "rows 2"]) -> Int[Tensor, "rows 2"]:
        supercluster, petal = choices.unbind(-1)
        return torch.stack([supercluster, self.superclusters + petal], -1)

    def latents(self, index: Int[Tensor, "batch samples 2"]) -> Components:
        return Components(index)

    @torch.no_grad()
    def _draw(
        self,
        condition: MixtureCondition,
        samples: int,
        behaviour: Behaviour,
        kept: Int[Tensor, "batch samples before"] | None = None,
    ) -> Int[Tensor, "batch samples 2"]:
        if kept is not None and kept.shape[-1]:
            supercluster = kept[..., 0]
        else:
            weights = behaviour.probabilities(condition.supercluster)
            supercluster = sample_categorical(weights[:, None].expand(-1, samples, -1))
        weights = behaviour.probabilities(condition.petal)
        petal = sample_categorical(_rows(weights, supercluster))
        return torch.stack([supercluster, petal], -1)

    def _log_probabilities(
        self,
        condition: MixtureCondition,
        index: Int[Tensor, "batch samples 2"],
        temperature: float = 1.0,
    ) -> Float[Tensor, "batch samples 2"]:
        supercluster, petal = index.unbind(-1)
        first = (condition.supercluster / temperature).log_softmax(-1).gather(1, supercluster)
        second = (condition.petal / temperature).log_softmax(-1).flatten(1)
        return torch.stack([first, second.gather(1, supercluster * self.petals + petal)], -1)

    @torch.no_grad()
    def tabulate(self, condition: MixtureCondition) -> LatentTable:
        parts = map(torch.arange, (self.superclusters, self.petals))
        index = torch.cartesian_prod(*parts).to(condition.x.ids.device)
        paths = self._paths(condition, index.expand(len(condition.x), -1, -1))
        return LatentTable(paths.log_joint, paths.log_forward.sum(0))

    def _flows(
        self,
        condition: MixtureCondition,
        index: Int[Tensor, "batch samples 2"],
        log_joint: Float[Tensor, "batch samples"],
    ) -> tuple[Float[Tensor, "steps rows"], Float[Tensor, "steps rows"]]:
        """Learned log flow of the states before each action, and log p of what is chosen there.

        What a supercluster says of the point is not known before the petal is, its prior is.
        """
        start = condition.flow[:, :1].expand(log_joint.shape)
        chosen = condition.flow[:, 1:].gather(1, index[..., 0])
        learned = torch.stack([start, chosen, torch.zeros_like(chosen)]).flatten(1)
        none = torch.zeros_like(log_joint)
        log_prior = torch.full_like(log_joint, self.superclusters).log().neg()
        return learned, torch.stack([none, log_prior, log_joint]).flatten(1)

    def estimators(self, condition: MixtureCondition) -> tuple[MixtureEstimator, MixtureEstimator]:
        return MixtureEstimator(self, condition, False), MixtureEstimator(self, condition, True)

    def flow_parameters(self) -> list[nn.Parameter]:
        return list(self.flow.parameters())


class MixtureEstimator(PolicyEstimator):
    """P_F or P_B at given states of a `MixtureEnv`, for torchgfn's own samplers."""

    def __init__(self, policy: MixturePolicy, condition: MixtureCondition, is_backward: bool):
        super().__init__(policy, condition, is_backward, policy.superclusters + policy.petals + 1)

    def forward(
        self, states: DiscreteStates, conditions: Float[Tensor, "*batch 1"]
    ) -> Float[Tensor, "*batch actions"]:
        condition = self.condition
        if self.is_backward:
            return conditions.new_zeros(*states.batch_shape, self.n_actions - 1)
        point = conditions[..., 0].long()
        first = condition.supercluster[point]
        second = condition.petal[point, states.tensor[..., 0].clamp(min=0)]
        return torch.cat([first, second, torch.zeros_like(first[..., :1])], -1)


def _rows(
    table: Float[Tensor, "batch rows columns"], chosen: Int[Tensor, "batch samples"]
) -> Float[Tensor, "batch samples columns"]:
    return table.gather(1, chosen[..., None].expand(-1, -1, table.shape[-1]))
