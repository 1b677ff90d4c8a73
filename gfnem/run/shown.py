"""Text of unknown origin as it may be shown: read, and interpreted by nothing."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Write characters that do something in place of being seen as escapes.

    Example:
        >>> printable("seed\x1b[2J\n1")
        'seed\\x1b[2J\\n1'
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def csv_cell(text: str) -> str:
    """Keep a spreadsheet from taking a cell for a formula.

    Example:
        >>> csv_cell("=1+1"), csv_cell("-1")
        ("'=1+1", '-1')
    """
    text = printable(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") and not _is_number(text) else text


def markdown_cell(text: str) -> str:
    r"""Keep a cell of a table in Markdown from being more than text.

    Example:
        >>> markdown_cell("a|b<script>")
        'a\\|b&lt;script>'
    """
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    for special in ("|", "`", "[", "*"):
        text = text.replace(special, f"\\{special}")
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
