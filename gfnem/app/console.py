"""A console that may go away without taking a run with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast


@contextmanager
def lasting_console() -> Iterator[None]:
    """Let training go on when nobody reads its output any more, or nobody ever did."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_lasting(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO | None) -> TextIO:
    """The stream, whose descriptor a shell may have closed before the process began."""
    return cast(TextIO, _Lasting(open(os.devnull, "w") if stream is None else stream))


class _Lasting:
    """Writes to a stream as long as that can be written to, then to nowhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._let_go()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _let_go(self) -> None:
        """Send what is buffered, and all that follows, to nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
