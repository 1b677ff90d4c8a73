"""Markov chains whose stationary distribution is p(z | x): Monte Carlo EM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from gfnem.categorical import sample_categorical
from gfnem.errors import UserError
from gfnem.gflownet.kept import Kept
from gfnem.latents import EStep, Latents
from gfnem.model import FactorisedModel, LatentVariableModel
from gfnem.posterior import Posterior, check_m_step


class Moves(ABC):
    """The chains of one task: where they begin and how they go on.

    The state of a chain is a row of numbers, none of them negative, as many for each data point of
    a batch. Every method but the first takes the condition of a batch. They are called without
    gradients.
    """

    @abstractmethod
    def condition(self, model: LatentVariableModel, x: Any) -> Any:
        """All that depends on x and the model alone, computed once for all transitions.

        Raises UserError for a model of another kind than these moves are for.
        """

    @abstractmethod
    def begin(self, condition: Any, chains: int) -> Int[Tensor, "batch chains numbers"]:
        """States to begin at, drawn anew."""

    @abstractmethod
    def walk(
        self, condition: Any, state: Int[Tensor, "batch chains numbers"], steps: int
    ) -> Int[Tensor, "batch chains numbers"]:
        """So many transitions, each of which leaves p(z | x) as it is."""

    @abstractmethod
    def latents(self, condition: Any, state: Int[Tensor, "batch chains numbers"]) -> Any:
        """z of given states."""


class MCMC(Posterior):
    """Draws of p(z | x) by Markov chains (Monte Carlo EM; Wei and Tanner, 1990).

    Every training point has chains of its own, which go on where the M-step before left them
    (Tieleman, 2008), while the model moves little. For any other purpose than M-steps in training
    mode chains begin anew. The density of the draws is not known, so they have no weights, and x
    has `ids`, as the data of all tasks has. Nothing is learned.

    moves: the task's.
    samples: chains of each data point, and latents in an M-step.
    steps: transitions before an M-step.
    burn_in: transitions of chains that begin, beside those.
    m_step: "gradient", or "closed" for a model that knows where log p(x, z) of given latents is
        largest: M-steps go there at once.
    """

    def __init__(
        self,
        moves: Moves,
        samples: int = 4,
        steps: int = 10,
        burn_in: int = 100,
        m_step: Literal["gradient", "closed"] = "gradient",
    ):
        super().__init__()
        check_m_step(m_step)
        for name, value, least in (("samples", samples, 1), ("steps", steps, 1)):
            if value < least:
                raise UserError(f"posterior.{name} is {value}; it must be at least {least}")
        if burn_in < 0:
            raise UserError(f"posterior.burn_in is {burn_in}; it must not be negative")
        self.moves = moves
        self.samples = samples
        self.steps = steps
        self.burn_in = burn_in
        self.m_step = m_step
        self._kept = Kept(samples)

    @property
    def m_step_samples(self) -> int:
        return self.samples

    def e_step(self, model: LatentVariableModel, x: Any) -> EStep:
        return EStep(loss=None, latents=None)

    @torch.no_grad()
    def sample(self, model: LatentVariableModel, x: Any, samples: int) -> Latents:
        condition = self.moves.condition(model, x)
        state = self._begun(condition, samples)
        return Latents(self.moves.latents(condition, state), log_weights=None)

    @torch.no_grad()
    def m_step_latents(
        self, model: LatentVariableModel, x: Any, latents: Latents | None = None
    ) -> Latents:
        if latents is None and self.training:
            return self._go_on(model, x)
        return super().m_step_latents(model, x, latents)

    def _go_on(self, model: LatentVariableModel, x: Any) -> Latents:
        """Where the kept chains are after some more transitions."""
        condition = self.moves.condition(model, x)
        state = self.moves.walk(condition, self._recall(condition, x.ids), self.steps)
        self._kept.keep(x.ids, state)
        return Latents(self.moves.latents(condition, state), log_weights=None)

    def _begun(self, condition: Any, chains: int) -> Int[Tensor, "batch chains numbers"]:
        return self.moves.walk(condition, self.moves.begin(condition, chains), self.burn_in)

    def _recall(
        self, condition: Any, ids: Int[Tensor, "batch"]
    ) -> Int[Tensor, "batch samples numbers"]:
        state = self.moves.begin(condition, self.samples)
        kept = self._kept.recall(ids, state.shape[2])
        is_new = kept[:, :1, :1] < 0
        if is_new.any():
            state = self.moves.walk(condition, state, self.burn_in)
        return torch.where(is_new, state, kept)

    def get_extra_state(self) -> dict[str, Any]:
        return {"kept": self._kept.table}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        chains = state["kept"].shape[1]
        if chains != self.samples:
            raise UserError(
                f"posterior.samples is {self.samples}, but {chains} chains were kept for each "
                "data point: leave it as it was"
            )
        self._kept.table = state["kept"]


class Gibbs(Moves):
    """For every `FactorisedModel`: one part of z after the other is drawn given the others.

    A transition goes through all parts once. Before, it proposes new values of all parts together,
    drawn uniformly, and takes them with probability min(1, p(x, z') / p(x, z)): part by part alone,
    chains would stay with an explanation of x where better ones differ in several parts. x has
    `select`, and no value of z is impossible.
    """

    def condition(self, model: LatentVariableModel, x: Any) -> tuple[FactorisedModel, Any]:
        if not isinstance(model, FactorisedModel):
            raise UserError(
                f"posterior.moves=Gibbs needs a model whose latents have parts; "
                f"{type(model).__name__} has none: use moves of its own or posterior=gflownet"
            )
        return model, x

    def begin(
        self, condition: tuple[FactorisedModel, Any], chains: int
    ) -> Int[Tensor, "batch chains parts"]:
        model, x = condition
        return _uniform(model, x, chains)

    def walk(
        self,
        condition: tuple[FactorisedModel, Any],
        state: Int[Tensor, "batch chains parts"],
        steps: int,
    ) -> Int[Tensor, "batch chains parts"]:
        model, x = condition
        rows = torch.arange(len(state), device=state.device).repeat_interleave(state.shape[1])
        x, index = x.select(rows), state.flatten(0, 1)
        like = next(model.parameters())
        for _ in range(steps):
            proposed = _uniform(model, x, 1).squeeze(1)
            log_joint = model.log_joint(x, model.latents(torch.stack([proposed, index], 1)))
            log_accept = log_joint[:, 0] - log_joint[:, 1]
            accept = torch.rand_like(log_accept).log() < log_accept
            index = torch.where(accept[:, None], proposed, index)
            # With the others known for sure, E[log p(x, z)] over them is that of their values.
            q = [
                functional.one_hot(value, values).to(like)
                for value, values in zip(index.unbind(-1), model.parts, strict=True)
            ]
            for part, values in enumerate(model.parts):
                p = model.expected_log_joint_of(x, q, part).softmax(-1)
                q[part] = functional.one_hot(sample_categorical(p), values).to(like)
            index = torch.stack([known.argmax(-1) for known in q], -1)
        return index.view_as(state)

    def latents(
        self, condition: tuple[FactorisedModel, Any], state: Int[Tensor, "batch chains parts"]
    ) -> Any:
        model, _ = condition
        return model.latents(state)


def _uniform(model: FactorisedModel, x: Any, chains: int) -> Int[Tensor, "batch chains parts"]:
    """Values of all parts, each as likely."""
    size = len(x.ids), chains
    each = [torch.randint(values, size, device=x.ids.device) for values in model.parts]
    return torch.stack(each, -1)
