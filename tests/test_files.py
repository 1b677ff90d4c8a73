"""Files, folders and standard input as people have them."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from gfnem.errors import UserError
from gfnem.files import find_files, read_input, read_text, user_path


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbfa b\r\nc\r\n", "a b\nc\n"),
        (b"a\n\xef\xbb\xbfb\n", "a\nb\n"),  # two files, one behind the other
        ("é b\n".encode("utf-16"), "é b\n"),
        ("é b\n".encode("utf-16-be").join([b"\xfe\xff", b""]), "é b\n"),
        ("é b\n".encode("utf-32"), "é b\n"),
        (b"old\rMac\r", "old\nMac\n"),
        ("a\u2028b\x0cc\x85d\n".encode(), "a\u2028b\x0cc\x85d\n"),
    ],
)
def test_text_whatever_its_marks_and_line_ends(
    tmp_path: Path, content: bytes, text: str, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "own.txt"
    file.write_bytes(content)
    assert read_text(file) == read_input(str(file)) == text
    for name in (None, "-"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert read_input(name) == text


@pytest.mark.parametrize(
    "content", [b"the\ncaf\xe9\n", b"the\nca\0f\n", "\nwithout a mark".encode("utf-16-le")]
)
def test_the_line_that_is_not_utf_8(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "own.txt"
    file.write_bytes(content)
    for read, name in ((read_text, file), (read_input, str(file))):
        with pytest.raises(UserError, match=r"own.txt, line 2: not UTF-8 text; convert the file$"):
            read(name)  # pyright: ignore
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))
    with pytest.raises(UserError, match="^standard input, line 1: not UTF-8 text"):
        read_input("-")


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="^standard input is closed: name a file with file=FILE$"):
        read_input(None)


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.txt").write_text("a b\n")
    assert user_path("~/own.txt") == tmp_path / "own.txt"
    assert read_input("~/own.txt") == "a b\n"


def test_hidden_files_are_passed_over_and_others_counted(tmp_path: Path):
    names = ["b.PNG", "a/c.png", "._b.png", ".ipynb_checkpoints/d.png", "a/.e/f.png"]
    for name in [*names, "x.txt", "a/y.TXT", "LICENSE", ".DS_Store"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files, others = find_files(tmp_path, {".png"})
    assert [str(file.relative_to(tmp_path)) for file in files] == ["a/c.png", "b.PNG"]
    assert others == f"not read in {tmp_path}: 2 .txt, 1 without ending"
    # What is hidden is told by what is within the folder, not by where the folder is.
    assert len(find_files(tmp_path / "a" / ".e", {".png"})[0]) == 1
