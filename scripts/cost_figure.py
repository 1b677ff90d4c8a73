"""What an EM iteration costs over the length of sentences and the number of symbols: one figure.

    python scripts/benchmark.py scaling --threads 2 --json scaling.json
    python scripts/cost_figure.py scaling.json scaling.png

Solid lines are the GFlowNet's iterations, E- and M-step, dashed ones steps of exact training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The rows of `scripts/benchmark.py scaling`."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, grammar in enumerate(dict.fromkeys(row["what"] for row in rows)):
        own = [row for row in rows if row["what"] == grammar]
        words, color = [row["words"] for row in own], f"C{index}"
        axes.plot(words, [row["iteration"] for row in own], "o-", color=color, label=grammar)
        axes.plot(words, [row["exact"] for row in own], "o--", color=color, alpha=0.6)
    axes.set(xlabel="words of each of 16 sentences", ylabel="seconds", yscale="log")
    axes.legend(title="solid: GFlowNet, dashed: exact", fontsize=8, title_fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def main(arguments: list[str]) -> None:
    if len(arguments) != 2:
        raise SystemExit(__doc__)
    benchmark, out = map(Path, arguments)
    draw(json.loads(benchmark.read_text())["rows"]).savefig(out, dpi=150)


if __name__ == "__main__":
    main(sys.argv[1:])
