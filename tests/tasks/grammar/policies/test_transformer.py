"""The transformer policy's reduced precision; all else is tested with the other policies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gfnem.errors import UserError
from gfnem.tasks.grammar.networks import NeuralPCFG
from gfnem.tasks.grammar.policies.transformer import TransformerPolicy
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.trees.tree import Trees

VOCABULARY, NONTERMINALS, PRETERMINALS, LENGTH = 8, 3, 4, 7


def policy(**options: Any) -> TransformerPolicy:
    torch.manual_seed(0)
    return TransformerPolicy(
        VOCABULARY, NONTERMINALS, PRETERMINALS, LENGTH, width=16, heads=2, **options
    )


def log_forward(policy: TransformerPolicy, gradients: bool) -> torch.Tensor:
    """log P_F of the only merge order of a few left-branching trees."""
    torch.manual_seed(1)
    model = NeuralPCFG(VOCABULARY, NONTERMINALS, PRETERMINALS, width=8)
    lengths = torch.tensor([7, 5, 3])
    x = Sentences(torch.randint(VOCABULARY, (3, 7)), lengths, torch.arange(3))
    with torch.set_grad_enabled(gradients):
        paths = policy.retrace(policy.condition(model, x), Trees.left_branching(lengths))
    return paths.log_forward.sum(0)


@pytest.mark.parametrize("gradients", [True, False])
def test_bfloat16_is_near_float32(gradients: bool) -> None:
    exact, rounded = policy(), policy(precision="bfloat16")
    value = log_forward(rounded, gradients)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, log_forward(exact, gradients), rtol=0.02, atol=0.05)
    assert not torch.equal(value, log_forward(exact, gradients))


def test_bfloat16_follows_the_parameters() -> None:
    rounded = policy(precision="bfloat16")
    before = log_forward(rounded, gradients=False)
    assert torch.equal(before, log_forward(rounded, gradients=False))
    optimizer = torch.optim.SGD(rounded.parameters(), lr=1.0)
    log_forward(rounded, gradients=True).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in rounded.transformer.parameters())
    optimizer.step()
    after = log_forward(rounded, gradients=False)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, log_forward(rounded, gradients=True), rtol=0.05, atol=0.5)


def test_bfloat16_copy_is_no_part_of_the_state() -> None:
    rounded = policy(precision="bfloat16")
    names = set(rounded.state_dict())
    log_forward(rounded, gradients=False)
    assert set(rounded.state_dict()) == names == set(policy().state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "half"}, "policy.precision is 'half'; use 'float32' or 'bfloat16'"),
        ({"width": 0}, "policy.width is 0; it must be at least 1"),
        ({"heads": 0}, "policy.heads is 0; it must be at least 1"),
        ({"encoder_width": 0}, "the width of the policy's encoder is 0; it must be at least 1"),
        ({"heads": 3}, "policy.width=16 is not divisible by policy.heads=3"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str) -> None:
    arguments: dict[str, Any] = {"width": 16, "heads": 2} | options
    with pytest.raises(UserError, match=f"^{message}"):
        TransformerPolicy(VOCABULARY, NONTERMINALS, PRETERMINALS, LENGTH, **arguments)
