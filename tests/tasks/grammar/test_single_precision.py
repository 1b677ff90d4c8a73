"""Rules that differ by more than single precision can hold: as in double precision all the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.inference.labelled import log_joint_labelled
from gfnem.tasks.grammar.inference.messages import log_joint_shape, sample_labels
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.rules.grammar import Grammar, Potentials
from gfnem.tasks.grammar.rules.low_rank import LowRankGrammar
from gfnem.tasks.grammar.trees.tree import Trees

LABELS, PRETERMINALS, RANK, WORDS = 4, 6, 5, 12
SYMBOLS = LABELS + PRETERMINALS
LENGTHS = torch.tensor([9, 6, 3])
SHAPES = Trees.random(LENGTHS, 5, torch.Generator().manual_seed(1))
LABELLED = replace(
    SHAPES,
    labels=torch.where(
        SHAPES.exists,
        torch.randint(0, LABELS, (3, 5, 8), generator=torch.Generator().manual_seed(2)),
        -1,
    ),
)
SAID = torch.randint(0, WORDS, (3, 9), generator=torch.Generator().manual_seed(0))


def random_logits(kind: str, deviation: float, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    contexts, inner = (LABELS + 1, LABELS) if "parents" in kind else (1, 1)
    binary: list[tuple[int, ...]] = [(contexts, LABELS, SYMBOLS**2)]
    if "low rank" in kind:
        binary = [(contexts, LABELS, RANK), (RANK, SYMBOLS), (RANK, SYMBOLS)]
    shapes = [(LABELS,), *binary, (inner, PRETERMINALS, WORDS)]
    return [deviation * torch.randn(shape, generator=generator) for shape in shapes]


def grammar_of(logits: list[Tensor]) -> Grammar:
    root, *binary, emission = (table.log_softmax(-1) for table in logits)
    if len(binary) == 1:
        return DenseGrammar(root, binary[0].unflatten(-1, (SYMBOLS, SYMBOLS)), emission)
    mixture, left, right = binary
    return LowRankGrammar(root, mixture, left, right, emission)


def values(
    logits: list[Tensor], value: Callable[[Potentials], Tensor], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """In a precision, and their gradients."""
    logits = [table.to(dtype).requires_grad_() for table in logits]
    found = value(grammar_of(logits).potentials(SAID, LENGTHS))
    assert found.dtype == dtype
    return found.detach(), list(torch.autograd.grad(found.sum(), logits))


@pytest.mark.parametrize("deviation", [5.0, 20.0, 40.0])
@pytest.mark.parametrize("rules", ["dense", "low rank"])
@pytest.mark.parametrize("seen", ["nothing", "parents"])
@pytest.mark.parametrize(
    "value",
    [
        inside.log_partition,
        lambda potentials: log_joint_shape(potentials, SHAPES),
        lambda potentials: log_joint_labelled(potentials, LABELLED),
    ],
    ids=["likelihood", "shapes", "labelled"],
)
def test_values_and_gradients(value, seen, rules, deviation):
    for seed in range(5):
        logits = random_logits(f"{rules}, {seen}", deviation, seed)
        single, gradients = values(logits, value, torch.float32)
        double, expected = values(logits, value, torch.float64)
        assert double.isfinite().all()
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)
        bound = 1e-4 * max(1.0, *(float(g.abs().max()) for g in expected))
        for one, other in zip(gradients, expected, strict=True):
            assert (one - other).abs().max() < bound


@pytest.mark.parametrize("seen", ["nothing", "parents"])
def test_trees_marginals_and_labels(seen):
    logits = random_logits(f"dense, {seen}", 40.0, 0)
    single = grammar_of(logits).potentials(SAID, LENGTHS)
    double = grammar_of([table.double() for table in logits]).potentials(SAID, LENGTHS)
    marginals = inside.span_marginals(double).float()
    torch.testing.assert_close(inside.span_marginals(single), marginals, rtol=0, atol=1e-5)
    (one, value), (other, expected) = inside.viterbi(single), inside.viterbi(double)
    assert one.labels is not None and other.labels is not None
    assert torch.equal(one.start, other.start) and torch.equal(one.labels, other.labels)
    torch.testing.assert_close(value, expected.float())
    # Next to nothing of the posterior is elsewhere.
    drawn = inside.sample(single, 20, torch.Generator().manual_seed(0))
    assert (drawn.start == one.start).double().mean() > 0.5
    labelled = sample_labels(single, SHAPES, torch.Generator().manual_seed(0))
    assert labelled.labels is not None and ((labelled.labels >= 0) == SHAPES.exists).all()


def test_single_precision_is_kept_where_it_does(monkeypatch):
    asked: list[bool] = []
    in_double = Potentials.in_double

    def counted(potentials: Potentials, *figures: Tensor) -> Potentials | None:
        found = in_double(potentials, *figures)
        asked.append(found is not None)
        return found

    monkeypatch.setattr(Potentials, "in_double", counted)
    for deviation in (1.0, 40.0):
        logits = random_logits("dense, parents", deviation, 0)
        inside.log_partition(grammar_of(logits).potentials(SAID, LENGTHS))
    assert asked == [False, True]
