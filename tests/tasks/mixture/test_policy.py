from __future__ import annotations

from math import log
from typing import Any

import pytest
import torch
from gfn.utils.prob_calculations import get_trajectory_pfs_and_pbs
from torch import Tensor

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
from gfnem.gflownet.refinement import BackAndForth
from gfnem.latents import Latents
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.posteriors.mean_field import MeanField
from gfnem.tasks.mixture.components import Components
from gfnem.tasks.mixture.data import Points
from gfnem.tasks.mixture.model import HierarchicalMixture
from gfnem.tasks.mixture.policy import MixtureCondition, MixturePolicy
from tests.tasks.mixture.tiny import (
    PETALS,
    SUPERCLUSTERS,
    counts,
    every,
    float64,  # noqa: F401
    log_joint_table,
    make_data,
    make_model,
    make_policy,
    p_value,
    points,
    posteriors,
    q_tables,
    random_components,
    total_variation,
)

pytestmark = pytest.mark.usefixtures("float64")

OBJECTIVES: dict[str, Objective] = {
    "vargrad": VarGrad(),
    "tb": TrajectoryBalance(),
    "subtb": SubTrajectoryBalance(),
}
WAKE_SLEEP = weighted_sum(
    parts={"forward_kl": ForwardKL(), "sleep": sleep()},
    weights={"forward_kl": 1.0, "sleep": 1.0},
)
TB_SLEEP = weighted_sum(
    parts={"tb": TrajectoryBalance(), "sleep": sleep()}, weights={"tb": 1.0, "sleep": 1.0}
)


def setting(n: int = 3) -> tuple[HierarchicalMixture, MixturePolicy, Points, MixtureCondition]:
    model, policy, x = make_model(), make_policy(), points(n)
    return model, policy, x, policy.condition(model, x)


def test_draws_and_their_probabilities():
    model, policy, x, condition = setting()
    torch.manual_seed(0)
    paths = policy.sample(condition, 6_000)
    assert paths.log_forward.shape == (3, 3, 6_000)
    assert (paths.log_forward[2] == 0).all() and (paths.log_backward == 0).all()
    tables = q_tables(policy, model, x)
    assert total_variation(tables[0], tables[1]) > 0.01
    for row, table in enumerate(tables):
        assert sum(table.values()) == pytest.approx(1)
        assert p_value(counts(paths.z.index[row]), table) > 1e-3
        log_q = paths.log_forward[:, row].sum(0).detach()
        expected = [log(table[tuple(z)]) for z in paths.z.index[row].tolist()]
        assert log_q.tolist() == pytest.approx(expected)
    z = random_components(3, 8)
    log_q = policy.log_forward(condition, z)
    torch.testing.assert_close(policy.retrace(condition, z).log_forward.sum(0), log_q)
    for row, table in enumerate(tables):
        assert log_q[row].exp().tolist() == pytest.approx(
            [table[tuple(c)] for c in z.index[row].tolist()]
        )


def q_of_behaviour(condition: MixtureCondition, row: int, behaviour: Behaviour) -> dict[Any, float]:
    """Tempered and mixed with uniform choices, one choice after the other."""

    def weights(logits: Tensor) -> list[float]:
        tempered = (logits.detach() / behaviour.temperature).softmax(-1)
        mixed = (1 - behaviour.epsilon) * tempered + behaviour.epsilon / len(logits)
        return mixed.tolist()

    first = weights(condition.supercluster[row])
    second = [weights(of_i) for of_i in condition.petal[row]]
    return {(i, j): first[i] * second[i][j] for i in range(SUPERCLUSTERS) for j in range(PETALS)}


@pytest.mark.parametrize("behaviour", [Behaviour(2.0), Behaviour(1.0, 0.4), Behaviour(0.5, 0.1)])
def test_behaviour_tempers_and_mixes_with_uniform_choices(behaviour):
    _, policy, _, condition = setting()
    torch.manual_seed(0)
    paths = policy.sample(condition, 6_000, behaviour)
    for row in range(3):
        probability = q_of_behaviour(condition, row, behaviour)
        assert p_value(counts(paths.z.index[row]), probability) > 1e-3
    # Scored by the plain policy all the same.
    expected = policy.log_forward(condition, paths.z)
    torch.testing.assert_close(paths.log_forward.sum(0), expected)


def test_points_are_standardised():
    data = make_data(train=50)
    torch.manual_seed(0)
    policy = MixturePolicy(data, SUPERCLUSTERS, PETALS)
    moved = Points(100 + 7 * data.train.values, data.train.ids)
    torch.manual_seed(0)
    data.train = moved
    other = MixturePolicy(data, SUPERCLUSTERS, PETALS)
    x = points(4)
    of_moved = Points(100 + 7 * x.values, x.ids)
    one, same = policy.condition(make_model(), x), other.condition(make_model(), of_moved)
    torch.testing.assert_close(one.petal, same.petal)
    torch.testing.assert_close(one.supercluster, same.supercluster)
    data.train = Points.numbered(torch.ones(3, 2))
    assert MixturePolicy(data, 2, 2).condition(make_model(), data.train).petal.isfinite().all()


def test_gradients_reach_the_policy_and_never_the_model():
    model, policy, _, condition = setting()
    paths = policy.sample(condition, 8)
    weights = torch.randn(paths.log_forward.shape)
    flow = paths.flows()[0].view_as(paths.log_forward)
    (weights * (paths.log_forward + flow.sin())).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    flows = {id(p) for p in policy.flow_parameters()}
    assert flows == {id(policy.flow.weight), id(policy.flow.bias)}


def test_weights_are_unbiased_for_the_likelihood():
    model, policy, x, condition = setting()
    torch.manual_seed(0)
    with torch.no_grad():
        paths = policy.sample(condition, 8_000)
        torch.testing.assert_close(paths.log_joint, model.log_joint(x, paths.z))
    ratio = (paths.log_weights - log_joint_table(model, x).logsumexp(-1)[:, None]).exp()
    error = ratio.std(-1) / 8_000**0.5
    assert (error < 0.15).all()
    assert ((ratio.mean(-1) - 1).abs() < 4 * error).all()


def test_torchgfn_recomputes_the_same_probabilities_from_states_alone():
    _, policy, _, condition = setting()
    torch.manual_seed(1)
    for paths in (
        policy.sample(condition, 8),
        policy.sample(condition, 8, Behaviour(epsilon=0.5)),
        policy.retrace(condition, random_components(3, 8)),
    ):
        trajectories = policy.trajectories(condition, paths)
        log_pf, log_pb = get_trajectory_pfs_and_pbs(
            *policy.estimators(condition), trajectories, recalculate_all_logprobs=True
        )
        assert trajectories.log_probs is not None
        torch.testing.assert_close(log_pf, trajectories.log_probs)
        torch.testing.assert_close(log_pb, paths.log_backward.flatten(1))


def test_torchgfn_trajectories_are_steps_of_the_environment():
    _, policy, _, condition = setting()
    paths = policy.sample(condition, 5)
    trajectories = policy.trajectories(condition, paths)
    env = trajectories.env
    env.debug = True
    assert trajectories.states.is_initial_state[0].all()
    assert trajectories.states.is_sink_state[-1].all()
    assert (trajectories.terminating_idx == 3).all()
    for step in range(trajectories.max_length):
        reached = env._step(trajectories.states[step], trajectories.actions[step])
        assert torch.equal(reached.tensor, trajectories.states[step + 1].tensor)
    assert torch.equal(trajectories.states.tensor[2], paths.z.index.flatten(0, 1))
    assert trajectories.states.conditions is not None
    rows = torch.arange(3).repeat_interleave(5)
    assert torch.equal(trajectories.states.conditions[0, :, 0].long(), rows)
    torch.testing.assert_close(trajectories.log_rewards, paths.log_joint.flatten())


def test_flows_see_the_supercluster_and_its_prior():
    _, policy, _, condition = setting()
    paths = policy.sample(condition, 40)
    learned, fixed = paths.flows()
    assert learned.shape == fixed.shape == (3, 120)
    assert learned.requires_grad and not fixed.requires_grad
    learned = learned.detach()
    assert (fixed[0] == 0).all() and (learned[2] == 0).all()
    torch.testing.assert_close(fixed[1], torch.full((120,), -log(3)))
    assert torch.equal(fixed[2], paths.log_joint.flatten())
    # One number for each point, then one for each of its superclusters.
    for row, (log_z, after) in enumerate(learned[:2].view(2, 3, 40).unbind(1)):
        assert len(log_z.unique()) == 1
        supercluster = paths.z.supercluster[row]
        assert len(after.unique()) == len(supercluster.unique()) == 3
        assert all(len(after[supercluster == i].unique()) == 1 for i in range(3))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_regrown_trajectories_part_where_they_should(depth, temperature):
    model, policy, x, condition = setting()
    start = Components(torch.tensor([2, 1]).expand(3, 6_000, -1))
    torch.manual_seed(0)
    old, new = policy.regrow(condition, start, depth, temperature)
    assert torch.equal(old.z.index, start.index)
    kept = int(depth == 1)
    probability = q_of_behaviour(condition, 1, Behaviour(temperature))
    if kept:
        of_i = sum(p for (i, _), p in probability.items() if i == 2)
        probability = {(i, j): p / of_i for (i, j), p in probability.items() if i == 2}
    assert p_value(counts(new.z.index[1]), probability) > 1e-3
    for paths in (old, new):
        assert not paths.log_forward.requires_grad
        assert (paths.log_forward[:kept] == 0).all() and (paths.log_forward[2] == 0).all()
        torch.testing.assert_close(paths.log_joint, model.log_joint(x, paths.z).detach())
        expected = [log(probability[tuple(z)]) for z in paths.z.index[1, :50].tolist()]
        assert paths.log_forward[:, 1, :50].sum(0).tolist() == pytest.approx(expected)


def test_back_and_forth_leaves_the_exact_posterior_invariant():
    model, policy, x, _ = setting()
    torch.manual_seed(0)
    z = model.sample_posterior(x, 4_000)
    with torch.no_grad():
        new = BackAndForth(steps=4, depth=2)(policy, model, x, Latents(z, None)).z.index
    for row, probability in enumerate(posteriors(model, x)):
        assert p_value(counts(new[row]), probability) > 1e-3
    assert (new != z.index).any(-1).double().mean() > 0.05


class ExactPolicy(MixturePolicy):
    """A policy whose conditionals and flows are those of the enumerated posterior."""

    def condition(self, model: HierarchicalMixture, x: Points) -> MixtureCondition:
        table = log_joint_table(model, x).view(len(x), SUPERCLUSTERS, PETALS)
        of_i = table.logsumexp(-1)
        flow = torch.cat([of_i.logsumexp(-1, keepdim=True), of_i + log(SUPERCLUSTERS)], 1)
        zero = 0 * super().condition(model, x).flow.sum()
        return MixtureCondition(x, model, of_i + zero, table, flow)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_are_zero_at_the_exact_posterior(objective):
    model, x = make_model(), points(5)
    posterior = GFlowNetPosterior(
        ExactPolicy(make_data(), SUPERCLUSTERS, PETALS), OBJECTIVES[objective], samples=6
    )
    torch.manual_seed(0)
    step = posterior.e_step(model, x)
    assert step.loss is not None and step.latents is not None
    assert max(len(counts(of_x)) for of_x in step.latents.z.index) > 1
    assert float(step.loss.detach()) == pytest.approx(0, abs=1e-9)
    wrong = GFlowNetPosterior(make_policy(), OBJECTIVES[objective], samples=6).e_step(model, x)
    assert wrong.loss is not None and float(wrong.loss.detach()) > 0.1


ALL_OBJECTIVES: dict[str, tuple[Objective | WeightedSum, int]] = {
    "vargrad": (VarGrad(), 250),
    "tb": (TrajectoryBalance(), 350),
    "subtb": (SubTrajectoryBalance(), 400),
    "db": (DetailedBalance(), 400),
    "fl_db": (DetailedBalance(forward_looking=True), 450),
    "reverse_kl": (ReverseKL(), 600),
    "forward_kl": (ForwardKL(), 400),
    "sleep": (sleep(), 800),
    "wake_sleep": (WAKE_SLEEP, 400),
    "tb_sleep": (TB_SLEEP, 300),
}
ON_POLICY_ALONE = ("reverse_kl", "forward_kl", "wake_sleep")


@pytest.mark.parametrize("objective", ALL_OBJECTIVES)
def test_trained_posterior_is_that_of_enumeration(objective):
    # In the middle of the circle, where no component is impossible.
    model, x = make_model(), points(4)
    x.values.mul_(0.2)
    policy = make_policy(width=32 if objective == "sleep" else 64)
    factory, steps = ALL_OBJECTIVES[objective]
    posterior = GFlowNetPosterior(
        policy,
        factory,
        samples=32,
        behaviour=Behaviour(epsilon=0.0 if objective in ON_POLICY_ALONE else 0.2),
        sleep_samples=2048 if objective == "sleep" else 512,
        flow_lr=0.02,
    )
    # Reverse KL holds on to what it finds first.
    rate = 0.005 if objective == "reverse_kl" else 0.02
    exact = posteriors(model, x)

    def distances() -> list[float]:
        pairs = zip(q_tables(policy, model, x), exact, strict=True)
        return [total_variation(q, p) for q, p in pairs]

    assert min(distances()) > 0.2
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(posterior.parameter_groups(), lr=rate)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = posterior.e_step(model, x).loss
        assert loss is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 5.0)
        optimizer.step()
        decay.step()
    assert sum(distances()) / 4 < 0.05


def test_sleep_takes_the_policy_to_the_model_s_posterior():
    model, policy = make_model(), make_policy(width=32)
    posterior = GFlowNetPosterior(policy, sleep_samples=256)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = posterior.sleep_loss(model)
        assert loss is not None
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    draws, z = model.sample(4_000)
    exact = log_joint_table(model, draws).log_softmax(-1)
    index = z.supercluster * PETALS + z.petal
    # No q does better on the model's own draws than its posterior.
    best = -float(exact.gather(1, index).mean())
    assert best < sum(losses[-10:]) / 10 < best + 0.3 < losses[0] - 0.5


def test_select_and_where_of_latents():
    z, other = every(2), random_components(2, 12)
    chosen = torch.tensor([[3, 0], [5, 5]])
    assert torch.equal(z.select(chosen).index[1, 0], z.index[1, 5])
    accept = torch.arange(12).expand(2, -1) % 2 == 0
    mixed = z.where(accept, other).to("cpu").index
    assert torch.equal(mixed[:, ::2], z.index[:, ::2])
    assert torch.equal(mixed[:, 1::2], other.index[:, 1::2])


def test_a_width_that_makes_no_policy():
    with pytest.raises(UserError, match="^policy.width is 0; it must be at least 1$"):
        MixturePolicy(make_data(), width=0)


def test_the_table_has_every_component():
    model, policy, x = make_model(), make_policy(), points(6)
    table = policy.tabulate(policy.condition(model, x))
    assert not table.log_q.requires_grad
    torch.testing.assert_close(table.log_joint, log_joint_table(model, x).to(table.log_joint))
    q = torch.tensor([list(of_x.values()) for of_x in q_tables(policy, model, x)])
    torch.testing.assert_close(table.log_q.exp(), q)


def test_a_factorised_posterior_cannot_be_that_of_enumeration():
    """Between components of different superclusters and petals, whatever it starts from."""
    model, x = make_model(), points(4)
    x.values.mul_(0.2)
    supercluster, petal = MeanField(tolerance=1e-9).eval().factors(model, x)
    q = supercluster[:, :, None] * petal[:, None]
    distances = []
    for of_x, p in zip(q, posteriors(model, x), strict=True):
        table = dict(zip(p, of_x.flatten().tolist(), strict=True))
        distances.append(total_variation(table, p))
    assert sum(distances) / 4 > 0.1
