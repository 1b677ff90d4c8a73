"""M-steps whose decoder learns from the most likely codes."""

from __future__ import annotations

from typing import Any

import torch

from gfnem.gflownet.policy import Policy
from gfnem.gflownet.refinement import Refinement
from gfnem.latents import Latents
from gfnem.model import LatentVariableModel
from gfnem.tasks.discrete_vae.codes import Codes
from gfnem.tasks.discrete_vae.policy import GridPolicy


class GreedyDecoding(Refinement):
    """The decoder learns from q's most likely codes, the prior from one draw (arXiv 2302.06576)."""

    def __call__(
        self, policy: Policy, model: LatentVariableModel, x: Any, latents: Latents
    ) -> Latents:
        assert isinstance(policy, GridPolicy)
        greedy = policy.most_likely(policy.condition(model, x))  # type: ignore[arg-type]
        first = torch.zeros_like(greedy.index[..., 0])
        drawn = latents.z.select(first)
        return Latents(Codes(drawn.index, decoded=greedy.index), log_weights=None)
