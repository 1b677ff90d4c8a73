"""The published policy: a transformer over all roots at every step (arXiv 2302.06576).

A root is embedded by its label, composed with its children's embeddings; words have embeddings of
their own. Nothing of the grammar enters but through the reward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.errors import UserError
from gfnem.gflownet.paths import Paths
from gfnem.gflownet.policy import Behaviour
from gfnem.optim import WordTable
from gfnem.precision import Precision, check_precision, in_precision
from gfnem.tasks.grammar.policies.env import Forest
from gfnem.tasks.grammar.policies.forest import ForestPolicy, Latent
from gfnem.tasks.grammar.policies.jagged import Groups, JaggedTransformer, with_round_rows
from gfnem.tasks.grammar.policies.merges import ForestCondition, Merges, ScoresAtOnce, lifetimes
from gfnem.tasks.grammar.trees.levels import Levels
from gfnem.tasks.grammar.trees.tree import Trees


class TransformerPolicy(ForestPolicy):
    """See the module's description.

    vocabulary: number of word ids.
    nonterminals, preterminals, max_length, latent, backward: as for every `ForestPolicy`. Roots
        further behind, of sentences that only are parsed, are all in the last place.
    width, layers, heads: of the transformer.
    encoder_width: of the encoder that gives log Z(x), state flows and a learned P_B.
    precision: "bfloat16" runs the transformer in autocast; log-probabilities stay in float32.
    """

    def __init__(
        self,
        vocabulary: int,
        nonterminals: int,
        preterminals: int,
        max_length: int,
        latent: Latent = "shape",
        backward: Literal["uniform", "learned"] = "uniform",
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        encoder_width: int = 128,
        precision: Precision = "float32",
    ):
        super().__init__(nonterminals, preterminals, max_length, latent, backward, encoder_width)
        for name, value, least in (("width", width, 1), ("layers", layers, 0), ("heads", heads, 1)):
            if value < least:
                raise UserError(f"policy.{name} is {value}; it must be at least {least}")
        if width % heads:
            raise UserError(f"policy.width={width} is not divisible by policy.heads={heads}")
        check_precision("policy", precision)
        self.precision: Precision = precision
        # In a tuple, so that it is no submodule.
        self._rounding: tuple[int, JaggedTransformer] | None = None
        self.word = WordTable(vocabulary, width)
        self.label = nn.Embedding(self.symbols, width)
        self.position = nn.Embedding(max_length, width)
        self.compose = nn.Sequential(
            nn.LayerNorm(3 * width), nn.Linear(3 * width, width), nn.ReLU(), nn.Linear(width, width)
        )
        self.transformer = JaggedTransformer(width, layers, heads)
        self.pair = nn.Linear(2 * width, width)
        self.merge = nn.Linear(width, 1)
        self.name = nn.Linear(width, self.symbols)
        for embedding in (self.word, self.label, self.position):
            nn.init.normal_(embedding.weight, std=width**-0.5)

    reads_messages = False
    scores_at_once = True

    def scores(self, condition: ForestCondition, forest: Forest) -> ScoresAtOnce:
        return _TransformerScores(self, condition, forest)

    def retrace(self, condition: ForestCondition, z: Trees) -> Paths:
        """No rollout: the states of given trajectories are known."""
        trees, merges = self._reordered(condition, z)
        return self._paths(condition, trees, merges, self.score(condition, trees, merges))

    @torch.no_grad()
    def regrow(
        self, condition: ForestCondition, z: Trees, depth: int, temperature: float = 1.0
    ) -> tuple[Paths, Paths]:
        old, merges = self._reordered(condition, z)
        samples = z.start.shape[1]
        parting = (condition.lengths - 1 - depth).clamp(min=0).repeat_interleave(samples)
        forest = Forest(condition.potentials, samples, self.labelled, messages=False)
        forest.begin_within(old, merges.time, parting)
        with self._weights_cast_once():
            scores = _TransformerScores(self, condition, forest)
            walked = scores.begin_within(old, merges, parting, temperature)
            regrown = torch.zeros_like(walked)
            for _ in range(min(depth, forest.steps)):
                step = forest.made.clamp(max=forest.steps - 1)
                action, log_p = self._act(scores, Behaviour(temperature), temperature=temperature)
                regrown[step, forest.rows] += log_p
                gap, label = action // self.symbols, action % self.symbols
                before, after = forest.merge(gap, label if self.labelled else None)
                scores.merged(gap, label, before, after)
        new = forest.trees()
        time = forest.time[:, :-1]
        again = Merges.of(time, forest.labels[:, :-1] if self.labelled else None)
        return (
            self._paths(condition, old, merges, walked, parting),
            self._paths(condition, new, again, regrown, parting),
        )

    def _reordered(self, condition: ForestCondition, z: Trees) -> tuple[Trees, Merges]:
        """Trees as this policy builds them, and orders to do so, drawn from P_B."""
        trees = z if self.labelled else Trees(z.start, z.end, z.lengths)
        return trees, self.orders.draw(condition, trees)

    def _roll(self, *args, **options) -> Paths:
        with self._weights_cast_once():
            return super()._roll(*args, **options)

    def score(
        self, condition: ForestCondition, trees: Trees, merges: Merges
    ) -> Float[Tensor, "steps rows"]:
        """log P_F of each merge, differentiable; 0 behind the end."""
        row, step = (merges.gaps < merges.gaps.shape[1]).nonzero(as_tuple=True)
        states = _States.of(row, _roots(trees, merges.time, row, step))
        row, step = states.row, step[states.order]
        with self._weights_cast_once():
            pair = self.pairs(self.embedded(condition, trees), states)
            chosen = states.gap == merges.gaps[row, step][states.of_pair]
            with self.autocast(True):
                merge, name = self._rows(self.merge, pair), self._rows(self.name, pair[chosen])
        # Unnormalised over the labels of a merge, log P_F is that of the merge, then of the label.
        precision = self.word.weight.dtype
        merge = merge.squeeze(1).to(precision)
        among = merge.new_full((len(row), merges.gaps.shape[1]), -torch.inf)
        total = among.index_put((states.of_pair, states.gap), merge).logsumexp(-1)
        label = merges.labels[row, step][:, None]
        named = name.to(precision).log_softmax(-1).gather(1, label).squeeze(1)
        log_p = merge[chosen] - total + named
        return log_p.new_zeros(merges.gaps.t().shape).index_put((step, row), log_p)

    def embedded(
        self, condition: ForestCondition, trees: Trees
    ) -> Float[Tensor, "rows positions width"]:
        """Embeddings of the words and all nodes of trees."""
        levels = Levels.of(trees)
        samples, slots = trees.start.shape[1], trees.start.shape[2] + 1
        words = self.word(condition.sentences.words).repeat_interleave(samples, 0)
        known = words.flatten(0, 1)
        offset = levels.row * slots
        label = torch.zeros_like(levels.row)
        if trees.labels is not None:
            label = trees.labels.flatten(0, 1)[levels.row, levels.gap]
        # Positions of the children in `known`: words first, then nodes in the order of levels.
        left = torch.where(levels.left < 0, offset + levels.gap, len(known) + levels.left)
        right = torch.where(levels.right < 0, offset + levels.gap + 1, len(known) + levels.right)
        for first, behind in levels.heights:
            nodes = slice(first, behind)
            made = self.composed(label[nodes], known[left[nodes]], known[right[nodes]])
            known = torch.cat([known, made])
        at = levels.row, slots + levels.gap
        table = torch.cat([words, torch.zeros_like(words)], 1)
        return table.index_put(at, known[words.shape[0] * slots :])

    def composed(
        self,
        label: Int[Tensor, "nodes"],
        left: Float[Tensor, "nodes width"],
        right: Float[Tensor, "nodes width"],
    ) -> Float[Tensor, "nodes width"]:
        """Embeddings of nodes over these children."""
        name = self.label(label)
        with self.autocast(True):
            made = self._rows(self.compose, torch.cat([name, left, right], -1))
        return name + made.to(name.dtype)

    def pairs(
        self, embedding: Float[Tensor, "rows positions width"], states: _States
    ) -> Float[Tensor, "pairs width"]:
        """What the transformer says of each two neighbouring roots."""
        at = states.row[states.state] * embedding.shape[1] + states.at
        place = self.position(states.place.clamp(max=self.position.num_embeddings - 1))
        tokens = nn.functional.embedding(at, embedding.flatten(0, 1)) + place
        with self.autocast(True):
            hidden = self._contextual(tokens, states.groups)
            both = torch.cat([hidden[states.left], hidden[states.left + 1]], -1)
            return self._rows(self.pair, both).relu()

    def _contextual(
        self, tokens: Float[Tensor, "tokens width"], groups: Groups
    ) -> Float[Tensor, "tokens width"]:
        """The transformer over the roots of each state, all in the policy's precision."""
        if self.precision == "float32":
            return self.transformer(tokens, groups)
        network = self.transformer if torch.is_grad_enabled() else self._rounded()
        return self._rows(lambda rows: network(rows, groups), tokens.bfloat16())

    def _rows(self, network: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        return with_round_rows(network, rows) if self.precision == "bfloat16" else network(rows)

    @torch.no_grad()
    def _rounded(self) -> nn.Module:
        """The transformer in bfloat16, rounded anew when a parameter has changed.

        Autocast would round all weights in every rollout.
        """
        device = self.word.weight.device
        version = sum(p._version for p in self.transformer.parameters())
        if self._rounding is None or self._rounding[1].norm.weight.device != device:
            rounded = copy.deepcopy(self.transformer).bfloat16()
            for layer in rounded.modules():
                if isinstance(layer, nn.Linear):
                    # In the order in memory with which products of few rows are faster.
                    layer.weight.data = layer.weight.data.t().contiguous().t()
            self._rounding = (version, rounded)
        known, rounded = self._rounding
        if known != version:
            networks = rounded.parameters(), self.transformer.parameters()
            for copied, parameter in zip(*networks, strict=True):
                copied.copy_(parameter)
            self._rounding = (version, rounded)
        return rounded

    def autocast(self, enabled: bool) -> torch.autocast:
        return in_precision(self, self.precision if enabled else "float32")

    @contextmanager
    def _weights_cast_once(self) -> Iterator[None]:
        """Autocast keeps cast weights until the outermost context ends; all else stays as it is."""
        with self.autocast(True), self.autocast(False):
            yield


@dataclass(frozen=True)
class _States:
    """States of forests, those with most roots first, and the roots of all as one list.

    order: positions of these states among those that were given.
    row: of each state.
    groups: (number of states, their number of roots).
    state, at, place: of each root the state, its position among the row's words and nodes, and how
        many roots are left of it.
    left: positions in the list of the roots that have another one on their right: the pairs.
    gap: between the two roots of each pair.
    """

    order: Int[Tensor, "states"]
    row: Int[Tensor, "states"]
    groups: Groups
    state: Int[Tensor, "roots"]
    at: Int[Tensor, "roots"]
    place: Int[Tensor, "roots"]
    left: Int[Tensor, "pairs"]
    gap: Int[Tensor, "pairs"]

    @staticmethod
    def of(row: Int[Tensor, "states"], root: Int[Tensor, "states words"]) -> _States:
        """root: position of the root that starts at each word; -1 where none does."""
        count, order = (root >= 0).sum(-1).sort(descending=True, stable=True)
        root = root[order]
        state, word = (root >= 0).nonzero(as_tuple=True)
        first = count.cumsum(0) - count
        left = (state[1:] == state[:-1]).nonzero().squeeze(1)
        lengths, counts = count.unique_consecutive(return_counts=True)
        return _States(
            order=order,
            row=row[order],
            groups=list(zip(counts.tolist(), lengths.tolist(), strict=True)),
            state=state,
            at=root[state, word],
            place=torch.arange(len(state), device=row.device) - first[state],
            left=left,
            # The gap between two roots lies before the second one's first word.
            gap=word[left + 1] - 1,
        )

    @property
    def of_pair(self) -> Int[Tensor, "pairs"]:
        """The state of each pair."""
        return self.state[self.left]


def _roots(
    trees: Trees,
    time: Int[Tensor, "rows gaps"],
    row: Int[Tensor, "states"],
    step: Int[Tensor, "states"],
) -> Int[Tensor, "states words"]:
    """Positions among words and nodes of the roots before some steps of some rows.

    Each root stands at its first word; -1 where no root starts.
    """
    made, merged = lifetimes(trees, time)
    start = trees.start.flatten(0, 1)
    words = start.shape[1] + 1
    word = torch.arange(words, device=start.device).expand(len(start), -1)
    first = torch.cat([word, start], 1)[row]
    is_root = (made[row] < step[:, None]) & (merged[row] >= step[:, None])
    item = torch.arange(first.shape[1], device=start.device).expand_as(first)
    # What is no root goes to one more place, which is cut off.
    root = torch.full((len(row), words + 1), -1, device=start.device)
    return root.scatter(1, torch.where(is_root, first, words), item)[:, :-1]


class _TransformerScores(ScoresAtOnce):
    """Keeps the embeddings of words and nodes, and which of them are roots.

    root: of each word, the position among words and nodes of the root that starts there; -1 where
        none does.
    """

    def __init__(self, policy: TransformerPolicy, condition: ForestCondition, forest: Forest):
        super().__init__(condition, forest)
        self.policy = policy
        words = condition.sentences.words
        self.length = words.shape[1]
        embedded = policy.word(words)[forest.sentence]
        self.embedding = torch.cat([embedded, torch.zeros_like(embedded)], 1)
        word = torch.arange(self.length, device=words.device)
        self.root = torch.where(word < forest.lengths[:, None], word, -1)
        # Of the present states, where they are known already.
        self.known: Tensor | None = None

    def begin_within(
        self, trees: Trees, merges: Merges, made: Int[Tensor, "rows"], temperature: float
    ) -> Float[Tensor, "steps rows"]:
        """Start after the first `made` merges of given trees.

        Returns log P_F, tempered, of all the merges that follow in these trees; 0 for others. One
        pass scores them together with the actions that may be taken instead of the first.
        """
        forest = self.forest
        self.embedding = self.policy.embedded(self.condition, trees)
        self.root = _roots(trees, merges.time, forest.rows, made)
        step = torch.arange(forest.steps, device=made.device)
        row, step = ((step >= made[:, None]) & (merges.gaps < forest.exit)).nonzero(as_tuple=True)
        logits = self._logits(row, _roots(trees, merges.time, row, step))
        first = step == made[row]
        self.known = logits.new_zeros(len(forest.rows), *logits.shape[1:])
        self.known[row[first]] = logits[first]
        action = merges.gaps[row, step] * self.policy.symbols + merges.labels[row, step]
        log_all = (logits.flatten(1) / temperature).log_softmax(-1)
        log_p = log_all.gather(1, action[:, None]).squeeze(1)
        return log_p.new_zeros(merges.gaps.t().shape).index_put((step, row), log_p)

    def logits(self, rows: Int[Tensor, "rows"] | None) -> Float[Tensor, "rows slots labels"]:
        row = self.forest.rows if rows is None else rows
        if self.known is not None:
            known, self.known = self.known[row], None
            return known
        going = (self.root[row, 1:] >= 0).any(1).nonzero().squeeze(1)
        logits = self._logits(row[going], self.root[row[going]])
        return logits.new_zeros(len(row), *logits.shape[1:]).index_put((going,), logits)

    def _logits(
        self, row: Int[Tensor, "states"], root: Int[Tensor, "states words"]
    ) -> Float[Tensor, "states slots labels"]:
        """Logits at states of at least two roots; -inf where nothing can be merged."""
        policy, states = self.policy, _States.of(row, root)
        pair = policy.pairs(self.embedding, states)
        with policy.autocast(True):
            merge, name = policy.merge(pair), policy.name(pair)
        precision = self.embedding.dtype
        logit = merge.to(precision) + name.to(precision).log_softmax(-1)
        logits = logit.new_full((len(row), self.length, policy.symbols), -torch.inf)
        return logits.index_put((states.order[states.of_pair], states.gap), logit)

    def merged(self, gap: Tensor, label: Tensor, before: Tensor, after: Tensor) -> None:
        forest = self.forest
        row = (gap != forest.exit).nonzero().squeeze(1)
        gap, label = gap[row], label[row]
        start, second, at = forest.start[row, gap], gap + 1, self.length + gap
        left, right = self.root[row, start], self.root[row, second]
        made = self.policy.composed(label, self.embedding[row, left], self.embedding[row, right])
        self.embedding[row, at] = made
        self.root[row, start] = at
        self.root[row, second] = -1

    def log_forward(self, merges: Merges) -> Float[Tensor, "steps rows"]:
        return self.policy.score(self.condition, self.forest.trees(), merges)
