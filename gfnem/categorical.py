"""Draws from many categorical distributions at once, by inverting their cumulative sums.

`torch.multinomial` takes ten times as long on wide rows.

Training goes on where a row has weights that nothing can be drawn from: they are all zero or one of
them is not finite. Looking for such rows would wait for the device at every draw. They get a
category that exists; the log-probability that policies compute of it is NaN, and so is the loss,
which skips the update. Whoever shows what is drawn watches for them (`watched`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gfnem.errors import UserError

# Whether there were such rows, on each device; None where nobody watches.
_seen: dict[torch.device, Bool[Tensor, ""]] | None = None


@contextmanager
def watched() -> Iterator[None]:
    """Watch for weights that nothing can be drawn from.

    Raises UserError at the end if there were any, also in place of an exception that may have come
    of what was drawn with them.
    """
    global _seen
    before, _seen = _seen, {}
    try:
        yield
        check_draws()
    except Exception:
        check_draws()
        raise
    finally:
        _seen = before


def check_draws() -> None:
    """Wait for the device, to tell whether all could be drawn since somebody watches.

    Raises UserError where something could not.
    """
    if any(map(bool, (_seen or {}).values())):
        raise UserError(
            "something is to be drawn with weights that are all zero or not finite: the model or "
            "its posterior has diverged, use another checkpoint or run"
        )


def sample_categorical(
    weights: Float[Tensor, "*batch categories"], generator: torch.Generator | None = None
) -> Int[Tensor, "*batch"]:
    """One category for each row, with probability proportional to its weight.

    weights: non-negative, with at least one positive entry in each row. A category of weight zero
        is never drawn. Where all are zero or not all finite, any category may be.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[..., -1:]
    if _seen is not None:
        _note(~(total > 0) | total.isinf(), _seen)
    uniform = torch.rand(
        total.shape, generator=generator, dtype=weights.dtype, device=weights.device
    )
    # A product may be rounded up to the total, a subnormal one easily: stay below it.
    threshold = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    # It is past the end where the total is zero or NaN.
    return index % weights.shape[-1]


def drawable(logits: Float[Tensor, "*batch categories"]) -> Float[Tensor, "*batch categories"]:
    """Logits of which only categories that may be drawn, those above -inf, will be drawn.

    Those that are NaN or infinite count as 0.
    """
    if _seen is not None:
        _note(~(logits < torch.inf), _seen)
    return logits.nan_to_num(nan=0.0, posinf=0.0, neginf=-torch.inf)


def _note(bad: Bool[Tensor, "*rows"], seen: dict[torch.device, Bool[Tensor, ""]]) -> None:
    now = bad.any()
    seen[now.device] = now | seen.get(now.device, now)
