from __future__ import annotations

from math import nan
from typing import Any

import pytest
import torch

from gfnem.errors import UserError
from gfnem.gflownet.objectives import (
    DetailedBalance,
    ForwardKL,
    Objective,
    ReverseKL,
    SubTrajectoryBalance,
    TrajectoryBalance,
    VarGrad,
    WeightedSum,
    sleep,
    weighted_sum,
)
from gfnem.gflownet.policy import Behaviour
from gfnem.latents import EStep, Latents
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.networks import NeuralPCFG
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.text.corpus import Sentences
from tests.tasks.grammar import oracle
from tests.tasks.grammar.tiny import (
    BACKWARDS,
    LATENTS,
    VOCABULARY,
    FixedModel,
    StateGraph,
    enumerate_trees,
    make_policy,
    sentences,
    total_variation,
    words_of,
)

OBJECTIVES: dict[str, Objective] = {
    "vargrad": VarGrad(),
    "tb": TrajectoryBalance(),
    "subtb": SubTrajectoryBalance(),
}
# Steps after which each is close to the posterior.
STEPS = {"vargrad": 80, "tb": 120, "subtb": 150}
# A grammar and sentences of these lengths for each latent.
SETTINGS: dict[str, tuple[DenseGrammar, list[int], int]] = {
    "shape": (oracle.random_grammar(2, 3, seed=2), [5, 4], 2),
    "labelled": (oracle.random_grammar(2, 3, seed=0, temperature=0.5), [4, 4], 0),
}


def setting(
    latent: Any,
    backward: str = "uniform",
    objective: Objective | WeightedSum = OBJECTIVES["vargrad"],
    **options: Any,
) -> tuple[FixedModel, GFlowNetPosterior, Sentences]:
    grammar, lengths, seed = SETTINGS[latent]
    policy = make_policy("root_flow", latent, backward, nonterminals=2, noise=0.1, width=16)
    posterior = GFlowNetPosterior(policy, objective, **options)
    return FixedModel(grammar, latent), posterior, sentences(lengths, seed=seed)


def distances(
    model: GrammarModel, posterior: GFlowNetPosterior, x: Sentences, latent: Any
) -> list[float]:
    """Total variation between q(z | x) and p(z | x) of each sentence, exactly."""
    policy = posterior.policy
    grammar = model.grammar().map(torch.Tensor.detach)
    assert isinstance(grammar, DenseGrammar)
    condition = policy.condition(model, x)
    env = policy.trajectories(condition, policy.sample(condition, 1)).env
    forward: Any = policy.estimators(condition)[0]
    return [
        total_variation(
            StateGraph.of(env, length, row).ends(forward),
            oracle.posterior(enumerate_trees(grammar, words_of(x, row), latent)),
        )
        for row, length in enumerate(x.lengths.tolist())
    ]


def train(
    model: GrammarModel, posterior: GFlowNetPosterior, x: Sentences, steps: int = 100
) -> None:
    torch.manual_seed(0)
    # The fewer steps, the longer.
    optimizer = torch.optim.Adam(posterior.parameter_groups(), lr=3 / steps)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = posterior.e_step(model, x).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        decay.step()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("latent", LATENTS)
def test_trained_posterior_is_that_of_enumeration(latent, backward, objective):
    model, posterior, x = setting(latent, backward, OBJECTIVES[objective], samples=64, flow_lr=0.1)
    assert min(distances(model, posterior, x, latent)) > 0.1
    train(model, posterior, x, STEPS[objective])
    assert max(distances(model, posterior, x, latent)) < 0.05


@pytest.mark.parametrize(
    "objective",
    [
        DetailedBalance(),
        DetailedBalance(forward_looking=True),
        TrajectoryBalance(loss="linex", alpha=1.0),
    ],
)
def test_trained_posterior_of_three_words_is_that_of_enumeration(objective):
    """Three: the flows of longer sentences' states are no sums over their roots."""
    model, posterior, _ = setting("shape", objective=objective, samples=64, flow_lr=0.1)
    x = sentences([3, 3], seed=2)
    assert min(distances(model, posterior, x, "shape")) > 0.1
    train(model, posterior, x)
    assert max(distances(model, posterior, x, "shape")) < 0.05


@pytest.mark.parametrize("objective", [ReverseKL(), ForwardKL()])
def test_trained_posterior_is_that_of_enumeration_with_divergences(objective):
    model, posterior, x = setting("labelled", objective=objective, samples=64)
    assert min(distances(model, posterior, x, "labelled")) > 0.1
    train(model, posterior, x, steps=150)
    assert max(distances(model, posterior, x, "labelled")) < 0.05


@pytest.mark.parametrize(
    "parts",
    [
        {"sleep": sleep()},
        {"forward_kl": ForwardKL(), "sleep": sleep()},
        {"tb": TrajectoryBalance(), "sleep": sleep()},
    ],
)
def test_trained_posterior_is_that_of_enumeration_with_a_sleep_phase(parts):
    torch.manual_seed(0)
    model = NeuralPCFG(VOCABULARY, 2, 3, width=8, max_length=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    policy = make_policy("root_flow", "shape", nonterminals=2, noise=0.3)
    objective = weighted_sum(parts=parts, weights=dict.fromkeys(parts, 1.0))
    posterior = GFlowNetPosterior(policy, objective, samples=64, sleep_samples=128, flow_lr=0.1)
    x = sentences([4, 4, 3])
    assert max(distances(model, posterior, x, "shape")) > 0.1
    train(model, posterior, x, steps=60)
    assert max(distances(model, posterior, x, "shape")) < 0.05


@pytest.mark.parametrize("behaviour", [Behaviour(temperature=2.0), Behaviour(epsilon=0.3)])
def test_trained_posterior_is_the_same_off_policy(behaviour):
    model, posterior, x = setting("shape", samples=64, behaviour=behaviour)
    train(model, posterior, x)
    assert max(distances(model, posterior, x, "shape")) < 0.05


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("latent", LATENTS)
def test_an_e_step_has_gradients_for_the_policy_alone(latent, objective):
    _, posterior, x = setting(latent, "learned", OBJECTIVES[objective], sleep=1.0)
    model = NeuralPCFG(VOCABULARY, 2, 3, width=8, max_length=5, latent=latent)
    step = posterior.e_step(model, x)
    assert step.loss is not None and "e_step/sleep" in step.metrics
    step.loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None and p.grad.any() for p in posterior.parameters())
    flows = [p.grad for p in posterior.policy.flow_parameters()]
    assert all((grad is None) == (objective == "vargrad") for grad in flows)


def test_an_m_step_has_gradients_for_the_model_alone():
    model, posterior, x = setting("shape", samples=3)
    value = posterior.expected_log_joint(model, x)
    assert value.shape == (len(x),)
    value.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(p.grad is None for p in posterior.parameters())


def test_an_m_step_on_given_latents_is_their_mean():
    model, posterior, x = setting("labelled", samples=5)
    latents = posterior.e_step(model, x).latents
    assert latents is not None
    expected = model.log_joint(x, latents.z)
    assert expected.shape == (2, posterior.m_step_samples) == (2, 5)
    value = posterior.expected_log_joint(model, x, latents)
    torch.testing.assert_close(value, expected.mean(-1))
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0, 0.0]] * 2)
    weighted = Latents(latents.z, latents.log_weights, weights)
    value = posterior.expected_log_joint(model, x, weighted)
    torch.testing.assert_close(value, expected[:, :3] @ weights[0, :3])


def test_metrics_and_latents_of_an_e_step():
    model, posterior, x = setting("shape", samples=6)
    step = posterior.e_step(model, x)
    assert step.loss is not None and step.latents is not None
    log_weights = step.latents.log_weights
    assert log_weights is not None and not log_weights.requires_grad
    weights = log_weights.double().exp()
    effective = weights.sum(-1) ** 2 / weights.square().sum(-1)
    assert float(step.metrics["e_step/effective_samples"]) == pytest.approx(float(effective.mean()))
    assert float(step.metrics["e_step/objective"]) == pytest.approx(float(step.loss))
    assert "e_step/sleep" not in step.metrics


def test_schedules_go_by_the_objective_without_the_sleep_phase():
    _, posterior, x = setting("shape", sleep=1.0)
    model = NeuralPCFG(VOCABULARY, 2, 3, width=8, max_length=5)
    step = posterior.e_step(model, x)
    assert step.loss is not None and step.objective is not None
    torch.testing.assert_close(step.objective.detach(), step.metrics["e_step/objective"])
    assert float(step.loss.detach()) > float(step.objective.detach()) + 0.1
    model, posterior, x = setting("shape")
    assert posterior.e_step(model, x).objective is None


@pytest.mark.parametrize("behaviour", [Behaviour(temperature=1.5), Behaviour(epsilon=0.1)])
def test_off_policy_trajectories_are_no_draws_of_the_posterior(behaviour):
    model, posterior, x = setting("shape", behaviour=behaviour)
    step = posterior.e_step(model, x)
    assert step.latents is None
    # Their weights would leave out how they were drawn.
    assert "e_step/effective_samples" not in step.metrics
    assert posterior.sample(model, x, 3).log_weights is not None


@pytest.mark.parametrize("latent", LATENTS)
def test_samples_are_plain_draws_with_their_weights(latent):
    model, posterior, x = setting(latent, behaviour=Behaviour(temperature=3.0))
    torch.manual_seed(0)
    latents = posterior.sample(model, x, 4_000)
    assert latents.log_weights is not None and not latents.log_weights.requires_grad
    for index in range(len(x)):
        exact = oracle.log_partition(SETTINGS[latent][0], words_of(x, index))
        weights = (latents.log_weights[index].double() - exact).exp()
        error = float(weights.std()) / 4_000**0.5
        assert error < 0.1
        assert abs(float(weights.mean()) - 1) < 4 * error + 1e-5


@pytest.mark.parametrize("latent", LATENTS)
def test_sleep_brings_the_policy_to_draws_of_the_model(latent):
    torch.manual_seed(0)
    model = NeuralPCFG(VOCABULARY, 2, 3, width=8, max_length=5, latent=latent)
    policy = make_policy("light", latent, nonterminals=2, noise=0.5, width=16)
    posterior = GFlowNetPosterior(policy, sleep_samples=64)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=0.01)

    def loss():
        value = posterior.sleep_loss(model)
        assert value is not None
        return value

    def on_the_same_draws() -> float:
        torch.manual_seed(1)
        with torch.no_grad():
            return sum(float(loss()) for _ in range(4)) / 4

    before = on_the_same_draws()
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert on_the_same_draws() < before - 0.5
    assert all(p.grad is None for p in model.parameters())


def test_sleep_loss_is_minus_log_forward_of_the_model_s_draws():
    model = NeuralPCFG(VOCABULARY, 2, 3, width=8, max_length=4, latent="labelled")
    _, posterior, _ = setting("labelled", sleep_samples=16)
    torch.manual_seed(2)
    value = posterior.sleep_loss(model)
    torch.manual_seed(2)
    x, z = model.sample(16)
    paths = posterior.policy.retrace(posterior.policy.condition(model, x), z)
    torch.testing.assert_close(value, -paths.log_forward.sum(0).mean())
    assert torch.equal(paths.z.start, z.start)


def test_sleep_is_left_out_when_no_draw_fits():
    model = NeuralPCFG(VOCABULARY, 2, 3, width=4, max_length=5)
    with torch.no_grad():
        bias = model.binary_rules.bias.view(5, 5)
        bias.zero_()
        bias[:2, :2] = 30.0  # two nonterminals below every nonterminal
    _, posterior, x = setting("shape", sleep=1.0, sleep_samples=3)
    assert posterior.sleep_loss(model) is None
    assert int(model.rejected) == 3 * model.tries
    step = posterior.e_step(model, x)
    assert step.loss is not None and step.loss.isfinite()
    assert "e_step/sleep" not in step.metrics


def test_sleep_happens_with_its_probability():
    model = NeuralPCFG(VOCABULARY, 2, 3, width=8, max_length=4)
    counts = {}
    for probability in (0.0, 0.5, 1.0):
        _, posterior, x = setting("shape", sleep=probability, samples=2, sleep_samples=4)
        torch.manual_seed(3)
        counts[probability] = sum(
            "e_step/sleep" in posterior.e_step(model, x).metrics for _ in range(20)
        )
    assert counts[0.0] == 0 and counts[1.0] == 20
    assert 4 <= counts[0.5] <= 16


def test_a_weighted_sum_weighs_losses_on_the_same_trajectories():
    model = NeuralPCFG(VOCABULARY, 2, 3, width=8, max_length=4)
    parts: Any = {"tb": TrajectoryBalance(), "vargrad": VarGrad(), "sleep": sleep()}
    weights = {"tb": 2.0, "vargrad": 0.5, "sleep": 3.0}

    def e_step(objective: Any, **options: Any) -> EStep:
        _, posterior, x = setting("shape", objective=objective, sleep_samples=8, **options)
        torch.manual_seed(3)
        return posterior.e_step(model, x)

    step = e_step(weighted_sum(parts=parts, weights=weights))
    wake = 2 * float(e_step(TrajectoryBalance()).loss) + 0.5 * float(e_step(VarGrad()).loss)  # type: ignore[arg-type]
    assert float(step.metrics["e_step/objective"]) == pytest.approx(wake)
    asleep = float(step.metrics["e_step/sleep"])
    assert float(step.loss) == pytest.approx(wake + 3 * asleep)  # type: ignore[arg-type]
    # A sleep phase by chance comes on top.
    more = e_step(weighted_sum(parts=parts, weights=weights), sleep=1.0)
    asleep = float(more.metrics["e_step/sleep"])
    assert float(more.loss) == pytest.approx(wake + 4 * asleep)  # type: ignore[arg-type]


def test_the_sleep_phase_alone_asks_for_no_trajectories(monkeypatch):
    model = NeuralPCFG(VOCABULARY, 2, 3, width=8, max_length=4)
    _, posterior, x = setting("shape", objective=sleep(), samples=1, sleep_samples=8)
    monkeypatch.setattr(posterior.policy, "sample", None)
    step = posterior.e_step(model, x)
    assert step.loss is not None and step.latents is None
    assert set(step.metrics) == {"e_step/sleep"}
    monkeypatch.setattr(posterior, "sleep_loss", lambda model: None)
    with pytest.raises(UserError, match="sleep_samples is 8, but none of the model's draws fits"):
        posterior.e_step(model, x)


def test_parameters_are_the_policy_s_and_flows_may_learn_faster():
    _, posterior, _ = setting("shape", objective=TrajectoryBalance())
    names = set(posterior.state_dict())
    assert names == {f"policy.{name}" for name in posterior.policy.state_dict()}
    (group,) = posterior.parameter_groups()
    assert len(group["params"]) == len(list(posterior.parameters()))
    _, posterior, _ = setting("shape", objective=TrajectoryBalance(), flow_lr=0.3)
    rest, flows = posterior.parameter_groups()
    assert flows["lr"] == 0.3 and "lr" not in rest
    assert [id(p) for p in flows["params"]] == [id(p) for p in posterior.policy.flow_parameters()]
    both = {id(p) for p in rest["params"]} | {id(p) for p in flows["params"]}
    assert both == {id(p) for p in posterior.parameters()}
    assert len(rest["params"]) + len(flows["params"]) == len(both)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"temperature": nan}, "temperature is nan; it must be positive"),
        ({"epsilon": 1.5}, "epsilon is 1.5; it must lie between 0 and 1"),
    ],
)
def test_behaviours_that_draw_nothing(options, message):
    with pytest.raises(UserError, match=message):
        Behaviour(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "posterior.samples is 0; it must be at least 1"),
        ({"samples": 1}, "posterior.samples is 1; objective=vargrad needs at least 2"),
        (
            {"samples": 1, "objective": ReverseKL()},
            "posterior.samples is 1; objective=reverse_kl needs at least 2",
        ),
        (
            {"samples": 1, "objective": ForwardKL()},
            "posterior.samples is 1; objective=forward_kl needs at least 2",
        ),
        (
            {"behaviour": Behaviour(temperature=1.5), "objective": ReverseKL()},
            "posterior.behaviour has temperature=1.5 and epsilon=0.0; objective=reverse_kl needs "
            "plain draws of the policy: set temperature=1 and epsilon=0",
        ),
        (
            {"behaviour": Behaviour(epsilon=0.1), "objective": ForwardKL()},
            "posterior.behaviour has temperature=1.0 and epsilon=0.1; objective=forward_kl needs",
        ),
        ({"sleep": 1.2}, "posterior.sleep is 1.2; it is a probability"),
    ],
)
def test_arguments_that_make_no_posterior(options, message):
    with pytest.raises(UserError, match=message):
        setting("shape", **options)
