from __future__ import annotations

from math import inf
from typing import Any

import pytest
import torch

from gfnem.tasks.grammar.inference import shape_density
from gfnem.tasks.grammar.inference.messages import NodeMessages, upward
from gfnem.tasks.grammar.inference.shape_density import changed
from gfnem.tasks.grammar.rules.grammar import Potentials
from gfnem.tasks.grammar.trees.levels import Levels
from gfnem.tasks.grammar.trees.tree import Trees
from tests.tasks.grammar import oracle, parents_oracle
from tests.tasks.grammar.tiny import (
    FixedLowRank,
    FixedModel,
    float64,  # noqa: F401
    sentences,
)

pytestmark = pytest.mark.usefixtures("float64")

LENGTHS = [7, 5, 2, 3]


MODELS = {
    "cfg": lambda: FixedModel(oracle.random_grammar(3, 3)),
    "ncfg": lambda: FixedModel(parents_oracle.random_grammar(3, 3)),
    "low rank": lambda: FixedLowRank(parents_oracle.random_low_rank_grammar(3, 3, 2)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("rotate", [True, False], ids=["rotated", "anew"])
def test_the_density_is_that_of_whole_trees_whatever_was_seen_and_taken(make: Any, rotate: bool):
    model, x = make(), sentences(LENGTHS)
    torch.manual_seed(0)
    potentials = model.potentials(x)
    density = model.shape_density(potentials)
    trees = Trees.random(x.lengths, 6)
    torch.testing.assert_close(density(trees), model.log_joint_given(potentials, trees))
    for _ in range(12):
        if rotate:
            inner = torch.randint(0, trees.start.shape[-1], trees.start.shape[:2])
            inner = torch.minimum(inner, x.lengths[:, None] - 2)
            proposed = trees.rotate(inner)
        else:
            proposed = Trees.random(x.lengths, 6)
        torch.testing.assert_close(density(proposed), model.log_joint_given(potentials, proposed))
        taken = torch.rand(len(x), 6) < 0.5
        density.take(taken)
        trees = proposed.where(taken, trees)


def test_only_what_has_changed_is_computed(monkeypatch):
    model, x = FixedModel(oracle.random_grammar(3, 3)), sentences([9])
    density = model.shape_density(model.potentials(x))
    computed = []

    def counted(potentials: Potentials, levels: Levels, *known: NodeMessages) -> NodeMessages:
        computed.append(len(levels.row) - levels.known)
        return upward(potentials, levels, *known)

    monkeypatch.setattr(shape_density, "upward", counted)
    trees = Trees.left_branching(x.lengths)
    density(trees)
    # The words 0, 1, 2 are split in another way; 6 nodes are above them.
    density(trees.rotate(torch.tensor([[0]])))
    assert computed == [8, 8]
    # Nothing was taken, so that now just the root and the node below it are others.
    density(trees.rotate(torch.tensor([[6]])))
    assert computed == [8, 8, 2]


def test_changed_nodes_have_other_spans_below_them():
    lengths = torch.tensor([7, 4])
    torch.manual_seed(0)
    before, trees = Trees.random(lengths, 20), Trees.random(lengths, 20)
    found = changed(trees, before)
    for row, sample in torch.cartesian_prod(torch.arange(2), torch.arange(20)).tolist():
        old, new = before.spans(row, sample), trees.spans(row, sample)
        for node in range(int(lengths[row]) - 1):
            start, end = (int(side[row, sample, node]) for side in (trees.start, trees.end))
            below = [
                {span for span in spans if start <= span[0] and span[1] <= end}
                for spans in (old, new)
            ]
            assert bool(found[row, sample, node]) == (below[0] != below[1])
    assert not changed(before, before).any()


def test_trees_of_probability_zero_are_left():
    """A -> T A | A T | T T: a word at the edge of every span."""
    binary = torch.tensor([[[0.0, 0.3], [0.5, 0.2]]]).log()
    model, x = (
        FixedModel(oracle.context_free(torch.zeros(1), binary, torch.zeros(1, 1))),
        sentences([4], 1),
    )
    density = model.shape_density(model.potentials(x))
    balanced = oracle.to_trees([[frozenset({(0, 2), (2, 4), (0, 4)})]], x.lengths)
    assert density(balanced).item() == -inf
    left = Trees.left_branching(x.lengths)
    expected = model.log_joint(x, left)
    torch.testing.assert_close(density(left), expected)
