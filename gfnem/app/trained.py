"""A trained model and its posterior, from the directory of their run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from gfnem.app.build import build
from gfnem.app.composition import compose_stored
from gfnem.app.provenance import check_words
from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.run import Run


def load(
    run: str | Path,
    checkpoint: Literal["best", "last"] = "best",
    overrides: Sequence[str] = (),
    config_dir: str | Path | None = None,
) -> EM:
    """Load a run: its model, posterior, data and evaluator.

    Args:
        run: the directory.
        checkpoint: that of the best evaluation, or the last one.
        overrides: as on the command line, `device=cpu`; in place of what the run was trained with.
        config_dir: a folder of configuration files whose modules the run may use; otherwise it may
            use gfnem's own alone.

    Raises:
        UserError: the directory holds no run, or one that cannot be used, or overrides cannot be.
    """
    opened = Run.open(run)
    config = compose_stored(opened, overrides, None if config_dir is None else Path(config_dir))
    state = opened.load_checkpoint(checkpoint)
    built = build(config)
    check_words(opened.path, built.data)
    em = built.em
    with fitting(opened.path):
        em.networks.load_rated(state)
    return em


@contextmanager
def fitting(run: Path) -> Iterator[None]:
    """Tell in a line, in place of what torch raises, that a checkpoint is not of its run."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"a checkpoint of {run} is not one of the model in its config.yaml "
            f"({type(error).__name__}): restore it"
        ) from None
