"""A factorised q(z | x), by coordinate ascent on the evidence lower bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.categorical import sample_categorical
from gfnem.errors import UserError
from gfnem.latents import EStep, Latents
from gfnem.model import FactorisedModel, LatentVariableModel
from gfnem.posterior import Posterior, check_m_step

Factors = list[Float[Tensor, "batch values"]]


class MeanField(Posterior):
    """q(z | x) = product over the parts of z, free for every data point.

    Its factors climb E_q[log p(x, z) - log q] one after the other, which takes each to
    q(part) ∝ exp E[log p(x, z)] over the others, again and again until nothing changes. Those of
    the training data are kept from one M-step to the next, so that both steps climb the same bound
    (Neal and Hinton, 1998); they begin uniform, and so do those of any other data. x has `ids`, as
    the data of all tasks has, and the model is a `FactorisedModel`.

    m_step: "gradient", or "closed" for a model that knows where log p(x, z) of given latents is
        largest: M-steps go there at once, with all combinations of the parts' values as latents.
    sweeps: over the parts, at most.
    tolerance: largest change of a probability in the last sweep.
    """

    def __init__(
        self,
        m_step: Literal["gradient", "closed"] = "gradient",
        sweeps: int = 200,
        tolerance: float = 1e-5,
    ):
        super().__init__()
        check_m_step(m_step)
        if sweeps < 1:
            raise UserError(f"posterior.sweeps is {sweeps}; it must be at least 1")
        if not tolerance > 0:
            raise UserError(f"posterior.tolerance is {tolerance}; it must be positive")
        self.m_step = m_step
        self.sweeps = sweeps
        self.tolerance = tolerance
        self._kept: Factors | None = None  # of the training data, by their ids

    def e_step(self, model: LatentVariableModel, x: Any) -> EStep:
        return EStep(loss=None, latents=None)

    @torch.no_grad()
    def factors(self, model: LatentVariableModel, x: Any) -> Factors:
        """q of each part, where coordinate ascent ends; in training mode it goes on from where it
        last ended.
        """
        model = self._factorised(model)
        like = next(model.parameters())
        if self.training:
            q = self._recall(model.parts, x.ids, like)
        else:
            q = _uniform(model.parts, len(x.ids), like)
        for _ in range(self.sweeps):
            change = 0.0
            for part, before in enumerate(q):
                q[part] = model.expected_log_joint_of(x, q, part).softmax(-1)
                change = max(change, float((q[part] - before).abs().max()))
            if change < self.tolerance:
                break
        if self.training:
            assert self._kept is not None
            for kept, factor in zip(self._kept, q, strict=True):
                kept[x.ids] = factor
        return q

    def _recall(self, parts: Sequence[int], ids: Int[Tensor, "batch"], like: Tensor) -> Factors:
        known = 0 if self._kept is None else len(self._kept[0])
        new = _uniform(parts, max(int(ids.max()) + 1 - known, 0), like)
        if self._kept is None:
            self._kept = new
        else:
            self._kept = [
                torch.cat([kept.to(like.device), more])
                for kept, more in zip(self._kept, new, strict=True)
            ]
        return [kept[ids] for kept in self._kept]

    @torch.no_grad()
    def sample(self, model: LatentVariableModel, x: Any, samples: int) -> Latents:
        q = self.factors(model, x)
        index = torch.stack([sample_categorical(p[:, None].expand(-1, samples, -1)) for p in q], -1)
        z = self._factorised(model).latents(index)
        log_q = sum(p.log().gather(1, index[..., part]) for part, p in enumerate(q))
        return Latents(z, model.log_joint(x, z) - log_q)

    @torch.no_grad()
    def m_step_latents(
        self, model: LatentVariableModel, x: Any, latents: Latents | None = None
    ) -> Latents:
        """All combinations of the parts' values, each counting by its probability."""
        q = self.factors(model, x)
        model = self._factorised(model)
        values = [torch.arange(count, device=q[0].device) for count in model.parts]
        index = torch.cartesian_prod(*values).view(-1, len(q))
        weights = torch.stack([p[:, index[:, part]] for part, p in enumerate(q)]).prod(0)
        return Latents(model.latents(index.expand(len(weights), -1, -1)), None, weights)

    def expected_log_joint(
        self, model: LatentVariableModel, x: Any, latents: Latents | None = None
    ) -> Float[Tensor, "batch"]:
        q = self.factors(model, x)
        return (q[0] * self._factorised(model).expected_log_joint_of(x, q, 0)).sum(-1)

    def get_extra_state(self) -> dict[str, Any]:
        return {"kept": self._kept}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._kept = state["kept"]

    @staticmethod
    def _factorised(model: LatentVariableModel) -> FactorisedModel:
        if not isinstance(model, FactorisedModel):
            raise UserError(
                f"posterior=mean_field needs a model whose latents have parts; "
                f"{type(model).__name__} has none: use posterior=gflownet"
            )
        return model


def _uniform(parts: Sequence[int], rows: int, like: Tensor) -> Factors:
    return [like.new_full((rows, values), 1 / values) for values in parts]
