"""How far q(z | x) is from p(z | x), exactly, where every z can be listed."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gfnem.errors import UserError
from gfnem.latents import LatentTable
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior

# A mode is at least so likely as this share of the likeliest latent, and q covers it with at least
# this share of its probability.
SHARE = 0.5

NAMES = ("kl_p_q", "kl_q_p", "modes", "modes_covered")


def rate(
    model: LatentVariableModel, posterior: Posterior, x: Any
) -> dict[str, Float[Tensor, "batch"]]:
    """The `divergences` of each data point, as `evaluator.divergences=true` asks for them.

    Raises UserError for a posterior whose latents cannot be listed.
    """
    table = posterior.tabulate(model, x)
    if table is None:
        raise UserError(
            f"evaluator.divergences needs q(z | x) of every z, which {type(posterior).__name__} "
            "does not list here: leave it out, or use posterior=gflownet on a mixture or a grammar"
        )
    return divergences(table)


def divergences(table: LatentTable) -> dict[str, Float[Tensor, "batch"]]:
    """What tells q from p, of each data point.

    kl_p_q: KL(p(z | x) || q(z | x)) in nats, large where q misses latents.
    kl_q_p: KL(q(z | x) || p(z | x)) in nats, large where q makes latents up.
    modes: how many latents have at least half of the likeliest latent's p(z | x).
    modes_covered: share of these to which q gives at least half of what p does.
    """
    log_p = table.log_joint.double().log_softmax(-1)
    log_q = table.log_q.double()
    p = log_p.exp()
    is_mode = p >= SHARE * p.amax(-1, keepdim=True)
    covered = is_mode & (log_q.exp() >= SHARE * p)
    modes = is_mode.sum(-1)
    values = (
        _kl(log_p, log_q),
        _kl(log_q, log_p),
        modes.double(),
        covered.sum(-1) / modes.double(),
    )
    return dict(zip(NAMES, values, strict=True))


def _kl(
    log_a: Float[Tensor, "batch latents"], log_b: Float[Tensor, "batch latents"]
) -> Float[Tensor, "batch"]:
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)
