"""Grammars that are not context-free: rules see the parent of their left-hand side."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from types import ModuleType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gfnem.categorical import sample_categorical
from gfnem.tasks.grammar.inference import (
    annotated_inside,
    annotated_messages,
    factored_inside,
    factored_messages,
)
from gfnem.tasks.grammar.inference.derive import Rules
from gfnem.tasks.grammar.inference.shape_density import ShapeDensity
from gfnem.tasks.grammar.inference.spans import SpanTable
from gfnem.tasks.grammar.model import GrammarModel, Residual, check_positive
from gfnem.tasks.grammar.rules.annotated import AnnotatedGrammar, ContextPotentials, DenseGrammar
from gfnem.tasks.grammar.rules.factored import FactoredPotentials, LowRankGrammar
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.prior import TreePrior
from gfnem.tasks.grammar.trees.tree import Trees

# The inside algorithm takes time with the fourth power of the nonterminals; where rules are of low
# rank, with the square.
MOST_NONTERMINALS, MOST_OF_LOW_RANK = 40, 100


class AnnotatedModel(GrammarModel):
    """A grammar whose rules see the parent; tractable up to 40 nonterminals, 100 of low rank.

    rank: of the binary rules; None for one probability for each rule.
    """

    nonterminals: int
    rank: int | None = None

    @abstractmethod
    def grammar(self) -> AnnotatedGrammar:
        """The rules' log-probabilities, differentiable."""

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

    def rules(self, generator: torch.Generator | None) -> Rules:
        grammar = self.grammar()
        emission = grammar.emission.exp()

        def expand(label: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
            return grammar.draw_children(label, context, generator)

        def emit(preterminal: Tensor, context: Tensor) -> Tensor:
            return sample_categorical(emission[context, preterminal], generator)

        return Rules(grammar.root.exp(), expand, emit)

    def log_joint_under(
        self, grammar: AnnotatedGrammar, x: Sentences, z: Trees
    ) -> Float[Tensor, "batch samples"]:
        if z.labels is not None and isinstance(grammar, DenseGrammar):
            value = annotated_messages.log_joint_by_gathers(grammar, x.words, z)
            return value + self.log_prior_weight(z)
        return super().log_joint_under(grammar, x, z)

    def log_grammar_given(
        self, potentials: ContextPotentials, z: Trees
    ) -> Float[Tensor, "batch samples"]:
        if z.labels is not None:
            return annotated_messages.log_joint_labelled(potentials, z)
        return _messages(potentials).log_joint_shape(potentials, z)

    def shape_density(self, potentials: ContextPotentials) -> ShapeDensity:
        return ShapeDensity(potentials, partial(_messages(potentials).upward, potentials))

    @torch.no_grad()
    def inside_scores(
        self, potentials: ContextPotentials, z: Trees
    ) -> tuple[Float[Tensor, "batch samples nodes"], Float[Tensor, "batch samples"]]:
        if z.labels is not None:
            return annotated_messages.labelled_scores(potentials, z)
        return _messages(potentials).inside_scores(potentials, z)

    def inference(self, potentials: ContextPotentials) -> ModuleType:
        return factored_inside if isinstance(potentials, FactoredPotentials) else annotated_inside

    def chart(self, potentials: ContextPotentials) -> tuple[SpanTable, SpanTable]:
        """Inside scores of all spans, [context, label], and their logarithmic scales.

        Without gradients; both are 0 for single words.
        """
        return self.inference(potentials).inside_scores(potentials)

    @torch.no_grad()
    def sample_labels(self, potentials: ContextPotentials, z: Trees) -> Trees:
        return _messages(potentials).sample_labels(potentials, z)


def _messages(potentials: ContextPotentials) -> ModuleType:
    """Messages along given trees for rules that are stored like these."""
    return factored_messages if isinstance(potentials, FactoredPotentials) else annotated_messages


class NeuralNCFG(AnnotatedModel):
    """p(A -> B C | A, parent of A), p(T -> w | T, parent of T), of symbol embeddings.

    S -> A has no parent to see. A, B and C are nonterminals, B and C also preterminals.

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
        check_positive(nonterminals=nonterminals, preterminals=preterminals, width=width)
        if rank is not None:
            check_positive(rank=rank)
        self.nonterminals = nonterminals
        self.rank = rank
        symbols = nonterminals + preterminals
        self.start = nn.Parameter(torch.randn(1, width))
        self.symbol = nn.Parameter(torch.randn(symbols, width))
        # What a symbol is to those below it; S comes last.
        self.context = nn.Parameter(torch.randn(nonterminals + 1, width))
        self.root_rules = nn.Sequential(
            nn.Linear(width, width),
            Residual(width),
            Residual(width),
            nn.Linear(width, nonterminals),
        )
        outputs = symbols * symbols if rank is None else rank
        self.binary_rules = nn.Sequential(Residual(width), nn.Linear(width, outputs))
        self.child_rules = nn.ModuleList(
            # A bias would be the same for all symbols.
            nn.Linear(width, rank, bias=False)
            for _ in ("left", "right")
            if rank is not None
        )
        self.emission_rules = nn.Sequential(
            nn.Linear(width, width), Residual(width), Residual(width), nn.Linear(width, vocabulary)
        )
        for parameter in self.parameters():
            # A tree prior's parameters, which are not learned here, stay as they are.
            if parameter.requires_grad and parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def grammar(self) -> AnnotatedGrammar:
        symbols = len(self.symbol)
        nonterminal, preterminal = self.symbol.tensor_split([self.nonterminals])
        root = self.root_rules(self.start).log_softmax(-1).squeeze(0)
        # Labels come first in memory: every label's rules are one matrix of their own.
        binary = self.binary_rules(nonterminal[:, None] + self.context).log_softmax(-1)
        binary = binary.transpose(0, 1)
        emission = self.emission_rules(self.context[:-1, None] + preterminal).log_softmax(-1)
        if not self.child_rules:
            return DenseGrammar(root, binary.unflatten(-1, (symbols, symbols)), emission)
        left, right = (child(self.symbol).t().log_softmax(-1) for child in self.child_rules)
        return LowRankGrammar(root, binary, left, right, emission)
