from __future__ import annotations

from math import inf, nan

import pytest
import torch
from scipy.stats import chisquare

from gfnem.categorical import check_draws, drawable, sample_categorical, watched
from gfnem.errors import UserError

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def test_draws_have_the_frequencies_of_their_weights():
    weights = torch.tensor([[0.0, 3.0, 0.0, 1.0, 0.5], [1e-3, 0.0, 2e-3, 0.0, 0.0]])
    draws = sample_categorical(
        weights[:, None].expand(-1, 20_000, -1), torch.Generator().manual_seed(0)
    )
    assert draws.shape == (2, 20_000)
    for row, drawn in zip(weights, draws, strict=True):
        counts = drawn.bincount(minlength=5)
        possible = row > 0
        assert (counts[~possible] == 0).all()
        expected = 20_000 * row[possible].double() / row.double().sum()
        assert chisquare(counts[possible].numpy(), expected.numpy()).pvalue > 1e-3


@dtypes
def test_weight_zero_is_never_drawn_at_the_ends_of_the_unit_interval(dtype, monkeypatch):
    below_one = 1 - torch.finfo(dtype).eps / 2
    assert below_one < 1
    weights = torch.tensor(
        [
            [0.0, 0.0, 1.0, 2.0, 0.0],
            [0.0, 0.3, 0.1, 0.7, 0.0],
            [0.0, 1e-6, 1e6, 1e-6, 0.0],
            [0.0, 1.0, 0.0, 1.0, 0.0],
        ],
        dtype=dtype,
    )
    weights[3] *= torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the least there is
    assert weights[3, 1] > 0
    first, last = ([2], [1], [1], [1]), ([3], [3], [2, 3], [1, 3])
    # Rounding may turn what is below 1 into 1.
    for uniform, allowed in ((0.0, first), (below_one, last), (1.0, last)):

        def ends(shape, uniform=uniform, **options):
            return torch.full(shape, uniform, dtype=options["dtype"])

        monkeypatch.setattr(torch, "rand", ends)
        drawn = sample_categorical(weights).tolist()
        assert all(
            category in categories for category, categories in zip(drawn, allowed, strict=True)
        )


def test_the_same_generator_gives_the_same_draws():
    weights = torch.rand(50, 7, generator=torch.Generator().manual_seed(1))
    first, second, other = (
        sample_categorical(weights, torch.Generator().manual_seed(seed)) for seed in (2, 2, 3)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@dtypes
@pytest.mark.parametrize(
    "bad",
    [[0.0, 0.0, 0.0], [1.0, nan, 0.0], [nan, nan, nan], [inf, 1.0, 0.0], [0.0, inf, inf]],
    ids=str,
)
def test_weights_that_nothing_can_be_drawn_from_give_a_category_that_exists(bad, dtype):
    good = [0.0, 0.5, 0.5]
    drawn = sample_categorical(torch.tensor([good, bad, good], dtype=dtype).repeat(1000, 1))
    assert drawn.min() >= 0 and drawn.max() < 3
    assert (drawn.view(-1, 3)[:, [0, 2]] > 0).all()


def test_a_draw_waits_for_no_device():
    """Tensors without values cannot be looked at."""
    weights = torch.empty(4, 5, 3, device="meta")
    assert sample_categorical(weights).shape == drawable(weights).shape[:-1] == (4, 5)
    with pytest.raises(RuntimeError), watched():
        sample_categorical(weights)


def test_only_what_may_be_drawn_is_drawn_of_logits_that_are_not_finite():
    logits = torch.tensor([[-inf, nan, 1.0], [-inf, inf, -inf], [0.5, -inf, -1.0]])
    assert drawable(logits).tolist() == [[-inf, 0.0, 1.0], [-inf, 0.0, -inf], [0.5, -inf, -1.0]]


@pytest.mark.parametrize("bad", [[0.0, 0.0], [nan, 1.0], [inf, 1.0]], ids=str)
def test_who_watches_is_told_of_weights_that_nothing_can_be_drawn_from(bad):
    weights = torch.tensor([[0.0, 1.0], bad])
    with watched():
        sample_categorical(weights[:1])
        check_draws()
    message = "^something is to be drawn with weights that are all zero or not finite: "
    with pytest.raises(UserError, match=message), watched():
        sample_categorical(weights)
        sample_categorical(weights[:1])
    with pytest.raises(UserError, match=message), watched():
        sample_categorical(weights)
        raise IndexError("of what was drawn")
    with pytest.raises(IndexError), watched():
        raise IndexError("of something else")
    sample_categorical(weights)
    check_draws()


@pytest.mark.parametrize("bad", [nan, inf])
def test_who_watches_is_told_of_logits_that_are_not_finite(bad):
    with watched():
        drawable(torch.tensor([-inf, 1.0]))
    with pytest.raises(UserError), watched():
        drawable(torch.tensor([-inf, 1.0, bad]))
