"""Hierarchical mixtures of Gaussians: superclusters whose petals have fixed places around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.errors import UserError
from gfnem.latents import Latents
from gfnem.model import ClosedFormModel, FactorisedModel, PriorModel, TractableModel
from gfnem.tasks.mixture.components import DEVIATION, Components, petal_offsets
from gfnem.tasks.mixture.data import PointData, Points

# Standard deviation of means that start at a normal distribution, over the data's.
START_SCALE = 0.25


class HierarchicalMixture(TractableModel, ClosedFormModel, FactorisedModel, PriorModel):
    """p(z) uniform over components z = (supercluster i, petal j), p(x | z) normal with mean
    means[i] + offsets[j] and the covariance deviation^2 I.

    Of all this the means of the superclusters alone are learned; see `petal_offsets`.

    means: where they start; two dimensions at least.
    petals: of each supercluster.
    deviation: standard deviation of every component, in every dimension.
    """

    start: Float[Tensor, "superclusters dimensions"]
    offsets: Float[Tensor, "petals dimensions"]

    def __init__(
        self,
        means: Float[Tensor, "superclusters dimensions"],
        petals: int = 4,
        deviation: float = DEVIATION,
    ):
        super().__init__()
        for name, value in (("superclusters", len(means)), ("petals", petals)):
            if value < 1:
                raise UserError(f"model.{name} is {value}; it must be at least 1")
        if not deviation > 0:
            raise UserError(f"model.deviation is {deviation}; it must be positive")
        self.deviation = deviation
        self.superclusters, self.dimensions = means.shape
        self.petals = petals
        self.means = nn.Parameter(means.clone())
        self.register_buffer("start", means.clone())
        self.register_buffer("offsets", petal_offsets(petals, self.dimensions).to(means))

    def log_joint(self, x: Points, z: Components) -> Float[Tensor, "batch samples"]:
        center = self.means[z.supercluster] + self.offsets[z.petal]
        return self._log_density(x.values[:, None] - center)

    def log_joint_all(self, x: Points) -> Float[Tensor, "batch superclusters petals"]:
        """log p(x, z) of every component."""
        center = self.means[:, None] + self.offsets
        return self._log_density(x.values[:, None, None] - center)

    def _log_density(
        self, difference: Float[Tensor, "*batch dimensions"]
    ) -> Float[Tensor, "*batch"]:
        """log p(x, z) of x - E[x | z]."""
        log_prior = -math.log(self.superclusters * self.petals)
        log_normaliser = self.dimensions * math.log(self.deviation * math.sqrt(2 * math.pi))
        return log_prior - log_normaliser - difference.square().sum(-1) / (2 * self.deviation**2)

    def log_likelihood(self, x: Points) -> Float[Tensor, "batch"]:
        return self.log_joint_all(x).flatten(1).logsumexp(-1)

    @torch.no_grad()
    def sample_posterior(self, x: Points, samples: int) -> Components:
        posterior = self.log_joint_all(x).flatten(1).softmax(-1)
        chosen = torch.multinomial(posterior, samples, replacement=True)
        return Components(torch.stack([chosen // self.petals, chosen % self.petals], -1))

    @torch.no_grad()
    def enumerate(self, x: Points) -> Latents:
        each = torch.cartesian_prod(*map(torch.arange, self.parts)).to(x.ids.device)
        z = Components(each.expand(len(x), -1, -1))
        log_joint = self.log_joint(x, z)
        return Latents(z, log_weights=None, m_step_weights=log_joint.softmax(-1))

    @torch.no_grad()
    def maximise(self, x: Points, latents: Latents) -> None:
        """A mean becomes the weighted mean of the points of its supercluster, each less the offset
        of its petal; that of a supercluster without any weight stays.
        """
        z: Components = latents.z
        weights = latents.m_step_weights
        if weights is None:
            weights = torch.ones_like(z.petal, dtype=x.values.dtype)
        around = weights[..., None] * (x.values[:, None] - self.offsets[z.petal])
        supercluster = z.supercluster.flatten()
        total = torch.zeros_like(self.means[:, :1]).index_add(
            0, supercluster, weights.flatten()[:, None]
        )
        sums = torch.zeros_like(self.means).index_add(0, supercluster, around.flatten(0, 1))
        self.means.copy_(torch.where(total > 0, sums / total, self.means))

    @torch.no_grad()
    def sample_prior(
        self, x: Points, samples: int
    ) -> tuple[Components, Float[Tensor, "batch samples"]]:
        z = self._uniform(len(x), samples)
        log_prior = -math.log(self.superclusters * self.petals)
        return z, self.means.new_full(z.petal.shape, log_prior)

    def _uniform(
        self, batch: int, samples: int, generator: torch.Generator | None = None
    ) -> Components:
        """Draws of the prior."""
        chosen = [
            torch.randint(values, (batch, samples), generator=generator, device=self.means.device)
            for values in self.parts
        ]
        return Components(torch.stack(chosen, -1))

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Points, Components]:
        device = self.means.device
        z = self._uniform(n, 1, generator)
        center = (self.means[z.supercluster] + self.offsets[z.petal])[:, 0]
        noise = torch.randn(center.shape, generator=generator, dtype=center.dtype, device=device)
        return Points(center + self.deviation * noise, torch.full((n,), -1, device=device)), z

    @property
    def parts(self) -> tuple[int, int]:
        return self.superclusters, self.petals

    def expected_log_joint_of(
        self, x: Points, q: Sequence[Float[Tensor, "batch _"]], part: int
    ) -> Float[Tensor, "batch values"]:
        log_joint = self.log_joint_all(x)
        if part == 0:
            return (log_joint * q[1][:, None]).sum(2)
        return (log_joint * q[0][:, :, None]).sum(1)

    def latents(self, index: Int[Tensor, "batch samples 2"]) -> Components:
        return Components(index)


def starting_at(
    data: PointData,
    superclusters: int = 4,
    petals: int = 4,
    start: Literal["normal", "points", "truth"] = "normal",
    deviation: float = DEVIATION,
) -> HierarchicalMixture:
    """A mixture for some data.

    start: of the superclusters' means: "normal", close together in the middle of the data;
        "points", at training points drawn without replacement, torch's random numbers say where, as
        for "normal"; or "truth", where they were when the data was drawn.

    Raises UserError for an option out of its range, and for "truth" where that is unknown or has
    other sizes than the model.
    """
    values = data.train.values
    if start not in ("normal", "points", "truth"):
        raise UserError(f"model.start is {start!r}; use 'normal', 'points' or 'truth'")
    if start == "truth":
        return _truth(data, superclusters, petals, deviation)
    if start == "points" and superclusters > len(values):
        raise UserError(
            f"model.superclusters is {superclusters}; with model.start=points it can be at most "
            f"{len(values)}, the number of training points"
        )
    if superclusters < 1:
        raise UserError(f"model.superclusters is {superclusters}; it must be at least 1")
    if start == "points":
        means = values[torch.randperm(len(values))[:superclusters]]
    else:
        noise = torch.randn(superclusters, values.shape[1]).to(values)
        means = data.center + START_SCALE * data.spread * noise
    return HierarchicalMixture(means, petals, deviation)


def _truth(
    data: PointData, superclusters: int, petals: int, deviation: float
) -> HierarchicalMixture:
    truth = data.truth
    if truth is None:
        raise UserError(
            f"model.start=truth: nobody knows what {data.name} was drawn from; use data=sampled"
        )
    for name, given, true in (
        ("superclusters", superclusters, len(truth.means)),
        ("petals", petals, truth.petals),
        ("deviation", deviation, truth.deviation),
    ):
        if given != true:
            raise UserError(
                f"model.{name} is {given}, but model.start=truth needs that of the data: {true}"
            )
    model = HierarchicalMixture(truth.means, petals, deviation)
    model.is_truth = True
    return model
