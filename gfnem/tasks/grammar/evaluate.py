"""Rating grammars and their posteriors on held-out sentences, and parsing with them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gfnem import divergences
from gfnem.em import Metrics
from gfnem.errors import UserError
from gfnem.gradients import gradient_noise
from gfnem.inference import device_of, inference, log_mean_exp
from gfnem.model import LatentVariableModel
from gfnem.posterior import Latents, Posterior
from gfnem.posteriors.exact import TractableModel
from gfnem.tasks.grammar import ensemble, inside
from gfnem.tasks.grammar.f1 import SpanCounts
from gfnem.tasks.grammar.model import GrammarModel, ParsingModel
from gfnem.tasks.grammar.ncfg import AnnotatedModel
from gfnem.tasks.grammar.text.corpus import Corpus, GrammarData, Sentences
from gfnem.tasks.grammar.tree import Trees

if TYPE_CHECKING:
    from nltk import Tree

    from gfnem.run import Run

Decode = Literal["mbr", "marginals", "sample", "viterbi"]

# Shorter sentences have too few trees to tell a posterior that has collapsed from one that has not.
LONG = 8
# The sentences that a report shows: enough words to have structure, few enough to be drawn.
SHOWN, SHOWN_LENGTHS = 6, range(5, 16)

# Ways to choose a sentence's tree: end of the F1's name -> what a report calls it.
DECODED = {
    "": "posterior, sample",
    "_mbr": "posterior, MBR",
    "_exact_mbr": "exact posterior, MBR",
    "_grammar_mbr": "grammar without the prior, MBR",
    "_viterbi": "Viterbi",
}
BASELINES = {"left": "left-branching", "right": "right-branching", "random": "random"}


class GrammarEvaluator:
    """Likelihood, trees and the posterior's fit. All metrics are named `split/...`.

    Likelihood, in nats for each word; no end of the sentence is counted:
        nll_per_token, perplexity: exact; where the model has a likelihood.
        iw_nll_per_token: upper bound from `iw_samples` importance-weighted draws of q.
    F1 of unlabelled spans in percent (see `f1.py`); where there are gold trees:
        sentence_f1, corpus_f1: one draw of q.
        sentence_f1_mbr, corpus_f1_mbr: minimum-Bayes-risk trees of the draws' span frequencies.
        sentence_f1_exact_mbr, corpus_f1_exact_mbr: the same of the grammar's exact span marginals;
            where they are tractable.
        sentence_f1_viterbi, corpus_f1_viterbi: the grammar's best trees; context-free, final only.
        baseline/left_f1, baseline/left_corpus_f1 and the same for right and random: trees of
            these shapes on the split; final only.
        baseline/gold_right_edge: right_edge, as below, of the gold trees; final only.
    The posterior:
        posterior_gap: E_x[log p(x) - E_q log w] in nats for each sentence; with the likelihood.
        effective_samples: of the importance weights of `samples` draws.
        distinct_trees: different shapes among `samples` draws of q, sentences of 8 words or more.
        right_edge: share of their non-trivial spans that end at the sentence's right edge.
        distinct_exact_trees, right_exact_edge: the same two of the grammar's exact posterior.
        kl_p_q, kl_q_p, modes, modes_covered: see `gfnem.divergences`; with `divergences`.
        train/gradient_variance, train/gradient_noise: of E-steps on the first training batch, see
            `gfnem.gradients`; with `gradient_e_steps`.

    With a tree prior log p(x, z) - E(shape) / T takes the place of log p(x, z), whose sum over z,
    W(x), is not known, and some figures change:
        nll_per_token, perplexity, iw_nll_per_token: still of the grammar alone, and normalised; the
            prior is taken out of the weights again.
        sentence_f1_viterbi, corpus_f1_viterbi: still of the grammar alone.
        sentence_f1_grammar_mbr, corpus_f1_grammar_mbr, distinct_grammar_trees, right_grammar_edge:
            in place of those of the exact posterior; they are of the grammar alone.
        free_energy: -E_q log w in nats for each sentence, in place of the posterior_gap. It is
            the gap - log W(x), and falls with the gap while the grammar stays.
        iw_free_energy: -log W(x), upper bound from `iw_samples` draws; free_energy minus it is a
            lower bound of the gap.

    Final evaluations on the test split add train/posterior_gap, the same on `train_sentences`
    training sentences, evenly spaced: what q has not learned, apart from what it overfits; with a
    tree prior train/free_energy.

    data: what to rate on.
    samples: draws of q for each sentence.
    iw_samples: draws for the bound in final evaluations; others use `samples`.
    batch_size: sentences at a time.
    train_sentences: how many of the training sentences are rated.
    select: what is minimised on the validation split: "likelihood" (nll_per_token, or the bound
        for a model without an exact likelihood) or "posterior_gap" (with a tree prior the free
        energy), for a model that is not trained.
    divergences: whether to list q(z | x) of every z; for shapes of sentences of up to 6 words.
    gradient_e_steps: E-steps whose gradients are compared; None for none.
    """

    def __init__(
        self,
        data: GrammarData,
        samples: int = 16,
        iw_samples: int = 128,
        batch_size: int = 64,
        train_sentences: int = 256,
        select: Literal["likelihood", "posterior_gap"] = "likelihood",
        divergences: bool = False,
        gradient_e_steps: int | None = None,
    ):
        for name, value, least in (
            ("samples", samples, 1),
            ("iw_samples", iw_samples, samples),
            ("batch_size", batch_size, 1),
            ("train_sentences", train_sentences, 1),
        ):
            if value < least:
                raise UserError(f"evaluator.{name} is {value}; it must be at least {least}")
        self.data = data
        self.samples = samples
        self.iw_samples = iw_samples
        self.batch_size = batch_size
        if select not in ("likelihood", "posterior_gap"):
            raise UserError(f"evaluator.select is {select!r}; use 'likelihood' or 'posterior_gap'")
        self.train_sentences = train_sentences
        self.divergences = divergences
        self.gradient_e_steps = gradient_e_steps
        self.select = select
        # The likelihood's bound once a model turns out to have no exact likelihood.
        self.selection = "valid/nll_per_token" if select == "likelihood" else "valid/posterior_gap"
        self._tested: Metrics = {}

    def __call__(
        self, model: LatentVariableModel, posterior: Posterior, split: str, final: bool = False
    ) -> Metrics:
        corpus = self.data.split(split)
        figures: dict[str, list[Tensor]] = {}
        counts: dict[str, list[SpanCounts]] = {}
        with inference(model, posterior):
            for x in corpus.batches(self.batch_size):
                x = x.to(device_of(model))
                rated, decoded = self._rate(model, posterior, x, final)
                for name, values in rated.items():
                    figures.setdefault(name, []).append(values.double())
                if corpus.gold is not None:
                    gold = [corpus.gold[i] for i in x.ids.tolist()]
                    for name, trees in decoded.items():
                        counts.setdefault(name, []).append(SpanCounts.of(trees, gold))
        metrics = _summarise({name: torch.cat(parts) for name, parts in figures.items()})
        if "iw_nll_per_token" in metrics:
            metrics["iw_samples"] = self.iw_samples if final else self.samples
        for name, parts in counts.items():
            total = SpanCounts.cat(parts)
            metrics[f"sentence_f1{name}"] = total.sentence_f1
            metrics[f"corpus_f1{name}"] = total.corpus_f1
        metrics = {f"{split}/{name}": value for name, value in metrics.items()}
        if self.gradient_e_steps is not None:
            batch = self.data.train_batches(0)[0].to(device_of(model))
            of_gradients = gradient_noise(model, posterior, batch, self.gradient_e_steps)
            metrics |= {f"train/{name}": value for name, value in of_gradients.items()}
        if self.select == "likelihood" and f"{split}/nll_per_token" not in metrics:
            self.selection = "valid/iw_nll_per_token"
        if self.select == "posterior_gap" and not model.normalised:
            self.selection = "valid/free_energy"
        if final:
            metrics |= self._baselines(corpus)
        if final and split == "test":
            metrics |= self._train_fit(model, posterior)
            self._tested = metrics
        return metrics

    def _train_fit(self, model: LatentVariableModel, posterior: Posterior) -> Metrics:
        """The posterior gap on some of the training sentences, where it is exact.

        The free energy of a model that is not normalised.
        """
        corpus = self.data.train
        every = max(len(corpus) // self.train_sentences, 1)
        chosen = corpus.lengths.argsort()[::every]
        fits = []
        name = "posterior_gap" if model.normalised else "free_energy"
        with inference(model, posterior):
            for indices in chosen.split(self.batch_size):
                x = corpus.batch(indices.tolist()).to(device_of(model))
                log_weights = posterior.sample(model, x, self.samples).log_weights
                if log_weights is None:
                    return {}
                fit = _fit(model, model.log_likelihood(x), log_weights)
                if name not in fit:
                    return {}
                fits.append(fit[name])
        return {f"train/{name}": float(torch.cat(fits).double().mean())}

    def _rate(
        self, model: LatentVariableModel, posterior: Posterior, x: Sentences, final: bool
    ) -> tuple[dict[str, Float[Tensor, "batch"]], dict[str, Trees]]:
        """Figures of each sentence by name, and its trees by the way they were chosen."""
        latents = posterior.sample(model, x, self.samples)
        first = torch.zeros_like(x.lengths)[:, None]
        trees = {
            "": latents.z.select(first),
            "_mbr": _minimum_bayes_risk(latents.z),
        }
        figures = {
            "words": x.lengths,
            "distinct_trees": latents.z.distinct_shapes(),
            "right_edge": _right_edge(latents.z),
        }
        # What is exact is of the grammar alone. Where rules see the parent it takes as long as many
        # M-steps, so that only final evaluations have it.
        whose = "exact" if model.normalised else "grammar"
        affordable = final or not isinstance(model, AnnotatedModel)
        exact = None
        if affordable and isinstance(model, GrammarModel) and model.tractable:
            exact = model.exact_posterior(x)
        log_likelihood = model.log_likelihood(x) if exact is None else exact.log_likelihood
        if log_likelihood is not None:
            figures["log_likelihood"] = log_likelihood
        if latents.log_weights is not None:
            figures["effective_samples"] = 1 / latents.log_weights.softmax(-1).square().sum(-1)
            every = [latents]
            if final:
                every += self._more_latents(model, posterior, x)
            log_weights, log_priors = _log_weights(model, every)
            figures["iw_log_likelihood"] = log_mean_exp(log_weights - log_priors)
            figures |= _fit(model, log_likelihood, log_weights)
        if self.divergences:
            figures |= divergences.rate(model, posterior, x)
        if affordable and isinstance(model, TractableModel) and model.tractable:
            sample = partial(model.sample_posterior, x) if exact is None else exact.sample
            drawn = sample(self.samples)
            figures[f"distinct_{whose}_trees"] = drawn.distinct_shapes()
            figures[f"right_{whose}_edge"] = _right_edge(drawn)
        if exact is not None:
            trees[f"_{whose}_mbr"] = inside.minimum_bayes_risk(exact.span_marginals(), x.lengths)
        if isinstance(model, ParsingModel) and final:
            trees["_viterbi"], _ = inside.viterbi(model.potentials(x))
        return figures, trees

    def _more_latents(
        self, model: LatentVariableModel, posterior: Posterior, x: Sentences
    ) -> list[Latents]:
        """As many draws beside `samples` as make `iw_samples`."""
        missing = self.iw_samples - self.samples
        counts = [min(self.samples, missing - n) for n in range(0, missing, self.samples)]
        return [posterior.sample(model, x, count) for count in counts]

    def _baselines(self, corpus: Corpus) -> Metrics:
        """F1 of trees that take no notice of the words, and the way that gold trees branch."""
        if corpus.gold is None:
            return {}
        counts: dict[str, list[SpanCounts]] = {}
        for x in corpus.batches(self.batch_size):
            gold = [corpus.gold[i] for i in x.ids.tolist()]
            shapes = {
                "left": Trees.left_branching(x.lengths),
                "right": Trees.right_branching(x.lengths),
                "random": Trees.random(x.lengths, self.samples),
            }
            for name, trees in shapes.items():
                counts.setdefault(name, []).append(SpanCounts.of(trees, gold))
        at_right_edge = [
            end == len(words)
            for words, spans in zip(corpus.sentences, corpus.gold, strict=True)
            for start, end in spans
            if len(words) >= LONG and (start, end) != (0, len(words))
        ]
        metrics = {}
        if at_right_edge:
            metrics["baseline/gold_right_edge"] = sum(at_right_edge) / len(at_right_edge)
        for name, parts in counts.items():
            total = SpanCounts.cat(parts)
            metrics[f"baseline/{name}_f1"] = total.sentence_f1
            metrics[f"baseline/{name}_corpus_f1"] = total.corpus_f1
        return metrics

    def report(self, model: LatentVariableModel, posterior: Posterior, run: Run) -> None:
        """Learning curves, parses of a few test sentences, and F1 beside that of trivial trees.

        The F1 values are those of the last final evaluation on the test split, which is made now
        if there was none.
        """
        from gfnem.run.plots import bar_table, draw_trees, learning_curves

        run.add_figure("learning_curves", learning_curves(run.metrics()))

        corpus = self.data.test
        chosen = _shown(corpus)
        words = [corpus.sentences[i] for i in chosen]
        x = corpus.batch(chosen)
        mbr = parse(model, posterior, x, words, "mbr", self.samples)
        sample = parse(model, posterior, x, words, "sample")
        gold = [corpus.gold_trees[i] if corpus.gold_trees else None for i in chosen]
        run.add_figure(
            "trees",
            draw_trees(
                [
                    (f"test sentence {i}", predicted, right)
                    for i, predicted, right in zip(chosen, mbr, gold, strict=True)
                ]
            ),
        )
        run.add_table(
            "trees",
            ("sentence", "MBR tree", "sampled tree", "gold tree"),
            [
                (
                    " ".join(said),
                    bracketed(best),
                    bracketed(drawn),
                    bracketed(right) if right else "",
                )
                for said, best, drawn, right in zip(words, mbr, sample, gold, strict=True)
            ],
        )
        if corpus.gold is None:
            return
        scores = self._tested or self(model, posterior, "test", final=True)
        keys = {
            shown: (f"baseline/{name}_f1", f"baseline/{name}_corpus_f1")
            for name, shown in BASELINES.items()
        } | {
            shown: (f"test/sentence_f1{name}", f"test/corpus_f1{name}")
            for name, shown in DECODED.items()
            if f"test/sentence_f1{name}" in scores
        }
        rows = {shown: [scores[key] for key in pair] for shown, pair in keys.items()}
        columns = ("sentence F1", "corpus F1")
        figure = bar_table(
            {shown: dict(zip(columns, f1, strict=True)) for shown, f1 in rows.items()},
            title="F1 of unlabelled spans (%)",
            own=DECODED["_mbr"],
        )
        run.add_figure("f1", figure)
        run.add_table("f1", ("trees", *columns), [(shown, *f1) for shown, f1 in rows.items()])


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
        "marginals", that of exact span marginals where there are any (`ensemble.span_marginals`);
        "sample", one draw of q; "viterbi", the best tree of a context-free grammar, whose tree
        prior, if any, has no part in it.

    Raises UserError for another `decode`, and for "viterbi" where the grammar is not context-free.
    """
    x = x.to(device_of(model))
    with inference(model, posterior):
        if decode == "mbr":
            trees = _minimum_bayes_risk(posterior.sample(model, x, samples).z)
        elif decode == "marginals":
            marginals = ensemble.span_marginals(model, posterior, x, samples)
            trees = ensemble.decode_marginals(marginals, x.lengths)
        elif decode == "sample":
            trees = posterior.sample(model, x, 1).z
        elif decode != "viterbi":
            raise UserError(f"decode is {decode!r}; use 'mbr', 'marginals', 'sample' or 'viterbi'")
        elif not isinstance(model, ParsingModel):
            raise UserError(
                f"decode=viterbi needs a context-free grammar, which {type(model).__name__} is "
                "not: use decode=mbr or decode=sample"
            )
        else:
            trees, _ = inside.viterbi(model.potentials(x))
        if trees.labels is None and isinstance(model, GrammarModel):
            trees = model.sample_labels(model.potentials(x), trees)
    return [trees.to_nltk(sentence, said) for sentence, said in enumerate(words)]


def bracketed(tree: Tree) -> str:
    """The tree on one line; round brackets in words become -LRB- and -RRB-."""
    tree = tree.copy(deep=True)
    for position in tree.treepositions("leaves"):
        tree[position] = str(tree[position]).replace("(", "-LRB-").replace(")", "-RRB-")
    return tree.pformat(margin=sys.maxsize)


def _minimum_bayes_risk(trees: Trees) -> Trees:
    """The tree whose spans are the most frequent among each sentence's samples."""
    return ensemble.decode_marginals(ensemble.span_frequencies(trees), trees.lengths)


def _log_weights(
    model: LatentVariableModel, drawn: Sequence[Latents]
) -> tuple[Float[Tensor, "batch samples"], Float[Tensor, "batch samples"]]:
    """Of all draws, and what a tree prior adds to them."""
    weights, priors = [], []
    for latents in drawn:
        assert latents.log_weights is not None
        weights.append(latents.log_weights)
        is_grammar = isinstance(model, GrammarModel)
        zero = torch.zeros_like(latents.log_weights)
        priors.append(model.log_prior_weight(latents.z) if is_grammar else zero)
    return torch.cat(weights, 1), torch.cat(priors, 1)


def _fit(
    model: LatentVariableModel,
    log_likelihood: Float[Tensor, "batch"] | None,
    log_weights: Float[Tensor, "batch samples"],
) -> dict[str, Float[Tensor, "batch"]]:
    """What tells how near q is to the posterior."""
    if not model.normalised:
        return {
            "free_energy": -log_weights.mean(-1),
            "iw_free_energy": -log_mean_exp(log_weights),
        }
    if log_likelihood is None:
        return {}
    return {"posterior_gap": log_likelihood - log_weights.mean(-1)}


def _right_edge(trees: Trees) -> Float[Tensor, "batch"]:
    """The share of non-trivial spans that end at the sentence's right edge; 0 without any."""
    lengths = trees.lengths[:, None, None]
    ends_there = (trees.start > 0) & (trees.end == lengths)
    return ends_there.sum(-1).double().mean(-1) / (trees.lengths - 2).clamp(min=1)


def _summarise(figures: dict[str, Float[Tensor, "sentences"]]) -> Metrics:
    """Sentences' figures as metrics; those that no sentence is long enough for are left out."""
    words = figures["words"]
    metrics: dict[str, Tensor] = {}
    if "log_likelihood" in figures:
        nll = -figures["log_likelihood"].sum() / words.sum()
        metrics |= {"nll_per_token": nll, "perplexity": nll.exp()}
    if "iw_log_likelihood" in figures:
        metrics["iw_nll_per_token"] = -figures["iw_log_likelihood"].sum() / words.sum()
    for name in (
        "posterior_gap",
        "free_energy",
        "iw_free_energy",
        "effective_samples",
        *divergences.NAMES,
    ):
        if name in figures:
            metrics[name] = figures[name].mean()
    is_long = words >= LONG
    if is_long.any():
        inner = (words - 2)[is_long]
        for distinct, right in (
            ("distinct_trees", "right_edge"),
            ("distinct_exact_trees", "right_exact_edge"),
            ("distinct_grammar_trees", "right_grammar_edge"),
        ):
            if distinct in figures:
                metrics[distinct] = figures[distinct][is_long].mean()
                metrics[right] = (figures[right][is_long] * inner).sum() / inner.sum()
    return {name: float(value) for name, value in metrics.items()}


def _shown(corpus: Corpus) -> list[int]:
    """The sentences of a corpus that a report shows, of those that are good to draw if any."""
    numbers = range(len(corpus.sentences))
    fitting = [i for i in numbers if len(corpus.sentences[i]) in SHOWN_LENGTHS]
    return (fitting or list(numbers))[:SHOWN]
