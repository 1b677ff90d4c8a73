"""q(z | x) of a mixture: a supercluster given the point, then a petal given both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gfn.estimators import DiscretePolicyEstimator
from gfn.states import DiscreteStates
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.categorical import sample_categorical
from gfnem.errors import UserError
from gfnem.objectives import ScoredTrajectories
from gfnem.posterior import LatentTable
from gfnem.posteriors.gflownet import (
    ON_POLICY,
    Behaviour,
    Paths,
    Policy,
    trajectories_of_choices,
)
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


class MixturePolicy(Policy):
    """q(i | x) q(j | i, x), from a network that sees the standardised point alone.

    data: whose training points say how to standardise.
    superclusters, petals: of the model.
    width: of the network's two hidden layers.
    """

    center: Float[Tensor, "dimensions"]
    spread: Float[Tensor, ""]

    def __init__(self, data: PointData, superclusters: int = 4, petals: int = 4, width: int = 64):
        super().__init__()
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
        self.last_condition: MixtureCondition | None = None
        self._envs: dict[str, MixtureEnv] = {}

    def condition(self, model: HierarchicalMixture, x: Points) -> MixtureCondition:
        hidden = self.network((x.values - self.center) / self.spread)
        self.last_condition = MixtureCondition(
            x,
            model,
            self.supercluster(hidden),
            self.petal(hidden).unflatten(1, (self.superclusters, self.petals)),
            self.flow(hidden),
        )
        return self.last_condition

    @torch.no_grad()
    def _draw(
        self,
        condition: MixtureCondition,
        samples: int,
        behaviour: Behaviour,
        supercluster: Int[Tensor, "batch samples"] | None = None,
    ) -> Int[Tensor, "batch samples 2"]:
        """Draw components, or petals alone where superclusters are given."""
        if supercluster is None:
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
    ) -> Float[Tensor, "2 batch samples"]:
        """log q of supercluster and of petal."""
        supercluster, petal = index.unbind(-1)
        first = (condition.supercluster / temperature).log_softmax(-1).gather(1, supercluster)
        second = (condition.petal / temperature).log_softmax(-1).flatten(1)
        return torch.stack([first, second.gather(1, supercluster * self.petals + petal)])

    def _paths(
        self,
        condition: MixtureCondition,
        index: Int[Tensor, "batch samples 2"],
        temperature: float = 1.0,
        score_from: int = 0,
    ) -> Paths:
        log_q = self._log_probabilities(condition, index, temperature)
        none = torch.zeros_like(log_q[:1])
        forward = torch.cat([none.expand(score_from, -1, -1), log_q[score_from:], none])
        z = Components(index)
        with torch.no_grad():
            log_joint = condition.model.log_joint(condition.x, z)
        return Paths(
            z=z,
            log_joint=log_joint,
            log_forward=forward,
            log_backward=torch.zeros_like(forward),
            flows=lambda: self._flows(condition, index, log_joint),
            record=index,
        )

    def sample(
        self, condition: MixtureCondition, samples: int, behaviour: Behaviour = ON_POLICY
    ) -> Paths:
        return self._paths(condition, self._draw(condition, samples, behaviour))

    def retrace(self, condition: MixtureCondition, z: Components) -> Paths:
        return self._paths(condition, z.index)

    @torch.no_grad()
    def tabulate(self, condition: MixtureCondition) -> LatentTable:
        parts = map(torch.arange, (self.superclusters, self.petals))
        index = torch.cartesian_prod(*parts).to(condition.x.ids.device)
        paths = self._paths(condition, index.expand(len(condition.x), -1, -1))
        return LatentTable(paths.log_joint, paths.log_forward.sum(0))

    def log_forward(
        self, condition: MixtureCondition, z: Components
    ) -> Float[Tensor, "batch samples"]:
        return self._log_probabilities(condition, z.index).sum(0)

    @torch.no_grad()
    def regrow(
        self, condition: MixtureCondition, z: Components, depth: int, temperature: float = 1.0
    ) -> tuple[Paths, Paths]:
        keep = max(2 - depth, 0)
        kept = z.supercluster if keep else None
        new = self._draw(condition, z.index.shape[1], Behaviour(temperature), kept)
        old, grown = (
            self._paths(condition, index, temperature, score_from=keep) for index in (z.index, new)
        )
        return old, grown

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

    def trajectories(self, condition: MixtureCondition, paths: Paths) -> ScoredTrajectories:
        choices = paths.record.flatten(0, 1)
        supercluster, petal = choices.unbind(-1)
        actions = torch.stack([supercluster, self.superclusters + petal])
        return trajectories_of_choices(self._env(choices.device), choices, actions, paths)

    def _env(self, device: torch.device) -> MixtureEnv:
        if str(device) not in self._envs:
            self._envs[str(device)] = MixtureEnv(self.superclusters, self.petals, device)
        return self._envs[str(device)]

    def estimators(self) -> tuple[MixtureEstimator, MixtureEstimator]:
        return MixtureEstimator(self, is_backward=False), MixtureEstimator(self, is_backward=True)

    def flow_parameters(self) -> list[nn.Parameter]:
        return list(self.flow.parameters())


class MixtureEstimator(DiscretePolicyEstimator):
    """P_F or P_B at given states of a `MixtureEnv`, for torchgfn's own samplers.

    The states' points are rows of the batch that the policy has last seen (`condition`).
    """

    def __init__(self, policy: MixturePolicy, is_backward: bool):
        module: Any = nn.Identity()
        module.input_dim = 1
        actions = policy.superclusters + policy.petals + 1
        super().__init__(module, n_actions=actions, is_backward=is_backward)
        # Not a submodule: the policy owns its parameters.
        self._policy = (policy,)

    def forward(
        self, states: DiscreteStates, conditions: Float[Tensor, "*batch 1"]
    ) -> Float[Tensor, "*batch actions"]:
        (policy,) = self._policy
        condition = policy.last_condition
        assert condition is not None, "the policy has seen no batch yet"
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
