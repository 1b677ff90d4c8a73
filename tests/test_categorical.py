from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from gfnem.categorical import sample_categorical

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
