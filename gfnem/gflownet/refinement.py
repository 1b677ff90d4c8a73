"""What is done to draws of q before the M-step learns from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gfnem.errors import UserError
from gfnem.gflownet.policy import Policy
from gfnem.latents import Latents
from gfnem.model import LatentVariableModel


class Refinement(ABC):
    """Makes latents for the M-step of plain draws of q."""

    @abstractmethod
    def __call__(
        self, policy: Policy, model: LatentVariableModel, x: Any, latents: Latents
    ) -> Latents:
        """Latents for an M-step. Called without gradients."""


class BackAndForth(Refinement):
    """Metropolis-Hastings whose proposal walks back with P_B and forward again with P_F.

    From z back to a state s, from s forward to z', accepted with probability min(1, A),
    log A = log p(x, z') - log p(x, z) + log P_B(z' -> s) + log P_F(s -> z)
    - log P_B(z -> s) - log P_F(s -> z') (arXiv 2302.06576, 2310.02710). It leaves p(z | x)
    invariant for any depth and temperature.

    steps: proposals, one after the other.
    depth: each walks back a number of steps drawn uniformly from 1 to depth; from 2 where one step
        back leads to nothing else, as from the complete shape of a tree.
    temperature: of the proposal; the tempered probabilities then stand in A.
    """

    def __init__(self, steps: int = 10, depth: int = 10, temperature: float = 1.0):
        for name, value in (("steps", steps), ("depth", depth)):
            if value < 1:
                raise UserError(f"{name} of back_and_forth is {value}; it must be at least 1")
        if not temperature > 0:
            raise UserError(f"temperature of back_and_forth is {temperature}; it must be positive")
        self.steps = steps
        self.depth = depth
        self.temperature = temperature

    def __call__(
        self, policy: Policy, model: LatentVariableModel, x: Any, latents: Latents
    ) -> Latents:
        return Latents(self.walk(policy, policy.condition(model, x), latents.z), log_weights=None)

    @torch.no_grad()
    def walk(self, policy: Policy, condition: Any, z: Any) -> Any:
        """Where the proposals lead from z."""
        for _ in range(self.steps):
            least = policy.least_depth
            depth = int(torch.randint(least, max(self.depth, least) + 1, ()))
            old, new = policy.regrow(condition, z, depth, self.temperature)
            log_accept = (
                new.log_joint
                - old.log_joint
                + (new.log_backward - old.log_backward).sum(0)
                + (old.log_forward - new.log_forward).sum(0)
            )
            accept = torch.rand_like(log_accept).log() < log_accept
            z = new.z.where(accept, old.z)
        return z


class Thinning(Refinement):
    """The first few of the draws, for M-steps that cost less than the E-step's.

    samples: how many.
    """

    def __init__(self, samples: int = 1):
        _check_samples(samples)
        self.samples = samples

    def __call__(
        self, policy: Policy, model: LatentVariableModel, x: Any, latents: Latents
    ) -> Latents:
        assert latents.log_weights is not None
        count = min(self.samples, latents.log_weights.shape[1])
        chosen = torch.arange(count, device=latents.log_weights.device)
        chosen = chosen.expand(len(latents.log_weights), -1)
        return Latents(latents.z.select(chosen), latents.log_weights.gather(1, chosen))


class ImportanceResampling(Refinement):
    """Latents drawn with replacement in proportion to their importance weights.

    samples: how many; None for as many as were drawn.
    """

    def __init__(self, samples: int | None = None):
        if samples is not None:
            _check_samples(samples)
        self.samples = samples

    def __call__(
        self, policy: Policy, model: LatentVariableModel, x: Any, latents: Latents
    ) -> Latents:
        weights = _weights(latents)
        count = weights.shape[-1] if self.samples is None else self.samples
        chosen = torch.multinomial(weights, count, replacement=True)
        return Latents(latents.z.select(chosen), log_weights=None)


class ImportanceWeighting(Refinement):
    """All latents, each counting by its self-normalised importance weight."""

    def __call__(
        self, policy: Policy, model: LatentVariableModel, x: Any, latents: Latents
    ) -> Latents:
        return replace(latents, m_step_weights=_weights(latents))


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise UserError(f"refinement.samples is {samples}; it must be at least 1")


def _weights(latents: Latents) -> Float[Tensor, "batch samples"]:
    """Self-normalised importance weights of plain draws."""
    assert latents.log_weights is not None
    return latents.log_weights.softmax(-1)
