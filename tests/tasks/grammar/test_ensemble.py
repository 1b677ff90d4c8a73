"""Ensembles of grammars held to averages of enumerated span marginals."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from nltk import Tree

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.latents import EStep, Latents
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.posteriors.exact import ExactPosterior
from gfnem.tasks.grammar import ensemble
from gfnem.tasks.grammar.decode import parse
from gfnem.tasks.grammar.model import GrammarModel
from gfnem.tasks.grammar.text.corpus import GrammarData, Vocabulary
from gfnem.tasks.grammar.text.reading import Reading
from gfnem.tasks.grammar.text.walk import bracketed
from gfnem.tasks.grammar.trees.energy import Depth
from gfnem.tasks.grammar.trees.prior import TreePrior
from gfnem.tasks.grammar.verbs import parse_ensemble
from tests.tasks.grammar import oracle
from tests.tasks.grammar.tiny import FixedModel

WORDS = ["<unk>", "a", "b", "c", "d"]
ORDERS = [WORDS, ["<unk>", "d", "b", "a", "c"], ["<unk>", "c", "a"]]
SENTENCES = [["a", "b", "c", "d", "a"], ["d", "c"], ["b", "b", "d", "e"]]


def data_of_words(
    words: Sequence[str] = WORDS, max_length: int = 8, trees: Sequence[str] | None = None
) -> GrammarData:
    gold = None if trees is None else [Tree.fromstring(tree) for tree in trees]
    sentences = SENTENCES if gold is None else [list(map(str, tree.leaves())) for tree in gold]
    reading = Reading(sentences, gold)
    vocabulary = Vocabulary(words)
    return GrammarData(
        "tiny", reading, reading, reading, 2, max_length, 1, 4, 0, vocabulary=vocabulary
    )


def random_run(seed: int, data: GrammarData | None = None) -> EM:
    data = data or data_of_words(ORDERS[seed])
    rules = oracle.random_grammar(2, 2, len(data.vocabulary), seed=seed, temperature=0.5)
    return EM(FixedModel(rules), ExactPosterior(), data, m_steps=1)


def marginals_by_enumeration(em: EM, words: Sequence[str]) -> torch.Tensor:
    assert isinstance(em.model, FixedModel) and isinstance(em.data, GrammarData)
    ids = [em.data.vocabulary.words.index(w) if w in em.data.vocabulary.words else 0 for w in words]
    table = torch.zeros(len(words) + 1, len(words) + 1, dtype=torch.float64)
    for span, probability in oracle.span_marginals(em.model.grammar(), ids).items():
        table[span] = probability
    return table


class Drawn(Posterior):
    """Draws the same shapes for every sentence, and counts how often it is asked."""

    def __init__(self, *shapes: oracle.Shape):
        super().__init__()
        self.shapes, self.asked = shapes, 0

    def e_step(self, model, x) -> EStep:
        raise NotImplementedError

    def sample(self, model, x, samples: int) -> Latents:
        self.asked += 1
        drawn = (list(self.shapes) * samples)[:samples]
        return Latents(oracle.to_trees([drawn] * len(x), x.lengths), None)


class NoGrammar(LatentVariableModel):
    def log_joint(self, x, z):
        raise NotImplementedError

    def sample(self, n, generator=None):
        raise NotImplementedError


LEFT = frozenset({(0, 3), (0, 2)})
RIGHT = frozenset({(0, 3), (1, 3)})


def drawing_run(*shapes: oracle.Shape, data: GrammarData | None = None) -> EM:
    return EM(NoGrammar(), Drawn(*shapes), data or data_of_words(), m_steps=1)


def test_the_average_is_that_of_enumeration_whatever_the_vocabularies():
    runs = [random_run(seed) for seed in range(3)]
    found = ensemble.marginals_of_runs(runs, SENTENCES, samples=1)
    expected = torch.zeros_like(found)
    for number, em in enumerate(runs):
        for index, words in enumerate(SENTENCES):
            size = len(words) + 1
            expected[number, index, :size, :size] = marginals_by_enumeration(em, words)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    average = expected.mean(0)
    trees = ensemble.parse(runs, SENTENCES)
    for index, (words, tree) in enumerate(zip(SENTENCES, trees, strict=True)):
        best = max(oracle.shapes(len(words)), key=lambda z: sum(average[index][s] for s in z))
        assert spans_of(tree) == best
        assert tree.leaves() == words
        labels = [node.label() for node in tree.subtrees()]
        assert labels == ["S", *["X"] * (len(words) - 2)]


def spans_of(tree: Tree) -> oracle.Shape:
    spans = set()

    def visit(node: Tree | str, start: int) -> int:
        if isinstance(node, str):
            return start + 1
        end = start
        for child in node:
            end = visit(child, end)
        spans.add((start, end))
        return end

    visit(tree, 0)
    return frozenset(spans)


def test_runs_whose_best_trees_differ_meet_at_what_both_find_probable():
    # Each run prefers a tree of its own, and a third one is second best in both.
    third = frozenset({(0, 5), (0, 2), (2, 5), (3, 5)})
    first = frozenset({(0, 5), (0, 4), (0, 3), (1, 3)})
    second = frozenset({(0, 5), (1, 5), (1, 4), (2, 4)})
    words = [["a"] * 5]
    runs = [drawing_run(*[own] * 3, *[third] * 2) for own in (first, second)]
    for em, own in zip(runs, (first, second), strict=True):
        (tree,) = ensemble.parse([em], words, samples=5)
        assert spans_of(tree) == own
    (tree,) = ensemble.parse(runs, words, samples=5)
    assert spans_of(tree) == third


def test_an_ensemble_of_one_is_the_run_itself():
    em = random_run(0)
    trees = ensemble.parse([em], SENTENCES)
    x = ensemble.encode(SENTENCES, ensemble.data_of(em))
    own = parse(em.model, em.posterior, x, SENTENCES, "marginals")
    assert [spans_of(tree) for tree in trees] == [spans_of(tree[0]) for tree in own]  # pyright: ignore
    assert all(tree[0].label() in ("N0", "N1") for tree in own)  # pyright: ignore


def test_a_model_that_is_not_tractable_is_judged_by_its_draws():
    em = drawing_run(LEFT, RIGHT, RIGHT, RIGHT)
    (marginals,) = ensemble.marginals_of_runs([em], [["a", "b", "c"]], samples=8)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[0, 3], expected[0, 2], expected[1, 3] = 1, 0.25, 0.75
    torch.testing.assert_close(marginals[0], expected)


def test_with_a_tree_prior_the_draws_count_and_not_the_grammar():
    em = random_run(0)
    assert isinstance(em.model, GrammarModel)
    em.posterior = drawn = Drawn(LEFT)
    ensemble.marginals_of_runs([em], [["a", "b", "c"]], samples=2)
    assert drawn.asked == 0
    em.model.tree_prior = TreePrior(Depth())
    (marginals,) = ensemble.marginals_of_runs([em], [["a", "b", "c"]], samples=2)
    assert drawn.asked == 1
    assert marginals[0, 0, 2] == 1


def test_ties_are_broken_to_neither_side():
    runs = [drawing_run(LEFT), drawing_run(RIGHT)]
    torch.manual_seed(0)
    trees = ensemble.parse(runs, [["a", "b", "c"]] * 200, samples=1)
    to_the_left = sum(spans_of(tree) == LEFT for tree in trees)
    assert 70 < to_the_left < 130
    # What is no tie is not left to chance.
    trees = ensemble.parse([*runs, drawing_run(LEFT)], [["a", "b", "c"]] * 200, samples=1)
    assert {spans_of(tree) for tree in trees} == {LEFT}


GOLD = ["(S (X a b) c)", "(S a (X b d))", "(S a (X b (X c d)))"]


def test_evaluate_puts_the_ensemble_beside_its_runs():
    data = data_of_words(max_length=3, trees=GOLD)
    runs = {
        "left": drawing_run(LEFT, data=data),
        "right": drawing_run(RIGHT, data=data),
        "mixed": drawing_run(LEFT, LEFT, RIGHT, data=data),
    }
    # The third sentence is too long for the data itself.
    assert ensemble.evaluate(runs, split="valid", samples=3) == {
        f"valid/{f1}_f1_{name}": 50.0
        for name in ("ensemble", "marginals/left", "marginals/right", "marginals/mixed")
        for f1 in ("sentence", "corpus")
    }
    only_left = data_of_words(max_length=3, trees=GOLD[:1])
    runs = {name: EM(em.model, em.posterior, only_left, 1) for name, em in runs.items()}
    metrics = ensemble.evaluate(runs, samples=3)
    found = {name.rpartition("_")[2]: value for name, value in metrics.items()}
    assert found == {
        "ensemble": 100,
        "marginals/left": 100,
        "marginals/right": 0,
        "marginals/mixed": 100,
    }


def test_evaluate_leaves_out_what_is_too_long_for_one_run(capsys):
    first = random_run(0, data_of_words(trees=GOLD))
    short = drawing_run(LEFT, data=data_of_words(max_length=3, trees=GOLD))
    metrics = ensemble.evaluate({"first": first, "short": short})
    assert metrics["test/sentence_f1_marginals/short"] == 50
    assert capsys.readouterr().err == (
        "1 of 3 sentences are left out: short was made for at most 3 words\n"
    )


def test_evaluate_refuses_what_cannot_be_rated():
    rated = random_run(0, data_of_words(trees=GOLD[2:]))
    with pytest.raises(UserError, match="samples is 0; it must be at least 1"):
        ensemble.evaluate({"rated": rated}, samples=0)
    with pytest.raises(UserError, match="the valid sentences of text have no trees: name another"):
        ensemble.evaluate({"text": random_run(1), "rated": rated}, split="valid")
    short = random_run(0, data_of_words(max_length=3, trees=GOLD[:2]))
    with pytest.raises(
        UserError, match="all test sentences of rated are longer than 3 words, for which short was"
    ):
        ensemble.evaluate({"rated": rated, "short": short})


def test_parse_ensemble_says_which_run_cannot_parse_a_sentence(tmp_path, capsys):
    runs = {"long": random_run(0), "short": random_run(1, data_of_words(ORDERS[2], 5))}
    file = tmp_path / "sentences.txt"
    file.write_text("a c a\na\n\na c a c a c\nb c\n")
    lines = list(parse_ensemble(runs, file=str(file)))
    (first,) = ensemble.parse(runs.values(), [["a", "c", "a"]])
    assert lines == [bracketed(first), "", "", "", "(S b c)"]
    assert capsys.readouterr().err.splitlines() == [
        "line 2: long: 'a' is one word, which has no tree",
        "line 4: short: 6 words, the model was made for at most 5",
        "line 5: short: unknown: b",
    ]


def test_parse_ensemble_refuses_other_ways_to_decode_and_no_draws():
    runs = {"one": random_run(0)}
    for way in ("mbr", "sample", "viterbi"):
        with pytest.raises(UserError, match=f"decode={way} is of one run: several are decoded"):
            list(parse_ensemble(runs, decode=way))
    with pytest.raises(UserError, match="samples is 0; it must be at least 1"):
        list(parse_ensemble(runs, samples=0))
