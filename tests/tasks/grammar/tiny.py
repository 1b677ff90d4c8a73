"""Grammars, sentences and policies small enough for enumeration, and exact quantities of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf
from typing import Any

import pytest
import torch
from gfn.estimators import DiscretePolicyEstimator
from scipy.stats import chisquare
from torch import Tensor, nn

from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.policies.env import ForestEnv
from gfnem.tasks.grammar.policies.forest import ForestPolicy, Latent
from gfnem.tasks.grammar.policies.light import LightPolicy
from gfnem.tasks.grammar.policies.root_flow import RootFlowPolicy
from gfnem.tasks.grammar.policies.transformer import TransformerPolicy
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.rules.low_rank import LowRankGrammar
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.prior import TreePrior
from gfnem.tasks.grammar.trees.tree import Trees
from tests.tasks.grammar import oracle

# Spans of a tree, with or without labels.
Tree = frozenset[tuple[int, ...]]

POLICIES: dict[str, type[ForestPolicy]] = {
    "root_flow": RootFlowPolicy,
    "light": LightPolicy,
    "transformer": TransformerPolicy,
}
LATENTS: tuple[Latent, ...] = ("shape", "labelled")
BACKWARDS = ("uniform", "learned")
VOCABULARY = 8
PRETERMINALS = 3
MAX_LENGTH = 8


@pytest.fixture
def float64():
    """Values are compared in double precision."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class OfGivenSentences:
    """What draws a sentence from these grammars is mistaken."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Any, Any]:
        raise NotImplementedError("these rules are for given sentences")


class FixedModel(OfGivenSentences, GrammarModel):
    """A grammar whose parameters are the rules' log-probabilities themselves."""

    def __init__(
        self,
        grammar: DenseGrammar,
        latent: Latent = "shape",
        tree_prior: TreePrior | None = None,
    ):
        super().__init__(latent, tree_prior=tree_prior)
        dtype = torch.get_default_dtype()
        self.root = nn.Parameter(grammar.root.to(dtype))
        self.binary = nn.Parameter(grammar.binary.to(dtype))
        self.emission = nn.Parameter(grammar.emission.to(dtype))

    def grammar(self) -> DenseGrammar:
        return DenseGrammar(self.root, self.binary, self.emission)


class FixedLowRank(OfGivenSentences, GrammarModel):
    """The same of rules of low rank."""

    def __init__(self, grammar: LowRankGrammar, latent: Latent = "shape"):
        super().__init__(latent)
        self.tables = nn.ParameterList(vars(grammar).values())

    def grammar(self) -> LowRankGrammar:
        return LowRankGrammar(*self.tables)


def log_likelihood(model: GrammarModel, x: Sentences) -> Tensor:
    """Of a tractable model."""
    value = model.log_likelihood(x)
    assert value is not None
    return value


def sentences(lengths: Sequence[int], vocabulary: int = VOCABULARY, seed: int = 0) -> Sentences:
    words, length = oracle.random_sentences(lengths, vocabulary, seed)
    return Sentences(words, length, torch.arange(len(lengths)))


def words_of(x: Sentences, index: int) -> list[int]:
    return oracle.sentence(x.words, x.lengths, index)


def only(x: Sentences, index: int) -> Sentences:
    """One sentence of a batch as a batch of its own."""
    length = int(x.lengths[index])
    return Sentences(x.words[None, index, :length], x.lengths[None, index], x.ids[None, index])


def sparse_grammar(seed: int = 0) -> DenseGrammar:
    """A random grammar without half of its rules and without its last two words."""
    grammar = oracle.random_grammar(seed=seed, vocabulary=VOCABULARY)
    generator = torch.Generator().manual_seed(seed)

    def thin(log_probability: Tensor) -> Tensor:
        kept = torch.rand(log_probability.shape, generator=generator) < 0.5
        return torch.where(kept, log_probability, -inf)

    emission = grammar.emission.clone()
    emission[..., -2:] = -inf
    return DenseGrammar(grammar.root, thin(grammar.binary), thin(emission))


def make_policy(
    kind: str,
    latent: Latent,
    backward: Any = "uniform",
    nonterminals: int = 3,
    noise: float = 0.3,
    seed: int = 0,
    **options: Any,
) -> ForestPolicy:
    """A small policy whose every parameter is moved by random noise."""
    torch.manual_seed(seed)
    if kind == "transformer":
        options = {"width": 8, "heads": 2, "layers": 1, "encoder_width": 8, **options}
        options["vocabulary"] = VOCABULARY
    else:
        options = {"width": 8, **options}
    policy = POLICIES[kind](
        nonterminals=nonterminals,
        preterminals=PRETERMINALS,
        max_length=MAX_LENGTH,
        latent=latent,
        backward=backward,
        **options,
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += noise * torch.randn_like(parameter)
    return policy


def enumerate_trees(
    grammar: DenseGrammar, words: Sequence[int], latent: Latent
) -> dict[Any, float]:
    """log p(x, z) of every z."""
    if latent == "shape":
        return oracle.enumerate_shapes(grammar, words)
    return oracle.enumerate_labelled(grammar, words)


def every_shape(lengths: Tensor) -> Trees:
    """All shapes of each sentence, repeated for the shorter ones."""
    shapes = [oracle.shapes(length) for length in lengths.tolist()]
    most = max(map(len, shapes))
    return oracle.to_trees([(some * most)[:most] for some in shapes], lengths)


def count_trees(z: Trees, index: int) -> Counter[Any]:
    """How often each tree is among one sentence's samples."""
    nodes = int(z.lengths[index]) - 1
    fields = [z.start, z.end] if z.labels is None else [z.start, z.end, z.labels]
    table = torch.stack(fields, -1)[index, :, :nodes]
    trees, counts = table.unique(dim=0, return_counts=True)
    return Counter(
        {
            frozenset(tuple(node) for node in tree): count
            for tree, count in zip(trees.tolist(), counts.tolist(), strict=True)
        }
    )


def p_value(counts: Mapping[Any, int], probabilities: Mapping[Any, float]) -> float:
    """Of the chi-square test that these are draws from a distribution; 0 for an impossible draw.

    Outcomes expected less than five times are taken together.
    """
    if any(probabilities.get(outcome, 0.0) == 0 for outcome in counts):
        return 0.0
    total, observed, expected = sum(counts.values()), [0], [0.0]
    for outcome, probability in sorted(probabilities.items(), key=lambda item: item[1]):
        if expected[-1] >= 5:
            observed.append(0)
            expected.append(0.0)
        observed[-1] += counts.get(outcome, 0)
        expected[-1] += total * probability
    if len(observed) == 1:
        return 1.0
    scale = total / sum(expected)
    return float(chisquare(observed, [scale * value for value in expected]).pvalue)


def total_variation(p: Mapping[Any, float], q: Mapping[Any, float]) -> float:
    return sum(abs(p.get(z, 0.0) - q.get(z, 0.0)) for z in p.keys() | q.keys()) / 2


@dataclass(frozen=True)
class StateGraph:
    """All forests over one sentence and the merges between them, found by stepping a `ForestEnv`.

    conditions: row of the sentence in its batch, number of words.
    levels: the states after 0, 1, ... merges, [states, 3 * gaps].
    edges: of each level but the last, (state, action, state of the next level).
    """

    env: ForestEnv
    conditions: Tensor
    levels: list[Tensor]
    edges: list[tuple[Tensor, Tensor, Tensor]]

    @staticmethod
    def of(env: Any, length: int, row: int = 0) -> StateGraph:
        conditions = torch.tensor([row, length], dtype=torch.get_default_dtype())
        levels, edges = [env.s0[None]], []
        for _ in range(length - 1):
            states = _states(env, levels[-1], conditions)
            source, action = states.forward_masks.nonzero(as_tuple=True)
            actions = env.actions_from_tensor(action[:, None])
            reached = env.step(states[source], actions).tensor
            level, target = reached.unique(dim=0, return_inverse=True)
            levels.append(level)
            edges.append((source, action, target))
        return StateGraph(env, conditions, levels, edges)

    def states(self, level: int) -> Any:
        return _states(self.env, self.levels[level], self.conditions)

    def log_probabilities(
        self, estimator: DiscretePolicyEstimator, temperature: float = 1.0
    ) -> list[Tensor]:
        """log P_F, or log P_B for a backward estimator, of all edges of each level."""
        result = []
        for level, (source, action, target) in enumerate(self.edges):
            states = self.states(level + estimator.is_backward)
            output = estimator(states, states.conditions)
            at = target if estimator.is_backward else source
            masks = states.backward_masks if estimator.is_backward else states.forward_masks
            logits = output.detach().masked_fill(~masks, -inf) / temperature
            result.append(logits.log_softmax(-1)[at, action])
        return result

    def tree(self, state: Tensor) -> Tree:
        """The spans of a forest, with labels where the environment has several."""
        nodes = [tuple(node) for node in state.view(-1, 3).tolist() if node[0] >= 0]
        return frozenset(nodes if self.env.symbols > 1 else (node[:2] for node in nodes))

    def ends(self, pf: DiscretePolicyEstimator) -> dict[Tree, float]:
        """The exact distribution of the trees that P_F builds."""
        mass = torch.ones(1)
        log_forward = self.log_probabilities(pf)
        for (source, _, target), log_p, level in zip(
            self.edges, log_forward, self.levels[1:], strict=True
        ):
            share = mass[source] * log_p.exp().to(mass.dtype)
            mass = torch.zeros(len(level)).index_add(0, target, share)
        return {
            self.tree(state): p for state, p in zip(self.levels[-1], mass.tolist(), strict=True)
        }

    def log_flows(
        self, log_joint: Mapping[Tree, float], pb: DiscretePolicyEstimator
    ) -> dict[tuple[int, ...], float]:
        """log F(s) of every state: of what p(x, z) and P_B send through it."""
        flow = torch.tensor([exp(log_joint[self.tree(state)]) for state in self.levels[-1]])
        flows = [flow]
        log_backward = self.log_probabilities(pb)
        for level in reversed(range(len(self.edges))):
            source, _, target = self.edges[level]
            share = flow[target] * log_backward[level].exp()
            flow = torch.zeros(len(self.levels[level])).index_add(0, source, share)
            flows.insert(0, flow)
        return {
            tuple(state): value
            for states, level_flow in zip(self.levels, flows, strict=True)
            for state, value in zip(states.tolist(), level_flow.log().tolist(), strict=True)
        }


def _states(env: ForestEnv, tensor: Tensor, conditions: Tensor) -> Any:
    return env.States(tensor, conditions=conditions.expand(len(tensor), -1))
