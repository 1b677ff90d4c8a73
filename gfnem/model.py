"""The model: p(x, z) with a discrete, compositional latent z."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.latents import Latents


class LatentVariableModel(nn.Module, ABC):
    """p(x, z), climbed in the M-step. x and z are the task's own batched types.

    is_truth: whether it begins as the distribution that its data was drawn from, so that there is
        nothing to climb and posteriors can be trained for it alone.
    """

    is_truth = False

    @property
    def normalised(self) -> bool:
        """Whether exp(log_joint) is a distribution, that of `sample`, and `log_likelihood` its sum.

        Otherwise log_joint is that of `sample` and `log_likelihood` plus something of z that no
        parameter of the model changes; posteriors are proportional to exp(log_joint).
        """
        return not self.unnormalised

    @property
    def unnormalised(self) -> str:
        """Why it is not `normalised` and what can be done, as a part of error messages, or ""."""
        return ""

    @abstractmethod
    def log_joint(self, x: Any, z: Any) -> Float[Tensor, "batch samples"]:
        """log p(x, z) in nats for `samples` latents of each data point, differentiable."""

    def expected_log_joint(self, x: Any, latents: Latents) -> Float[Tensor, "batch"]:
        """The mean of log p(x, z) over latents, as much as each counts in the M-step.

        Differentiable; log p(x, z) is not computed where it is known.
        """
        known = latents.log_joint
        return latents.mean(self.log_joint(x, latents.z) if known is None else known)

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Any, Any]:
        """At most n draws (x, z) from p, one latent for each data point.

        Fewer where draws had to be rejected; the model counts them in `rejected`.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters for a torch optimizer; a group may have options of its own."""
        return [{"params": list(self.parameters())}]

    def log_likelihood(self, x: Any) -> Float[Tensor, "batch"] | None:
        """Exact log p(x) in nats, differentiable; None where it is intractable."""
        return None

    def m_step_done(self, m_steps: int) -> None:
        """An M-step ended, which makes `m_steps` of them; what a model does not learn may move."""

    def metrics(self) -> dict[str, float]:
        """Figures worth logging in training."""
        return {}


class ClosedFormModel(LatentVariableModel, ABC):
    """A model that knows where log p(x, z) is largest, so that an M-step needs no gradient."""

    @abstractmethod
    def maximise(self, x: Any, latents: Latents) -> None:
        """Set the parameters to the maximiser of the weighted sum of log p(x, z) over a batch and
        its latents, with `m_step_weights`.
        """


class TractableModel(LatentVariableModel, ABC):
    """A model whose likelihood and posterior can be computed."""

    @property
    def tractable(self) -> bool:
        """Whether it is for the sizes at hand."""
        return True

    @property
    def tractable_sizes(self) -> str:
        """The sizes that it is tractable for, in brackets, as a part of error messages."""
        return ""

    @abstractmethod
    def log_likelihood(self, x: Any) -> Float[Tensor, "batch"] | None:
        """Exact log p(x) in nats, differentiable; None where the model is not `tractable`."""

    @abstractmethod
    def sample_posterior(self, x: Any, samples: int) -> Any:
        """Latents z drawn from p(z | x)."""

    def weighted_posterior(self, x: Any, samples: int) -> Latents:
        """The same with their weights, log p(x) each; without gradients."""
        with torch.no_grad():
            log_likelihood = self.log_likelihood(x)
            assert log_likelihood is not None
            z = self.sample_posterior(x, samples)
        return Latents(z, log_likelihood[:, None].expand(-1, samples))

    def enumerate(self, x: Any) -> Latents | None:
        """Every z, with p(z | x) as its `m_step_weights`; None for a model that does not do it."""
        return None


class PriorModel(LatentVariableModel, ABC):
    """A model that knows its prior."""

    @abstractmethod
    def sample_prior(self, x: Any, samples: int) -> tuple[Any, Float[Tensor, "batch samples"]]:
        """Latents z drawn for each data point without looking at it, and the logarithm of the
        probabilities with which they were drawn.

        What p(x | z) needs of x in order not to be 0, such as its length, may be known. Independent
        for one data point; several may get the same.
        """


class FactorisedModel(LatentVariableModel, ABC):
    """A model whose z has so many parts, and each part so many values, whatever x."""

    @property
    @abstractmethod
    def parts(self) -> Sequence[int]:
        """Number of values of each part."""

    @abstractmethod
    def expected_log_joint_of(
        self, x: Any, q: Sequence[Float[Tensor, "batch _"]], part: int
    ) -> Float[Tensor, "batch values"]:
        """E[log p(x, z)] for each value of one part, the others distributed independently by q;
        differentiable. What q says of the part itself does not matter.
        """

    @abstractmethod
    def latents(self, index: Int[Tensor, "batch samples parts"]) -> Any:
        """z of given values, from 0, of its parts."""
