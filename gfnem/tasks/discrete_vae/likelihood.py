"""p(x | z) given what the decoder says of every pixel."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from gfnem.categorical import drawable

# Half the distance of two levels.
_HALF = 1 / 510
# Of the logistic's scale, in intensities from 0 to 1: far below a level's width.
_MIN_LOG_SCALE = -7.0


class Likelihood(ABC):
    """A distribution over images whose pixels are independent given the decoder's output.

    outputs: numbers that the decoder gives for each pixel and channel.
    """

    outputs: int

    @abstractmethod
    def log_prob(
        self,
        pixels: Float[Tensor, "batch channels height width"],
        output: Float[Tensor, "rows outputs height width"],
        image: Int[Tensor, "pairs"],
        row: Int[Tensor, "pairs"],
    ) -> Float[Tensor, "pairs"]:
        """Log-probability in nats of chosen images, each under a chosen row of the output."""

    @abstractmethod
    def mean(
        self, output: Float[Tensor, "rows outputs height width"]
    ) -> Float[Tensor, "rows channels height width"]:
        """Expected intensities."""

    @abstractmethod
    def sample(
        self,
        output: Float[Tensor, "rows outputs height width"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "rows channels height width"]:
        """One image for each row."""


class Bernoulli(Likelihood):
    """Binary pixels; the output is their log odds."""

    outputs = 1

    def log_prob(self, pixels: Tensor, output: Tensor, image: Tensor, row: Tensor) -> Tensor:
        # x log p + (1 - x) log (1 - p) = x l - softplus(l): a matrix product and one sum for each
        # row, nothing of the size of pairs times pixels.
        log_odds = output.flatten(1)
        normaliser = functional.softplus(log_odds).sum(-1)
        agreement = pixels.flatten(1).to(log_odds.dtype) @ log_odds.t()
        return agreement[image, row] - normaliser[row]

    def mean(self, output: Tensor) -> Tensor:
        return output.sigmoid()

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(drawable(output).sigmoid(), generator=generator)


class DiscretisedLogistic(Likelihood):
    """Intensities k / 255, k = 0 to 255: a logistic distribution's mass between k - 1/2 and
    k + 1/2, the tails added to the first and the last level (arXiv 1701.05517).

    The output is the mean, from 0 to 1 up to what the tails are for, and the log of the scale.
    """

    outputs = 2

    def log_prob(self, pixels: Tensor, output: Tensor, image: Tensor, row: Tensor) -> Tensor:
        mean, log_scale = self._parameters(output)
        mean, inverse_scale = mean[row], (-log_scale[row]).exp()
        x = pixels[image].to(output.dtype)
        upper = (x - mean + _HALF) * inverse_scale
        lower = (x - mean - _HALF) * inverse_scale
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)), without cancellation.
        below, above = functional.logsigmoid(upper), functional.logsigmoid(-lower)
        between = below + above + (-torch.expm1(-2 * _HALF * inverse_scale)).log()
        log_p = torch.where(x < _HALF, below, torch.where(x > 1 - _HALF, above, between))
        return log_p.flatten(1).sum(-1)

    def mean(self, output: Tensor) -> Tensor:
        return self._parameters(output)[0].clamp(0, 1)

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log_scale = self._parameters(output)
        uniform = torch.rand(
            mean.shape, generator=generator, dtype=mean.dtype, device=mean.device
        ).clamp(1e-6, 1 - 1e-6)
        x = mean + log_scale.exp() * uniform.logit()
        return (x.clamp(0, 1) * 255).round() / 255

    @staticmethod
    def _parameters(output: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = output.chunk(2, 1)
        # Untrained decoders begin in the middle, with a scale that reaches all levels.
        return mean + 0.5, (log_scale - 2).clamp(min=_MIN_LOG_SCALE)
