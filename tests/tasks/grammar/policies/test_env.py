from __future__ import annotations

from collections import Counter
from math import comb
from typing import Any

import pytest
import torch
from gfn.samplers import Sampler

from gfnem.tasks.grammar.policies.env import LATER, Forest, ForestEnv, parents_time
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from tests.tasks.grammar import oracle
from tests.tasks.grammar.tiny import (
    FixedModel,
    StateGraph,
    float64,  # noqa: F401
    make_policy,
    p_value,
    sentences,
)

pytestmark = pytest.mark.usefixtures("float64")


def catalan(n: int) -> int:
    return comb(2 * n, n) // (n + 1)


def debug_env(length: int, symbols: int = 1) -> ForestEnv:
    env = ForestEnv(length, symbols)
    env.debug = True
    return env


def forest_states(env: ForestEnv, length: int, *merged: dict[int, tuple[int, ...]]) -> Any:
    """States of a sentence of `length` words from the nodes in some of their gaps."""
    tensor = env.s0.repeat(len(merged), 1).view(len(merged), env.gaps, 3)
    for row, nodes in enumerate(merged):
        for gap, (start, end, *label) in nodes.items():
            tensor[row, gap] = torch.tensor([start, end, *(label or [0])])
    conditions = torch.tensor([0.0, length]).expand(len(merged), -1)
    return env.States(tensor.flatten(1), conditions=conditions)


@pytest.mark.parametrize("latent, symbols", [("shape", 1), ("labelled", 2)])
def test_torchgfn_s_sampler_builds_trees_of_the_right_length(latent, symbols):
    lengths = [4, 2, 5, 3]
    x = sentences(lengths)
    model = FixedModel(oracle.random_grammar(2, 3), latent)
    policy = make_policy("light", latent, nonterminals=2)
    condition = policy.condition(model, x)
    forward, _ = policy.estimators(condition)
    rows = torch.arange(4).repeat_interleave(1_000)
    conditions = torch.stack([rows, x.lengths[rows]], -1).to(torch.get_default_dtype())
    env = debug_env(5, symbols)
    start = env.reset(batch_shape=(len(rows),), conditions=conditions)
    torch.manual_seed(0)
    trajectories = Sampler(forward).sample_trajectories(env, states=start)
    assert torch.equal(trajectories.terminating_idx, x.lengths[rows])
    ends = trajectories.terminating_states
    for row, length in enumerate(lengths):
        graph = StateGraph.of(env, length, row)
        drawn = Counter(graph.tree(state) for state in ends.tensor[rows == row])
        exact = graph.ends(forward)
        assert sum(exact.values()) == pytest.approx(1)
        assert p_value(drawn, exact) > 1e-3


@pytest.mark.parametrize("symbols", [1, 2])
@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_tree_is_reached_and_nothing_else(length, symbols):
    env = debug_env(6, symbols)
    graph = StateGraph.of(env, length)
    trees = {graph.tree(state) for state in graph.levels[-1]}
    assert len(trees) == len(graph.levels[-1]) == catalan(length - 1) * symbols ** (length - 1)
    if symbols == 1:
        assert trees == set(oracle.shapes(length))
    else:
        assert trees == set(oracle.labelled_trees(length, symbols))
    final = graph.states(length - 1)
    assert (final.forward_masks.sum(-1) == 1).all() and final.forward_masks[:, -1].all()
    assert not any(graph.states(level).forward_masks[:, -1].any() for level in range(length - 1))


@pytest.mark.parametrize("symbols", [1, 3])
def test_steps_and_their_undoing_are_inverse(symbols):
    env = debug_env(6, symbols)
    graph = StateGraph.of(env, 5)
    for level, (source, action, target) in enumerate(graph.edges):
        before, after = graph.states(level)[source], graph.states(level + 1)[target]
        actions = env.actions_from_tensor(action[:, None])
        assert torch.equal(env._step(before, actions).tensor, after.tensor)
        assert torch.equal(env._backward_step(after, actions).tensor, before.tensor)
        # What may be undone are the actions that lead here, no others.
        legal = torch.zeros_like(graph.states(level + 1).backward_masks)
        legal[target, action] = True
        assert torch.equal(graph.states(level + 1).backward_masks, legal)
    assert not graph.states(0).backward_masks.any()


def test_masks_of_hand_worked_forests():
    env = debug_env(6)
    states = forest_states(
        env,
        5,
        {},
        {1: (1, 3)},  # a [b c] d e
        {1: (1, 3), 3: (3, 5)},  # a [b c] [d e]
        {1: (1, 3), 2: (1, 5), 3: (3, 5)},  # a [[b c] [d e]]
        {0: (0, 2), 1: (0, 3), 3: (3, 5)},  # [[a b] c] [d e]
        {0: (0, 5), 1: (1, 3), 2: (1, 5), 3: (3, 5)},  # [a [[b c] [d e]]]
    )
    # Gaps 0 to 3 of five words, gap 4 of a sixth word that is not there, and the exit.
    assert states.forward_masks.int().tolist() == [
        [1, 1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert states.backward_masks.int().tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 0, 1, 0, 0],
        [0, 1, 0, 1, 0],
        [1, 0, 0, 0, 0],
    ]


def test_masks_and_steps_of_hand_worked_labelled_forests():
    env = debug_env(4, symbols=2)
    states = forest_states(env, 4, {1: (1, 3, 1)}, {0: (0, 2, 0), 2: (2, 4, 1)})
    assert states.forward_masks.int().tolist() == [
        [1, 1, 0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0, 0, 0],
    ]
    assert states.backward_masks.int().tolist() == [[0, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 1]]
    # [b c] with d under 1, and [a b] with [c d] under 0.
    stepped = env._step(states, env.actions_from_tensor(torch.tensor([[5], [2]])))
    expected = forest_states(
        env, 4, {1: (1, 3, 1), 2: (1, 4, 1)}, {0: (0, 2, 0), 1: (0, 4, 0), 2: (2, 4, 1)}
    )
    assert torch.equal(stepped.tensor, expected.tensor)


def test_sentences_without_conditions_are_as_long_as_the_environment():
    env = debug_env(4)
    states: Any = env.States(env.s0[None])
    assert states.forward_masks.int().tolist() == [[1, 1, 1, 0]]


def test_parents_time_of_a_hand_worked_forest():
    # [a [b c]] d e: gap 1 was closed first, gap 0 second; words and then the two nodes.
    time = torch.tensor([[1, 0, LATER, LATER]])
    start = torch.tensor([[0, 1, 2, 3, 4, 1, 0]])
    end = torch.tensor([[1, 2, 3, 4, 5, 3, 3]])
    expected = [[1, 0, 0, LATER, LATER, 1, LATER]]
    assert parents_time(start, end, time, torch.tensor([5])).tolist() == expected
    whole = torch.tensor([[0]]), torch.tensor([[5]])
    assert parents_time(*whole, torch.tensor([[1, 0, 3, 2]]), torch.tensor([5])).item() == LATER


def span_score(grammar: DenseGrammar, words: list[int], label: int, tree: Any) -> float:
    """p(words, tree below | label), by enumeration; a labelled tree has all labels but the top."""
    root = torch.full_like(grammar.root, -torch.inf)
    root[label] = 0
    rooted = DenseGrammar(root, grammar.binary, grammar.emission)
    if all(len(node) == 2 for node in tree):
        return oracle.enumerate_shapes(rooted, words)[tree]
    return oracle.log_joint_labelled(rooted, words, tree)


@pytest.mark.parametrize("labelled", [False, True])
def test_messages_of_a_forest_are_those_of_enumeration(labelled):
    """Along random merge orders, of every node that was made or may be made next."""
    grammar = oracle.random_grammar(2, 3, seed=3, temperature=0.6)
    x = sentences([5, 3, 2, 4], seed=3)
    potentials = grammar.potentials(x.words, x.lengths)
    samples = 3
    forest = Forest(potentials, samples, labelled)
    generator = torch.Generator().manual_seed(0)
    for _ in range(forest.steps + 1):
        legal = forest.open
        for row in range(len(forest.rows)):
            sentence = oracle.sentence(x.words, x.lengths, row // samples)
            for gap in range(len(sentence) - 1):
                start, end = int(forest.start[row, gap]), int(forest.end[row, gap])
                under = {
                    (
                        int(forest.start[row, other]) - start,
                        int(forest.end[row, other]) - start,
                        *([int(forest.labels[row, other])] if labelled else []),
                    )
                    for other in range(len(sentence) - 1)
                    if other != gap
                    and forest.time[row, other] != LATER
                    and start <= int(forest.start[row, other])
                    and int(forest.end[row, other]) <= end
                }
                assert legal[row, gap] == (forest.time[row, gap] == LATER)
                value = forest.message[row, gap].log() + forest.log_scale[row, gap]
                made = int(forest.labels[row, gap])
                for label in range(2):
                    top = (0, end - start, label) if labelled else (0, end - start)
                    tree = frozenset(under | {top})
                    if labelled and made >= 0 and label != made:
                        assert value[0, label] == -torch.inf
                        continue
                    expected = span_score(grammar, sentence[start:end], label, tree)
                    assert value[0, label].item() == pytest.approx(expected, abs=1e-9)
            complete = not legal[row, : len(sentence) - 1].any()
            assert legal[row, forest.exit] == complete
        gap = torch.multinomial(legal.double(), 1, generator=generator).squeeze(1)
        label = torch.randint(2, gap.shape, generator=generator) if labelled else None
        forest.merge(gap, label)
    assert forest.open[:, forest.exit].all()
    trees = forest.trees()
    for index in range(len(x)):
        for sample in range(samples):
            tree = trees.spans(index, sample)
            assert tree in oracle.shapes(int(x.lengths[index]))
    assert (trees.labels is not None) == labelled


def test_a_forest_without_messages_merges_the_same():
    x = sentences([5, 3])
    potentials = oracle.random_grammar().potentials(x.words, x.lengths)
    with_messages, without = Forest(potentials, 2, False), Forest(potentials, 2, False, False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(with_messages.steps):
        gap = torch.multinomial(with_messages.open.double(), 1, generator=generator).squeeze(1)
        for one, other in zip(with_messages.merge(gap), without.merge(gap), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(with_messages.trees().start, without.trees().start)
    assert torch.equal(with_messages.trees().end, without.trees().end)
    assert not hasattr(without, "message")


def test_what_an_environment_alone_cannot_do():
    env = debug_env(4)
    states: Any = env.States(env.s0[None])
    with pytest.raises(ValueError, match="it travels with the trajectories"):
        env.log_reward(states)
    with pytest.raises(ValueError, match="cannot be drawn without a policy; roll one out instead"):
        env.States.make_random_states((3,))
