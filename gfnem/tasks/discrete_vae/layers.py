"""Convolutions between an image and a grid of positions: down in the encoder, up in the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from gfnem.errors import UserError

MOST_BLOCKS = 1000


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
                f"{_reachable(image[1])} in width; or resize the images"
            )
        ways.append(way)
    heights, widths = ways
    return [
        (height or heights[-1], width or widths[-1])
        for height, width in zip_longest(heights, widths, fillvalue=0)
    ]


def grid_of(image: tuple[int, int], grid: Sequence[int] | None) -> tuple[int, int]:
    """The grid that is given, or else what halving an image leads to while 4 are left, or more.

    Raises UserError for a grid that is no height and width.
    """
    if grid is None:
        height, width = (
            next(half for half in _halves(size) if (half + 1) // 2 < 4) for size in image
        )
        return height, width
    if len(grid) != 2 or min(grid) < 1:
        raise UserError(f"model.grid={list(grid)}: give its height and width in codes")
    return grid[0], grid[1]


def _reachable(size: int) -> str:
    return ", ".join(map(str, _halves(size)))


def _halves(size: int) -> list[int]:
    """A size, half of it, half of that and so on, down to 1, rounded up."""
    way = [size]
    while way[-1] > 1:
        way.append((way[-1] + 1) // 2)
    return way


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
    layers += _residuals(width, blocks)
    # What a rectifier gives must stay as it is for its gradient.
    layers += [nn.ReLU(inplace=blocks > 0)]
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
    layers += _residuals(width, blocks)
    sizes = halvings(image, grid)[::-1]
    spread: Spread | None = None
    for smaller, larger in zip(sizes, sizes[1:], strict=False):
        layers += [] if spread is None else [spread]
        spread = Spread(smaller, larger)
        layers += [spread.convolution(width), nn.ReLU(inplace=True)]
    # Before the last is spread: the output is narrower.
    layers += [EachPixel(width, outputs, spread.pixels if spread else 1)]
    return _network([*layers, *([spread] if spread else [])])


class Spread(nn.Module):
    """Deals channels out to the pixels of a larger image.

    A convolution behind which channels are dealt out to two pixels in each direction is a
    transposed one of 4 x 4 with a stride of 2, at less cost: each pixel of the larger image sees
    two in each direction of the smaller.
    """

    def __init__(self, smaller: tuple[int, int], larger: tuple[int, int]):
        super().__init__()
        self.larger = larger
        self.doubled = (smaller[0] != larger[0], smaller[1] != larger[1])

    @property
    def pixels(self) -> int:
        """How many pixels the channels of one are dealt out to."""
        return 2 ** sum(self.doubled)

    def convolution(self, width: int) -> nn.Conv2d:
        """From `width` channels of the smaller image to what is dealt out to `width` channels."""
        height, across = (2 if doubled else 3 for doubled in self.doubled)
        return nn.Conv2d(width, width * self.pixels, (height, across), padding=1)

    def forward(self, x: Tensor) -> Tensor:
        down, across = (2 if doubled else 1 for doubled in self.doubled)
        pixels = x.permute(0, 2, 3, 1).unflatten(3, (down, across, -1)).transpose(2, 3)
        pixels = pixels.flatten(3, 4).flatten(1, 2)
        # The convolution's padding has made half a pixel too many on each side.
        first, left = (1 if doubled else 0 for doubled in self.doubled)
        height, width = self.larger
        pixels = pixels[:, first : first + height, left : left + width]
        return pixels.contiguous().permute(0, 3, 1, 2)


class EachPixel(nn.Linear):
    """The same linear layer for each of the pixels that channels are dealt out to later."""

    def __init__(self, width: int, outputs: int, pixels: int):
        super().__init__(width, outputs)
        self.pixels = pixels

    def forward(self, input: Tensor) -> Tensor:
        each = input.permute(0, 2, 3, 1).unflatten(3, (self.pixels, -1))
        return super().forward(each).flatten(3).permute(0, 3, 1, 2)


def _residuals(width: int, blocks: int) -> list[nn.Module]:
    if blocks > MOST_BLOCKS:
        raise UserError(f"blocks is {blocks}; it must be at most {MOST_BLOCKS}")
    return [Residual(width) for _ in range(blocks)]


def _network(layers: list[nn.Module]) -> nn.Sequential:
    """Layers whose activations keep their scale, in the order of dimensions that is fastest."""
    network = nn.Sequential(*layers)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            seen = layer.weight[0].numel()
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
