"""The model: p(x, z) with a discrete, compositional latent z."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from gfnem.posterior import Latents


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
        return True

    @abstractmethod
    def log_joint(self, x: Any, z: Any) -> Float[Tensor, "batch samples"]:
        """log p(x, z) in nats for `samples` latents of each data point, differentiable."""

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
