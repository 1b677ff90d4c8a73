from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.gflownet.refinement import Thinning
from gfnem.posterior import Posterior
from gfnem.posteriors.exact import ExactPosterior
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.tasks.discrete_vae import warm_start as module
from gfnem.tasks.discrete_vae.images import Images
from gfnem.tasks.discrete_vae.mean_field import MeanField
from gfnem.tasks.discrete_vae.policy import GridPolicy
from gfnem.tasks.discrete_vae.vector_quantized import VectorQuantized
from gfnem.tasks.discrete_vae.warm_start import WarmStart
from tests.tasks.discrete_vae.tiny import images, make_model, make_policy

Start = Callable[[GridPolicy], Posterior]
STARTS: dict[str, Start] = {"vq": VectorQuantized, "gumbel": partial(MeanField, gradient="gumbel")}
LOGITS = {"vq": "distance", "gumbel": "linear"}

every_start = pytest.mark.parametrize("start", STARTS)


def make(start: str, steps: int = 3, autoregressive: bool = True) -> WarmStart:
    policy = make_policy(logits=LOGITS[start], noise=0.0, autoregressive=autoregressive)
    then = GFlowNetPosterior(policy, samples=4, refinement=Thinning(1))
    return WarmStart(STARTS[start], then, steps)


class Pictures:
    """Batches of eight images, in an order that depends on the epoch."""

    def train_batches(self, epoch: int) -> list[Images]:
        order = torch.randperm(24, generator=torch.Generator().manual_seed(epoch))
        return [images(24).select(part) for part in order.split(8)]


@every_start
def test_the_second_posterior_takes_over_after_so_many_steps(start):
    model, x, posterior = make_model(), images(8), make(start)
    for number in range(6):
        first = number < 3
        assert posterior.active is (posterior.start if first else posterior.then)
        assert posterior.joint == first
        assert posterior.deterministic == (first and start == "vq")
        assert posterior.m_step_samples == posterior.active.m_step_samples
        step = posterior.e_step(model, x)
        assert step.loss is not None
        # Draws of q come from the second alone; both of these starts train the model as well.
        assert (step.latents is None) == first
    latents = posterior.sample(model, x, 4)
    assert posterior.refine(model, x, latents).z.index.shape == (8, 1, 4)
    expected = model.log_joint(x, latents.z)[:, 0]
    torch.testing.assert_close(posterior.expected_log_joint(model, x, latents), expected)


@every_start
def test_both_train_one_policy(start):
    posterior = make(start)
    policy: Any = posterior.policy
    assert posterior.start.policy is policy and posterior.then.policy is policy
    trained = {id(p) for group in posterior.parameter_groups() for p in group["params"]}
    assert trained == {id(p) for p in policy.parameters()}


def test_logits_are_scaled_once_when_the_second_takes_over(monkeypatch):
    asked = []

    def choose(policy: GridPolicy, model: Any, x: Images, *args: Any, **options: Any) -> float:
        asked.append(x)
        return 8.0

    monkeypatch.setattr(module, "choose_temperature", choose)
    model, posterior = make_model(), make("vq")
    log_beta: Any = posterior.policy.log_beta
    before = log_beta.item()
    batches = [images(8, seed=seed) for seed in range(6)]
    values = []
    for x in batches:
        posterior.e_step(model, x)
        values.append(log_beta.item())
    after = before - math.log(8)
    assert values == pytest.approx([before] * 3 + [after] * 3)
    assert len(asked) == 1 and asked[0] is batches[3]
    assert log_beta.requires_grad


def test_scaled_logits_propose_better():
    """By the mean weight's logarithm, on the batch that they were scaled on."""
    model, posterior, x = make_model(), make("vq", steps=1), images(8)
    assert posterior.policy.log_beta is not None
    posterior.policy.log_beta.data += 9

    def quality() -> Tensor:
        torch.manual_seed(0)
        log_weights = posterior.sample(model, x, 64).log_weights
        assert log_weights is not None
        return (log_weights.logsumexp(-1) - math.log(64)).mean()

    posterior.e_step(model, x)
    before = quality()
    posterior.e_step(model, x)
    assert quality() > before + 0.5


def test_linear_logits_are_left_as_they_are():
    model, posterior, x = make_model(), make("gumbel", steps=1), images(8)
    posterior.e_step(model, x)
    before = [p.detach().clone() for p in posterior.parameters()]
    posterior.e_step(model, x)
    assert all(torch.equal(p, q) for p, q in zip(before, posterior.parameters(), strict=True))


@every_start
def test_state_says_which_of_them_is_at_work(start):
    model, x, posterior = make_model(), images(8), make(start)
    for done in range(6):
        other = make(start)
        other.load_state_dict(posterior.state_dict())
        assert int(other.done) == min(done, 4)
        assert (other.active is other.then) == (posterior.active is posterior.then)
        for one, two in zip(posterior.parameters(), other.parameters(), strict=True):
            assert torch.equal(one, two)
        posterior.e_step(model, x)


def em(start: str, steps: int) -> EM:
    torch.manual_seed(5)
    return EM(make_model(seed=1), make(start), Pictures(), m_steps=steps, seed=0)


@every_start
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_run_goes_on_where_it_stopped(start, stop):
    """Before, at and behind the change."""
    whole = em(start, 6)
    whole.fit()
    assert whole.done.m_steps == 6 and whole.done.e_steps == 6
    first = em(start, stop)
    first.fit()
    state = first.state_dict()  # with the random numbers as they are before the next is made
    second = em(start, 6)
    second.load_state_dict(state)
    second.fit()
    for one, other in ((whole.model, second.model), (whole.posterior, second.posterior)):
        state = other.state_dict()
        for key, value in one.state_dict().items():
            assert torch.equal(value, state[key]), key


def test_arguments_that_make_no_warm_start():
    with pytest.raises(UserError, match="^warm_start.steps is 0; it must be at least 1$"):
        make("vq", steps=0)
    message = "^warm_start begins with an encoder, and ExactPosterior has none to go on with: leave"
    with pytest.raises(UserError, match=message):
        WarmStart(VectorQuantized, ExactPosterior())


def test_a_gumbel_start_leaves_the_correction_at_zero():
    model, posterior = make_model(), make("gumbel", steps=3)
    trainer = EM(model, posterior, Pictures(), m_steps=3, seed=0)
    correct: Any = posterior.policy.correct
    with torch.no_grad():
        correct.weight.zero_()
        correct.bias.zero_()
    before = next(posterior.policy.encoder.parameters()).detach().clone()
    trainer.fit()
    assert not torch.equal(next(posterior.policy.encoder.parameters()), before)
    assert (correct.weight == 0).all() and (correct.bias == 0).all()


def test_m_steps_in_closed_form_are_refused_at_once():
    posterior = make("vq")
    posterior.then = GFlowNetPosterior(posterior.policy, m_step="closed")
    message = "^posterior.m_step=closed needs a model that knows its maximum; DiscreteVAE does not"
    with pytest.raises(UserError, match=message):
        EM(make_model(), posterior, Pictures(), m_steps=1)


def test_both_posteriors_check_the_model_and_the_active_one_tabulates(monkeypatch):
    posterior, model, x = make("vq", steps=1), make_model(), images(2)
    checked, tables = [], {}
    for name in ("start", "then"):
        part = getattr(posterior, name)
        tables[name] = object()
        monkeypatch.setattr(part, "check", lambda model, name=name: checked.append(name))
        monkeypatch.setattr(part, "tabulate", lambda model, x, name=name: tables[name])
    posterior.check(model)
    assert checked == ["start", "then"]
    assert posterior.tabulate(model, x) is tables["start"]
    posterior.e_step(model, x)
    assert posterior.tabulate(model, x) is tables["then"]
