"""Markov chains over parse trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gfnem.errors import UserError
from gfnem.model import LatentVariableModel
from gfnem.posteriors.mcmc import Moves
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.tree import Trees


@dataclass(frozen=True)
class RotationCondition:
    """A batch of sentences as the chains see it.

    potentials: of the model for them.
    """

    model: GrammarModel
    potentials: Any
    lengths: Int[Tensor, "batch"]


class Rotations(Moves):
    """Metropolis-Hastings over shapes; a proposal rotates one of a tree's edges.

    A tree over n words has n - 2 edges between internal nodes, whatever its shape, and a rotation
    is undone by rotating the edge that it leaves. So an edge drawn uniformly is as likely to lead
    there as back, and the acceptance is min(1, p(x, z') / p(x, z)), labels summed out. Labels, if z
    has any, are drawn from p(labels | shape, x) where a walk ends, whatever they were before: a
    move of the shape that leaves p(shape | x) as it is and this draw together leave p(z | x) as it
    is. Chains begin at `Trees.random`.

    A state is the sizes of a tree's nodes, gap by gap: gaps merged in their order give it again.
    """

    def condition(self, model: LatentVariableModel, x: Sentences) -> RotationCondition:
        if not isinstance(model, GrammarModel):
            raise UserError(
                f"posterior.moves=Rotations rotates the trees of a grammar, which "
                f"{type(model).__name__} is not: use posterior=gflownet"
            )
        return RotationCondition(model, model.potentials(x), x.lengths)

    def begin(self, condition: RotationCondition, chains: int) -> Int[Tensor, "batch chains nodes"]:
        return Trees.random(condition.lengths, chains).sizes

    def walk(
        self, condition: RotationCondition, state: Int[Tensor, "batch chains nodes"], steps: int
    ) -> Int[Tensor, "batch chains nodes"]:
        model, potentials = condition.model, condition.potentials
        trees = Trees.from_merge_times(state, condition.lengths)
        density = model.shape_density(potentials)

        def log_density(trees: Trees) -> Float[Tensor, "batch samples"]:
            return density(trees) + model.log_prior_weight(trees)

        return rotate_and_accept(trees, log_density, steps, density.take).sizes

    def latents(
        self, condition: RotationCondition, state: Int[Tensor, "batch chains nodes"]
    ) -> Trees:
        trees = Trees.from_merge_times(state, condition.lengths)
        if condition.model.latent == "shape":
            return trees
        return condition.model.sample_labels(condition.potentials, trees)


def rotate_and_accept(
    trees: Trees,
    log_density: Callable[[Trees], Float[Tensor, "batch samples"]],
    steps: int,
    take: Callable[[Bool[Tensor, "batch samples"]], None] | None = None,
) -> Trees:
    """So many Metropolis-Hastings transitions by rotations; see `Rotations`.

    log_density: of trees, up to a constant for each sentence.
    take: is told which of the proposals it was asked about last have been accepted.
    """
    log_joint = log_density(trees)
    for _ in range(steps):
        proposed = trees.rotate(_random_inner(trees))
        log_proposed = log_density(proposed)
        # From a tree of probability zero, where a chain may begin, all are better.
        log_accept = (log_proposed - log_joint).where(log_joint.isfinite(), 0.0)
        accept = torch.rand_like(log_accept).log() < log_accept
        if take is not None:
            take(accept)
        trees = proposed.where(accept, trees)
        log_joint = log_proposed.where(accept, log_joint)
    return trees


def _random_inner(trees: Trees) -> Int[Tensor, "batch samples"]:
    """A node of each tree that has a parent, or any where none has."""
    sizes = trees.sizes
    has_parent = trees.exists & (sizes < trees.lengths[:, None, None] - 1)
    noise = torch.rand(sizes.shape, device=sizes.device)
    return noise.where(has_parent, -1.0).argmax(-1)
