"""What tests of hierarchical mixtures share: small models and points, and SciPy to hold them to."""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import cos, log, pi, sin
from typing import Any

import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from gfnem.tasks.mixture.components import Components
from gfnem.tasks.mixture.data import PointData, Points
from gfnem.tasks.mixture.model import HierarchicalMixture
from gfnem.tasks.mixture.policy import MixturePolicy
from tests.tasks.grammar.tiny import float64, p_value, total_variation

__all__ = ["float64", "p_value", "total_variation"]

SUPERCLUSTERS, PETALS = 3, 4
Component = tuple[int, ...]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_model(
    superclusters: int = SUPERCLUSTERS, petals: int = PETALS, dimensions: int = 2
) -> HierarchicalMixture:
    """Means so close together that several components might be behind a point."""
    return HierarchicalMixture(0.3 * normal(superclusters, dimensions, seed=0), petals)


def points(n: int, dimensions: int = 2, seed: int = 1) -> Points:
    """Between the components of `make_model`."""
    return Points.numbered(0.6 * normal(n, dimensions, seed=seed))


def make_data(train: int = 12, valid: int = 5, test: int = 7, **options: Any) -> PointData:
    of_train, of_valid, of_test = (
        points(n, seed=seed) for seed, n in enumerate((train, valid, test))
    )
    return PointData(of_train, of_valid, of_test, **options)


def make_policy(noise: float = 0.3, **options: Any) -> MixturePolicy:
    """A small policy whose probabilities are far from uniform."""
    torch.manual_seed(0)
    policy = MixturePolicy(make_data(), **{"superclusters": SUPERCLUSTERS, "width": 8, **options})
    with torch.no_grad():
        for number, parameter in enumerate(policy.parameters()):
            parameter += noise * normal(*parameter.shape, seed=number)
    return policy


def components(superclusters: int = SUPERCLUSTERS, petals: int = PETALS) -> list[Component]:
    return list(product(range(superclusters), range(petals)))


def every(batch: int) -> Components:
    """All components of `make_model` for each point."""
    return Components(torch.tensor(components()).expand(batch, -1, -1))


def random_components(batch: int, samples: int, seed: int = 0) -> Components:
    generator = torch.Generator().manual_seed(seed)
    size = (batch, samples)
    index = [torch.randint(n, size, generator=generator) for n in (SUPERCLUSTERS, PETALS)]
    return Components(torch.stack(index, -1))


def log_joint(model: HierarchicalMixture, x: Points, component: Component) -> Tensor:
    """log p(x, z) of points and one component, by SciPy."""
    supercluster, petal = component
    angle = 2 * pi * (petal + 0.5) / model.petals
    center = model.means[supercluster].detach().double().clone()
    center[0] += cos(angle)
    center[1] += sin(angle)
    normal_of: Any = multivariate_normal
    density = normal_of(center.numpy(), 0.25**2)
    log_density = torch.tensor(density.logpdf(x.values.double().numpy())).reshape(len(x))
    return log_density - log(model.superclusters * model.petals)


def log_joint_table(model: HierarchicalMixture, x: Points) -> Tensor:
    """log p(x, z) of every point and every component."""
    each = components(model.superclusters, model.petals)
    return torch.stack([log_joint(model, x, z) for z in each], 1)


def posteriors(model: HierarchicalMixture, x: Points) -> list[dict[Component, float]]:
    """p(z | x) of every component, for each point."""
    each = components(model.superclusters, model.petals)
    rows = log_joint_table(model, x).softmax(-1).tolist()
    return [dict(zip(each, row, strict=True)) for row in rows]


def q_tables(policy: MixturePolicy, model: Any, x: Points) -> list[dict[Component, float]]:
    """q(z | x) of every component, for each point, as torchgfn's estimators have it."""
    condition = policy.condition(model, x)
    env = policy.trajectories(condition, policy.sample(condition, 1)).env
    forward = policy.estimators(condition)[0]
    each = components(policy.superclusters, policy.petals)
    tables = []
    for row in range(len(x)):
        table = dict.fromkeys(each, 1.0)
        conditions = torch.full((len(each), 1), float(row))
        for state, action in (
            ([(-1, -1) for _ in each], [i for i, _ in each]),
            ([(i, -1) for i, _ in each], [policy.superclusters + j for _, j in each]),
        ):
            states: Any = env.States(torch.tensor(state), conditions=conditions)
            logits = forward(states, conditions).detach()
            p = logits.masked_fill(~states.forward_masks, -torch.inf).softmax(-1)
            for z, chosen, of_z in zip(each, action, p, strict=True):
                table[z] *= float(of_z[chosen])
        tables.append(table)
    return tables


def counts(index: Tensor) -> Counter[Component]:
    """How often each component is among the rows."""
    return Counter(map(tuple, index.tolist()))
