"""Policies over forests: which two neighbouring roots to merge next, and under which label."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.categorical import sample_categorical
from gfnem.errors import UserError
from gfnem.gflownet.objectives import ScoredTrajectories
from gfnem.gflownet.policy import ON_POLICY, Behaviour, NumberedPolicy, Paths
from gfnem.latents import LatentTable
from gfnem.model import LatentVariableModel
from gfnem.tasks.grammar.encoder import SpanEncoder, SpanEncoding
from gfnem.tasks.grammar.env import LATER, Forest, ForestEnv, parents_time
from gfnem.tasks.grammar.estimators import ForestEstimator
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.potentials import MergePotentials
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.tree import Trees

Latent = Literal["shape", "labelled"]

# Longer sentences have too many merge orders to try them all.
TABULATED_WORDS = 6

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
    model_potentials: MergePotentials
    potentials: MergePotentials
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


class ForestPolicy(NumberedPolicy):
    """What all policies over forests share: rollouts, P_B, flows and torchgfn's view of them.

    latent: "shape" for unlabelled trees, whose actions are gaps, or "labelled" for trees with
        nonterminals, whose actions are pairs of gap and nonterminal.
    backward: P_B; "uniform" over merge orders, in closed form, or "learned".
    nonterminals, preterminals: of the grammar.
    max_length: the longest sentence in words.
    width: of the encoder's layers.
    dropout: in the encoder, in training.
    symbol_dropout: of the grammar's symbols, for the encoder, in training; see `SpanEncoder`.
    """

    def __init__(
        self,
        nonterminals: int,
        preterminals: int,
        max_length: int,
        latent: Latent = "shape",
        backward: Literal["uniform", "learned"] = "uniform",
        width: int = 128,
        dropout: float = 0.0,
        symbol_dropout: float = 0.0,
    ):
        super().__init__()
        if latent not in ("shape", "labelled"):
            raise UserError(f"latent is {latent!r}; use 'shape' or 'labelled'")
        if backward not in ("uniform", "learned"):
            raise UserError(f"policy.backward is {backward!r}; use 'uniform' or 'learned'")
        self.nonterminals = nonterminals
        self.latent = latent
        self.backward = backward
        self.encoder = SpanEncoder(
            preterminals, nonterminals, self.symbols, max_length, width, dropout, symbol_dropout
        )
        self.last_condition: ForestCondition | None = None
        self._envs: dict[tuple[int, str], ForestEnv] = {}

    @property
    def labelled(self) -> bool:
        return self.latent == "labelled"

    @property
    def symbols(self) -> int:
        """Labels that an action may choose."""
        return self.nonterminals if self.labelled else 1

    # Whether logits depend on the grammar's messages, which then have to be kept on the way.
    reads_messages = True
    # Whether `scores` gives ScoresAtOnce, which run along a rollout without gradients.
    scores_at_once = False

    @abstractmethod
    def scores(self, condition: ForestCondition, forest: Forest) -> ActionScores:
        """Start scoring the actions of a rollout."""

    def check(self, model: LatentVariableModel) -> None:
        if not isinstance(model, GrammarModel):
            raise UserError(
                f"{type(self).__name__} builds the trees of a grammar, which "
                f"{type(model).__name__} is not: use a policy of the model's own task"
            )

    def condition(self, model: GrammarModel, x: Sentences) -> ForestCondition:
        gradients = torch.is_grad_enabled()
        with torch.set_grad_enabled(gradients and not self.labelled):
            model_potentials = model.potentials(x)
        potentials = model_potentials.detach()

        def encode() -> SpanEncoding:
            # Whoever asks first, sampling without gradients perhaps, asks for all.
            with torch.set_grad_enabled(gradients):
                return self.encoder(potentials.preterminal, x.lengths)

        self.last_condition = ForestCondition(model, x, model_potentials, potentials, encode)
        return self.last_condition

    def estimators(self) -> tuple[ForestEstimator, ForestEstimator]:
        return ForestEstimator(self, is_backward=False), ForestEstimator(self, is_backward=True)

    def flow_parameters(self) -> list[nn.Parameter]:
        return list(self.encoder.flow.parameters())

    def sample(
        self, condition: ForestCondition, samples: int, behaviour: Behaviour = ON_POLICY
    ) -> Paths:
        return self._roll(condition, samples, behaviour=behaviour)

    def retrace(self, condition: ForestCondition, z: Trees) -> Paths:
        merges = self._orders(condition, z)
        keep = torch.full_like(merges.gaps[:, 0], merges.gaps.shape[1])
        return self._roll(condition, z.start.shape[1], forced=merges, keep=keep)

    def numbers(self, z: Trees) -> Int[Tensor, "batch samples numbers"]:
        return z.numbers

    def from_numbers(
        self, condition: ForestCondition, numbers: Int[Tensor, "batch samples numbers"]
    ) -> Trees:
        return Trees.from_numbers(numbers, condition.lengths, self.labelled)

    @torch.no_grad()
    def tabulate(self, condition: ForestCondition) -> LatentTable:
        """q of a shape is the sum over all orders in which it can be made.

        Raises UserError for labelled trees and for sentences of more than `TABULATED_WORDS` words.
        """
        batch, length = condition.sentences.words.shape
        if self.labelled:
            raise UserError("latent=labelled has too many trees to list them all: use latent=shape")
        if length > TABULATED_WORDS:
            raise UserError(
                f"sentences of {length} words have too many trees to list them all: use "
                f"data.max_length={TABULATED_WORDS}"
            )
        gap = torch.arange(length - 1, device=condition.lengths.device)
        every = torch.tensor(list(permutations(range(length - 1))), device=gap.device)
        exists = gap < (condition.lengths - 1)[:, None, None]
        time = torch.where(exists, every, LATER)
        merges = Merges.of(time.flatten(0, 1), None)
        keep = torch.full_like(merges.gaps[:, 0], length)
        paths = self._roll(condition, len(every), forced=merges, keep=keep)
        trees: Trees = paths.z
        # A short sentence's orders are those that leave the gaps that it lacks to the end.
        is_order = (exists | (every == gap)).all(-1)
        log_forward = torch.where(is_order, paths.log_forward.sum(0), -torch.inf)
        same = trees.same_shapes()
        log_q = torch.where(same, log_forward[:, None], -torch.inf).logsumexp(-1)
        is_first = same.int().argmax(-1) == torch.arange(len(every), device=gap.device)
        return LatentTable(
            torch.where(is_first, paths.log_joint, -torch.inf),
            torch.where(is_first, log_q, -torch.inf),
        )

    @torch.no_grad()
    def regrow(
        self, condition: ForestCondition, z: Trees, depth: int, temperature: float = 1.0
    ) -> tuple[Paths, Paths]:
        batch, samples = z.start.shape[:2]
        merges = self._orders(condition, z)
        # The walked and the new trajectories part at the same states: roll both out at once.
        twice = Merges(
            *(
                torch.cat([t.unflatten(0, (batch, samples))] * 2, 1).flatten(0, 1)
                for t in (merges.gaps, merges.labels, merges.time)
            )
        )
        length = condition.lengths[:, None].expand(-1, samples)
        parting = (length - 1 - depth).clamp(min=0)
        keep = torch.cat([length, parting], 1).flatten()
        paths = self._roll(
            condition,
            2 * samples,
            forced=twice,
            keep=keep,
            score_from=torch.cat([parting, parting], 1).flatten(),
            temperature=temperature,
            behaviour=Behaviour(temperature),
        )
        first = torch.arange(samples, device=keep.device).expand(batch, -1)
        return _select(paths, first), _select(paths, first + samples)

    def _roll(
        self,
        condition: ForestCondition,
        samples: int,
        behaviour: Behaviour = ON_POLICY,
        forced: Merges | None = None,
        keep: Int[Tensor, "rows"] | None = None,
        score_from: Int[Tensor, "rows"] | None = None,
        temperature: float = 1.0,
    ) -> Paths:
        """Build trees step by step.

        forced, keep: the first `keep` merges of each row are these.
        score_from: steps before it get log P_F and log P_B of 0 and their actions, which must be
            forced, are not scored.
        temperature: of the policy whose log P_F is returned.
        """
        forest = Forest(condition.potentials, samples, self.labelled, self.reads_messages)
        gradients = torch.is_grad_enabled()
        at_once = gradients and self.scores_at_once
        with torch.set_grad_enabled(gradients and not at_once):
            scores = self.scores(condition, forest)
        everything_given = keep is not None and bool((keep >= forest.lengths - 1).all())
        gaps, labels, log_forward = [], [], []
        for step in range(forest.steps):
            with torch.set_grad_enabled(gradients and not at_once):
                if at_once and everything_given:
                    assert forced is not None
                    gap, label, log_p = forced.gaps[:, step], forced.labels[:, step], None
                else:
                    action, log_p = self._act(
                        scores, behaviour, step, forced, keep, score_from, temperature
                    )
                    gap, label = action // self.symbols, action % self.symbols
                before, after = forest.merge(gap, label if self.labelled else None)
                scores.merged(gap, label, before, after)
            gaps.append(gap)
            labels.append(label)
            log_forward.append(log_p)
        merges = Merges(torch.stack(gaps, 1), torch.stack(labels, 1), forest.time[:, :-1])
        if at_once:
            assert isinstance(scores, ScoresAtOnce)
            forward = scores.log_forward(merges)
        else:
            forward = torch.stack(log_forward)
        return self._paths(condition, forest.trees(), merges, forward, score_from)

    def _paths(
        self,
        condition: ForestCondition,
        trees: Trees,
        merges: Merges,
        forward: Float[Tensor, "steps rows"],
        score_from: Int[Tensor, "rows"] | None = None,
    ) -> Paths:
        """All there is to say of trajectories whose log P_F is known."""
        model_log_joint = condition.model.log_joint_given(condition.model_potentials, trees)
        log_joint = model_log_joint.detach()
        samples = trees.start.shape[1]
        backward = self._log_backward(condition, trees, merges)
        if score_from is not None:
            steps = torch.arange(len(backward), device=backward.device)
            backward = backward.masked_fill(steps[:, None] < score_from, 0.0)
        exit_step = torch.zeros_like(forward[:1])

        def by_step(x: Tensor) -> Tensor:
            return torch.cat([x, exit_step.to(x.dtype)]).unflatten(1, (-1, samples))

        return Paths(
            z=trees,
            log_joint=log_joint,
            log_forward=by_step(forward),
            log_backward=by_step(backward),
            flows=lambda: self._flows(condition, trees, merges, log_joint),
            record=merges,
            model_log_joint=model_log_joint if model_log_joint.requires_grad else None,
        )

    def _act(
        self,
        scores: ActionScores,
        behaviour: Behaviour,
        step: int = 0,
        forced: Merges | None = None,
        keep: Int[Tensor, "rows"] | None = None,
        score_from: Int[Tensor, "rows"] | None = None,
        temperature: float = 1.0,
    ) -> tuple[Int[Tensor, "rows"], Float[Tensor, "rows"]]:
        """The actions of one step, flat, and their log P_F; the other arguments are `_roll`'s."""
        forest = scores.forest
        is_open = forest.open
        rows = None
        if score_from is not None:
            rows = ((step >= score_from) & ~is_open[:, forest.exit]).nonzero().squeeze(1)
        action = torch.full_like(forest.rows, forest.exit * self.symbols)
        if forced is not None and keep is not None:
            given = forced.gaps[:, step] * self.symbols + forced.labels[:, step]
            action = torch.where(step < keep, given, action)
        log_p = scores.condition.potentials.log_scale.new_zeros(len(action))
        if rows is not None and len(rows) == 0:
            return action, log_p
        here = slice(None) if rows is None else rows
        logits = _mask(scores.logits(rows), is_open[here], forest.exit).flatten(1)
        drawn = sample_categorical(behaviour.probabilities(logits.detach()))
        if keep is not None:
            drawn = torch.where((step < keep)[here], action[here], drawn)
        log_all = (logits / temperature).log_softmax(-1)
        scored = log_all.gather(1, drawn[:, None]).squeeze(1)
        if rows is None:
            return drawn, scored
        return action.index_put((rows,), drawn), log_p.index_put((rows,), scored)

    def _orders(self, condition: ForestCondition, z: Trees) -> Merges:
        """Merge orders of given trees, drawn from P_B."""
        trees = _flat(z)
        draw = self._learned_order if self.backward == "learned" else _uniform_order
        with torch.no_grad():
            rank = draw(condition, trees, z.start.shape[1])
        exists = trees.exists.squeeze(1)
        time = torch.where(exists, rank, LATER)
        labels = trees.labels.squeeze(1) if trees.labels is not None and self.labelled else None
        return Merges.of(time, labels)

    def _learned_order(
        self, condition: ForestCondition, trees: Trees, samples: int
    ) -> Int[Tensor, "rows gaps"]:
        """Undo merges one by one, each root with the probability that the learned P_B gives it."""
        start, end = trees.start.squeeze(1), trees.end.squeeze(1)
        logit = self.backward_logit(condition, start, end, samples)
        rows = torch.arange(len(start), device=start.device)
        remaining = trees.exists.squeeze(1)
        count = remaining.sum(-1)
        rank = torch.full_like(start, LATER)
        for _ in range(start.shape[1]):
            done = count == 0
            # A root lies inside no other remaining node.
            time = torch.where(remaining, 0, LATER)
            is_root = remaining & (parents_time(start, end, time, trees.lengths) == LATER)
            weights = torch.where(is_root, logit, -torch.inf)
            weights[done, 0] = 0.0
            gap = sample_categorical(weights.softmax(-1))
            count = count - 1
            rank[rows, gap] = torch.where(done, rank[rows, gap], count)
            remaining[rows, gap] = remaining[rows, gap] & done
            count = count.clamp(min=0)
        return rank

    def backward_logit(
        self, condition: ForestCondition, start: Tensor, end: Tensor, samples: int
    ) -> Float[Tensor, "rows gaps"]:
        """P_B's logits of undoing each node; log size alone makes merge orders uniform."""
        size = (end - start - 1).clamp(min=1).to(condition.potentials.root.dtype)
        if self.backward == "uniform":
            return size.log()
        encoding = condition.encoding
        sentence = _sentence(condition, samples)[:, None]
        return size.log() + encoding.backward[sentence, encoding.index[start, end]]

    def _log_backward(
        self, condition: ForestCondition, trees: Trees, merges: Merges
    ) -> Float[Tensor, "steps rows"]:
        rows = _flat(trees)
        start, end = rows.start.squeeze(1), rows.end.squeeze(1)
        steps = torch.arange(start.shape[1], device=start.device)
        made = steps < (rows.lengths - 1)[:, None]
        at = merges.gaps.clamp(max=start.shape[1] - 1)
        if self.backward == "uniform":
            size = (end - start - 1).gather(1, at).clamp(min=1)
            log_p = (size / (steps + 1)).log().to(condition.potentials.root.dtype)
        else:
            logit = self.backward_logit(condition, start, end, trees.start.shape[1])
            parent = parents_time(start, end, merges.time, rows.lengths)
            after = steps[:, None]
            is_root = (merges.time[:, None] <= after) & (parent[:, None] > after)
            is_root &= rows.exists
            total = torch.where(is_root, logit[:, None], -torch.inf)
            total = torch.where(made[..., None], total, 0.0).logsumexp(-1)
            log_p = logit.gather(1, at) - total
        return torch.where(made, log_p, 0.0).t()

    def _flows(
        self,
        condition: ForestCondition,
        trees: Trees,
        merges: Merges,
        log_joint: Float[Tensor, "batch samples"],
    ) -> tuple[Float[Tensor, "steps rows"], Float[Tensor, "steps rows"]]:
        """Learned log flow and partial log p of the states before each step, the exit's too.

        Both are sums over the roots of a state. The complete state's are 0 and log p(x, z).
        """
        rows = _flat(trees)
        start, end = rows.start.squeeze(1), rows.end.squeeze(1)
        samples = trees.start.shape[1]
        sentence = _sentence(condition, samples)
        encoding = condition.encoding
        made, merged = lifetimes(trees, merges.time)
        label = torch.zeros_like(start) if rows.labels is None else rows.labels.squeeze(1)
        spans = encoding.index[start, end]
        flow = torch.cat(
            [
                encoding.word_flow[sentence],
                encoding.flow[sentence[:, None], spans, label.clamp(min=0)],
            ],
            1,
        )
        node_scores, _ = condition.model.inside_scores(condition.potentials, trees)
        partial = torch.cat([condition.potentials.log_word[sentence], node_scores.flatten(0, 1)], 1)
        step = torch.arange(start.shape[1] + 1, device=start.device)[:, None, None]
        is_root = (made < step) & (merged >= step)
        complete = step.squeeze(-1) >= rows.lengths - 1
        learned = torch.where(is_root, flow, 0.0).sum(-1)
        fixed = torch.where(is_root, partial, 0.0).sum(-1)
        return (
            torch.where(complete, 0.0, learned),
            torch.where(complete, log_joint.flatten(), fixed),
        )

    def trajectories(self, condition: ForestCondition, paths: Paths) -> ScoredTrajectories:
        merges: Merges = paths.record
        rows = _flat(paths.z)
        length = condition.sentences.words.shape[1]
        env = self._env(length, merges.gaps.device)
        lengths = rows.lengths
        label = torch.zeros_like(rows.start) if rows.labels is None else rows.labels
        fields = torch.stack([rows.start, rows.end, label], -1).squeeze(1)
        step = torch.arange(length + 1, device=lengths.device)[:, None, None]
        made = merges.time < step
        states = torch.where(made[..., None], fields, -1).flatten(-2)
        sink = step.squeeze(-1) >= lengths
        states = torch.where(sink[..., None], env.sf, states)
        action = (merges.gaps * env.symbols + merges.labels).t()
        action = torch.cat([action, torch.full_like(action[:1], env.n_actions - 1)])
        step = step[:-1].squeeze(-1)
        action = torch.where(step == lengths - 1, env.n_actions - 1, action)
        action = torch.where(step > lengths - 1, -1, action)
        sentence = _sentence(condition, paths.z.start.shape[1])
        conditions = torch.stack([sentence, lengths], -1).to(torch.get_default_dtype())
        return ScoredTrajectories(
            env=env,
            states=env.States(states, conditions=conditions.expand(length + 1, -1, -1)),
            actions=env.actions_from_tensor(action[..., None]),
            terminating_idx=lengths,
            log_rewards=paths.log_joint.flatten(),
            log_probs=paths.log_forward.flatten(1),
            log_pb=paths.log_backward.flatten(1),
            flows=paths.flows,
        )

    def _env(self, length: int, device: torch.device) -> ForestEnv:
        key = (length, str(device))
        if key not in self._envs:
            self._envs[key] = ForestEnv(length, self.symbols, device)
        return self._envs[key]


def _mask(logits: Tensor, legal: Tensor, exit_slot: int) -> Tensor:
    """-inf for what is illegal; a complete tree's exit has label 0 and is certain."""
    logits = logits.masked_fill(~legal[..., None], -torch.inf)
    certain = torch.full_like(logits[:, exit_slot], -torch.inf)
    certain[:, 0] = torch.where(legal[:, exit_slot], 0.0, -torch.inf)
    return torch.cat([logits[:, :exit_slot], certain[:, None]], 1)


def lifetimes(
    trees: Trees, time: Int[Tensor, "rows gaps"]
) -> tuple[Int[Tensor, "rows items"], Int[Tensor, "rows items"]]:
    """The steps that make each word and node a root, -1 for words, and that merge it into another.

    Words come first. An item is a root before step s when made < s <= merged; one that the
    sentence does not have is never made.
    """
    rows = _flat(trees)
    start, end = rows.start.squeeze(1), rows.end.squeeze(1)
    word = torch.arange(start.shape[1] + 1, device=start.device).expand(len(start), -1)
    made = torch.where(word < rows.lengths[:, None], -1, LATER)
    merged = parents_time(
        torch.cat([word, start], 1), torch.cat([word + 1, end], 1), time, rows.lengths
    )
    return torch.cat([made, time], 1), merged


def _flat(trees: Trees) -> Trees:
    """Every tree as one sample of a sentence of its own."""
    samples = trees.start.shape[1]
    return Trees(
        trees.start.flatten(0, 1)[:, None],
        trees.end.flatten(0, 1)[:, None],
        trees.lengths.repeat_interleave(samples),
        None if trees.labels is None else trees.labels.flatten(0, 1)[:, None],
    )


def _sentence(condition: ForestCondition, samples: int) -> Int[Tensor, "rows"]:
    batch = torch.arange(len(condition.lengths), device=condition.lengths.device)
    return batch.repeat_interleave(samples)


def _select(paths: Paths, chosen: Int[Tensor, "batch chosen"]) -> Paths:
    """Some of each data point's trajectories, for their ends and scores alone."""
    steps = chosen.expand(len(paths.log_forward), -1, -1)
    return Paths(
        z=paths.z.select(chosen),
        log_joint=paths.log_joint.gather(1, chosen),
        log_forward=paths.log_forward.gather(2, steps),
        log_backward=paths.log_backward.gather(2, steps),
        flows=paths.flows,
        record=None,
    )


def _uniform_order(
    condition: ForestCondition, trees: Trees, samples: int
) -> Int[Tensor, "rows gaps"]:
    """Uniformly random merge orders.

    Give every node a time, uniform in [0, 1] and later than all below it: a node over s nodes has
    the largest of s uniform numbers below its parent's time, which is that time * U^(1/s).
    """
    start, end = trees.start, trees.end
    above = (start.transpose(1, 2) >= start) & (end.transpose(1, 2) <= end)
    above &= trees.exists & trees.exists.transpose(1, 2)
    uniform = torch.rand(start.squeeze(1).shape, dtype=torch.float64, device=start.device)
    log_factor = uniform.log() / trees.sizes.squeeze(1).clamp(min=1)
    log_time = (above.to(torch.float64) @ log_factor[..., None]).squeeze(-1)
    log_time = torch.where(trees.exists.squeeze(1), log_time, torch.inf)
    return log_time.argsort(-1).argsort(-1)
