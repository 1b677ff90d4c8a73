"""Files and folders as people have them.

Byte order marks are no part of a text, lines end at newlines alone, hidden files are passed over.
"""

from __future__ import annotations

import codecs
import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from gfnem.errors import UserError

BYTE_ORDER_MARK = "\ufeff"
# A mark of UTF-32 begins like one of UTF-16, so it comes first.
ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def user_path(name: str | Path) -> Path:
    """The path of a name in which ~ is a home folder."""
    return Path(os.path.expanduser(name))


def read_text(file: Path | zipfile.Path) -> str:
    """The text of a file, whose lines end in a newline whatever they end in there.

    Raises UserError for a file that is missing, empty or not UTF-8.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        reason = error.strerror or "there is no such file in the archive"
        raise UserError(f"{file} cannot be read: {reason}") from None
    except zipfile.BadZipFile:
        raise UserError(f"{file} cannot be read: the archive is damaged") from None
    text = decoded(content, str(file))
    if not text.strip():
        raise UserError(f"{file} is empty: give a file with text in it")
    return text


def decoded(content: bytes, name: str) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 after its byte order mark; see `read_text`.

    name: of the text in messages.

    Raises UserError for text that is neither, with the line. NUL, which no text has, is the sign of
    UTF-16 without its mark.
    """
    encoding = next((e for mark, e in ENCODINGS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
        wrong = text.find("\0")
    except UnicodeDecodeError as error:
        text, wrong = content.decode("latin-1"), error.start
    if wrong >= 0:
        line = text.count("\n", 0, wrong) + 1
        raise UserError(f"{name}, line {line}: not UTF-8 text; convert the file")
    # Files put behind one another have marks in the middle.
    return re.sub("\r\n?", "\n", text.replace(BYTE_ORDER_MARK, ""))


def read_input(file: str | None) -> str:
    """The text of a file, or of standard input where `file` is None or `-`; may be empty.

    Raises UserError for what cannot be read or is not UTF-8.
    """
    if file is None or file == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise UserError("standard input is closed: name a file with file=FILE")
        return decoded(sys.stdin.buffer.read(), "standard input")
    try:
        return decoded(user_path(file).read_bytes(), f"file={file}")
    except OSError as error:
        raise UserError(f"file={file} cannot be read: {error.strerror}") from None


def find_files(folder: Path, endings: Iterable[str]) -> tuple[list[Path], str]:
    """Files below a folder in the order of their paths, and what to say of those that are not read.

    endings: of the files to read, in small letters. Hidden files are passed over, and all that
        is in hidden folders.
    """
    there = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    wanted = frozenset(endings)
    files = [file for file in there if file.suffix.lower() in wanted]
    others = Counter(file.suffix.lower() for file in there if file.suffix.lower() not in wanted)
    said = [f"{count:,} {ending or 'without ending'}" for ending, count in others.most_common()]
    return files, f"not read in {folder}: {', '.join(said)}" if said else ""
