from __future__ import annotations

import re
from collections import Counter
from math import exp
from typing import Any

import pytest
import torch
from torch import Tensor

from gfnem.errors import UserError
from gfnem.tasks.discrete_vae import model as module
from gfnem.tasks.discrete_vae.codes import Codes
from gfnem.tasks.discrete_vae.images import Images
from gfnem.tasks.discrete_vae.model import DiscreteVAE
from tests.tasks.discrete_vae.tiny import (
    CODES,
    all_grids,
    counts,
    float64,  # noqa: F401
    images,
    log_joint,
    log_joint_table,
    log_prior,
    make_model,
    p_value,
    posteriors,
    random_codes,
)

pytestmark = pytest.mark.usefixtures("float64")

PRIORS = ("uniform", "masked_linear", "masked_convolution")
every_prior = pytest.mark.parametrize("prior", PRIORS)
every_pixels = pytest.mark.parametrize("pixels", ["binary", "grey", "rgb"])
chunks = pytest.mark.parametrize("chunk", [1, 4, 32])


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setitem(module.CHUNK, "cpu", chunk)


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found.detach(), torch.as_tensor(expected), rtol=1e-6, atol=1e-6)


def joint_by_loop(model: DiscreteVAE, x: Images, index: Tensor) -> list[list[float]]:
    return [
        [log_joint(model, pixels, grid) for grid in grids]
        for pixels, grids in zip(x.pixels, index, strict=True)
    ]


@every_pixels
@every_prior
@pytest.mark.parametrize("grid", [(2, 2), (1, 2), (4, 2)])
def test_log_joint_is_that_of_every_grid_by_itself(pixels, prior, grid):
    model, x = make_model(pixels, prior=prior, grid=grid), images(3, pixels)
    z = random_codes(3, 4, positions=grid[0] * grid[1])
    expected = joint_by_loop(model, x, z.index)
    close(model.log_joint(x, z), expected)
    with torch.no_grad():
        close(model.log_joint(x, z), expected)


@every_pixels
@chunks
@pytest.mark.usefixtures("few_at_a_time")
def test_repeated_grids_are_decoded_once(pixels, monkeypatch):
    """The same grid for several images, several times for one image, in several chunks."""
    model, x = make_model(pixels), images(3, pixels)
    index = random_codes(3, 40).index
    index[1, :7] = index[0, 3]
    distinct = len(counts(index.flatten(0, 1)))
    assert distinct < 3 * 40
    decoded = []
    forward = model.decoder.forward
    monkeypatch.setattr(
        model.decoder, "forward", lambda rows: decoded.append(len(rows)) or forward(rows)
    )
    with_gradients = model.log_joint(x, Codes(index))
    assert sum(decoded) == distinct
    decoded.clear()
    with torch.no_grad():
        without = model.log_joint(x, Codes(index))
    assert sum(decoded) == distinct and max(decoded) <= module.CHUNK["cpu"]
    close(with_gradients, without)
    close(without[:, ::5], joint_by_loop(model, x, index[:, ::5]))


@pytest.mark.parametrize("gradients", [True, False])
def test_grids_too_many_to_number(gradients):
    """4^32 = 2^64 of them: no 64-bit integer counts them."""
    model = DiscreteVAE(1, 8, 4, "binary", (8, 4), 4, 2, 4, 1, "masked_linear", 5)
    x = Images(torch.randint(2, (2, 1, 8, 4)).double(), torch.arange(2))
    assert model.codes**model.positions >= 2**63
    index = torch.randint(4, (2, 5, 32))
    index[1, 2:] = index[0, 1]
    index[0, 4, -1] = (index[0, 0, -1] + 1) % 4
    index[0, 4, :-1] = index[0, 0, :-1]
    with torch.set_grad_enabled(gradients):
        close(model.log_joint(x, Codes(index)), joint_by_loop(model, x, index))
    assert not model.tractable and model.log_likelihood(x) is None


def test_decoder_and_prior_may_be_given_different_grids():
    model, x = make_model(), images(2)
    prior, decoder = random_codes(2, 3).index, random_codes(2, 3, seed=1).index
    found = model.log_joint(x, Codes(prior, decoded=decoder))
    expected = torch.tensor(
        [
            [log_joint(model, pixels, a, b) for a, b in zip(p, d, strict=True)]
            for pixels, p, d in zip(x.pixels, prior, decoder, strict=True)
        ]
    )
    close(found, expected)


@every_pixels
def test_gradient_is_that_of_decoding_every_grid(pixels):
    model, x = make_model(pixels), images(3, pixels)
    index = random_codes(3, 6).index
    index[:, 3:] = index[:, :1]
    weights = torch.randn(3, 6)
    parameters = list(model.parameters())
    found = torch.autograd.grad((weights * model.log_joint(x, Codes(index))).sum(), parameters)

    total = torch.zeros(())
    for row, grids in enumerate(index):
        for sample, grid in enumerate(grids):
            embedded = model.codebook(grid).t().view(1, -1, *model.grid)
            zero = torch.zeros(1, dtype=torch.long)
            log_p = model.likelihood.log_prob(
                x.pixels[row : row + 1], model.decoder(embedded), zero, zero
            )
            log_p = log_p + model.prior.log_prob(grid[None]).sum()
            total = total + weights[row, sample] * log_p.sum()
    expected = torch.autograd.grad(total, parameters)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other)


@every_pixels
@every_prior
def test_likelihood_and_joint_are_those_of_enumeration(pixels, prior):
    model, x = make_model(pixels, prior=prior), images(3, pixels)
    assert model.tractable
    table = log_joint_table(model, x)
    # The model numbers the grids in an order of its own.
    order = {tuple(grid): n for n, grid in enumerate(all_grids().tolist())}
    columns = [order[tuple(grid)] for grid in model.all_codes.tolist()]
    assert sorted(columns) == list(range(CODES**4))
    close(model.log_joint_all(x), table[:, columns])
    log_likelihood = model.log_likelihood(x)
    assert log_likelihood is not None
    close(log_likelihood, table.logsumexp(-1))


def test_gradient_of_the_likelihood_is_fishers():
    """That of E_{p(z | x)}[log p(x, z)] under the enumerated posterior."""
    model, x = make_model(), images(2)
    grids = all_grids().expand(2, -1, -1)
    weights = log_joint_table(model, x).softmax(-1)
    expectation = (weights * model.log_joint(x, Codes(grids))).sum()
    log_likelihood = model.log_likelihood(x)
    assert log_likelihood is not None
    parameters = list(model.parameters())
    found = torch.autograd.grad(log_likelihood.sum(), parameters)
    for one, other in zip(found, torch.autograd.grad(expectation, parameters), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("pixels", ["binary", "grey"])
def test_posterior_draws_have_the_frequencies_of_enumeration(pixels):
    model, x = make_model(pixels), images(3, pixels)
    torch.manual_seed(0)
    z = model.sample_posterior(x, 10_000)
    assert z.index.shape == (3, 10_000, 4)
    for index, probability in zip(z.index, posteriors(model, x), strict=True):
        assert p_value(counts(index), probability) > 1e-3


@pytest.mark.parametrize(
    "grid, codes, tractable", [((2, 2), 16, True), ((4, 4), 2, True), ((2, 2), 17, False)]
)
def test_grids_are_enumerated_up_to_a_number(grid, codes, tractable):
    model = DiscreteVAE(1, 4, 4, grid=grid, codes=codes, decoder_width=1, blocks=0)
    assert model.tractable == tractable
    if not tractable:
        assert model.log_likelihood(images(1)) is None


@every_prior
def test_draws_of_codes_and_images(prior):
    model = make_model(prior=prior, grid=(1, 2))
    n = 20_000
    x, z = model.sample(n, torch.Generator().manual_seed(0))
    assert x.pixels.shape == (n, 1, 4, 4) and z.index.shape == (n, 1, 2) and len(x) == n
    assert x.ids.tolist() == list(range(n))
    assert set(x.pixels.unique().tolist()) == {0.0, 1.0}
    grids = all_grids(2)
    p = [float(torch.tensor(log_prior(model, grid)).exp()) for grid in grids]
    index = z.index[:, 0]
    probability = dict(zip(map(tuple, grids.tolist()), p, strict=True))
    assert p_value(counts(index), probability) > 1e-3
    means = model.mean_image(grids)
    for grid, mean in zip(grids, means, strict=True):
        of_grid = x.pixels[(index == grid).all(-1)]
        error = (mean * (1 - mean) / len(of_grid)).sqrt()
        assert ((of_grid.mean(0) - mean).abs() < 4.5 * error).all()


@every_prior
def test_prior_draws_are_the_same_for_all_images(prior):
    model, samples = make_model(prior=prior, grid=(1, 2)), 10_000
    torch.manual_seed(0)
    z, log_p = model.sample_prior(images(3), samples)
    assert (z.index == z.index[:1]).all() and (log_p == log_p[:1]).all()
    expected = {tuple(grid.tolist()): log_prior(model, grid) for grid in all_grids(2)}
    probability = {grid: exp(value) for grid, value in expected.items()}
    assert p_value(counts(z.index[0]), probability) > 1e-3
    drawn = [expected[tuple(grid)] for grid in z.index[0, :50].tolist()]
    assert log_p[0, :50].tolist() == pytest.approx(drawn)


@pytest.mark.parametrize("pixels", ["grey", "rgb"])
def test_draws_of_intensities_are_levels(pixels):
    model = make_model(pixels)
    x, z = model.sample(200, torch.Generator().manual_seed(0))
    level = x.pixels * 255
    torch.testing.assert_close(level, level.round())
    assert level.min() >= 0 and level.max() <= 255 and len(level.round().unique()) > 20
    again, same = model.sample(200, torch.Generator().manual_seed(0))
    assert torch.equal(again.pixels, x.pixels) and torch.equal(same.index, z.index)


@every_pixels
def test_mean_images(pixels):
    model = make_model(pixels)
    grids = all_grids()[:70]
    found = model.mean_image(grids)
    assert found.shape == (70, *model.image_shape) and not found.requires_grad
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    one = model.decoder(model.codebook(grids[3]).t().view(1, 2, 2, 2)).detach()[0]
    channels = model.image_shape[0]
    expected = one.sigmoid() if pixels == "binary" else (one[:channels] + 0.5).clamp(0, 1)
    close(found[3], expected)


def test_weight_decay_is_for_the_decoder_alone():
    model = make_model()
    decays, others = model.parameter_groups()
    optimizer = torch.optim.AdamW([decays, others], lr=0.1, weight_decay=1.0)
    decoder = {id(p) for p in model.decoder.parameters()}
    assert {id(p) for p in decays["params"]} == decoder
    everything = decays["params"] + others["params"]
    assert Counter(map(id, everything)) == Counter(map(id, model.parameters()))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1.0, 0.0]


class TestCodes:
    index = torch.arange(24).view(2, 3, 4)

    def test_selected_grids(self):
        chosen = torch.tensor([[2, 0], [1, 1]])
        codes = Codes(self.index, decoded=self.index + 100).select(chosen)
        expected = [[[8, 9, 10, 11], [0, 1, 2, 3]], [[16, 17, 18, 19], [16, 17, 18, 19]]]
        assert codes.index.tolist() == expected
        assert codes.decoded is not None
        assert torch.equal(codes.decoded, codes.index + 100)
        assert Codes(self.index).select(chosen).decoded is None

    def test_accepted_grids(self):
        accept = torch.tensor([[True, False, False], [False, True, True]])
        codes = Codes(self.index).where(accept, Codes(-self.index))
        assert torch.equal(codes.index[accept], self.index[accept])
        assert torch.equal(codes.index[~accept], -self.index[~accept])

    def test_to_a_device(self):
        codes = Codes(self.index, decoded=self.index).to("meta")
        assert codes.decoded is not None
        assert codes.index.is_meta and codes.decoded.is_meta


@pytest.mark.parametrize(
    "options, message",
    [
        ({"codes": 1}, "model.codes is 1; it must be at least 2"),
        ({"embedding": 0}, "model.embedding is 0; it must be at least 1"),
        ({"decoder_width": 0}, "model.decoder_width is 0; it must be at least 1"),
        ({"blocks": -1}, "model.blocks is -1; it must be at least 0"),
        ({"prior_width": 0}, "model.prior_width is 0; it must be at least 1"),
        ({"precision": "half"}, "model.precision is 'half'; use 'float32' or 'bfloat16'"),
        ({"grid": [2]}, "model.grid=[2]: give its height and width in codes"),
        ({"grid": [2, 0]}, "model.grid=[2, 0]: give its height and width in codes"),
        ({"grid": [3, 2]}, "model.grid=[3, 2]: images of 4 x 4 are halved"),
        (
            {"prior": "pixelcnn"},
            "model.prior is 'pixelcnn'; use 'uniform', 'masked_linear' or 'masked_convolution'",
        ),
    ],
)
def test_arguments_that_make_no_model(options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        DiscreteVAE(1, 4, 4, **options)


def test_reduced_precision_stays_close_and_out_of_evaluations():
    torch.set_default_dtype(torch.float32)
    exact, rounded = make_model(), make_model(precision="bfloat16")
    x, index = images(3), random_codes(3, 4).index
    expected = exact.log_joint(x, Codes(index))
    found = rounded.log_joint(x, Codes(index))
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.1
    assert rounded.eval().log_joint(x, Codes(index)).equal(expected)
