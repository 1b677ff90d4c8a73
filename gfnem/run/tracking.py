"""Who is told of a run beside its own files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gfnem.errors import UserError
from gfnem.run.patterns import patterns_for

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

Status = Literal["finished", "stopped", "failed"]

_MODES = ("online", "offline", "disabled")
_INIT_SECONDS = 10.0  # to reach the service before the run goes on without it
_FINISH_SECONDS = 60.0  # to send what is left; `wandb sync` sends the rest later
_EXIT_CODES: dict[Status, int] = {"finished": 0, "stopped": 255, "failed": 1}


class Tracker(Protocol):
    """What a run tells of itself. No method may stop the run."""

    def start(self, path: Path, config: Mapping[str, Any]) -> None:
        """The run in directory `path` begins or goes on."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Line number `step` (from 0) of the run's `metrics.jsonl`."""
        ...

    def summary(self, values: Mapping[str, Any]) -> None:
        """The run's final numbers."""
        ...

    def figure(self, name: str, path: Path) -> None:
        """A figure, saved as PNG in `path`."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; `rows` are as long as `columns`."""
        ...

    def finish(self, status: Status) -> None:
        """The run ends."""
        ...


class FilesTracker:
    """Nobody: the files of the run are all there is."""

    def start(self, path: Path, config: Mapping[str, Any]) -> None: ...

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def summary(self, values: Mapping[str, Any]) -> None: ...

    def figure(self, name: str, path: Path) -> None: ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...

    def finish(self, status: Status) -> None: ...


class WandbTracker:
    """Weights & Biases, which may be out of reach at any time without harm to the run.

    A service that cannot be reached when the run starts (no network, no login) makes the run
    an offline one after at most ten seconds, with one warning; any later error of wandb ends
    the tracking, with one warning. An offline run waits in the run's `wandb/` for
    `wandb sync`. A run that is resumed goes on under the id kept in `wandb/run-id.txt`. Nothing
    is asked on the console and nothing but those warnings is printed.

    Curves run over `train/m_steps`; the summary keeps the lowest `nll` of each curve, the highest
    value of those that the configuration's `patterns.highest` names, and the run's final numbers
    under `final/`. A curve's step in wandb's own count is
    the line of `metrics.jsonl`, so that a resumed run goes on where it was.

    Args:
        project: project of the service.
        group: runs that belong together, e.g. the seeds of one setting.
        job_type: kind of run within the group.
        tags: words to find the run by.
        name: shown name; the directory's name when None.
        entity: user or team; the service's default when None.
        mode: "online", "offline" or "disabled"; when None what `WANDB_MODE` says, or "offline".

    Raises:
        UserError: the mode is none of these, wandb is not installed or refuses a setting.
    """

    def __init__(
        self,
        project: str = "gfnem",
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        name: str | None = None,
        entity: str | None = None,
        mode: str | None = None,
    ) -> None:
        self.project = project
        self.group = group
        self.job_type = job_type
        self.tags = list(tags)
        self.name = name
        self.entity = entity
        # What the mode "offline" was called before.
        of_wandb = os.environ.get("WANDB_MODE", "").replace("dryrun", "offline")
        self.mode = mode or of_wandb or "offline"
        if self.mode not in _MODES:
            given = "tracker.mode" if mode else "WANDB_MODE"
            raise UserError(f"{given}={self.mode} is unknown: choose one of {', '.join(_MODES)}")
        if self.mode != "disabled":
            self._check_settings()
        self._run: wandb.Run | None = None
        self._highest: Sequence[str] = ()
        self._defined: set[str] = set()
        self._step = 0

    def start(self, path: Path, config: Mapping[str, Any]) -> None:
        """Begin a run of the service, or go on with the one that this directory began."""
        if self.mode == "disabled":
            return
        self._highest = patterns_for(config, "highest")
        import wandb

        then = {"online": "the run is tracked offline", "offline": "the run is not tracked"}
        for mode in ("online", "offline") if self.mode == "online" else ("offline",):
            try:
                self._run = self._init(path, config, mode)
                break
            except _failures() as error:
                logger.warning("wandb does not start %s, %s (%s)", mode, then[mode], _line(error))
                # The service process still holds the id of the run that did not start.
                wandb.teardown()
        if self._run is not None:
            (path / "wandb").mkdir(exist_ok=True)
            id_file(path).write_text(self._run.id + "\n")
            if self._run.url:
                logger.info("wandb: %s", self._run.url)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._step = step
        for key in values:
            self._define(key)
        self._tell(lambda run: run.log(dict(values), step=step))

    def summary(self, values: Mapping[str, Any]) -> None:
        # Under their own names they would displace the lowest and the highest of a curve.
        final = {f"final/{key}": value for key, value in values.items()}
        self._tell(lambda run: run.summary.update(final))

    def figure(self, name: str, path: Path) -> None:
        def send(run: wandb.Run) -> None:
            from wandb import Image

            run.log({f"plots/{name}": Image(str(path))}, step=self._step)

        self._tell(send)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        def send(run: wandb.Run) -> None:
            from wandb import Table

            data = [list(row) for row in rows]
            table = Table(columns=list(columns), data=data, allow_mixed_types=True)
            run.log({f"tables/{name}": table}, step=self._step)

        self._tell(send)

    def finish(self, status: Status) -> None:
        self._tell(lambda run: run.finish(exit_code=_EXIT_CODES[status]))
        self._run = None

    def _check_settings(self) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "tracker=wandb needs a package that is missing: pip install wandb, or take "
                "tracker=files"
            ) from None
        from pydantic import ValidationError

        try:
            settings = wandb.Settings(project=self.project, run_tags=tuple(self.tags))
            settings.update_from_env_vars({**os.environ, "WANDB_MODE": self.mode})
        except ValidationError as error:
            (first, *_) = error.errors(include_url=False)
            name = str(first["loc"][0]).removeprefix("run_")
            raise UserError(
                f"wandb refuses tracker.{name} or WANDB_{name.upper()}: {first['msg']}"
            ) from None
        except wandb.Error as error:
            raise UserError(f"wandb refuses a setting: {error}") from None

    def _init(self, path: Path, config: Mapping[str, Any], mode: str) -> wandb.Run:
        import wandb

        # Silence also keeps wandb from asking for a key: without one, `init` raises instead.
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=_INIT_SECONDS,
            finish_timeout=_FINISH_SECONDS,
        )
        wandb.setup(settings=settings)
        begun = id_file(path).read_text().strip() if id_file(path).is_file() else None
        return wandb.init(
            project=self.project,
            group=self.group,
            job_type=self.job_type,
            tags=self.tags,
            name=self.name or path.resolve().name,
            entity=self.entity,
            mode=mode,  # pyright: ignore[reportArgumentType]
            config=dict(config),
            dir=str(path),
            id=begun,
            resume="allow" if begun else None,
            reinit="create_new",
            settings=settings,
        )

    def _define(self, key: str) -> None:
        """Tell the service, once, what the curve of a metric runs over and what sums it up."""
        if key in self._defined:
            return
        self._defined.add(key)
        if key == "train/m_steps":
            self._tell(lambda run: run.define_metric(key))
            return
        rises = any(fnmatchcase(key, pattern) for pattern in self._highest)
        summary = "min" if "nll" in key else "max" if rises else None
        self._tell(lambda run: run.define_metric(key, step_metric="train/m_steps", summary=summary))

    def _tell(self, call: Callable[[wandb.Run], Any]) -> None:
        """Make a call of the service; the first one that fails is the last one."""
        if self._run is None:
            return
        try:
            call(self._run)
        except _failures() as error:
            self._run = None
            logger.warning("wandb failed, the run goes on without it (%s)", _line(error))


def _failures() -> tuple[type[Exception], ...]:
    """What wandb raises when its service, its own process or the disk fails."""
    from wandb import Error
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError
    from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

    return (Error, OSError, HandleAbandonedError, MailboxClosedError, ServerResponseError)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def id_file(path: Path) -> Path:
    """Where a directory keeps the id of its run of the service."""
    return path / "wandb" / "run-id.txt"
