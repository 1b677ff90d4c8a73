"""A factorised q(z | x), climbing the evidence lower bound."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from gfnem.errors import UserError
from gfnem.gflownet.refinement import Refinement
from gfnem.latents import EStep, Latents
from gfnem.posterior import Posterior
from gfnem.tasks.discrete_vae.images import Images
from gfnem.tasks.discrete_vae.model import DiscreteVAE
from gfnem.tasks.discrete_vae.policy import GridPolicy


class GridPosterior(Posterior):
    """What posteriors that draw from a `GridPolicy` share.

    refinement: what makes the M-step's latents of plain draws; None takes the draws.
    """

    def __init__(self, policy: GridPolicy, refinement: Refinement | None = None):
        super().__init__()
        self.policy = policy
        self.refinement = refinement

    @torch.no_grad()
    def sample(self, model: DiscreteVAE, x: Images, samples: int) -> Latents:
        z, log_q = self.policy.draw(self.policy.condition(model, x), samples)
        return Latents(z, model.log_joint(x, z) - log_q)

    def refine(self, model: DiscreteVAE, x: Images, latents: Latents) -> Latents:
        if self.refinement is None:
            return latents
        return self.refinement(self.policy, model, x, latents)


class MeanField(GridPosterior):
    """Factorised categorical encoder.

    policy: factorised.
    samples: draws for each image in an E-step, and latents in an M-step.
    gradient: "reinforce", the score function with the leave-one-out mean of the other draws as
        baseline (arXiv 1602.06725); or "gumbel", straight-through Gumbel-softmax (arXiv
        1611.01144) with one draw, in one step with the model.
    temperature: of the relaxation.
    """

    def __init__(
        self,
        policy: GridPolicy,
        samples: int = 4,
        gradient: Literal["reinforce", "gumbel"] = "reinforce",
        temperature: float = 1.0,
        refinement: Refinement | None = None,
    ):
        super().__init__(policy, refinement)
        if gradient not in ("reinforce", "gumbel"):
            raise UserError(f"posterior.gradient is {gradient!r}; use 'reinforce' or 'gumbel'")
        if samples < 2 and gradient == "reinforce":
            raise UserError(f"posterior.samples is {samples}; gradient=reinforce needs at least 2")
        if not temperature > 0:
            raise UserError(f"posterior.temperature is {temperature}; it must be positive")
        # The relaxation leaves a correction at zero, for whatever goes on with the policy.
        if policy.autoregressive and gradient == "reinforce":
            raise UserError("posterior=mean_field needs policy.autoregressive=false")
        self.samples = samples
        self.gradient = gradient
        self.temperature = temperature

    @property
    def joint(self) -> bool:
        return self.gradient == "gumbel"

    @property
    def m_step_samples(self) -> int:
        return self.samples

    def e_step(self, model: DiscreteVAE, x: Images) -> EStep:
        if self.gradient == "gumbel":
            return self._relaxed(model, x)
        paths = self.policy.sample(self.policy.condition(model, x), self.samples)
        log_weights = paths.log_weights.detach()
        others = (log_weights.sum(-1, keepdim=True) - log_weights) / (self.samples - 1)
        log_q = paths.log_forward.sum(0)
        loss = -((log_weights - others) * log_q).mean()
        return EStep(loss, Latents(paths.z, log_weights), {"e_step/elbo": log_weights.mean()})

    def _relaxed(self, model: DiscreteVAE, x: Images) -> EStep:
        """The negative bound at one draw, differentiable through its relaxation."""
        log_q = self.policy.condition(model, x).base.log_softmax(-1)
        one_hot = functional.gumbel_softmax(log_q, tau=self.temperature, hard=True)
        row = torch.arange(len(x), device=log_q.device)
        output = model.decode(one_hot @ model.codebook.weight)
        reconstruction = model.likelihood.log_prob(x.pixels, output, row, row)
        log_prior = (one_hot * model.prior.log_probabilities(one_hot)).sum((1, 2))
        entropy: Tensor = -(log_q.exp() * log_q).sum((1, 2))
        elbo = (reconstruction + log_prior + entropy).mean()
        return EStep(-elbo, None, {"e_step/elbo": elbo.detach()})
