from __future__ import annotations

import csv
import zipfile
from math import exp, inf, log

import pytest
import torch
from torch import Tensor

from gfnem.errors import UserError
from gfnem.latents import EStep, Latents
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.posteriors.exact import ExactPosterior
from gfnem.run import Run
from gfnem.tasks.grammar.decode import parse
from gfnem.tasks.grammar.evaluate import GrammarEvaluator
from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.text import sources as grammar_data
from gfnem.tasks.grammar.text.corpus import Corpus, GrammarData
from gfnem.tasks.grammar.text.reading import Reading
from gfnem.tasks.grammar.text.walk import bracketed
from gfnem.tasks.grammar.trees.energy import Depth
from gfnem.tasks.grammar.trees.f1 import SpanCounts
from gfnem.tasks.grammar.trees.prior import TreePrior
from tests.tasks.grammar import oracle

# The binary trees over five words that have two spans each of the tree over (0, 2), (2, 5), (3, 5).
TWO_OF_THREE = [
    {(0, 2), (2, 5), (2, 4)},
    {(0, 2), (0, 3), (3, 5)},
    {(1, 5), (2, 5), (3, 5)},
]
BALANCED = {(0, 4), (4, 8), (0, 2), (2, 4), (4, 6), (6, 8)}


def left(length: int) -> oracle.Shape:
    return frozenset((0, end) for end in range(2, length + 1))


def right(length: int) -> oracle.Shape:
    return frozenset((start, length) for start in range(length - 1))


def whole(length: int, *spans: tuple[int, int]) -> oracle.Shape:
    return frozenset({(0, length), *spans})


class Data(GrammarData):
    """Every split the same; sentences are lists of word ids."""

    def __init__(
        self,
        sentences: list[list[int]],
        gold: list[oracle.Shape] | None = None,
        more_tests: tuple[str, ...] = (),
    ):
        words = [[f"w{word}" for word in sentence] for sentence in sentences]
        trees = None
        if gold is not None:
            trees = [tree_of(*pair) for pair in zip(words, gold, strict=True)]
        word_ids = [torch.tensor(sentence) for sentence in sentences]
        corpus = Corpus(words, word_ids, gold, trees, {})
        self.corpora = dict.fromkeys(("train", "valid", "test", *more_tests), corpus)
        self.more_tests, self.long_test = list(more_tests), None


def tree_of(words: list[str], spans: oracle.Shape):
    """The nltk tree with these spans, of any number of children."""
    from nltk import Tree

    def build(i: int, j: int):
        children, at = [], i
        while at < j:
            ends = [b for a, b in spans if a == at and b <= j and (a, b) != (i, j)]
            end = max(ends, default=at + 1)
            children.append(words[at] if end == at + 1 else build(at, end))
            at = end
        return Tree("X", children)

    return build(0, len(words))


class FixedGrammar(GrammarModel):
    def __init__(self, grammar: DenseGrammar):
        super().__init__()
        self.fixed = grammar

    def grammar(self) -> DenseGrammar:
        return self.fixed

    def sample(self, n, generator=None):
        raise NotImplementedError


class Intractable(LatentVariableModel):
    def log_joint(self, x, z):
        raise NotImplementedError

    def sample(self, n, generator=None):
        raise NotImplementedError


class FixedPosterior(Posterior):
    """Gives the same trees, with the same weights, again and again.

    trees: of each sentence of the corpus, by its index.
    """

    def __init__(self, trees: list[list[oracle.Shape]], log_weights: Tensor | None = None):
        super().__init__()
        self.trees = trees
        self.log_weights = torch.zeros(len(trees), len(trees[0]))
        if log_weights is not None:
            self.log_weights = log_weights
        self.modes: set[bool] = set()

    def e_step(self, model, x) -> EStep:
        raise NotImplementedError

    def sample(self, model, x, samples: int) -> Latents:
        self.modes.add(self.training)
        chosen = [(self.trees[i] * samples)[:samples] for i in x.ids.tolist()]
        repeats = -(-samples // self.log_weights.shape[1])
        log_weights = self.log_weights[x.ids].repeat(1, repeats)[:, :samples]
        return Latents(oracle.to_trees(chosen, x.lengths), log_weights)


def right_branching_grammar() -> FixedGrammar:
    """S -> N0, N0 -> T N1 | T T, N1 -> T N0 | T T; five equally likely words."""
    binary = torch.full((2, 3, 3), -inf)
    binary[0, 2, 1] = binary[1, 2, 0] = log(0.75)
    binary[:, 2, 2] = log(0.25)
    grammar = oracle.context_free(
        torch.tensor([0.0, -inf]), binary, torch.full((1, 5), 1 / 5).log()
    )
    return FixedGrammar(grammar)


def counts(predicted: list[oracle.Shape], gold: list[oracle.Shape], lengths: list[int]):
    trees = oracle.to_trees([[tree] for tree in predicted], torch.tensor(lengths))
    return SpanCounts.of(trees, gold)


def test_gold_against_gold_scores_100():
    gold = [whole(5, (0, 2), (2, 5), (3, 5)), left(6), right(4), left(2), right(2)]
    found = counts(gold, gold, [5, 6, 4, 2, 2])
    assert found.sentence_f1 == found.corpus_f1 == 100


def test_f1_of_a_hand_worked_case():
    # Two of three predicted spans are among the three gold ones; a flat gold tree has none to
    # find; two words have none on either side.
    gold = [whole(5, (0, 2), (2, 5), (3, 5), (0, 1)), whole(4), whole(2)]
    found = counts([right(5), left(4), left(2)], gold, [5, 4, 2])
    assert found.correct.tolist() == [2, 0, 0]
    assert found.predicted.tolist() == [3, 2, 0]
    assert found.gold.tolist() == [3, 0, 0]
    assert found.sentence_f1 == pytest.approx((200 / 3 + 0 + 100) / 3)
    assert found.corpus_f1 == pytest.approx(100 * 4 / 8)


def test_f1_counts_every_sample_as_a_tree():
    trees = oracle.to_trees([[left(4), right(4)], [left(3), left(3)]], torch.tensor([4, 3]))
    found = SpanCounts.of(trees, [whole(4, (1, 4)), whole(3, (0, 2))])
    assert found.sentence_f1 == pytest.approx((0 + 200 / 3 + 100 + 100) / 4)
    assert found.corpus_f1 == pytest.approx(100 * 6 / 10)


def test_f1_of_trivial_trees_on_the_treebank(real_data, tmp_path):
    # The validation files alone: reading all of them takes long.
    names = [f"treebank/combined/wsj_{number:04}.mrg" for number in range(160, 180)]
    with zipfile.ZipFile(real_data / "nltk_data" / "corpora" / "treebank.zip") as archive:
        archive.extractall(tmp_path, names)
    files = [str(tmp_path / name) for name in names]
    data = grammar_data.bracketed(train=files[:1], valid=files, test=files[:1])
    assert len(data.valid) == 145
    posterior = FixedPosterior([[right(len(words))] for words in data.valid.sentences])
    evaluator = GrammarEvaluator(data, samples=1, iw_samples=1)
    metrics = evaluator(Intractable(), posterior, "valid", final=True)
    assert metrics["baseline/right_f1"] == metrics["valid/sentence_f1"]
    # As another program counts them.
    for name, sentence, corpus in (("right", 46.2, 44.1), ("left", 9.7, 8.9)):
        assert metrics[f"baseline/{name}_f1"] == pytest.approx(sentence, abs=0.051)
        assert metrics[f"baseline/{name}_corpus_f1"] == pytest.approx(corpus, abs=0.051)
    assert metrics["baseline/random_f1"] == pytest.approx(21, abs=4)


def test_likelihood_is_that_of_enumeration():
    grammar = oracle.random_grammar(seed=3)
    words, lengths = oracle.random_sentences([4, 2, 6, 3, 5], seed=4)
    sentences = [oracle.sentence(words, lengths, i) for i in range(5)]
    evaluator = GrammarEvaluator(Data(sentences), samples=2, iw_samples=4, batch_size=2)
    metrics = evaluator(FixedGrammar(grammar), ExactPosterior(), "valid")
    nll = -sum(oracle.log_partition(grammar, sentence) for sentence in sentences) / 20
    assert metrics["valid/nll_per_token"] == pytest.approx(nll, abs=1e-10)
    assert metrics["valid/perplexity"] == pytest.approx(exp(nll))
    assert evaluator.selection(FixedGrammar(grammar)) == "valid/nll_per_token"


def test_the_exact_posterior_leaves_no_gap():
    grammar = oracle.random_grammar(seed=5)
    evaluator = GrammarEvaluator(Data([[1, 2, 3, 4], [5, 6, 7]]), samples=4, iw_samples=8)
    metrics = evaluator(FixedGrammar(grammar), ExactPosterior(), "test", final=True)
    assert metrics["test/posterior_gap"] == pytest.approx(0, abs=1e-10)
    assert metrics["test/effective_samples"] == pytest.approx(4)
    assert metrics["test/iw_nll_per_token"] == pytest.approx(metrics["test/nll_per_token"])


def test_importance_weighted_figures_of_a_hand_worked_case():
    grammar = oracle.random_grammar(seed=6)
    sentences = [[1, 2, 3], [4, 5, 6, 7]]
    posterior = FixedPosterior(
        [[left(3)] * 2, [right(4)] * 2], torch.tensor([[1.0, 3.0], [0.2, 0.2]]).double().log()
    )
    evaluator = GrammarEvaluator(Data(sentences), samples=2, iw_samples=5)
    metrics = evaluator(FixedGrammar(grammar), posterior, "valid")
    bound = -(log(2) + log(0.2)) / 7
    log_likelihood = sum(oracle.log_partition(grammar, sentence) for sentence in sentences)
    assert metrics["valid/iw_samples"] == 2
    assert metrics["valid/iw_nll_per_token"] == pytest.approx(bound)
    assert metrics["valid/effective_samples"] == pytest.approx((16 / 10 + 2) / 2)
    gap = (log_likelihood - log(3) / 2 - log(0.2)) / 2
    assert metrics["valid/posterior_gap"] == pytest.approx(gap)
    # Five draws in chunks of 2, 2 and 1.
    metrics = evaluator(FixedGrammar(grammar), posterior, "valid", final=True)
    assert metrics["valid/iw_samples"] == 5
    bound = -(log((1 + 3 + 1 + 3 + 1) / 5) + log(0.2)) / 7
    assert metrics["valid/iw_nll_per_token"] == pytest.approx(bound)
    assert metrics["valid/effective_samples"] == pytest.approx((16 / 10 + 2) / 2)


def test_figures_with_a_tree_prior_are_named_after_what_they_are_of():
    """A prior of log 2 for each level: left-branching, three words have two and four three."""
    grammar = FixedGrammar(oracle.random_grammar(seed=6))
    sentences = [[1, 2, 3], [4, 5, 6, 7]]
    log_weights = torch.tensor([[1.0, 3.0], [0.2, 0.2]]).double().log()
    posterior = FixedPosterior([[left(3)] * 2, [right(4)] * 2], log_weights)
    evaluator = GrammarEvaluator(
        Data(sentences), samples=2, iw_samples=5, select="posterior_gap", train_sentences=2
    )
    without = evaluator(grammar, posterior, "test", final=True)
    assert evaluator.selection(grammar) == "valid/posterior_gap"
    grammar.tree_prior = TreePrior(Depth(), strength=log(2))
    metrics = evaluator(grammar, posterior, "test", final=True)
    assert evaluator.selection(grammar) == "valid/free_energy"
    for same in ("nll_per_token", "perplexity", "effective_samples", "distinct_trees"):
        assert metrics.get(f"test/{same}") == without.get(f"test/{same}")
    # Taken out of the weights, the prior multiplies them by 4 and by 8.
    bound = -(log(4 * 9 / 5) + log(8 * 0.2)) / 7
    assert metrics["test/iw_nll_per_token"] == pytest.approx(bound, abs=1e-6)
    mean_log = (2 * log(3) / 5, log(0.2))
    assert metrics["test/free_energy"] == pytest.approx(-sum(mean_log) / 2)
    assert metrics["test/iw_free_energy"] == pytest.approx(-(log(9 / 5) + log(0.2)) / 2)
    assert metrics["train/free_energy"] == pytest.approx(-(log(3) / 2 + log(0.2)) / 2)
    assert not any("exact" in key or "posterior_gap" in key for key in metrics)
    grammars = {key.replace("exact", "grammar") for key in without if "exact" in key}
    assert grammars <= set(metrics)


def test_distinct_trees_and_right_edge_of_a_hand_worked_case():
    data = Data([[0] * 8, [0] * 9, [0] * 7])
    posterior = FixedPosterior(
        [[left(8), right(8), whole(8, *BALANCED)], [left(9)] * 3, [right(7)] * 3]
    )
    metrics = GrammarEvaluator(data, samples=3)(Intractable(), posterior, "valid")
    # Seven words are too few to count. Of 3 * 6 + 3 * 7 spans 0 + 6 + 2 end at the right edge.
    assert metrics["valid/distinct_trees"] == (3 + 1) / 2
    assert metrics["valid/right_edge"] == pytest.approx(8 / 39)


def test_short_sentences_alone_tell_nothing_of_the_posteriors_variety():
    evaluator = GrammarEvaluator(Data([[0] * 7]), samples=1)
    metrics = evaluator(right_branching_grammar(), FixedPosterior([[left(7)]]), "valid")
    assert not any("distinct" in key or "edge" in key for key in metrics)


def test_the_grammars_own_trees_are_rated_beside_the_posteriors():
    data = Data([[0] * 8, [1] * 5], [right(8), left(5)])
    posterior = FixedPosterior([[left(8)] * 2, [left(5)] * 2])
    evaluator = GrammarEvaluator(data, samples=2)
    metrics = evaluator(right_branching_grammar(), posterior, "test", final=True)
    assert metrics["test/distinct_trees"] == metrics["test/distinct_exact_trees"] == 1
    assert (metrics["test/right_edge"], metrics["test/right_exact_edge"]) == (0, 1)
    # The sentence of five words is too short to tell.
    assert metrics["baseline/gold_right_edge"] == 1
    for name in ("", "_mbr"):
        assert metrics[f"test/sentence_f1{name}"] == 50
        assert metrics[f"test/corpus_f1{name}"] == pytest.approx(100 * 3 / 9)
    for name in ("_exact_mbr", "_viterbi"):
        assert metrics[f"test/sentence_f1{name}"] == 50
        assert metrics[f"test/corpus_f1{name}"] == pytest.approx(100 * 6 / 9)
    assert metrics["baseline/left_corpus_f1"] == metrics["test/corpus_f1"]
    assert metrics["baseline/right_corpus_f1"] == metrics["test/corpus_f1_viterbi"]
    assert 0 < metrics["baseline/random_f1"] < 100
    assert 0 < metrics["baseline/random_corpus_f1"] < 100


def test_the_way_that_gold_trees_branch():
    # Of twelve spans that are no whole sentence, (4, 8) and (6, 8) end with theirs.
    data = Data([[0] * 8, [1] * 8, [1] * 5], [frozenset(BALANCED | {(0, 8)}), left(8), right(5)])
    posterior = FixedPosterior([[left(8)], [left(8)], [left(5)]])
    evaluator = GrammarEvaluator(data, samples=1, iw_samples=1)
    metrics = evaluator(Intractable(), posterior, "test", final=True)
    assert metrics["baseline/gold_right_edge"] == pytest.approx(2 / 12)
    data = Data([[1] * 5], [right(5)])
    metrics = GrammarEvaluator(data, samples=1, iw_samples=1)(
        Intractable(), FixedPosterior([[left(5)]]), "test", final=True
    )
    assert "baseline/gold_right_edge" not in metrics


def test_evaluations_during_training_leave_out_what_is_slow():
    data = Data([[0] * 8], [right(8)])
    posterior = FixedPosterior([[left(8)] * 2])
    metrics = GrammarEvaluator(data, samples=2)(right_branching_grammar(), posterior, "valid")
    assert "valid/sentence_f1_exact_mbr" in metrics
    assert not any("viterbi" in key or "baseline" in key for key in metrics)


def test_an_evaluation_needs_one_chart_of_a_batch(monkeypatch):
    made, of = [], inside.Chart.of

    def counted(*arguments):
        made.append(arguments)
        return of(*arguments)

    monkeypatch.setattr(inside.Chart, "of", staticmethod(counted))
    posterior = FixedPosterior([[left(8)] * 2])
    evaluator = GrammarEvaluator(Data([[0] * 8], [right(8)]), samples=2)
    evaluator(right_branching_grammar(), posterior, "valid")
    assert len(made) == 1
    # The exact posterior's draws and their weights are of one, too.
    evaluator(right_branching_grammar(), ExactPosterior(), "valid")
    assert len(made) == 3


def test_minimum_bayes_risk_takes_the_most_frequent_spans():
    gold = whole(5, (0, 2), (2, 5), (3, 5))
    samples = [whole(5, *spans) for spans in TWO_OF_THREE]
    data = Data([[0] * 5], [gold])
    metrics = GrammarEvaluator(data, samples=3)(Intractable(), FixedPosterior([samples]), "valid")
    assert metrics["valid/sentence_f1"] == pytest.approx(200 / 3)
    assert metrics["valid/sentence_f1_mbr"] == 100


def test_minimum_bayes_risk_breaks_ties_to_neither_side():
    data = Data([[0] * 3] * 100, [right(3)] * 100)
    posterior = FixedPosterior([[left(3), right(3)]] * 100)
    torch.manual_seed(0)
    metrics = GrammarEvaluator(data, samples=2)(Intractable(), posterior, "valid")
    assert 30 < metrics["valid/sentence_f1_mbr"] < 70


def test_f1_of_short_sentences_is_that_of_the_same_draws():
    data = Data([[0] * 8, [1] * 5, [1] * 3], [right(8), left(5), left(3)])
    posterior = FixedPosterior([[left(8)], [left(5)], [right(3)]])
    evaluator = GrammarEvaluator(data, samples=1, iw_samples=1, lengths=[5, 8, 2])
    metrics = evaluator(Intractable(), posterior, "test", final=True)
    assert metrics["test/sentence_f1_mbr"] == pytest.approx(100 / 3)
    assert metrics["test_to_5/sentence_f1_mbr"] == 50
    assert metrics["test_to_5/corpus_f1_mbr"] == 75
    assert metrics["test_to_5/baseline_right_f1"] == 0
    assert metrics["test_to_5/sentence_f1_mbr_over_right"] == 50
    # All sentences have up to 8 words, and none has up to 2.
    assert not any(key.startswith(("test_to_8", "test_to_2")) for key in metrics)
    metrics = evaluator(Intractable(), posterior, "valid")
    assert not any("_to_5" in key or "_low" in key or "over" in key for key in metrics)


def test_further_tests_have_names_and_baselines_of_their_own():
    data = Data([[0] * 8, [1] * 5], [right(8), left(5)])
    posterior = FixedPosterior([[left(8)] * 2, [left(5)] * 2])
    evaluator = GrammarEvaluator(data, samples=2, iw_samples=6, lengths=[])
    alone = evaluator(right_branching_grammar(), posterior, "test", final=True)
    other = Data([[0] * 8], [left(8)]).test
    data.corpora["seen_text"] = other
    data.more_tests.append("seen_text")
    metrics = evaluator(right_branching_grammar(), posterior, "test", final=True)
    seen = {key: value for key, value in metrics.items() if key.startswith("seen_text/")}
    random = {"baseline/random_f1", "baseline/random_corpus_f1"}
    assert {k: v for k, v in metrics.items() if k not in seen.keys() | random} == {
        k: v for k, v in alone.items() if k not in random
    }
    assert (metrics["test/iw_samples"], seen["seen_text/iw_samples"]) == (6, 2)
    assert seen["seen_text/sentence_f1_mbr"] == seen["seen_text/baseline_left_f1"] == 100
    assert seen["seen_text/sentence_f1_mbr_over_right"] == 100
    assert seen["seen_text/baseline_gold_right_edge"] == 0
    assert seen["seen_text/nll_per_token"] > 0
    # Rated on its own, it has all the draws.
    own = evaluator(right_branching_grammar(), posterior, "seen_text", final=True)
    assert own["seen_text/iw_samples"] == 6
    assert own.keys() == seen.keys()


class Counting(FixedPosterior):
    """Right-branching trees of whatever sentences; keeps how long they were."""

    def __init__(self):
        super().__init__([[right(2)]])
        self.rated: list[int] = []

    def sample(self, model, x, samples: int) -> Latents:
        self.rated += x.lengths.tolist()
        trees = [[right(length)] * samples for length in x.lengths.tolist()]
        return Latents(oracle.to_trees(trees, x.lengths), torch.zeros(len(x), samples))


def test_longer_tests_rate_each_sentence_once(tmp_path):
    longer = [left(7), right(6), right(3), left(4), right(9)]
    lengths = [7, 6, 3, 4, 9]
    trees = [tree_of(["w"] * n, z) for n, z in zip(lengths, longer, strict=True)]
    reading = Reading.of_trees(trees)
    data = GrammarData("", reading, reading, reading, 2, 4, 1, 2, 0, max_test_length=7)
    posterior = Counting()
    evaluator = GrammarEvaluator(data, samples=1, iw_samples=1, lengths=[3], train_sentences=1)
    data.corpora["train"] = Data([[1] * 3]).train
    run = Run.create(tmp_path / "run", {})
    metrics = evaluator(right_branching_grammar(), posterior, "test", final=True)
    # The short ones for the test, one for the fit to the training text, then the longer ones.
    assert posterior.rated == [3, 4, 3, 6, 7]
    assert metrics["test/sentence_f1"] == 50
    assert metrics["test_to_3/sentence_f1"] == 100
    assert metrics["test_to_7/sentence_f1"] == 50
    assert metrics["test_to_7/sentence_f1_over_right"] == 0
    # The exact trees branch to the right, however long.
    assert metrics["test_to_7/sentence_f1_viterbi"] == metrics["test_to_7/baseline_right_f1"] == 50
    spans = 4 + 1  # of 5 + 4 + 1 + 2
    assert metrics["test_to_7/corpus_f1"] == pytest.approx(100 * spans / 12)
    evaluator.report(right_branching_grammar(), posterior, run)
    columns, *rows = table(run, "scores_test_to_7")
    assert columns[:3] == ["sentence", "words", "sentence_f1"] and columns[-1] == "right_f1"
    assert [row[:3] for row in rows] == [
        ["0", "7", "0.0"],
        ["1", "6", "100.0"],
        ["2", "3", "100.0"],
        ["3", "4", "0.0"],
    ]
    assert [row[:3] for row in table(run, "scores_test")[1:]] == [
        ["0", "3", "100.0"],
        ["1", "4", "0.0"],
    ]
    alone = evaluator(right_branching_grammar(), posterior, "test_to_7", final=True)
    assert alone["test_to_7/sentence_f1"] == 50 and alone["test_to_7/nll_per_token"] > 0


def test_selection_by_f1_takes_the_trees_of_the_validation_sentences():
    data = Data([[0] * 5], [right(5)])
    evaluator = GrammarEvaluator(data, samples=1, select="f1")
    metrics = evaluator(Intractable(), FixedPosterior([[whole(5, *TWO_OF_THREE[2])]]), "valid")
    assert evaluator.selection(Intractable()) == "valid/f1_error"
    f1 = metrics["valid/sentence_f1_mbr"]
    assert 0 < f1 <= 100 and metrics["valid/f1_error"] == 100 - f1
    final = evaluator(right_branching_grammar(), FixedPosterior([[left(5)]]), "test", final=True)
    assert "test/f1_error" not in final
    with pytest.raises(UserError, match="select='f1' needs trees of the validation sentences"):
        GrammarEvaluator(Data([[0] * 5]), select="f1")
    wrong: dict = {"select": "nll"}
    with pytest.raises(UserError, match="select is 'nll'; use 'likelihood', 'posterior_gap' or"):
        GrammarEvaluator(data, **wrong)


def test_text_without_trees_has_no_f1():
    evaluator = GrammarEvaluator(Data([[0] * 8]), samples=1)
    posterior = FixedPosterior([[left(8)]])
    metrics = evaluator(right_branching_grammar(), posterior, "test", final=True)
    assert "test/nll_per_token" in metrics
    assert not any("f1" in key for key in metrics)


def test_models_without_a_likelihood_are_selected_by_the_bound():
    evaluator = GrammarEvaluator(Data([[0] * 8]), samples=1)
    metrics = evaluator(Intractable(), FixedPosterior([[left(8)]]), "valid")
    assert evaluator.selection(Intractable()) == "valid/iw_nll_per_token"
    assert set(metrics) == {
        "valid/iw_nll_per_token",
        "valid/iw_samples",
        "valid/effective_samples",
        "valid/distinct_trees",
        "valid/right_edge",
    }


def test_rating_runs_in_evaluation_mode_and_leaves_the_mode_as_it_was():
    model, posterior = right_branching_grammar(), FixedPosterior([[left(8)]])
    model.eval()
    GrammarEvaluator(Data([[0] * 8]), samples=1)(model, posterior, "valid")
    assert posterior.modes == {False}
    assert (model.training, posterior.training) == (False, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "evaluator.samples is 0; it must be at least 1"),
        ({"samples": 8, "iw_samples": 7}, "evaluator.iw_samples is 7; it must be at least 8"),
        ({"batch_size": 0}, "evaluator.batch_size is 0; it must be at least 1"),
        ({"lengths": [10, 1]}, "evaluator.lengths is 1; it must be at least 2"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        GrammarEvaluator(Data([[0, 1]]), **settings)


@pytest.mark.parametrize("decode", ["mbr", "marginals", "sample", "viterbi"])
def test_parse_labels_every_way_of_choosing_a_tree(decode):
    corpus = Data([[0, 1, 2], [0, 1, 2, 3]]).test
    trees = parse(
        right_branching_grammar(),
        ExactPosterior(),
        corpus.batch([0, 1]),
        corpus.sentences,
        decode,
        samples=2,
    )
    assert [bracketed(tree) for tree in trees] == [
        "(S (N0 w0 (N1 w1 w2)))",
        "(S (N0 w0 (N1 w1 (N0 w2 w3))))",
    ]


def test_parse_draws_labels_from_their_exact_posterior():
    grammar = oracle.random_grammar(nonterminals=2, seed=7)
    words = [1, 2, 3]
    corpus = Data([words] * 1000).test
    x = corpus.batch(list(range(1000)))
    torch.manual_seed(0)
    trees = parse(FixedGrammar(grammar), FixedPosterior([[left(3)]] * 1000), x, corpus.sentences)
    joint = oracle.enumerate_labelled(grammar, words)
    given = oracle.posterior({z: p for z, p in joint.items() if oracle.shape_of(z) == left(3)})
    for tree, probability in given.items():
        label = {(i, j): a for i, j, a in tree}
        text = f"(S (N{label[0, 3]} (N{label[0, 2]} w1 w2) w3))"
        share = sum(bracketed(found) == text for found in trees) / 1000
        assert share == pytest.approx(probability, abs=0.06)


def test_parse_keeps_the_labels_of_labelled_draws():
    model = right_branching_grammar()
    model.latent = "labelled"
    corpus = Data([[0, 1, 2]]).test
    (tree,) = parse(model, ExactPosterior(), corpus.batch([0]), corpus.sentences, "sample")
    assert bracketed(tree) == "(S (N0 w0 (N1 w1 w2)))"


def test_parse_without_a_context_free_grammar_leaves_nodes_unnamed():
    corpus = Data([[0, 1, 2]]).test
    posterior = FixedPosterior([[left(3)]])
    (tree,) = parse(Intractable(), posterior, corpus.batch([0]), corpus.sentences)
    assert bracketed(tree) == "(S (X w0 w1) w2)"
    with pytest.raises(
        UserError, match="decode=viterbi needs exact inference, for which this Intractable is too"
    ):
        parse(Intractable(), posterior, corpus.batch([0]), corpus.sentences, "viterbi")


def test_parse_refuses_an_unknown_way_to_decode():
    corpus = Data([[0, 1, 2]]).test
    wrong: dict = {"decode": "best"}
    with pytest.raises(UserError, match="decode is 'best'; use 'mbr', 'marginals', "):
        parse(Intractable(), ExactPosterior(), corpus.batch([0]), corpus.sentences, **wrong)


def test_brackets_in_words_are_no_brackets_of_the_tree():
    from nltk import Tree

    tree = Tree("S", [Tree("N0", ["(", "word"]), "a)"])
    assert bracketed(tree) == "(S (N0 -LRB- word) a-RRB-)"
    assert tree.leaves() == ["(", "word", "a)"]


def table(run: Run, name: str) -> list[list[str]]:
    with open(run.path / "tables" / f"{name}.csv") as file:
        return list(csv.reader(file))


def test_report_shows_parses_beside_gold_and_f1_beside_trivial_trees(tmp_path):
    data = Data([[0] * 8, [1] * 5], [right(8), left(5)])
    model, posterior = right_branching_grammar(), FixedPosterior([[left(8)] * 2, [left(5)] * 2])
    run = Run.create(tmp_path / "run", {})
    run.log({"valid/nll_per_token": 2.0, "valid/right_exact_edge": 0.5}, {"train/m_steps": 1})
    evaluator = GrammarEvaluator(data, samples=2)
    model.fixed = oracle.random_grammar(nonterminals=2, preterminals=1, vocabulary=5)
    metrics = evaluator(model, posterior, "test", final=True)
    evaluator.report(model, posterior, run)
    assert {path.stem for path in (run.path / "plots").iterdir()} == {
        "learning_curves",
        "trees",
        "f1",
    }
    rows = table(run, "f1")
    assert rows[0] == ["trees", "sentence F1", "corpus F1"]
    assert {row[0]: [float(value) for value in row[1:]] for row in rows[1:]} == {
        name: [metrics[sentence], metrics[corpus]]
        for name, sentence, corpus in (
            ("left-branching", "baseline/left_f1", "baseline/left_corpus_f1"),
            ("right-branching", "baseline/right_f1", "baseline/right_corpus_f1"),
            ("random", "baseline/random_f1", "baseline/random_corpus_f1"),
            ("posterior, sample", "test/sentence_f1", "test/corpus_f1"),
            ("posterior, MBR", "test/sentence_f1_mbr", "test/corpus_f1_mbr"),
            ("exact posterior, MBR", "test/sentence_f1_exact_mbr", "test/corpus_f1_exact_mbr"),
            ("Viterbi", "test/sentence_f1_viterbi", "test/corpus_f1_viterbi"),
        )
    }
    rows = table(run, "trees")
    assert rows[0] == ["sentence", "MBR tree", "sampled tree", "gold tree"]
    sentence, mbr, sample, gold = rows[2]
    assert sentence == "w1 w1 w1 w1 w1"
    for tree in (mbr, sample):
        bare = tree.replace("(N0 ", "(X ").replace("(N1 ", "(X ")
        assert bare == f"(S {gold})"


def test_report_without_gold_trees_has_no_f1(tmp_path):
    run = Run.create(tmp_path / "run", {})
    evaluator = GrammarEvaluator(Data([[0] * 3]), samples=2)
    evaluator.report(right_branching_grammar(), ExactPosterior(), run)
    assert {path.stem for path in (run.path / "tables").iterdir()} == {"trees"}
    assert table(run, "trees")[1][3] == ""


def test_report_rates_the_test_split_where_nothing_did(tmp_path):
    run = Run.create(tmp_path / "run", {})
    evaluator = GrammarEvaluator(Data([[0] * 3], [right(3)]), samples=2)
    evaluator.report(right_branching_grammar(), ExactPosterior(), run)
    assert ["Viterbi", "100.0", "100.0"] in table(run, "f1")
