"""Draws of a proposal, resampled in proportion to their importance weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from gfnem.errors import UserError
from gfnem.inference import log_mean_exp
from gfnem.latents import EStep, Latents
from gfnem.model import LatentVariableModel, PriorModel
from gfnem.posterior import Posterior, check_m_step


class Prior(Posterior):
    """p(z), whatever x: a proposal for a `PriorModel`."""

    def check(self, model: LatentVariableModel) -> None:
        if not isinstance(model, PriorModel):
            raise UserError(
                f"posterior=importance proposes draws of the prior, which {type(model).__name__} "
                "does not give: use another proposal"
            )

    def e_step(self, model: LatentVariableModel, x: Any) -> EStep:
        return EStep(loss=None, latents=None)

    @torch.no_grad()
    def sample(self, model: LatentVariableModel, x: Any, samples: int) -> Latents:
        assert isinstance(model, PriorModel)
        z, log_prior = model.sample_prior(x, samples)
        return Latents(z, model.log_joint(x, z) - log_prior)


class ImportancePosterior(Posterior):
    """Sampling importance resampling (Rubin, 1988): of many candidates from a proposal, latents are
    drawn with replacement in proportion to their importance weights.

    q is what comes out on average over the candidates. With the candidates as auxiliary variables
    (arXiv 1704.02916) the weight of every draw is the mean of the candidates' weights, whose
    expectation is p(x): the mean of its logarithm is the importance-weighted bound (arXiv
    1509.00519), the same for all draws of one data point. As one data point's draws in one call
    share their candidates, effective sample sizes of them mean nothing.

    The proposal learns as it would alone. For a GFlowNet, `ImportanceResampling` as its refinement
    does nearly the same and saves E-steps' draws; it resamples for M-steps alone, while here all
    draws are.

    proposal: with weights of its own; the model's prior by default.
    proposals: candidates for each data point.
    samples: latents of each data point in an M-step.
    m_step: "gradient", or "closed" for a model that knows where log p(x, z) of given latents is
        largest: M-steps go there at once.
    """

    def __init__(
        self,
        proposal: Posterior | None = None,
        proposals: int = 64,
        samples: int = 4,
        m_step: Literal["gradient", "closed"] = "gradient",
    ):
        super().__init__()
        check_m_step(m_step)
        for name, value in (("proposals", proposals), ("samples", samples)):
            if value < 1:
                raise UserError(f"posterior.{name} is {value}; it must be at least 1")
        self.proposal = Prior() if proposal is None else proposal
        self.proposals = proposals
        self.samples = samples
        self.m_step = m_step

    @property
    def joint(self) -> bool:
        return self.proposal.joint

    def check(self, model: LatentVariableModel) -> None:
        self.proposal.check(model)

    @property
    def m_step_samples(self) -> int:
        return self.samples

    def e_step(self, model: LatentVariableModel, x: Any) -> EStep:
        # The latents that the proposal learned from are none of this q.
        return replace(self.proposal.e_step(model, x), latents=None)

    @torch.no_grad()
    def sample(self, model: LatentVariableModel, x: Any, samples: int) -> Latents:
        candidates = self.proposal.sample(model, x, self.proposals)
        if candidates.log_weights is None:
            raise UserError(
                f"posterior.proposal is {type(self.proposal).__name__}, whose draws have no "
                "weights: use a proposal whose density is known"
            )
        weights = candidates.log_weights.softmax(-1)
        chosen = torch.multinomial(weights, samples, replacement=True)
        log_weights = log_mean_exp(candidates.log_weights)[:, None].expand(-1, samples)
        return Latents(candidates.z.select(chosen), log_weights)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.proposal.parameter_groups()
