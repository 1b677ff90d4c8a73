"""Rating grammars and their posteriors on held-out sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gfnem import divergences
from gfnem.errors import UserError
from gfnem.gradients import gradient_noise
from gfnem.inference import device_of, inference, log_mean_exp
from gfnem.latents import Latents
from gfnem.model import LatentVariableModel, TractableModel
from gfnem.posterior import Posterior
from gfnem.run.progress import counted
from gfnem.tasks.grammar.decode import minimum_bayes_risk
from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.text.corpus import Corpus, GrammarData, Sentences
from gfnem.tasks.grammar.trees.f1 import SpanCounts
from gfnem.tasks.grammar.trees.scores import SentenceScores, baseline
from gfnem.tasks.grammar.trees.tree import Trees
from gfnem.training.parts import Metrics

if TYPE_CHECKING:
    from gfnem.run import Run

# What is minimised on the validation split.
SELECTIONS = {
    "likelihood": "valid/nll_per_token",
    "posterior_gap": "valid/posterior_gap",
    "f1": "valid/f1_error",
}
# Shorter sentences have too few trees to tell a posterior that has collapsed from one that has not.
LONG = 8


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
            these shapes on the split; final only. Of anything but train, valid and test they are
            named after it: seen_text/baseline_left_f1.
        baseline/gold_right_edge: right_edge, as below, of the gold trees; final only.
        sentence_f1_low, sentence_f1_high and the same for every sentence_f1...: ends of the 95 %
            interval over sentences, see `gfnem.bootstrap`; final only.
        sentence_f1_over_right with _low and _high and the same for every sentence_f1...: what it is
            above right-branching trees of the same sentences, and its interval; final only.
        f1_error: 100 - sentence_f1_mbr; where it selects, not in final evaluations.
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
    tree prior train/free_energy. They also rate the data's further tests, with `samples` draws, as
    `seen_text/...`.

    Sentences of other lengths, in final evaluations: of a split's sentences to 10 words, one of the
    `lengths`, there are all F1 values as `test_to_10/...`; where the data has a longer test, those
    of all its sentences as `test_to_40/...` beside the test's. What is of the grammar alone knows
    no longest sentence. Draws of q go beyond the lengths that q has learned: an encoder takes
    spans to be no wider and roots to be no further behind than it has seen.

    data: what to rate on.
    samples: draws of q for each sentence.
    iw_samples: draws for the bound in final evaluations; others and further tests use `samples`.
    batch_size: sentences at a time.
    train_sentences: how many of the training sentences are rated.
    select: what is minimised on the validation split: "likelihood" (nll_per_token, or the bound
        for a model without an exact likelihood), "posterior_gap" (with a tree prior the free
        energy), for a model that is not trained, or "f1" (f1_error), which takes trees to choose
        what learned without: a supervised choice.
    divergences: whether to list q(z | x) of every z; for shapes of sentences of up to 6 words.
    gradient_e_steps: E-steps whose gradients are compared; None for none.
    lengths: F1 is also given of the sentences of up to so many words each.

    Raises UserError for an option out of its range, and for select="f1" without trees.
    """

    def __init__(
        self,
        data: GrammarData,
        samples: int = 16,
        iw_samples: int = 128,
        batch_size: int = 64,
        train_sentences: int = 256,
        select: Literal["likelihood", "posterior_gap", "f1"] = "likelihood",
        divergences: bool = False,
        gradient_e_steps: int | None = None,
        lengths: Sequence[int] = (10,),
    ):
        for name, value, least in (
            ("samples", samples, 1),
            ("iw_samples", iw_samples, samples),
            ("batch_size", batch_size, 1),
            ("train_sentences", train_sentences, 1),
            ("lengths", min(lengths, default=2), 2),
        ):
            if value < least:
                raise UserError(f"evaluator.{name} is {value}; it must be at least {least}")
        self.data = data
        self.samples = samples
        self.iw_samples = iw_samples
        self.batch_size = batch_size
        if select not in SELECTIONS:
            raise UserError(
                f"evaluator.select is {select!r}; use 'likelihood', 'posterior_gap' or 'f1'"
            )
        if select == "f1" and data.valid.gold is None:
            raise UserError(
                "evaluator.select='f1' needs trees of the validation sentences, and there are "
                "none: use 'likelihood'"
            )
        self.train_sentences = train_sentences
        self.divergences = divergences
        self.gradient_e_steps = gradient_e_steps
        self.select = select
        self.lengths = lengths
        self._tested: Metrics = {}
        self._scores: dict[str, SentenceScores] = {}

    def __call__(
        self, model: LatentVariableModel, posterior: Posterior, split: str, final: bool = False
    ) -> Metrics:
        draws = self.iw_samples if final else self.samples
        metrics, scores = self._rate_split(model, posterior, split, final, draws)
        if self.gradient_e_steps is not None:
            batch = self.data.train_batches(0)[0].to(device_of(model))
            of_gradients = gradient_noise(model, posterior, batch, self.gradient_e_steps)
            metrics |= {f"train/{name}": value for name, value in of_gradients.items()}
        if self.select == "f1" and scores is not None and not final:
            metrics[f"{split}/f1_error"] = 100 - metrics[f"{split}/sentence_f1_mbr"]
        if final and scores is not None:
            metrics |= self._shorter(split, scores)
        if final and split == "test":
            metrics |= self._train_fit(model, posterior)
            tests = {} if scores is None else {split: scores}
            metrics |= self._further_tests(model, posterior, tests)
            self._tested, self._scores = metrics, tests
        return metrics

    def selection(self, model: LatentVariableModel) -> str:
        """Name the metric that is minimised: a bound where the model has no exact likelihood."""
        exact = isinstance(model, TractableModel) and model.tractable
        if self.select == "likelihood" and not exact:
            return "valid/iw_nll_per_token"
        if self.select == "posterior_gap" and not model.normalised:
            return "valid/free_energy"
        return SELECTIONS[self.select]

    def _rate_split(
        self, model: LatentVariableModel, posterior: Posterior, split: str, final: bool, draws: int
    ) -> tuple[Metrics, SentenceScores | None]:
        """Metrics of a split, and its sentences' scores where there are gold trees.

        draws: of q, for the bound on the likelihood.
        """
        corpus = self.data.split(split)
        batches = corpus.batches(self.batch_size)
        figures, scores = self._rate_all(model, posterior, corpus, batches, final, draws)
        rated = _summarise(figures)
        if "iw_nll_per_token" in rated:
            rated["iw_samples"] = draws
        metrics = {f"{split}/{name}": value for name, value in rated.items()}
        if scores is not None:
            metrics |= scores.final_metrics(split) if final else scores.metrics(split)
        if final and (at_right_edge := _gold_right_edge(corpus)) is not None:
            metrics[baseline(split, "gold_right_edge")] = at_right_edge
        return metrics, scores

    def _rate_all(
        self,
        model: LatentVariableModel,
        posterior: Posterior,
        corpus: Corpus,
        batches: Sequence[Sentences],
        final: bool,
        draws: int,
    ) -> tuple[dict[str, Float[Tensor, "sentences"]], SentenceScores | None]:
        """Figures of some of a corpus's sentences, and scores where there are gold trees."""
        figures: dict[str, list[Tensor]] = {}
        scores = []
        with inference(model, posterior):
            for x in counted(batches):
                rated, decoded = self._rate(model, posterior, x.to(device_of(model)), final, draws)
                for name, values in rated.items():
                    figures.setdefault(name, []).append(values.double())
                if corpus.gold is not None:
                    gold = [corpus.gold[i] for i in x.ids.tolist()]
                    ways = {
                        name: SpanCounts.of(trees, gold).cpu() for name, trees in decoded.items()
                    }
                    scores.append(SentenceScores(x.ids, x.lengths, ways))
        together = SentenceScores.cat(scores) if scores else None
        if final and together is not None and corpus.gold is not None:
            together = together.with_baselines(corpus.gold, self.samples, self.batch_size)
        return {name: torch.cat(parts) for name, parts in figures.items()}, together

    def _shorter(self, split: str, scores: SentenceScores) -> Metrics:
        """F1 of a split's sentences of up to so many words, where some have more."""
        metrics: Metrics = {}
        for length in self.lengths:
            short = scores.words <= length
            if short.any() and not short.all() and split != self.data.long_test:
                metrics |= scores.select(short).final_metrics(f"{split}_to_{length}")
        return metrics

    def _further_tests(
        self, model: LatentVariableModel, posterior: Posterior, scores: dict[str, SentenceScores]
    ) -> Metrics:
        """Metrics of the data's further tests.

        scores: of the test, if it has gold trees; those of the further tests come to it.
        """
        metrics: Metrics = {}
        for split in self.data.more_tests:
            rated, of_split = self._rate_split(model, posterior, split, True, self.samples)
            metrics |= rated
            if of_split is not None:
                scores[split] = of_split
        long_test = self.data.long_test
        if long_test is None or "test" not in scores:
            return metrics
        # The longer test begins with the test's own sentences, which are rated already.
        corpus = self.data.split(long_test)
        own = (corpus.lengths <= self.data.max_length).nonzero().flatten()
        parts = [replace(scores["test"], ids=own[scores["test"].ids])]
        batches = corpus.batches(self.batch_size, above=self.data.max_length)
        _, longer = self._rate_all(model, posterior, corpus, batches, True, self.samples)
        if longer is not None:
            parts.append(longer)
        scores[long_test] = SentenceScores.cat(parts)
        return metrics | scores[long_test].final_metrics(long_test)

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
        self,
        model: LatentVariableModel,
        posterior: Posterior,
        x: Sentences,
        final: bool,
        draws: int,
    ) -> tuple[dict[str, Float[Tensor, "batch"]], dict[str, Trees]]:
        """Figures of each sentence by name, and its trees by the way they were chosen."""
        latents = posterior.sample(model, x, self.samples)
        first = torch.zeros_like(x.lengths)[:, None]
        trees = {
            "": latents.z.select(first),
            "_mbr": minimum_bayes_risk(latents.z),
        }
        figures = {
            "words": x.lengths,
            "distinct_trees": latents.z.distinct_shapes(),
            "right_edge": _right_edge(latents.z),
        }
        # What is exact is of the grammar alone. Where rules see the parent it takes as long as many
        # M-steps, so that only final evaluations have it.
        whose = "exact" if model.normalised else "grammar"
        affordable = final or not isinstance(model, GrammarModel) or model.context_free
        exact = None
        if affordable and isinstance(model, GrammarModel) and model.tractable:
            exact = model.exact_posterior(x)
        log_likelihood = model.log_likelihood(x) if exact is None else exact.log_likelihood
        if log_likelihood is not None:
            figures["log_likelihood"] = log_likelihood
        if latents.log_weights is not None:
            figures["effective_samples"] = 1 / latents.log_weights.softmax(-1).square().sum(-1)
            every = [latents, *self._more_latents(model, posterior, x, draws - self.samples)]
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
        if isinstance(model, GrammarModel) and model.context_free and final:
            trees["_viterbi"], _ = inside.viterbi(model.potentials(x))
        return figures, trees

    def _more_latents(
        self, model: LatentVariableModel, posterior: Posterior, x: Sentences, missing: int
    ) -> list[Latents]:
        """As many draws beside the first `samples` as are missing."""
        counts = [min(self.samples, missing - n) for n in range(0, missing, self.samples)]
        return [posterior.sample(model, x, count) for count in counts]

    def report(self, model: LatentVariableModel, posterior: Posterior, run: Run) -> None:
        """Learning curves, parses of a few test sentences, and F1 beside that of trivial trees.

        The F1 values, and the tables of each sentence's, are those of the last final evaluation on
        the test split, which is made now if there was none.
        """
        from gfnem.tasks.grammar import report

        report.add_curves(run)
        report.add_parses(run, self.data.test, model, posterior, self.samples)
        if self.data.test.gold is not None:
            if not self._tested:
                self(model, posterior, "test", final=True)
            report.add_f1(run, self._tested)
            report.add_scores(run, self._scores)


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


def _gold_right_edge(corpus: Corpus) -> float | None:
    """The share of gold trees' non-trivial spans that end at the sentence's right edge."""
    at_right_edge = [
        end == len(words)
        for words, spans in zip(corpus.sentences, corpus.gold or (), strict=corpus.gold is not None)
        for start, end in spans
        if len(words) >= LONG and (start, end) != (0, len(words))
    ]
    return sum(at_right_edge) / len(at_right_edge) if at_right_edge else None
