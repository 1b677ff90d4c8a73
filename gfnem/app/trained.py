"""A trained model and its posterior, from the directory of their run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from gfnem.app.build import build
from gfnem.app.composition import compose_stored
from gfnem.em import EM
from gfnem.run import Run


def load(
    run: str | Path, checkpoint: Literal["best", "last"] = "best", overrides: Sequence[str] = ()
) -> EM:
    """Load a run: its model, posterior, data and evaluator.

    run: the directory.
    overrides: as on the command line, `device=cpu`; in place of what the run was trained with.

    Raises UserError for a directory that holds no run, and for overrides that cannot be used.
    """
    opened = Run.open(run)
    config = compose_stored(opened.path, overrides)
    state = opened.load_checkpoint(checkpoint)
    em = build(config).em
    em.model.load_state_dict(state["model"])
    em.posterior.load_state_dict(state["posterior"])
    return em
