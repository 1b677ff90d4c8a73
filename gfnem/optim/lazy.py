"""Lazy momentum: rows without a gradient wait.

With one momentum for all, the buffer of a row that is rarely active has died down before the row's
next gradient, while that of a frequent one lives over many (arXiv 2605.28961). Lazy momentum counts
a row's own updates: an idle row neither moves, nor does its momentum decay, nor its weight.

It makes sense for tables of word embeddings alone. Softmax emissions are normalised over the
vocabulary, so they give every row a gradient at every step, and lazy momentum is plain momentum
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gfnem.optim.schedules import Coefficients


class WordTable(nn.Embedding):
    """Embeddings of words; a row has a gradient only where its word is read."""


def lazy_groups(groups: Iterable[dict[str, Any]], network: nn.Module) -> list[dict[str, Any]]:
    """Split parameter groups so that rows wait in the network's tables of words alone.

    Args:
        groups: for an optimizer with lazy momentum.
        network: whose parameters they are.

    Raises:
        ValueError: for a network without such tables.
    """
    tables = {id(part.weight) for part in network.modules() if isinstance(part, WordTable)}
    if not tables:
        raise ValueError(
            "lazy momentum is for tables of word embeddings, and this network has none: "
            "choose lazy=false"
        )
    split = []
    for group in groups:
        waiting = [p for p in group["params"] if id(p) in tables]
        others = [p for p in group["params"] if id(p) not in tables]
        split.append({**group, "params": waiting})
        split.append({**group, "params": others, "lazy": False})
    return [group for group in split if group["params"]]


def step_rows(
    p: Float[Tensor, "rows *shape"],
    momentum: Float[Tensor, "rows *shape"],
    steps: Int[Tensor, "rows"],
    coefficients: Callable[[Any], Coefficients],
) -> None:
    """Update the rows of p whose gradient is not all zero, in place.

    A row of p.grad, dense or sparse, is active where any of its entries is not zero. For active
    rows

        y' = keep y + gamma1 g;  theta' = (1 - shrink) theta - gamma2 g - gamma3 y';  t' = t + 1

    with coefficients after the row's own t updates; idle rows stay.

    Args:
        p: the table, with its gradient.
        momentum: y of each row.
        steps: t, how many updates each row has had.
        coefficients: called with t as [rows, 1, ..., 1].
    """
    assert p.grad is not None
    olds = (p, momentum, steps)
    if p.grad.is_sparse and p.grad.sparse_dim() == 1:
        gradient = p.grad.coalesce()
        rows = gradient.indices()[0]
        news = _updated(p[rows], momentum[rows], steps[rows], gradient.values(), coefficients)
        for old, new in zip(olds, news, strict=True):
            old.index_copy_(0, rows, new)
    else:
        news = _updated(p, momentum, steps, p.grad.to_dense(), coefficients)
        for old, new in zip(olds, news, strict=True):
            old.copy_(new)


def _updated(
    p: Float[Tensor, "rows *shape"],
    y: Float[Tensor, "rows *shape"],
    steps: Int[Tensor, "rows"],
    g: Float[Tensor, "rows *shape"],
    coefficients: Callable[[Any], Coefficients],
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows, their momenta and their numbers of steps after one update."""
    active: Bool[Tensor, "rows"] = (g != 0).flatten(1).any(1)
    column = (-1, *[1] * (p.dim() - 1))
    # Numbers of steps are whole in float32 up to 16 million, in half precision up to 2,000.
    t = steps.to(torch.promote_types(p.dtype, torch.float32)).view(column)
    c = coefficients(t)
    moved_y = (c.keep * y + c.gamma1 * g).to(y.dtype)
    moved_p = ((1 - c.shrink) * p - c.gamma2 * g - c.gamma3 * moved_y).to(p.dtype)
    where = active.view(column)
    return torch.where(where, moved_p, p), torch.where(where, moved_y, y), steps + active
