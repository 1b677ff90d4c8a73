"""How far the posterior of an E-step is from the exact one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gfnem.latents import Latents
from gfnem.model import LatentVariableModel


@torch.no_grad()
def posterior_gap(model: LatentVariableModel, x: Any, latents: Latents | None) -> dict[str, Tensor]:
    """Compute log p(x) - E_q[log p(x, z) + log P_B - log P_F] in nats per data point.

    Returns nothing where it is not exact: without weights or log p(x), and for a model that is not
    normalised, where log p(x) is not what weights are of on average.
    """
    if latents is None or latents.log_weights is None or not model.normalised:
        return {}
    log_likelihood = model.log_likelihood(x)
    if log_likelihood is None:
        return {}
    return {"train/posterior_gap": (log_likelihood - latents.log_weights.mean(-1)).mean()}
