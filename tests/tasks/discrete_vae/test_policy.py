from __future__ import annotations

import re
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
    sleep,
    weighted_sum,
)
from gfnem.gflownet.policy import Behaviour
from gfnem.gflownet.refinement import BackAndForth
from gfnem.latents import Latents
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.tasks.discrete_vae.codes import Codes
from gfnem.tasks.discrete_vae.images import Images
from gfnem.tasks.discrete_vae.model import DiscreteVAE
from gfnem.tasks.discrete_vae.policy import GridCondition, GridPolicy
from tests.tasks.discrete_vae.tiny import (
    CODES,
    all_grids,
    counts,
    float64,  # noqa: F401
    images,
    log_joint_table,
    log_prior,
    make_model,
    make_policy,
    p_value,
    posteriors,
    q_table,
    random_codes,
    stirred,
    total_variation,
)

pytestmark = pytest.mark.usefixtures("float64")

OBJECTIVES = {"vargrad": VarGrad(), "tb": TrajectoryBalance(), "subtb": SubTrajectoryBalance()}
KINDS = [(logits, auto) for logits in ("linear", "distance") for auto in (True, False)]

every_kind = pytest.mark.parametrize("logits, autoregressive", KINDS)
temperatures = pytest.mark.parametrize("temperature", [1.0, 2.5, 0.6])


def setting(
    logits: Any = "linear", autoregressive: bool = True, n: int = 3, **options: Any
) -> tuple[DiscreteVAE, GridPolicy, Images, GridCondition]:
    model = make_model()
    policy = make_policy(logits=logits, autoregressive=autoregressive, **options)
    x = images(n)
    return model, policy, x, policy.condition(model, x)


def step_by_step(
    policy: GridPolicy, condition: GridCondition, grids: Tensor, row: int, temperature: float = 1.0
) -> Tensor:
    """log q of grids of one image as the sampler has it: each code from those before it alone."""
    log_q = torch.zeros(len(grids), policy.positions)
    for number, grid in enumerate(grids):
        for position in range(policy.positions):
            logits = condition.base[row, position]
            if policy.correct is not None:
                one_hot = torch.nn.functional.one_hot(grid[:position], policy.codes)
                hidden = policy.correction.at(
                    position, one_hot.double()[None], condition.given[row : row + 1]
                )
                logits = logits + policy.correct(hidden)[0]
            log_q[number, position] = (logits / temperature).log_softmax(-1)[grid[position]]
    return log_q.detach()


@every_kind
@temperatures
def test_one_pass_equals_step_by_step(logits, autoregressive, temperature):
    _, policy, _, condition = setting(logits, autoregressive)
    z = random_codes(3, 10)
    found = policy._log_probabilities(condition, z.index, temperature)
    for row in range(3):
        expected = step_by_step(policy, condition, z.index[row], row, temperature)
        torch.testing.assert_close(found[row].detach(), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        policy.log_forward(condition, z),
        policy._log_probabilities(condition, z.index).sum(-1),
    )


@every_kind
@temperatures
def test_draws_and_their_probabilities(logits, autoregressive, temperature):
    _, policy, _, condition = setting(logits, autoregressive)
    grids = all_grids()
    torch.manual_seed(0)
    z, log_q = policy.draw(condition, 10_000, temperature)
    assert log_q.shape == (3, 10_000) and not log_q.requires_grad
    for row in range(3):
        expected = step_by_step(policy, condition, grids, row, temperature).sum(-1)
        known = dict(zip(map(tuple, grids.tolist()), expected.tolist(), strict=True))
        assert expected.exp().sum().item() == pytest.approx(1)
        probability = {grid: torch.tensor(value).exp().item() for grid, value in known.items()}
        assert p_value(counts(z.index[row]), probability) > 1e-3
        found = dict(zip(map(tuple, z.index[row].tolist()), log_q[row].tolist(), strict=True))
        assert found == pytest.approx({grid: known[grid] for grid in found})


def test_a_factorised_policy_ignores_the_codes_before():
    _, policy, _, condition = setting(autoregressive=False)
    z = random_codes(3, 20)
    changed = z.index.clone()
    changed[..., 0] = (changed[..., 0] + 1) % CODES
    one, other = (policy._log_probabilities(condition, index) for index in (z.index, changed))
    assert torch.equal(one[..., 1:], other[..., 1:])
    _, policy, _, condition = setting(autoregressive=True)
    one, other = (policy._log_probabilities(condition, index) for index in (z.index, changed))
    assert ((one - other)[..., 1:].abs() > 1e-6).all()


def test_the_correction_starts_at_zero():
    torch.manual_seed(0)
    policy = GridPolicy(1, 4, 4, (2, 2), CODES)
    condition = policy.condition(make_model(), images(2))
    z = random_codes(2, 7)
    expected = condition.base.log_softmax(-1)[:, None].expand(-1, 7, -1, -1)
    expected = expected.gather(-1, z.index[..., None]).squeeze(-1)
    assert torch.equal(policy._log_probabilities(condition, z.index), expected)


@every_kind
def test_most_likely_codes_are_greedy(logits, autoregressive):
    _, policy, _, condition = setting(logits, autoregressive)
    greedy = policy.most_likely(condition).index
    assert greedy.shape == (3, 1, 4)
    for row in range(3):
        grid = greedy[row, 0]
        for position in range(4):
            others = grid.repeat(CODES, 1)
            others[:, position] = torch.arange(CODES)
            log_q = step_by_step(policy, condition, others, row)[:, position]
            assert log_q.argmax() == grid[position]


@pytest.mark.parametrize("autoregressive", [True, False])
@pytest.mark.parametrize("behaviour", [Behaviour(2.0), Behaviour(1.0, 0.4), Behaviour(0.5, 0.1)])
def test_behaviour_tempers_and_mixes_with_uniform_codes(behaviour, autoregressive):
    _, policy, _, condition = setting(autoregressive=autoregressive)
    grids = all_grids()
    torch.manual_seed(0)
    paths = policy.sample(condition, 10_000, behaviour)
    tempered = step_by_step(policy, condition, grids, 1, behaviour.temperature).exp()
    mixed = (1 - behaviour.epsilon) * tempered + behaviour.epsilon / CODES
    probability = dict(zip(map(tuple, grids.tolist()), mixed.prod(-1).tolist(), strict=True))
    assert p_value(counts(paths.z.index[1]), probability) > 1e-3
    # Scored by the plain policy all the same.
    expected = step_by_step(policy, condition, paths.z.index[1, :20], 1)
    found = paths.log_forward[:, 1, :20].t().detach()
    torch.testing.assert_close(found[:, :4], expected)
    assert (found[:, 4] == 0).all()


@pytest.mark.parametrize("embedding", [1, 2, 5])
def test_distance_logits_prefer_the_nearest_entry(embedding):
    model = make_model(embedding=embedding)
    policy = make_policy(logits="distance", embedding=embedding, autoregressive=False)
    x = images(5)
    vectors = policy.projection(policy.features(x))
    distance = (vectors[:, :, None] - model.codebook.weight).square().sum(-1)
    condition = policy.condition(model, x)
    assert policy.log_beta is not None
    expected = (-policy.log_beta.exp() * distance).log_softmax(-1)
    torch.testing.assert_close(condition.base.log_softmax(-1), expected)
    assert torch.equal(policy.most_likely(condition).index[:, 0], distance.argmin(-1))


@every_kind
def test_gradients_reach_the_policy_and_never_the_model(logits, autoregressive):
    model, policy, x, condition = setting(logits, autoregressive)
    paths = policy.sample(condition, 8)
    weights = torch.randn(paths.log_forward.shape)
    flow = paths.flows()[0].view_as(paths.log_forward)
    (weights * (paths.log_forward + flow.sin())).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@every_kind
def test_weights_are_unbiased_for_the_likelihood(logits, autoregressive):
    model, policy, x, condition = setting(logits, autoregressive)
    torch.manual_seed(0)
    with torch.no_grad():
        paths = policy.sample(condition, 4_000)
        torch.testing.assert_close(paths.log_joint, model.log_joint(x, paths.z))
    log_likelihood = log_joint_table(model, x).logsumexp(-1)
    ratio = (paths.log_weights - log_likelihood[:, None]).exp()
    error = ratio.std(-1) / 4_000**0.5
    assert (error < 0.15).all()
    assert ((ratio.mean(-1) - 1).abs() < 4 * error).all()


@every_kind
def test_torchgfn_recomputes_the_same_probabilities_from_states_alone(logits, autoregressive):
    _, policy, _, condition = setting(logits, autoregressive)
    torch.manual_seed(1)
    for paths in (
        policy.sample(condition, 8),
        policy.sample(condition, 8, Behaviour(epsilon=0.5)),
        policy.retrace(condition, random_codes(3, 8)),
    ):
        trajectories = policy.trajectories(condition, paths)
        log_pf, log_pb = get_trajectory_pfs_and_pbs(
            *policy.estimators(condition), trajectories, recalculate_all_logprobs=True
        )
        assert trajectories.log_probs is not None
        torch.testing.assert_close(log_pf, trajectories.log_probs)
        torch.testing.assert_close(log_pb, paths.log_backward.flatten(1))


def test_torchgfn_trajectories_are_steps_of_the_environment():
    _, policy, x, condition = setting()
    paths = policy.sample(condition, 5)
    trajectories = policy.trajectories(condition, paths)
    env = trajectories.env
    env.debug = True
    assert trajectories.states.is_initial_state[0].all()
    assert trajectories.states.is_sink_state[-1].all()
    assert (trajectories.terminating_idx == 5).all()
    for step in range(trajectories.max_length):
        states, actions = trajectories.states[step], trajectories.actions[step]
        reached = env._step(states, actions)
        assert torch.equal(reached.tensor, trajectories.states[step + 1].tensor)
    assert torch.equal(trajectories.states.tensor[4], paths.z.index.flatten(0, 1))
    assert trajectories.states.conditions is not None
    rows = torch.arange(3).repeat_interleave(5)
    assert torch.equal(trajectories.states.conditions[0, :, 0].long(), rows)
    torch.testing.assert_close(trajectories.log_rewards, paths.log_joint.flatten())


def test_flows_see_the_codes_before_and_their_prior():
    model, policy, x, condition = setting()
    paths = policy.sample(condition, 4)
    learned, fixed = paths.flows()
    assert learned.shape == fixed.shape == (5, 12)
    assert learned.requires_grad and not fixed.requires_grad
    learned = learned.detach()
    for row, grid in enumerate(paths.z.index.flatten(0, 1)):
        for filled in range(4):
            partial = log_prior(model, grid[:filled]) if filled else 0.0
            assert float(fixed[filled, row]) == pytest.approx(partial)
        assert float(learned[4, row]) == 0
        assert float(fixed[4, row]) == float(paths.log_joint.flatten()[row])
    # log Z(x) is one number for each image, and the next states' flows depend on the codes.
    log_z = learned[0].view(3, 4)
    torch.testing.assert_close(log_z, log_z[:, :1].expand(-1, 4))
    other = policy.retrace(condition, Codes(paths.z.index.flip(-1))).flows()[0].detach()
    assert torch.equal(other[0], learned[0]) and not torch.equal(other[1], learned[1])


def test_log_z_sees_all_of_the_image():
    """Whatever the reach of the encoder's features of the first position."""
    policy = stirred(GridPolicy(1, 32, 32, grid=(4, 4), codes=2, embedding=2, blocks=0))
    model = DiscreteVAE(1, 32, 32, grid=(4, 4), codes=2, embedding=2, blocks=0)
    x = images(1, size=(32, 32)).select(torch.tensor([0, 0]))
    x.pixels[1, 0, -4:, -4:] = 1 - x.pixels[1, 0, -4:, -4:]
    condition = policy.condition(model, x)
    assert torch.equal(*condition.base[:, 0])
    learned, _ = policy.retrace(condition, Codes(torch.zeros(2, 1, 16, dtype=torch.long))).flows()
    assert abs(learned[0].diff().item()) > 1e-6


@every_kind
@temperatures
def test_regrown_trajectories_part_where_they_should(logits, autoregressive, temperature):
    model, policy, x, condition = setting(logits, autoregressive)
    z = random_codes(3, 300)
    for depth in (1, 2, 3, 4, 9):
        kept = max(4 - depth, 0)
        torch.manual_seed(depth)
        old, new = policy.regrow(condition, z, depth, temperature)
        assert torch.equal(old.z.index, z.index)
        assert torch.equal(new.z.index[..., :kept], z.index[..., :kept])
        assert (new.z.index[..., kept:] != z.index[..., kept:]).any(1).all()
        for paths in (old, new):
            assert not paths.log_forward.requires_grad
            assert (paths.log_forward[:kept] == 0).all() and (paths.log_forward[4] == 0).all()
            assert (paths.log_backward == 0).all()
            torch.testing.assert_close(paths.log_joint, model.log_joint(x, paths.z).detach())
            scored = step_by_step(policy, condition, paths.z.index[1, :9], 1, temperature)
            torch.testing.assert_close(paths.log_forward[kept:4, 1, :9].t(), scored[:, kept:])


def test_regrown_codes_have_the_probabilities_of_the_tempered_policy():
    _, policy, _, condition = setting()
    start = Codes(torch.tensor([2, 0, 1, 1]).expand(3, 8_000, -1))
    torch.manual_seed(0)
    _, new = policy.regrow(condition, start, 2, 1.7)
    grids = torch.cat([torch.tensor([2, 0]).expand(9, -1), all_grids(2)], 1)
    p = step_by_step(policy, condition, grids, 2, 1.7)[:, 2:].sum(-1).exp()
    probability = dict(zip(map(tuple, grids.tolist()), p.tolist(), strict=True))
    assert p_value(counts(new.z.index[2]), probability) > 1e-3


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_back_and_forth_leaves_the_exact_posterior_invariant(logits, autoregressive, temperature):
    model, policy, x, _ = setting(logits, autoregressive)
    exact = posteriors(model, x)
    torch.manual_seed(0)
    grids, table = all_grids(), log_joint_table(model, x).softmax(-1)
    z = Codes(grids[torch.multinomial(table, 4_000, replacement=True)])
    kernel = BackAndForth(steps=5, depth=4, temperature=temperature)
    with torch.no_grad():
        new = kernel(policy, model, x, Latents(z, None)).z.index
    for row, probability in enumerate(exact):
        assert p_value(counts(new[row]), probability) > 1e-3
    assert (new != z.index).any(-1).double().mean() > 0.05


def test_back_and_forth_finds_the_exact_posterior():
    model, policy, x, condition = setting()
    torch.manual_seed(0)
    z, _ = policy.draw(condition, 4_000)
    kernel = BackAndForth(steps=100, depth=4)
    with torch.no_grad():
        new = kernel(policy, model, x, Latents(z, None)).z.index
    for row, probability in enumerate(posteriors(model, x)):
        frequency = {grid: n / 4_000 for grid, n in counts(new[row]).items()}
        assert total_variation(frequency, probability) < 0.07


# Trained policies.


class ExactPolicy(GridPolicy):
    """A policy whose conditionals and flows are those of the enumerated posterior."""

    def __init__(self, model: DiscreteVAE, x: Images):
        super().__init__(1, 4, 4, (2, 2), CODES)
        # log F of the states with n codes, for each image.
        table = log_joint_table(model, x)
        self.log_flow = [
            table.reshape(len(x), *[CODES] * filled, -1).logsumexp(-1) for filled in range(5)
        ]
        self.number = {tuple(pixels.flatten().tolist()): n for n, pixels in enumerate(x.pixels)}

    def states(self, condition: GridCondition, index: Tensor) -> Tensor:
        """log F of the states on the way to each grid, [5, batch, samples]."""
        images = [self.number[tuple(p.flatten().tolist())] for p in condition.x.pixels]
        image = torch.tensor(images)[:, None].expand(index.shape[:2])
        return torch.stack(
            [self.log_flow[n][(image, *index[..., :n].unbind(-1))] for n in range(5)]
        )

    def _log_probabilities(
        self, condition: GridCondition, index: Tensor, temperature: float = 1.0
    ) -> Tensor:
        return self.states(condition, index).diff(dim=0).movedim(0, -1) + 0 * condition.base.sum()

    def _flows(
        self, condition: GridCondition, index: Tensor, log_joint: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, fixed = super()._flows(condition, index, log_joint)
        return self.states(condition, index).flatten(1) - fixed, fixed


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_are_zero_at_the_exact_posterior(objective):
    """With images mixed in the batch, whose likelihoods differ, and whatever draws there are."""
    factory: Objective = OBJECTIVES[objective]
    model, x = make_model(), images(4)
    log_likelihood = log_joint_table(model, x).logsumexp(-1)
    assert float(log_likelihood.std()) > 0.3
    order = torch.tensor([2, 0, 3, 1])
    mixed = x.select(order)
    posterior = GFlowNetPosterior(ExactPolicy(model, x), factory, samples=6)
    torch.manual_seed(0)
    step = posterior.e_step(model, mixed)
    assert step.loss is not None and step.latents is not None
    assert step.latents.log_weights is not None
    assert len(counts(step.latents.z.index[0])) > 1
    assert float(step.loss.detach()) == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(
        step.latents.log_weights, log_likelihood[order][:, None].expand(-1, 6)
    )
    wrong = GFlowNetPosterior(make_policy(), factory, samples=6).e_step(model, mixed)
    assert wrong.loss is not None and float(wrong.loss.detach()) > 0.1


def train(
    model: DiscreteVAE, posterior: GFlowNetPosterior, x: Images, steps: int, lr: float
) -> None:
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(posterior.parameter_groups(), lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = posterior.e_step(model, x).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        decay.step()


def distances(model: DiscreteVAE, policy: GridPolicy, x: Images) -> list[float]:
    """Total variation between q(z | x) and p(z | x) of each image, exactly."""
    pairs = zip(q_table(policy, model, x), posteriors(model, x), strict=True)
    return [total_variation(q, p) for q, p in pairs]


@pytest.mark.parametrize(
    "objective, logits, hidden, samples, steps, lr, flow_lr",
    [
        ("vargrad", "linear", 32, 128, 200, 0.03, None),
        ("vargrad", "distance", 32, 128, 200, 0.03, None),
        ("tb", "linear", 64, 64, 350, 0.02, 0.3),
        ("subtb", "linear", 128, 32, 450, 0.015, 0.02),
    ],
)
def test_trained_posterior_is_that_of_enumeration(
    objective, logits, hidden, samples, steps, lr, flow_lr
):
    factory: Objective = OBJECTIVES[objective]
    model, x = make_model(), images(2)
    policy = make_policy(logits=logits, hidden=hidden)
    posterior = GFlowNetPosterior(policy, factory, samples=samples, flow_lr=flow_lr)
    assert min(distances(model, policy, x)) > 0.3
    train(model, posterior, x, steps, lr)
    assert max(distances(model, policy, x)) < 0.05


def _and_sleep(**parts: Objective) -> Any:
    """The parts and a sleep phase, all of weight 1."""
    return weighted_sum(
        parts={**parts, "sleep": sleep()},
        weights={name: 1.0 for name in [*parts, "sleep"]},
    )


@pytest.mark.parametrize(
    "objective, hidden, samples, steps, flow_lr",
    [
        (DetailedBalance(), 64, 32, 400, 0.1),
        (DetailedBalance(forward_looking=True), 64, 32, 300, 0.1),
        (VarGrad(loss="linex", alpha=1.0), 32, 64, 100, None),
        (ReverseKL(), 32, 64, 100, None),
        (ForwardKL(), 32, 256, 150, None),
        (_and_sleep(forward_kl=ForwardKL()), 32, 256, 150, None),
        (_and_sleep(tb=TrajectoryBalance()), 32, 32, 250, 0.1),
    ],
)
def test_two_codes_are_drawn_as_enumeration_says(objective, hidden, samples, steps, flow_lr):
    model, x = make_model(grid=(1, 2)), images(2)
    policy = make_policy(grid=(1, 2), hidden=hidden)
    posterior = GFlowNetPosterior(
        policy, objective, samples=samples, flow_lr=flow_lr, sleep_samples=256
    )
    assert min(distances(model, policy, x)) > 0.2
    train(model, posterior, x, steps, 0.02)
    assert max(distances(model, policy, x)) < 0.05


def test_sleep_takes_the_policy_to_the_model_s_posterior():
    """log P_F of the model's own draws, where it sees nothing but them."""
    model, policy, x, condition = setting(n=2)
    posterior = GFlowNetPosterior(policy, sleep_samples=256)
    before = posterior.sleep_loss(model)
    assert before is not None
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        loss = posterior.sleep_loss(model)
        assert loss is not None
        loss.backward()
        optimizer.step()
    draws, z = model.sample(500)
    log_q = policy.log_forward(policy.condition(model, draws), z)
    assert float(-log_q.mean().detach()) < float(before.detach()) - 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"encoder_width": 0}, "policy.encoder_width is 0; it must be at least 1"),
        ({"blocks": -1}, "policy.blocks is -1; it must be at least 0"),
        ({"hidden": 0}, "policy.hidden is 0; it must be at least 1"),
        ({"precision": "half"}, "policy.precision is 'half'; use 'float32' or 'bfloat16'"),
        (
            {"logits": "cosine"},
            "policy.logits is 'cosine'; use 'linear', 'distance' or 'bounded_distance'",
        ),
    ],
)
def test_arguments_that_make_no_policy(options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        GridPolicy(1, 4, 4, (2, 2), CODES, **options)


def test_reduced_precision_stays_close_and_out_of_evaluations():
    torch.set_default_dtype(torch.float32)
    exact, rounded = make_policy(), make_policy(precision="bfloat16")
    x = images(3)
    expected = exact.features(x)
    found = rounded.features(x)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.02 * expected.abs().max()
    assert rounded.eval().features(x).equal(expected)
