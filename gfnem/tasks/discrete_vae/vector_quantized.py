"""VQ-VAE: one grid for each image, the gradient passed straight through (arXiv 1711.00937)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from gfnem.errors import UserError
from gfnem.posterior import EStep
from gfnem.tasks.discrete_vae.data import Images
from gfnem.tasks.discrete_vae.mean_field import GridPosterior
from gfnem.tasks.discrete_vae.model import DiscreteVAE
from gfnem.tasks.discrete_vae.policy import GridPolicy


class VectorQuantized(GridPosterior):
    """Each position takes the entry of the codebook next to the encoder's vector h.

    Encoder, decoder and prior learn in one step; the codebook follows the vectors by exponential
    moving averages, and entries that nothing is near to begin anew at some vector. As a
    distribution, for importance sampling, it is softmax(-beta |h - e|^2) at each position.

    policy: with logits "distance"; a correction that it may have is not trained.
    commitment: weight of |h - e|^2, summed over the grid.
    decay: of the moving averages.
    dead_below: entries with fewer vectors than this, as a moving average, begin anew.
    """

    # Codes are not drawn in training; evaluations add the usual bound of the one grid.
    deterministic = True

    def __init__(
        self,
        policy: GridPolicy,
        commitment: float = 0.25,
        decay: float = 0.9,
        dead_below: float = 2.0,
    ):
        super().__init__(policy)
        if policy.logits != "distance":
            raise UserError("posterior=vq needs policy.logits=distance")
        if commitment < 0:
            raise UserError(f"posterior.commitment is {commitment}; it must not be negative")
        if not 0 <= decay < 1:
            raise UserError(f"posterior.decay is {decay}; it must be at least 0 and below 1")
        self.commitment = commitment
        self.quantiser = VectorQuantize(
            dim=policy.embedding,
            codebook_size=policy.codes,
            decay=decay,
            commitment_weight=1.0,
            threshold_ema_dead_code=dead_below,  # type: ignore[arg-type]
            kmeans_init=True,
            rotation_trick=False,
        )

    @property
    def joint(self) -> bool:
        return True

    def e_step(self, model: DiscreteVAE, x: Images) -> EStep:
        vectors = self.policy.projection(self.policy.features(x))
        quantised, index, distance = self.quantised(vectors)
        with torch.no_grad():
            model.codebook.weight.copy_(self.quantiser.codebook)
        row = torch.arange(len(x), device=vectors.device)
        reconstruction = model.likelihood.log_prob(x.pixels, model.decode(quantised), row, row)
        log_joint = (reconstruction + model.log_prior(index)).mean()
        # The quantiser's is a mean over the entries of all vectors.
        commitment = self.commitment * distance.sum() * vectors[0].numel()
        metrics = {"e_step/log_joint": log_joint.detach(), "e_step/commitment": commitment.detach()}
        return EStep(commitment - log_joint, None, metrics)

    def quantised(
        self, vectors: Float[Tensor, "batch positions embedding"]
    ) -> tuple[Float[Tensor, "batch positions embedding"], Int[Tensor, "batch positions"], Tensor]:
        """Entries with the vectors' gradient, their numbers, and the mean squared distance."""
        quantiser: Any = self.quantiser
        return quantiser(vectors)
