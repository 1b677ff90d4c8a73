"""Distributions over a grid's codes in raster order, each code given those before it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from gfnem.categorical import sample_categorical

PriorName = Literal["uniform", "masked_linear", "masked_convolution"]


class CausalLinear(nn.Module):
    """Features of each position that depend on the codes before it and on a context.

    A masked linear layer over one-hot codes, then a residual network that the positions share.

    width: features of each position.
    context: features that every position is given; 0 for none.
    """

    def __init__(self, positions: int, codes: int, width: int, context: int = 0):
        super().__init__()
        self.positions = positions
        self.codes = codes
        # From each code at each position to the features of all later positions.
        self.table = nn.Parameter(torch.randn(positions, codes, positions, width) * 0.1)
        self.bias = nn.Parameter(torch.zeros(positions, width))
        self.context = nn.Linear(context, width, bias=False) if context else None
        self.residual = nn.Sequential(
            nn.ReLU(), nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width)
        )
        later = torch.ones(positions, positions, dtype=torch.bool).triu(1)
        self.later: Tensor
        self.register_buffer("later", later[:, None, :, None], persistent=False)

    def given(self, context: Float[Tensor, "rows positions context"]) -> Tensor:
        """What does not depend on codes, once for each row; to be handed to the methods below."""
        assert self.context is not None
        return self.context(context) + self.bias

    def forward(
        self,
        one_hot: Float[Tensor, "*rows positions codes"],
        given: Float[Tensor, "*#rows positions width"] | None = None,
    ) -> Float[Tensor, "*rows positions width"]:
        """Features of all positions of known grids, in one pass."""
        table = torch.where(self.later, self.table, 0.0)
        before = one_hot.flatten(-2) @ table.flatten(2).flatten(0, 1)
        return self._features(before.unflatten(-1, (self.positions, -1)), given)

    def at(
        self,
        position: int,
        one_hot: Float[Tensor, "*rows before codes"],
        given: Float[Tensor, "*#rows positions width"] | None = None,
    ) -> Float[Tensor, "*rows width"]:
        """Features of one position, from the codes before it alone."""
        before = one_hot.flatten(-2) @ self.table[:position, :, position].flatten(0, 1)
        here = None if given is None else given[..., position, :]
        return self._features(before, here, self.bias[position])

    def _features(self, before: Tensor, given: Tensor | None, bias: Tensor | None = None) -> Tensor:
        if given is not None:
            hidden = before + given
        else:
            hidden = before + (self.bias if bias is None else bias)
        return (hidden + self.residual(hidden)).relu_()


class Prior(nn.Module, ABC):
    """p(z) over grids of codes.

    grid: its height and width in codes.
    """

    def __init__(self, grid: tuple[int, int], codes: int):
        super().__init__()
        self.grid = grid
        self.positions = grid[0] * grid[1]
        self.codes = codes

    @abstractmethod
    def log_probabilities(
        self, one_hot: Float[Tensor, "rows positions codes"]
    ) -> Float[Tensor, "rows positions codes"]:
        """log p(code at each position | codes before it), normalised."""

    @abstractmethod
    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> Int[Tensor, "n positions"]:
        """Ancestral draws."""

    def log_prob(self, index: Int[Tensor, "rows positions"]) -> Float[Tensor, "rows positions"]:
        """log p(z) in nats, the term of each position."""
        log_p = self.log_probabilities(self.one_hot(index))
        return log_p.gather(-1, index[..., None]).squeeze(-1)

    def one_hot(self, index: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch codes"]:
        dtype = next((p.dtype for p in self.parameters()), torch.get_default_dtype())
        return functional.one_hot(index, self.codes).to(dtype)


class UniformPrior(Prior):
    """All grids are equally likely."""

    def __init__(self, grid: tuple[int, int], codes: int):
        super().__init__(grid, codes)
        self.register_buffer("device_of", torch.zeros(0), persistent=False)

    def log_probabilities(self, one_hot: Tensor) -> Tensor:
        return torch.full_like(one_hot, 1 / self.codes).log()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        device: Any = self.device_of.device
        return torch.randint(0, self.codes, (n, self.positions), generator=generator, device=device)


class MaskedLinearPrior(Prior):
    """Autoregressive: every code is given all codes before it.

    width: of its network.
    """

    def __init__(self, grid: tuple[int, int], codes: int, width: int = 64):
        super().__init__(grid, codes)
        self.features = CausalLinear(self.positions, codes, width)
        self.output = nn.Linear(width, codes)

    def log_probabilities(self, one_hot: Tensor) -> Tensor:
        return self.output(self.features(one_hot)).log_softmax(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        drawn = self.output.weight.new_zeros(n, 0, self.codes)
        index = []
        for position in range(self.positions):
            logits = self.output(self.features.at(position, drawn))
            index.append(sample_categorical(logits.softmax(-1), generator))
            drawn = torch.cat([drawn, self.one_hot(index[-1])[:, None]], 1)
        return torch.stack(index, 1)


class MaskedConvolutionPrior(Prior):
    """Autoregressive: masked convolutions over the grid (PixelCNN, arXiv 1601.06759).

    A code is not given those far to its right in the rows above, where such convolutions are blind.

    width: channels. layers: convolutions of 3 x 3, the first blind to its own position.
    """

    def __init__(self, grid: tuple[int, int], codes: int, width: int = 64, layers: int = 8):
        super().__init__(grid, codes)
        self.layers = nn.ModuleList(
            nn.Conv2d(width if layer else codes, width, 3, padding=1) for layer in range(layers)
        )
        self.output = nn.Linear(width, codes)
        mask = torch.ones(2, 3, 3)
        mask[:, 2] = 0
        mask[:, 1, 2] = 0
        mask[0, 1, 1] = 0
        self.register_buffer("mask", mask, persistent=False)

    def _weight(self, layer: int) -> Float[Tensor, "out in 3 3"]:
        weight: Any = self.layers[layer].weight
        return weight * self.mask[min(layer, 1)]  # type: ignore[index]

    def log_probabilities(self, one_hot: Tensor) -> Tensor:
        hidden = one_hot.mT.unflatten(2, self.grid)
        for number, layer in enumerate(self.layers):
            bias: Any = layer.bias
            hidden = functional.conv2d(hidden, self._weight(number), bias, padding=1).relu()
        return self.output(hidden.flatten(2).mT).log_softmax(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        height, width = self.grid
        # What each layer has given so far, with a border of zeros: at a new position every layer
        # looks at one patch of the one before.
        sizes = [self.codes] + [self.output.in_features] * len(self.layers)
        given = [self.output.weight.new_zeros(n, size, height + 2, width + 2) for size in sizes]
        weights = [self._weight(layer).flatten(1) for layer in range(len(self.layers))]
        index = []
        for position in range(self.positions):
            row, column = divmod(position, width)
            for number, layer in enumerate(self.layers):
                patch = given[number][:, :, row : row + 3, column : column + 3].flatten(1)
                bias: Any = layer.bias
                hidden = functional.linear(patch, weights[number], bias).relu()
                given[number + 1][:, :, row + 1, column + 1] = hidden
            logits = self.output(given[-1][:, :, row + 1, column + 1])
            index.append(sample_categorical(logits.softmax(-1), generator))
            given[0][:, :, row + 1, column + 1] = self.one_hot(index[-1])
        return torch.stack(index, 1)


def prior_named(name: PriorName, grid: tuple[int, int], codes: int, width: int) -> Prior:
    """The prior of a name; `width` means nothing to a uniform one."""
    if name == "uniform":
        return UniformPrior(grid, codes)
    if name == "masked_linear":
        return MaskedLinearPrior(grid, codes, width)
    return MaskedConvolutionPrior(grid, codes, width)
