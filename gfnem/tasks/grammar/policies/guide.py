"""Inside scores that guide the chart policy, exact or of a relaxation of the grammar.

A relaxation does not see parents themselves but which cluster they are in: for each label and
cluster, rules are averaged over the parents of the cluster, as often as parents were seen above the
label. With one cluster it is a context-free grammar, with as many as there are parents the grammar
itself. Spans of two words need no relaxation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from torch import Tensor

from gfnem.tasks.grammar.inference import clustered_inside, inside
from gfnem.tasks.grammar.inference.spans import SpanTable
from gfnem.tasks.grammar.rules.annotated import AnnotatedGrammar, ContextPotentials

# How often every parent has been seen above every label, beside the counts.
PRIOR = 0.05


@dataclass(frozen=True)
class Guide:
    """Inside scores of spans of at least two words, [context, label], each span with a scale.

    vectors: relative to the scale.
    scales: their logarithms.
    clusters: which of the vectors' contexts a parent is; None where they are the parents.
    two_words: of the spans of two words, by their start, for each parent, where the vectors are of
        clusters.
    """

    vectors: SpanTable
    scales: SpanTable
    clusters: Int[Tensor, "parents"] | None = None
    two_words: Float[Tensor, "batch gaps parents nonterminals"] | None = None

    @property
    def nonterminals(self) -> int:
        return self.vectors.by_start.shape[-1]

    def scores(
        self,
        sentence: Int[Tensor, "*#spans"],
        start: Int[Tensor, "*#spans"],
        width: Int[Tensor, "*#spans"],
        parent: Int[Tensor, "*#spans"],
    ) -> Float[Tensor, "*spans nonterminals"]:
        """Of each label under a parent; 0 for words."""
        if self.clusters is None or self.two_words is None:
            return self.vectors.by_start[start, sentence, width, parent]
        sentence, start, width, parent = torch.broadcast_tensors(sentence, start, width, parent)
        scores = self.vectors.by_start[start, sentence, width, self.clusters[parent]]
        two = (width == 2).nonzero(as_tuple=True)
        scores[two] = self.two_words[sentence[two], start[two], parent[two]]
        return scores

    def whole(self, lengths: Int[Tensor, "batch"]) -> Float[Tensor, "batch nonterminals"]:
        """`scores` of whole sentences, which stand under S, the last parent."""
        sentence = torch.arange(len(lengths), device=lengths.device)
        under_s = torch.full_like(lengths, -1)
        return self.scores(sentence, torch.zeros_like(lengths), lengths, under_s)


def unguided(potentials: ContextPotentials) -> Guide:
    """Every label as good as another in every span."""
    batch, length = potentials.log_scale.shape
    like = potentials.root
    vectors = SpanTable.zeros(like, length, batch, potentials.contexts, len(like))
    for width in range(2, length + 1):
        vectors.put(width, torch.ones_like(vectors.by_start[: length - width + 1, :, width]))
    return Guide(vectors, SpanTable.zeros(like, length, batch))


def context_free(potentials: ContextPotentials) -> Guide:
    """Of a grammar whose rules see no parent: exact."""
    one = potentials.root.new_ones(1, len(potentials.root), 1)
    return Guide(*_context_free(potentials, one))


def relaxed(
    potentials: ContextPotentials,
    usage: Float[Tensor, "nonterminals parents"],
    clusters: Int[Tensor, "parents"],
) -> Guide:
    """Of a grammar whose rules see the cluster of a parent.

    usage: how often parents were seen above labels.
    """
    count = int(clusters.max()) + 1
    weight = torch.nn.functional.one_hot(clusters, count).t()[:, None] * (usage + PRIOR)
    weight = (weight / weight.sum(-1, keepdim=True)).to(potentials.root.dtype)
    if count == 1:
        vectors, scales = _context_free(potentials, weight)
    else:
        vectors, scales = clustered_inside.inside_scores(
            potentials.averaged(weight), clusters, potentials.lengths
        )
    exact = potentials.two_words()
    peak = exact.amax((-1, -2))
    scales.put(2, peak.log().t())
    exact = exact / torch.where(peak > 0, peak, 1.0)[..., None, None]
    return Guide(vectors, scales, clusters, exact)


def _context_free(
    potentials: ContextPotentials, weight: Float[Tensor, "one nonterminals parents"]
) -> tuple[SpanTable, SpanTable]:
    averaged = potentials.averaged(weight)
    vectors, scales = inside.inside_scores(
        potentials.root,
        averaged.rules.squeeze(1),
        averaged.left.squeeze(-2),
        averaged.right.squeeze(-2),
        averaged.both.squeeze(-1),
        potentials.lengths,
    )
    return SpanTable(vectors.by_start[..., None, :], vectors.by_end[..., None, :]), scales


def cluster_parents(
    grammar: AnnotatedGrammar, usage: Float[Tensor, "nonterminals parents"], count: int
) -> Int[Tensor, "parents"]:
    """Which of at most `count` clusters each parent is in.

    Parents are alike whose labels have rules that are alike, by Hellinger's distance, the more so
    the more frequent the labels are: k-means on square roots of probabilities.
    """
    usage = usage + PRIOR
    rules = grammar.under_parents().detach()
    frequency = (usage.sum(-1) / usage.sum()).to(rules)
    roots = ((rules / 2).exp() * frequency.sqrt()[:, None]).flatten(1)
    # As many numbers as there are parents keep all the distances.
    values, vectors = torch.linalg.eigh((roots @ roots.t()).double())
    points = vectors * values.clamp(min=0).sqrt()
    means = KMeans(count, random_state=0)
    means.fit(points.cpu().numpy(), sample_weight=usage.sum(0).cpu().numpy())
    # Numbered without gaps: parents that are alike can leave clusters empty.
    clusters = torch.as_tensor(means.labels_).unique(return_inverse=True)[1]
    return clusters.to(usage.device)
