"""Probabilistic grammars as latent variable models of sentences."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gfnem.categorical import sample_categorical
from gfnem.errors import UserError
from gfnem.latents import Latents
from gfnem.model import PriorModel, TractableModel
from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.inference.chart import Chart
from gfnem.tasks.grammar.inference.derive import Rules, draw_sentences
from gfnem.tasks.grammar.inference.labelled import (
    labelled_scores,
    log_joint_by_gathers,
    log_joint_labelled,
)
from gfnem.tasks.grammar.inference.messages import log_joint_shape, sample_labels, shape_scores
from gfnem.tasks.grammar.inference.shape_density import ShapeDensity
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.rules.grammar import Grammar, Potentials
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.prior import TreePrior
from gfnem.tasks.grammar.trees.tree import Trees


@dataclass(frozen=True)
class ExactTrees:
    """p(z | x) of a batch of sentences under a grammar alone, on one chart; without gradients."""

    potentials: Potentials
    chart: Chart
    labelled: bool

    @property
    @torch.no_grad()
    def log_likelihood(self) -> Float[Tensor, "batch"]:
        return inside.log_partition(self.potentials, chart=self.chart)

    def sample(self, samples: int) -> Trees:
        return inside.sample(self.potentials, samples, labelled=self.labelled, chart=self.chart)

    def span_marginals(self) -> Float[Tensor, "batch length+1 length+1"]:
        """p(span (start, end) in z | x); 0 for single words."""
        return inside.span_marginals(self.potentials, chart=self.chart)


class GrammarModel(TractableModel, PriorModel):
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
    def grammar(self) -> Grammar:
        """The rules' log-probabilities, differentiable."""

    @cached_property
    def context_free(self) -> bool:
        """Whether rules see nothing of the label above."""
        with torch.no_grad():
            return self.grammar().contexts.total == 1

    def potentials(self, x: Sentences) -> Potentials:
        """The grammar with the words of a batch summed in, differentiable."""
        return self.grammar().potentials(x.words, x.lengths)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Sentences, Trees]:
        """At most n sentences of up to max_length words with their labelled trees.

        A draw that cannot fit any more is rejected at once and drawn again, `tries` times at most;
        `rejected` counts all that did not fit.
        """
        grammar = self.grammar()
        contexts, emission = grammar.contexts, grammar.emission.exp()

        def expand(label: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
            return grammar.draw_children(label, contexts.under(above), generator)

        def emit(preterminal: Tensor, above: Tensor) -> Tensor:
            return sample_categorical(emission[contexts.under(above), preterminal], generator)

        rules = Rules(grammar.root.exp(), expand, emit)
        x, z, rejected = draw_sentences(rules, n, self.max_length, self.tries, generator)
        self.rejected += rejected
        return x, z

    @torch.no_grad()
    def sample_prior(
        self, x: Sentences, samples: int
    ) -> tuple[Trees, Float[Tensor, "batch samples"]]:
        """Trees from p(z | length of x), the words summed out."""
        grammar = self.grammar().of_any_word()
        potentials = grammar.potentials(torch.zeros_like(x.words), x.lengths)
        chart = inside.inside_chart(potentials)
        z = inside.sample(potentials, samples, labelled=self.latent == "labelled", chart=chart)
        log_length = inside.log_partition(potentials, chart=chart)
        return z, self.log_grammar_given(potentials, z) - log_length[:, None]

    def log_grammar_given(self, potentials: Potentials, z: Trees) -> Float[Tensor, "batch samples"]:
        """The grammar's log p(x, z) of the sentences that the potentials were made for."""
        if z.labels is None:
            return log_joint_shape(potentials, z)
        return log_joint_labelled(potentials, z)

    def shape_density(self, potentials: Potentials) -> ShapeDensity:
        """The grammar's log p(x, shape) of trees that change little from call to call."""
        return ShapeDensity(potentials)

    @torch.no_grad()
    def inside_scores(
        self, potentials: Potentials, z: Trees
    ) -> tuple[Float[Tensor, "batch samples nodes"], Float[Tensor, "batch samples"]]:
        """The part of log p(x, z) that is known of the words under each node, and log p(x, z).

        Neither has gradients.
        """
        return (shape_scores if z.labels is None else labelled_scores)(potentials, z)

    def sample_labels(self, potentials: Potentials, z: Trees) -> Trees:
        """The same trees with nonterminals drawn from the exact p(labels | shape, x)."""
        return sample_labels(potentials, z)

    def exact_posterior(self, x: Sentences) -> ExactTrees:
        """p(z | x) of the grammar, where the model is `tractable`."""
        with torch.no_grad():
            potentials = self.potentials(x)
            chart = inside.inside_chart(potentials)
        return ExactTrees(potentials, chart, self.latent == "labelled")

    def log_likelihood(self, x: Sentences) -> Float[Tensor, "batch"] | None:
        return inside.log_partition(self.potentials(x)) if self.tractable else None

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

    def log_joint_given(self, potentials: Potentials, z: Trees) -> Float[Tensor, "batch samples"]:
        """`log_joint` of the sentences that the potentials were made for."""
        return self.log_grammar_given(potentials, z) + self.log_prior_weight(z)

    def log_joint_under(
        self, grammar: Grammar, x: Sentences, z: Trees
    ) -> Float[Tensor, "batch samples"]:
        """`log_joint` under the model's grammar where that is at hand."""
        if z.labels is not None and isinstance(grammar, DenseGrammar):
            return log_joint_by_gathers(grammar, x.words, z) + self.log_prior_weight(z)
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


def check_latent(latent: str) -> None:
    """Raises UserError for what is no kind of latent."""
    if latent not in ("shape", "labelled"):
        raise UserError(f"latent is {latent!r}; use 'shape' or 'labelled'")


def check_positive(**options: int) -> None:
    """Raises UserError for options of the model below 1."""
    for name, value in options.items():
        if value < 1:
            raise UserError(f"model.{name} is {value}; it must be at least 1")
