"""Probabilistic grammars as latent variable models of sentences."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gfnem.categorical import sample_categorical
from gfnem.errors import UserError
from gfnem.posteriors.exact import TractableModel
from gfnem.posteriors.importance import PriorModel
from gfnem.tasks.grammar import inside
from gfnem.tasks.grammar.data import Sentences
from gfnem.tasks.grammar.messages import log_joint_labelled, log_joint_shape
from gfnem.tasks.grammar.potentials import Grammar, Potentials
from gfnem.tasks.grammar.tree import Trees


class ParsingModel(TractableModel, PriorModel):
    """A context-free grammar p(x, z) over sentences and their binary trees.

    Latents are `Trees`: with labels z is a labelled tree, without labels a shape, whose labels
    are summed out. `latent` says which of them the posterior is over.
    """

    latent: Literal["shape", "labelled"]

    @abstractmethod
    def grammar(self) -> Grammar:
        """The rules' log-probabilities, differentiable."""

    def potentials(self, x: Sentences) -> Potentials:
        """The grammar with the words of a batch summed in, differentiable."""
        return Potentials.of(self.grammar(), x.words, x.lengths)

    def log_joint(self, x: Sentences, z: Trees) -> Float[Tensor, "batch samples"]:
        return _log_joint(self.potentials(x), z)

    def log_likelihood(self, x: Sentences) -> Float[Tensor, "batch"]:
        return inside.log_partition(self.potentials(x))

    def sample_posterior(self, x: Sentences, samples: int) -> Trees:
        with torch.no_grad():
            return inside.sample(self.potentials(x), samples, labelled=self.latent == "labelled")

    @torch.no_grad()
    def sample_prior(
        self, x: Sentences, samples: int
    ) -> tuple[Trees, Float[Tensor, "batch samples"]]:
        """Trees from p(z | length of x), the words summed out."""
        grammar = self.grammar()
        # In place of the vocabulary one word, which every preterminal is sure to give.
        any_word = grammar.emission.new_zeros(grammar.preterminals, 1)
        potentials = Potentials.of(
            Grammar(grammar.root, grammar.binary, any_word), torch.zeros_like(x.words), x.lengths
        )
        z = inside.sample(potentials, samples, labelled=self.latent == "labelled")
        return z, _log_joint(potentials, z) - inside.log_partition(potentials)[:, None]


def _log_joint(potentials: Potentials, z: Trees) -> Float[Tensor, "batch samples"]:
    if z.labels is None:
        return log_joint_shape(potentials, z)
    return log_joint_labelled(potentials, z)


class Residual(nn.Module):
    """x + MLP(x), two layers."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return x + self.layers(x)


class NeuralPCFG(ParsingModel):
    """A PCFG whose rules are computed from symbol embeddings (arXiv 1906.10225, without z).

    S -> A; A -> B C with A a nonterminal and B, C nonterminals or preterminals; T -> w.

    vocabulary: number of word ids.
    nonterminals, preterminals: numbers of symbols, the start symbol not counted.
    width: of embeddings and hidden layers.
    max_length: longer draws from the model are rejected.
    tries: rounds of draws before `sample` gives up on those that never fit.
    latent: "shape" or "labelled".
    """

    rejected: Tensor

    def __init__(
        self,
        vocabulary: int,
        nonterminals: int = 30,
        preterminals: int = 60,
        width: int = 256,
        max_length: int = 40,
        tries: int = 4,
        latent: Literal["shape", "labelled"] = "shape",
    ):
        super().__init__()
        if latent not in ("shape", "labelled"):
            raise UserError(f"latent is {latent!r}; use 'shape' or 'labelled'")
        for name, value in (
            ("nonterminals", nonterminals),
            ("preterminals", preterminals),
            ("width", width),
            ("tries", tries),
        ):
            if value < 1:
                raise UserError(f"model.{name} is {value}; it must be at least 1")
        self.nonterminals = nonterminals
        self.preterminals = preterminals
        self.max_length = max_length
        self.tries = tries
        self.latent = latent
        self.register_buffer("rejected", torch.zeros((), dtype=torch.long))
        symbols = nonterminals + preterminals
        self.start = nn.Parameter(torch.randn(1, width))
        self.nonterminal = nn.Parameter(torch.randn(nonterminals, width))
        self.preterminal = nn.Parameter(torch.randn(preterminals, width))
        self.root_rules = nn.Sequential(
            nn.Linear(width, width),
            Residual(width),
            Residual(width),
            nn.Linear(width, nonterminals),
        )
        self.binary_rules = nn.Linear(width, symbols * symbols)
        self.emission_rules = nn.Sequential(
            nn.Linear(width, width), Residual(width), Residual(width), nn.Linear(width, vocabulary)
        )
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def grammar(self) -> Grammar:
        symbols = self.nonterminals + self.preterminals
        return Grammar(
            root=self.root_rules(self.start).log_softmax(-1).squeeze(0),
            binary=self.binary_rules(self.nonterminal)
            .log_softmax(-1)
            .unflatten(-1, (symbols, symbols)),
            emission=self.emission_rules(self.preterminal).log_softmax(-1),
        )

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Sentences, Trees]:
        """At most n sentences of up to max_length words with their labelled trees.

        A draw that cannot fit any more is rejected at once and drawn again, `tries` times at most;
        `rejected` counts all that did not fit.
        """
        grammar = self.grammar()
        found: list[tuple[Tensor, ...]] = []
        missing = n
        for _ in range(self.tries):
            words, lengths, times, labels = _derive(grammar, missing, self.max_length, generator)
            fits = lengths > 0
            found.append((words[fits], lengths[fits], times[fits], labels[fits]))
            kept = int(fits.sum())
            self.rejected += missing - kept
            missing -= kept
            if missing == 0:
                break
        words, lengths, times, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        longest = max(int(lengths.max()) if len(lengths) else 0, 2)
        ids = torch.full_like(lengths, -1)
        x = Sentences(words[:, :longest], lengths, ids)
        z = Trees.from_merge_times(times[:, None, : longest - 1], lengths)
        labels = torch.where(z.exists, labels[:, None, : longest - 1], -1)
        return x, Trees(z.start, z.end, z.lengths, labels)


def _derive(
    grammar: Grammar, n: int, max_length: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n leftmost derivations side by side, each with a stack of symbols still to be expanded.

    Returns words [n, max_length], lengths [n] (0 where the sentence would be too long), and for
    each gap the (negated) step at which its node was expanded and the node's label.
    """
    device = grammar.root.device
    nonterminals, symbols = grammar.nonterminals, grammar.binary.shape[1]
    binary = grammar.binary.flatten(1).exp()
    emission = grammar.emission.exp()
    rows = torch.arange(n, device=device)
    # Every symbol on a stack gives at least one word; one slot more takes what does not fit.
    stack = torch.zeros(n, max_length + 2, dtype=torch.long, device=device)
    # The step at which a right child's parent was expanded, and the parent's label; -1 for others.
    parent = torch.full_like(stack, -1)
    parent_label = torch.full_like(stack, -1)
    stack[:, 0] = sample_categorical(grammar.root.exp().expand(n, -1), generator)
    depth = torch.ones(n, dtype=torch.long, device=device)
    words = torch.zeros(n, max_length, dtype=torch.long, device=device)
    lengths = torch.zeros(n, dtype=torch.long, device=device)
    times = torch.zeros(n, max_length, dtype=torch.long, device=device)
    labels = torch.full_like(times, -1)
    alive = torch.ones(n, dtype=torch.bool, device=device)
    for step in range(2 * max_length - 1):
        row = rows[alive & (depth > 0)]
        if len(row) == 0:
            break
        depth[row] -= 1
        top = depth[row]
        symbol, origin = stack[row, top], parent[row, top]
        is_right = origin >= 0
        right, gap = row[is_right], lengths[row][is_right] - 1
        times[right, gap] = -origin[is_right]
        labels[right, gap] = parent_label[row, top][is_right]
        expands = symbol < nonterminals
        grow, at, head = row[expands], top[expands], symbol[expands]
        rule = sample_categorical(binary[head], generator)
        fits = lengths[grow] + at + 2 <= max_length
        alive[grow[~fits]] = False
        stack[grow, at] = rule % symbols
        parent[grow, at] = step
        parent_label[grow, at] = head
        stack[grow, at + 1] = rule // symbols
        parent[grow, at + 1] = -1
        depth[grow] += 2
        emit, kind = row[~expands], symbol[~expands] - nonterminals
        words[emit, lengths[emit]] = sample_categorical(emission[kind], generator)
        lengths[emit] += 1
    finished = alive & (depth == 0)
    return words, torch.where(finished, lengths, 0), times, labels
