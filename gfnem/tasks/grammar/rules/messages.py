"""Messages of nodes and spans, and their gradients, as families of rules offer them.

A message m[P, A] is the probability of the words below a node of a tree, or of those of a span,
given its label A with context P above it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from gfnem.tasks.grammar.rules.contexts import Contexts
from gfnem.tasks.grammar.rules.span_table import SpanTable

# The weights of options, along the last dimension -> the index of one.
Choose = Callable[[Tensor], Tensor]
# What a merge remembers for its gradient; what it is, its family knows.
Kept = tuple[Tensor, ...]


class MergeGradients(ABC):
    """Takes gradients of the messages of merges, sums up those of tables, hands on the children's.

    out: of the messages of some nodes. kept: what their merges remember.
    """

    @abstractmethod
    def two_words(
        self,
        sentence: Int[Tensor, "nodes"],
        gap: Int[Tensor, "nodes"],
        out: Float[Tensor, "nodes contexts nonterminals"],
    ) -> None: ...

    @abstractmethod
    def word_on_left(
        self,
        sentence: Int[Tensor, "nodes"],
        word: Int[Tensor, "nodes"],
        right: Float[Tensor, "nodes contexts nonterminals"],
        kept: Kept,
        out: Float[Tensor, "nodes contexts nonterminals"],
    ) -> Float[Tensor, "nodes inner nonterminals"]: ...

    @abstractmethod
    def word_on_right(
        self,
        sentence: Int[Tensor, "nodes"],
        word: Int[Tensor, "nodes"],
        left: Float[Tensor, "nodes contexts nonterminals"],
        kept: Kept,
        out: Float[Tensor, "nodes contexts nonterminals"],
    ) -> Float[Tensor, "nodes inner nonterminals"]: ...

    @abstractmethod
    def two_nodes(
        self,
        left: Float[Tensor, "nodes contexts nonterminals"],
        right: Float[Tensor, "nodes contexts nonterminals"],
        kept: Kept,
        out: Float[Tensor, "nodes contexts nonterminals"],
    ) -> tuple[
        Float[Tensor, "nodes inner nonterminals"], Float[Tensor, "nodes inner nonterminals"]
    ]:
        """Of the left and of the right children."""

    @abstractmethod
    def tables(self) -> tuple[Tensor, ...]:
        """Those of `Potentials.tables`, but for the root's rules."""


class Children(NamedTuple):
    """How spans are split; the label of a child that is a word means nothing."""

    left_width: Int[Tensor, "spans"]
    left_label: Int[Tensor, "spans"]
    right_label: Int[Tensor, "spans"]


class SpanMessages(ABC):
    """Messages of all spans of at least two words, each span's scaled to maximum 1.

    A chart fills them in from the narrowest to the widest. It knows the spans' scales and says
    what each split of a span weighs by them.

    contexts: what the rules see of the label above.
    """

    contexts: Contexts

    @abstractmethod
    def combine(
        self, width: int, weights: Float[Tensor, "starts batch splits"]
    ) -> Float[Tensor, "starts batch contexts nonterminals"]:
        """The messages of the spans of `width` words from those of their children, not scaled."""

    @abstractmethod
    def put(
        self, width: int, messages: Float[Tensor, "starts batch contexts nonterminals"]
    ) -> None:
        """Set the scaled messages of the spans of `width` words."""

    @abstractmethod
    def of_width(self, width: int) -> Float[Tensor, "starts batch contexts nonterminals"]:
        """The scaled messages of the spans of `width` words."""

    @abstractmethod
    def whole(self, lengths: Int[Tensor, "batch"]) -> Float[Tensor, "batch nonterminals"]:
        """The scaled messages of whole sentences under S."""

    @abstractmethod
    def table(self) -> SpanTable:
        """Of all spans [contexts, nonterminals]; 0 for single words."""

    @abstractmethod
    def split(
        self,
        width: int,
        weights: Float[Tensor, "spans splits"],
        start: Int[Tensor, "spans"],
        sentence: Int[Tensor, "spans"],
        label: Int[Tensor, "spans"],
        context: Int[Tensor, "spans"],
        choose: Choose,
    ) -> Children:
        """Split spans of `width` > 2 words, their descendants summed out (or at their best)."""

    @abstractmethod
    def gradients(self) -> SpanGradients:
        """Gradients of these messages; zero to begin with."""


class SpanGradients(ABC):
    """Takes gradients of spans' messages from the widest to the narrowest, and hands them on."""

    @abstractmethod
    def seed(
        self, lengths: Int[Tensor, "batch"], whole: Float[Tensor, "batch nonterminals"]
    ) -> None:
        """Begin with those of whole sentences under S."""

    @abstractmethod
    def received(self, width: int) -> Float[Tensor, "starts batch contexts nonterminals"]:
        """Those of the scaled messages of `width` words, once all wider spans are through."""

    @abstractmethod
    def spread(
        self,
        width: int,
        weights: Float[Tensor, "starts batch splits"],
        out: Float[Tensor, "starts batch contexts nonterminals"],
    ) -> None:
        """Hand those of the messages that are not scaled on to children and tables."""

    @abstractmethod
    def tables(self) -> tuple[Tensor, ...]:
        """Those of `Potentials.tables`, but for the root's rules."""
