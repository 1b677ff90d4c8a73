"""Markov chains over tree shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from gfnem.errors import UserError
from gfnem.model import LatentVariableModel
from gfnem.posteriors.mcmc import Moves
from gfnem.tasks.grammar.trees.tree import Trees
from gfnem.tasks.tree_prior.data import Shapes
from gfnem.tasks.tree_prior.model import ShapeModel


@dataclass(frozen=True)
class ShapeCondition:
    """The model, and of the data how long sentences are."""

    model: ShapeModel
    lengths: Int[Tensor, "batch"]


class ShapeRotations(Moves):
    """Metropolis-Hastings by rotations, as in `grammar.policies.moves`, without any sentence.

    A state is the sizes of a tree's nodes, gap by gap: gaps merged in their order give it again.
    """

    def condition(self, model: LatentVariableModel, x: Shapes) -> ShapeCondition:
        if not isinstance(model, ShapeModel):
            raise UserError(
                f"posterior.moves=ShapeRotations are of model=tree_energy, which "
                f"{type(model).__name__} is not: use task=tree_prior"
            )
        return ShapeCondition(model, x.lengths)

    def begin(self, condition: ShapeCondition, chains: int) -> Int[Tensor, "batch chains nodes"]:
        return Trees.random(condition.lengths, chains).sizes

    def walk(
        self, condition: ShapeCondition, state: Int[Tensor, "batch chains nodes"], steps: int
    ) -> Int[Tensor, "batch chains nodes"]:
        trees = Trees.from_merge_times(state, condition.lengths)
        return condition.model.walk(trees, steps).sizes

    def latents(self, condition: ShapeCondition, state: Int[Tensor, "batch chains nodes"]) -> Trees:
        return Trees.from_merge_times(state, condition.lengths)
