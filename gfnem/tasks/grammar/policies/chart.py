"""A policy that draws labelled trees top-down from a chart.

First the root's label is drawn, then every open span of at least two words is split: with label A
and context P, into (k, B, C) with logit

    log p(A -> B C | A, P) + b(i, k, B | A) + b(k, j, C | A),

b being the logarithm of the guide's inside scores plus what the encoder says of the span, under its
own label and under that and its parent's. Words are exact. With the exact inside scores as guide
and an encoder that says nothing, the policy is the posterior. A context-free grammar has one
context.

Spans are split from the widest to the narrowest, those of one width from left to right, so there is
one trajectory to each labelled tree: P_B = 1 and q(z | x) is P_F. To a shape there are as many as
labellings: the last choice forgets the labels, and has P_B = p(labels | shape, x), exactly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from gfn.containers import Trajectories
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.categorical import sample_categorical
from gfnem.errors import UserError
from gfnem.gflownet.paths import Paths
from gfnem.gflownet.policy import ON_POLICY, Behaviour, NumberedPolicy
from gfnem.gflownet.trajectories import trajectories_of_choices
from gfnem.model import LatentVariableModel
from gfnem.tasks.grammar.inference.labelled import labels_above, root_score, rule_scores
from gfnem.tasks.grammar.model import GrammarModel, check_latent
from gfnem.tasks.grammar.policies.chart_env import ChartEnv, ChartEstimator
from gfnem.tasks.grammar.policies.choices import Choices
from gfnem.tasks.grammar.policies.encoder import SpanEncoder, SpanEncoding
from gfnem.tasks.grammar.policies.guide import Guide, cluster_parents, exact, relaxed, unguided
from gfnem.tasks.grammar.policies.splits import ChartCondition, Spans, finite_log
from gfnem.tasks.grammar.rules.grammar import Grammar, Potentials
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.tree import Trees

# How fast old samples are forgotten in the counts of parents.
DECAY = 0.95
# How many clusters of parents a relaxation tells apart, and after how many batches they are sought
# anew.
CLUSTERS, CLUSTERING = 8, 50


class ChartPolicy(NumberedPolicy):
    """See the module's description.

    nonterminals, preterminals: of the grammar.
    max_length: the longest sentence in words.
    latent: "shape" or "labelled".
    guide: "exact", the grammar's own inside scores; or "relaxation", those of a grammar with rules
        averaged over clusters of parents, as often as the last samples had them; spans of two words
        are exact under their parent. A grammar that is above-free is its own relaxation. Or
        "none": the rules and the encoder are on their own.
    clusters: of parents that the relaxation tells apart; one makes it above-free, and each costs
        about as much as one parent does in exact scores, which tell all apart. None: 8, or as many
        as there are parents, and one where rules are of low rank, whose exact scores cost less.
    width: of the encoder's layers.
    dropout: in the encoder, in training.
    symbol_dropout: of the grammar's symbols, for the encoder, in training; see `SpanEncoder`.
    """

    usage: Tensor
    parents: Tensor
    clustering_age: Tensor

    def __init__(
        self,
        nonterminals: int,
        preterminals: int,
        max_length: int,
        latent: Literal["shape", "labelled"] = "shape",
        guide: Literal["relaxation", "exact", "none"] = "relaxation",
        clusters: int | None = None,
        width: int = 128,
        dropout: float = 0.0,
        symbol_dropout: float = 0.0,
    ):
        super().__init__()
        check_latent(latent)
        if guide not in ("relaxation", "exact", "none"):
            raise UserError(f"policy.guide is {guide!r}; use 'relaxation', 'exact' or 'none'")
        if clusters is not None:
            if not 1 <= clusters <= nonterminals + 1:
                raise UserError(
                    f"policy.clusters is {clusters}; it must be from 1 to {nonterminals + 1}, "
                    "the number of parents"
                )
            if guide != "relaxation":
                raise UserError(f"policy.clusters={clusters} has no effect on policy.guide={guide}")
        self.nonterminals = nonterminals
        self.choices = Choices(nonterminals)
        self.latent = latent
        self.guide = guide
        self.clusters = clusters
        self.register_buffer("usage", torch.zeros(nonterminals, nonterminals + 1))
        # The cluster of each parent, and how many batches ago they were sought; -1 for never.
        self.register_buffer("parents", torch.zeros(nonterminals + 1, dtype=torch.long))
        self.register_buffer("clustering_age", torch.full((), -1))
        self.encoder = SpanEncoder(
            preterminals,
            nonterminals * (nonterminals + 2),
            nonterminals,
            max_length,
            width,
            dropout,
            symbol_dropout,
        )
        self._envs: dict[tuple[int, str], ChartEnv] = {}

    def check(self, model: LatentVariableModel) -> None:
        if not isinstance(model, GrammarModel):
            raise UserError(
                f"{type(self).__name__} reads the rules of a grammar, of which "
                f"{type(model).__name__} has none: use another policy"
            )
        if self.clusters is not None and model.context_free:
            raise UserError(
                f"policy.clusters={self.clusters}: rules of {type(model).__name__} see no parent; "
                "use policy.clusters=null"
            )
        if self.guide == "exact" and not model.tractable:
            raise UserError(
                f"policy.guide=exact: this {type(model).__name__} is too large for it"
                f"{model.tractable_sizes}; make it smaller or use policy.guide=relaxation"
            )

    def condition(self, model: GrammarModel, x: Sentences) -> ChartCondition:
        gradients = torch.is_grad_enabled()
        grammar = model.grammar()
        with torch.set_grad_enabled(gradients and self.latent == "shape"):
            model_potentials = grammar.potentials(x.words, x.lengths)
        potentials = model_potentials.detach()
        with torch.no_grad():
            guide = self._guide(grammar, potentials)

        def encode() -> SpanEncoding:
            # Whoever asks first, sampling without gradients perhaps, asks for all.
            with torch.set_grad_enabled(gradients):
                return self.encoder(potentials.preterminal, x.lengths)

        return ChartCondition(x, model, grammar, model_potentials, potentials, guide, encode)

    def _guide(self, grammar: Grammar, potentials: Potentials) -> Guide:
        if self.guide == "none":
            return unguided(potentials)
        if self.guide == "exact" or potentials.contexts.total == 1:
            return exact(potentials)
        count = self.clusters
        if count is None:
            count = min(CLUSTERS, self.nonterminals + 1) if grammar.rank is None else 1
        age = int(self.clustering_age)
        if count > 1 and (age < 0 or (self.training and age >= CLUSTERING)):
            self.parents.copy_(cluster_parents(grammar, self.usage, count))
            self.clustering_age.zero_()
        return relaxed(potentials, self.usage, self.parents)

    def sample(
        self, condition: ChartCondition, samples: int, behaviour: Behaviour = ON_POLICY
    ) -> Paths:
        trees = self._roll(condition, samples, behaviour)
        if self.training:
            self._count(trees)
        paths = self._paths(condition, trees)
        return replace(paths, model_log_joint=condition.model_log_joint(paths))

    def numbers(self, z: Trees) -> Int[Tensor, "batch samples numbers"]:
        return z.numbers

    def from_numbers(
        self, condition: ChartCondition, numbers: Int[Tensor, "batch samples numbers"]
    ) -> Trees:
        return Trees.from_numbers(numbers, condition.lengths, self.latent == "labelled")

    def retrace(self, condition: ChartCondition, z: Trees) -> Paths:
        return self._paths(condition, condition.labelled(z))

    @torch.no_grad()
    def regrow(
        self, condition: ChartCondition, z: Trees, depth: int, temperature: float = 1.0
    ) -> tuple[Paths, Paths]:
        trees = condition.labelled(z)
        keep = (condition.lengths - depth).clamp(min=0)
        new = self._roll(
            condition, z.start.shape[1], Behaviour(temperature), forced=trees, keep=keep
        )
        old, grown = (self._paths(condition, one, temperature, keep) for one in (trees, new))
        return old, grown

    @torch.no_grad()
    def _roll(
        self,
        condition: ChartCondition,
        samples: int,
        behaviour: Behaviour,
        forced: Trees | None = None,
        keep: Int[Tensor, "batch"] | None = None,
    ) -> Trees:
        """Labelled trees. forced, keep: the first `keep` choices are those of these trees."""
        batch, length = condition.sentences.words.shape
        lengths = condition.lengths
        sentence = torch.arange(batch, device=lengths.device).repeat_interleave(samples)
        row = torch.arange(len(sentence), device=lengths.device)
        logits = condition.root_logits().detach()[sentence]
        label = sample_categorical(behaviour.probabilities(logits))
        # Given choices by row, start and width of the span; -1 where there is none.
        given = label.new_full((len(row), length, length + 1), -1)
        if forced is not None and keep is not None:
            choices, order = self.choices.of(forced)
            label = torch.where(keep[sentence] > 0, choices[:, 0], label)
            kept = torch.arange(1, length, device=row.device) < keep[sentence, None]
            start, end = (
                field.flatten(0, 1).gather(1, order) for field in (forced.start, forced.end)
            )
            chosen = torch.where(kept & (end > 0), choices[:, 1:], -1)
            given[row[:, None], start, end - start] = chosen
        widths = lengths.new_zeros(len(row), length)
        labels, above = torch.zeros_like(widths), torch.zeros_like(widths)
        widths[:, 0], labels[:, 0], above[:, 0] = lengths[sentence], label, self.nonterminals
        node_start = lengths.new_zeros(len(row), length - 1)
        node_end, node_label = torch.zeros_like(node_start), torch.full_like(node_start, -1)
        for width in range(length, 1, -1):
            tree, start = (widths == width).nonzero(as_tuple=True)
            if len(tree) == 0:
                continue
            own = labels[tree, start]
            spans = Spans(
                sentence[tree], start, torch.full_like(start, width), own, above[tree, start]
            )
            choice = given[tree, start, width]
            if width > 2:
                choice = torch.where(choice < 0, self._choose(condition, spans, behaviour), choice)
            split, left, right = self.choices.decoded(choice.clamp(min=0))
            middle = start + split
            node_start[tree, middle - 1], node_end[tree, middle - 1] = start, start + width
            node_label[tree, middle - 1] = own
            widths[tree, start], widths[tree, middle] = split, width - split
            labels[tree, start], labels[tree, middle] = left, right
            above[tree, start] = above[tree, middle] = own
        shape = (batch, samples, length - 1)
        return Trees(node_start.view(shape), node_end.view(shape), lengths, node_label.view(shape))

    def _choose(
        self, condition: ChartCondition, spans: Spans, behaviour: Behaviour
    ) -> Int[Tensor, "spans"]:
        splits = condition.splits(spans)
        if not behaviour.on_policy:
            return sample_categorical(behaviour.probabilities(splits.joint(spans.width).log()))
        option = sample_categorical(splits.first(spans.width).flatten(1))
        split, first = option // self.nonterminals, option % self.nonterminals
        word_left, word_right = split == 0, split == spans.width - 2
        left = torch.where(word_left, 0, first)
        right = torch.where(word_left, first, 0)
        inner = (~word_left & ~word_right).nonzero().squeeze(-1)
        weights = splits.rules[inner, first[inner]] * splits.right[inner, split[inner]]
        right[inner] = sample_categorical(weights)
        return self.choices.coded(split + 1, left, right)

    def _paths(
        self,
        condition: ChartCondition,
        trees: Trees,
        temperature: float = 1.0,
        score_from: Int[Tensor, "batch"] | None = None,
    ) -> Paths:
        """All there is to say of trajectories to labelled trees.

        temperature: of the policy whose log P_F is returned.
        score_from: choices before it get log P_F of 0.
        """
        batch, samples, _ = trees.start.shape
        choices, order = self.choices.of(trees)
        above = labels_above(trees, self.nonterminals)
        forward = self._log_forward(condition, trees, above, choices, order, temperature)
        if score_from is not None:
            step = torch.arange(len(forward), device=forward.device)[:, None]
            forward = forward.masked_fill(step < score_from.repeat_interleave(samples), 0.0)
        with torch.no_grad():
            rules = rule_scores(condition.potentials, trees)
            fixed = root_score(condition.potentials, trees)
            fixed = fixed + condition.potentials.total_log_scale[:, None]
            labelled = fixed + rules.sum(-1)
        z = trees if self.latent == "labelled" else trees.shapes()
        log_grammar = labelled if z.labels is not None else condition.log_grammar(z)
        model_log_joint = log_grammar + condition.model.log_prior_weight(z)
        log_joint = model_log_joint.detach()
        leave = torch.zeros_like(forward[:1])
        # The last choice of each sentence forgets the labels.
        step = torch.arange(len(forward) + 1, device=forward.device)
        last = step[:, None] == condition.lengths - 1
        backward = torch.where(last[..., None], labelled - log_grammar.detach(), 0.0)
        return Paths(
            z=z,
            log_joint=log_joint,
            log_forward=torch.cat([forward, leave]).unflatten(1, (batch, samples)),
            log_backward=backward,
            exits=condition.lengths,
            flows=lambda: self._flows(condition, trees, above, order, rules, fixed, log_joint),
            record=choices,
            model_log_joint=model_log_joint if model_log_joint.requires_grad else None,
        )

    def _log_forward(
        self,
        condition: ChartCondition,
        trees: Trees,
        above: Int[Tensor, "batch samples nodes"],
        choices: Int[Tensor, "rows steps"],
        order: Int[Tensor, "rows nodes"],
        temperature: float,
    ) -> Float[Tensor, "steps rows"]:
        """log P_F of each choice, differentiable; 0 where there is nothing to choose."""
        assert trees.labels is not None
        batch, samples, nodes = trees.start.shape
        sentence = torch.arange(batch, device=order.device).repeat_interleave(samples)
        root = (condition.root_logits() / temperature).log_softmax(-1)[sentence]
        root = root.gather(1, choices[:, :1]).squeeze(1)
        forward = root.new_zeros(len(sentence), nodes)
        start, end, label, above = (
            field.flatten(0, 1).gather(1, order)
            for field in (trees.start, trees.end, trees.labels, above)
        )
        row, step = (end - start > 2).nonzero(as_tuple=True)
        if len(row):
            at = row, step
            spans = Spans(sentence[row], start[at], (end - start)[at], label[at], above[at])
            choice = self.choices.decoded(choices[row, step + 1])
            log_p = condition.splits(spans).log_choice(spans.width, *choice, temperature)
            forward = forward.index_put(at, log_p)
        return torch.cat([root[None], forward.t()])

    def _flows(
        self,
        condition: ChartCondition,
        trees: Trees,
        above: Int[Tensor, "batch samples nodes"],
        order: Int[Tensor, "rows nodes"],
        rules: Float[Tensor, "batch samples nodes"],
        fixed: Float[Tensor, "batch samples"],
        log_joint: Float[Tensor, "batch samples"],
    ) -> tuple[Float[Tensor, "steps rows"], Float[Tensor, "steps rows"]]:
        """Learned log flow of the state before each action, and what it has fixed of log p(x, z).

        Of a state's open spans each has the guide's inside score and a learned correction; the
        rules of those that are split are fixed, since their parents are known. The scales of the
        words are fixed from the start.
        """
        assert trees.labels is not None
        batch, samples, nodes = trees.start.shape
        encoding, scales = condition.encoding, condition.guide.scales
        sentence = torch.arange(batch, device=order.device)[:, None, None]
        label = trees.labels.clamp(min=0)
        width = (trees.end - trees.start).clamp(min=0)
        span = encoding.index[trees.start, trees.end]
        seen = condition.seen(above)
        guide = condition.guide.scores(sentence, trees.start, width, seen)
        guide = finite_log(guide.gather(-1, label[..., None]).squeeze(-1))
        guide = guide + scales.by_start[trees.start, sentence, width]
        guide = guide + encoding.flow[sentence, span, label]
        guide = torch.where(trees.exists, guide, 0.0).flatten(0, 1)
        # A node is open from the step behind its parent's to its own.
        rank = order.argsort(-1).view_as(trees.start)
        made = torch.full_like(rank, -1)
        for child in trees.children():
            # One place more takes what is written for words.
            child = torch.where(child >= 0, child, nodes)
            made = torch.cat([made, made[..., :1]], -1).scatter(-1, child, rank)[..., :nodes]
        rank, made = rank.flatten(0, 1), made.flatten(0, 1)
        step = torch.arange(nodes + 1, device=rank.device)[:, None, None]
        learned = torch.where((made < step) & (step <= rank), guide, 0.0).sum(-1)
        split = torch.where(step > rank, rules.flatten(0, 1), 0.0).sum(-1)
        whole = encoding.index[torch.zeros_like(condition.lengths), condition.lengths]
        log_z = finite_log(condition.potentials.root * condition.guide.whole(condition.lengths))
        log_z = (log_z + encoding.flow[sentence[:, 0, 0], whole]).logsumexp(-1)
        log_z = log_z + scales.whole(condition.lengths)
        log_z, words = (
            value.repeat_interleave(samples)[None]
            for value in (log_z, condition.potentials.total_log_scale)
        )
        partial = torch.cat([words, split + fixed.flatten()])
        made = torch.arange(len(partial), device=rank.device)[:, None]
        complete = made >= condition.lengths.repeat_interleave(samples)
        return torch.cat([log_z, learned]), torch.where(complete, log_joint.flatten(), partial)

    @torch.no_grad()
    def _count(self, trees: Trees) -> None:
        """Remember under which parents labels were."""
        assert trees.labels is not None
        pairs = trees.labels * (self.nonterminals + 1) + labels_above(trees, self.nonterminals)
        counts = torch.bincount(pairs[trees.exists], minlength=self.usage.numel())
        counts = counts.view_as(self.usage)
        self.usage.mul_(DECAY).add_(counts)
        self.clustering_age += 1

    def trajectories(self, condition: ChartCondition, paths: Paths) -> Trajectories:
        choices = paths.record
        env = self._env(choices.shape[1], choices.device)
        return trajectories_of_choices(env, choices, choices.t(), paths, counted=True)

    def _env(self, steps: int, device: torch.device) -> ChartEnv:
        key = steps, str(device)
        if key not in self._envs:
            choices = max(steps - 1, 1) * self.nonterminals**2
            self._envs[key] = ChartEnv(steps, choices, device)
        return self._envs[key]

    def estimators(self, condition: ChartCondition) -> tuple[ChartEstimator, ChartEstimator]:
        return ChartEstimator(self, condition, False), ChartEstimator(self, condition, True)

    def flow_parameters(self) -> list[nn.Parameter]:
        return list(self.encoder.flow.parameters())
