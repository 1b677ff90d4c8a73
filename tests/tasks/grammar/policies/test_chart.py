from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from math import exp
from typing import Any

import pytest
import torch
from gfn.gflownet import LogPartitionVarianceGFlowNet
from gfn.samplers import Sampler
from gfn.utils.prob_calculations import get_trajectory_pfs_and_pbs

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.gflownet import objectives
from gfnem.gflownet.policy import Behaviour
from gfnem.gflownet.refinement import BackAndForth
from gfnem.inference import log_mean_exp
from gfnem.latents import Latents
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.networks import NeuralNCFG
from gfnem.tasks.grammar.policies.chart import ChartPolicy
from gfnem.tasks.grammar.rules.contexts import Contexts
from gfnem.tasks.grammar.rules.dense import DensePotentials
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.text.sources import toy_english
from gfnem.tasks.grammar.trees.tree import Trees
from gfnem.tasks.mixture.data import sampled
from gfnem.tasks.mixture.model import starting_at
from tests.tasks.grammar import oracle, parents_oracle
from tests.tasks.grammar.tiny import (
    LATENTS,
    FixedLowRank,
    FixedModel,
    count_trees,
    every_shape,
    float64,  # noqa: F401
    log_likelihood,
    p_value,
    sentences,
    words_of,
)

pytestmark = pytest.mark.usefixtures("float64")

NONTERMINALS = 2
GUIDES = ("relaxation", "exact", "none")


def cfg(latent: Any) -> FixedModel:
    return FixedModel(oracle.random_grammar(NONTERMINALS, 3), latent)


def ncfg(latent: Any, seed: int = 0, nonterminals: int = NONTERMINALS) -> FixedModel:
    grammar = parents_oracle.random_grammar(nonterminals, 3, seed=seed, temperature=0.5)
    return FixedModel(grammar, latent)


def low_rank_ncfg(latent: Any, seed: int = 0) -> FixedLowRank:
    grammar = parents_oracle.random_low_rank_grammar(NONTERMINALS, 3, 3, seed=seed)
    return FixedLowRank(grammar, latent)


def make_policy(latent: Any, guide: Any, noise: float = 0.3, seed: int = 0) -> ChartPolicy:
    torch.manual_seed(seed)
    # By default as few parents as these would all be told apart.
    clusters = 1 if guide == "relaxation" else None
    policy = ChartPolicy(NONTERMINALS, 3, 8, latent, guide, clusters, width=8)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += noise * torch.randn_like(parameter)
    return policy


def every_labelled(x: Sentences, nonterminals: int = NONTERMINALS) -> Trees:
    """All labelled trees of each sentence, repeated for the shorter ones."""
    trees = [list(oracle.labelled_trees(n, nonterminals)) for n in x.lengths.tolist()]
    most = max(map(len, trees))
    return oracle.to_trees([(some * most)[:most] for some in trees], x.lengths)


def q_of(policy: ChartPolicy, model: GrammarModel, x: Sentences) -> list[dict[Any, float]]:
    """P_F of every labelled tree of each sentence."""
    trees = every_labelled(x)
    log_q = policy.log_forward(policy.condition(model, x), trees).tolist()
    return [
        {
            oracle.tree_at(trees, index, sample): exp(value)
            for sample, value in enumerate(log_q[index])
        }
        for index in range(len(x))
    ]


@pytest.mark.parametrize("guide", GUIDES)
def test_probabilities_of_all_labelled_trees_sum_to_one(guide):
    x = sentences([4, 2, 5, 3])
    for q in q_of(make_policy("labelled", guide), ncfg("labelled"), x):
        assert sum(q.values()) == pytest.approx(1)
        assert min(q.values()) > 0


@pytest.mark.parametrize("guide", [{"guide": "exact"}, {"clusters": NONTERMINALS + 1}], ids=str)
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("latent", LATENTS)
def test_an_exact_guide_gives_the_posterior(latent, low_rank, guide):
    model = low_rank_ncfg(latent, seed=1) if low_rank else ncfg(latent, seed=1)
    grammar: Any = model.grammar()
    rules = parents_oracle.as_dense(grammar) if low_rank else grammar
    policy = ChartPolicy(NONTERMINALS, 3, 8, latent, **guide)
    x = sentences([4, 2, 5, 3])
    for index, q in enumerate(q_of(policy, model, x)):
        joint = parents_oracle.enumerate_labelled(rules, words_of(x, index))
        exact = oracle.posterior(joint)
        assert q == pytest.approx(exact, abs=1e-12)
    paths = policy.sample(policy.condition(model, x), 6)
    exact = log_likelihood(model, x)
    torch.testing.assert_close(paths.log_weights, exact[:, None].expand(-1, 6))
    torch.testing.assert_close(paths.log_joint, model.log_joint(x, paths.z))


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("latent", LATENTS)
def test_rules_of_low_rank_are_those_of_the_dense_grammar(latent, guide):
    model = low_rank_ncfg(latent, seed=1)
    dense = FixedModel(parents_oracle.as_dense(model.grammar()), latent)
    policy = make_policy(latent, guide)
    policy.usage += torch.rand_like(policy.usage)
    x = sentences([6, 2, 5, 3])
    trees = model.sample_posterior(x, 8)
    ours, theirs = (policy.retrace(policy.condition(one, x), trees) for one in (model, dense))
    if latent == "labelled":
        torch.testing.assert_close(ours.log_forward, theirs.log_forward)
        for one, other in zip(ours.flows(), theirs.flows(), strict=True):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(ours.log_joint, theirs.log_joint)


@pytest.mark.parametrize("guide", ["exact", "relaxation"])
@pytest.mark.parametrize("latent", LATENTS)
def test_a_context_free_grammar_is_its_own_relaxation(latent, guide):
    grammar = oracle.random_grammar(NONTERMINALS, 3, seed=1)
    model, policy = FixedModel(grammar, latent), ChartPolicy(NONTERMINALS, 3, 8, latent, guide)
    x = sentences([4, 2, 5, 3])
    trees = every_labelled(x)
    log_q = policy.log_forward(policy.condition(model, x), trees)
    for index in range(len(x)):
        exact = oracle.posterior(oracle.enumerate_labelled(grammar, words_of(x, index)))
        found = {
            oracle.tree_at(trees, index, s): exp(q) for s, q in enumerate(log_q[index].tolist())
        }
        assert found == pytest.approx(exact, abs=1e-12)
    paths = policy.sample(policy.condition(model, x), 6)
    exact = log_likelihood(model, x)
    torch.testing.assert_close(paths.log_weights, exact[:, None].expand(-1, 6))
    torch.testing.assert_close(paths.log_joint, model.log_joint(x, paths.z))
    flows, partial = paths.flows()
    torch.testing.assert_close((flows + partial)[0], exact.repeat_interleave(6))


def total_variation(
    policy: ChartPolicy, model: Any, x: Sentences, exact: dict[Any, float]
) -> float:
    """Between q(z | x) and p(z | x) of one sentence; q of a shape sums over all labellings."""
    trees = every_labelled(x, len(model.root))
    with torch.no_grad():
        log_q = policy.log_forward(policy.condition(model, x), trees)[0].tolist()
    q: dict[Any, float] = dict.fromkeys(exact, 0.0)
    for tree, value in {oracle.tree_at(trees, 0, s): v for s, v in enumerate(log_q)}.items():
        q[tree if policy.latent == "labelled" else oracle.shape_of(tree)] += exp(value)
    return sum(abs(q[z] - p) for z, p in exact.items()) / 2


@pytest.mark.parametrize(
    "kind, guide, latent, length, steps, lr",
    [
        ("ncfg", "relaxation", "shape", 5, 80, 0.02),
        ("ncfg", "relaxation", "labelled", 5, 120, 0.015),
        ("ncfg", "none", "shape", 4, 300, 0.01),
        ("pcfg", "none", "shape", 4, 60, 0.03),
        ("pcfg", "none", "labelled", 4, 60, 0.03),
    ],
)
def test_training_finds_the_posterior(kind, guide, latent, length, steps, lr):
    torch.manual_seed(0)
    x = sentences([length])
    if kind == "ncfg":
        model, of = ncfg(latent, seed=1, nonterminals=3), parents_oracle
    else:
        model, of = FixedModel(oracle.random_grammar(3, 3, seed=2), latent), oracle
    enumerate_trees = of.enumerate_labelled if latent == "labelled" else of.enumerate_shapes
    exact = oracle.posterior(enumerate_trees(model.grammar(), words_of(x, 0)))
    clusters = 1 if (kind, guide) == ("ncfg", "relaxation") else None
    policy = ChartPolicy(3, 3, 8, latent, guide, clusters, width=32)
    posterior = GFlowNetPosterior(policy, samples=64)
    optimizer = torch.optim.Adam(policy.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    before = total_variation(policy, model, x, exact)
    for _ in range(steps):
        loss = posterior.e_step(model, x).loss
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert before > 0.1
    assert total_variation(policy, model, x, exact) < 0.05


@pytest.mark.parametrize(
    "objective",
    [
        objectives.VarGrad(),
        objectives.TrajectoryBalance(),
        objectives.SubTrajectoryBalance(),
        objectives.DetailedBalance(forward_looking=True),
    ],
    ids=lambda objective: objective.name,
)
@pytest.mark.parametrize("latent", LATENTS)
def test_with_an_exact_guide_every_balance_holds(latent, objective):
    model = ncfg(latent, seed=2)
    policy = ChartPolicy(NONTERMINALS, 3, 8, latent, "exact")
    posterior = GFlowNetPosterior(policy, objective, samples=3)
    step = posterior.e_step(model, sentences([5, 5, 3, 2]))
    assert step.loss is not None and step.loss.item() == pytest.approx(0, abs=1e-18)
    with torch.no_grad():
        policy.encoder.score.bias.add_(torch.randn(NONTERMINALS * (NONTERMINALS + 2)))
        policy.encoder.flow["span"].bias += torch.randn(NONTERMINALS)  # pyright: ignore
    off = posterior.e_step(model, sentences([5, 5, 3, 2])).loss
    assert off is not None and off.item() > 1e-3
    off.backward()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("guide", GUIDES)
def test_draws_have_the_probabilities_of_the_policy(guide):
    model, policy = ncfg("labelled"), make_policy("labelled", guide, noise=0.5).eval()
    x = sentences([4, 2, 5])
    torch.manual_seed(0)
    z = policy.sample(policy.condition(model, x), 8_000).z
    for index, q in enumerate(q_of(policy, model, x)):
        assert p_value(count_trees(z, index), q) > 1e-3


def test_tempered_draws_have_tempered_probabilities_of_their_choices():
    model, policy = ncfg("labelled"), make_policy("labelled", "relaxation").eval()
    x = sentences([3])
    condition = policy.condition(model, x)
    trees = every_labelled(x)
    log_q = policy.retrace(condition, trees).log_forward[:2, 0]
    # Three words: a root, a split with one label, and two words without a choice.
    tempered = (log_q.detach() / 2).exp()
    labels = trees.labels
    assert labels is not None
    top = labels.gather(-1, trees.sizes.argmax(-1, keepdim=True)).flatten()
    expected = {}
    root = {int(a): float(tempered[0][top == a][0]) for a in top.unique()}
    for sample in range(trees.start.shape[1]):
        same = top == top[sample]
        share = root[int(top[sample])] / sum(root.values())
        split = float(tempered[1][sample] / tempered[1][same].sum())
        expected[oracle.tree_at(trees, 0, sample)] = share * split
    torch.manual_seed(0)
    z = policy.sample(condition, 8_000, Behaviour(temperature=2.0)).z
    assert p_value(count_trees(z, 0), expected) > 1e-3
    old, _ = policy.regrow(condition, trees, 3, temperature=2.0)
    found = {
        oracle.tree_at(trees, 0, sample): value
        for sample, value in enumerate(old.log_forward.sum(0)[0].exp().tolist())
    }
    assert found == pytest.approx(expected)
    z = policy.sample(condition, 8_000, Behaviour(epsilon=1.0)).z
    uniform = dict.fromkeys(expected, 1 / len(expected))
    assert p_value(count_trees(z, 0), uniform) > 1e-3


@pytest.mark.parametrize("latent", LATENTS)
def test_weights_are_unbiased_for_the_likelihood(latent):
    model, policy = ncfg(latent, seed=3), make_policy(latent, "relaxation")
    x = sentences([4, 3])
    trees = every_labelled(x)
    paths = policy.retrace(policy.condition(model, x), trees)
    exact = log_likelihood(model, x)
    for index in range(2):
        unique = {oracle.tree_at(trees, index, s): s for s in range(trees.start.shape[1])}
        rows = torch.tensor(list(unique.values()))
        log_q = paths.log_forward[:, index, rows].sum(0)
        total = (log_q + paths.log_weights[index, rows]).logsumexp(0)
        torch.testing.assert_close(total, exact[index])


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("guide", GUIDES)
def test_regrowing_leaves_the_posterior_invariant(latent, guide):
    """Back-and-forth moves of exact draws are exact draws."""
    model, policy = ncfg(latent, seed=4), make_policy(latent, guide, noise=0.5).eval()
    x = sentences([5])
    torch.manual_seed(0)
    z = model.sample_posterior(x, 6_000)
    moves = BackAndForth(steps=3, depth=4, temperature=1.5)
    moved = moves(policy, model, x, Latents(z, None)).z
    enumerate_trees = (
        parents_oracle.enumerate_labelled
        if latent == "labelled"
        else parents_oracle.enumerate_shapes
    )
    exact = oracle.posterior(enumerate_trees(model.grammar(), words_of(x, 0)))
    assert p_value(count_trees(moved, 0), exact) > 1e-3
    assert not torch.equal(moved.start, z.start)


def test_regrown_trees_keep_the_choices_before_they_part():
    model, policy = ncfg("labelled"), make_policy("labelled", "relaxation")
    x = sentences([6, 4])
    condition = policy.condition(model, x)
    z = policy.sample(condition, 50).z
    for depth in (1, 3, 6):
        old, new = policy.regrow(condition, z, depth)
        for index, length in enumerate((6, 4)):
            keep = max(length - depth, 0)
            before, after = (
                paths.record.unflatten(0, (2, 50))[index, :, :keep] for paths in (old, new)
            )
            assert torch.equal(before, after)
            assert (old.log_forward[:keep, index] == 0).all()
        assert (depth == 1) or not torch.equal(old.record, new.record)


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("make", [cfg, ncfg, low_rank_ncfg])
def test_torchgfn_recomputes_the_same_probabilities_from_states_alone(make, latent, guide):
    policy, x = make_policy(latent, guide), sentences([5, 3, 2])
    condition = policy.condition(make(latent), x)
    z = every_labelled(x) if latent == "labelled" else every_shape(x.lengths)
    for paths in (
        policy.sample(condition, 4),
        policy.sample(condition, 4, Behaviour(epsilon=0.5)),
        policy.retrace(condition, z),
    ):
        log_pf, log_pb = get_trajectory_pfs_and_pbs(
            *policy.estimators(condition),
            policy.trajectories(condition, paths),
            recalculate_all_logprobs=True,
        )
        torch.testing.assert_close(log_pf, paths.log_forward.flatten(1))
        torch.testing.assert_close(log_pb, paths.log_backward.flatten(1))


@pytest.mark.parametrize("latent", LATENTS)
def test_recomputed_scores_of_a_sentence_are_the_same_at_the_exact_posterior(latent):
    policy, x = ChartPolicy(NONTERMINALS, 3, 8, latent, "exact"), sentences([5, 3, 2])
    condition = policy.condition(ncfg(latent), x)
    trajectories = policy.trajectories(condition, policy.sample(condition, 8))
    stock = LogPartitionVarianceGFlowNet(*policy.estimators(condition))
    scores = stock.get_scores(trajectories, recalculate_all_logprobs=True)
    scores = scores.view(len(x), 8)
    torch.testing.assert_close(scores, scores[:, :1].expand(-1, 8))


def test_torchgfn_trajectories_are_steps_of_the_environment():
    policy, x = make_policy("labelled", "relaxation"), sentences([5, 3, 2])
    condition = policy.condition(ncfg("labelled"), x)
    trajectories = policy.trajectories(condition, policy.sample(condition, 4))
    env = trajectories.env
    env.debug = True
    assert trajectories.states.is_initial_state[0].all()
    assert trajectories.states.is_sink_state[-1].all()
    for step in range(trajectories.max_length):
        # Sentences whose trees are complete have left.
        live = ~trajectories.actions.is_dummy[step]
        assert torch.equal(live, step <= x.lengths.repeat_interleave(4))
        reached = env._step(trajectories.states[step][live], trajectories.actions[step][live])
        assert torch.equal(reached.tensor, trajectories.states[step + 1].tensor[live])


def test_torchgfn_s_sampler_draws_from_the_policy():
    model, policy = ncfg("labelled"), make_policy("labelled", "relaxation", noise=0.5)
    x = sentences([4, 3])
    condition = policy.condition(model, x)
    trees = every_labelled(x)
    paths = policy.retrace(condition, trees)
    env = policy.trajectories(condition, paths).env
    rows = torch.arange(2).repeat_interleave(4_000)
    conditions = torch.stack([rows, x.lengths[rows]], -1).double()
    start = env.reset(batch_shape=(len(rows),), conditions=conditions)
    torch.manual_seed(0)
    forward, _ = policy.estimators(condition)
    trajectories: Any = Sampler(forward).sample_trajectories(env, states=start)
    assert torch.equal(trajectories.terminating_idx, x.lengths[rows] + 1)
    # Behind the shorter sentence's nodes no choice is made.
    none = torch.arange(4) >= x.lengths[:, None, None]
    choices = paths.record.unflatten(0, (2, -1)).masked_fill(none, -1).tolist()
    q = paths.log_forward.sum(0).exp().tolist()
    for row in range(2):
        ends = trajectories.terminating_states.tensor[rows == row].tolist()
        probability = dict(zip(map(tuple, choices[row]), q[row], strict=True))
        assert p_value(Counter(map(tuple, ends)), probability) > 1e-3


def test_clusters_of_parents_with_equal_rules_give_the_posterior():
    model = ncfg("labelled", seed=1, nonterminals=3)
    with torch.no_grad():
        model.binary[2], model.binary[3] = model.binary[0], model.binary[1]
    policy, x = ChartPolicy(3, 3, 8, "labelled", clusters=2), sentences([6, 2, 5, 3, 4])
    policy.usage += torch.rand_like(policy.usage)
    paths = policy.sample(policy.condition(model, x), 16)
    first, second = policy.parents[:2].tolist()
    assert first != second
    assert policy.parents.tolist() == [first, second, first, second]
    exact = log_likelihood(model, x)
    torch.testing.assert_close(paths.log_weights, exact[:, None].expand(-1, 16))
    # More clusters than there are different parents.
    policy = ChartPolicy(3, 3, 8, "labelled", clusters=4)
    paths = policy.sample(policy.condition(model, x), 16)
    torch.testing.assert_close(paths.log_weights, exact[:, None].expand(-1, 16))


def test_more_clusters_come_closer_to_the_posterior():
    model, x = ncfg("labelled", seed=3, nonterminals=5), sentences([6, 7, 8])
    exact = log_likelihood(model, x)
    gaps = []
    for clusters in (1, 3, None):
        torch.manual_seed(0)
        policy = ChartPolicy(5, 3, 8, "labelled", clusters=clusters).eval()
        paths = policy.sample(policy.condition(model, x), 500)
        gaps.append((exact - paths.log_weights.mean(1)).mean().item())
    assert gaps[0] > gaps[1] > gaps[2] == pytest.approx(0, abs=1e-10)


def test_parents_are_clustered_anew_while_training():
    model, x = ncfg("labelled", seed=1, nonterminals=3), sentences([4, 3])
    policy = ChartPolicy(3, 3, 8, "labelled", clusters=2)
    policy.sample(policy.condition(model, x), 1)
    before = policy.parents.tolist()
    with torch.no_grad():
        apart = torch.tensor(before) == before[0]
        # Where one cluster was, let its first parent be like the other cluster's.
        other = int((~apart).nonzero()[0])
        model.binary[0] = model.binary[other]
    for _ in range(49):
        policy.sample(policy.condition(model, x), 1)
        assert policy.parents.tolist() == before
    policy.eval().sample(policy.condition(model, x), 1)
    assert policy.parents.tolist() == before
    policy.train().sample(policy.condition(model, x), 1)
    assert policy.parents[0] == policy.parents[other]


def test_parents_are_counted():
    model, x = ncfg("labelled"), sentences([2, 2])
    policy = ChartPolicy(NONTERMINALS, 3, 8, "labelled")
    z = policy.sample(policy.condition(model, x), 5).z
    assert z.labels is not None
    counts = z.labels.flatten().bincount(minlength=2).double()
    # Two words have a root alone, whose context is S.
    assert policy.usage.tolist() == [[0, 0, counts[0]], [0, 0, counts[1]]]
    policy.sample(policy.condition(model, x), 5)
    assert policy.usage.sum().item() == pytest.approx(0.95 * 10 + 10)
    policy.eval().sample(policy.condition(model, x), 5)
    assert policy.usage.sum().item() == pytest.approx(0.95 * 10 + 10)


def test_the_relaxation_averages_rules_over_the_parents_counted():
    model, x = ncfg("labelled", seed=5), sentences([6, 4])
    policy = ChartPolicy(NONTERMINALS, 3, 8, "labelled", clusters=1)
    policy.usage[:] = torch.tensor([[1e9, 0, 0], [0, 1e9, 0]])
    condition = policy.condition(model, x)
    p = condition.potentials
    assert isinstance(p, DensePotentials)
    own = torch.arange(2), torch.arange(2)
    only_own = replace(
        p,
        contexts=Contexts.none(2),
        rules=p.rules[own][:, None],
        left=p.left[:, own[0], own[1]][:, :, None],
        right=p.right[:, own[0], own[1]][:, :, None],
        both=p.both[:, :, own[0], own[1]][..., None],
    )
    chart = inside.inside_chart(only_own)
    vectors, scales = chart.messages.table(), chart.scales
    guide, sentence, context = condition.guide, torch.arange(2)[:, None], torch.arange(3)
    for width in (3, 6):
        start = torch.tensor(6 - width)
        torch.testing.assert_close(
            guide.scores(sentence, start, torch.tensor(width), context),
            vectors.by_start[start, :, width].expand(-1, 3, -1),
        )
        torch.testing.assert_close(
            guide.scales.by_start[start, :, width], scales.by_start[start, :, width]
        )
    # Two words are exact under each parent.
    two = guide.scores(sentence, torch.tensor(1), torch.tensor(2), context)
    two = two * guide.scales.by_start[1, :, 2, None, None].exp()
    torch.testing.assert_close(two, p.both[:, 1].mT)


def test_only_for_grammars():
    posterior = GFlowNetPosterior(ChartPolicy(2, 3, 8))
    message = "ChartPolicy reads the rules of a grammar, of which HierarchicalMixture has none"
    with pytest.raises(UserError, match=message):
        posterior.check(starting_at(sampled()))


def test_an_exact_guide_needs_a_grammar_of_moderate_size():
    posterior = GFlowNetPosterior(ChartPolicy(41, 3, 8, guide="exact"))
    model = NeuralNCFG(8, 41, 3, width=4)
    message = r"policy.guide=exact: this NeuralNCFG is too large for it \(model.nonterminals is 41"
    with pytest.raises(UserError, match=message):
        EM(model, posterior, toy_english(train_sentences=10), m_steps=1)


def test_clusters_need_rules_that_see_the_parent():
    posterior = GFlowNetPosterior(ChartPolicy(NONTERMINALS, 3, 8, clusters=2))
    message = "policy.clusters=2: rules of FixedModel see no parent; use policy.clusters=null"
    with pytest.raises(UserError, match=message):
        posterior.check(FixedModel(oracle.random_grammar(NONTERMINALS, 3)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"latent": "tree"}, "latent is 'tree'; use 'shape' or 'labelled'"),
        ({"guide": "best"}, "policy.guide is 'best'; use 'relaxation', 'exact' or 'none'"),
        ({"clusters": 4}, "policy.clusters is 4; it must be from 1 to 3, the number of parents"),
        ({"clusters": 0}, "policy.clusters is 0; it must be from 1 to 3"),
        (
            {"clusters": 2, "guide": "exact"},
            "policy.clusters=2 has no effect on policy.guide=exact",
        ),
    ],
)
def test_options_that_make_no_policy(options, message):
    with pytest.raises(UserError, match=message):
        ChartPolicy(2, 3, 8, **options)


@pytest.mark.parametrize("make", [cfg, ncfg, low_rank_ncfg])
@pytest.mark.parametrize("latent", LATENTS)
def test_m_steps_take_the_log_joint_of_the_e_step(latent: Any, make: Any):
    model, policy = make(latent), make_policy(latent, "relaxation")
    x = sentences([4, 5])
    latents = GFlowNetPosterior(policy, samples=3).e_step(model, x).latents
    assert latents is not None and latents.log_joint is not None
    again = model.log_joint(x, latents.z)
    torch.testing.assert_close(latents.log_joint, again)
    parameters = list(model.parameters())
    kept = torch.autograd.grad(latents.log_joint.sum(), parameters)
    for one, other in zip(kept, torch.autograd.grad(again.sum(), parameters), strict=True):
        torch.testing.assert_close(one, other)


def test_sentences_longer_than_any_learned_from():
    # The policy is made for 8 words; weights of draws are p(x) on average at any length.
    model, policy = cfg("shape"), make_policy("shape", "relaxation", noise=0.1)
    x = sentences([11, 3])
    paths = policy.sample(policy.condition(model, x), 3000)
    expected = log_likelihood(model, x).tolist()
    assert log_mean_exp(paths.log_weights).tolist() == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("correction", [50.0, -90.0, 300.0])
@pytest.mark.parametrize("latent", LATENTS)
def test_corrections_of_any_size(latent: Any, correction: float):
    """Added to what the encoder says of all spans: in single as in double precision."""
    model, policy = ncfg(latent), make_policy(latent, "relaxation", noise=0.3).eval()
    x = sentences([6, 4])
    trees = model.sample_labels(model.potentials(x), Trees.random(x.lengths, 3))
    found = []
    for one, q in ((model, policy), (deepcopy(model).float(), deepcopy(policy).float())):
        condition = q.condition(one, x)
        encoding = condition.encoding
        scores = encoding.scores.detach().clone().requires_grad_()
        moved = replace(encoding, scores=scores + correction)
        paths = q.retrace(replace(condition, encode=lambda moved=moved: moved), trees)
        (gradient,) = torch.autograd.grad(paths.log_forward.sum(), scores)
        found.append((paths.log_forward.double(), gradient.double()))
    for single, double in zip(*found, strict=True):
        assert double.isfinite().all()
        torch.testing.assert_close(single, double, rtol=1e-4, atol=1e-3)
