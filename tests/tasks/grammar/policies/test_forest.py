from __future__ import annotations

from collections import Counter
from math import exp, factorial, log, prod, sqrt
from typing import Any

import pytest
import torch
from gfn.utils.prob_calculations import get_trajectory_pfs_and_pbs
from torch import Tensor

from gfnem.errors import UserError
from gfnem.gflownet.paths import Paths
from gfnem.gflownet.policy import Behaviour
from gfnem.inference import log_mean_exp
from gfnem.tasks.grammar.policies.forest import ForestPolicy
from gfnem.tasks.grammar.policies.merges import ForestCondition
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.tree import Trees
from tests.tasks.discrete_vae.tiny import make_model as make_vae
from tests.tasks.grammar import oracle
from tests.tasks.grammar.tiny import (
    BACKWARDS,
    LATENTS,
    POLICIES,
    FixedModel,
    StateGraph,
    count_trees,
    float64,  # noqa: F401
    log_likelihood,
    make_policy,
    only,
    p_value,
    sentences,
    sparse_grammar,
    words_of,
)

pytestmark = pytest.mark.usefixtures("float64")

LENGTHS = [4, 2, 5, 3]

every_policy = pytest.mark.parametrize(
    "kind, latent, backward",
    [(kind, latent, backward) for kind in POLICIES for latent in LATENTS for backward in BACKWARDS],
)
every_backward = pytest.mark.parametrize(
    "latent, backward", [(latent, backward) for latent in LATENTS for backward in BACKWARDS]
)


GRAMMAR = oracle.random_grammar(3, 3)


def setting(
    kind: str, latent: Any, backward: str, lengths: list[int] = LENGTHS, noise: float = 0.3
) -> tuple[FixedModel, ForestPolicy, Sentences, ForestCondition]:
    model = FixedModel(GRAMMAR, latent)
    policy = make_policy(kind, latent, backward, noise=noise)
    x = sentences(lengths)
    return model, policy, x, policy.condition(model, x)


def some_trees(x: Sentences, latent: str, samples: int, seed: int = 0) -> Trees:
    generator = torch.Generator().manual_seed(seed)
    trees = Trees.random(x.lengths, samples, generator)
    if latent == "shape":
        return trees
    labels = torch.randint(3, trees.start.shape, generator=generator)
    labels = torch.where(trees.exists, labels, -1)
    return Trees(trees.start, trees.end, trees.lengths, labels)


def same_trees(one: Trees, other: Trees) -> bool:
    if (one.labels is None) != (other.labels is None):
        return False
    if one.labels is not None and other.labels is not None:
        same_labels = torch.equal(one.labels, other.labels)
    else:
        same_labels = True
    return torch.equal(one.start, other.start) and torch.equal(one.end, other.end) and same_labels


def orders(paths: Paths, index: int) -> list[tuple[int, ...]]:
    """The gaps of one sentence in the order in which each of its samples closed them."""
    samples, nodes = paths.z.start.shape[1], int(paths.z.lengths[index]) - 1
    rows = paths.record.gaps[index * samples : (index + 1) * samples, :nodes]
    return [tuple(row) for row in rows.tolist()]


def closed_form(trees: Trees, index: int, sample: int) -> float:
    """log P_B of any order when all orders are equally likely."""
    spans = trees.spans(index, sample)
    sizes = [j - i - 1 for i, j in spans]
    return sum(log(size) for size in sizes) - log(factorial(len(sizes)))


@every_policy
def test_rollouts_agree_with_the_model_and_their_weights_with_its_likelihood(
    kind, latent, backward
):
    model, policy, x, condition = setting(kind, latent, backward, noise=0.1)
    torch.manual_seed(0)
    samples = 4_000
    with torch.no_grad():
        paths = policy.sample(condition, samples)
        expected = model.log_joint(x, paths.z)
    assert (paths.z.labels is not None) == (latent == "labelled")
    assert paths.log_joint.shape == (len(x), samples)
    assert paths.log_forward.shape == paths.log_backward.shape == (max(LENGTHS), len(x), samples)
    torch.testing.assert_close(paths.log_joint, expected)
    # Behind the last merge all is certain.
    behind = torch.arange(max(LENGTHS))[:, None] >= x.lengths - 1
    assert (paths.log_forward[behind] == 0).all() and (paths.log_backward[behind] == 0).all()
    for index in range(len(x)):
        exact = oracle.log_partition(GRAMMAR, words_of(x, index))
        weights = (paths.log_weights[index] - exact).exp()
        error = float(weights.std()) / sqrt(samples)
        assert error < 0.08
        assert abs(float(weights.mean()) - 1) < 4 * error + 1e-9


@every_policy
def test_scores_with_and_without_gradients_are_the_same(kind, latent, backward):
    _, policy, x, condition = setting(kind, latent, backward)
    for roll in (
        lambda: policy.sample(condition, 5),
        lambda: policy.sample(condition, 5, Behaviour(temperature=2.0, epsilon=0.3)),
        lambda: policy.retrace(condition, some_trees(x, latent, 5)),
    ):
        torch.manual_seed(1)
        with_gradients = roll()
        torch.manual_seed(1)
        with torch.no_grad():
            without = roll()
        assert with_gradients.log_forward.requires_grad
        assert with_gradients.log_backward.requires_grad == (backward == "learned")
        assert not without.log_forward.requires_grad
        assert same_trees(with_gradients.z, without.z)
        assert torch.equal(with_gradients.record.gaps, without.record.gaps)
        torch.testing.assert_close(with_gradients.log_forward, without.log_forward)
        torch.testing.assert_close(with_gradients.log_backward, without.log_backward)


@every_policy
def test_gradients_are_those_of_finite_differences(kind, latent, backward):
    """Of log P_F, log P_B and the flows, along a random direction of all parameters."""
    model, policy, x, _ = setting(kind, latent, backward)
    z = some_trees(x, latent, 4)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, max(LENGTHS), len(x), 4, generator=generator)
    direction = [torch.randn(p.shape, generator=generator) for p in policy.parameters()]

    def value() -> Tensor:
        torch.manual_seed(2)
        paths = policy.retrace(policy.condition(model, x), z)
        flow = paths.flows()[0].unflatten(1, (len(x), 4))
        return (weights * torch.stack([paths.log_forward, paths.log_backward, flow])).sum()

    gradients = torch.autograd.grad(value(), list(policy.parameters()), allow_unused=True)
    slope = sum(
        float((gradient * along).sum())
        for gradient, along in zip(gradients, direction, strict=True)
        if gradient is not None
    )
    step = 1e-6

    def moved(by: float) -> float:
        with torch.no_grad():
            for parameter, along in zip(policy.parameters(), direction, strict=True):
                parameter += by * along
            return float(value())

    ahead, behind = moved(step), moved(-2 * step)
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-5)


@every_policy
def test_every_learned_part_gets_a_gradient(kind, latent, backward):
    _, policy, _, condition = setting(kind, latent, backward, [5, 4, 6])
    paths = policy.sample(condition, 16)
    weights = torch.randn(3, *paths.log_forward.shape)
    flow = paths.flows()[0].view_as(paths.log_forward)
    (weights * torch.stack([paths.log_forward, paths.log_backward, flow])).sum().backward()

    def layer(name: str) -> str:
        return name.removeprefix("encoder.").split(".")[0]

    learned = {
        layer(name)
        for name, parameter in policy.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() > 1e-9
    }
    unused = set() if backward == "learned" else {"backward_score"}
    # What may stand above a root is nothing to a context-free grammar.
    unused |= {"above"} if kind == "root_flow" else {"score", "word_score"}
    if kind == "transformer" and latent == "shape":
        unused |= {"name"}
    assert {layer(name) for name, _ in policy.named_parameters()} - learned == unused


@every_policy
def test_retraced_trajectories_end_in_the_given_trees(kind, latent, backward):
    model, policy, x, condition = setting(kind, latent, backward)
    z = some_trees(x, latent, 6)
    torch.manual_seed(3)
    paths = policy.retrace(condition, z)
    assert same_trees(paths.z, z)
    torch.testing.assert_close(paths.log_joint, model.log_joint(x, z).detach())
    env: Any = policy.trajectories(condition, paths).env
    for index, length in enumerate(LENGTHS):
        for order in orders(paths, index):
            assert sorted(order) == list(range(length - 1))
    assert env.n_actions == (max(LENGTHS) - 1) * policy.symbols + 1


@every_policy
def test_torchgfn_recomputes_the_same_probabilities_from_states_alone(kind, latent, backward):
    _, policy, x, condition = setting(kind, latent, backward)
    torch.manual_seed(4)
    for paths in (
        policy.sample(condition, 8),
        policy.sample(condition, 8, Behaviour(epsilon=0.5)),
        policy.retrace(condition, some_trees(x, latent, 8)),
    ):
        trajectories = policy.trajectories(condition, paths)
        log_pf, log_pb = get_trajectory_pfs_and_pbs(
            *policy.estimators(condition), trajectories, recalculate_all_logprobs=True
        )
        torch.testing.assert_close(log_pf, paths.log_forward.flatten(1))
        torch.testing.assert_close(log_pb, paths.log_backward.flatten(1))
        assert trajectories.log_probs is not None
        assert trajectories.log_probs.shape == log_pf.shape


@every_backward
def test_torchgfn_trajectories_are_steps_of_the_environment(latent, backward):
    _, policy, x, condition = setting("root_flow", latent, backward)
    paths = policy.sample(condition, 8)
    trajectories = policy.trajectories(condition, paths)
    env = trajectories.env
    env.debug = True
    assert torch.equal(trajectories.terminating_idx, x.lengths.repeat_interleave(8))
    assert trajectories.states.is_initial_state[0].all()
    assert trajectories.states.is_sink_state[-1].all()
    for step in range(trajectories.max_length):
        states, actions = trajectories.states[step], trajectories.actions[step]
        assert torch.equal(states.is_sink_state, actions.is_dummy)
        reached = env._step(states, actions)
        assert torch.equal(reached.tensor, trajectories.states[step + 1].tensor)
    assert trajectories.states.conditions is not None
    rows = torch.stack([torch.arange(len(x)), x.lengths], -1).repeat_interleave(8, 0)
    assert torch.equal(trajectories.states.conditions[0].long(), rows)
    torch.testing.assert_close(trajectories.log_rewards, paths.log_joint.flatten())


@every_backward
def test_backward_probabilities_of_all_merge_orders_sum_to_one(latent, backward):
    """And orders are drawn with these probabilities."""
    _, policy, x, condition = setting("root_flow", latent, backward, [6, 5, 4, 2])
    draws = 1_500
    for seed in range(3):
        one = some_trees(x, latent, 1, seed=seed + 5)
        chosen = torch.zeros(len(x), draws, dtype=torch.long)
        torch.manual_seed(seed)
        with torch.no_grad():
            paths = policy.retrace(condition, one.select(chosen))
        log_backward = paths.log_backward.sum(0)
        for index in range(len(x)):
            drawn = orders(paths, index)
            probability = {
                order: float(p) for order, p in zip(drawn, log_backward[index].exp(), strict=True)
            }
            sizes = [j - i - 1 for i, j in one.spans(index)]
            assert len(probability) == factorial(len(sizes)) // prod(sizes)
            assert sum(probability.values()) == pytest.approx(1)
            assert p_value(Counter(drawn), probability) > 1e-3
            uniform = closed_form(one, index, 0)
            if backward == "uniform":
                expected = torch.full((draws,), uniform)
                torch.testing.assert_close(log_backward[index], expected)
            elif len(probability) > 1:
                assert (log_backward[index] - uniform).abs().max() > 0.01


@every_policy
def test_other_sentences_of_a_batch_change_nothing(kind, latent, backward):
    """Whatever the merge order, which is drawn anew for each batch."""
    model, policy, x, together = setting(kind, latent, backward, [3, 6, 2, 5, 4])
    z = some_trees(x, latent, 3, seed=6)
    repeats = 24

    def values(condition: ForestCondition, z: Trees, index: int) -> dict[Any, list[float]]:
        samples = torch.arange(3).repeat(repeats).expand(len(z.lengths), -1)
        with torch.no_grad():
            paths = policy.retrace(condition, z.select(samples))
        nodes = int(z.lengths[index]) - 1
        flow, partial = (t.unflatten(1, samples.shape)[: nodes + 1, index] for t in paths.flows())
        columns = torch.cat(
            [
                paths.log_forward[: nodes + 1, index],
                paths.log_backward[: nodes + 1, index],
                flow,
                partial,
                paths.log_joint[None, index],
            ]
        )
        keys = zip(samples[index].tolist(), orders(paths, index), strict=True)
        return dict(zip(keys, columns.t().tolist(), strict=True))

    torch.manual_seed(5)
    compared = 0
    for index, length in enumerate(x.lengths.tolist()):
        alone = policy.condition(model, only(x, index))
        this = slice(index, index + 1), slice(None), slice(length - 1)
        labels = None if z.labels is None else z.labels[this]
        one = Trees(z.start[this], z.end[this], x.lengths[this[0]], labels)
        expected, found = values(alone, one, 0), values(together, z, index)
        for key in expected.keys() & found.keys():
            assert found[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-9)
            compared += 1
    assert compared > 5 * 3


@every_backward
def test_flows_are_sums_over_the_roots_of_a_state(latent, backward):
    model, policy, x, condition = setting("light", latent, backward)
    samples = 4
    paths = policy.sample(condition, samples)
    trajectories = policy.trajectories(condition, paths)
    node_scores, _ = model.inside_scores(model.potentials(x), paths.z)
    encoding, learned_and_partial = condition.encoding, paths.flows()
    for step in range(max(LENGTHS)):
        for row in range(len(x) * samples):
            index, sample = row // samples, row % samples
            length = LENGTHS[index]
            found = [float(t[step, row]) for t in learned_and_partial]
            if step >= length - 1:
                assert found == [0, pytest.approx(float(paths.log_joint[index, sample]))]
                continue
            fields = trajectories.states.tensor[step, row].view(-1, 3).tolist()
            nodes = {(i, j): (gap, label) for gap, (i, j, label) in enumerate(fields) if i >= 0}
            covered = [w for i, j in nodes for w in range(i, j)]
            roots = [
                (i, j)
                for i, j in nodes
                if not any(a <= i and j <= b and (a, b) != (i, j) for a, b in nodes)
            ]
            words = [w for w in range(length) if w not in covered]
            flow = sum(
                float(encoding.flow[index, encoding.index[i, j], nodes[i, j][1]]) for i, j in roots
            )
            flow += sum(float(encoding.word_flow[index, w]) for w in words)
            partial = sum(float(node_scores[index, sample, nodes[root][0]]) for root in roots)
            partial += sum(float(condition.potentials.log_word[index, w]) for w in words)
            assert found == pytest.approx([flow, partial])


@every_policy
def test_regrown_trajectories_part_where_they_should(kind, latent, backward):
    model, policy, x, condition = setting(kind, latent, backward)
    z = some_trees(x, latent, 200)
    for depth in (1, 2, 9):
        torch.manual_seed(depth)
        old, new = policy.regrow(condition, z, depth)
        torch.manual_seed(depth)
        with torch.no_grad():
            without = policy.regrow(condition, z, depth)
        assert same_trees(old.z, z) and same_trees(new.z, without[1].z)
        torch.testing.assert_close(old.log_forward, without[0].log_forward)
        torch.testing.assert_close(new.log_forward, without[1].log_forward)
        torch.testing.assert_close(new.log_joint, model.log_joint(x, new.z).detach())
        # A forest of two words or shapes has but one tree.
        assert same_trees(new.z, z) == (latent == "shape" and depth == 1)
        parting = (x.lengths - 1 - depth).clamp(min=0)
        step = torch.arange(max(LENGTHS))[:, None]
        kept = (step < parting) | (step >= x.lengths - 1)
        for paths in (old, new):
            assert (paths.log_forward[kept] == 0).all()
            assert (paths.log_backward[kept] == 0).all()
        # Both share the nodes that were made before they parted.
        for sample in range(200):
            shared = old.z.spans(2, sample) & new.z.spans(2, sample)
            assert len(shared) >= int(parting[2])


@every_backward
def test_regrown_scores_are_those_of_states_alone(latent, backward):
    """From the state on where the walked and the new trajectory part."""
    _, policy, x, condition = setting("transformer", latent, backward, [7, 2, 5, 6])
    z = some_trees(x, latent, 6)
    for depth in (1, 3, 9):
        parting = (x.lengths - 1 - depth).clamp(min=0)
        before = torch.arange(int(x.lengths.max()))[:, None, None] < parting[:, None]
        for paths in policy.regrow(condition, z, depth):
            log_pf, log_pb = get_trajectory_pfs_and_pbs(
                *policy.estimators(condition),
                policy.trajectories(condition, paths),
                recalculate_all_logprobs=True,
            )
            expected_pf = log_pf.view_as(paths.log_forward).masked_fill(before, 0.0)
            expected_pb = log_pb.view_as(paths.log_backward).masked_fill(before, 0.0)
            torch.testing.assert_close(paths.log_forward, expected_pf)
            torch.testing.assert_close(paths.log_backward, expected_pb)


@every_backward
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_regrown_scores_are_those_of_the_tempered_policy(latent, backward, temperature):
    """Against the probabilities at states alone, from the start, along all paths to each tree."""
    model, policy, _, condition = setting("root_flow", latent, backward, [4])
    samples = 3_000
    z = some_trees(sentences([4]), latent, 1).select(torch.zeros(1, samples, dtype=torch.long))
    torch.manual_seed(0)
    old, new = policy.regrow(condition, z, 3, temperature)
    env = policy.trajectories(condition, policy.sample(condition, 1)).env
    graph = StateGraph.of(env, 4)
    forward, backward_estimator = policy.estimators(condition)
    log_backward = graph.log_probabilities(backward_estimator)
    log_forward = graph.log_probabilities(forward, temperature)
    # log P_F and log P_B of every path to each state.
    paths_to: list[list[tuple[float, float]]] = [[(0.0, 0.0)]]
    for edges, log_pf, log_pb in zip(graph.edges, log_forward, log_backward, strict=True):
        source, _, target = (t.tolist() for t in edges)
        reached = [[] for _ in range(max(target) + 1)]
        for s, t, f, b in zip(source, target, log_pf.tolist(), log_pb.tolist(), strict=True):
            reached[t] += [(f + before, b + behind) for before, behind in paths_to[s]]
        paths_to = reached
    known = dict(zip(map(graph.tree, graph.levels[-1]), paths_to, strict=True))
    probability = {tree: sum(exp(f) for f, _ in paths) for tree, paths in known.items()}
    assert sum(probability.values()) == pytest.approx(1)
    assert p_value(count_trees(new.z, 0), probability) > 1e-3
    for paths in (old, new):
        scores = torch.stack([paths.log_forward.sum(0)[0], paths.log_backward.sum(0)[0]], -1)
        for sample in range(40):
            (tree,) = count_trees(paths.z.select(torch.tensor([[sample]])), 0)
            found = scores[sample].tolist()
            assert any(found == pytest.approx(list(path)) for path in known[tree])


@pytest.mark.parametrize("behaviour", [Behaviour(3.0), Behaviour(1.0, 0.4), Behaviour(0.5, 0.1)])
def test_behaviour_tempers_and_mixes_with_uniform_actions(behaviour):
    _, policy, _, condition = setting("light", "labelled", "uniform", [3])
    torch.manual_seed(0)
    with torch.no_grad():
        paths = policy.sample(condition, 10_000, behaviour)
    graph = StateGraph.of(policy.trajectories(condition, paths).env, 3)
    states = graph.states(0)
    forward, _ = policy.estimators(condition)
    logits = forward(states, states.conditions)[0, :-1].detach()
    plain = logits.log_softmax(-1)
    expected = (1 - behaviour.epsilon) * (logits / behaviour.temperature).softmax(-1)
    expected = expected + behaviour.epsilon / len(expected)
    first = paths.record.gaps[:, 0] * 3 + paths.record.labels[:, 0]
    counts = Counter(first.tolist())
    assert p_value(counts, dict(enumerate(expected.tolist()))) > 1e-3
    assert p_value(counts, dict(enumerate(plain.exp().tolist()))) < 1e-6
    # The scores stay those of the plain policy.
    torch.testing.assert_close(paths.log_forward[0, 0], plain[first])


@every_policy
def test_rules_and_words_of_probability_zero_give_numbers(kind, latent, backward):
    model = FixedModel(sparse_grammar(0), latent)
    policy = make_policy(kind, latent, backward)
    words = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 7, 2, 0], [3, 5, 2, 0, 0]])
    x = Sentences(words, torch.tensor([5, 4, 3]), torch.arange(3))
    paths = policy.sample(policy.condition(model, x), 16)
    assert paths.log_forward.isfinite().all() and paths.log_backward.isfinite().all()
    assert (paths.log_joint[1] == -torch.inf).all()  # word 7
    assert not paths.log_joint.isnan().any()
    torch.testing.assert_close(paths.log_joint, model.log_joint(x, paths.z).detach())
    paths.log_forward.sum().backward()
    for parameter in policy.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_encoder_runs_once_for_each_condition():
    model, policy, x, condition = setting("root_flow", "shape", "learned")
    calls = []
    policy.encoder.register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        policy.sample(condition, 2)
    paths = policy.sample(condition, 2)
    policy.trajectories(condition, paths)
    paths.flows()
    policy.regrow(condition, paths.z, 2)
    assert len(calls) == 1
    # Even when the first to ask wanted no gradients.
    assert paths.log_forward.requires_grad
    assert condition.encoding is condition.encoding


def test_selected_sentences_are_conditions_of_their_own():
    model, policy, x, condition = setting("root_flow", "shape", "learned")
    rows = torch.tensor([2, 0, 2])
    selected = condition.select(rows)
    assert torch.equal(selected.lengths, x.lengths[rows])
    torch.testing.assert_close(
        selected.potentials.two_words(), condition.potentials.two_words()[rows]
    )
    torch.testing.assert_close(selected.encoding.flow, condition.encoding.flow[rows])


def test_flow_parameters_are_those_of_the_flows():
    _, policy, _, condition = setting("light", "shape", "learned")
    paths = policy.sample(condition, 4)
    scores = paths.log_forward.sum() + paths.log_backward.square().sum()
    flows = policy.flow_parameters()
    of_scores = torch.autograd.grad(scores, flows, retain_graph=True, allow_unused=True)
    of_flows = torch.autograd.grad(paths.flows()[0].sum(), flows, allow_unused=True)
    assert all(gradient is None for gradient in of_scores)
    assert flows and all(gradient is not None for gradient in of_flows)


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("light", {"latent": "tree"}, "latent is 'tree'; use 'shape' or 'labelled'"),
        (
            "root_flow",
            {"backward": "tied"},
            "policy.backward is 'tied'; use 'uniform' or 'learned'",
        ),
        (
            "transformer",
            {"width": 10, "heads": 4},
            "policy.width=10 is not divisible by policy.heads=4",
        ),
    ],
)
def test_arguments_that_make_no_policy(kind, options, message):
    with pytest.raises(UserError, match=message):
        make_policy(kind, **{"latent": "shape", **options})


@pytest.mark.parametrize("kind", POLICIES)
def test_other_models_than_grammars_are_refused(kind):
    policy = make_policy(kind, "shape")
    message = f"{type(policy).__name__} builds the trees of a grammar, which DiscreteVAE is not"
    with pytest.raises(UserError, match=message):
        policy.check(make_vae())


@pytest.mark.parametrize("kind", POLICIES)
def test_the_table_has_every_shape(kind: str):
    """Short sentences are padded, and have fewer trees."""
    _, policy, x, condition = setting(kind, "shape", "uniform", noise=1.0)
    table = policy.tabulate(condition)
    assert not table.log_q.requires_grad
    env: Any = policy.trajectories(condition, policy.sample(condition, 1)).env
    forward: Any = policy.estimators(condition)[0]
    for row, length in enumerate(LENGTHS):
        log_joint: dict[Any, float] = oracle.enumerate_shapes(GRAMMAR, words_of(x, row))
        ends = StateGraph.of(env, length, row).ends(forward)
        expected = sorted((log_joint[tree], log(q)) for tree, q in ends.items())
        exists = table.log_q[row].isfinite()
        assert exists.equal(table.log_joint[row].isfinite())
        found = torch.stack([table.log_joint[row, exists], table.log_q[row, exists]], 1)
        torch.testing.assert_close(torch.tensor(sorted(found.tolist())), torch.tensor(expected))


def test_what_is_too_much_for_a_table_is_refused():
    _, policy, _, condition = setting("light", "labelled", "uniform")
    with pytest.raises(UserError, match="^latent=labelled has too many trees to list them all"):
        policy.tabulate(condition)
    _, policy, _, condition = setting("light", "shape", "uniform", [3, 7])
    message = "^sentences of 7 words have too many trees to list them all: use data.max_length=6$"
    with pytest.raises(UserError, match=message):
        policy.tabulate(condition)


@pytest.mark.parametrize("kind", POLICIES)
def test_sentences_longer_than_any_learned_from(kind):
    # Policies here are made for 8 words; weights of draws are p(x) on average at any length.
    model, policy, x, condition = setting(kind, "shape", "uniform", [11, 3], noise=0.1)
    paths = policy.sample(condition, 3000)
    log_weights = paths.log_joint + (paths.log_backward - paths.log_forward).sum(0)
    # Too many trees to list them.
    expected = log_likelihood(model, x).tolist()
    assert log_mean_exp(log_weights).tolist() == pytest.approx(expected, abs=0.05)
