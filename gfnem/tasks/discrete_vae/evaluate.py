"""Rating discrete VAEs and their posteriors on held-out images, and pictures of what they do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.errors import UserError
from gfnem.inference import device_of, inference, log_mean_exp
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.posteriors.exact import ExactPosterior
from gfnem.run.progress import counted
from gfnem.tasks.discrete_vae.codes import Codes
from gfnem.tasks.discrete_vae.images import ImageData, Images
from gfnem.tasks.discrete_vae.importance import (
    choose_temperature,
    effective_samples,
    log_weights,
)
from gfnem.tasks.discrete_vae.model import DiscreteVAE
from gfnem.tasks.discrete_vae.policy import GridPolicy
from gfnem.training.parts import Metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gfnem.run import Run

PANELS: Mapping[str, tuple[str, ...]] = {
    "E-step loss": ("train/e_loss*", "schedule/*"),
    "M-step loss": ("train/m_loss*", "train/joint_loss*"),
    "Negative log-likelihood (nats)": ("valid/nll", "valid/exact_nll"),
    "Evidence lower bound (nats)": ("valid/elbo",),
    "Posterior gap (nats)": ("valid/posterior_gap",),
    "Reconstruction (nats)": ("valid/reconstruction_nll", "valid/deterministic_bound"),
    "Effective samples": ("valid/effective_samples",),
    "Distinct codes": ("valid/distinct_codes",),
    "Codebook perplexity": ("valid/codebook_perplexity",),
}
"""Panels of a run's learning curves -> the metrics in them."""

# Images side by side in a picture.
COLUMNS = 16
# The ambiguous image of a report is looked for among so many.
AMBIGUOUS_AMONG = 512
# What final evaluations tell of training images.
OF_TRAINING = ("exact_nll", "nll", "posterior_gap")


class DiscreteVAEEvaluator:
    """Likelihood, codes and the posterior's fit. All metrics are named `split/...`.

    Likelihood, in nats for each image:
        exact_nll: -log p(x); where all grids of codes can be enumerated.
        nll: estimated by importance sampling, on average from above, with `nll_samples` draws of q
            at `proposal_temperature`, which is the one that gives the best estimate on validation
            images with as many draws. The same for every posterior with a policy; of others those
            whose draws have weights estimate it from these, where the grids cannot be enumerated.
        effective_samples: of these draws' importance weights.
        nll_at_temperature_1: the same estimate from q as it is; final only.
        bits_per_dim: exact_nll, or else nll, in bits for each number of an image.
    The posterior:
        elbo: E_q[log p(x, z) - log q(z | x)]; where the posterior's draws have weights.
        posterior_gap: log p(x) - elbo; where all grids can be enumerated.
        reconstruction_nll: -log p(x | z) of q's most likely codes; see `most_likely`.
        deterministic_bound: -log p(x, z) of them, for posteriors that are trained with no others.
        codebook_perplexity: exp of the entropy of the codes' frequencies, over all positions and
            `samples` draws of q; codebook_usage: how many of the codes are ever drawn.
        distinct_codes: different grids among `samples` draws of q.

    Final evaluations on the test split add the likelihood and the gap on training images: what q
    has not learned, apart from what it overfits.

    data: what to rate on.
    samples: draws of q for each image.
    nll_samples: draws for the likelihood in final evaluations; others use `samples`.
    images, test_images, train_images: how many of the validation, test and training images are
        rated, from the first; None for all.
    batch_size: images at a time.
    temperature_images: validation images that the temperature is chosen on, from the first.
    select: what is minimised on the validation split: "likelihood" (exact_nll, or else nll) or
        "posterior_gap", for a model that is not trained.

    Raises UserError where neither the model nor the posterior gives a likelihood.
    """

    def __init__(
        self,
        data: ImageData,
        samples: int = 16,
        nll_samples: int = 500,
        images: int | None = 500,
        test_images: int | None = None,
        train_images: int | None = 256,
        batch_size: int = 64,
        temperature_images: int = 128,
        select: Literal["likelihood", "posterior_gap"] = "likelihood",
    ):
        for name, value in (
            ("samples", samples),
            ("nll_samples", nll_samples),
            ("images", images),
            ("test_images", test_images),
            ("train_images", train_images),
            ("batch_size", batch_size),
            ("temperature_images", temperature_images),
        ):
            if value is not None and value < 1:
                raise UserError(f"evaluator.{name} is {value}; it must be at least 1")
        if select not in ("likelihood", "posterior_gap"):
            raise UserError(f"evaluator.select is {select!r}; use 'likelihood' or 'posterior_gap'")
        self.data = data
        self.samples = samples
        self.nll_samples = nll_samples
        self.images = {"train": train_images, "valid": images, "test": test_images}
        self.batch_size = batch_size
        self.temperature_images = temperature_images
        self.select = select

    def __call__(
        self, model: LatentVariableModel, posterior: Posterior, split: str, final: bool = False
    ) -> Metrics:
        assert isinstance(model, DiscreteVAE)
        if self.select == "posterior_gap" and not model.tractable:
            raise UserError(
                f"evaluator.select=posterior_gap: {model.codes} codes on a grid of "
                f"{model.grid[0]} x {model.grid[1]} are too many to enumerate; make the grid "
                "smaller or use evaluator.select=likelihood"
            )
        with inference(model, posterior):
            temperature = self._temperature(model, posterior, final)
            metrics = self._rate_split(model, posterior, split, temperature, final)
            if final and split == "test":
                of_training = self._rate_split(model, posterior, "train", temperature, final)
                names = [f"train/{name}" for name in OF_TRAINING]
                metrics |= {name: of_training[name] for name in names if name in of_training}
        return metrics

    def selection(self, model: LatentVariableModel) -> str:
        assert isinstance(model, DiscreteVAE)
        if self.select == "posterior_gap":
            return "valid/posterior_gap"
        return "valid/exact_nll" if model.tractable else "valid/nll"

    def _images(self, split: str) -> Images:
        """The images of a split that are rated."""
        return self.data.split(split).select(slice(self.images[split]))

    def _temperature(self, model: DiscreteVAE, posterior: Posterior, final: bool) -> float | None:
        """The proposal's temperature; None where nothing is proposed."""
        policy = _policy(posterior)
        if policy is None:
            return None
        x = self.data.valid.select(slice(self.temperature_images)).to(device_of(model))
        return choose_temperature(policy, model, x, self._nll_samples(final))

    def _nll_samples(self, final: bool) -> int:
        return self.nll_samples if final else self.samples

    def _rate_split(
        self,
        model: DiscreteVAE,
        posterior: Posterior,
        split: str,
        temperature: float | None,
        final: bool,
    ) -> Metrics:
        images = self._images(split)
        figures: dict[str, list[Tensor]] = {}
        drawn = torch.zeros(model.codes, dtype=torch.long, device=device_of(model))
        for first in counted(range(0, len(images), self.batch_size)):
            x = images.select(slice(first, first + self.batch_size)).to(device_of(model))
            rated, index = self._rate(model, posterior, x, temperature, final)
            for name, values in rated.items():
                figures.setdefault(name, []).append(values.double())
            drawn += torch.bincount(index.flatten(), minlength=model.codes)
        metrics = {name: float(torch.cat(parts).mean()) for name, parts in figures.items()}
        nll = metrics["exact_nll"] if "exact_nll" in metrics else metrics["nll"]
        metrics["bits_per_dim"] = nll / math.prod(model.image_shape) / math.log(2)
        if temperature is not None:
            metrics["nll_samples"] = self._nll_samples(final)
            metrics["proposal_temperature"] = temperature
        frequencies = drawn.double() / drawn.sum()
        metrics["codebook_perplexity"] = float(torch.special.entr(frequencies).sum().exp())
        metrics["codebook_usage"] = int((drawn > 0).sum())
        return {f"{split}/{name}": value for name, value in metrics.items()}

    def _rate(
        self,
        model: DiscreteVAE,
        posterior: Posterior,
        x: Images,
        temperature: float | None,
        final: bool,
    ) -> tuple[dict[str, Float[Tensor, "batch"]], Int[Tensor, "batch samples positions"]]:
        """Figures of each image by name, and the codes drawn for it."""
        latents = posterior.sample(model, x, self.samples)
        figures = {}
        log_likelihood = model.log_likelihood(x)
        if log_likelihood is not None:
            figures["exact_nll"] = -log_likelihood
        policy = _policy(posterior)
        if policy is not None and temperature is not None:
            samples = self._nll_samples(final)
            proposed = log_weights(policy, model, x, samples, temperature)
            figures["nll"] = -log_mean_exp(proposed)
            figures["effective_samples"] = effective_samples(proposed)
            if final:
                if temperature != 1:
                    proposed = log_weights(policy, model, x, samples)
                figures["nll_at_temperature_1"] = -log_mean_exp(proposed)
        elif log_likelihood is None:
            if latents.log_weights is None:
                raise UserError(
                    f"{type(posterior).__name__} draws without weights, and {model.codes} codes on "
                    f"a grid of {model.grid[0]} x {model.grid[1]} are too many to enumerate, so no "
                    "likelihood is known: make the grid smaller or use another posterior"
                )
            figures["nll"] = -log_mean_exp(latents.log_weights)
        if latents.log_weights is not None:
            figures["elbo"] = latents.log_weights.mean(-1)
            if log_likelihood is not None:
                figures["posterior_gap"] = log_likelihood - figures["elbo"]
        best = most_likely(model, posterior, x, latents.z)
        figures["reconstruction_nll"] = -model.log_reconstruction(x, best.index).squeeze(-1)
        if getattr(posterior, "deterministic", False):
            figures["deterministic_bound"] = -model.log_joint(x, best).squeeze(-1)
        figures["distinct_codes"] = _distinct(latents.z.index)
        return figures, latents.z.index

    def report(self, model: LatentVariableModel, posterior: Posterior, run: Run) -> None:
        """Learning curves, reconstructions, prior samples, and what q says of an ambiguous image.

        The ambiguous image is the one of the first rated test images whose q has most entropy.
        """
        from gfnem.run.plots import learning_curves

        assert isinstance(model, DiscreteVAE)
        test = self._images("test").to(device_of(model))
        run.add_figure("learning_curves", learning_curves(run.metrics(), PANELS))
        run.add_figure("reconstructions", reconstructions(model, posterior, test))
        run.add_figure("samples", prior_samples(model, 4 * COLUMNS))
        with inference(model, posterior):
            among = test.select(slice(AMBIGUOUS_AMONG))
            batches = torch.arange(len(among)).split(self.batch_size)
            entropies = [
                _entropy(model, posterior, among.select(rows), self.samples) for rows in batches
            ]
            most = torch.cat(entropies).argmax()
            figure = posterior_samples(model, posterior, test.select(most[None]))
        run.add_figure("posterior_samples", figure)


def most_likely(
    model: DiscreteVAE, posterior: Posterior, x: Images, draws: Codes | None = None
) -> Codes:
    """q's most likely codes, one grid for each image: chosen code by code where q has a policy, of
    all grids where it is the exact posterior, of some draws where it is another.

    draws: of q, where they are at hand.
    """
    policy = _policy(posterior)
    if policy is not None:
        return policy.most_likely(policy.condition(model, x))
    if isinstance(posterior, ExactPosterior):
        best = model.log_joint_all(x).argmax(-1)
        return Codes(model.all_codes[best][:, None])
    z: Codes = posterior.sample(model, x, COLUMNS).z if draws is None else draws
    return z.select(model.log_joint(x, z).argmax(-1, keepdim=True))


def reconstructions(model: DiscreteVAE, posterior: Posterior, x: Images) -> Figure:
    """The first images, 16 at most, and under them what q's most likely codes stand for."""
    x = x.select(slice(COLUMNS)).to(device_of(model))
    with inference(model, posterior):
        best = most_likely(model, posterior, x)
        return _picture({"x": x.pixels, "E[x | z], z most likely": _mean(model, best.index)})


def prior_samples(model: DiscreteVAE, n: int) -> Figure:
    """Draws from the model: what their codes stand for, and under it the images themselves."""
    with inference(model):
        x, z = model.sample(n)
        return _picture({"E[x | z], z from the prior": _mean(model, z.index), "x": x.pixels})


def posterior_samples(model: DiscreteVAE, posterior: Posterior, x: Images) -> Figure:
    """One image, and beside it what draws of q stand for; under them those of the exact posterior
    where it is known and q is another.
    """
    samples = COLUMNS - 1
    with inference(model, posterior):
        drawn = {"x, then E[x | z], z from q(z | x)": posterior.sample(model, x, samples).z}
        if model.tractable and not isinstance(posterior, ExactPosterior):
            drawn["x, then E[x | z], z from p(z | x)"] = model.sample_posterior(x, samples)
        return _picture(
            {title: torch.cat([x.pixels, _mean(model, z.index)]) for title, z in drawn.items()}
        )


def _picture(rows: Mapping[str, Float[Tensor, "images channels height width"]]) -> Figure:
    """Rows of as many images each, cut to the width of a page and kept together."""
    from gfnem.run.plots import image_grid

    lines = zip(*(images.split(COLUMNS) for images in rows.values()), strict=True)
    return image_grid([pair for line in lines for pair in zip(rows, line, strict=True)])


def _mean(
    model: DiscreteVAE, index: Int[Tensor, "batch samples positions"]
) -> Float[Tensor, "rows channels height width"]:
    return model.mean_image(index.flatten(0, 1))


def _policy(posterior: Posterior) -> GridPolicy | None:
    """What a posterior draws from; None for one that has no policy."""
    policy = getattr(posterior, "policy", None)
    return policy if isinstance(policy, GridPolicy) else None


def _entropy(
    model: DiscreteVAE, posterior: Posterior, x: Images, samples: int
) -> Float[Tensor, "batch"]:
    """Of q, in nats: exact where q is the exact posterior, else estimated from draws; by their
    frequencies, and so too low, where their probabilities are not known.
    """
    policy = _policy(posterior)
    if policy is not None:
        _, log_q = policy.draw(policy.condition(model, x), samples)
        return -log_q.mean(-1)
    if isinstance(posterior, ExactPosterior):
        return torch.special.entr(model.log_joint_all(x).softmax(-1)).sum(-1)
    index = posterior.sample(model, x, samples).z.index
    same = (index[:, :, None] == index[:, None]).all(-1)
    return -same.double().mean(-1).log().mean(-1)


def _distinct(index: Int[Tensor, "batch samples positions"]) -> Int[Tensor, "batch"]:
    """How many of each image's grids are different."""
    _, grid = torch.unique(index.flatten(0, 1), dim=0, return_inverse=True)
    grid = grid.view(index.shape[:2]).sort(-1).values
    return 1 + grid.diff(dim=-1).ne(0).sum(-1)
