"""The exact posterior, where log p(x) is tractable."""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from gfnem.errors import UserError
from gfnem.latents import EStep, Latents
from gfnem.model import LatentVariableModel, TractableModel
from gfnem.posterior import Posterior, check_m_step


class ExactPosterior(Posterior):
    """p(z | x) itself.

    m_step: "marginal" climbs log p(x), whose gradient is that of E_{p(z | x)}[log p(x, z)]
        (Fisher's identity), so that it is EM with the expectation taken exactly; "sample" climbs
        log p(x, z) on `samples` draws of the posterior; "closed" goes to the maximum of
        E_{p(z | x)}[log p(x, z)] at once, which is EM as in the textbook where a batch has all of
        the data.
    """

    def __init__(
        self, m_step: Literal["marginal", "sample", "closed"] = "marginal", samples: int = 4
    ):
        super().__init__()
        check_m_step(m_step, ("marginal", "sample", "closed"))
        if samples < 1:
            raise UserError(f"posterior.samples is {samples}; it must be at least 1")
        self.m_step = m_step
        self.samples = samples

    @property
    def m_step_samples(self) -> int:
        return self.samples

    def check(self, model: LatentVariableModel) -> None:
        self._tractable(model)

    def e_step(self, model: LatentVariableModel, x: Any) -> EStep:
        return EStep(loss=None, latents=None)

    def sample(self, model: LatentVariableModel, x: Any, samples: int) -> Latents:
        return self._tractable(model).weighted_posterior(x, samples)

    def m_step_latents(
        self, model: LatentVariableModel, x: Any, latents: Latents | None = None
    ) -> Latents:
        if self.m_step != "closed":
            return super().m_step_latents(model, x, latents)
        every = self._tractable(model).enumerate(x)
        if every is None:
            raise UserError(
                f"posterior.m_step=closed needs all latents; {type(model).__name__} does not "
                "enumerate them: use posterior.m_step=marginal"
            )
        return every

    def expected_log_joint(
        self, model: LatentVariableModel, x: Any, latents: Latents | None = None
    ) -> Float[Tensor, "batch"]:
        if self.m_step == "marginal":
            log_likelihood = self._tractable(model).log_likelihood(x)
            assert log_likelihood is not None
            return log_likelihood
        return super().expected_log_joint(model, x, latents)

    @staticmethod
    def _tractable(model: LatentVariableModel) -> TractableModel:
        if not isinstance(model, TractableModel):
            raise UserError(
                f"posterior=exact needs a model with a tractable posterior; "
                f"{type(model).__name__} has none: use posterior=gflownet"
            )
        if not model.normalised:
            raise UserError(
                f"ExactPosterior needs a model that is normalised; this {type(model).__name__} is "
                f"not, because {model.unnormalised}, or use GFlowNetPosterior or MCMC"
            )
        if not model.tractable:
            raise UserError(
                f"posterior=exact: this {type(model).__name__} is too large for it"
                f"{model.tractable_sizes}; make it smaller or use posterior=gflownet"
            )
        return model
