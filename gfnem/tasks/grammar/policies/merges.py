"""What a rollout over forests is made of: sentences as policies see them, merges, their scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.gflownet.paths import Paths
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.policies.encoder import SpanEncoding
from gfnem.tasks.grammar.policies.env import LATER, Forest, parents_time
from gfnem.tasks.grammar.rules.grammar import Potentials
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.tree import Trees

# Stands for log 0: finite, so that differences of two of them are numbers.
LOG_ZERO = -1e4


@dataclass(frozen=True)
class ForestCondition:
    """A batch of sentences as policies see it.

    model_potentials: what the model's grammar says of the words; differentiable for shapes alone,
        so that an M-step on them needs no others. Labelled trees look up their rules one by one.
    potentials: the same without gradients.
    encode: the policy's encoder; it runs when something is first asked of it.
    """

    model: GrammarModel
    sentences: Sentences
    model_potentials: Potentials
    potentials: Potentials
    encode: Callable[[], SpanEncoding]

    @cached_property
    def encoding(self) -> SpanEncoding:
        """What the policy's encoder says of the spans."""
        return self.encode()

    @property
    def lengths(self) -> Int[Tensor, "batch"]:
        return self.sentences.lengths

    def select(self, rows: Int[Tensor, "rows"]) -> ForestCondition:
        """The same of chosen sentences, which may repeat."""
        sentences = self.sentences
        return ForestCondition(
            self.model,
            Sentences(sentences.words[rows], sentences.lengths[rows], sentences.ids[rows]),
            self.model_potentials.select(rows),
            self.potentials.select(rows),
            lambda: self.encoding.select(rows),
        )


@dataclass(frozen=True)
class Merges:
    """The order in which trees were made, row by row.

    gaps, labels: of each step; the exit slot and label 0 behind the end.
    time: when each gap was closed; LATER for gaps a sentence does not have.
    """

    gaps: Int[Tensor, "rows steps"]
    labels: Int[Tensor, "rows steps"]
    time: Int[Tensor, "rows gaps"]

    @staticmethod
    def of(time: Int[Tensor, "rows gaps"], labels: Int[Tensor, "rows gaps"] | None) -> Merges:
        """The order in which gaps were closed, and the labels of the nodes made there."""
        gaps = time.argsort(dim=-1, stable=True)
        inside = time.gather(1, gaps) < LATER
        chosen = torch.zeros_like(gaps)
        if labels is not None:
            chosen = torch.where(inside, labels.gather(1, gaps), 0)
        return Merges(torch.where(inside, gaps, gaps.shape[1]), chosen, time)


class ActionScores(ABC):
    """A policy's logits along one rollout."""

    def __init__(self, condition: ForestCondition, forest: Forest):
        self.condition = condition
        self.forest = forest

    @abstractmethod
    def logits(self, rows: Int[Tensor, "rows"] | None) -> Float[Tensor, "rows slots labels"]:
        """Unnormalised log-probabilities of merging in each open gap under each label.

        Closed gaps and the exit slot may hold anything. rows: where they are needed; None for
        everywhere.
        """

    @abstractmethod
    def merged(
        self,
        gap: Int[Tensor, "rows"],
        label: Int[Tensor, "rows"],
        before: Int[Tensor, "rows"],
        after: Int[Tensor, "rows"],
    ) -> None:
        """The forest has merged in `gap`; the entries of the gaps before and after changed."""


class ScoresAtOnce(ActionScores):
    """Logits whose gradients are cheaper all at once, when the rollout is over."""

    @abstractmethod
    def log_forward(self, merges: Merges) -> Float[Tensor, "steps rows"]:
        """log P_F of each merge, differentiable; 0 for exits."""


def lifetimes(
    trees: Trees, time: Int[Tensor, "rows gaps"]
) -> tuple[Int[Tensor, "rows items"], Int[Tensor, "rows items"]]:
    """The steps that make each word and node a root, -1 for words, and that merge it into another.

    Words come first. An item is a root before step s when made < s <= merged; one that the
    sentence does not have is never made.
    """
    rows = flat(trees)
    start, end = rows.start.squeeze(1), rows.end.squeeze(1)
    word = torch.arange(start.shape[1] + 1, device=start.device).expand(len(start), -1)
    made = torch.where(word < rows.lengths[:, None], -1, LATER)
    merged = parents_time(
        torch.cat([word, start], 1), torch.cat([word + 1, end], 1), time, rows.lengths
    )
    return torch.cat([made, time], 1), merged


def flat(trees: Trees) -> Trees:
    """Every tree as one sample of a sentence of its own."""
    samples = trees.start.shape[1]
    return Trees(
        trees.start.flatten(0, 1)[:, None],
        trees.end.flatten(0, 1)[:, None],
        trees.lengths.repeat_interleave(samples),
        None if trees.labels is None else trees.labels.flatten(0, 1)[:, None],
    )


def sentence_of(condition: ForestCondition, samples: int) -> Int[Tensor, "rows"]:
    batch = torch.arange(len(condition.lengths), device=condition.lengths.device)
    return batch.repeat_interleave(samples)


def select_paths(paths: Paths, chosen: Int[Tensor, "batch chosen"]) -> Paths:
    """Some of each data point's trajectories, for their ends and scores alone."""
    steps = chosen.expand(len(paths.log_forward), -1, -1)
    return Paths(
        z=paths.z.select(chosen),
        log_joint=paths.log_joint.gather(1, chosen),
        log_forward=paths.log_forward.gather(2, steps),
        log_backward=paths.log_backward.gather(2, steps),
        exits=paths.exits,
        flows=paths.flows,
        record=None,
    )
