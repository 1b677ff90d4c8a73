"""A small English-like context-free grammar to sample sentences with known trees from.

The trees are neither left- nor right-branching: words are modified from the left (determiners,
adjectives, possessors, fronted phrases) and from the right (prepositional phrases, relative
clauses, final adverbs). It recurses through possessors, prepositional phrases, coordination,
relative and complement clauses. Every word has one part of speech and most sentences have one
tree, so that the trees can be found from the words.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from gfnem.errors import UserError

if TYPE_CHECKING:
    from nltk import Tree

# Each phrase with its expansions and their probabilities. Labels are the Penn Treebank's as far as
# it has them. "CORE" is a noun phrase without modifiers on its right: that it is told apart from
# other noun phrases fixes what a modifier belongs to.
RULES: dict[str, list[tuple[float, tuple[str, ...]]]] = {
    "S": [(0.88, ("NP", "VP")), (0.12, ("PP", "S"))],
    "NP": [
        (0.62, ("CORE",)),
        (0.15, ("CORE", "PP")),
        (0.13, ("CORE", "SBAR-REL")),
        (0.10, ("CORE", "CC", "NP")),
    ],
    "CORE": [
        (0.50, ("NNP",)),
        (0.22, ("DT", "NN")),
        (0.14, ("JJ", "NNP")),
        (0.14, ("POSS", "NN")),
    ],
    "POSS": [(1.0, ("CORE", "POS"))],
    "PP": [(1.0, ("IN", "NP"))],
    "SBAR-REL": [(1.0, ("WP", "VP"))],
    "SBAR": [(1.0, ("THAT", "S"))],
    "VP": [
        (0.20, ("VBD-INT",)),
        (0.08, ("VBD-INT", "RB")),
        (0.46, ("VBD", "NP")),
        (0.10, ("VBD", "CORE", "RB")),
        (0.16, ("VBD-SAY", "SBAR")),
    ],
}

# Each part of speech with its words, all equally probable.
WORDS: dict[str, list[str]] = {
    "DT": ["the", "a", "every", "this"],
    "JJ": ["old", "young", "small", "happy", "clever", "tired"],
    "NN": ["king", "queen", "dog", "cat", "farmer", "doctor"],
    "NNP": ["anna", "boris", "clara", "david", "emma", "felix"],
    "VBD": ["chased", "saw", "helped", "admired", "followed", "greeted"],
    "VBD-INT": ["slept", "laughed", "waited", "danced", "vanished", "returned"],
    "VBD-SAY": ["said", "thought", "knew", "believed"],
    "RB": ["quickly", "quietly", "badly", "again"],
    "IN": ["with", "near", "behind", "after"],
    "CC": ["and", "or"],
    "WP": ["who"],
    "THAT": ["that"],
    "POS": ["'s"],
}

SHOWN_AS = {"CORE": "NP", "POSS": "NP"}

TRIES_PER_SENTENCE = 50
MOST = 1_000_000


def sample_trees(count: int, min_length: int, max_length: int, seed: int) -> list[Tree]:
    """`count` trees of different sentences of `min_length` to `max_length` words.

    Raises UserError when the grammar does not yield that many different sentences.
    """
    if count > MOST:
        raise UserError(f"toy_english is asked for {count:,} sentences; it makes {MOST:,} at most")
    generator = random.Random(seed)
    trees: dict[tuple[str, ...], Tree] = {}
    for _ in range(TRIES_PER_SENTENCE * count):
        if len(trees) == count:
            break
        tree = sample_tree("S", generator)
        words = tuple(tree.leaves())
        if min_length <= len(words) <= max_length:
            trees.setdefault(words, tree)
    if len(trees) < count:
        raise UserError(
            f"toy_english yielded {len(trees)} different sentences of {min_length} to {max_length} "
            f"words where {count} are wanted: ask for fewer sentences or raise max_length"
        )
    # Frequent sentences tend to be met first; shuffled, every part is distributed alike.
    shuffled = list(trees.values())
    generator.shuffle(shuffled)
    return shuffled


def sample_tree(symbol: str, generator: random.Random) -> Tree:
    """One tree of the grammar under `symbol`."""
    from nltk import Tree

    if symbol in WORDS:
        return Tree(symbol, [generator.choice(WORDS[symbol])])
    probabilities, expansions = zip(*RULES[symbol], strict=True)
    (expansion,) = generator.choices(expansions, probabilities)
    children = [sample_tree(child, generator) for child in expansion]
    if len(expansion) == 1 and expansion[0] not in WORDS:
        return children[0]
    return Tree(SHOWN_AS.get(symbol, symbol), children)
