"""Batches of images, and a training, a validation and a test set of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gfnem.splits import named_split

Pixels = Literal["binary", "grey", "rgb"]


@dataclass(frozen=True)
class Images:
    """A batch of images.

    pixels: 0 or 1 for binary images, one of 0/255, ..., 255/255 for grey and RGB ones.
    ids: where the images are in their split; -1 for images that are in none.
    """

    pixels: Float[Tensor, "batch channels height width"]
    ids: Int[Tensor, "batch"]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Images:
        return Images(self.pixels.to(device), self.ids.to(device))

    def select(self, index: Int[Tensor, "chosen"] | slice) -> Images:
        """Some of the images, in the order of `index`."""
        return Images(self.pixels[index], self.ids[index])


class Batches(Sequence[Images]):
    """Batches of images, each put together when it is asked for.

    order: of the images, by their places in `images`.
    batch_size: of all batches but the last, which may be smaller.
    """

    def __init__(self, images: Images, order: Int[Tensor, "images"], batch_size: int):
        self._images = images
        self._chosen = order.split(batch_size)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, number: int) -> Images:
        return self._images.select(self._chosen[number])


class ImageData:
    """Training, validation and test images, all of one size.

    pixels: what the values are; see `Images`.
    batch_size: of the training batches.
    seed: of the order of the training images.
    name: of the source.
    notes: what else there is to say of it.
    """

    def __init__(
        self,
        train: Images,
        valid: Images,
        test: Images,
        pixels: Pixels,
        batch_size: int = 128,
        seed: int = 0,
        name: str = "images",
        notes: Sequence[str] = (),
    ):
        self.train, self.valid, self.test = train, valid, test
        self.pixels: Pixels = pixels
        self.batch_size = batch_size
        self.seed = seed
        self.name = name
        self.notes = notes

    def split(self, name: str) -> Images:
        """Give a part by its name; raises UserError for a name that there is not."""
        return named_split({"train": self.train, "valid": self.valid, "test": self.test}, name)

    def train_batches(self, epoch: int) -> Batches:
        """All training images once, in an order that depends on `seed` and epoch alone."""
        order = shuffled(len(self.train), f"{self.seed} {epoch}")
        return Batches(self.train, order, self.batch_size)

    def sizes(self) -> dict[str, Any]:
        """What models of this data need to know of it."""
        _, channels, height, width = self.train.pixels.shape
        return {"channels": channels, "height": height, "width": width, "pixels": self.pixels}

    def describe(self) -> str:
        """What was read, in one line."""
        height, width = self.train.pixels.shape[2:]
        read = (
            f"{self.name}: {len(self.train):,} training, {len(self.valid):,} validation, "
            f"{len(self.test):,} test images, {height} x {width}, {self.pixels}"
        )
        return "; ".join([read, *self.notes])


def shuffled(images: int, seed: str) -> Int[Tensor, "images"]:
    """Numbers below `images` in an order that depends on the seed alone."""
    # Text as a seed is hashed the same way in every process.
    order = list(range(images))
    random.Random(seed).shuffle(order)
    return torch.tensor(order)
