"""Policies over forests where rules see the parent; see `test_policy` for what is common."""

from __future__ import annotations

from functools import cache
from math import exp, log, sqrt
from typing import Any

import pytest
import torch
from gfn.utils.prob_calculations import get_trajectory_pfs_and_pbs
from torch import Tensor

from gfnem.gflownet.policy import Behaviour
from gfnem.gflownet.refinement import BackAndForth
from gfnem.latents import Latents
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.tasks.grammar.policies.env import LATER, Forest
from gfnem.tasks.grammar.policies.forest import ForestPolicy
from gfnem.tasks.grammar.policies.merges import ForestCondition
from gfnem.tasks.grammar.policies.root_flow import RootFlowPolicy
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.tree import Trees
from tests.tasks.grammar import oracle, parents_oracle
from tests.tasks.grammar.tiny import (
    LATENTS,
    POLICIES,
    FixedModel,
    StateGraph,
    count_trees,
    float64,  # noqa: F401
    make_policy,
    p_value,
    sentences,
    total_variation,
    words_of,
)

pytestmark = pytest.mark.usefixtures("float64")

LENGTHS = [4, 2, 5, 3]
NONTERMINALS = 3
GRAMMAR = parents_oracle.random_grammar(NONTERMINALS, 3, temperature=0.7)

every_policy = pytest.mark.parametrize(
    "kind, latent", [(kind, latent) for kind in POLICIES for latent in LATENTS]
)


def setting(
    kind: str, latent: Any, lengths: list[int] = LENGTHS, noise: float = 0.3, backward="uniform"
) -> tuple[FixedModel, ForestPolicy, Sentences, ForestCondition]:
    model = FixedModel(GRAMMAR, latent)
    policy = make_policy(kind, latent, backward, noise=noise)
    x = sentences(lengths)
    return model, policy, x, policy.condition(model, x)


@cache
def joint(words: tuple[int, ...], latent: str) -> dict[Any, float]:
    """log p(x, z) of every z."""
    if latent == "shape":
        return parents_oracle.enumerate_shapes(GRAMMAR, words)
    return parents_oracle.enumerate_labelled(GRAMMAR, words)


def under(context: int, label: int, grammar: DenseGrammar = GRAMMAR) -> DenseGrammar:
    """The same rules for whole sentences with this label, as if this context stood above them."""
    root = torch.full_like(grammar.root, -torch.inf)
    root[label] = 0
    binary = torch.cat([grammar.binary[:-1], grammar.binary[context, None]])
    return DenseGrammar(root, binary, grammar.emission)


@cache
def span_score(words: tuple[int, ...], context: int, label: int, tree: Any) -> float:
    """log p(words, tree below | label, context); a labelled tree has its top label, too."""
    grammar = under(context, label)
    if all(len(node) == 2 for node in tree):
        return parents_oracle.enumerate_shapes(grammar, words)[tree]
    return oracle.log_or_inf(parents_oracle.Rules(grammar).joint(words, tree))


@every_policy
def test_rollouts_agree_with_the_model_and_their_weights_with_enumeration(kind, latent):
    backward = "learned" if kind == "light" else "uniform"
    model, policy, x, condition = setting(kind, latent, noise=0.1, backward=backward)
    torch.manual_seed(0)
    samples = 4_000
    with torch.no_grad():
        paths = policy.sample(condition, samples)
        expected = model.log_joint(x, paths.z)
    assert (paths.z.labels is not None) == (latent == "labelled")
    torch.testing.assert_close(paths.log_joint, expected)
    for index in range(len(x)):
        words = tuple(words_of(x, index))
        exact = log(sum(map(exp, joint(words, "labelled").values())))
        weights = (paths.log_weights[index] - exact).exp()
        error = float(weights.std()) / sqrt(samples)
        assert error < 0.15
        assert abs(float(weights.mean()) - 1) < 4 * error + 1e-9


@every_policy
def test_scores_are_those_of_states_alone_with_and_without_gradients(kind, latent):
    _, policy, x, condition = setting(kind, latent)
    z = Trees.random(x.lengths, 5, torch.Generator().manual_seed(0))
    if latent == "labelled":
        labels = torch.randint(NONTERMINALS, z.start.shape)
        z = Trees(z.start, z.end, z.lengths, torch.where(z.exists, labels, -1))
    for roll in (
        lambda: policy.sample(condition, 5, Behaviour(epsilon=0.3)),
        lambda: policy.retrace(condition, z),
    ):
        torch.manual_seed(1)
        paths = roll()
        torch.manual_seed(1)
        with torch.no_grad():
            without = roll()
        torch.testing.assert_close(paths.log_forward, without.log_forward)
        log_pf, log_pb = get_trajectory_pfs_and_pbs(
            *policy.estimators(condition),
            policy.trajectories(condition, paths),
            recalculate_all_logprobs=True,
        )
        torch.testing.assert_close(log_pf, paths.log_forward.flatten(1))
        torch.testing.assert_close(log_pb, paths.log_backward.flatten(1))


@pytest.mark.parametrize("latent", LATENTS)
def test_gradients_are_those_of_finite_differences(latent):
    """Of a root flow's log P_F, along a random direction of all parameters."""
    model, policy, x, _ = setting("root_flow", latent)
    generator = torch.Generator().manual_seed(0)
    z = policy.sample(policy.condition(model, x), 4).z
    weights = torch.randn(max(LENGTHS), len(x), 4, generator=generator)
    direction = [torch.randn(p.shape, generator=generator) for p in policy.parameters()]

    def value() -> Tensor:
        torch.manual_seed(2)
        return (weights * policy.retrace(policy.condition(model, x), z).log_forward).sum()

    parameters = dict(policy.named_parameters())
    gradients = torch.autograd.grad(value(), list(parameters.values()), allow_unused=True)
    found = dict(zip(parameters, gradients, strict=True))
    assert found["above.weight"] is not None and found["above.weight"].abs().max() > 1e-6
    slope = sum(
        float((gradient * along).sum())
        for gradient, along in zip(gradients, direction, strict=True)
        if gradient is not None
    )

    def moved(by: float) -> float:
        with torch.no_grad():
            for parameter, along in zip(parameters.values(), direction, strict=True):
                parameter += by * along
            return float(value())

    ahead, behind = moved(1e-6), moved(-2e-6)
    assert slope == pytest.approx((ahead - behind) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("labelled", [False, True])
def test_messages_of_a_forest_are_those_of_enumeration(labelled):
    """Along random merge orders, of every node that was made or may be made next."""
    x = sentences([4, 3, 2], seed=3)
    samples = 3
    forest = Forest(GRAMMAR.potentials(x.words, x.lengths), samples, labelled)
    generator = torch.Generator().manual_seed(0)
    for _ in range(forest.steps + 1):
        for row in range(len(forest.rows)):
            sentence = words_of(x, row // samples)
            span = torch.stack([forest.start[row], forest.end[row], forest.labels[row]], -1)
            span = span[: len(sentence) - 1].tolist()
            made = (forest.time[row] != LATER).tolist()
            for gap, (start, end, own) in enumerate(span):
                below = {
                    (i - start, j - start, *([a] if labelled else []))
                    for other, (i, j, a) in enumerate(span)
                    if other != gap and made[other] and start <= i and j <= end
                }
                value = forest.message[row, gap].log() + forest.log_scale[row, gap]
                assert value.shape == (NONTERMINALS + 1, NONTERMINALS)
                for label in range(NONTERMINALS):
                    if labelled and made[gap] and label != own:
                        assert (value[:, label] == -torch.inf).all()
                        continue
                    top = (0, end - start, *([label] if labelled else []))
                    tree = frozenset(below | {top})
                    expected = [
                        span_score(tuple(sentence[start:end]), context, label, tree)
                        for context in range(NONTERMINALS + 1)
                    ]
                    assert value[:, label].tolist() == pytest.approx(expected, abs=1e-9)
        gap = torch.multinomial(forest.open.double(), 1, generator=generator).squeeze(1)
        label = torch.randint(NONTERMINALS, gap.shape, generator=generator)
        forest.merge(gap, label if labelled else None)
    assert forest.open[:, forest.exit].all()


def partial_score(words: list[int], made: Any) -> float:
    """What a forest of these nodes, spans with or without labels, has fixed of log p(x, z)."""
    emission = GRAMMAR.emission[:, :, words]
    log_word = emission.exp().mean((0, 1)).log().tolist()
    free, total = set(range(len(words))), 0.0
    for i, j, *_ in made:
        if any((a, b) != (i, j) and a <= i and j <= b for a, b, *_ in made):
            continue
        free -= set(range(i, j))
        inner = tuple(words[i:j])
        tree = frozenset((a - i, b - i, *label) for a, b, *label in made if i <= a and b <= j)
        if len(next(iter(tree))) == 2:
            over = [(context, label) for context in range(3) for label in range(3)]
            total += log(sum(exp(span_score(inner, *pair, tree)) for pair in over) / NONTERMINALS)
            continue
        # Words whose rule is open have their scales alone.
        scale = dict(enumerate(emission.amax((0, 1))[i:j].tolist()))
        for context, _, ways in parents_oracle.Rules(GRAMMAR).nodes(inner, tree):
            if context < NONTERMINALS:
                total += log(sum(p for *_, p in ways))
                scale = {word: value for word, value in scale.items() if word not in ways[0][2]}
        total += sum(scale.values())
    return total + sum(log_word[word] for word in free)


@pytest.mark.parametrize("latent", LATENTS)
def test_partial_scores_are_those_of_enumeration(latent):
    """A rule counts when its parent is known; of shapes, a mean over what may stand above."""
    _, policy, x, condition = setting("light", latent, [5, 2, 4])
    samples = 6
    torch.manual_seed(0)
    paths = policy.sample(condition, samples)
    states = policy.trajectories(condition, paths).states.tensor.unflatten(1, (len(x), samples))
    partial = paths.flows()[1].unflatten(1, (len(x), samples))
    for index in range(len(x)):
        words = words_of(x, index)
        for sample in range(samples):
            for step in range(len(words) - 1):
                fields = states[step, index, sample].view(-1, 3).tolist()
                size = 2 if latent == "shape" else 3
                made = [tuple(node[:size]) for node in fields if node[0] >= 0]
                expected = partial_score(words, made)
                assert float(partial[step, index, sample]) == pytest.approx(expected)
            (tree,) = count_trees(paths.z.select(torch.full((len(x), 1), sample)), index)
            complete = partial[len(words) - 1 :, index, sample].tolist()
            assert complete == pytest.approx([joint(tuple(words), latent)[tree]] * len(complete))


@every_policy
def test_regrowing_leaves_the_posterior_invariant(kind, latent):
    """Back-and-forth moves of exact draws are exact draws, whatever context they change."""
    model, policy, _, _ = setting(kind, latent)
    x = sentences([4])
    torch.manual_seed(0)
    z = model.sample_posterior(x, 4_000)
    condition = policy.condition(model, x)
    for paths in policy.regrow(condition, z, 2, temperature=1.5):
        torch.testing.assert_close(paths.log_joint, model.log_joint(x, paths.z).detach())
    moved = BackAndForth(steps=3, depth=3, temperature=1.5)(policy, model, x, Latents(z, None)).z
    assert not torch.equal(moved.start, z.start)
    exact = oracle.posterior(joint(tuple(words_of(x, 0)), latent))
    assert p_value(count_trees(moved, 0), exact) > 1e-3


@pytest.mark.parametrize("latent", LATENTS)
def test_a_trained_root_flow_is_the_posterior_of_enumeration(latent):
    lengths, nonterminals = ([5, 4], 3) if latent == "shape" else ([4, 4], 2)
    grammar = parents_oracle.random_grammar(nonterminals, 3, seed=2, temperature=0.5)
    model, x = FixedModel(grammar, latent), sentences(lengths, seed=2)
    policy = make_policy("root_flow", latent, nonterminals=nonterminals, noise=0.1, width=16)
    posterior = GFlowNetPosterior(policy, samples=64)
    enumerate_trees = (
        parents_oracle.enumerate_shapes if latent == "shape" else parents_oracle.enumerate_labelled
    )
    exact = [
        oracle.posterior(enumerate_trees(grammar, words_of(x, row))) for row in range(len(lengths))
    ]

    def distances() -> list[float]:
        condition = policy.condition(model, x)
        env = policy.trajectories(condition, policy.sample(condition, 1)).env
        forward: Any = policy.estimators(condition)[0]
        return [
            total_variation(StateGraph.of(env, length, row).ends(forward), exact[row])
            for row, length in enumerate(lengths)
        ]

    assert min(distances()) > 0.1
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.025)
    steps = 140
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = posterior.e_step(model, x).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        decay.step()
    assert max(distances()) < 0.05


@every_policy
def test_rules_of_probability_zero_give_numbers(kind, latent):
    generator = torch.Generator().manual_seed(0)

    def thin(log_probability: Tensor) -> Tensor:
        kept = torch.rand(log_probability.shape, generator=generator) < 0.5
        return torch.where(kept, log_probability, -torch.inf)

    emission = GRAMMAR.emission.clone()
    emission[..., -1] = -torch.inf
    model = FixedModel(DenseGrammar(GRAMMAR.root, thin(GRAMMAR.binary), thin(emission)), latent)
    policy = make_policy(kind, latent)
    words = torch.tensor([[0, 1, 2, 3, 4], [1, 0, 7, 2, 0]])
    x = Sentences(words, torch.tensor([5, 4]), torch.arange(2))
    paths = policy.sample(policy.condition(model, x), 16)
    assert paths.log_forward.isfinite().all() and not paths.log_joint.isnan().any()
    assert (paths.log_joint[1] == -torch.inf).all()  # word 7
    torch.testing.assert_close(paths.log_joint, model.log_joint(x, paths.z).detach())
    paths.log_forward.sum().backward()
    for parameter in policy.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_equal_weights_are_what_nothing_learned_gives():
    """A root flow that has learned nothing merges by means over what may stand above."""
    model, x = FixedModel(GRAMMAR), sentences([5, 4])
    policy = RootFlowPolicy(NONTERMINALS, 3, 8)
    condition = policy.condition(model, x)
    forest = Forest(condition.potentials, 2, labelled=False)
    logits = policy.scores(condition, forest).logits(None).squeeze(-1)
    for row in range(4):
        words = words_of(x, row // 2)
        log_word = GRAMMAR.emission[:, :, words].exp().mean((0, 1)).log().tolist()
        for gap in range(len(words) - 1):
            total = sum(
                exp(span_score(tuple(words[gap : gap + 2]), context, label, frozenset({(0, 2)})))
                for context in range(NONTERMINALS)
                for label in range(NONTERMINALS)
            )
            expected = log(total / NONTERMINALS) - sum(log_word[gap : gap + 2])
            assert logits[row, gap].item() == pytest.approx(expected)
