"""Exact inference under grammars of any family: likelihood, marginals, draws and best trees.

The grammar comes as `Potentials`, with the words of a batch summed in. Here as everywhere in this
package preterminals are summed out over each word, so that a tree's labels are nonterminals.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from gfnem.categorical import sample_categorical
from gfnem.errors import UserError
from gfnem.tasks.grammar.inference.chart import Chart, log_total, top_down
from gfnem.tasks.grammar.rules.grammar import Potentials, SameGrammar
from gfnem.tasks.grammar.rules.messages import Children
from gfnem.tasks.grammar.rules.span_table import SpanTable
from gfnem.tasks.grammar.trees.tree import Trees

# Rules of low rank are written out one by one for their best trees, for as many sentences at once
# as have tables of so many numbers.
MOST_WRITTEN_OUT = 1 << 27


def inside_chart(potentials: Potentials) -> Chart:
    """What everything else here is computed from, for those who ask more than one thing.

    Without gradients. Best trees have a chart of their own.
    """
    return Chart.of(potentials)


def log_partition(
    potentials: Potentials,
    span_scores: Float[Tensor, "batch length+1 length+1"] | None = None,
    chart: Chart | None = None,
) -> Float[Tensor, "batch"]:
    """log p(x) in nats, once differentiable in the potentials and in the span scores.

    A sentence of probability zero has log-probability -inf and gradient 0.

    span_scores: added to the log-score of every tree that holds the span (start, end), for spans
        of at least two words; -inf forbids a span. The gradient at 0 is p(span in z | x).
    chart: of the potentials, where it is at hand; without span scores.
    """
    assert span_scores is None or chart is None, "a chart has the span scores that it was made with"
    total = log_total(chart or Chart.of(potentials, span_scores), span_scores)
    return total.to(potentials.root.dtype)


def span_marginals(
    potentials: Potentials, chart: Chart | None = None
) -> Float[Tensor, "batch length+1 length+1"]:
    """p(span (start, end) in z | x); 0 for single words and for sentences of probability zero.

    chart: of the potentials, where it is at hand.
    """
    batch, length = potentials.log_scale.shape
    chart = chart or Chart.of(potentials.detach())
    with torch.enable_grad():
        scores = potentials.log_scale.new_zeros(batch, length + 1, length + 1).requires_grad_()
        return torch.autograd.grad(log_total(chart, scores).sum(), scores)[0]


def expected_counts(
    grammar: SameGrammar, words: Int[Tensor, "batch length"], lengths: Int[Tensor, "batch"]
) -> SameGrammar:
    """How often the trees of these sentences use each rule, expected under p(z | x).

    Summed over the batch, with a count in the place of each of the grammar's log-probabilities. A
    sentence of probability zero counts nothing.
    """
    leaves: list[Tensor] = []

    def leaf(table: Tensor) -> Tensor:
        leaves.append(table.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        total = log_partition(grammar.map(leaf).potentials(words, lengths))
        counts = iter(torch.autograd.grad(total.sum(), leaves))
    return grammar.map(lambda _: next(counts))


@torch.no_grad()
def sample(
    potentials: Potentials,
    samples: int,
    generator: torch.Generator | None = None,
    labelled: bool = True,
    chart: Chart | None = None,
) -> Trees:
    """Independent trees from p(z | x), `samples` of each sentence; shapes unless `labelled`.

    chart: of the potentials, where it is at hand.

    Raises UserError if a sentence has probability zero.
    """
    draw = partial(sample_categorical, generator=generator)
    chart = chart or inside_chart(potentials)
    top = draw(_possible(chart.root_weights())[:, None].expand(-1, samples, -1))
    trees = chart.trees(top, draw)
    return trees if labelled else trees.shapes()


@torch.no_grad()
def viterbi(potentials: Potentials) -> tuple[Trees, Float[Tensor, "batch"]]:
    """The labelled tree of highest p(x, z) of each sentence, and its log p(x, z) in nats.

    Raises UserError if a sentence has probability zero.
    """
    best = partial(torch.argmax, dim=-1)
    batch, length = potentials.log_scale.shape
    labels, contexts = len(potentials.root), potentials.contexts.total
    at_once = max(MOST_WRITTEN_OUT // (length * labels**2 * contexts), 1)
    nodes = int(potentials.lengths.max()) - 1
    found: list[tuple[Tensor, ...]] = []
    for rows in torch.arange(batch, device=potentials.lengths.device).split(at_once):
        chart = Chart.of(potentials.select(rows), best=True)
        weights = _possible(chart.root_weights(), int(rows[0]))
        log_joint = weights.amax(-1).log() + chart.root_scale() + chart.potentials.total_log_scale
        trees = chart.trees(best(weights)[:, None], best)
        assert trees.labels is not None
        missing = 0, nodes - trees.start.shape[-1]
        start, end = pad(trees.start, missing), pad(trees.end, missing)
        found.append((start, end, pad(trees.labels, missing, value=-1), log_joint))
    start, end, label, log_joint = (torch.cat(fields) for fields in zip(*found, strict=True))
    return Trees(start, end, potentials.lengths, label), log_joint.to(potentials.root.dtype)


@torch.no_grad()
def minimum_bayes_risk(
    scores: Float[Tensor, "batch length+1 length+1"], lengths: Int[Tensor, "batch"]
) -> Trees:
    """The unlabelled tree with the highest sum of its spans' scores, one for each sentence.

    With p(span in z | x) as scores it has the most expected correct spans (Goodman 1996, "Parsing
    algorithms and metrics"). Among equals the split furthest to the left is taken.
    """
    batch, length = scores.shape[0], scores.shape[1] - 1
    best = SpanTable.zeros(scores, length, batch)
    left_width = torch.zeros_like(best.by_start, dtype=torch.long)
    for width in range(2, length + 1):
        children, choice = (best.left(width) + best.right(width)).max(-1)
        best.put(width, children + scores.diagonal(width, 1, 2).t())
        left_width[: length - width + 1, :, width] = choice + 1

    def split(width: int, start: Tensor, row: Tensor, label: Tensor, above: Tensor) -> Children:
        return Children(left_width[start, row, width], label, label)

    return top_down(torch.zeros_like(lengths)[:, None], lengths, 1, split).shapes()


def _possible(root_weights: Float[Tensor, "batch nonterminals"], first: int = 0) -> Tensor:
    """The weights themselves; raises UserError where a sentence has no tree at all.

    first: the place of the first sentence in its batch.
    """
    impossible = (root_weights.amax(-1) <= 0).nonzero()
    if len(impossible):
        raise UserError(
            f"sentence {first + int(impossible[0])} of the batch has probability 0 under the "
            "grammar and so no tree; leave it out or let the grammar derive it"
        )
    return root_weights
