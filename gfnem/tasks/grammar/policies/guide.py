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

from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.rules.contexts import Contexts
from gfnem.tasks.grammar.rules.grammar import Grammar, Potentials
from gfnem.tasks.grammar.rules.span_table import SpanTable

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


def unguided(potentials: Potentials) -> Guide:
    """Every label as good as another in every span."""
    batch, length = potentials.log_scale.shape
    like = potentials.root
    vectors = SpanTable.zeros(like, length, batch, potentials.contexts.total, len(like))
    for width in range(2, length + 1):
        vectors.put(width, torch.ones_like(vectors.of_width(width)))
    return Guide(vectors, SpanTable.zeros(like, length, batch))


def exact(potentials: Potentials) -> Guide:
    """The grammar's own inside scores."""
    chart, dtype = inside.inside_chart(potentials), potentials.root.dtype
    return Guide(chart.messages.table().to(dtype), chart.scales.to(dtype))


def relaxed(
    potentials: Potentials,
    usage: Float[Tensor, "nonterminals parents"],
    clusters: Int[Tensor, "parents"],
) -> Guide:
    """Of a grammar whose rules see the cluster of a parent.

    usage: how often parents were seen above labels.
    """
    count = int(clusters.max()) + 1
    weight = torch.nn.functional.one_hot(clusters, count).t()[:, None] * (usage + PRIOR)
    weight = (weight / weight.sum(-1, keepdim=True)).to(potentials.root.dtype)
    below, order = clusters[:-1].sort(stable=True)
    contexts = Contexts(tuple(below.tolist()), int(clusters[-1]))
    chart = inside.inside_chart(potentials.averaged(weight, contexts, order))
    vectors, scales = chart.messages.table(), chart.scales
    if count > 1:
        # Labels of one cluster followed one another.
        vectors = SpanTable(
            *(table[..., order.argsort()] for table in (vectors.by_start, vectors.by_end))
        )
    two_words = potentials.two_words()
    peak = two_words.amax((-1, -2))
    scales.put(2, peak.log().t())
    two_words = two_words / torch.where(peak > 0, peak, 1.0)[..., None, None]
    return Guide(vectors, scales, clusters, two_words)


def cluster_parents(
    grammar: Grammar, usage: Float[Tensor, "nonterminals parents"], count: int
) -> Int[Tensor, "parents"]:
    """Which of at most `count` clusters each parent is in.

    Parents are alike whose labels have rules that are alike, by Hellinger's distance, the more so
    the more frequent the labels are: k-means on square roots of probabilities.
    """
    usage = usage + PRIOR
    rules = grammar.under_contexts().detach()
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
