"""Which of a run's metrics are told of where, as patterns of their names.

A run's configuration may say it under `patterns`, as that of a task does; what it leaves out is as
usual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gfnem.errors import UserError

USUAL: Mapping[str, Sequence[str]] = {
    "console": ("train/e_loss", "train/m_loss", "*gap*", "valid/*nll*"),
    "highest": (),
    "curves": ("valid/*nll*", "valid/elbo", "valid/*gap*"),
    "details": ("*_low", "*_high"),
}
"""Purpose -> patterns.

console: of each the first metric that fits stands beside the progress.
highest: the best value of a curve is its highest.
curves: of each one metric is drawn where runs are compared.
details: compared only where they are asked for.
"""


def patterns_for(config: Mapping[str, Any], purpose: str) -> Sequence[str]:
    """The patterns that a run's configuration has for a purpose, or the usual ones.

    Raises UserError where it has something else there.
    """
    given = config.get("patterns") or {}
    found = given.get(purpose, USUAL[purpose]) if isinstance(given, Mapping) else given
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise UserError(f"patterns.{purpose} is {found}; it must be a list of patterns")
    return found
