from __future__ import annotations

from itertools import permutations

import pytest
import torch
from nltk import Tree

from gfnem.tasks.grammar.trees.tree import Trees
from tests.tasks.grammar import oracle


def every_shape(length: int) -> Trees:
    return oracle.to_trees([oracle.shapes(length)], torch.tensor([length]))


def test_merge_times_by_hand():
    # Sentence 0: gap 1 first (b c), then 3 (d e), then 2 ((b c) (d e)), then 0. Sentence 1 ends
    # behind gap 1: gap 1 first, and the times behind it mean nothing.
    times = torch.tensor([[[4, 1, 3, 2]], [[3, 2, 1, 9]]])
    trees = Trees.from_merge_times(times, torch.tensor([5, 3]))
    assert trees.start.tolist() == [[[0, 1, 1, 3]], [[0, 1, 0, 0]]]
    assert trees.end.tolist() == [[[5, 3, 5, 5]], [[3, 3, 0, 0]]]
    assert trees.exists.tolist() == [[[True] * 4], [[True, True, False, False]]]
    assert trees.sizes.tolist() == [[[4, 1, 3, 1]], [[2, 1, 0, 0]]]
    left, right = trees.children()
    assert left.tolist() == [[[-1, -1, 1, -1]], [[-1, -1, -1, -1]]]
    assert right.tolist() == [[[2, -1, 3, -1]], [[1, -1, -1, -1]]]
    assert trees.bottom_up().tolist() == [[[1, 3, 2, 0]], [[1, 0, 2, 3]]]
    assert trees.spans(0) == {(0, 5), (1, 5), (1, 3), (3, 5)}
    assert trees.spans(1) == {(0, 3), (1, 3)}
    assert trees.labels is None


@pytest.mark.parametrize(("length", "catalan"), [(2, 1), (3, 2), (4, 5), (5, 14), (6, 42)])
def test_all_merge_orders_give_all_trees(length, catalan):
    orders = torch.tensor(list(permutations(range(length - 1))))[None]
    trees = Trees.from_merge_times(orders, torch.tensor([length]))
    spans = {trees.spans(0, sample) for sample in range(orders.shape[1])}
    assert spans == set(oracle.shapes(length))
    assert len(spans) == catalan
    assert trees.distinct_shapes().tolist() == [catalan]


@pytest.mark.parametrize("labelled", [False, True])
def test_numbers_tell_all_trees_apart(labelled):
    lengths = torch.tensor([5, 3])
    trees = [
        list(oracle.labelled_trees(n, 2) if labelled else oracle.shapes(n))
        for n in lengths.tolist()
    ]
    most = len(trees[0])
    z = oracle.to_trees([(some * most)[:most] for some in trees], lengths)
    assert z.numbers.min() >= 0
    assert [len({tuple(n) for n in rows}) for rows in z.numbers.tolist()] == list(map(len, trees))
    again = Trees.from_numbers(z.numbers, lengths, labelled)
    for name in ("start", "end", "labels"):
        one, other = getattr(again, name), getattr(z, name)
        assert (one is None and other is None) if one is None else torch.equal(one, other)


def test_rotations_by_hand():
    # (a ((b c) (d e))), where node 1 is (b c), node 3 (d e) and node 2 their parent; ((a b) c).
    trees = Trees.from_merge_times(
        torch.tensor([[[4, 1, 3, 2]], [[1, 2, 9, 9]]]), torch.tensor([5, 3])
    )
    for node, spans in (
        (0, {(0, 5), (1, 5), (1, 3), (3, 5)}),
        (1, {(0, 5), (1, 5), (2, 5), (3, 5)}),
        (2, {(0, 5), (0, 3), (1, 3), (3, 5)}),
        (3, {(0, 5), (1, 5), (1, 3), (1, 4)}),
    ):
        rotated = trees.rotate(torch.tensor([[node], [0]]))
        assert rotated.spans(0) == spans
        assert rotated.spans(1) == {(0, 3), (1, 3)}
        assert rotated.end[1, 0, 2] == 0 and rotated.labels is None
    assert trees.rotate(torch.tensor([[0], [1]])).spans(1) == {(0, 3), (0, 2)}


def test_rotations_are_undone_and_reach_every_tree():
    trees = every_shape(5)
    neighbours: dict[oracle.Shape, set[oracle.Shape]] = {shape: set() for shape in oracle.shapes(5)}
    for node in range(4):
        nodes = torch.full((1, 14), node)
        rotated = trees.rotate(nodes)
        for sample in range(14):
            before, after = trees.spans(0, sample), rotated.spans(0, sample)
            if trees.sizes[0, sample, node] == 4:
                assert before == after
            else:
                # One span is another one.
                assert len(before & after) == 3
                neighbours[before].add(after)
    for shape, others in neighbours.items():
        assert len(others) == 3
        assert all(shape in neighbours[other] for other in others)
    reached = {oracle.shapes(5)[0]}
    for _ in range(4):
        reached |= {other for shape in reached for other in neighbours[shape]}
    assert reached == set(neighbours)


def test_equal_merge_times_give_a_tree_too():
    times = torch.tensor([[[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    trees = Trees.from_merge_times(times, torch.tensor([5]))
    assert trees.spans(0, 0) == {(2, 4), (0, 2), (0, 4), (0, 5)}
    assert trees.spans(0, 1) == Trees.left_branching(torch.tensor([5])).spans(0)


def test_branching_baselines():
    lengths = torch.tensor([4, 2])
    left, right = Trees.left_branching(lengths), Trees.right_branching(lengths)
    assert left.start.shape == right.start.shape == (2, 1, 3)
    assert left.spans(0) == {(0, 2), (0, 3), (0, 4)}
    assert right.spans(0) == {(2, 4), (1, 4), (0, 4)}
    assert left.spans(1) == right.spans(1) == {(0, 2)}


def test_random_trees_split_every_node_uniformly():
    samples = 6000
    trees = Trees.random(torch.tensor([4, 3]), samples, torch.Generator().manual_seed(0))
    counts = dict.fromkeys(oracle.shapes(4), 0)
    for sample in range(samples):
        counts[trees.spans(0, sample)] += 1
    for shape, count in counts.items():
        # A root split in the middle leaves nothing to choose, another leaves two ways.
        expected = 1 / 3 if (0, 2) in shape and (2, 4) in shape else 1 / 6
        assert count / samples == pytest.approx(expected, abs=0.03)
    assert {trees.spans(1, sample) for sample in range(20)} == set(oracle.shapes(3))


def test_children_and_order_of_every_tree():
    for length in (2, 3, 4, 5, 6):
        trees = every_shape(length)
        left, right = trees.children()
        order = trees.bottom_up()
        for sample, shape in enumerate(oracle.shapes(length)):
            start, end = trees.start[0, sample].tolist(), trees.end[0, sample].tolist()
            position = {gap: n for n, gap in enumerate(order[0, sample].tolist())}
            assert sorted(position) == list(range(length - 1))
            for gap in range(length - 1):
                halves = (
                    (int(left[0, sample, gap]), start[gap], gap + 1),
                    (int(right[0, sample, gap]), gap + 1, end[gap]),
                )
                for child, i, j in halves:
                    if j - i == 1:
                        assert child == -1
                    else:
                        assert (start[child], end[child]) == (i, j)
                        assert (i, j) in shape
                        assert position[child] < position[gap]
                inside = {(i, j) for i, j in shape if start[gap] <= i and j <= end[gap]}
                assert trees.sizes[0, sample, gap] == len(inside)


def test_distinct_shapes_counts_within_each_sentence():
    chain, other = oracle.shapes(3)
    trees = oracle.to_trees(
        [[chain, other, chain, chain], [oracle.shapes(2)[0]] * 4, [chain] * 4],
        torch.tensor([3, 2, 3]),
    )
    assert trees.distinct_shapes().tolist() == [2, 1, 1]


def labelled_batch() -> Trees:
    """Two sentences with two labelled trees each."""
    first = [frozenset({(0, 3, 1), (0, 2, 2)}), frozenset({(0, 3, 0), (1, 3, 1)})]
    second = [frozenset({(0, 2, 0)}), frozenset({(0, 2, 2)})]
    return oracle.to_trees([first, second], torch.tensor([3, 2]))


def test_select_takes_samples_sentence_by_sentence():
    trees = labelled_batch()
    chosen = trees.select(torch.tensor([[1, 1, 0], [0, 1, 1]]))
    for index, samples in enumerate([[1, 1, 0], [0, 1, 1]]):
        for number, sample in enumerate(samples):
            assert oracle.tree_at(chosen, index, number) == oracle.tree_at(trees, index, sample)
    shapes = trees.shapes().select(torch.tensor([[1], [0]]))
    assert shapes.labels is None
    assert shapes.spans(0) == {(0, 3), (1, 3)}


def test_where_mixes_two_batches():
    trees = labelled_batch()
    other = trees.select(torch.tensor([[1, 0], [1, 0]]))
    mixed = trees.where(torch.tensor([[True, False], [False, True]]), other)
    assert oracle.tree_at(mixed, 0, 0) == oracle.tree_at(trees, 0, 0)
    assert oracle.tree_at(mixed, 0, 1) == oracle.tree_at(trees, 0, 0)
    assert oracle.tree_at(mixed, 1, 0) == oracle.tree_at(trees, 1, 1)
    assert oracle.tree_at(mixed, 1, 1) == oracle.tree_at(trees, 1, 1)
    assert trees.where(torch.ones(2, 2, dtype=torch.bool), other.shapes()).labels is None


def test_nltk_trees():
    trees = labelled_batch()
    words = ["the", "cat", "sleeps"]
    assert trees.to_nltk(0, words) == Tree.fromstring("(S (N1 (N2 the cat) sleeps))")
    assert trees.to_nltk(0, words, 1, name="ABC".__getitem__) == Tree.fromstring(
        "(S (A the (B cat sleeps)))"
    )
    assert trees.to_nltk(1, words[1:]) == Tree.fromstring("(S (N0 cat sleeps))")
    shapes = trees.shapes()
    assert shapes.to_nltk(0, words) == Tree.fromstring("(S (X the cat) sleeps)")
    assert shapes.to_nltk(1, words[1:]) == Tree.fromstring("(S cat sleeps)")


def test_spans_survive_the_way_through_nltk():
    trees = every_shape(6)
    for sample, shape in enumerate(oracle.shapes(6)):
        tree = trees.to_nltk(0, [str(i) for i in range(6)], sample)
        leaves = [[int(leaf) for leaf in subtree.leaves()] for subtree in tree.subtrees()]
        assert {(numbers[0], numbers[-1] + 1) for numbers in leaves} == shape
