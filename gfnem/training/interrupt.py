"""Ctrl-C and its like let a step end before training does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interruptible(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop` with the first SIGINT, SIGTERM or SIGHUP; the second does what it did before.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored. Outside of the main thread,
    which alone hears of signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {n: handler for n, handler in handlers.items() if handler != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def hear(number: int, frame: Any) -> None:
        stop(number)
        restore()

    try:
        for number in before:
            signal.signal(number, hear)
        yield
    finally:
        restore()
