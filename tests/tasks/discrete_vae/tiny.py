"""What tests of discrete VAEs share: small models and images, and plain loops to hold them to."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from gfnem.tasks.discrete_vae.codes import Codes
from gfnem.tasks.discrete_vae.images import Images, Pixels
from gfnem.tasks.discrete_vae.layers import EachPixel
from gfnem.tasks.discrete_vae.model import DiscreteVAE
from gfnem.tasks.discrete_vae.policy import GridPolicy
from tests.tasks.grammar.tiny import float64, p_value, total_variation

__all__ = ["float64", "p_value", "total_variation"]

CODES = 3
GRID = (2, 2)
SIZE = (4, 4)
CHANNELS: dict[Pixels, int] = {"binary": 1, "grey": 1, "rgb": 3}


def stirred(network: nn.Module, noise: float = 0.3, seed: int = 0) -> Any:
    """The network with all its parameters moved by random noise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return network


def make_model(
    pixels: Pixels = "binary", noise: float = 0.1, seed: int = 0, **options: Any
) -> DiscreteVAE:
    torch.manual_seed(seed)
    options = {
        "grid": GRID,
        "codes": CODES,
        "embedding": 2,
        "decoder_width": 4,
        "blocks": 1,
        "prior_width": 5,
        **options,
    }
    model = stirred(DiscreteVAE(CHANNELS[pixels], *SIZE, pixels=pixels, **options), noise, seed)
    # Of arbitrary images, none is all but impossible and most grids might be behind them.
    with torch.no_grad():
        (last,) = (layer for layer in model.decoder if isinstance(layer, EachPixel))
        last.weight *= 0.3 if pixels == "binary" else 0.1
    return model


def make_policy(noise: float = 0.1, seed: int = 0, **options: Any) -> GridPolicy:
    """A small policy whose correction is no longer zero."""
    torch.manual_seed(seed)
    options = {
        "channels": 1,
        "grid": GRID,
        "codes": CODES,
        "embedding": 2,
        "encoder_width": 6,
        "blocks": 1,
        "hidden": 7,
        **options,
    }
    policy = stirred(GridPolicy(height=SIZE[0], width=SIZE[1], **options), noise, seed)
    if policy.log_beta is not None:
        # Distances alone would be sure of one grid.
        with torch.no_grad():
            policy.log_beta.fill_(-2.0)
    return policy


def images(
    n: int, pixels: Pixels = "binary", seed: int = 0, size: tuple[int, int] = SIZE
) -> Images:
    generator = torch.Generator().manual_seed(seed)
    levels = 1 if pixels == "binary" else 255
    shape = (n, CHANNELS[pixels], *size)
    level = torch.randint(levels + 1, shape, generator=generator)
    if levels == 255:
        # The first and the last level have the tails.
        level[:, :, 0, 0], level[:, :, 0, 1] = 0, 255
    return Images(level.to(torch.get_default_dtype()) / levels, torch.arange(n))


def all_grids(positions: int = 4, codes: int = CODES) -> Tensor:
    return torch.tensor(list(product(range(codes), repeat=positions)))


def random_codes(batch: int, samples: int, positions: int = 4, seed: int = 0) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    return Codes(torch.randint(CODES, (batch, samples, positions), generator=generator))


def counts(index: Tensor) -> Counter[tuple[int, ...]]:
    """How often each grid is among the rows."""
    return Counter(map(tuple, index.tolist()))


def log_reconstruction(model: DiscreteVAE, pixels: Tensor, grid: Tensor) -> Tensor:
    """log p(x | z) of one grid and any images [*images], by SciPy from the decoder's output.

    pixels: [*images, channels, height, width].
    """
    height, width = model.grid
    embedded = model.codebook.weight[grid].t().reshape(1, -1, height, width)
    output = model.decoder(embedded)[0].detach()
    if model.pixels == "binary":
        log_p = stats.bernoulli.logpmf(pixels.numpy(), output.sigmoid().numpy())
        return torch.as_tensor(log_p.sum((-3, -2, -1)))
    channels = pixels.shape[-3]
    mean, log_scale = output[:channels] + 0.5, (output[channels:] - 2).clamp(min=-7)
    place = {"loc": mean.numpy(), "scale": log_scale.exp().numpy()}
    level = (pixels * 255).round().numpy()
    low, high = (level - 0.5) / 255, (level + 0.5) / 255
    log_below_low, log_below_high = (stats.logistic.logcdf(end, **place) for end in (low, high))
    log_above_low, log_above_high = (stats.logistic.logsf(end, **place) for end in (low, high))
    # A difference of whichever tails are the smaller loses no digits.
    left = high < place["loc"]
    large = np.where(left, log_below_high, log_above_low)
    small = np.where(left, log_below_low, log_above_high)
    log_p = large + np.log(-np.expm1(small - large))
    log_p = np.where(level == 0, log_below_high, log_p)
    log_p = np.where(level == 255, log_above_low, log_p)
    return torch.as_tensor(log_p.sum((-3, -2, -1)))


@torch.no_grad()
def log_prior(model: DiscreteVAE, grid: Tensor) -> float:
    """log p of a grid's first codes: each by a pass of its own, with the later codes left empty."""
    prior, total = model.prior, 0.0
    one_hot = torch.zeros(1, model.positions, model.codes)
    for position, code in enumerate(grid.tolist()):
        total += float(prior.log_probabilities(one_hot)[0, position, code])
        one_hot[0, position, code] = 1
    return total


def log_joint(
    model: DiscreteVAE, pixels: Tensor, grid: Tensor, decoded: Tensor | None = None
) -> float:
    """log p(x, z) of one image and one grid; the decoder may be given another one."""
    seen = grid if decoded is None else decoded
    return log_prior(model, grid) + float(log_reconstruction(model, pixels, seen))


def log_joint_table(model: DiscreteVAE, x: Images) -> Tensor:
    """log p(x, z) of every image and every grid in the order of `all_grids`, grid by grid."""
    grids = all_grids(model.positions, model.codes)
    columns = [log_prior(model, grid) + log_reconstruction(model, x.pixels, grid) for grid in grids]
    return torch.stack(columns, -1).to(torch.get_default_dtype())


def posteriors(model: DiscreteVAE, x: Images) -> list[dict[tuple[int, ...], float]]:
    """p(z | x) of every grid, for each image."""
    grids = [tuple(grid) for grid in all_grids(model.positions, model.codes).tolist()]
    table = log_joint_table(model, x).softmax(-1).tolist()
    return [dict(zip(grids, row, strict=True)) for row in table]


def q_table(policy: GridPolicy, model: DiscreteVAE, x: Images) -> list[dict[Any, float]]:
    """q(z | x) of every grid, for each image, as torchgfn's estimators have it."""
    condition = policy.condition(model, x)
    grids = all_grids(policy.positions, policy.codes)
    env = policy.trajectories(condition, policy.sample(condition, 1)).env
    forward = policy.estimators(condition)[0]
    tables = []
    for row in range(len(x)):
        log_q = torch.zeros(len(grids))
        conditions = torch.full((len(grids), 1), float(row))
        for position in range(policy.positions):
            filled = torch.where(torch.arange(policy.positions) < position, grids, -1)
            states: Any = env.States(filled, conditions=conditions)
            logits = forward(states, conditions).detach()
            log_p = logits.masked_fill(~states.forward_masks, -torch.inf).log_softmax(-1)
            log_q += log_p.gather(1, grids[:, position : position + 1]).squeeze(1)
        tables.append(dict(zip(map(tuple, grids.tolist()), log_q.exp().tolist(), strict=True)))
    return tables
