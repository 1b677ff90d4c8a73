from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from gfnem.errors import UserError
from gfnem.tasks.discrete_vae.layers import (
    EachPixel,
    Spread,
    downwards,
    grid_of,
    halvings,
    upwards,
)
from gfnem.tasks.discrete_vae.model import DiscreteVAE
from gfnem.tasks.discrete_vae.policy import GridPolicy
from tests.tasks.discrete_vae.tiny import make_model, make_policy

WAYS = {
    ((28, 28), (4, 4)): [(28, 28), (14, 14), (7, 7), (4, 4)],
    ((28, 28), (7, 7)): [(28, 28), (14, 14), (7, 7)],
    ((8, 8), (2, 2)): [(8, 8), (4, 4), (2, 2)],
    ((8, 8), (8, 8)): [(8, 8)],
    ((8, 8), (1, 1)): [(8, 8), (4, 4), (2, 2), (1, 1)],
    ((32, 20), (4, 5)): [(32, 20), (16, 10), (8, 5), (4, 5)],
    ((5, 9), (5, 2)): [(5, 9), (5, 5), (5, 3), (5, 2)],
}


@pytest.mark.parametrize("image, grid", WAYS)
def test_halvings(image, grid):
    assert halvings(image, grid) == WAYS[image, grid]


@pytest.mark.parametrize(
    "image, grid",
    [
        ((28, 28), (4, 4)),
        ((32, 32), (4, 4)),
        ((8, 8), (4, 4)),
        ((24, 24), (6, 6)),
        ((24, 100), (6, 4)),
        ((20, 7), (5, 4)),
        ((3, 1), (3, 1)),
    ],
)
def test_the_grid_of_an_image_where_none_is_given(image, grid):
    assert grid_of(image, None) == grid
    assert halvings(image, grid)[-1] == grid
    assert DiscreteVAE(1, *image).grid == grid
    assert GridPolicy(1, *image).positions == grid[0] * grid[1]


@pytest.mark.parametrize("image, grid", WAYS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sizes_of_networks_down_and_up(image, grid, channels):
    down = downwards(channels, 4, 1, image, grid)
    features = down(torch.rand(2, channels, *image))
    assert features.shape == (2, 4, *grid)
    up = upwards(4, 6, 1, 2 * channels, image, grid)
    assert up(features).shape == (2, 2 * channels, *image)


@pytest.mark.parametrize("image, grid", WAYS)
def test_every_pixel_and_every_position_matters(image, grid):
    torch.manual_seed(0)
    pixels = torch.rand(1, 1, *image, dtype=torch.float64, requires_grad=True)
    down = downwards(1, 16, 1, image, grid).double()
    (gradient,) = torch.autograd.grad(down(pixels).square().sum(), pixels)
    assert (gradient != 0).all()
    embedded = torch.randn(1, 4, *grid, dtype=torch.float64, requires_grad=True)
    up = upwards(4, 16, 1, 1, image, grid).double()
    (gradient,) = torch.autograd.grad(up(embedded).square().sum(), embedded)
    assert (gradient != 0).all()
    # The biases begin at zero: only what a pixel sees of the grid makes it differ from zero.
    assert (up(embedded) != 0).all()


@pytest.mark.parametrize("image, grid", WAYS)
@torch.no_grad()
def test_activations_keep_their_scale(image, grid):
    torch.manual_seed(0)
    features = downwards(1, 64, 0, image, grid)(torch.randn(8, 1, *image))
    assert 0.05 < float(features.square().mean()) < 5
    output = upwards(4, 64, 0, 8, image, grid)(torch.randn(8, 4, *grid))
    assert 0.2 < float(output.square().mean()) < 8


def test_no_blocks_and_more_blocks():
    sizes = [
        sum(p.numel() for p in downwards(1, 4, blocks, (8, 8), (2, 2)).parameters())
        for blocks in (0, 1, 3)
    ]
    # 4 x 4 weights of 3 x 3 and of 1 x 1, and two biases of 4.
    assert [size - sizes[0] for size in sizes] == [0, 168, 3 * 168]


def test_networks_without_residual_blocks_learn():
    down = downwards(1, 4, 0, (8, 8), (4, 4))
    down(torch.rand(2, 1, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in down.parameters())
    with pytest.raises(UserError, match="^blocks is 1001; it must be at most 1000$"):
        downwards(1, 4, 1001, (8, 8), (4, 4))


@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (29, 29)])
def test_grids_that_halving_does_not_lead_to(grid):
    message = (
        f"model.grid={list(grid)}: images of 28 x 20 are halved, rounding up; sizes that can be "
        "reached are 28, 14, 7, 4, 2, 1 in height and 20, 10, 5, 3, 2, 1 in width; or resize the "
        "images"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        halvings((28, 20), grid)


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (6, 7), (5, 7)])
@torch.no_grad()
def test_spread_convolutions_are_transposed_ones(size):
    """Of 4 x 4 with a stride of 2; sizes that are odd leave the last row or column out."""
    width, smaller = 3, (3, 4)
    torch.manual_seed(0)
    transposed = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
    spread = Spread(smaller, size)
    convolution = spread.convolution(width)
    # Output row r = 2 i - 1 + down sees input row i - 1 + back by the kernel's row r + 1 - 2 row.
    weight = convolution.weight.view(2, 2, width, width, 2, 2)
    for down in range(2):
        for across in range(2):
            for back in range(2):
                for left in range(2):
                    kernel = transposed.weight[:, :, 2 + down - 2 * back, 2 + across - 2 * left]
                    weight[down, across, :, :, back, left] = kernel.t()
    assert convolution.bias is not None and transposed.bias is not None
    convolution.bias.copy_(transposed.bias.repeat(4))
    x = torch.randn(2, width, *smaller)
    expected = transposed(x)[:, :, : size[0], : size[1]]
    torch.testing.assert_close(spread(convolution(x)), expected)


@torch.no_grad()
def test_each_pixel_is_a_layer_behind_the_spread():
    torch.manual_seed(0)
    spread, layer = Spread((3, 4), (6, 8)), EachPixel(5, 2, pixels=4)
    x = torch.randn(2, 4 * 5, 4, 5)
    behind = nn.functional.conv2d(spread(x), layer.weight[:, :, None, None], layer.bias)
    torch.testing.assert_close(spread(layer(x)), behind)


def test_networks_are_compiled_on_request(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda network: compiled.append(network))
    make_model()
    make_policy()
    assert not compiled
    model, policy = make_model(compile=True), make_policy(compile=True)
    assert compiled == [model.decoder, policy.encoder]
