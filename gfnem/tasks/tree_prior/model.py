"""A distribution of tree shapes, learned from a treebank by contrastive divergence."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.errors import UserError
from gfnem.model import LatentVariableModel
from gfnem.tasks.grammar.policies.moves import rotate_and_accept
from gfnem.tasks.grammar.trees.energy import RecursiveNetwork
from gfnem.tasks.grammar.trees.tree import Trees
from gfnem.tasks.tree_prior.data import Shapes


class ShapeModel(LatentVariableModel):
    """p(shape | n) = exp(-E(shape)) / Z(n), for shapes over n words; E is a `RecursiveNetwork`.

    The sum Z(n) over all shapes is not known, so log p(shape | n) cannot be climbed itself. Its
    gradient is that of

        E_{z ~ p(. | n)}[E(z)] - E(shape),

    the draws held as they are. `log_joint` has it for one draw: x are gold shapes, and z, which
    have no other role, shapes that the model drew for their lengths. From Markov chains that go on
    from M-step to M-step while the model moves little, as those of posterior=mcmc do, this is
    persistent contrastive divergence (Tieleman, 2008).

    width: of the network.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        if width < 1:
            raise UserError(f"model.width is {width}; it must be at least 1")
        self.energy = RecursiveNetwork(width)

    @property
    def unnormalised(self) -> str:
        return "it has energies alone: train it by MCMC"

    def log_joint(self, x: Shapes, z: Trees) -> Float[Tensor, "batch samples"]:
        return self.energy(z) - self.energy(x.trees)

    @torch.no_grad()
    def walk(self, trees: Trees, steps: int) -> Trees:
        """So many rotations of each tree, each of which leaves p(shape | n) as it is."""
        return rotate_and_accept(trees, lambda proposed: -self.energy(proposed), steps)

    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> tuple[Int[Tensor, "n"], Trees]:
        raise NotImplementedError("how long sentences are is no part of this model")
