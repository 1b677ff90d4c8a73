"""Points to cluster: a training, a validation and a test set of one dimension.

Two sources make a `PointData`: `sampled` (drawn from a hierarchical mixture, needs no files) and
`points` (a CSV or NPY file of your own).

    data = sampled(seed=0)
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.errors import UserError
from gfnem.files import decoded, user_path
from gfnem.splits import named_split
from gfnem.tasks.mixture.components import DEVIATION, petal_offsets

# Of a coordinate: sums of squares of many must fit into single precision.
LARGEST = 1e15


@dataclass(frozen=True)
class Points:
    """A batch of points.

    ids: where the points are in their split; -1 for points that are in none.
    """

    values: Float[Tensor, "batch dimensions"]
    ids: Int[Tensor, "batch"]

    @classmethod
    def numbered(cls, values: Float[Tensor, "batch dimensions"]) -> Points:
        """All points of a split."""
        return cls(values, torch.arange(len(values)))

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Points:
        return Points(self.values.to(device), self.ids.to(device))

    def select(self, index: Int[Tensor, "chosen"] | slice) -> Points:
        """Some of the points, in the order of `index`."""
        return Points(self.values[index], self.ids[index])


@dataclass(frozen=True)
class Truth:
    """The mixture that points were drawn from.

    deviation: of every component, in every dimension.
    """

    means: Float[Tensor, "superclusters dimensions"]
    petals: int
    deviation: float


class PointData:
    """Training, validation and test points.

    batch_size: of the training batches; None for one batch of all of them, which is what M-steps in
        closed form want.
    seed: of the order of the training points.
    name: of the source.
    truth: what the points were drawn from; None where nobody knows.
    """

    def __init__(
        self,
        train: Points,
        valid: Points,
        test: Points,
        batch_size: int | None = None,
        seed: int = 0,
        name: str = "points",
        truth: Truth | None = None,
    ):
        self.train, self.valid, self.test = train, valid, test
        self.batch_size = batch_size
        self.seed = seed
        self.name = name
        self.truth = truth

    def split(self, name: str) -> Points:
        """Give a part by its name; raises UserError for a name that there is not."""
        return named_split({"train": self.train, "valid": self.valid, "test": self.test}, name)

    def train_batches(self, epoch: int) -> list[Points]:
        """All training points once, in an order that depends on `seed` and epoch alone."""
        if self.batch_size is None:
            return [self.train]
        order = _shuffled(len(self.train), f"{self.seed} {epoch}")
        return [self.train.select(chosen) for chosen in order.split(self.batch_size)]

    @property
    def center(self) -> Float[Tensor, "dimensions"]:
        """Mean of the training points."""
        return self.train.values.mean(0)

    @property
    def spread(self) -> Float[Tensor, ""]:
        """Standard deviation of the training points, the same for all dimensions."""
        return (self.train.values - self.center).square().mean().sqrt()

    def sizes(self) -> dict[str, Any]:
        """What models of this data need to know of it."""
        return {"dimensions": self.train.values.shape[1]}

    def describe(self) -> str:
        """What was read, in one line."""
        return (
            f"{self.name}: {len(self.train):,} training, {len(self.valid):,} validation, "
            f"{len(self.test):,} test points, {self.train.values.shape[1]} dimensions"
        )


def sampled(
    superclusters: int = 4,
    petals: int = 4,
    dimensions: int = 2,
    spacing: float = 2 * math.sqrt(2),
    deviation: float = DEVIATION,
    train_points: int = 4000,
    valid_points: int = 1000,
    test_points: int = 1000,
    batch_size: int | None = None,
    seed: int = 0,
) -> PointData:
    """Points drawn from a hierarchical mixture whose superclusters have the means `lattice`.

    superclusters, petals, dimensions: of the mixture.
    spacing: of the superclusters, in multiples of the petals' distance from their middle. With four
        petals and sqrt(2), petals of neighbours lie on top of each other: p(z | x) has up to four
        modes, which are equally good.
    deviation: standard deviation of every component, in every dimension.
    train_points, valid_points, test_points: how many.
    batch_size: of the training batches; None for one batch of all points.
    seed: of the points and of the order of the training points.

    Raises UserError for an option out of its range.
    """
    for name, value, least in (
        ("superclusters", superclusters, 1),
        ("petals", petals, 1),
        ("dimensions", dimensions, 2),
        ("train_points", train_points, 1),
        ("valid_points", valid_points, 1),
        ("test_points", test_points, 1),
    ):
        _check_least(name, value, least)
    for name, value in (("spacing", spacing), ("deviation", deviation)):
        if not value > 0:
            raise UserError(f"data.{name} is {value}; it must be positive")
    _check_batch_size(batch_size)
    generator = torch.Generator().manual_seed(seed)
    count = train_points + valid_points + test_points
    means = lattice(superclusters, dimensions, spacing)
    mean = means[torch.randint(superclusters, (count,), generator=generator)]
    offset = petal_offsets(petals, dimensions)[torch.randint(petals, (count,), generator=generator)]
    values = mean + offset + deviation * torch.randn(count, dimensions, generator=generator)
    train, valid, test = map(
        Points.numbered, values.split([train_points, valid_points, test_points])
    )
    return PointData(
        train, valid, test, batch_size, seed, "sampled", Truth(means, petals, deviation)
    )


def lattice(
    superclusters: int, dimensions: int, spacing: float = 2 * math.sqrt(2)
) -> Float[Tensor, "superclusters dimensions"]:
    """The true means of `sampled`: on a square lattice in the first two dimensions, row by row,
    with the origin in its middle.

    A spacing of 2 sqrt(2) makes one regular lattice of all components where there are four petals:
    which petals belong together cannot be seen from any pair of them.
    """
    side = math.ceil(math.sqrt(superclusters))
    number = torch.arange(superclusters)
    means = torch.zeros(superclusters, dimensions)
    means[:, 0] = (number % side) * spacing
    means[:, 1] = (number // side) * spacing
    return means - means.mean(0)


def points(
    file: str,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    batch_size: int | None = None,
    seed: int = 0,
) -> PointData:
    """The points in a file, split at random.

    file: CSV, one point a line, its numbers between commas and no header; or NPY, an array of
        [points, dimensions]. Points have two dimensions at least.
    valid_fraction, test_fraction: shares of the points; the others are for training.
    batch_size: of the training batches; None for one batch of all points.
    seed: of the split and of the order of the training points.

    Raises UserError for a file that cannot be read, holds something else or has too few points, and
    for an option out of its range.
    """
    if not (valid_fraction > 0 and test_fraction > 0 and valid_fraction + test_fraction < 1):
        raise UserError(
            f"data.valid_fraction is {valid_fraction} and data.test_fraction is {test_fraction}; "
            f"both must be above 0 and their sum below 1"
        )
    _check_batch_size(batch_size)
    values = read_points(user_path(file))
    held_out = [round(share * len(values)) for share in (valid_fraction, test_fraction)]
    sizes = [len(values) - sum(held_out), *held_out]
    if min(sizes) < 1:
        raise UserError(
            f"{file} has too few points for three splits, {len(values)}: add points or change "
            f"data.valid_fraction={valid_fraction} and data.test_fraction={test_fraction}"
        )
    order = _shuffled(len(values), f"split {seed}")
    train, valid, test = (Points.numbered(values[chosen]) for chosen in order.split(sizes))
    return PointData(train, valid, test, batch_size, seed, Path(file).name)


def read_points(file: Path) -> Float[Tensor, "points dimensions"]:
    """The points of a CSV or NPY file, in single precision.

    Raises UserError for a file that cannot be read or holds something else.
    """
    readers = {".csv": _read_csv, ".npy": _read_npy}
    if file.suffix.lower() not in readers:
        raise UserError(
            f"{file} is neither a CSV nor an NPY file: its name must end in .csv or .npy"
        )
    try:
        values = readers[file.suffix.lower()](file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; check data.file") from None
    if values.ndim != 2 or values.shape[0] == 0 or values.shape[1] < 2:
        shape = " x ".join(map(str, values.shape))
        raise UserError(
            f"{file} holds an array of {shape}: give one of points x dimensions, with two "
            f"dimensions at least"
        )
    finite = np.isfinite(values).all(1)
    if not finite.all():
        raise UserError(
            f"{file} has a number in point {1 + int(finite.argmin())} that is not finite: remove "
            f"the point"
        )
    fitting = (np.abs(values) <= LARGEST).all(1)
    if not fitting.all():
        raise UserError(
            f"{file} has a number in point {1 + int(fitting.argmin())} that is beyond {LARGEST:g}, "
            f"too large to square in single precision: divide all points by one number"
        )
    return torch.from_numpy(values.astype(np.float32))


def _read_csv(file: Path) -> np.ndarray:
    rows = list(_rows(file))
    for number, row in rows:
        if len(row) != len(rows[0][1]):
            raise UserError(
                f"{file}, line {number} has {len(row)} numbers, the lines before have "
                f"{len(rows[0][1])}: give as many in every line"
            )
    return np.array([row for _, row in rows])


def _rows(file: Path) -> Iterator[tuple[int, list[float]]]:
    """The lines of a CSV file that are not blank, each after its number."""
    lines = decoded(file.read_bytes(), str(file)).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = []
        for cell in line.split(","):
            try:
                row.append(float(cell))
            except ValueError:
                raise UserError(
                    f"{file}, line {number}: {cell.strip()!r} is no number; give numbers between "
                    f"commas, without a header"
                ) from None
        yield number, row


def _read_npy(file: Path) -> np.ndarray:
    try:
        with file.open("rb") as opened:
            values = np.lib.format.read_array(opened, allow_pickle=False)
        return values.astype(np.float64, casting="same_kind")
    except (ValueError, EOFError, SyntaxError, TokenError):
        raise UserError(f"{file} is damaged or no NPY file: write it with numpy.save") from None
    except TypeError:
        raise UserError(f"{file} holds no real numbers: give an array of them") from None


def _shuffled(count: int, seed: str) -> Int[Tensor, "count"]:
    # Text as a seed is hashed the same way in every process.
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return torch.tensor(order)


def _check_batch_size(batch_size: int | None) -> None:
    if batch_size is not None:
        _check_least("batch_size", batch_size, 1)


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"data.{name} is {value}; it must be at least {least}")
