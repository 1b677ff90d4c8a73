"""Policies over forests: which two neighbouring roots to merge next, and under which label."""

from __future__ import annotations

from abc import abstractmethod
from itertools import permutations
from typing import Literal

import torch
from gfn.containers import Trajectories
from gfn.states import DiscreteStates
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.categorical import sample_categorical
from gfnem.errors import UserError
from gfnem.gflownet.estimator import PolicyEstimator
from gfnem.gflownet.paths import Paths
from gfnem.gflownet.policy import ON_POLICY, Behaviour, NumberedPolicy
from gfnem.gflownet.trajectories import make_trajectories
from gfnem.latents import LatentTable
from gfnem.model import LatentVariableModel
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.policies.encoder import SpanEncoder, SpanEncoding
from gfnem.tasks.grammar.policies.env import LATER, Forest, ForestEnv
from gfnem.tasks.grammar.policies.merges import (
    ActionScores,
    ForestCondition,
    Merges,
    ScoresAtOnce,
    flat,
    lifetimes,
    select_paths,
    sentence_of,
)
from gfnem.tasks.grammar.policies.orders import MergeOrders
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.tree import Trees

Latent = Literal["shape", "labelled"]

# Longer sentences have too many merge orders to try them all.
TABULATED_WORDS = 6


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
        self.orders = MergeOrders(backward == "learned")
        self.encoder = SpanEncoder(
            preterminals, nonterminals, self.symbols, max_length, width, dropout, symbol_dropout
        )
        self._envs: dict[tuple[int, str], ForestEnv] = {}

    @property
    def labelled(self) -> bool:
        return self.latent == "labelled"

    @property
    def symbols(self) -> int:
        """Labels that an action may choose."""
        return self.nonterminals if self.labelled else 1

    @property
    def least_depth(self) -> int:
        """A shape's last merge has but one gap to be made in."""
        return 1 if self.labelled else 2

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

        return ForestCondition(model, x, model_potentials, potentials, encode)

    def estimators(self, condition: ForestCondition) -> tuple[ForestEstimator, ForestEstimator]:
        return ForestEstimator(self, condition, False), ForestEstimator(self, condition, True)

    def flow_parameters(self) -> list[nn.Parameter]:
        return list(self.encoder.flow.parameters())

    def sample(
        self, condition: ForestCondition, samples: int, behaviour: Behaviour = ON_POLICY
    ) -> Paths:
        return self._roll(condition, samples, behaviour=behaviour)

    def retrace(self, condition: ForestCondition, z: Trees) -> Paths:
        merges = self.orders.draw(condition, z if self.labelled else z.shapes())
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
        merges = self.orders.draw(condition, z if self.labelled else z.shapes())
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
        return select_paths(paths, first), select_paths(paths, first + samples)

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
        backward = self.orders.log_backward(condition, trees, merges)
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
            exits=condition.lengths - 1,
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
        rows = flat(trees)
        start, end = rows.start.squeeze(1), rows.end.squeeze(1)
        samples = trees.start.shape[1]
        sentence = sentence_of(condition, samples)
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

    def trajectories(self, condition: ForestCondition, paths: Paths) -> Trajectories:
        merges: Merges = paths.record
        rows = flat(paths.z)
        length = condition.sentences.words.shape[1]
        env = self._env(length, merges.gaps.device)
        label = torch.zeros_like(rows.start) if rows.labels is None else rows.labels
        fields = torch.stack([rows.start, rows.end, label], -1).squeeze(1)
        step = torch.arange(length + 1, device=fields.device)[:, None, None]
        made = merges.time < step
        states = torch.where(made[..., None], fields, -1).flatten(-2)
        action = (merges.gaps * env.symbols + merges.labels).t()
        action = torch.cat([action, torch.zeros_like(action[:1])])
        sentence = sentence_of(condition, paths.z.start.shape[1])
        conditions = torch.stack([sentence, rows.lengths], -1)
        return make_trajectories(env, states, action, conditions, rows.lengths - 1, paths)

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


class ForestEstimator(PolicyEstimator):
    """P_F or P_B at given states of a `ForestEnv`, by rebuilding each state's forest."""

    def forward(
        self, states: DiscreteStates, conditions: Float[Tensor, "*batch 2"]
    ) -> Float[Tensor, "*batch actions"]:
        policy: ForestPolicy = self.policy
        shape = states.batch_shape
        sentence = conditions[..., 0].long().flatten()
        condition = self.condition.select(sentence)
        fields = states.tensor.reshape(len(sentence), -1, 3)
        start, end, label = fields.unbind(-1)
        made = start >= 0
        if self.is_backward:
            logit = policy.orders.logit(condition, start.clamp(min=0), end.clamp(min=2), 1)
            return logit.repeat_interleave(policy.symbols, -1).view(*shape, -1)
        forest = Forest(condition.potentials, 1, policy.labelled)
        scores = policy.scores(condition, forest)
        order = torch.where(made, end - start, LATER).argsort(dim=-1, stable=True)
        count = made.sum(-1)
        for step in range(int(count.max())):
            inside = step < count
            gap = torch.where(inside, order[:, step], forest.exit)
            chosen = label.gather(1, order[:, step : step + 1]).squeeze(1)
            chosen = torch.where(inside, chosen, 0)
            before, after = forest.merge(gap, chosen if policy.labelled else None)
            scores.merged(gap, chosen, before, after)
        logits = scores.logits(None)
        merges, exit_logit = logits[:, :-1].flatten(1), torch.zeros_like(logits[:, 0, :1])
        return torch.cat([merges, exit_logit], -1).view(*shape, -1)
