"""A random grammar as the truth: sentences drawn from it, and the model that drew them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from gfnem.errors import UserError
from gfnem.tasks.grammar.model import GrammarModel, check_positive
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.text.corpus import UNKNOWN, GrammarData, Vocabulary, check_least
from gfnem.tasks.grammar.text.reading import Reading
from gfnem.tasks.grammar.trees.prior import TreePrior

# Rounds of as many draws as sentences are wanted.
ROUNDS = 200


class RandomPCFG(GrammarModel):
    """A PCFG with random rules, the truth of the sentences of `random_grammar`.

    nonterminals, preterminals: numbers of symbols, the start symbol not counted.
    vocabulary: number of word ids. Id 0, which stands for words that are not known, has
        probability 0.
    sharpness: standard deviation of the rules' logits, which are normal. At 0 all rules are alike
        and so are all trees of a sentence; the larger it is, the fewer rules matter.
    rules_seed: of the rules.
    max_length, tries, latent, tree_prior: as for `GrammarModel`.
    """

    is_truth = True

    def __init__(
        self,
        vocabulary: int,
        nonterminals: int = 4,
        preterminals: int = 6,
        sharpness: float = 2.0,
        rules_seed: int = 0,
        max_length: int = 6,
        tries: int = 4,
        latent: Literal["shape", "labelled"] = "shape",
        tree_prior: TreePrior | None = None,
    ):
        super().__init__(latent, max_length, tries, tree_prior)
        check_positive(nonterminals=nonterminals, preterminals=preterminals)
        if not sharpness >= 0:
            raise UserError(f"data.sharpness is {sharpness}; it must not be negative")
        self.nonterminals = nonterminals
        self.preterminals = preterminals
        generator = torch.Generator().manual_seed(rules_seed)

        def logits(*shape: int) -> nn.Parameter:
            # In double precision and then rounded, they are the same whatever the default is.
            normal = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter((sharpness * normal).to(torch.get_default_dtype()))

        symbols = nonterminals + preterminals
        self.root = logits(nonterminals)
        self.binary = logits(nonterminals, symbols * symbols)
        self.emission = logits(preterminals, vocabulary - 1)

    def grammar(self) -> DenseGrammar:
        symbols = self.nonterminals + self.preterminals
        known = self.emission.log_softmax(-1)
        return DenseGrammar(
            root=self.root.log_softmax(-1),
            binary=self.binary.log_softmax(-1).unflatten(-1, (symbols, symbols))[None],
            emission=functional.pad(known, (1, 0), value=-torch.inf)[None],
        )


def random_grammar(
    nonterminals: int = 4,
    preterminals: int = 6,
    words: int = 20,
    sharpness: float = 2.0,
    rules_seed: int = 0,
    train_sentences: int = 2000,
    valid_sentences: int = 100,
    test_sentences: int = 200,
    min_length: int = 5,
    max_length: int = 6,
    batch_size: int = 32,
    seed: int = 0,
) -> GrammarData:
    """Sentences of a `RandomPCFG`, without trees; the same one may be drawn again.

    nonterminals, preterminals, sharpness, rules_seed: of the grammar.
    words: in its vocabulary.
    train_sentences, valid_sentences, test_sentences: how many.
    min_length, max_length: words in a sentence.
    batch_size: of the training batches.
    seed: of the sentences and the order of the training batches.

    Raises UserError for an option out of its range, and where the grammar hardly ever gives a
    sentence of these lengths.
    """
    for name, value, least in (
        ("words", words, 1),
        ("train_sentences", train_sentences, 1),
        ("valid_sentences", valid_sentences, 1),
        ("test_sentences", test_sentences, 1),
        ("max_length", max_length, 2),
    ):
        check_least(f"data.{name}", value, least)
    model = RandomPCFG(
        words + 1, nonterminals, preterminals, sharpness, rules_seed, max_length, tries=1
    )
    vocabulary = Vocabulary([UNKNOWN, *(f"w{number}" for number in range(1, words + 1))])
    generator = torch.Generator().manual_seed(seed)
    wanted = train_sentences + valid_sentences + test_sentences
    found: list[list[str]] = []
    for _ in range(ROUNDS):
        x, _ = model.sample(wanted, generator)
        for ids, length in zip(x.words.tolist(), x.lengths.tolist(), strict=True):
            if length >= min_length:
                found.append([vocabulary.word(id) for id in ids[:length]])
        if len(found) >= wanted:
            break
    else:
        raise UserError(
            f"random_grammar: {len(found)} of {ROUNDS * wanted:,} draws have {min_length} to "
            f"{max_length} words where {wanted} are wanted: ask for fewer sentences or for other "
            "lengths, or take another data.rules_seed"
        )
    ends = train_sentences, train_sentences + valid_sentences
    return GrammarData(
        "random_grammar",
        Reading(found[: ends[0]], None),
        Reading(found[ends[0] : ends[1]], None),
        Reading(found[ends[1] : wanted], None),
        min_length,
        max_length,
        1,
        batch_size,
        seed,
        vocabulary,
    )
