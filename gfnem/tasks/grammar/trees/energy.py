"""Energies of unlabelled binary trees, computed bottom-up.

Every node has a state made of its children's, and adds to the energy what depends on these: so a
tree's energy is a sum over its nodes, and what a merge of two roots adds to a forest's is known as
soon as it is made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.errors import UserError
from gfnem.run import Run
from gfnem.tasks.grammar.trees.levels import Levels
from gfnem.tasks.grammar.trees.tree import Trees


class TreeEnergy(nn.Module, ABC):
    """E(shape), in the units that the energy is made of."""

    @abstractmethod
    def word(self) -> Float[Tensor, "width"]:
        """The state of a word."""

    @abstractmethod
    def node(
        self,
        left: Float[Tensor, "nodes width"],
        right: Float[Tensor, "nodes width"],
        lengths: Int[Tensor, "nodes"],
    ) -> tuple[Float[Tensor, "nodes width"], Float[Tensor, "nodes"]]:
        """The states of nodes and what they add to the energy.

        left, right: states of their children.
        lengths: words of their sentences.
        """

    def forward(self, trees: Trees) -> Float[Tensor, "batch samples"]:
        """E of each tree, level by level of all of them; labels mean nothing."""
        levels = Levels.of(trees)
        lengths = trees.lengths[levels.sentence]
        # A word's state comes first.
        states, energies = self.word()[None], []
        for first, behind in levels.heights:
            nodes = slice(first, behind)
            left, right = states[levels.left[nodes] + 1], states[levels.right[nodes] + 1]
            made, energy = self.node(left, right, lengths[nodes])
            states = torch.cat([states, made])
            energies.append(energy)
        each = torch.cat(energies)
        total = each.new_zeros(trees.start.shape[:2]).flatten()
        return total.index_add(0, levels.row, each).view(trees.start.shape[:2])


class _Counting(TreeEnergy):
    """The state is one number, `of_word` for words."""

    leaf: Tensor
    of_word = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("leaf", torch.tensor([self.of_word]), persistent=False)

    def word(self) -> Float[Tensor, "width"]:
        return self.leaf


class RightBranching(_Counting):
    """Counts the nodes that are left children.

    Of the n - 2 nodes below the root of a tree over n words none is one in a right-branching tree
    and all are in a left-branching one.
    """

    def node(self, left: Tensor, right: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(left), left.squeeze(-1)


class Depth(_Counting):
    """The most nodes on a way from the root to a word.

    A tree over n words has at least log2 n of them, rounded up, and at most n - 1.
    """

    def node(self, left: Tensor, right: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        depth = torch.maximum(left, right) + 1
        return depth, (depth - left - right).squeeze(-1)


class Imbalance(_Counting):
    """The Colless index over half the number of nodes.

    The index is the sum over nodes of the difference in words between the two children (Colless,
    1982). So taken, it is n - 2 for trees over n words that branch to one side and 0 for perfectly
    balanced ones.
    """

    of_word = 1.0

    def node(self, left: Tensor, right: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return left + right, 2 * (left - right).abs().squeeze(-1) / (lengths - 1)


class RecursiveNetwork(TreeEnergy):
    """A recursive network whose every node adds to the energy, in nats.

    Untrained, it finds all trees alike.

    width: of nodes' states.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.leaf = nn.Parameter(torch.randn(width))
        self.compose = nn.Linear(2 * width, width)
        self.hidden = nn.Linear(3 * width, width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def word(self) -> Float[Tensor, "width"]:
        return self.leaf.tanh()

    def node(self, left: Tensor, right: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        children = torch.cat([left, right], -1)
        state = self.compose(children).tanh()
        hidden = self.hidden(torch.cat([state, children], -1)).relu()
        return state, self.out(hidden).squeeze(-1)


def trained_network(run: str | None, width: int = 32) -> RecursiveNetwork:
    """The network of a run of task=tree_prior that is best on its validation data.

    run: its directory; None for an untrained network, which finds all trees alike.
    width: of the network there.

    Raises UserError where there is no such network.
    """
    network = RecursiveNetwork(width)
    if run is None:
        return network
    state = Run.open(run).load_checkpoint("best")["model"]
    own = {f"energy.{name}": value.shape for name, value in network.state_dict().items()}
    if {name: value.shape for name, value in state.items()} != own:
        raise UserError(
            f"tree_prior.energy.run={run} has no network of width {width}: give a run of "
            "task=tree_prior and its model.width as tree_prior.energy.width"
        )
    network.load_state_dict({name.partition(".")[2]: value for name, value in state.items()})
    return network
