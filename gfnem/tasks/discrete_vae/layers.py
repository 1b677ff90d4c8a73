"""Convolutions between an image and a grid of positions: down in the encoder, up in the decoder."""

from __future__ import annotations

from itertools import zip_longest

import torch
from torch import Tensor, nn

from gfnem.errors import UserError


class Residual(nn.Module):
    """x + f(x), f a 3 x 3 and a 1 x 1 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.change = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change(x)


def halvings(image: tuple[int, int], grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes on the way from an image to its grid, each half of the one before, rounded up.

    Raises UserError for a grid that halving does not lead to.
    """
    ways = []
    for size, cells in zip(image, grid, strict=True):
        way = [size]
        while way[-1] > max(cells, 1):
            way.append((way[-1] + 1) // 2)
        if way[-1] != cells:
            raise UserError(
                f"model.grid={list(grid)}: images of {image[0]} x {image[1]} are halved, rounding "
                f"up; sizes that can be reached are {_reachable(image[0])} in height and "
                f"{_reachable(image[1])} in width"
            )
        ways.append(way)
    heights, widths = ways
    return [
        (height or heights[-1], width or widths[-1])
        for height, width in zip_longest(heights, widths, fillvalue=0)
    ]


def _reachable(size: int) -> str:
    way = [size]
    while way[-1] > 1:
        way.append((way[-1] + 1) // 2)
    return ", ".join(map(str, way))


def downwards(
    channels: int, width: int, blocks: int, image: tuple[int, int], grid: tuple[int, int]
) -> nn.Sequential:
    """From an image to `width` features of each position of its grid."""
    layers: list[nn.Module] = []
    sizes = halvings(image, grid)
    for larger, smaller in zip(sizes, sizes[1:], strict=False):
        kernel, stride = _kernel(larger, smaller)
        layers += [nn.Conv2d(channels, width, kernel, stride, padding=1), nn.ReLU(inplace=True)]
        channels = width
    if channels != width:
        layers += [nn.Conv2d(channels, width, 1)]
    layers += [*(Residual(width) for _ in range(blocks)), nn.ReLU(inplace=True)]
    return _network(layers)


def upwards(
    embedding: int,
    width: int,
    blocks: int,
    outputs: int,
    image: tuple[int, int],
    grid: tuple[int, int],
) -> nn.Sequential:
    """From embeddings of a grid's positions to `outputs` numbers for each pixel."""
    layers: list[nn.Module] = [nn.Conv2d(embedding, width, 1)]
    layers += [Residual(width) for _ in range(blocks)]
    sizes = halvings(image, grid)[::-1]
    for smaller, larger in zip(sizes, sizes[1:], strict=False):
        kernel, stride = _kernel(larger, smaller)
        layers += [
            nn.ConvTranspose2d(width, width, kernel, stride, padding=1),
            nn.ReLU(inplace=True),
        ]
    return _network([*layers, nn.Conv2d(width, outputs, 1)])


def _network(layers: list[nn.Module]) -> nn.Sequential:
    """Layers whose activations keep their scale, in the order of dimensions that is fastest."""
    network = nn.Sequential(*layers)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            seen = layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
            if isinstance(layer, nn.ConvTranspose2d):
                seen /= layer.stride[0] * layer.stride[1]
            nn.init.normal_(layer.weight, std=(2 / seen) ** 0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _kernel(
    larger: tuple[int, int], smaller: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Kernel size and stride of a convolution, padded by 1, from the larger to the smaller size."""
    stride = tuple(1 if big == small else 2 for big, small in zip(larger, smaller, strict=True))
    kernel = tuple(
        4 if step == 2 and big % 2 == 0 else 3 for big, step in zip(larger, stride, strict=True)
    )
    return (kernel[0], kernel[1]), (stride[0], stride[1])
