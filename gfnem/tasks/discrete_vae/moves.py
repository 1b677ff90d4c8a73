"""Markov chains over grids of codes."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from gfnem.categorical import sample_categorical
from gfnem.model import LatentVariableModel
from gfnem.posteriors.mcmc import Moves
from gfnem.tasks.discrete_vae.codes import Codes
from gfnem.tasks.discrete_vae.images import Images
from gfnem.tasks.discrete_vae.model import DiscreteVAE


class CodeGibbs(Moves):
    """A transition draws the code at a random position given all others, from p(code | others, x).

    All codes are tried there, so it takes as many evaluations of p(x, z) as there are codes; grids
    that repeat are decoded once. Chains begin at draws of the prior. A state is the grid itself.
    """

    def condition(self, model: LatentVariableModel, x: Images) -> tuple[DiscreteVAE, Images]:
        assert isinstance(model, DiscreteVAE)
        return model, x

    def begin(
        self, condition: tuple[DiscreteVAE, Images], chains: int
    ) -> Int[Tensor, "batch chains positions"]:
        model, x = condition
        return model.prior.sample(len(x) * chains).unflatten(0, (len(x), chains))

    def walk(
        self,
        condition: tuple[DiscreteVAE, Images],
        state: Int[Tensor, "batch chains positions"],
        steps: int,
    ) -> Int[Tensor, "batch chains positions"]:
        model, x = condition
        codes = torch.arange(model.codes, device=state.device)
        for _ in range(steps):
            position = torch.randint(model.positions, state.shape[:2], device=state.device)
            here = position[..., None] == torch.arange(model.positions, device=state.device)
            tried = torch.where(here[:, :, None], codes[:, None], state[:, :, None])
            log_joint = model.log_joint(x, Codes(tried.flatten(1, 2)))
            p = log_joint.unflatten(1, (-1, model.codes)).softmax(-1)
            state = torch.where(here, sample_categorical(p)[..., None], state)
        return state

    def latents(
        self, condition: tuple[DiscreteVAE, Images], state: Int[Tensor, "batch chains positions"]
    ) -> Codes:
        return Codes(state)
