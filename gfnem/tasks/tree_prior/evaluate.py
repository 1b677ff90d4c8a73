"""Rating distributions of tree shapes on held-out trees."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from gfnem.errors import UserError
from gfnem.inference import device_of, inference
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.run.progress import counted
from gfnem.tasks.grammar.trees.energy import Depth, RightBranching
from gfnem.tasks.grammar.trees.f1 import SpanCounts
from gfnem.tasks.grammar.trees.tree import Trees
from gfnem.tasks.tree_prior.data import ShapeData, Shapes
from gfnem.tasks.tree_prior.model import ShapeModel
from gfnem.training.parts import Metrics

if TYPE_CHECKING:
    from gfnem.run import Run

# Words of sentences whose shapes are all listed, 429 at most.
SHORT = 8

PANELS = {
    "Pseudo-likelihood, short sentences (nats)": ("valid/*nll*",),
    "Energy (nats)": ("valid/energy", "valid/model_energy"),
    "M-step loss": ("train/m_loss",),
    "Right-branching nodes": ("valid/*right_branching",),
    "Depth": ("valid/*depth",),
    "F1 (%)": ("valid/*_f1",),
}
"""Panels of a run's learning curves -> the metrics in them."""


class ShapeEvaluator:
    """How well an energy tells gold shapes. Metrics are named `split/...`.

    pseudo_nll: -log p(gold shape | it or a shape one rotation away), in nats for each sentence.
    uniform_pseudo_nll: the same where all shapes are alike.
    short_nll: -log p(gold shape | n) in nats for each sentence of at most 8 words, exact.
    uniform_short_nll: the same where all shapes are alike.
    energy, model_energy: mean E of gold shapes, and of shapes that the model draws for the same
        lengths.
    right_branching, model_right_branching: share of the nodes below roots that are right children.
    depth, model_depth: mean number of nodes on the longest way from root to word.
    model_sentence_f1: of the spans of the model's draws, in percent (see `f1.py`).

    The model's draws are chains of the posterior that begin at random trees.

    data: what to rate on.
    samples: draws for each sentence.
    """

    def __init__(self, data: ShapeData, samples: int = 4):
        if samples < 1:
            raise UserError(f"evaluator.samples is {samples}; it must be at least 1")
        self.data = data
        self.samples = samples

    def __call__(
        self, model: LatentVariableModel, posterior: Posterior, split: str, final: bool = False
    ) -> Metrics:
        assert isinstance(model, ShapeModel)
        figures: dict[str, list[Tensor]] = {}
        counts = []
        gold = self.data.trees.split(split).gold
        assert gold is not None
        with inference(model, posterior):
            for x in counted(self.data.batches(split)):
                x = x.to(device_of(model))
                drawn: Trees = posterior.sample(model, x, self.samples).z
                rated = _rate(model, x, drawn)
                for name, values in rated.items():
                    figures.setdefault(name, []).append(values.double().flatten())
                counts.append(SpanCounts.of(drawn, [gold[i] for i in x.ids.tolist()]))
        means = {name: torch.cat(parts) for name, parts in figures.items()}
        metrics = {name: float(v.mean()) for name, v in means.items() if v.numel()}
        metrics["model_sentence_f1"] = SpanCounts.cat(counts).sentence_f1
        return {f"{split}/{name}": value for name, value in metrics.items()}

    def selection(self, model: LatentVariableModel) -> str:
        return "valid/pseudo_nll"

    def report(self, model: LatentVariableModel, posterior: Posterior, run: Run) -> None:
        """Learning curves."""
        from gfnem.run.plots import learning_curves

        run.add_figure("learning_curves", learning_curves(run.metrics(), PANELS))


def _rate(model: ShapeModel, x: Shapes, drawn: Trees) -> dict[str, Tensor]:
    neighbours = (x.lengths - 2).clamp(min=0)
    figures = {
        "pseudo_nll": pseudo_nll(model, x.trees),
        "uniform_pseudo_nll": (neighbours + 1).double().log(),
        "energy": model.energy(x.trees),
        "model_energy": model.energy(drawn),
    }
    short = x.lengths <= SHORT
    if short.any():
        log_z = torch.stack([log_partition(model, n) for n in x.lengths[short].tolist()])
        figures["short_nll"] = figures["energy"][short, 0] + log_z
        catalan = [every_shape(n).start.shape[1] for n in x.lengths[short].tolist()]
        figures["uniform_short_nll"] = torch.tensor(catalan).double().log()
    long = x.lengths > 2
    for name, trees in (("", x.trees), ("model_", drawn)):
        below = (trees.lengths - 2).clamp(min=1)[:, None]
        left = RightBranching().to(trees.start.device)(trees)
        figures[f"{name}right_branching"] = (1 - left / below)[long]
        figures[f"{name}depth"] = Depth().to(trees.start.device)(trees)
    return figures


def pseudo_nll(model: ShapeModel, trees: Trees) -> Float[Tensor, "batch samples"]:
    """-log p(tree | it or a shape one rotation away) in nats."""
    batch, samples, nodes = trees.start.shape
    gap = torch.arange(nodes, device=trees.start.device).repeat(samples)
    each = torch.arange(samples, device=gap.device).repeat_interleave(nodes)
    rotated = trees.select(each.expand(batch, -1)).rotate(gap.expand(batch, -1))
    energy = model.energy(rotated).unflatten(1, (samples, nodes))
    inner = trees.exists & (trees.sizes < trees.lengths[:, None, None] - 1)
    # The root's rotation is the tree itself, which counts once.
    others = torch.where(inner, -energy, -torch.inf)
    own = -model.energy(trees)
    return torch.cat([own[..., None], others], -1).logsumexp(-1) - own


def log_partition(model: ShapeModel, length: int) -> Float[Tensor, ""]:
    """log of the sum of exp(-E) over all shapes over so many words."""
    trees = every_shape(length)
    device = device_of(model)
    on_device = Trees(trees.start.to(device), trees.end.to(device), trees.lengths.to(device))
    return (-model.energy(on_device)).logsumexp(-1).squeeze(0)


@cache
def every_shape(length: int) -> Trees:
    """All binary trees over one sentence of so many words: the Catalan number of its gaps."""

    def below(start: int, end: int) -> list[list[tuple[int, int]]]:
        """Spans gap by gap."""
        if end - start == 1:
            return [[]]
        return [
            [*left, (start, end), *right]
            for middle in range(start + 1, end)
            for left in below(start, middle)
            for right in below(middle, end)
        ]

    start, end = torch.tensor(below(0, length)).unbind(-1)
    return Trees(start[None], end[None], torch.tensor([length]))
