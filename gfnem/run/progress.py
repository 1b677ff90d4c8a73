"""Where a run stands, on the console."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from types import TracebackType
from typing import TYPE_CHECKING, TextIO, TypeVar

from gfnem.run.patterns import USUAL

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.text import Text

T = TypeVar("T")


class Progress:
    """A progress bar on a terminal, plain lines anywhere else.

    Under the bar stand the latest value of each shown metric; off a terminal the same comes as
    one line whenever there are new metrics:

    ```
    m-step 300/1500  e_loss 1.2  m_loss 40.1  gap 1.9  2.1 it/s  eta 01:20
    ```

    Speed is an average over the whole time since its unit began to count, evaluations included.
    Evaluations have a bar of their own below, and off a terminal a line when they begin.
    Also a context manager that stops the bar whatever happens.

    Args:
        shown: patterns of metric names; of each the first metric that fits is shown.
        file: where to write; standard output when None.
    """

    def __init__(self, shown: Sequence[str] = USUAL["console"], file: TextIO | None = None) -> None:
        self._shown = shown
        self._file = file
        self._live: Live | None = None
        self._latest: dict[str, float] = {}
        self._total = self._done = self._done_before = 0
        self._began = 0.0
        self._seconds_left: float | None = None
        self._unit = ""
        self._rated: _Counted | None = None

    def start(self, unit: str, done: int, total: int) -> None:
        """Begin to count, at `done` of `total` M-steps, or of another unit."""
        self._count_from(unit, done)
        self._total = total
        self._show()

    def update(
        self,
        unit: str,
        done: int,
        total: int,
        metrics: Mapping[str, float] | None = None,
        seconds_left: float | None = None,
    ) -> None:
        """Say that `done` of `total` M-steps, or whatever is counted, are done.

        Args:
            unit: what is counted; speed is measured anew where it is another one than before.
            done: counted from the beginning of the run.
            total: how many there are to be.
            metrics: `group/name` -> value, at logging steps. Off a terminal there is a line
                for each such step and none for the others.
            seconds_left: until the end; None where that is not known.
        """
        if unit != self._unit:
            self._count_from(unit, done)
        self._done, self._total = done, total
        if not metrics:
            return
        self._seconds_left = seconds_left
        # A new dict, because the bar is drawn from a thread of its own.
        self._latest = {**self._latest, **metrics}
        if self._live is None:
            self._print("  ".join([self._count, *self._values, self._speed]))

    @contextmanager
    def rating(self, split: str) -> Iterator[None]:
        """Announce an evaluation; a loop over `counted` batches has a bar."""
        alone = self._live is None
        self._rated = _Counted(f"rating {split}")
        if alone:
            self._show()
        if self._live is None:
            self._print(f"{self._count}  {self._rated.what}" if self._unit else self._rated.what)
        token = _RATING.set(self._rated)
        try:
            yield
        finally:
            _RATING.reset(token)
            self._rated = None
            if alone:
                self.stop()

    def note(self, line: str) -> None:
        """Write a line above the bar."""
        if self._live is None:
            self._print(line)
        else:
            self._live.console.print(line, markup=False, highlight=False)

    def stop(self) -> None:
        """Leave the bar as it is and give the console back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def _output(self) -> TextIO:
        return self._file or sys.stdout

    def _print(self, line: str) -> None:
        print(line, file=self._output, flush=True)

    @property
    def _count(self) -> str:
        return f"{self._unit} {self._done}/{self._total}"

    @property
    def _values(self) -> list[str]:
        keys: dict[str, None] = {}
        for pattern in self._shown:
            fitting = (key for key in self._latest if fnmatchcase(key, pattern))
            keys.update(dict.fromkeys(list(fitting)[:1]))
        return [f"{key.removeprefix('train/')} {_number(self._latest[key])}" for key in keys]

    @property
    def _speed(self) -> str:
        seconds = time.monotonic() - self._began
        steps = self._done - self._done_before
        speed = f"{_number(steps / seconds)} it/s" if steps and seconds else "-- it/s"
        left = "--:--" if self._seconds_left is None else _clock(self._seconds_left)
        return f"{speed}  eta {left}"

    def _count_from(self, unit: str, done: int) -> None:
        self._unit = unit
        self._done = self._done_before = done
        self._began = time.monotonic()

    def _show(self) -> None:
        """Draw the bar, on a terminal, until `stop`."""
        self.stop()
        if self._output.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._output)
            self._live = Live(get_renderable=self._bar, console=console)
            self._live.start()

    def _bar(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        bars = Table.grid(padding=(0, 2))
        if self._unit:
            bars.add_row(*_row(self._count, self._done, self._total, self._speed))
        rated = self._rated
        if rated is not None:
            bars.add_row(*_row(rated.what, rated.done, rated.total, f"{rated.done}/{rated.total}"))
        return Group(bars, Text("  ".join(self._values), style="dim"))


class _Counted:
    """An evaluation: what it is, and how many batches of it are done."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.done = self.total = 0


_RATING: ContextVar[_Counted | None] = ContextVar("rating", default=None)


def counted(batches: Collection[T]) -> Iterator[T]:
    """Go through batches and show how far it is where an evaluation has a bar on the console.

    Example:
        >>> [batch for batch in counted(["one", "two"])]
        ['one', 'two']
    """
    rating = _RATING.get()
    if rating is not None:
        rating.done, rating.total = 0, len(batches)
    for batch in batches:
        yield batch
        if rating is not None:
            rating.done += 1


def _row(name: str, done: int, total: int, end: str) -> tuple[Text, ProgressBar, Text]:
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    bar = ProgressBar(total=max(total, 1), completed=done, width=30)
    return Text(name, style="bold"), bar, Text(end, style="cyan")


def _number(value: float) -> str:
    """Three significant digits or two decimals, whichever says more."""
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
