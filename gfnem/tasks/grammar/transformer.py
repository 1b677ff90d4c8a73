"""The published policy: a transformer over all roots at every step (arXiv 2302.06576).

A root is embedded by its label, composed with its children's embeddings; words have embeddings of
their own. Nothing of the grammar enters but through the reward.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gfnem.errors import UserError
from gfnem.posteriors.gflownet import Paths
from gfnem.tasks.grammar.env import Forest
from gfnem.tasks.grammar.messages import Levels
from gfnem.tasks.grammar.policy import (
    ForestCondition,
    ForestPolicy,
    Latent,
    Merges,
    ScoresAtOnce,
)

# Groups of states that go through the transformer together when a rollout is scored.
CHUNKS = 4


class TransformerPolicy(ForestPolicy):
    """See the module's description.

    vocabulary: number of word ids.
    nonterminals, preterminals, max_length, latent, backward: as for every `ForestPolicy`.
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
        precision: Literal["float32", "bfloat16"] = "float32",
    ):
        super().__init__(nonterminals, preterminals, max_length, latent, backward, encoder_width)
        if width % heads:
            raise UserError(f"policy.width={width} is not divisible by policy.heads={heads}")
        if precision not in ("float32", "bfloat16"):
            raise UserError(f"policy.precision is {precision!r}; use 'float32' or 'bfloat16'")
        self.precision = precision
        # In a tuple, so that it is no submodule.
        self._rounding: tuple[int, nn.Module] | None = None
        self.word = nn.Embedding(vocabulary, width)
        self.label = nn.Embedding(self.symbols, width)
        self.position = nn.Embedding(max_length, width)
        self.compose = nn.Sequential(
            nn.LayerNorm(3 * width), nn.Linear(3 * width, width), nn.ReLU(), nn.Linear(width, width)
        )
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(
            layer, layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.pair = nn.Linear(2 * width, width)
        self.merge = nn.Linear(width, 1)
        self.name = nn.Linear(width, self.symbols)
        for embedding in (self.word, self.label, self.position):
            nn.init.normal_(embedding.weight, std=width**-0.5)

    reads_messages = False
    scores_at_once = True

    def scores(self, condition: ForestCondition, forest: Forest) -> ScoresAtOnce:
        return _TransformerScores(self, condition, forest)

    def contextual(
        self, tokens: Float[Tensor, "states roots width"], padding: Bool[Tensor, "states roots"]
    ) -> Float[Tensor, "states roots width"]:
        """The transformer over the roots of each state."""
        if torch.is_grad_enabled():
            with self.autocast(True):
                return self.transformer(tokens, src_key_padding_mask=padding)
        # Without dropout evaluation computes the same, and torch's fused layers, a third faster,
        # are those of evaluation without gradients.
        network = self._rounded() if self.precision == "bfloat16" else self.transformer.eval()
        dtype = next(network.parameters()).dtype
        hidden = network(tokens.to(dtype), src_key_padding_mask=padding).to(tokens.dtype)
        self.transformer.train()
        return hidden

    def _rounded(self) -> nn.Module:
        """The transformer in bfloat16, rounded anew when a parameter has changed.

        Autocast would round all weights at every step of a rollout without gradients.
        """
        version = sum(p._version for p in self.transformer.parameters())
        if self._rounding is None or self._rounding[0] != version:
            network = copy.deepcopy(self.transformer).bfloat16().eval()
            self._rounding = (version, network)
        return self._rounding[1]

    def autocast(self, enabled: bool) -> torch.autocast:
        device = self.word.weight.device.type
        return torch.autocast(
            device, torch.bfloat16, enabled=enabled and self.precision == "bfloat16"
        )

    def _roll(self, *args, **options) -> Paths:
        # With gradients weights are cast once for a rollout, as autocast keeps them until the
        # outer context ends; messages of the grammar stay in full precision.
        with self.autocast(True), self.autocast(False):
            return super()._roll(*args, **options)


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
        self.seen: list[Tensor] = []

    def logits(self, rows: Int[Tensor, "rows"] | None) -> Float[Tensor, "rows slots labels"]:
        row = self.forest.rows if rows is None else rows
        merge, name, gap = self._judged(self.embedding, row, self.root[row])
        logit = merge[..., None] + name.log_softmax(-1)
        logits = logit.new_zeros(len(row), self.length, self.policy.symbols)
        return logits.scatter(1, gap[..., None].expand_as(logit), logit)

    def _judged(
        self, embedding: Tensor, row: Tensor, root: Tensor
    ) -> tuple[
        Float[Tensor, "states pairs"],
        Float[Tensor, "states pairs symbols"],
        Int[Tensor, "states pairs"],
    ]:
        """Logits of merging neighbouring roots and of the label, and the gaps between the roots.

        A state is a row of the forest with the roots that it has. Behind its last pair of roots
        the gap is the exit slot.
        """
        policy = self.policy
        count = (root >= 0).sum(-1)
        most = max(int(count.max()), 2)
        # Roots from left to right, then padding.
        first_word = (root < 0).to(torch.uint8).argsort(dim=-1, stable=True)[:, :most]
        is_root = torch.arange(most, device=root.device) < count[:, None]
        at = root.gather(1, first_word).clamp(min=0)
        tokens = embedding[row[:, None], at] + policy.position.weight[:most]
        hidden = policy.contextual(tokens, ~is_root)
        with policy.autocast(True):
            pair = policy.pair(torch.cat([hidden[:, :-1], hidden[:, 1:]], -1)).relu()
            merge, name = policy.merge(pair), policy.name(pair)
        precision = embedding.dtype
        # The gap between two roots lies before the second one's first word.
        gap = torch.where(is_root[:, 1:], first_word[:, 1:] - 1, self.forest.exit)
        return merge.squeeze(-1).to(precision), name.to(precision), gap

    def merged(self, gap: Tensor, label: Tensor, before: Tensor, after: Tensor) -> None:
        forest, rows = self.forest, self.forest.rows
        self.seen.append(self.root.clone())
        real = gap != forest.exit
        start = torch.where(real, forest.start[rows, gap], 0)
        second = torch.where(real, gap + 1, 0)
        left, right = self.root[rows, start], self.root[rows, second]
        children = self.embedding[rows, left.clamp(min=0)], self.embedding[rows, right.clamp(min=0)]
        at = self.length + gap
        self.embedding[rows, at] = self._composed(label, *children)
        self.root[rows[real], start[real]] = at[real]
        self.root[rows[real], second[real]] = -1

    def _composed(self, label: Tensor, left: Tensor, right: Tensor) -> Float[Tensor, "rows width"]:
        name = self.policy.label(label)
        with self.policy.autocast(True):
            return name + self.policy.compose(torch.cat([name, left, right], -1)).to(name.dtype)

    def log_forward(self, merges: Merges) -> Float[Tensor, "steps rows"]:
        forest, slots = self.forest, self.length
        embedding = self._embedded(merges)
        step, row = (merges.gaps != forest.exit).t().nonzero(as_tuple=True)
        root = torch.stack(self.seen)[step, row]
        gap, label = merges.gaps[row, step], merges.labels[row, step]
        # States with as many roots go together, so that hardly anything is padding.
        count = (root >= 0).sum(-1)
        order = count.argsort(descending=True)
        scored = []
        for state in order.split(max(len(order) // CHUNKS + 1, 1)):
            merge, name, gaps = self._judged(embedding, row[state], root[state])
            merge = merge.masked_fill(gaps == forest.exit, -torch.inf).log_softmax(-1)
            pair = (gaps == gap[state, None]).int().argmax(-1)
            at = torch.arange(len(state), device=pair.device)
            named = name[at, pair].log_softmax(-1).gather(1, label[state, None]).squeeze(1)
            scored.append(merge[at, pair] + named)
        log_p = torch.cat(scored)
        nothing = log_p.new_zeros(slots - 1, len(forest.rows))
        return nothing.index_put((step[order], row[order]), log_p)

    def _embedded(self, merges: Merges) -> Float[Tensor, "rows positions width"]:
        """Embeddings of words and all nodes, differentiable."""
        forest, slots = self.forest, self.length
        levels = Levels.of(forest.trees())
        words = self.policy.word(self.condition.sentences.words)[forest.sentence]
        known = words.flatten(0, 1)
        offset = levels.row * slots
        label = torch.zeros_like(levels.row)
        if forest.labelled:
            label = forest.labels[levels.row, levels.gap]
        # Positions of the children in `known`: words first, then nodes in the order of levels.
        left = torch.where(levels.left < 0, offset + levels.gap, len(known) + levels.left)
        right = torch.where(levels.right < 0, offset + levels.gap + 1, len(known) + levels.right)
        for first, behind in levels.heights:
            nodes = slice(first, behind)
            made = self._composed(label[nodes], known[left[nodes]], known[right[nodes]])
            known = torch.cat([known, made])
        at = levels.row, slots + levels.gap
        table = torch.cat([words, torch.zeros_like(words)], 1)
        return table.index_put(at, known[words.shape[0] * slots :])
