"""Neural grammars: rules computed from embeddings of the symbols."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gfnem.tasks.grammar.model import GrammarModel, check_positive
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.rules.grammar import Grammar
from gfnem.tasks.grammar.rules.low_rank import LowRankGrammar
from gfnem.tasks.grammar.trees.prior import TreePrior

# Where rules see the parent, the inside algorithm takes time with the fourth power of the
# nonterminals; where they are of low rank too, with the square.
MOST_NONTERMINALS, MOST_OF_LOW_RANK = 40, 100


class Residual(nn.Module):
    """x + MLP(x), two layers."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return x + self.layers(x)


class NeuralPCFG(GrammarModel):
    """A PCFG whose rules are computed from symbol embeddings (arXiv 1906.10225, without z).

    S -> A; A -> B C with A a nonterminal and B, C nonterminals or preterminals; T -> w.

    vocabulary: number of word ids.
    nonterminals, preterminals: numbers of symbols, the start symbol not counted.
    rank: of the binary rules, p(B C | A) = sum_r p(r | A) p(B | r) p(C | r); None for one
        probability for each rule.
    width: of embeddings and hidden layers.
    max_length, tries, latent, tree_prior: as for `GrammarModel`.
    """

    def __init__(
        self,
        vocabulary: int,
        nonterminals: int = 30,
        preterminals: int = 60,
        rank: int | None = None,
        width: int = 256,
        max_length: int = 40,
        tries: int = 4,
        latent: Literal["shape", "labelled"] = "shape",
        tree_prior: TreePrior | None = None,
    ):
        super().__init__(latent, max_length, tries, tree_prior)
        _check_sizes(nonterminals, preterminals, rank, width)
        symbols = nonterminals + preterminals
        self.start = nn.Parameter(torch.randn(1, width))
        self.nonterminal = nn.Parameter(torch.randn(nonterminals, width))
        self.preterminal = nn.Parameter(torch.randn(preterminals, width))
        self.root_rules = _outcomes(width, nonterminals)
        self.binary_rules = nn.Linear(width, symbols * symbols if rank is None else rank)
        self.child_rules = _child_rules(width, rank)
        self.emission_rules = _outcomes(width, vocabulary)
        _initialise(self)

    def grammar(self) -> Grammar:
        root = self.root_rules(self.start).log_softmax(-1).squeeze(0)
        binary = self.binary_rules(self.nonterminal).log_softmax(-1)[None]
        emission = self.emission_rules(self.preterminal).log_softmax(-1)[None]
        symbols = torch.cat([self.nonterminal, self.preterminal])
        return _grammar(root, binary, emission, symbols, self.child_rules)


class NeuralNCFG(GrammarModel):
    """p(A -> B C | A, parent of A), p(T -> w | T, parent of T), of symbol embeddings.

    S -> A has no parent to see. A, B and C are nonterminals, B and C also preterminals. The model
    is tractable up to 40 nonterminals, 100 of low rank.

    vocabulary: number of word ids.
    nonterminals, preterminals: numbers of symbols, the start symbol not counted.
    rank: of the binary rules, p(B C | A, P) = sum_r p(r | A, P) p(B | r) p(C | r); None for one
        probability for each rule.
    width: of embeddings and hidden layers.
    max_length, tries, latent, tree_prior: as for `GrammarModel`.
    """

    def __init__(
        self,
        vocabulary: int,
        nonterminals: int = 30,
        preterminals: int = 60,
        rank: int | None = None,
        width: int = 256,
        max_length: int = 40,
        tries: int = 4,
        latent: Literal["shape", "labelled"] = "shape",
        tree_prior: TreePrior | None = None,
    ):
        super().__init__(latent, max_length, tries, tree_prior)
        _check_sizes(nonterminals, preterminals, rank, width)
        self.nonterminals = nonterminals
        self.rank = rank
        symbols = nonterminals + preterminals
        self.start = nn.Parameter(torch.randn(1, width))
        self.symbol = nn.Parameter(torch.randn(symbols, width))
        # What a symbol is to those below it; S comes last.
        self.context = nn.Parameter(torch.randn(nonterminals + 1, width))
        self.root_rules = _outcomes(width, nonterminals)
        outputs = symbols * symbols if rank is None else rank
        self.binary_rules = nn.Sequential(Residual(width), nn.Linear(width, outputs))
        self.child_rules = _child_rules(width, rank)
        self.emission_rules = _outcomes(width, vocabulary)
        _initialise(self)

    @property
    def tractable(self) -> bool:
        most = MOST_NONTERMINALS if self.rank is None else MOST_OF_LOW_RANK
        return self.nonterminals <= most

    @property
    def tractable_sizes(self) -> str:
        return (
            f" (model.nonterminals is {self.nonterminals}; at most {MOST_NONTERMINALS}, or "
            f"{MOST_OF_LOW_RANK} with model.rank=R)"
        )

    def grammar(self) -> Grammar:
        nonterminal, preterminal = self.symbol.tensor_split([self.nonterminals])
        root = self.root_rules(self.start).log_softmax(-1).squeeze(0)
        # Labels come first in memory: every label's rules are one matrix of their own.
        binary = self.binary_rules(nonterminal[:, None] + self.context).log_softmax(-1)
        emission = self.emission_rules(self.context[:-1, None] + preterminal).log_softmax(-1)
        return _grammar(root, binary.transpose(0, 1), emission, self.symbol, self.child_rules)


def _check_sizes(nonterminals: int, preterminals: int, rank: int | None, width: int) -> None:
    check_positive(nonterminals=nonterminals, preterminals=preterminals, width=width)
    if rank is not None:
        check_positive(rank=rank)


def _outcomes(width: int, outcomes: int) -> nn.Sequential:
    """The logits of what an embedding becomes."""
    return nn.Sequential(
        nn.Linear(width, width), Residual(width), Residual(width), nn.Linear(width, outcomes)
    )


def _child_rules(width: int, rank: int | None) -> nn.ModuleList:
    """Logits of each r for a symbol as left and as right child; none where rules are dense."""
    return nn.ModuleList(
        # A bias would be the same for all symbols.
        nn.Linear(width, rank, bias=False)
        for _ in ("left", "right")
        if rank is not None
    )


def _initialise(model: GrammarModel) -> None:
    for parameter in model.parameters():
        # A tree prior's parameters, which are not learned here, stay as they are.
        if parameter.requires_grad and parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def _grammar(
    root: Float[Tensor, "nonterminals"],
    binary: Float[Tensor, "contexts nonterminals outcomes"],
    emission: Float[Tensor, "inner preterminals vocabulary"],
    symbol: Float[Tensor, "symbols width"],
    child_rules: nn.ModuleList,
) -> Grammar:
    """binary: of pairs of symbols, or of r where there are child rules."""
    if not child_rules:
        return DenseGrammar(root, binary.unflatten(-1, (len(symbol), len(symbol))), emission)
    left, right = (child(symbol).t().log_softmax(-1) for child in child_rules)
    return LowRankGrammar(root, binary, left, right, emission)
