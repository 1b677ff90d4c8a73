from __future__ import annotations

from math import inf, log

import pytest
import torch

from gfnem.tasks.grammar.rules.dense import DenseGrammar
from tests.tasks.grammar import oracle


def test_tables_are_sums_over_preterminals():
    nonterminals, preterminals = 3, 4
    grammar = oracle.random_grammar(nonterminals, preterminals)
    words, lengths = oracle.random_sentences([3, 5], seed=1)
    potentials = grammar.potentials(words, lengths)
    root, binary, emission = (
        rule.exp().tolist() for rule in (grammar.root, grammar.binary[0], grammar.emission[0])
    )
    unscaled = potentials.log_scale.exp()
    assert potentials.root.tolist() == pytest.approx(root)
    assert potentials.lengths.tolist() == [3, 5]
    pre = range(preterminals)
    symbol = [nonterminals + t for t in pre]
    for s, length in enumerate((3, 5)):
        sentence = oracle.sentence(words, lengths, s)
        for a in range(nonterminals):
            for b in range(nonterminals):
                assert potentials.rules[a, 0, b].tolist() == pytest.approx(
                    binary[a][b][:nonterminals]
                )
                for i, said in enumerate(sentence):
                    left = sum(binary[a][symbol[t]][b] * emission[t][said] for t in pre)
                    right = sum(binary[a][b][symbol[t]] * emission[t][said] for t in pre)
                    scale = unscaled[s, i]
                    word = potentials.word[s, i]
                    assert potentials.left[word, a, 0, b] * scale == pytest.approx(left)
                    assert potentials.right[word, a, 0, b] * scale == pytest.approx(right)
            for i in range(length - 1):
                both = sum(
                    binary[a][symbol[t]][symbol[u]]
                    * emission[t][sentence[i]]
                    * emission[u][sentence[i + 1]]
                    for t in pre
                    for u in pre
                )
                scale = unscaled[s, i] * unscaled[s, i + 1]
                assert potentials.both[s, i, a, 0] * scale == pytest.approx(both)
        means = [sum(emission[t][word] for t in pre) / preterminals for word in sentence]
        assert potentials.log_word[s, :length].exp().tolist() == pytest.approx(means)
        largest = [log(max(emission[t][word] for t in pre)) for word in sentence]
        assert potentials.total_log_scale[s].item() == pytest.approx(sum(largest))


def test_very_rare_words_do_not_underflow():
    grammar = oracle.random_grammar(dtype=torch.float32)
    rare = DenseGrammar(grammar.root, grammar.binary, grammar.emission - 500)
    words, lengths = oracle.random_sentences([4, 3], seed=2)
    usual, shifted = grammar.potentials(words, lengths), rare.potentials(words, lengths)
    for name in ("left", "right", "both"):
        torch.testing.assert_close(
            getattr(shifted, name), getattr(usual, name), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(shifted.total_log_scale, usual.total_log_scale - 500 * lengths)
    torch.testing.assert_close(shifted.log_word, usual.log_word - 500)


def test_a_word_of_probability_zero_has_zero_tables_and_finite_gradients():
    grammar = oracle.random_grammar()
    emission = grammar.emission.clone()
    emission[..., 4] = -inf
    emission[0, 1, 3] = -inf
    emission.requires_grad_()
    words, lengths = torch.tensor([[4, 3, 2]]), torch.tensor([3])
    potentials = DenseGrammar(grammar.root, grammar.binary, emission).potentials(words, lengths)
    assert (potentials.left[0] == 0).all()
    assert (potentials.right[0] == 0).all()
    assert (potentials.both[0, 0] == 0).all()
    assert (potentials.left[1] > 0).all()
    tables = (potentials.left, potentials.right, potentials.both, potentials.log_word)
    total = torch.stack([table.sum() for table in tables]).sum()
    (gradient,) = torch.autograd.grad(total, emission)
    assert gradient.isfinite().all()
    assert (gradient[..., 4] == 0).all()
    assert gradient[0, 1, 3] == 0
    assert gradient[0, 0, 3] > 0
