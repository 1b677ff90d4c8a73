from __future__ import annotations

import pytest

from gfnem.run.shown import csv_cell, markdown_cell, printable


@pytest.mark.parametrize("text", ["=1", "+A1", "-A1", "@sum(1)"])
def test_spreadsheets_take_no_cell_for_a_formula(text: str) -> None:
    assert csv_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["-1.5", "+2", "-inf", "a=1", "größer"])
def test_numbers_and_words_stay_as_they_are(text: str) -> None:
    assert csv_cell(text) == markdown_cell(text) == printable(text) == text


def test_what_is_not_seen_is_an_escape() -> None:
    assert printable("a\x1b[0m\r\n\t\u202eb") == r"a\x1b[0m\r\n\t\u202eb"


def test_markdown_is_text() -> None:
    assert markdown_cell("[a](b) | `c` *d* <e> &f") == r"\[a](b) \| \`c\` \*d\* &lt;e> &amp;f"
