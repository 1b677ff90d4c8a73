from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.gflownet import objectives
from gfnem.gradients import gradient_noise
from gfnem.latents import EStep, Latents
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.posteriors.exact import ExactPosterior
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.tasks.mixture.evaluate import MixtureEvaluator
from gfnem.tasks.mixture.model import HierarchicalMixture
from gfnem.tasks.mixture.policy import MixturePolicy
from tests.tasks.mixture.tiny import make_data, make_model, make_policy, points


class Given(Posterior):
    """Its E-steps have given gradients, one after the other."""

    def __init__(self, *gradients: list[float]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.gradients = iter(gradients)

    def e_step(self, model: LatentVariableModel, x: Any) -> EStep:
        return EStep((torch.tensor(next(self.gradients)) * self.weight).sum(), None)

    def sample(self, model: LatentVariableModel, x: Any, samples: int) -> Latents:
        raise NotImplementedError


def test_noise_of_given_gradients():
    # Means 2 and 1, deviations 1 and 2 to either side: (2 + 8) / (4 + 1).
    posterior = Given([1.0, 3.0], [3.0, -1.0])
    found = gradient_noise(make_model(), posterior, None, 2)
    assert found == {"gradient_variance": pytest.approx(10), "gradient_noise": pytest.approx(2)}
    scaled = Given([5.0, 15.0], [15.0, -5.0])
    found = gradient_noise(make_model(), scaled, None, 2)
    assert found == {"gradient_variance": pytest.approx(250), "gradient_noise": pytest.approx(2)}
    assert posterior.weight.grad is None


@pytest.mark.parametrize(
    "objective, silent", [(objectives.VarGrad(), True), (objectives.ForwardKL(), False)]
)
def test_balances_have_no_noise_at_the_exact_posterior(
    objective: objectives.Objective, silent: bool
):
    """Components that all lie at one place are equally likely, and so they are to a policy whose
    last layers are zero.
    """
    model = HierarchicalMixture(torch.zeros(3, 2), petals=1)
    policy = MixturePolicy(make_data(), superclusters=3, petals=1, width=8)
    for head in (policy.supercluster, policy.petal):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    posterior = GFlowNetPosterior(policy, objective)
    found = gradient_noise(model, posterior, points(4), 8)
    assert (found["gradient_variance"] < 1e-10) == silent


def test_state_flows_do_not_count():
    """Their parameters are drawn from by nobody: with the score function they have no gradient."""
    torch.manual_seed(0)
    model, x = make_model(), points(5)
    noise = []
    for scale in (1.0, 100.0):
        policy = make_policy()
        with torch.no_grad():
            policy.flow.weight.mul_(scale)
        torch.manual_seed(1)
        posterior = GFlowNetPosterior(policy, objectives.ReverseKL())
        noise.append(gradient_noise(model, posterior, x, 4))
        counted = {id(p) for p in posterior.sampling_parameters()}
        assert not counted & {id(p) for p in policy.flow_parameters()}
        assert len(counted) + len(policy.flow_parameters()) == len(list(policy.parameters()))
    assert noise[0] == noise[1]


def test_measuring_changes_nothing_about_training():
    ended = []
    for gradient_e_steps in (None, 3):
        model, posterior = make_model(), GFlowNetPosterior(make_policy(), sleep=0.5)
        data = make_data()
        evaluator = MixtureEvaluator(data, gradient_e_steps=gradient_e_steps)
        torch.manual_seed(3)
        em = EM(model, posterior, data, m_steps=4, evaluator=evaluator, evaluate_every=1)
        metrics = em.fit()
        assert ("train/gradient_noise" in metrics) == (gradient_e_steps is not None)
        ended.append([*model.state_dict().values(), *posterior.state_dict().values()])
    assert all(one.equal(other) for one, other in zip(*ended, strict=True))


def test_draws_of_the_sleep_phase_are_not_counted():
    class Counting(HierarchicalMixture):
        def __init__(self, means: torch.Tensor):
            super().__init__(means)
            self.register_buffer("draws", torch.zeros(()))

        def sample(self, n: int, generator: torch.Generator | None = None):
            self.draws += n
            return super().sample(n, generator)

    model = Counting(torch.randn(3, 2))
    gradient_noise(model, GFlowNetPosterior(make_policy(), sleep=1.0), points(4), 2)
    assert model.draws == 0


def test_what_cannot_be_measured_is_refused():
    model, x = make_model(), points(3)
    with pytest.raises(UserError, match="^evaluator.gradient_e_steps is 1; it must be at least 2"):
        gradient_noise(model, GFlowNetPosterior(make_policy()), x, 1)
    message = "^evaluator.gradient_e_steps has no effect: the posterior has nothing to learn$"
    with pytest.raises(UserError, match=message):
        gradient_noise(model, ExactPosterior(), x, 2)
