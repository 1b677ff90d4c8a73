"""Priors on tree shapes held to enumeration: energies, weighted posteriors, what is reported."""

from __future__ import annotations

from functools import partial
from math import exp, log
from typing import Any

import pytest
import torch
from gfn.utils.prob_calculations import get_trajectory_pfs_and_pbs

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.gflownet.objectives import VarGrad, sleep
from gfnem.posteriors.exact import ExactPosterior
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.posteriors.importance import ImportancePosterior
from gfnem.posteriors.mcmc import MCMC
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.networks import NeuralNCFG, NeuralPCFG
from gfnem.tasks.grammar.policies.chart import ChartPolicy
from gfnem.tasks.grammar.policies.moves import Rotations
from gfnem.tasks.grammar.policies.root_flow import RootFlowPolicy
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.trees.energy import (
    Depth,
    Imbalance,
    RecursiveNetwork,
    RightBranching,
    TreeEnergy,
)
from gfnem.tasks.grammar.trees.prior import TreePrior
from gfnem.tasks.grammar.trees.tree import Trees
from tests.tasks.grammar import oracle, parents_oracle
from tests.tasks.grammar.tiny import (
    LATENTS,
    POLICIES,
    FixedModel,
    count_trees,
    every_shape,
    float64,  # noqa: F401
    make_policy,
    p_value,
    sentences,
    total_variation,
    words_of,
)

pytestmark = pytest.mark.usefixtures("float64")

GRAMMAR = oracle.random_grammar(3, 3, temperature=0.7)
ENERGIES: dict[str, type[TreeEnergy]] = {
    "right_branching": RightBranching,
    "depth": Depth,
    "imbalance": Imbalance,
}


def by_hand(kind: str, shape: oracle.Shape, length: int) -> float:
    """The score of a tree, span by span."""
    if kind == "depth":
        words = range(length)
        return max(sum(i <= word < j for i, j in shape) for word in words)
    total = 0.0
    for i, k, j in oracle.splits(shape):
        if kind == "right_branching":
            total += k - i > 1
        else:
            total += abs((k - i) - (j - k)) / ((length - 1) / 2)
    return total


def weighted(
    kind: str, words: list[int], strength: float, grammar: DenseGrammar = GRAMMAR
) -> dict[oracle.Shape, float]:
    """log p(x, shape) - E of every shape."""
    return {
        shape: log_joint - strength * by_hand(kind, shape, len(words))
        for shape, log_joint in oracle.enumerate_shapes(grammar, words).items()
    }


def noisy_network() -> RecursiveNetwork:
    torch.manual_seed(0)
    network = RecursiveNetwork(width=4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn_like(parameter)
    return network


@pytest.mark.parametrize(
    "kind, left, right, balanced, mixed",
    [
        # ((((a b) c) d) e) ..., a (b (c (d e))) ..., (a b) (c d), (a (b c)) d
        ("right_branching", 2, 0, 1, 1),
        ("depth", 3, 3, 2, 3),
        ("imbalance", 2, 2, 0, 2),
    ],
)
def test_scores_of_hand_worked_trees(kind, left, right, balanced, mixed):
    shapes = [
        {(0, 2), (0, 3), (0, 4)},
        {(0, 4), (1, 4), (2, 4)},
        {(0, 4), (0, 2), (2, 4)},
        {(0, 4), (0, 3), (1, 3)},
    ]
    trees = oracle.to_trees([[frozenset(shape) for shape in shapes]], torch.tensor([4]))
    assert ENERGIES[kind]()(trees).tolist() == [[left, right, balanced, mixed]]


@pytest.mark.parametrize("kind", ENERGIES)
def test_scores_of_all_small_trees(kind):
    """In a batch of several lengths; a tree's height is also NLTK's."""
    lengths = torch.tensor([6, 2, 5, 4, 3])
    trees = every_shape(lengths)
    scores = ENERGIES[kind]()(trees)
    for row, length in enumerate(lengths.tolist()):
        for number in range(scores.shape[1]):
            expected = by_hand(kind, trees.spans(row, number), length)
            assert float(scores[row, number]) == pytest.approx(expected)
            if kind == "depth":
                height = trees.to_nltk(row, ["w"] * length, number).height()
                assert scores[row, number] == height - 1


def test_the_network_is_applied_from_the_words_to_the_root():
    lengths = torch.tensor([5, 2, 4])
    trees, network = every_shape(lengths), noisy_network()
    energies = network(trees)
    assert energies[0].unique().numel() > 7
    for row, length in enumerate(lengths.tolist()):
        for number in range(trees.start.shape[1]):

            def below(node, length=length) -> tuple[torch.Tensor, torch.Tensor]:
                if isinstance(node, str):
                    return network.word()[None], torch.zeros(1)
                (left, e_left), (right, e_right) = map(below, node)
                state, energy = network.node(left, right, torch.tensor([length]))
                return state, energy + e_left + e_right

            _, energy = below(trees.to_nltk(row, ["w"] * length, number))
            assert energies[row, number].allclose(energy)


def test_an_untrained_network_finds_all_trees_alike():
    assert not RecursiveNetwork()(every_shape(torch.tensor([5]))).any()


def test_strength_and_temperature():
    trees = every_shape(torch.tensor([5]))
    prior = TreePrior(Depth(), strength=-3.0, temperature=2.0)
    assert prior.log_weight(trees).equal(1.5 * Depth()(trees))


@pytest.mark.parametrize(
    "annealing, halfway", [("constant", None), ("linear", 2.5), ("exponential", 2.0)]
)
def test_temperature_follows_the_m_steps(annealing, halfway):
    ends = {} if annealing == "constant" else {"final_temperature": 1.0, "horizon": 10}
    model = FixedModel(GRAMMAR)
    model.tree_prior = TreePrior(Depth(), temperature=4.0, annealing=annealing, **ends)
    seen = []
    for m_steps in (0, 5, 10, 11):
        model.m_step_done(m_steps)
        seen.append(model.metrics()["prior/temperature"])
    last = 4.0 if annealing == "constant" else 1.0
    assert seen == pytest.approx([4.0, halfway or 4.0, last, last])
    model.m_step_done(5)
    again = FixedModel(GRAMMAR)
    again.tree_prior = TreePrior(Depth(), temperature=4.0, annealing=annealing, **ends)
    again.load_state_dict(model.state_dict())
    assert again.tree_prior.temperature == pytest.approx(halfway or 4.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "tree_prior.temperature is 0.0; it must be positive"),
        ({"final_temperature": -1.0}, "tree_prior.final_temperature is -1.0; it must be positive"),
        ({"annealing": "cosine"}, "tree_prior.annealing is 'cosine'; use 'constant', 'linear' or"),
        ({"horizon": 3}, "tree_prior.horizon is 3, which has no effect with annealing=constant"),
        (
            {"annealing": "linear", "horizon": 3},
            "tree_prior.annealing=linear needs tree_prior.final_temperature",
        ),
        (
            {"annealing": "linear", "horizon": 0, "final_temperature": 2.0},
            "tree_prior.horizon is 0; it must be at least 1 M-step",
        ),
    ],
)
def test_options_that_make_no_prior(options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        TreePrior(Depth(), **options)


@pytest.mark.parametrize("kind", ENERGIES)
def test_log_joint_is_that_of_enumeration(kind):
    model = FixedModel(GRAMMAR)
    model.tree_prior = TreePrior(ENERGIES[kind](), strength=0.7, temperature=0.5)
    x = sentences([6, 3, 2, 5])
    trees = every_shape(x.lengths)
    log_joint = model.log_joint(x, trees)
    for row in range(len(x)):
        expected = weighted(kind, words_of(x, row), 1.4)
        for number in range(trees.start.shape[1]):
            value = float(log_joint[row, number])
            assert value == pytest.approx(expected[trees.spans(row, number)], abs=1e-9)


def test_m_steps_climb_the_grammars_own_log_joint():
    x = sentences([5, 4])
    trees = Trees.random(x.lengths, 3)
    gradients = []
    for prior in (None, TreePrior(Imbalance(), strength=2.0)):
        model = FixedModel(GRAMMAR)
        model.tree_prior = prior
        model.log_joint(x, trees).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))


def test_exact_posteriors_and_sleep_phases_are_refused():
    """They are of the grammar alone."""
    model, x = FixedModel(GRAMMAR), sentences([3])
    model.tree_prior = TreePrior(Depth())
    for act in (
        lambda: EM(model, ExactPosterior(), Batch(x), 1),
        lambda: ExactPosterior().sample(model, x, 1),
    ):
        with pytest.raises(UserError, match="this FixedModel is not, because it has a tree"):
            act()
    policy = RootFlowPolicy(3, 3, 6, width=8)
    for posterior in (
        GFlowNetPosterior(policy, VarGrad(), sleep=0.1),
        GFlowNetPosterior(policy, sleep()),
    ):
        with pytest.raises(UserError, match="^a sleep phase needs a model that is normalised"):
            EM(model, posterior, Batch(x), 1)


@pytest.mark.parametrize("kind", [NeuralPCFG, NeuralNCFG])
def test_nothing_of_a_prior_is_learned_or_begun_anew(kind):
    network = noisy_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = sentences([4, 3])
    sizes = {"nonterminals": 2, "preterminals": 3, "width": 4, "max_length": 6}
    model = kind(vocabulary=8, tree_prior=TreePrior(network), **sizes)
    assert model.tree_prior.energy is network
    own = [p.clone() for p in model.parameters() if p.requires_grad]
    EM(model, MCMC(Rotations(), burn_in=2), Batch(x), 3).fit()
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())
    learned = [p for p in model.parameters() if p.requires_grad]
    assert not any(one.equal(other) for one, other in zip(own, learned, strict=True))
    assert model.metrics() == {"prior/temperature": 1.0}


def policies() -> list[Any]:
    forest = [
        (kind, latent, backward)
        for kind in POLICIES
        for latent, backward in (("shape", "uniform"), ("labelled", "learned"))
    ]
    return [*forest, *(("chart", latent, None) for latent in LATENTS)]


@pytest.mark.parametrize("kind, latent, backward", policies())
def test_every_policy_is_rewarded_with_the_weighted_log_joint(kind, latent, backward):
    model: GrammarModel
    policy: Any
    if kind == "chart":
        grammar = parents_oracle.random_grammar(2, 3, temperature=0.5)
        model = FixedModel(grammar, latent, TreePrior(RightBranching(), strength=1.5))
        policy = ChartPolicy(2, 3, 8, latent, clusters=1, width=8)
    else:
        model = FixedModel(GRAMMAR, latent)
        model.tree_prior = TreePrior(RightBranching(), strength=1.5)
        policy = make_policy(kind, latent, backward)
    x = sentences([5, 2, 4])
    condition = policy.condition(model, x)
    paths = policy.sample(condition, 8)
    expected = model.log_joint(x, paths.z)
    assert not expected.allclose(expected - model.log_prior_weight(paths.z))
    walked, regrown = policy.regrow(condition, paths.z, depth=2)
    for one in (paths, policy.retrace(condition, paths.z), walked, regrown):
        assert one.log_joint.allclose(model.log_joint(x, one.z))
    # Flows end in the reward, whatever has been fixed of it before.
    learned, fixed = paths.flows()
    assert (learned + fixed)[-1].allclose(expected.flatten())
    # Weights are those of the weighted sum over trees.
    if kind == "root_flow" and latent == "shape":
        many = policy.sample(condition, 4_000).log_weights.exp()
        for row in range(len(x)):
            total = sum(map(exp, weighted("right_branching", words_of(x, row), 1.5).values()))
            error = many[row].std() / many.shape[1] ** 0.5
            assert float(many[row].mean()) == pytest.approx(total, abs=4 * float(error) + 1e-12)


@pytest.mark.parametrize("latent", LATENTS)
def test_chains_have_the_weighted_posterior(latent):
    model, x = FixedModel(GRAMMAR, latent), sentences([5, 3, 2])
    model.tree_prior = TreePrior(Depth(), strength=1.0)
    torch.manual_seed(0)
    z = MCMC(Rotations(), 4_000, steps=10, burn_in=40).m_step_latents(model, x).z
    for row in range(len(x)):
        p = oracle.posterior(weighted("depth", words_of(x, row), 1.0))
        counts = count_trees(z.shapes(), row)
        assert p_value(counts, p) > 1e-3


def test_resampled_draws_of_the_grammar_have_the_weighted_posterior():
    model, x = FixedModel(GRAMMAR), sentences([5])
    model.tree_prior = TreePrior(Depth(), strength=-1.0)
    torch.manual_seed(0)
    z = ImportancePosterior(proposals=20_000).sample(model, x, 4_000).z
    p = oracle.posterior(weighted("depth", words_of(x, 0), -1.0))
    q = {shape: count / 4_000 for shape, count in count_trees(z, 0).items()}
    assert total_variation(q, p) < 0.05


class Batch:
    """The same sentences again and again."""

    def __init__(self, x):
        self.x = x

    def train_batches(self, epoch):
        return [self.x]


@pytest.mark.parametrize("kind", ["right_branching", "imbalance"])
def test_a_trained_gflownet_has_the_weighted_posterior(kind):
    torch.manual_seed(0)
    model, x = FixedModel(oracle.random_grammar(3, 3)), sentences([6, 5, 4, 6])
    model.tree_prior = TreePrior(ENERGIES[kind]())
    posterior = GFlowNetPosterior(RootFlowPolicy(3, 3, 6, width=32), VarGrad(), samples=32)
    optimizer = partial(torch.optim.Adam, lr=4e-2)
    EM(model, posterior, Batch(x), 0, max_e_steps=70, posterior_optimizer=optimizer).fit()
    posterior.eval()
    table = posterior.tabulate(model, x)
    assert table is not None
    for row in range(len(x)):
        p = weighted(kind, words_of(x, row), 1.0, model.grammar())
        log_sum = log(sum(map(exp, p.values())))
        assert float(table.log_joint[row].logsumexp(-1)) == pytest.approx(log_sum)
        difference = (table.log_joint[row] - log_sum).exp() - table.log_q[row].exp()
        assert float(difference.abs().sum()) / 2 < 0.05


@pytest.mark.parametrize("latent", LATENTS)
def test_root_flows_see_what_merges_add_to_the_energy(latent):
    """The same with gradients, without them and from states alone."""
    model = FixedModel(GRAMMAR, latent)
    policy = make_policy("root_flow", latent)
    x = sentences([5, 2, 4])
    network, log_forward, z = noisy_network(), [], None
    for strength in (0.0, 1.0):
        model.tree_prior = TreePrior(network, strength=strength)
        condition = policy.condition(model, x)
        torch.manual_seed(0)
        paths = policy.sample(condition, 6)
        torch.manual_seed(0)
        with torch.no_grad():
            same = policy.sample(condition, 6)
        assert same.log_forward.allclose(paths.log_forward)
        trajectories = policy.trajectories(condition, paths)
        pf, pb = policy.estimators(condition)
        recomputed, _ = get_trajectory_pfs_and_pbs(
            pf, pb, trajectories, recalculate_all_logprobs=True
        )
        assert recomputed.allclose(paths.log_forward.flatten(1))
        z = z or paths.z
        torch.manual_seed(0)
        log_forward.append(policy.log_forward(condition, z))
    assert not log_forward[0].allclose(log_forward[1])
