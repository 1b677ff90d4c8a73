from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from gfn.containers import Trajectories
from gfn.estimators import ConditionalLogZEstimator
from gfn.gflownet import LogPartitionVarianceGFlowNet, TBGFlowNet
from torch import Tensor, nn

from gfnem.errors import UserError
from gfnem.gflownet.objectives import (
    DetailedBalance,
    ForwardKL,
    ReverseKL,
    SubTrajectoryBalance,
    TrajectoryBalance,
    VarGrad,
    WeightedSum,
    sleep,
    weighted_sum,
)
from gfnem.gflownet.paths import Paths
from gfnem.gflownet.policy import Behaviour
from gfnem.gflownet.refinement import BackAndForth
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.tasks.grammar.policies.chart import ChartPolicy
from gfnem.tasks.grammar.policies.forest import ForestPolicy
from gfnem.tasks.grammar.policies.merges import ForestCondition
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.tree import Trees
from gfnem.training.trainer import Trainer
from tests.tasks.discrete_vae import tiny as tiny_images
from tests.tasks.grammar import oracle
from tests.tasks.grammar.tiny import (
    BACKWARDS,
    LATENTS,
    POLICIES,
    PRETERMINALS,
    FixedModel,
    StateGraph,
    enumerate_trees,
    float64,  # noqa: F401
    make_policy,
    only,
    sentences,
    words_of,
)
from tests.tasks.mixture import tiny as tiny_mixture

pytestmark = pytest.mark.usefixtures("float64")

LENGTHS = [4, 2, 5, 3]
GRAMMAR = oracle.random_grammar(2, 3, temperature=0.6)

every_backward = pytest.mark.parametrize(
    "latent, backward", [(latent, backward) for latent in LATENTS for backward in BACKWARDS]
)


class Setting:
    """Trajectories of sentences of different length in one batch, and their exact flows."""

    def __init__(self, latent: Any = "shape", backward: str = "uniform"):
        self.x: Sentences = sentences(LENGTHS)
        self.policy: ForestPolicy = make_policy("root_flow", latent, backward, nonterminals=2)
        self.condition: ForestCondition = self.policy.condition(FixedModel(GRAMMAR, latent), self.x)
        torch.manual_seed(0)
        self.paths: Paths = self.policy.sample(self.condition, 6)
        self.log_z = torch.tensor(
            [oracle.log_partition(GRAMMAR, words_of(self.x, i)) for i in range(len(self.x))]
        )
        self.estimators = self.policy.estimators(self.condition)
        states = self.trajectories(self.paths)
        exact = [
            StateGraph.of(states.env, length, row).log_flows(
                enumerate_trees(GRAMMAR, words_of(self.x, row), latent), self.estimators[1]
            )
            for row, length in enumerate(LENGTHS)
        ]
        rows = self.x.lengths.repeat_interleave(6)
        flows = [
            [exact[row // 6].get(tuple(state), 0.0) for row, state in enumerate(step)]
            for step in states.states.tensor[:-1].tolist()
        ]
        self.log_flow = torch.tensor(flows)
        # P_F of the exact flows.
        step = torch.arange(max(LENGTHS))[:, None]
        difference = self.log_flow.roll(-1, 0) - self.log_flow
        log_forward = difference + self.paths.log_backward.flatten(1)
        log_forward = torch.where(step < rows - 1, log_forward, 0.0)
        self.exact = replace(
            self.paths,
            log_forward=log_forward.unflatten(1, (-1, 6)),
            flows=lambda: self.split(self.log_flow),
        )

    def split(self, log_flow: Tensor) -> tuple[Tensor, Tensor]:
        """Log flows as a learned part and the part that the policy says is fixed."""
        _, partial = self.paths.flows()
        step = torch.arange(max(LENGTHS))[:, None]
        complete = step >= self.x.lengths.repeat_interleave(6) - 1
        return torch.where(complete, 0.0, log_flow - partial), partial

    def without_partial_rewards(self) -> Paths:
        """The exact trajectories, with all of their flows learned but the complete states'."""
        learned, partial = self.exact.flows()
        step = torch.arange(max(LENGTHS))[:, None]
        complete = step >= self.x.lengths.repeat_interleave(6) - 1
        flows = torch.where(complete, 0.0, learned + partial), partial
        return replace(self.exact, flows=lambda: flows)

    def trajectories(self, paths: Paths) -> Trajectories:
        return self.policy.trajectories(self.condition, paths)


@every_backward
def test_vargrad_is_zero_at_the_exact_posterior_of_mixed_sentences(latent, backward):
    setting = Setting(latent, backward)
    torch.testing.assert_close(
        setting.exact.log_weights, setting.log_z[:, None].expand(-1, 6), rtol=0, atol=1e-9
    )
    assert float(VarGrad()(setting.exact)) < 1e-18
    # torchgfn's own objective takes one mean over all sentences.
    stock = LogPartitionVarianceGFlowNet(*setting.estimators)
    trajectories = setting.trajectories(setting.exact)
    loss = stock.loss(trajectories.env, trajectories, recalculate_all_logprobs=False)
    expected = setting.log_z.repeat_interleave(6).var(unbiased=False)
    assert float(loss) == pytest.approx(float(expected))
    assert float(loss) > 1


def test_vargrad_is_the_variance_within_each_sentence():
    setting = Setting()
    variances = setting.paths.log_weights.detach().var(-1, unbiased=False)
    assert variances.min() >= 0 and variances.max() > 0.1
    assert float(VarGrad()(setting.paths)) == pytest.approx(float(variances.mean()))


@every_backward
def test_trajectory_balance_is_zero_at_the_exact_posterior(latent, backward):
    setting = Setting(latent, backward)
    assert float(TrajectoryBalance()(setting.exact)) < 1e-18
    first = setting.exact.flows()
    torch.testing.assert_close(
        (first[0] + first[1])[0], setting.log_z.repeat_interleave(6), rtol=0, atol=1e-9
    )
    # Every log Z(x) is its own sentence's: one that is off by 1 costs 1 squared.
    off = setting.log_flow.clone()
    off[0, :6] += 1
    paths = replace(setting.exact, flows=lambda: setting.split(off))
    assert float(TrajectoryBalance()(paths)) == pytest.approx(1 / len(LENGTHS))


def test_trajectory_balance_is_the_squared_difference():
    setting = Setting()
    learned, partial = (flow.detach() for flow in setting.paths.flows())
    log_z = (learned + partial)[0].view(len(LENGTHS), 6)
    expected = (log_z - setting.paths.log_weights.detach()).square().mean()
    assert float(TrajectoryBalance()(setting.paths)) == pytest.approx(float(expected))


@every_backward
@pytest.mark.parametrize("forward_looking", [True, False])
def test_subtrajectory_balance_is_zero_with_exact_flows(latent, backward, forward_looking):
    setting = Setting(latent, backward)
    exact = setting.exact if forward_looking else setting.without_partial_rewards()

    objective = SubTrajectoryBalance(forward_looking=forward_looking)
    assert float(objective(exact)) < 1e-18
    # One wrong flow of a state in the middle is noticed, as is every wrong probability.
    learned, partial = exact.flows()
    wrong = learned.clone()
    wrong[1, 0] += 1
    assert float(objective(replace(exact, flows=lambda: (wrong, partial)))) > 1e-3
    log_forward = exact.log_forward.clone()
    log_forward[1, 2, 0] += 1
    assert float(objective(replace(exact, log_forward=log_forward))) > 1e-3


@pytest.mark.parametrize("lamda", [0.5, 0.9])
@pytest.mark.parametrize("forward_looking", [True, False])
def test_subtrajectory_balance_weighs_all_subtrajectories(lamda, forward_looking):
    """Written out: lambda^steps, normalised within each trajectory; the mean over trajectories."""
    setting = Setting("shape", "learned")
    paths = setting.paths
    learned, partial = (flow.detach() for flow in paths.flows())
    log_p = (paths.log_forward - paths.log_backward).detach().flatten(1)
    total = 0.0
    for row in range(learned.shape[1]):
        length = LENGTHS[row // 6]
        flow = [
            float(learned[step, row] + (partial[step, row] if forward_looking else 0.0))
            for step in range(length - 1)
        ]
        end = float(paths.log_joint.flatten()[row])
        # The complete tree and the sink behind it both have the flow p(x, z).
        flow += [end, end]
        weights, losses = [], []
        for i in range(length + 1):
            for j in range(i + 1, length + 1):
                balance = flow[i] + float(log_p[i:j, row].sum()) - flow[j]
                weights.append(lamda ** (j - i))
                losses.append(lamda ** (j - i) * balance**2)
        total += sum(losses) / sum(weights)

    objective = SubTrajectoryBalance(lamda=lamda, forward_looking=forward_looking)
    assert float(objective(paths)) == pytest.approx(total / learned.shape[1])


@every_backward
@pytest.mark.parametrize("forward_looking", [False, True])
def test_detailed_balance_is_zero_with_exact_flows(latent, backward, forward_looking):
    setting = Setting(latent, backward)
    exact = setting.exact if forward_looking else setting.without_partial_rewards()
    objective = DetailedBalance(forward_looking=forward_looking)
    assert float(objective(exact)) < 1e-18
    # A wrong flow costs 1 on its way in and on its way out, a wrong probability once.
    transitions = 6 * sum(LENGTHS)
    learned, partial = exact.flows()
    wrong = learned.clone()
    wrong[1, 0] += 1
    wrong_flows = replace(exact, flows=lambda: (wrong, partial))
    assert float(objective(wrong_flows)) == pytest.approx(2 / transitions)
    log_forward = exact.log_forward.clone()
    log_forward[1, 2, 0] += 1
    wrong_forward = replace(exact, log_forward=log_forward)
    assert float(objective(wrong_forward)) == pytest.approx(1 / transitions)


@pytest.mark.parametrize("forward_looking", [False, True])
def test_detailed_balance_is_the_mean_over_all_transitions(forward_looking):
    """Written out, with the sum of all sentences' transitions in the denominator."""
    setting = Setting("shape", "learned")
    paths = setting.paths
    learned, partial = (flow.detach() for flow in paths.flows())
    log_p = (paths.log_forward - paths.log_backward).detach().flatten(1)
    squares = []
    for row in range(learned.shape[1]):
        length = LENGTHS[row // 6]
        flow = [
            float(learned[step, row] + (partial[step, row] if forward_looking else 0.0))
            for step in range(length - 1)
        ]
        end = float(paths.log_joint.flatten()[row])
        flow += [end, end]
        squares += [
            (flow[step] + float(log_p[step, row]) - flow[step + 1]) ** 2 for step in range(length)
        ]
    objective = DetailedBalance(forward_looking=forward_looking)
    assert float(objective(paths)) == pytest.approx(sum(squares) / len(squares))


def grammar_policy(kind: str, latent: Any) -> Any:
    """Of two nonterminals, with every parameter moved by random noise."""
    if kind != "chart":
        return make_policy(kind, latent, nonterminals=2)
    torch.manual_seed(0)
    policy = ChartPolicy(2, PRETERMINALS, 8, latent, width=8)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return policy


def setting_of(kind: str, latent: Any) -> tuple[Any, Any, Any]:
    """A small policy, a model and data of it."""
    if kind == "grid":
        return tiny_images.make_policy(), tiny_images.make_model(), tiny_images.images(3)
    if kind == "mixture":
        return tiny_mixture.make_policy(), tiny_mixture.make_model(), tiny_mixture.points(3)
    return grammar_policy(kind, latent), FixedModel(GRAMMAR, latent), sentences(LENGTHS)


every_policy = pytest.mark.parametrize(
    "kind, latent",
    [(kind, latent) for kind in (*POLICIES, "chart") for latent in LATENTS]
    + [("grid", None), ("mixture", None)],
)


@pytest.mark.parametrize("kind", [*POLICIES, "chart"])
@pytest.mark.parametrize("latent", LATENTS)
def test_a_short_sentence_beside_a_long_one_adds_its_own_terms_alone(kind, latent, monkeypatch):
    """Written out: the mean over transitions, or that over trajectories, of sentences alone."""
    policy, model = grammar_policy(kind, latent).eval(), FixedModel(GRAMMAR, latent)

    def labelled(trees: Trees) -> Trees:
        label = torch.arange(trees.start.shape[-1]) % 2
        return Trees(trees.start, trees.end, trees.lengths, torch.where(trees.exists, label, -1))

    monkeypatch.setattr(model, "sample_labels", lambda _, z: labelled(z))
    both = sentences([6, 3])

    def losses(x: Sentences) -> list[float]:
        # There is one way to such a tree.
        z = Trees.right_branching(x.lengths)
        condition = policy.condition(model, x)
        paths = policy.retrace(condition, labelled(z) if latent == "labelled" else z)
        return [
            float(objective(paths))
            for objective in (
                DetailedBalance(),
                DetailedBalance(forward_looking=True),
                SubTrajectoryBalance(),
                SubTrajectoryBalance(forward_looking=False),
            )
        ]

    together, long, short = losses(both), losses(only(both, 0)), losses(only(both, 1))
    # A chart chooses the root's label, too.
    m, n = (7, 4) if kind == "chart" else (6, 3)
    for found, a, b in zip(together[:2], long[:2], short[:2], strict=True):
        assert found == pytest.approx((m * a + n * b) / (m + n))
        assert found > 1e-3
    for found, a, b in zip(together[2:], long[2:], short[2:], strict=True):
        assert found == pytest.approx((a + b) / 2)
        assert found > 1e-3


def test_reverse_kl_is_the_negative_lower_bound_and_teaches_both_policies():
    setting = Setting("shape", "learned")
    log_weights = setting.paths.log_weights.detach()
    assert float(ReverseKL()(setting.paths)) == pytest.approx(-float(log_weights.mean()))
    paths = setting.paths
    loss = ReverseKL()(paths)
    (found,) = torch.autograd.grad(loss, paths.log_backward, retain_graph=True)
    torch.testing.assert_close(found, torch.full_like(found, -1 / 24))
    # The score, -log w, less its mean over the five other trajectories of the sentence.
    (found,) = torch.autograd.grad(loss, paths.log_forward)
    others = (log_weights.sum(1, keepdim=True) - log_weights) / 5
    torch.testing.assert_close(found[0], (others - log_weights) / 24)


def test_forward_kl_weighs_the_trajectories_of_each_sentence():
    setting = Setting("shape", "learned")
    log_weights = setting.paths.log_weights.detach().tolist()
    log_forward = setting.paths.log_forward.detach().sum(0).tolist()
    total = 0.0
    for weights, scores in zip(log_weights, log_forward, strict=True):
        exact = [math.exp(weight) for weight in weights]
        total -= sum(w * score for w, score in zip(exact, scores, strict=True)) / sum(exact)
    assert float(ForwardKL()(setting.paths)) == pytest.approx(total / len(LENGTHS))
    loss = ForwardKL()(setting.paths)
    assert torch.autograd.grad(loss, setting.paths.log_backward, allow_unused=True) == (None,)


def test_a_weighted_sum_may_hold_another():
    parts = {"tb": TrajectoryBalance(), "sleep": sleep()}
    inner = weighted_sum(parts, {"tb": 2.0, "sleep": 3.0})
    made = weighted_sum({"inner": inner, "db": DetailedBalance()}, {"inner": 0.5, "db": 4})
    assert [(part.name, weight) for part, weight in made.wake] == [("tb", 1.0), ("db", 4.0)]
    assert made.sleep == 1.5
    assert WeightedSum.of(made) is made


@pytest.mark.parametrize(
    "weights, message",
    [
        (
            {"tb": 1.0, "db": 1.0},
            "objective.parts has tb, sleep and objective.weights tb, db: give each part a weight",
        ),
        (
            {},
            "objective.parts has tb, sleep and objective.weights nothing: give each part a weight",
        ),
        (
            {"tb": 0.0, "sleep": 1.0},
            "objective.weights.tb is 0.0; it must be a positive number",
        ),
        (
            {"tb": "much", "sleep": 1.0},
            "objective.weights.tb is much; it must be a positive number",
        ),
    ],
)
def test_weights_that_make_no_sum(weights, message):
    parts = {"tb": TrajectoryBalance(), "sleep": sleep()}
    with pytest.raises(UserError, match=f"^{message}$"):
        weighted_sum(parts, weights)


class LogPartitions(nn.Module):
    """log Z of the data point that a condition names."""

    input_dim, output_dim = 2, 1

    def __init__(self, log_z: Tensor):
        super().__init__()
        self.log_z = log_z

    def forward(self, conditions: Tensor) -> Tensor:
        return self.log_z[conditions[:, 0].long()][:, None]


@pytest.mark.parametrize("backward", BACKWARDS)
def test_trajectory_balance_is_torchgfn_s(backward):
    setting = Setting("shape", backward)
    learned, fixed = setting.paths.flows()
    log_z = ConditionalLogZEstimator(LogPartitions((learned + fixed)[0, ::6]))
    stock = TBGFlowNet(*setting.estimators, logZ=log_z)
    trajectories = setting.trajectories(setting.paths)
    expected = stock.loss(trajectories.env, trajectories, recalculate_all_logprobs=True)
    found = TrajectoryBalance()(setting.paths)
    assert float(found.detach()) == pytest.approx(float(expected.detach()))


@every_policy
def test_torchgfn_finds_the_weights_of_every_policy_s_trajectories(kind, latent):
    policy, model, x = setting_of(kind, latent)
    condition = policy.condition(model, x)
    paths = policy.sample(condition, 5)
    stock = LogPartitionVarianceGFlowNet(*policy.estimators(condition))
    trajectories = policy.trajectories(condition, paths)
    for recalculate in (False, True):
        scores = stock.get_scores(trajectories, recalculate_all_logprobs=recalculate)
        torch.testing.assert_close(scores, -paths.log_weights.flatten(), rtol=0, atol=1e-9)


def assert_skipped(posterior: GFlowNetPosterior, model: Any, x: Any) -> None:
    """An E-step gives a loss that is not finite, and changes nothing."""
    step = posterior.e_step(model, x)
    assert step.loss is not None and not step.loss.isfinite()
    optimizer = partial(torch.optim.SGD, lr=1.0)
    trainer = Trainer("posterior", posterior.parameter_groups(), optimizer, 1.0, warmup=0)
    before = [parameter.detach().clone() for parameter in posterior.parameters()]
    assert not trainer.step(step.loss)
    assert trainer.skipped == 1
    for one, other in zip(before, posterior.parameters(), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("objective", [VarGrad(), SubTrajectoryBalance()])
@every_policy
def test_e_steps_of_policies_that_are_not_finite_are_skipped(kind, latent, objective, bad):
    policy, model, x = setting_of(kind, latent)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.fill_(bad)
    local_search = None if kind == "mixture" else BackAndForth(steps=1, depth=2)
    assert_skipped(GFlowNetPosterior(policy, objective, local_search=local_search), model, x)
    behaviour = Behaviour(2.0, epsilon=0.5)
    assert_skipped(GFlowNetPosterior(policy, objective, behaviour=behaviour), model, x)


@pytest.mark.parametrize("objective", [VarGrad(), SubTrajectoryBalance()])
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("kind", [*POLICIES, "chart"])
def test_e_steps_on_sentences_without_a_tree_are_skipped(kind, latent, objective):
    policy, model, x = setting_of(kind, latent)
    with torch.no_grad():
        model.emission[..., x.words[0, 0]] = -math.inf
    assert_skipped(GFlowNetPosterior(policy, objective), model, x)


@pytest.mark.parametrize("behaviour", [Behaviour(), Behaviour(2.0, epsilon=0.5)], ids=str)
@pytest.mark.parametrize("latent", LATENTS)
def test_e_steps_with_weights_that_are_all_zero_are_skipped(latent, behaviour):
    policy, model, x = setting_of("chart", latent)
    with torch.no_grad():
        policy.encoder.score.bias.fill_(-1e4)
    paths = policy.sample(policy.condition(model, x), 4, behaviour)
    # Two words have nothing but a root to be chosen.
    assert torch.equal(paths.log_weights.isnan(), (x.lengths > 2)[:, None].expand(-1, 4))
    assert_skipped(GFlowNetPosterior(policy, behaviour=behaviour), model, x)
