from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from gfnem.tasks.discrete_vae.likelihood import Bernoulli, DiscretisedLogistic
from tests.tasks.discrete_vae.tiny import float64, p_value  # noqa: F401

pytestmark = pytest.mark.usefixtures("float64")

LEVELS = torch.arange(256)
MEANS = [-0.4, 0.0, 0.5, 0.731, 1.0, 1.7]
# Of the scale in intensities: from far below a level's width to far beyond all levels.
LOG_SCALES = [-7.0, -5.5, -3.0, -1.0, 2.0, 6.0]


def output_of(mean: float, log_scale: float) -> Tensor:
    """The decoder's output for one pixel."""
    return torch.tensor([mean - 0.5, log_scale + 2]).view(1, 2, 1, 1)


def log_mass(mean: float, log_scale: float) -> Tensor:
    """Of all levels of one pixel."""
    pixels = LEVELS.view(-1, 1, 1, 1) / 255
    row = torch.zeros_like(LEVELS)
    return DiscretisedLogistic().log_prob(pixels, output_of(mean, log_scale), LEVELS, row)


def test_extreme_parameters_are_those_of_the_class():
    """The tests say what log scale they mean, so the floor must not be in the way."""
    mean, log_scale = DiscretisedLogistic._parameters(output_of(0.731, -7.0))
    assert (mean.item(), log_scale.item()) == (pytest.approx(0.731), pytest.approx(-7.0))
    assert DiscretisedLogistic._parameters(output_of(0.0, -50.0))[1].item() == -7.0


@pytest.mark.parametrize("log_scale", [*LOG_SCALES, 25.0])
@pytest.mark.parametrize("mean", [*MEANS, -1e3, 1e3])
def test_discretised_logistic_sums_to_one(mean, log_scale):
    log_p = log_mass(mean, log_scale)
    assert log_p.isfinite().all()
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("log_scale", LOG_SCALES)
@pytest.mark.parametrize("mean", MEANS)
def test_discretised_logistic_is_scipys(mean, log_scale):
    logistic = stats.logistic(mean, torch.tensor(log_scale).exp().item())
    edges = (LEVELS[1:] - 0.5) / 255
    # Differences of whichever of the two tails is the smaller, which lose no digits.
    below, above = (torch.as_tensor(f(edges.numpy())) for f in (logistic.cdf, logistic.sf))
    between = torch.where(edges[1:] < mean, below.diff(), -above.diff())
    expected = torch.cat([below[:1], between, above[-1:]])
    found = log_mass(mean, log_scale).exp()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_extreme_pixels_are_finite(dtype):
    pixels = torch.tensor([0.0, 1 / 255, 0.5, 254 / 255, 1.0], dtype=dtype).view(-1, 1, 1, 1)
    image = torch.arange(5)
    for mean in (-1e3, 0.0, 0.5, 1.0, 1e3):
        for log_scale in (-1e3, -7.0, 0.0, 10.0):
            output = output_of(mean, log_scale).to(dtype).requires_grad_()
            row = torch.zeros_like(image)
            log_p = DiscretisedLogistic().log_prob(pixels, output, image, row)
            (gradient,) = torch.autograd.grad(log_p.sum(), output)
            assert log_p.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_and_channels_are_independent(channels):
    """Means of all channels come first, then their log scales; any image under any row."""
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(2, 2 * channels, 3, 2, generator=generator)
    pixels = torch.randint(256, (3, channels, 3, 2), generator=generator) / 255
    image, row = torch.tensor([2, 0, 0, 1, 2]), torch.tensor([0, 1, 0, 1, 1])
    likelihood = DiscretisedLogistic()
    found = likelihood.log_prob(pixels, output, image, row)
    for pair, (i, r) in enumerate(zip(image.tolist(), row.tolist(), strict=True)):
        total = 0.0
        for c in range(channels):
            for h in range(3):
                for w in range(2):
                    mean, log_scale = output[r, c, h, w] + 0.5, output[r, channels + c, h, w] - 2
                    level = int((pixels[i, c, h, w] * 255).round())
                    total += float(log_mass(float(mean), float(log_scale))[level])
        assert float(found[pair]) == pytest.approx(total)


def test_bernoulli_is_scipys():
    generator = torch.Generator().manual_seed(1)
    output = 3 * torch.randn(3, 2, 2, 4, generator=generator)
    pixels = torch.randint(2, (4, 2, 2, 4), generator=generator).double()
    image, row = torch.tensor([3, 0, 0, 1, 2, 3]), torch.tensor([0, 1, 0, 2, 1, 2])
    found = Bernoulli().log_prob(pixels, output, image, row)
    for pair, (i, r) in enumerate(zip(image.tolist(), row.tolist(), strict=True)):
        expected = stats.bernoulli(output[r].sigmoid().numpy()).logpmf(pixels[i].numpy()).sum()  # type: ignore[attr-defined]
        assert float(found[pair]) == pytest.approx(expected)


def test_bernoulli_at_extreme_log_odds():
    output = torch.tensor([-800.0, 800.0]).view(1, 1, 1, 2).requires_grad_()
    pixels = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(2, 1, 1, 2)
    log_p = Bernoulli().log_prob(pixels, output, torch.arange(2), torch.zeros(2, dtype=torch.long))
    assert log_p.tolist() == pytest.approx([0, -1600])
    (gradient,) = torch.autograd.grad(log_p.sum(), output)
    assert gradient.isfinite().all()


def test_bernoulli_draws_and_means():
    likelihood: Any = Bernoulli()
    log_odds = torch.tensor([-2.0, 0.0, 1.5]).view(1, 1, 1, 3)
    drawn = likelihood.sample(log_odds.expand(20_000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    p = [0.1192029, 0.5, 0.8175745]
    assert likelihood.mean(log_odds).flatten().tolist() == pytest.approx(p)
    assert drawn.mean(0).flatten().tolist() == pytest.approx(p, abs=4 * 0.5 / 20_000**0.5)


@pytest.mark.parametrize("mean, log_scale", [(0.3, -4.5), (0.9, -3.0), (0.5, 1.0)])
def test_discretised_logistic_draws_levels_with_their_probabilities(mean, log_scale):
    output = output_of(mean, log_scale).expand(20_000, -1, -1, -1)
    drawn = DiscretisedLogistic().sample(output, torch.Generator().manual_seed(0))
    level = drawn.flatten() * 255
    torch.testing.assert_close(level, level.round())
    counts = torch.bincount(level.round().long(), minlength=256)
    probability = dict(enumerate(log_mass(mean, log_scale).exp().tolist()))
    observed = {k: count for k, count in enumerate(counts.tolist()) if count}
    assert p_value(observed, probability) > 1e-3


def test_discretised_logistic_means_are_intensities():
    likelihood = DiscretisedLogistic()
    means = [likelihood.mean(output_of(mean, 0.0)).item() for mean in (-0.4, 0.25, 1.7)]
    assert means == pytest.approx([0, 0.25, 1])
