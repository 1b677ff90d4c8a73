"""One run is one directory."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from gfnem.errors import UserError
from gfnem.run.checkpoint import atomic_write, load_state, save_state
from gfnem.run.patterns import patterns_for
from gfnem.run.progress import Progress
from gfnem.run.tracking import FilesTracker, Status, Tracker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scalar = float | int | str
Row = Sequence[Scalar]


class Run:
    """A directory that holds all there is to know about one training run.

    ```
    config.yaml          the resolved configuration, written once
    metrics.jsonl        one JSON object per logged step
    summary.json         the final numbers, flat `group/name` keys; early where it was stopped
    checkpoints/         last.pt and best.pt
    plots/*.png          figures
    tables/*.csv         tables
    words.json           which word each id is, of runs on text
    environment.json     versions, host and command line
    wandb/               what Weights & Biases keeps, when it is the tracker
    ```

    The JSON is strict: a number that is not finite is written as `null` and read back as NaN.

    Make one with `Run.create`, go on with one or read one with `Run.open`.

    Attributes:
        path: the directory.
        config: the resolved configuration.
        lines: how many lines `metrics.jsonl` holds; keep it in the checkpoint and give it to
            `truncate_metrics` when the run goes on from there.
        progress: where the run stands, on the console.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], tracker: Tracker) -> None:
        self.path = path
        self.config = config
        self.progress = Progress(patterns_for(config, "console"))
        self._tracker = tracker
        self.lines = _complete(self._metrics_file.read_bytes()).count(b"\n")
        tracker.start(path, config)

    @classmethod
    def create(
        cls, path: str | Path, config: Mapping[str, Any] | str, tracker: Tracker | None = None
    ) -> Run:
        """Start a run in a new directory, or in one that holds no run yet.

        Args:
            path: the directory; made with its parents when missing.
            config: the resolved configuration, as plain containers or as YAML. Its `patterns`
                say which metrics are told of where.
            tracker: who is told of the run beside the files; nobody by default.

        Raises:
            UserError: the directory holds a run already, or cannot be made.
        """
        path = Path(path)
        if (path / "config.yaml").exists():
            raise UserError(f"{path} holds a run already: resume that one or name a new directory")
        text = config if isinstance(config, str) else _to_yaml(config)
        try:
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
            (path / "metrics.jsonl").touch()
            with atomic_write(path / "config.yaml") as file:
                file.write(text.encode())
        except OSError as error:
            raise UserError(
                f"cannot start a run in {path} ({error.strerror}): name a directory that can be "
                "written"
            ) from error
        return cls(path, yaml.safe_load(text), tracker or FilesTracker())

    @classmethod
    def open(cls, path: str | Path, tracker: Tracker | None = None) -> Run:
        """Open a run to read it or to go on with it.

        Nothing is changed by opening. To go on, `truncate_metrics` to the checkpoint's lines
        before the first `log`.

        Args:
            path: the directory of the run.
            tracker: who is told of what is logged from here on; leave it out to read.

        Raises:
            UserError: there is no run there, or a file of it is missing or broken.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"run directory {path} does not exist: check the path")
        for name in ("config.yaml", "metrics.jsonl"):
            if not (path / name).is_file():
                raise UserError(f"{path} has no {name}: it is not the directory of a run")
        try:
            config = yaml.safe_load((path / "config.yaml").read_text())
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
            config = None
        if not isinstance(config, dict):
            raise UserError(f"{path / 'config.yaml'} is not a YAML mapping: repair or restore it")
        return cls(path, config, tracker or FilesTracker())

    def log(self, metrics: Mapping[str, float], counters: Mapping[str, int]) -> None:
        """Add one line to `metrics.jsonl`, on its way to the disk at once, and tell the tracker.

        Args:
            metrics: `group/name` -> value.
            counters: how far the run is, e.g. `{"train/m_steps": 300, "train/e_steps": 400}`.
        """
        values = {key: int(count) for key, count in counters.items()} | {
            key: float(value) for key, value in metrics.items()
        }
        with self._metrics_file.open("a") as file:
            file.write(_to_json(values) + "\n")
        self._tracker.log(values, step=self.lines)
        self.lines += 1

    def metrics(self) -> list[dict[str, float]]:
        """Return the lines of `metrics.jsonl`; a last line cut off by a killed run is left out.

        Raises:
            UserError: a line is not a JSON object.
        """
        lines = _complete(self._metrics_file.read_bytes()).splitlines()
        return [
            _from_json(line, f"line {number} of {self._metrics_file}")
            for number, line in enumerate(lines, start=1)
        ]

    def truncate_metrics(self, lines: int) -> None:
        """Keep the first `lines` lines of `metrics.jsonl`: those of before the checkpoint.

        Raises:
            UserError: there are fewer lines than that.
        """
        text = self._metrics_file.read_bytes()
        kept = _complete(text).splitlines(keepends=True)
        if len(kept) < lines:
            raise UserError(
                f"{self._metrics_file} has {len(kept)} lines, but the checkpoint was written "
                f"after {lines}: restore the file or start a new run"
            )
        os.truncate(self._metrics_file, sum(map(len, kept[:lines])))
        self.lines = lines

    def write_summary(self, values: Mapping[str, Scalar]) -> None:
        """Write `summary.json`, in place of the one before, and tell the tracker.

        Args:
            values: the final numbers, flat: `group/name` -> value.
        """
        with atomic_write(self._summary_file) as file:
            file.write((_to_json(values, indent=2) + "\n").encode())
        self._tracker.summary(values)

    def summary(self) -> dict[str, Scalar]:
        """Return the final numbers.

        Raises:
            UserError: the run has none yet, or the file is broken.
        """
        if not self._summary_file.is_file():
            raise UserError(f"{self.path} has no summary.json: the run is not complete, resume it")
        return _from_json(self._summary_file.read_bytes(), str(self._summary_file))

    def save_checkpoint(self, state: Mapping[str, Any], best: bool = False) -> None:
        """Write `checkpoints/last.pt`, and `checkpoints/best.pt` too where `best` holds.

        Each file is replaced in one step. The lines logged so far reach the disk first, so
        that a checkpoint never knows of lines that `metrics.jsonl` has lost.

        Raises:
            TypeError: the state holds other things than tensors, containers, numbers, strings.
        """
        with self._metrics_file.open("a") as file:
            os.fsync(file.fileno())
        # The last one knows of the best one, so it comes second.
        for which in ("best", "last") if best else ("last",):
            save_state(self._checkpoint_file(which), state)

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is something to go on from."""
        return any(self._checkpoint_file(which).is_file() for which in ("last", "best"))

    def load_checkpoint(self, which: Literal["last", "best"] = "last") -> dict[str, Any]:
        """Return a saved state, its tensors on the CPU.

        Raises:
            UserError: there is no such checkpoint, or it is damaged.
        """
        other = "best" if which == "last" else "last"
        if self._checkpoint_file(other).is_file():
            otherwise = f"there is another one, for checkpoint={other}"
        else:
            otherwise = "there is no other in this run, start it again in a new directory"
        return load_state(self._checkpoint_file(which), otherwise)

    def add_figure(self, name: str, figure: Figure) -> None:
        """Save a figure as `plots/NAME.png` and give it to the tracker."""
        path = self.path / "plots" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=150)
        self._tracker.figure(name, path)

    def add_table(self, name: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
        """Save a table as `tables/NAME.csv` and give it to the tracker."""
        rows = [list(row) for row in rows]
        path = self.path / "tables" / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *rows])
        with atomic_write(path) as file:
            file.write(text.getvalue().encode())
        self._tracker.table(name, columns, rows)

    def finish(self, status: Status = "finished") -> None:
        """Close the console's progress and the tracker.

        Args:
            status: "finished"; "stopped" by the user; "failed" with an error.
        """
        self.progress.stop()
        self._tracker.finish(status)

    @property
    def _metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def _summary_file(self) -> Path:
        return self.path / "summary.json"

    def _checkpoint_file(self, which: str) -> Path:
        return self.path / "checkpoints" / f"{which}.pt"


def _to_yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)


def _to_json(values: Mapping[str, Scalar], indent: int | None = None) -> str:
    strict = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
    return json.dumps(strict, indent=indent, allow_nan=False)


def _from_json(text: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a JSON object: repair or restore the file")
    return {key: math.nan if value is None else value for key, value in values.items()}


def _complete(text: bytes) -> bytes:
    """Leave out what follows the last line break: the line that a killed run was writing."""
    return text[: text.rfind(b"\n") + 1]
