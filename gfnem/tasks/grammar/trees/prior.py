"""A prior on the shapes of parse trees, which multiplies any grammar.

With an energy E of unlabelled binary trees and a temperature T, latents are rated by

    p(x, z) exp(-E(shape of z) / T),

p(x, z) being the grammar's. The product is not normalised: its sum over sentences or trees is not
known, and p(z | x) becomes proportional to it. What the grammar says alone stays normalised: its
p(x, z), and p(x), its sum over z. As the energy knows no parameter of the grammar, M-steps climb
the grammar's own log p(x, z).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.errors import UserError
from gfnem.tasks.grammar.trees.energy import TreeEnergy
from gfnem.tasks.grammar.trees.tree import Trees


class TreePrior(nn.Module):
    """exp(-E(shape) / T), E being an energy times a strength. Nothing of it is learned.

    energy: of shapes.
    strength: nats for each unit of the energy; a negative one favours what a positive one is
        against.
    temperature: T before the first M-step.
    annealing: how T comes to `final_temperature` in `horizon` M-steps, where it stays: by equal
        differences ("linear") or by equal factors ("exponential"); or "constant", without either.
    """

    m_steps: Tensor

    def __init__(
        self,
        energy: TreeEnergy,
        strength: float = 1.0,
        temperature: float = 1.0,
        annealing: Literal["constant", "linear", "exponential"] = "constant",
        final_temperature: float | None = None,
        horizon: int | None = None,
    ):
        super().__init__()
        _check_annealing(temperature, annealing, final_temperature, horizon)
        self.energy = energy.requires_grad_(False)
        self.strength = strength
        self.first = temperature
        self.annealing = annealing
        self.last = temperature if final_temperature is None else final_temperature
        self.horizon = horizon or 1
        # How far annealing is belongs to the state of a run.
        self.register_buffer("m_steps", torch.zeros((), dtype=torch.long))

    @property
    def temperature(self) -> float:
        done = min(int(self.m_steps) / self.horizon, 1.0)
        if self.annealing == "exponential":
            return self.first * (self.last / self.first) ** done
        return self.first + (self.last - self.first) * done

    @torch.no_grad()
    def log_weight(self, trees: Trees) -> Float[Tensor, "batch samples"]:
        """-E / T in nats."""
        return -self.strength / self.temperature * self.energy(trees)

    @torch.no_grad()
    def node(
        self,
        left: Float[Tensor, "nodes width"],
        right: Float[Tensor, "nodes width"],
        lengths: Int[Tensor, "nodes"],
    ) -> tuple[Float[Tensor, "nodes width"], Float[Tensor, "nodes"]]:
        """The states of nodes and what they add to -E / T; see `TreeEnergy.node`."""
        state, energy = self.energy.node(left, right, lengths)
        return state, -self.strength / self.temperature * energy


def _check_annealing(
    temperature: float, annealing: str, final_temperature: float | None, horizon: int | None
) -> None:
    """Raises UserError for values that are none, and for some that would have no effect."""
    for name, value in (("temperature", temperature), ("final_temperature", final_temperature)):
        if value is not None and not value > 0:
            raise UserError(f"tree_prior.{name} is {value}; it must be positive")
    if annealing not in ("constant", "linear", "exponential"):
        raise UserError(
            f"tree_prior.annealing is {annealing!r}; use 'constant', 'linear' or 'exponential'"
        )
    for name, value in (("final_temperature", final_temperature), ("horizon", horizon)):
        if annealing == "constant" and value is not None:
            raise UserError(
                f"tree_prior.{name} is {value}, which has no effect with annealing=constant: set "
                "tree_prior.annealing=linear or exponential, or leave it out"
            )
        if annealing != "constant" and value is None:
            raise UserError(f"tree_prior.annealing={annealing} needs tree_prior.{name}")
    if horizon is not None and horizon < 1:
        raise UserError(f"tree_prior.horizon is {horizon}; it must be at least 1 M-step")
