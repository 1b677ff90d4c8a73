from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gfn.gflownet import LogPartitionVarianceGFlowNet
from torch import Tensor

from gfnem.objectives import ScoredTrajectories, subtb, tb, vargrad
from gfnem.posteriors.gflownet import Paths
from gfnem.tasks.grammar.data import Sentences
from gfnem.tasks.grammar.policy import ForestCondition, ForestPolicy
from tests.tasks.grammar import oracle
from tests.tasks.grammar.tiny import (
    BACKWARDS,
    LATENTS,
    FixedPCFG,
    StateGraph,
    enumerate_trees,
    float64,  # noqa: F401
    make_policy,
    sentences,
    words_of,
)

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
        self.condition: ForestCondition = self.policy.condition(FixedPCFG(GRAMMAR, latent), self.x)
        torch.manual_seed(0)
        self.paths: Paths = self.policy.sample(self.condition, 6)
        self.log_z = torch.tensor(
            [oracle.log_partition(GRAMMAR, words_of(self.x, i)) for i in range(len(self.x))]
        )
        self.estimators = self.policy.estimators()
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

    def trajectories(self, paths: Paths) -> ScoredTrajectories:
        return self.policy.trajectories(self.condition, paths)

    def loss(self, objective: Any, paths: Paths, **options: Any) -> float:
        trajectories = self.trajectories(paths)
        loss = objective(*self.estimators).loss(
            trajectories.env,
            trajectories,
            recalculate_all_logprobs=False,
            log_rewards=paths.log_joint.flatten(),
            **options,
        )
        return float(loss)


@every_backward
def test_vargrad_is_zero_at_the_exact_posterior_of_mixed_sentences(latent, backward):
    setting = Setting(latent, backward)
    torch.testing.assert_close(
        setting.exact.log_weights, setting.log_z[:, None].expand(-1, 6), rtol=0, atol=1e-9
    )
    assert setting.loss(vargrad, setting.exact) < 1e-18
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
    assert setting.loss(vargrad, setting.paths) == pytest.approx(float(variances.mean()))


@every_backward
def test_trajectory_balance_is_zero_at_the_exact_posterior(latent, backward):
    setting = Setting(latent, backward)
    assert setting.loss(tb, setting.exact) < 1e-18
    first = setting.exact.flows()
    torch.testing.assert_close(
        (first[0] + first[1])[0], setting.log_z.repeat_interleave(6), rtol=0, atol=1e-9
    )
    # Every log Z(x) is its own sentence's: one that is off by 1 costs 1 squared.
    off = setting.log_flow.clone()
    off[0, :6] += 1
    paths = replace(setting.exact, flows=lambda: setting.split(off))
    assert setting.loss(tb, paths) == pytest.approx(1 / len(LENGTHS))


def test_trajectory_balance_is_the_squared_difference():
    setting = Setting()
    learned, partial = (flow.detach() for flow in setting.paths.flows())
    log_z = (learned + partial)[0].view(len(LENGTHS), 6)
    expected = (log_z - setting.paths.log_weights.detach()).square().mean()
    assert setting.loss(tb, setting.paths) == pytest.approx(float(expected))


@every_backward
@pytest.mark.parametrize("forward_looking", [True, False])
def test_subtrajectory_balance_is_zero_with_exact_flows(latent, backward, forward_looking):
    setting = Setting(latent, backward)
    exact = setting.exact
    if not forward_looking:
        _, partial = setting.paths.flows()
        learned = setting.log_flow
        step = torch.arange(max(LENGTHS))[:, None]
        complete = step >= setting.x.lengths.repeat_interleave(6) - 1
        flows = torch.where(complete, 0.0, learned), partial
        exact = replace(exact, flows=lambda: flows)

    def objective(pf, pb):
        return subtb(pf, pb, forward_looking=forward_looking)

    assert setting.loss(objective, exact) < 1e-18
    # One wrong flow of a state in the middle is noticed, as is every wrong probability.
    learned, partial = exact.flows()
    wrong = learned.clone()
    wrong[1, 0] += 1
    assert setting.loss(objective, replace(exact, flows=lambda: (wrong, partial))) > 1e-3
    log_forward = exact.log_forward.clone()
    log_forward[1, 2, 0] += 1
    assert setting.loss(objective, replace(exact, log_forward=log_forward)) > 1e-3


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

    def objective(pf, pb):
        return subtb(pf, pb, lamda=lamda, forward_looking=forward_looking)

    assert setting.loss(objective, paths) == pytest.approx(total / learned.shape[1])


@pytest.mark.parametrize("objective", [vargrad, tb, subtb])
def test_scores_come_with_the_trajectories_unless_recomputed(objective, monkeypatch):
    """With the policy's own numbers the recomputed loss is the same."""
    setting = Setting("labelled", "learned")
    given = setting.loss(objective, setting.paths)
    trajectories = setting.trajectories(setting.paths)
    recomputed = objective(*setting.estimators).loss(
        trajectories.env,
        trajectories,
        recalculate_all_logprobs=True,
        log_rewards=setting.paths.log_joint.flatten(),
    )
    assert float(recomputed) == pytest.approx(given)

    def never(*_):
        raise AssertionError("the estimators are asked again")

    for estimator in setting.estimators:
        monkeypatch.setattr(type(estimator), "forward", never)
    assert setting.loss(objective, setting.paths) == pytest.approx(given)


@pytest.mark.parametrize("objective", [vargrad, tb])
def test_reductions_are_torchgfn_s(objective):
    setting = Setting()
    mean, total = (
        setting.loss(objective, setting.paths, reduction=reduction) for reduction in ("mean", "sum")
    )
    assert total == pytest.approx(mean * 6 * len(LENGTHS))
