"""VQ-VAEs: one grid for each image, the gradient passed straight through (arXiv 1711.00937)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from vector_quantize_pytorch import FSQ, VectorQuantize

from gfnem.errors import UserError
from gfnem.latents import EStep
from gfnem.tasks.discrete_vae.images import Images
from gfnem.tasks.discrete_vae.mean_field import GridPosterior
from gfnem.tasks.discrete_vae.model import DiscreteVAE
from gfnem.tasks.discrete_vae.policy import GridPolicy


class Quantised(GridPosterior):
    """Each position takes the entry of the codebook next to the encoder's vector h.

    Encoder, decoder and prior learn in one step. As a distribution, for importance sampling, it is
    softmax(-beta |h - e|^2) at each position.
    """

    # Codes are not drawn in training; evaluations add the usual bound of the one grid.
    deterministic = True

    @property
    def joint(self) -> bool:
        return True

    def e_step(self, model: DiscreteVAE, x: Images) -> EStep:
        vectors = self.policy.projection(self.policy.features(x))
        quantised, index, commitment = self.quantise(vectors)
        with torch.no_grad():
            model.codebook.weight.copy_(self.entries)
        row = torch.arange(len(x), device=vectors.device)
        reconstruction = model.likelihood.log_prob(x.pixels, model.decode(quantised), row, row)
        log_joint = (reconstruction + model.log_prior(index)).mean()
        metrics = {"e_step/log_joint": log_joint.detach(), "e_step/commitment": commitment.detach()}
        return EStep(commitment - log_joint, None, metrics)

    @abstractmethod
    def quantise(
        self, vectors: Float[Tensor, "batch positions embedding"]
    ) -> tuple[
        Float[Tensor, "batch positions embedding"],
        Int[Tensor, "batch positions"],
        Float[Tensor, ""],
    ]:
        """Entries with the vectors' gradient, their numbers, and what is lost beside -log p."""

    @property
    @abstractmethod
    def entries(self) -> Float[Tensor, "codes embedding"]:
        """The codebook."""


class VectorQuantized(Quantised):
    """The codebook follows the vectors by exponential moving averages, and entries that nothing is
    near to begin anew at some vector.

    policy: with logits "distance"; a correction that it may have is not trained.
    commitment: weight of |h - e|^2, summed over the grid.
    decay: of the moving averages.
    dead_below: entries with fewer vectors than this, as a moving average, begin anew.
    """

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

    def quantise(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantiser: Any = self.quantiser
        quantised, index, distance = quantiser(vectors)
        # The quantiser's is a mean over the entries of all vectors.
        return quantised, index, self.commitment * distance.sum() * vectors[0].numel()

    @property
    def entries(self) -> Tensor:
        return self.quantiser.codebook


class FiniteScalar(Quantised):
    """Finite scalar quantisation: the codebook is a fixed lattice (arXiv 2309.15505).

    Each number of a vector, bounded to [-1, 1], is rounded to one of a few levels, evenly spaced.
    Nothing is lost beside -log p, and no entry dies.

    policy: with logits "bounded_distance".
    levels: of each number; an entry is one level of each.
    """

    def __init__(self, policy: GridPolicy, levels: Sequence[int] = (2, 2, 2)):
        super().__init__(policy)
        if policy.logits != "bounded_distance":
            raise UserError("posterior=fsq needs policy.logits=bounded_distance")
        if min(levels, default=0) < 2:
            raise UserError(f"posterior.levels={list(levels)}: each must be at least 2")
        if (math.prod(levels), len(levels)) != (policy.codes, policy.embedding):
            raise UserError(
                f"posterior.levels={list(levels)} make {math.prod(levels)} codes of {len(levels)} "
                f"numbers; set model.codes={math.prod(levels)} and model.embedding={len(levels)}"
            )
        self.quantiser = FSQ(list(levels), preserve_symmetry=True, bound_hard_clamp=True)

    def quantise(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantised, index = self.quantiser(vectors)
        return quantised, index.long(), vectors.new_zeros(())

    @property
    def entries(self) -> Tensor:
        entries: Any = self.quantiser.implicit_codebook
        return entries
