from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from gfnem.errors import UserError
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.tasks.grammar.evaluate import GrammarEvaluator
from gfnem.tasks.grammar.policies.root_flow import RootFlowPolicy
from gfnem.tasks.grammar.random_grammar import RandomPCFG, random_grammar
from tests.tasks.grammar.tiny import log_likelihood

SIZES: dict[str, Any] = {"nonterminals": 2, "preterminals": 3, "words": 3}
FEW = {"train_sentences": 30, "valid_sentences": 4, "test_sentences": 6}


def test_rules_are_normalised_and_random_as_the_seed_says():
    model = RandomPCFG(5, 2, 3, sharpness=3.0)
    grammar = model.grammar()
    for rules in (grammar.root, grammar.binary.flatten(2), grammar.emission):
        torch.testing.assert_close(rules.exp().sum(-1), torch.ones(rules.shape[:-1]))
    assert (grammar.emission[..., 0] == -torch.inf).all()
    assert grammar.binary.equal(RandomPCFG(5, 2, 3, sharpness=3.0).grammar().binary)
    assert not grammar.binary.equal(RandomPCFG(5, 2, 3, 3.0, rules_seed=1).grammar().binary)
    # As the logits' deviation grows, the largest of 25 rules takes more and more.
    largest = [
        float(RandomPCFG(5, 20, 5, sharpness).grammar().root.max().exp())
        for sharpness in (0.0, 1.0, 10.0)
    ]
    assert largest[0] == pytest.approx(1 / 20) and largest[0] < largest[1] < largest[2]


def test_sentences_have_the_frequencies_of_the_model():
    """Of two words, given their length, from the likelihood of each."""
    data = random_grammar(**SIZES, min_length=2, max_length=2, train_sentences=3000)
    model = RandomPCFG(4, 2, 3)
    assert model.is_truth and data.sizes() == {"vocabulary": 4, "max_length": 2}
    counts = Counter(tuple(sentence) for sentence in data.train.sentences)
    every = [(f"w{i}", f"w{j}") for i in range(1, 4) for j in range(1, 4)]
    words = torch.stack(data.encode(every))
    x = data.train.batch([0] * 9)
    x = type(x)(words, x.lengths, x.ids)
    p = log_likelihood(model, x).softmax(-1).tolist()
    found = [counts[sentence] / 3000 for sentence in every]
    assert found == pytest.approx(p, abs=0.03)
    assert max(p) > 0.2


def test_sentences_keep_to_their_sizes_and_to_the_seed():
    data, same = (random_grammar(**SIZES, **FEW, min_length=3, max_length=5) for _ in range(2))
    assert [len(split) for split in (data.train, data.valid, data.test)] == [30, 4, 6]
    assert data.train.gold is None and {*data.train.lengths.tolist()} <= {3, 4, 5}
    assert data.train.sentences == same.train.sentences
    assert data.train.sentences != random_grammar(**SIZES, **FEW, seed=1).train.sentences


def test_divergences_of_sentences_of_different_lengths():
    """A policy that is drawn at random is far from p, and its gap is the larger for its orders."""
    torch.manual_seed(0)
    data = random_grammar(**SIZES, **FEW, min_length=2, max_length=5)
    model = RandomPCFG(4, 2, 3, max_length=5)
    policy = RootFlowPolicy(2, 3, 5, width=8)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    evaluator = GrammarEvaluator(
        data, samples=200, iw_samples=200, divergences=True, gradient_e_steps=2
    )
    metrics = evaluator(model, GFlowNetPosterior(policy), "test")
    assert 0 < metrics["test/kl_q_p"] < metrics["test/posterior_gap"]
    assert metrics["test/kl_p_q"] > 0 and metrics["test/modes"] >= 1
    assert metrics["train/gradient_noise"] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"words": 0}, "data.words is 0; it must be at least 1"),
        ({"test_sentences": 0}, "data.test_sentences is 0; it must be at least 1"),
        ({"max_length": 1}, "data.max_length is 1; it must be at least 2"),
        ({"sharpness": -1.0}, "data.sharpness is -1.0; it must not be negative"),
        ({"nonterminals": 0}, "model.nonterminals is 0; it must be at least 1"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"^{message}$"):
        random_grammar(**{**SIZES, **FEW, **options})


def test_lengths_that_hardly_occur():
    message = r"^random_grammar: \d+ of 400 draws have 60 to 60 words where 2 are wanted: ask for"
    few = {"train_sentences": 1, "valid_sentences": 1, "test_sentences": 1}
    with pytest.raises(UserError, match=message.replace("400", "600").replace("2 are", "3 are")):
        random_grammar(1, 5, 3, min_length=60, max_length=60, **few)
