"""How a word is written before it is looked up in a vocabulary.

Words are lower-cased and punctuation is removed unless asked otherwise. Text that no treebank has
prepared can be brought nearer to the Penn Treebank's way of writing: clitics are words of their own
(`do n't`, `he 'll`, `man 's`, `can not`), and so are currency signs and `%` beside numbers.
Numbers, of which no two texts have the same, can become one word.

    >>> forms = WordForms(merge_numbers=True, split_clitics=True)
    >>> forms.words("They don't pay $3.50")
    ['they', 'do', "n't", 'pay', '$', '<num>']
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

from gfnem.errors import UserError

if TYPE_CHECKING:
    from nltk.tokenize import NLTKWordTokenizer

Punctuation = Literal["keep", "remove"]

NUMBER = "<num>"

# Brackets as treebanks write them, such as -LRB- for the left round one; *LRB* in TIGER.
BRACKETS = {
    f"{edge}{name}{edge}": mark
    for edge in "-*"
    for name, mark in zip(("LRB", "RRB", "LSB", "RSB", "LCB", "RCB"), "()[]{}", strict=True)
}
# Marks that are read out: "%" and "&" are words in the Penn Treebank too.
SPOKEN = frozenset("%&#@％＆＃＠‰")

# Digits with marks between them: 1,000.5, 3/4 (3\/4 in treebanks), 1960-61, 10:30, $.50, 5%.
_NUMBER = re.compile(r"[-+]?[$£€#]?[-+]?(?=[^\d]*\d)[\d.,:/\\-]+%?")
_BESIDE_NUMBER = re.compile(r"([$£€#]?)([-+]?[\d.,:/-]*\d[\d.,:/-]*)(%?)")
_APOSTROPHE = re.compile(r"(?<=\w)’(?=\w)")
_GLUED = re.compile(r"\w[,;:!?…)\]}\"”»]+$|^[(\[{\"“«¿¡]+\w")
_GLUED_STOP = re.compile(r"[^\W\d]{2,}\.+")
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|m|d|re|ve|ll))", re.IGNORECASE)
_CONTRACTION = re.compile(
    r"(can)(not)|(gon|wan)(na)|(got)(ta)|(gim|lem)(me)|('t)(is|was)", re.IGNORECASE
)


@dataclass(frozen=True)
class WordForms:
    """Which words are written alike.

    merge_numbers: every number is `<num>`.
    split_clitics: clitics of raw text are words of their own, and `$` and `%` beside numbers.
    lowercase: words differ by more than capitals.
    punctuation: whether marks are words.
    tokenize: raw text is as people write it, marks behind words without a space; NLTK's tokeniser
        splits it, clitics too. Otherwise words stand between spaces.

    Raises UserError for another `punctuation`.
    """

    merge_numbers: bool = False
    split_clitics: bool = False
    lowercase: bool = True
    punctuation: Punctuation = "remove"
    tokenize: bool = False

    def __post_init__(self) -> None:
        if self.punctuation not in get_args(Punctuation):
            raise UserError(f"punctuation is {self.punctuation!r}; use 'keep' or 'remove'")

    def form(self, word: str) -> str:
        """Give the form that stands in the vocabulary; a form is its own form."""
        if self.merge_numbers and _NUMBER.fullmatch(word):
            return NUMBER
        word = BRACKETS.get(word.upper(), word)
        return word.lower() if self.lowercase else word

    def removes(self, word: str) -> bool:
        """Whether a word without a tag is left out as punctuation."""
        return self.punctuation == "remove" and is_punctuation(word)

    def words(self, line: str) -> list[str]:
        """Give the words of a line of raw text; see `read`."""
        return self.read(line)[0]

    def read(self, line: str) -> tuple[list[str], list[str]]:
        """Split a line of raw text into words and what is removed as punctuation.

        Without tags, what is a word is told by its characters, so that a plural's possessive "'"
        is lost here and kept in trees.
        """
        words: list[str] = []
        removed: list[str] = []
        for token in self.tokens(line):
            parts = [token]
            if self.split_clitics and not is_punctuation(token):
                # A plural's possessive cannot be told from a closing quotation mark.
                parts = self.split(token.rstrip("'’"))
            for part in parts:
                if self.removes(part):
                    removed.append(part)
                else:
                    words.append(self.form(part))
        return words, removed

    def tokens(self, line: str) -> list[str]:
        """Split a line of raw text into words and marks as they are written."""
        if not self.tokenize:
            return line.split()
        # The tokeniser knows clitics by the apostrophe of typewriters.
        return _tokenizer().tokenize(_APOSTROPHE.sub("'", line))

    def split(self, token: str) -> list[str]:
        """Split a token of raw text as the Penn Treebank does; only with `split_clitics`."""
        return list(_split(token.replace("’", "'"))) if self.split_clitics else [token]


PLAIN = WordForms()


@cache
def _tokenizer() -> NLTKWordTokenizer:
    from nltk.tokenize import NLTKWordTokenizer

    return NLTKWordTokenizer()


def glued(words: list[str]) -> list[str]:
    """The words of a raw sentence that look as if marks were glued to them: `again?`, `"so`.

    A full stop may belong to a word, but for the last one.
    """
    found = [word for word in words if _GLUED.search(word)]
    if words and _GLUED_STOP.fullmatch(words[-1]):
        found.append(words[-1])
    return found


def _split(token: str) -> Iterator[str]:
    if (found := _BESIDE_NUMBER.fullmatch(token)) or (found := _CONTRACTION.fullmatch(token)):
        yield from filter(None, found.groups())
    elif found := _CLITIC.fullmatch(token):
        yield from _split(found[1])
        yield found[2]
    else:
        yield token


def unescaped(word: str) -> str:
    """Undo the Penn Treebank's backslashes: 3/4 for 3\\/4, * for \\*."""
    return word.replace("\\/", "/").replace("\\*", "*")


def is_punctuation(word: str) -> bool:
    """Tell whether a word is made of punctuation marks, or is a bracket in treebanks' spelling."""
    return word.upper() in BRACKETS or all(
        mark in "`´" or (unicodedata.category(mark)[0] == "P" and mark not in SPOKEN)
        for mark in word
    )
