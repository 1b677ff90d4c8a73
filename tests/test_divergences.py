"""Expected gradients of objectives are those of divergences, with all trajectories enumerated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gfnem.objectives import (
    Objective,
    db,
    fl_db,
    forward_kl,
    reverse_kl,
    sleep,
    subtb,
    tb,
    vargrad,
    weighted_sum,
)
from gfnem.posteriors.gflownet import GFlowNetPosterior, Paths
from gfnem.tasks.discrete_vae.codes import Codes
from gfnem.tasks.discrete_vae.data import Images
from gfnem.tasks.discrete_vae.model import DiscreteVAE
from gfnem.tasks.discrete_vae.policy import GridCondition, GridPolicy
from tests.tasks.discrete_vae.tiny import (
    all_grids,
    float64,  # noqa: F401
    images,
    log_joint_table,
    stirred,
)

pytestmark = pytest.mark.usefixtures("float64")

# 9 grids behind each of 16 images.
GRID = (1, 2)
CODES = 3
SIZE = (2, 2)


def make_model() -> DiscreteVAE:
    torch.manual_seed(0)
    model = DiscreteVAE(
        1, *SIZE, grid=GRID, codes=CODES, embedding=2, decoder_width=4, blocks=1, prior_width=3
    )
    return stirred(model, 0.3)


def make_policy(width: int = 4) -> GridPolicy:
    torch.manual_seed(0)
    policy = GridPolicy(
        1, *SIZE, GRID, CODES, embedding=2, encoder_width=width, blocks=1, hidden=width
    )
    return stirred(policy, 0.5)


class TablePolicy(GridPolicy):
    """One number for each image and grid, the log of an unnormalised q.

    At first q is the enumerated posterior, and its flows are the exact ones.
    """

    def __init__(self, model: DiscreteVAE, x: Images):
        super().__init__(1, *SIZE, GRID, CODES, embedding=2, encoder_width=4, blocks=1, hidden=4)
        table = log_joint_table(model, x).view(len(x), CODES, CODES)
        self.table = torch.nn.Parameter(table)

    def _log_flows(self, condition: GridCondition, index: Tensor) -> Tensor:
        table = self.table[condition.x.ids]
        image = torch.arange(len(table))[:, None].expand(index.shape[:2])
        return torch.stack(
            [
                table.logsumexp((1, 2))[image],
                table.logsumexp(2)[image, index[..., 0]],
                table[image, index[..., 0], index[..., 1]],
            ]
        )

    def _log_probabilities(
        self, condition: GridCondition, index: Tensor, temperature: float = 1.0
    ) -> Tensor:
        return self._log_flows(condition, index).diff(dim=0).movedim(0, -1)

    def _flows(
        self, condition: GridCondition, index: Tensor, log_joint: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, fixed = super()._flows(condition, index, log_joint)
        flows = self._log_flows(condition, index).flatten(1) - fixed
        return torch.cat([flows[:-1], torch.zeros_like(flows[:1])]), fixed


class Enumeration:
    """All 9 grids of each image as the trajectories of a batch.

    log_q: of each grid; differentiable.
    log_p: log p(z | x), from SciPy.
    """

    def __init__(self, policy: GridPolicy | None = None, n: int = 2):
        self.model, self.x = make_model(), images(n, size=SIZE)
        self.policy = policy or make_policy()
        self.condition = self.policy.condition(self.model, self.x)
        self.paths = self.policy.retrace(
            self.condition, Codes(all_grids(2, CODES).expand(n, -1, -1))
        )
        log_joint = log_joint_table(self.model, self.x)
        self.log_z = log_joint.logsumexp(-1)
        self.log_p = log_joint - self.log_z[:, None]
        self.log_q = self.paths.log_forward.sum(0)
        self.q = self.log_q.exp().detach()

    def losses(self, objective: Objective, paths: Paths | None = None) -> Tensor:
        """The loss of each trajectory, [images, grids]."""
        paths = paths or self.paths
        return losses(objective, self.policy, self.condition, paths)

    def gradient(self, value: Tensor) -> Tensor:
        return gradient(value, self.policy)

    def divergence(self, name: str) -> Tensor:
        """Mean over the images, differentiable."""
        log_q, log_p = self.log_q, self.log_p
        values: dict[str, Callable[[], Tensor]] = {
            "reverse": lambda: log_q.exp() * (log_q - log_p),
            "forward": lambda: log_p.exp() * (log_p - log_q),
            "chi2": lambda: (2 * log_q - log_p).exp(),
        }
        return values[name]().sum(-1).mean()

    def with_log_z(self, log_z: Tensor) -> Paths:
        """The same trajectories with given log Z of each image."""
        rows = log_z.repeat_interleave(self.q.shape[1])
        return replace(self.paths, flows=lambda: (rows[None], torch.zeros_like(rows[None])))

    def pairs(self) -> tuple[GridCondition, Paths, Tensor]:
        """Every pair of grids as the two trajectories of a data point, and its probability."""
        n, grids = self.q.shape
        pair = torch.cartesian_prod(torch.arange(grids), torch.arange(grids))
        rows = torch.arange(n).repeat_interleave(len(pair))
        condition = self.policy.condition(self.model, self.x.select(rows))
        index = all_grids(2, CODES)[pair].repeat(n, 1, 1)
        probability = self.q[:, pair].prod(-1).flatten()
        return condition, self.policy.retrace(condition, Codes(index)), probability


def losses(
    objective: Objective, policy: GridPolicy, condition: GridCondition, paths: Paths
) -> Tensor:
    trajectories = policy.trajectories(condition, paths)
    made: Any = objective(*policy.estimators())
    loss = made.loss(
        trajectories.env, trajectories, reduction="none", log_rewards=paths.log_joint.flatten()
    )
    return loss.view(paths.log_joint.shape)


def gradient(value: Tensor, policy: GridPolicy) -> Tensor:
    parameters = list(policy.parameters())
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros(p.numel()) if g is None else g.flatten()
            for p, g in zip(parameters, found, strict=True)
        ]
    )


def test_trajectory_balance_with_the_best_log_z_is_twice_the_reverse_kl():
    every = Enumeration()
    best = (every.q * every.paths.log_weights).sum(-1).detach().requires_grad_()
    loss = (every.q * every.losses(tb, every.with_log_z(best))).sum(-1).mean()
    (slope,) = torch.autograd.grad(loss, best, retain_graph=True)
    torch.testing.assert_close(slope, torch.zeros(2))
    expected = every.gradient(every.divergence("reverse"))
    assert expected.norm() > 0.1
    torch.testing.assert_close(every.gradient(loss), 2 * expected)


@pytest.mark.parametrize(
    "loss, alpha, divergences",
    [
        ("squared", 1.0, {"reverse": 2.0}),
        ("linex", 1.0, {"forward": 1.0}),
        ("linex", -1.0, {"chi2": 0.5}),
        ("shifted_cosh", 1.0, {"forward": 1.0, "chi2": 0.5}),
    ],
)
def test_losses_of_the_residual_stand_for_divergences(loss, alpha, divergences):
    every = Enumeration()
    objective = partial(tb, loss=loss, alpha=alpha)
    value = (every.q * every.losses(objective, every.with_log_z(every.log_z))).sum(-1).mean()
    expected = sum(
        factor * every.gradient(every.divergence(name)) for name, factor in divergences.items()
    )
    torch.testing.assert_close(every.gradient(value), expected)


@pytest.mark.parametrize("objective", [reverse_kl, vargrad])
def test_score_function_and_log_variance_are_the_reverse_kl(objective):
    """Of pairs of trajectories: in general log-variance is 2 (K - 1) / K times as large."""
    every = Enumeration()
    condition, paths, probability = every.pairs()
    value = losses(objective, every.policy, condition, paths).mean(-1)
    expected = every.gradient(every.divergence("reverse"))
    found = every.gradient((probability * value).sum() / len(every.x))
    torch.testing.assert_close(found, expected)


def test_wake_phase_is_the_forward_kl_where_the_weights_are_exact():
    """They are where all grids are drawn equally often from a uniform q."""
    policy = make_policy()
    assert policy.correct is not None
    with torch.no_grad():
        for parameter in (*policy.projection.parameters(), *policy.correct.parameters()):
            parameter.zero_()
    every = Enumeration(policy)
    torch.testing.assert_close(every.q, torch.full_like(every.q, 1 / 9))
    expected = every.gradient(every.divergence("forward"))
    assert expected.norm() > 0.1
    torch.testing.assert_close(every.gradient(every.losses(forward_kl).mean()), expected)


def all_images() -> Images:
    pixels = torch.cartesian_prod(*[torch.arange(2.0)] * 4).view(16, 1, 2, 2)
    return Images(pixels.to(torch.get_default_dtype()), torch.arange(16))


def test_sleep_is_the_forward_kl_over_the_model_s_own_data(monkeypatch):
    model, policy, x = make_model(), make_policy(), all_images()
    log_p = log_joint_table(model, x)
    assert float(log_p.exp().sum()) == pytest.approx(1)
    condition = policy.condition(model, x)
    log_q = policy.log_forward(condition, Codes(all_grids(2, CODES).expand(16, -1, -1)))
    log_posterior = log_p - log_p.logsumexp(-1, keepdim=True)
    divergence = (log_posterior.exp() * (log_posterior - log_q)).sum(-1)
    expected = gradient((log_p.logsumexp(-1).exp() * divergence).sum(), policy)
    assert expected.norm() > 0.1
    posterior, loss = GFlowNetPosterior(policy, sleep), torch.zeros(())
    for row, grid in torch.cartesian_prod(torch.arange(16), torch.arange(9)):
        drawn = x.select(row[None]), Codes(all_grids(2, CODES)[grid][None, None])
        monkeypatch.setattr(model, "sample", lambda n, drawn=drawn: drawn)
        step = posterior.e_step(model, None)  # data is not looked at
        assert step.loss is not None and step.latents is None
        loss = loss + log_p[row, grid].exp() * step.loss
    torch.testing.assert_close(gradient(loss, policy), expected)


def test_sleep_trains_a_posterior_to_that_of_enumeration():
    """Total variation on the model's own data, on average: what sleep alone answers for."""
    model, policy, x = make_model(), make_policy(width=16), all_images()
    log_p = log_joint_table(model, x)
    p_of_x = log_p.logsumexp(-1).exp()
    grids = Codes(all_grids(2, CODES).expand(16, -1, -1))

    def distance() -> float:
        with torch.no_grad():
            q = policy.log_forward(policy.condition(model, x), grids).exp()
        return float(p_of_x @ (log_p.softmax(-1) - q).abs().sum(-1) / 2)

    assert distance() > 0.2
    posterior = GFlowNetPosterior(policy, sleep, sleep_samples=512)
    optimizer = torch.optim.Adam(posterior.parameters(), lr=0.02)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 250)
    for _ in range(250):
        optimizer.zero_grad()
        loss = posterior.e_step(model, None).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        decay.step()
    assert distance() < 0.05


@pytest.mark.parametrize(
    "objective",
    [
        vargrad,
        tb,
        subtb,
        fl_db,
        reverse_kl,
        partial(tb, loss="linex", alpha=1.0),
        partial(subtb, loss="linex", alpha=-1.0),
        partial(fl_db, loss="shifted_cosh"),
        partial(vargrad, loss="linex", alpha=1.0),
        partial(
            weighted_sum,
            parts={"tb": tb, "reverse_kl": reverse_kl},
            weights={"tb": 0.5, "reverse_kl": 2.0},
        ),
    ],
)
def test_nothing_moves_at_the_exact_posterior(objective):
    """Whatever is drawn, with images of different likelihood in one batch."""
    model, x = make_model(), images(4, size=SIZE)
    policy = TablePolicy(model, x)
    assert float(policy.table.detach().logsumexp((1, 2)).std()) > 0.1
    mixed = x.select(torch.tensor([2, 0, 3, 1]))

    def slope() -> Tensor:
        torch.manual_seed(0)
        loss = GFlowNetPosterior(policy, objective, samples=5).e_step(model, mixed).loss
        assert loss is not None
        return gradient(loss, policy)

    torch.testing.assert_close(slope(), torch.zeros_like(slope()), rtol=0, atol=1e-9)
    with torch.no_grad():
        policy.table[2, 1, 1] += 2
    assert slope().abs().max() > 1e-3


def test_detailed_balance_without_partial_rewards_is_still_at_the_exact_posterior():
    model, x = make_model(), images(3, size=SIZE)
    every = Enumeration(TablePolicy(model, x), n=3)
    learned, fixed = every.paths.flows()
    flows = torch.cat([(learned + fixed)[:-1], learned[-1:]])
    trajectories = every.policy.trajectories(
        every.condition, replace(every.paths, flows=lambda: (flows, fixed))
    )
    made: Any = db(*every.policy.estimators())
    loss = made.loss(trajectories.env, trajectories, recalculate_all_logprobs=False)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-18)
    found = every.gradient(loss)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-9)


def test_the_wake_phase_stays_at_the_exact_posterior_on_average():
    model, x = make_model(), images(2, size=SIZE)
    every = Enumeration(TablePolicy(model, x))
    condition, paths, probability = every.pairs()
    value = losses(forward_kl, every.policy, condition, paths).mean(-1)
    found = every.gradient((probability * value).sum())
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-9)
    assert every.gradient(value[1]).abs().max() > 1e-3
