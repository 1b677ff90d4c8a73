"""What the rules of a label see of the label above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Contexts that follow one another and are of equally many labels, taken together.

    labels, contexts: which they are.
    count: how many contexts.
    size: how many labels are of each.
    """

    labels: slice
    contexts: slice
    count: int
    size: int

    def by_context(
        self, table: Shaped[Tensor, "*before labels above *after"], axis: int
    ) -> Shaped[Tensor, "*before count size*above *after"]:
        """Of a table of all labels, each under what is above it, those of this part.

        axis: of the labels; what is above them comes next.
        """
        own = table.narrow(axis, self.labels.start, self.count * self.size)
        return own.unflatten(axis, (self.count, self.size)).flatten(axis + 1, axis + 2)

    def by_label(
        self, values: Shaped[Tensor, "*before count size*above *after"], axis: int
    ) -> Shaped[Tensor, "*before count*size above *after"]:
        """The inverse of `by_context`; axis: of the contexts."""
        return values.unflatten(axis + 1, (self.size, -1)).flatten(axis, axis + 1)


@dataclass(frozen=True)
class Contexts:
    """A map from labels to contexts: rules see of the label above but the context it makes.

    below: for each label the context in which its children are; never less than that of the label
        before, so that labels of one context follow one another.
    root: the context in which the labels of whole sentences are, which stand under S.

    Raises ValueError for contexts out of order.

    Example:
        >>> Contexts.parents(3)
        Contexts(below=(0, 1, 2), root=3)
        >>> Contexts((0, 0, 1), root=0).parts
        (Part(labels=slice(0, 2, None), contexts=slice(0, 1, None), count=1, size=2), \
Part(labels=slice(2, 3, None), contexts=slice(1, 2, None), count=1, size=1))
    """

    below: tuple[int, ...]
    root: int

    def __post_init__(self):
        if list(self.below) != sorted(self.below):
            raise ValueError(f"labels' contexts are {self.below}; they must not descend")

    @staticmethod
    def none(labels: int) -> Contexts:
        """The map of context-free rules: one context for all."""
        return Contexts((0,) * labels, 0)

    @staticmethod
    def parents(labels: int) -> Contexts:
        """The map of rules that see their parent: every label makes a context, and S the last."""
        return Contexts(tuple(range(labels)), labels)

    @staticmethod
    def counted(total: int, labels: int) -> Contexts:
        """The map of rules that tell so many contexts apart: none or the parents.

        Raises ValueError for another number.
        """
        if total == 1:
            return Contexts.none(labels)
        if total == labels + 1:
            return Contexts.parents(labels)
        raise ValueError(
            f"the rules of {labels} labels have {total} contexts; they must have 1, or {labels + 1}"
        )

    @cached_property
    def total(self) -> int:
        """How many contexts there are."""
        return max(self.root + 1, self.inner)

    @cached_property
    def inner(self) -> int:
        """How many contexts there are under labels: the first ones."""
        return self.below[-1] + 1

    @property
    def labels(self) -> int:
        return len(self.below)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """All labels by their contexts; one part where contexts are of equally many labels."""
        parts: list[Part] = []
        first = 0
        for context in sorted(set(self.below)):
            size = self.below.count(context)
            labels, contexts = slice(first, first + size), slice(context, context + 1)
            last = parts[-1] if parts else None
            if last and last.size == size and last.contexts.stop == context:
                parts[-1] = Part(
                    slice(last.labels.start, labels.stop),
                    slice(last.contexts.start, contexts.stop),
                    last.count + 1,
                    size,
                )
            else:
                parts.append(Part(labels, contexts, 1, size))
            first += size
        return tuple(parts)

    def under(self, parent: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
        """The contexts under labels, or under S, which counts as the last label."""
        if self.total == 1:
            return torch.zeros_like(parent)
        if self.root == self.labels == self.inner:
            return parent
        return parent.new_tensor([*self.below, self.root])[parent]


def joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """The values of all parts in the order of their labels."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)
