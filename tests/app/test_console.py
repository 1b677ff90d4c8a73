from __future__ import annotations

import os
import sys

import pytest

from gfnem.app.console import lasting_console


def test_output_that_nobody_reads_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    stream = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_console():
        print("read", flush=True)
        assert os.read(read, 9) == b"read\n"
        os.close(read)
        for _ in range(3):
            print("not read", flush=True)
    assert sys.stdout is stream
    stream.close()  # flushes


def test_a_console_that_was_never_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with lasting_console():
        print("nobody hears this", flush=True)
        assert not sys.stdout.isatty()
    assert sys.stdout is None
