"""The best latents of every training point, for E-steps to learn from again."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.errors import UserError
from gfnem.gflownet.kept import Kept


class Replay(nn.Module):
    """Latents of largest log p(x, z) of each data point, all different, out of those it was shown.

    They are kept as whole numbers, and rated anew by the model whenever they are shown again: what
    was good for an earlier model has to prove itself. Data points are told apart by `ids`.

    size: latents kept of each data point.
    """

    def __init__(self, size: int):
        super().__init__()
        if size < 1:
            raise UserError(f"posterior.replay is {size}; it must be at least 1, or null for none")
        self.kept = Kept(size)

    def recall(
        self, ids: Int[Tensor, "batch"], otherwise: Int[Tensor, "batch samples numbers"]
    ) -> Int[Tensor, "batch size numbers"]:
        """The latents of some data points; where they are not that many yet, others.

        otherwise: latents in place of those that are missing, over and over.

        Raises UserError for data points that belong to no data and so have no number.
        """
        if bool((ids < 0).any()):
            raise UserError(
                "posterior.replay tells data points apart by their ids, and some have none: set "
                "posterior.replay=null"
            )
        size, samples = self.kept.rows, otherwise.shape[1]
        kept = self.kept.recall(ids, otherwise.shape[2])
        others = otherwise[:, torch.arange(size, device=ids.device) % samples]
        # Behind a shorter row there is nothing to know.
        return torch.where(kept[..., :1] < 0, others, kept).clamp(min=0)

    def show(
        self,
        ids: Int[Tensor, "batch"],
        shown: Int[Tensor, "batch shown numbers"],
        log_joint: Float[Tensor, "batch shown"],
    ) -> None:
        """Keep the best of these; to be shown what was recalled among them, or it is lost.

        log_joint: log p(x, z) of each, by the model as it is now.
        """
        same = (shown[:, :, None] == shown[:, None]).all(-1)
        number = torch.arange(shown.shape[1], device=ids.device)
        is_first = same.int().argmax(-1) == number
        score = torch.where(is_first & log_joint.isfinite(), log_joint, -torch.inf)
        best, chosen = score.topk(self.kept.rows)
        rows = shown.gather(1, chosen[..., None].expand(-1, -1, shown.shape[2]))
        self.kept.keep(ids, torch.where(best[..., None].isfinite(), rows, -1))

    def get_extra_state(self) -> dict[str, Any]:
        return {"kept": self.kept.table}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        size = state["kept"].shape[1]
        if size != self.kept.rows:
            raise UserError(
                f"posterior.replay is {self.kept.rows}, but {size} latents were kept of each data "
                "point: leave it as it was"
            )
        self.kept.table = state["kept"]
