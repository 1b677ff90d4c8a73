"""Discrete VAEs: p(z) over grids of codes, p(x | z) a convolutional decoder of their embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.errors import UserError
from gfnem.model import PriorModel, TractableModel
from gfnem.precision import Precision, check_precision, in_precision
from gfnem.tasks.discrete_vae.causal import PriorName, prior_named
from gfnem.tasks.discrete_vae.codes import Codes, distinct
from gfnem.tasks.discrete_vae.images import Images, Pixels
from gfnem.tasks.discrete_vae.layers import grid_of, upwards
from gfnem.tasks.discrete_vae.likelihood import Bernoulli, DiscretisedLogistic, Likelihood

# Grids of more codes than this are not enumerated.
MOST_ENUMERATED = 65536
# Images decoded at a time, in pixels times channels: on a CPU so few that the activations stay in
# its cache, which is twice as fast as all of a large batch at once.
CHUNK = {"cpu": 128 * 28 * 28 * 32, "cuda": 2048 * 28 * 28 * 128}


class DiscreteVAE(TractableModel, PriorModel):
    """p(z) p(x | z), z a grid of entries of a codebook.

    The exact likelihood and posterior are there where the codes**(h * w) grids can be enumerated.

    channels, height, width: of the images.
    pixels: "binary" for a Bernoulli likelihood, "grey" or "rgb" for a discretised logistic one.
    grid: its height and width in codes; sizes that halving the image's leads to, None for those of
        4 to 6 that it does, or the image's own.
    codes: entries of the codebook.
    embedding: width of an entry.
    decoder_width: channels of the decoder's convolutions.
    blocks: residual blocks of the decoder.
    prior: "uniform", "masked_linear" or "masked_convolution"; the latter two are autoregressive and
        learned.
    prior_width: of their networks.
    precision: "bfloat16" trains the decoder in autocast. Evaluations are in float32 all the same,
        but importance sampling decodes draws without weight in bfloat16 alone.
    compile: the decoder with torch.compile, which needs a compiler and a minute at the start.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        pixels: Pixels = "binary",
        grid: Sequence[int] | None = None,
        codes: int = 8,
        embedding: int = 32,
        decoder_width: int = 32,
        blocks: int = 2,
        prior: PriorName = "masked_linear",
        prior_width: int = 64,
        precision: Precision = "float32",
        compile: bool = False,
    ):
        super().__init__()
        for name, value, least in (
            ("codes", codes, 2),
            ("embedding", embedding, 1),
            ("decoder_width", decoder_width, 1),
            ("blocks", blocks, 0),
            ("prior_width", prior_width, 1),
        ):
            if value < least:
                raise UserError(f"model.{name} is {value}; it must be at least {least}")
        if prior not in ("uniform", "masked_linear", "masked_convolution"):
            raise UserError(
                f"model.prior is {prior!r}; use 'uniform', 'masked_linear' or 'masked_convolution'"
            )
        check_precision("model", precision)
        self.precision: Precision = precision
        self.decoder_width = decoder_width
        self.grid = grid_of((height, width), grid)
        self.positions = self.grid[0] * self.grid[1]
        self.codes = codes
        self.pixels = pixels
        self.image_shape = (channels, height, width)
        self.codebook = nn.Embedding(codes, embedding)
        self.likelihood: Likelihood = Bernoulli() if pixels == "binary" else DiscretisedLogistic()
        self.decoder = upwards(
            embedding,
            decoder_width,
            blocks,
            self.likelihood.outputs * channels,
            (height, width),
            self.grid,
        )
        self.prior = prior_named(prior, self.grid, codes, prior_width)
        if compile:
            self.decoder.compile()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The decoder's parameters, which may decay, and the others, which never do."""
        others = [*self.codebook.parameters(), *self.prior.parameters()]
        return [
            {"params": list(self.decoder.parameters())},
            {"params": others, "weight_decay": 0.0},
        ]

    def decode(
        self, embedded: Float[Tensor, "rows positions embedding"]
    ) -> Float[Tensor, "rows outputs height width"]:
        """What the likelihood wants to know of every pixel."""
        return torch.cat([output for _, output in self._decoded(embedded)])

    def log_joint(self, x: Images, z: Codes) -> Float[Tensor, "batch samples"]:
        decoded = z.index if z.decoded is None else z.decoded
        log_prior = self.log_prior(z.index.flatten(0, 1)).unflatten(0, z.index.shape[:2])
        return log_prior + self.log_reconstruction(x, decoded)

    def log_prior(self, index: Int[Tensor, "rows positions"]) -> Float[Tensor, "rows"]:
        """log p(z); grids that repeat are scored once."""
        grids, row = distinct(index, self.codes)
        return self.prior.log_prob(grids).sum(-1)[row]

    def log_reconstruction(
        self, x: Images, index: Int[Tensor, "batch samples positions"]
    ) -> Float[Tensor, "batch samples"]:
        """log p(x | z); grids that repeat are decoded once."""
        batch, samples = index.shape[:2]
        image = torch.arange(batch, device=index.device).repeat_interleave(samples)
        log_p = self.log_reconstruction_of(x, image, index.flatten(0, 1))
        return log_p.view(batch, samples)

    def log_reconstruction_of(
        self,
        x: Images,
        image: Int[Tensor, "pairs"],
        index: Int[Tensor, "pairs positions"],
        precision: Precision | None = None,
    ) -> Float[Tensor, "pairs"]:
        """The same for any pairs of one of the images and a grid.

        precision: of the decoder; None for float32, or that of the training in training mode.
        """
        grids, row = distinct(index, self.codes)
        if torch.is_grad_enabled():
            output = self.decode(self.codebook(grids))
            return self.likelihood.log_prob(x.pixels, output, image, row)
        order = row.argsort()
        ends = torch.bincount(row, minlength=len(grids)).cumsum(0)
        log_p = self.codebook.weight.new_empty(len(row))
        done = 0
        for first, output in self._decoded(self.codebook(grids), precision):
            last = first + len(output)
            until = int(ends[last - 1])
            pairs = order[done:until]
            log_p[pairs] = self.likelihood.log_prob(
                x.pixels, output, image[pairs], row[pairs] - first
            )
            done = until
        return log_p

    def _decoded(
        self,
        embedded: Float[Tensor, "rows positions embedding"],
        precision: Precision | None = None,
    ) -> Iterator[tuple[int, Float[Tensor, "chunk outputs height width"]]]:
        """The decoder's output a chunk at a time, each after the number of its first row."""
        if precision is None:
            precision = self.precision if self.training else "float32"
        first = 0
        size = self.image_shape[1] * self.image_shape[2] * self.decoder_width
        for chunk in embedded.split(max(CHUNK[embedded.device.type] // size, 1)):
            with in_precision(self, precision):
                output = self.decoder(chunk.mT.unflatten(2, self.grid))
            yield first, output.to(embedded.dtype)
            first += len(chunk)

    @torch.no_grad()
    def mean_image(
        self, index: Int[Tensor, "rows positions"]
    ) -> Float[Tensor, "rows channels height width"]:
        """E[x | z]."""
        return self.likelihood.mean(self.decode(self.codebook(index)))

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Images, Codes]:
        index = self.prior.sample(n, generator)
        pixels = self.likelihood.sample(self.decode(self.codebook(index)), generator)
        ids = torch.arange(n, device=index.device)
        return Images(pixels, ids), Codes(index[:, None])

    @torch.no_grad()
    def sample_prior(self, x: Images, samples: int) -> tuple[Codes, Float[Tensor, "batch samples"]]:
        """The same grids for all images, so that each is decoded once."""
        index = self.prior.sample(samples)
        log_prior = self.log_prior(index)
        return Codes(index.expand(len(x), -1, -1)), log_prior.expand(len(x), -1)

    @property
    def tractable(self) -> bool:
        """Whether all grids can be enumerated."""
        return self.codes**self.positions <= MOST_ENUMERATED

    @property
    def all_codes(self) -> Int[Tensor, "grids positions"]:
        """Every grid there is."""
        place = self.codes ** torch.arange(self.positions, device=self.codebook.weight.device)
        number = torch.arange(self.codes**self.positions, device=place.device)
        return number[:, None] // place % self.codes

    def log_joint_all(self, x: Images) -> Float[Tensor, "batch grids"]:
        """log p(x, z) of every grid; the decoder runs once on all of them."""
        grids = self.all_codes
        output = self.decode(self.codebook(grids))
        batch = len(x)
        image = torch.arange(batch, device=grids.device).repeat_interleave(len(grids))
        row = torch.arange(len(grids), device=grids.device).repeat(batch)
        log_p = self.likelihood.log_prob(x.pixels, output, image, row)
        return log_p.view(batch, -1) + self.log_prior(grids)

    def log_likelihood(self, x: Images) -> Float[Tensor, "batch"] | None:
        if not self.tractable:
            return None
        return self.log_joint_all(x).logsumexp(-1)

    @torch.no_grad()
    def sample_posterior(self, x: Images, samples: int) -> Codes:
        posterior = self.log_joint_all(x).softmax(-1)
        chosen = torch.multinomial(posterior, samples, replacement=True)
        return Codes(self.all_codes[chosen])
