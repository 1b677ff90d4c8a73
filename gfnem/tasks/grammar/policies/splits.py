"""Sentences as the chart policy sees them, and the splits of their spans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.gflownet.paths import Paths
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.policies.encoder import SpanEncoding
from gfnem.tasks.grammar.policies.guide import Guide
from gfnem.tasks.grammar.rules.grammar import Grammar, Potentials
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.tree import Trees


class Spans(NamedTuple):
    """Open spans as a flat list; `above` is the label above, or S, which comes last."""

    sentence: Int[Tensor, "spans"]
    start: Int[Tensor, "spans"]
    width: Int[Tensor, "spans"]
    label: Int[Tensor, "spans"]
    above: Int[Tensor, "spans"]


class Splits(NamedTuple):
    """Weights of the splits of spans of at least three words; a choice is (split, B, C).

    log_weights: of each split, relative to the span's largest.
    left, right: of the children's labels, 0 for words.
    rules: p(A -> B C | A, P).
    word_left, word_right: of the other child's label where one child is a word.
    """

    log_weights: Float[Tensor, "spans splits"]
    left: Float[Tensor, "spans splits nonterminals"]
    right: Float[Tensor, "spans splits nonterminals"]
    rules: Float[Tensor, "spans nonterminals nonterminals"]
    word_left: Float[Tensor, "spans nonterminals"]
    word_right: Float[Tensor, "spans nonterminals"]

    def first(self, width: Int[Tensor, "spans"]) -> Float[Tensor, "spans splits nonterminals"]:
        """Weights of a split and the left child's label, or the right one's if left is a word."""
        options = self.left * (self.right @ self.rules.mT)
        row = torch.arange(len(width), device=width.device)
        options = options.index_put((row, torch.zeros_like(width)), self.word_left)
        options = options.index_put((row, width - 2), self.word_right)
        return self.log_weights.exp()[..., None] * options

    def joint(self, width: Int[Tensor, "spans"]) -> Float[Tensor, "spans choices"]:
        """Weights of all choices; a word's label counts as 0."""
        options = self.left[..., None] * self.rules[:, None] * self.right[:, :, None]
        row = torch.arange(len(width), device=width.device)
        none = torch.zeros_like(width)
        options = options.index_put((row, none, none), self.word_left)
        options = options.transpose(2, 3).index_put((row, width - 2, none), self.word_right)
        weights = self.log_weights.exp()[..., None, None]
        return (weights * options.transpose(2, 3)).flatten(1)

    def log_choice(
        self,
        width: Int[Tensor, "spans"],
        left_width: Int[Tensor, "spans"],
        left: Int[Tensor, "spans"],
        right: Int[Tensor, "spans"],
        temperature: float,
    ) -> Float[Tensor, "spans"]:
        """log-probability of one choice for each span; NaN where there is nothing to draw."""
        at = torch.arange(len(width), device=width.device), left_width - 1
        inner = (
            finite_log(self.left[at].gather(1, left[:, None]))
            + finite_log(self.rules[at[0], left, right])[:, None]
            + finite_log(self.right[at].gather(1, right[:, None]))
        ).squeeze(1)
        word_left = finite_log(self.word_left.gather(1, right[:, None])).squeeze(1)
        word_right = finite_log(self.word_right.gather(1, left[:, None])).squeeze(1)
        chosen = torch.where(left_width == width - 1, word_right, inner)
        chosen = torch.where(left_width == 1, word_left, chosen) + self.log_weights[at]
        total = self.first(width).sum((1, 2))
        chosen = torch.where(total > 0, chosen, torch.nan)
        if temperature == 1.0:
            return chosen - finite_log(total)
        joint = self.joint(width).log() / temperature
        return chosen / temperature - joint.logsumexp(-1)


@dataclass(frozen=True)
class ChartCondition:
    """A batch of sentences as the policy sees it.

    model: the grammar.
    grammar: its rules, differentiable.
    model_potentials: what they say of the words; differentiable for shapes alone. Labelled trees
        look up their rules one by one, which tables need not remember.
    potentials: the same without gradients.
    guide: inside scores of all spans, exact or not.
    encode: the policy's encoder; it runs when something is first asked of it.
    """

    sentences: Sentences
    model: GrammarModel
    grammar: Grammar
    model_potentials: Potentials
    potentials: Potentials
    guide: Guide
    encode: Callable[[], SpanEncoding]

    @cached_property
    def encoding(self) -> SpanEncoding:
        """What the policy's encoder says of the spans."""
        return self.encode()

    def residual(
        self,
        sentence: Int[Tensor, "*#spans"],
        start: Int[Tensor, "*#spans"],
        end: Int[Tensor, "*#spans"],
        parent: Int[Tensor, "*#spans"],
    ) -> Float[Tensor, "*spans nonterminals"]:
        """What it adds to b: for each label of a span, and for each label under the parent's."""
        labels = self.guide.nonterminals
        table = self.encoding.scores.unflatten(-1, (labels + 2, labels))
        # One look-up for both: the gradient of each is as large as the table.
        both = torch.stack([torch.zeros_like(parent), parent + 1], -1)
        span = self.encoding.index[start, end]
        return table[sentence[..., None], span[..., None], both].sum(-2)

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        return self.sentences.lengths

    def seen(self, above: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
        """The contexts that labels above make for the grammar's rules."""
        return self.potentials.contexts.under(above)

    def log_grammar(self, z: Trees) -> Float[Tensor, "batch samples"]:
        """The grammar's log p(x, z), differentiable in it."""
        return self.model.log_grammar_given(self.model_potentials, z)

    def model_log_joint(self, paths: Paths) -> Float[Tensor, "batch samples"] | None:
        """log p(x, z) of where trajectories end, differentiable in the model where it can be."""
        if paths.z.labels is None or not torch.is_grad_enabled():
            return paths.model_log_joint
        return self.model.log_joint_under(self.grammar, self.sentences, paths.z)

    def labelled(self, z: Trees) -> Trees:
        """The trees themselves, or shapes with labels from P_B."""
        return z if z.labels is not None else self.model.sample_labels(self.model_potentials, z)

    def log_labels(
        self, sentence: Int[Tensor, "rows"], trees: Trees
    ) -> Float[Tensor, "rows samples"]:
        """log p(labels | shape, x) of labelled trees of chosen sentences."""
        potentials = self.model_potentials.select(sentence)
        log_p = self.model.log_grammar_given
        return log_p(potentials, trees) - log_p(potentials, trees.shapes())

    def root_logits(self) -> Float[Tensor, "batch nonterminals"]:
        """Of the labels of whole sentences."""
        guide = self.potentials.root * self.guide.whole(self.lengths)
        sentence = torch.arange(len(guide), device=guide.device)
        start = torch.zeros_like(sentence)
        under_s = torch.full_like(sentence, guide.shape[1])
        return finite_log(guide) + self.residual(sentence, start, self.lengths, under_s)

    def splits(self, spans: Spans) -> Splits:
        """Spans of at least three words each."""
        sentence, start, width = (field[:, None] for field in spans[:3])
        split = torch.arange(1, int(spans.width.max()), device=start.device)
        valid = split < width
        split = torch.minimum(split, width - 1)
        middle = start + split
        table, row, context = self.potentials, spans.sentence, self.seen(spans.above)
        last = spans.start + spans.width - 1
        (left, right), scales = self._children(
            sentence,
            torch.stack([start.expand_as(middle), middle]),
            torch.stack([split, width - split]),
            spans.label[:, None],
        )
        scale = torch.where(valid, scales.sum(0), -torch.inf)
        largest = scale.amax(-1, keepdim=True).clamp(min=torch.finfo(scale.dtype).min)
        wide = torch.arange(len(row), device=row.device), spans.width - 2
        return Splits(
            log_weights=scale - largest,
            left=left,
            right=right,
            rules=table.inner_rules(spans.label, context),
            word_left=table.word_left_rules(row, spans.start, spans.label, context) * right[:, 0],
            word_right=table.word_right_rules(row, last, spans.label, context) * left[wide],
        )

    def _children(
        self,
        sentence: Int[Tensor, "spans 1"],
        start: Int[Tensor, "2 spans splits"],
        width: Int[Tensor, "2 spans splits"],
        parent: Int[Tensor, "spans 1"],
    ) -> tuple[Float[Tensor, "2 spans splits nonterminals"], Float[Tensor, "2 spans splits"]]:
        """exp b of each label relative to a scale, 0 for words, and the scales' logarithms."""
        guide = self.guide.scores(sentence, start, width, self.seen(parent))
        # A word has no span, and a guide of 0.
        is_span = width > 1
        residual = self.residual(
            sentence, start, torch.where(is_span, start + width, start), parent
        )
        residual = torch.where(is_span[..., None], residual, 0.0)
        largest = residual.detach().amax(-1)
        scale = self.guide.scales.by_start[start, sentence, width] + largest
        return guide * (residual - largest[..., None]).exp(), scale


def finite_log(x: Tensor) -> Tensor:
    """Finite where x is 0, so that gradients and differences are numbers."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).log()
