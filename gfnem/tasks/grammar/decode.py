"""Choosing a tree for each sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.errors import UserError
from gfnem.inference import device_of, inference
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.tree import Trees

if TYPE_CHECKING:
    from nltk import Tree

Decode = Literal["mbr", "marginals", "sample", "viterbi"]

# Trees whose expected numbers of correct spans differ by less than this are equally good.
TIE = 1e-5


def parse(
    model: LatentVariableModel,
    posterior: Posterior,
    x: Sentences,
    words: Sequence[Sequence[str]],
    decode: Decode = "mbr",
    samples: int = 16,
) -> list[Tree]:
    """One bracketed tree for each sentence, with words directly under nonterminals N0, N1, ...

    Preterminals are summed out everywhere in this package, so trees have none. Where only the
    shape was chosen, nonterminals are drawn from the exact p(labels | shape, x); where that is
    intractable, nodes are called X.

    words: of each sentence as they are to be shown.
    decode: "mbr", the minimum-Bayes-risk tree of the span frequencies of `samples` draws of q;
        "marginals", that of exact span marginals where there are any (`span_marginals`);
        "sample", one draw of q; "viterbi", the best tree of the grammar, whose tree prior, if any,
        has no part in it.

    Raises UserError for another `decode`, and for "viterbi" where the grammar is too large for it.
    """
    x = x.to(device_of(model))
    with inference(model, posterior):
        if decode == "mbr":
            trees = minimum_bayes_risk(posterior.sample(model, x, samples).z)
        elif decode == "marginals":
            trees = decode_marginals(span_marginals(model, posterior, x, samples), x.lengths)
        elif decode == "sample":
            trees = posterior.sample(model, x, 1).z
        elif decode != "viterbi":
            raise UserError(f"decode is {decode!r}; use 'mbr', 'marginals', 'sample' or 'viterbi'")
        elif not isinstance(model, GrammarModel) or not model.tractable:
            sizes = model.tractable_sizes if isinstance(model, GrammarModel) else ""
            raise UserError(
                f"decode=viterbi needs exact inference, for which this {type(model).__name__} is "
                f"too large{sizes}: use decode=mbr or decode=sample"
            )
        else:
            trees, _ = inside.viterbi(model.potentials(x))
        if trees.labels is None and isinstance(model, GrammarModel):
            trees = model.sample_labels(model.potentials(x), trees)
    return [trees.to_nltk(sentence, said) for sentence, said in enumerate(words)]


def minimum_bayes_risk(trees: Trees) -> Trees:
    """The tree whose spans are the most frequent among each sentence's samples."""
    return decode_marginals(span_frequencies(trees), trees.lengths)


def span_frequencies(trees: Trees) -> Float[Tensor, "batch length+1 length+1"]:
    """The share of each sentence's samples that hold the span (start, end); 0 for single words."""
    batch, samples, nodes = trees.start.shape
    counts = torch.zeros(
        batch, nodes + 2, nodes + 2, dtype=torch.float64, device=trees.start.device
    )
    sentence = torch.arange(batch, device=trees.start.device)[:, None, None]
    index = sentence.expand_as(trees.start), trees.start, trees.end
    return counts.index_put_(index, trees.exists.double(), accumulate=True) / samples


def span_marginals(
    model: LatentVariableModel, posterior: Posterior, x: Sentences, samples: int
) -> Float[Tensor, "batch length+1 length+1"]:
    """p(span (start, end) in z | x): exact where a tractable grammar is all of the model.

    Elsewhere, and with a tree prior, frequencies among `samples` draws of the posterior.
    """
    with inference(model, posterior):
        if isinstance(model, GrammarModel) and model.tractable and model.normalised:
            return model.exact_posterior(x).span_marginals().double()
        return span_frequencies(posterior.sample(model, x, samples).z)


def decode_marginals(
    marginals: Float[Tensor, "batch length+1 length+1"], lengths: Int[Tensor, "batch"]
) -> Trees:
    """The tree with the highest sum of its spans' marginals, one for each sentence.

    Ties are broken at random: always the same way, few samples would favour trees that branch to
    one side, and right-branching is a strong baseline for English.
    """
    noise = torch.rand(marginals.shape, device=marginals.device)
    return inside.minimum_bayes_risk(marginals + noise * (TIE / marginals.shape[1]), lengths)
