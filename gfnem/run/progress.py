"""Where a run stands, on the console."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from gfnem.run.patterns import USUAL

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live


class Progress:
    """A progress bar on a terminal, plain lines anywhere else.

    Under the bar stand the latest value of each shown metric; off a terminal the same comes as
    one line whenever there are new metrics:

    ```
    m-step 300/1500  e_loss 1.2  m_loss 40.1  gap 1.9  2.1 it/s  eta 01:20
    ```

    Speed and time left are averages over the whole time since `start`, evaluations included.
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
        self._unit = ""

    def start(self, total: int, done: int = 0, unit: str = "m-step") -> None:
        """Begin to count, at `done` of `total` M-steps, or of another unit."""
        self.stop()
        self._unit = unit
        self._total, self._done, self._done_before = total, done, done
        self._began = time.monotonic()
        if self._output.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._output)
            self._live = Live(get_renderable=self._bar, console=console)
            self._live.start()

    def update(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """Say that `done` M-steps, or whatever is counted, are done.

        Args:
            done: counted from the beginning of the run.
            metrics: `group/name` -> value, at logging steps. Off a terminal there is a line
                for each such step and none for the others.
        """
        self._done = done
        if not metrics:
            return
        # A new dict, because the bar is drawn from a thread of its own.
        self._latest = {**self._latest, **metrics}
        if self._live is None:
            self._print("  ".join([self._count, *self._values, self._speed]))

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
        if steps == 0:
            return "-- it/s  eta --:--"
        left = (self._total - self._done) * seconds / steps
        return f"{_number(steps / seconds)} it/s  eta {_clock(left)}"

    def _bar(self) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            Text(self._count, style="bold"),
            ProgressBar(total=self._total, completed=self._done, width=30),
            Text(self._speed, style="cyan"),
        )
        return Group(bar, Text("  ".join(self._values), style="dim"))


def _number(value: float) -> str:
    """Three significant digits or two decimals, whichever says more."""
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
