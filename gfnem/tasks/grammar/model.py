"""Probabilistic grammars as latent variable models of sentences."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gfnem.categorical import sample_categorical
from gfnem.errors import UserError
from gfnem.latents import Latents
from gfnem.model import PriorModel, TractableModel
from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.inference.derive import Rules, draw_sentences
from gfnem.tasks.grammar.inference.messages import (
    inside_scores,
    log_joint_labelled,
    log_joint_shape,
    sample_labels,
    upward,
)
from gfnem.tasks.grammar.inference.shape_density import ShapeDensity
from gfnem.tasks.grammar.rules.potentials import Grammar, Potentials
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.prior import TreePrior
from gfnem.tasks.grammar.trees.tree import Trees


@dataclass(frozen=True)
class ExactTrees:
    """p(z | x) of a batch of sentences under a grammar alone, on one chart; without gradients."""

    inference: ModuleType
    potentials: Any
    chart: Any
    labelled: bool

    @property
    @torch.no_grad()
    def log_likelihood(self) -> Float[Tensor, "batch"]:
        return self.inference.log_partition(self.potentials, chart=self.chart)

    def sample(self, samples: int) -> Trees:
        return self.inference.sample(
            self.potentials, samples, labelled=self.labelled, chart=self.chart
        )

    def span_marginals(self) -> Float[Tensor, "batch length+1 length+1"]:
        """p(span (start, end) in z | x); 0 for single words."""
        return self.inference.span_marginals(self.potentials, chart=self.chart)


class GrammarModel(TractableModel):
    """A grammar p(x, z) over sentences and their binary trees, or one times a prior on shapes.

    Latents are `Trees`: with labels z is a labelled tree, without labels a shape, whose labels
    are summed out.

    With a tree prior, log_joint is log p(x, z) - E(shape) / T, which is not normalised, and what
    posteriors are of. Everything else is of the grammar alone: likelihood, draws, exact posterior,
    span marginals, Viterbi trees.

    latent: which of them the posterior is over, "shape" or "labelled".
    max_length: longer draws from the model are rejected.
    tries: rounds of draws before `sample` gives up on those that never fit.
    tree_prior: None for the grammar alone.
    """

    rejected: Tensor

    def __init__(
        self,
        latent: Literal["shape", "labelled"] = "shape",
        max_length: int = 40,
        tries: int = 4,
        tree_prior: TreePrior | None = None,
    ):
        super().__init__()
        check_latent(latent)
        check_positive(tries=tries)
        self.latent = latent
        self.max_length = max_length
        self.tries = tries
        self.tree_prior = tree_prior
        self.register_buffer("rejected", torch.zeros((), dtype=torch.long))

    @abstractmethod
    def rules(self, generator: torch.Generator | None) -> Rules:
        """How the grammar's rules are drawn."""

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Sentences, Trees]:
        """At most n sentences of up to max_length words with their labelled trees.

        A draw that cannot fit any more is rejected at once and drawn again, `tries` times at most;
        `rejected` counts all that did not fit.
        """
        rules = self.rules(generator)
        x, z, rejected = draw_sentences(rules, n, self.max_length, self.tries, generator)
        self.rejected += rejected
        return x, z

    @abstractmethod
    def grammar(self) -> Any:
        """The rules' log-probabilities, differentiable."""

    def potentials(self, x: Sentences) -> Any:
        """The grammar with the words of a batch summed in, differentiable."""
        return self.grammar().potentials(x.words, x.lengths)

    @abstractmethod
    def log_grammar_given(self, potentials: Any, z: Trees) -> Float[Tensor, "batch samples"]:
        """The grammar's log p(x, z) of the sentences that the potentials were made for."""

    @abstractmethod
    def shape_density(self, potentials: Any) -> ShapeDensity:
        """The grammar's log p(x, shape) of trees that change little from call to call."""

    @abstractmethod
    def inside_scores(
        self, potentials: Any, z: Trees
    ) -> tuple[Float[Tensor, "batch samples nodes"], Float[Tensor, "batch samples"]]:
        """The part of log p(x, z) that is known of the words under each node, and log p(x, z).

        Neither has gradients.
        """

    @abstractmethod
    def sample_labels(self, potentials: Any, z: Trees) -> Trees:
        """The same trees with nonterminals drawn from the exact p(labels | shape, x)."""

    @abstractmethod
    def inference(self, potentials: Any) -> ModuleType:
        """The inside algorithm for rules that are stored like these."""

    def exact_posterior(self, x: Sentences) -> ExactTrees:
        """p(z | x) of the grammar, where the model is `tractable`."""
        with torch.no_grad():
            potentials = self.potentials(x)
            inference = self.inference(potentials)
            chart = inference.inside_chart(potentials)
        return ExactTrees(inference, potentials, chart, self.latent == "labelled")

    def log_likelihood(self, x: Sentences) -> Float[Tensor, "batch"] | None:
        if not self.tractable:
            return None
        potentials = self.potentials(x)
        return self.inference(potentials).log_partition(potentials)

    def sample_posterior(self, x: Sentences, samples: int) -> Trees:
        return self.exact_posterior(x).sample(samples)

    def weighted_posterior(self, x: Sentences, samples: int) -> Latents:
        exact = self.exact_posterior(x)
        return Latents(exact.sample(samples), exact.log_likelihood[:, None].expand(-1, samples))

    def log_prior_weight(self, z: Trees) -> Float[Tensor, "batch samples"]:
        """-E(shape) / T, what a tree prior adds to the grammar's log p(x, z); 0 without one."""
        if self.tree_prior is None:
            return torch.zeros(z.start.shape[:2], device=z.start.device)
        return self.tree_prior.log_weight(z)

    def log_joint_given(self, potentials: Any, z: Trees) -> Float[Tensor, "batch samples"]:
        """`log_joint` of the sentences that the potentials were made for."""
        return self.log_grammar_given(potentials, z) + self.log_prior_weight(z)

    def log_joint_under(
        self, grammar: Any, x: Sentences, z: Trees
    ) -> Float[Tensor, "batch samples"]:
        """`log_joint` under the model's grammar where that is at hand."""
        return self.log_joint_given(grammar.potentials(x.words, x.lengths), z)

    def log_joint(self, x: Sentences, z: Trees) -> Float[Tensor, "batch samples"]:
        return self.log_joint_under(self.grammar(), x, z)

    @property
    def unnormalised(self) -> str:
        return "" if self.tree_prior is None else "it has a tree_prior: leave that out"

    def m_step_done(self, m_steps: int) -> None:
        if self.tree_prior is not None:
            self.tree_prior.m_steps.fill_(m_steps)

    def metrics(self) -> dict[str, float]:
        return {} if self.tree_prior is None else {"prior/temperature": self.tree_prior.temperature}


class ParsingModel(GrammarModel, PriorModel):
    """A context-free grammar."""

    @abstractmethod
    def grammar(self) -> Grammar:
        """The rules' log-probabilities, differentiable."""

    def log_grammar_given(self, potentials: Potentials, z: Trees) -> Float[Tensor, "batch samples"]:
        if z.labels is None:
            return log_joint_shape(potentials, z)
        return log_joint_labelled(potentials, z)

    def shape_density(self, potentials: Potentials) -> ShapeDensity:
        return ShapeDensity(potentials, partial(upward, potentials))

    @torch.no_grad()
    def inside_scores(
        self, potentials: Potentials, z: Trees
    ) -> tuple[Float[Tensor, "batch samples nodes"], Float[Tensor, "batch samples"]]:
        return inside_scores(potentials, z)

    def inference(self, potentials: Potentials) -> ModuleType:
        return inside

    def log_likelihood(self, x: Sentences) -> Float[Tensor, "batch"]:
        return inside.log_partition(self.potentials(x))

    @torch.no_grad()
    def sample_labels(self, potentials: Potentials, z: Trees) -> Trees:
        return sample_labels(potentials, z)

    def rules(self, generator: torch.Generator | None) -> Rules:
        grammar = self.grammar()
        symbols = grammar.binary.shape[1]
        binary, emission = grammar.binary.flatten(1).exp(), grammar.emission.exp()

        def expand(label: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
            rule = sample_categorical(binary[label], generator)
            return rule // symbols, rule % symbols

        def emit(preterminal: Tensor, context: Tensor) -> Tensor:
            return sample_categorical(emission[preterminal], generator)

        return Rules(grammar.root.exp(), expand, emit)

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
        log_grammar = self.log_grammar_given(potentials, z)
        return z, log_grammar - inside.log_partition(potentials)[:, None]


def check_latent(latent: str) -> None:
    """Raises UserError for what is no kind of latent."""
    if latent not in ("shape", "labelled"):
        raise UserError(f"latent is {latent!r}; use 'shape' or 'labelled'")


def check_positive(**options: int) -> None:
    """Raises UserError for options of the model below 1."""
    for name, value in options.items():
        if value < 1:
            raise UserError(f"model.{name} is {value}; it must be at least 1")


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
    max_length, tries, latent, tree_prior: as for `GrammarModel`.
    """

    def __init__(
        self,
        vocabulary: int,
        nonterminals: int = 30,
        preterminals: int = 60,
        width: int = 256,
        max_length: int = 40,
        tries: int = 4,
        latent: Literal["shape", "labelled"] = "shape",
        tree_prior: TreePrior | None = None,
    ):
        super().__init__(latent, max_length, tries, tree_prior)
        check_positive(nonterminals=nonterminals, preterminals=preterminals, width=width)
        self.nonterminals = nonterminals
        self.preterminals = preterminals
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
            # A tree prior's parameters, which are not learned here, stay as they are.
            if parameter.requires_grad and parameter.dim() > 1:
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
