"""What is logged and shown."""

from __future__ import annotations

import logging


def let_loggers_speak() -> None:
    """Show what gfnem and Optuna's plug-in log, also in the processes of launchers."""
    logging.basicConfig(format="%(message)s")
    for name in ("gfnem", "hydra_plugins.hydra_optuna_sweeper"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # what it logs, it also raises
