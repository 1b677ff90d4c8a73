"""Images to encode: a training, a validation and a test set of one size.

Four sources make an `ImageData`: `digits` (scikit-learn's, needs no files), `mnist` and
`fashion_mnist` (their IDX files, or OpenML) and `image_folder` (image files of your own).

    data = digits(seed=0)
"""

from __future__ import annotations

import gzip
import os
import random
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from gfnem.errors import UserError
from gfnem.splits import named_split

Pixels = Literal["binary", "grey", "rgb"]

IDX_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
IMAGE_FILES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)


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
    ):
        self.train, self.valid, self.test = train, valid, test
        self.pixels: Pixels = pixels
        self.batch_size = batch_size
        self.seed = seed
        self.name = name

    def split(self, name: str) -> Images:
        """Give a part by its name; raises UserError for a name that there is not."""
        return named_split({"train": self.train, "valid": self.valid, "test": self.test}, name)

    def train_batches(self, epoch: int) -> Batches:
        """All training images once, in an order that depends on `seed` and epoch alone."""
        order = _shuffled(len(self.train), f"{self.seed} {epoch}")
        return Batches(self.train, order, self.batch_size)

    def sizes(self) -> dict[str, Any]:
        """What models of this data need to know of it."""
        _, channels, height, width = self.train.pixels.shape
        return {"channels": channels, "height": height, "width": width, "pixels": self.pixels}

    def describe(self) -> str:
        """What was read, in one line."""
        height, width = self.train.pixels.shape[2:]
        return (
            f"{self.name}: {len(self.train):,} training, {len(self.valid):,} validation, "
            f"{len(self.test):,} test images, {height} x {width}, {self.pixels}"
        )


def digits(
    batch_size: int = 128,
    seed: int = 0,
    valid_images: int = 180,
    test_images: int = 180,
    pixels: Literal["binary", "grey"] = "binary",
) -> ImageData:
    """The 1,797 handwritten digits that come with scikit-learn, 8 x 8 pixels of 17 grey levels.

    batch_size: of the training batches.
    seed: of the split, which is random, and of the order of the training images.
    valid_images, test_images: how many; the others are for training.
    pixels: "binary" (1 above half of the full intensity) or "grey" (rounded to k/255).

    Raises UserError for an option out of its range.
    """
    _check_options(pixels, ("binary", "grey"), batch_size)
    _check_least("valid_images", valid_images, 1)
    _check_least("test_images", test_images, 1)

    from sklearn.datasets import load_digits

    rows, _ = load_digits(return_X_y=True)
    levels = torch.from_numpy(rows).to(torch.uint8).view(-1, 1, 8, 8)
    if valid_images + test_images >= len(levels):
        raise UserError(
            f"data.valid_images is {valid_images} and data.test_images is {test_images}; together "
            f"they must be below the {len(levels):,} digits that there are"
        )
    train, valid, test = (
        _images(levels[chosen], pixels, full=16)
        for chosen in _cut(len(levels), valid_images, test_images, seed)
    )
    return ImageData(train, valid, test, pixels, batch_size, seed, "digits")


def mnist(
    dir: str | None = None,
    pixels: Literal["binary", "grey"] = "binary",
    valid_images: int = 5000,
    batch_size: int = 128,
    seed: int = 0,
) -> ImageData:
    """MNIST: 60,000 and 10,000 handwritten digits, 28 x 28 pixels.

    dir: folder with `train-images-idx3-ubyte` and `t10k-images-idx3-ubyte`, either of them with or
        without `.gz`. None looks in the subfolder `mnist` of the folder that GFNEM_DATA
        names and then tries to download the images from OpenML.
    pixels: "binary" (1 above half of the full intensity) or "grey" (k/255).
    valid_images: the last so many of the training images are the validation set.
    batch_size: of the training batches.
    seed: of the order of the training images.

    Raises UserError for images that are neither found nor downloaded, for a file that is damaged
    and for an option out of its range.
    """
    source = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    return _mnist_like("mnist", "mnist_784", source, dir, pixels, valid_images, batch_size, seed)


def fashion_mnist(
    dir: str | None = None,
    pixels: Literal["binary", "grey"] = "binary",
    valid_images: int = 5000,
    batch_size: int = 128,
    seed: int = 0,
) -> ImageData:
    """Fashion-MNIST: 60,000 and 10,000 pieces of clothing, 28 x 28 pixels.

    dir: as for `mnist`, whose files have the same names; the subfolder is `fashion_mnist`.
    pixels, valid_images, batch_size, seed: as for `mnist`.

    Raises UserError as `mnist` does.
    """
    source = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
    return _mnist_like(
        "fashion_mnist", "Fashion-MNIST", source, dir, pixels, valid_images, batch_size, seed
    )


def image_folder(
    dir: str,
    height: int = 32,
    width: int = 32,
    pixels: Pixels = "rgb",
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    batch_size: int = 128,
    seed: int = 0,
) -> ImageData:
    """The image files in a folder, at any depth, split at random.

    dir: folder with files that end in .bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff or
        .webp.
    height, width: that images are resized to, whatever their proportions. Smaller ones are made
        by averaging over the area of each new pixel (Pillow's BOX).
    pixels: "rgb", "grey" (both k/255) or "binary" (1 above half of the full intensity).
        Transparency is dropped.
    valid_fraction, test_fraction: shares of the images; the others are for training.
    batch_size: of the training batches.
    seed: of the split and of the order of the training images.

    Raises UserError for a folder without images or with too few, for a file that cannot be read
    and for an option out of its range.
    """
    _check_options(pixels, ("rgb", "grey", "binary"), batch_size)
    _check_least("height", height, 1)
    _check_least("width", width, 1)
    if not (valid_fraction > 0 and test_fraction > 0 and valid_fraction + test_fraction < 1):
        raise UserError(
            f"data.valid_fraction is {valid_fraction} and data.test_fraction is {test_fraction}; "
            f"both must be above 0 and their sum below 1"
        )
    files = image_files(Path(dir))
    valid_images, test_images = (round(f * len(files)) for f in (valid_fraction, test_fraction))
    if min(valid_images, test_images, len(files) - valid_images - test_images) < 1:
        raise UserError(
            f"{dir} has too few images for three splits, {len(files)}: add images or change "
            f"data.valid_fraction={valid_fraction} and data.test_fraction={test_fraction}"
        )
    images = torch.stack([read_image(file, height, width, pixels == "rgb") for file in files])
    train, valid, test = (
        _images(images[chosen], pixels)
        for chosen in _cut(len(files), valid_images, test_images, seed)
    )
    return ImageData(train, valid, test, pixels, batch_size, seed, "image_folder")


def read_idx(file: Path) -> UInt8[Tensor, "images height width"]:
    """The images of an IDX file of bytes in three dimensions; packed by gzip if it ends in .gz.

    Raises UserError for a file that cannot be read, that is damaged or that holds something else.
    """
    content = _content(file)
    if len(content) < 16:
        raise UserError(f"{file} is truncated: it ends within its header; get it again")
    if content[:3] != b"\0\0\x08":
        raise UserError(
            f"{file} starts with {content[:4].hex()}, an IDX file of images with 00000803: give "
            f"the file of images"
        )
    if content[3] != 3:
        raise UserError(
            f"{file} has dimensions: {content[3]}, an IDX file of images has 3: give the file of "
            f"images, not of labels"
        )
    images, height, width = struct.unpack(">3I", content[4:16])
    there, wanted = len(content) - 16, images * height * width
    if there != wanted:
        raise UserError(
            f"{file} is {'truncated' if there < wanted else 'too long'}: {there:,} bytes follow "
            f"the header, which tells of {images:,} images of {height} x {width}; get it again"
        )
    if wanted == 0:
        raise UserError(f"{file} holds no images: give another file")
    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=16)
    return pixels.view(images, height, width)


def image_files(folder: Path) -> list[Path]:
    """All image files below a folder, in the order of their paths.

    Raises UserError for a folder that does not exist and for one without images.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: set data.dir to a folder with images")
    files = sorted(
        file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_FILES and file.is_file()
    )
    if not files:
        raise UserError(
            f"{folder} has no images in it: their names must end in one of "
            f"{', '.join(sorted(IMAGE_FILES))}"
        )
    return files


def read_image(
    file: Path, height: int, width: int, colour: bool
) -> UInt8[Tensor, "channels height width"]:
    """An image, upright, resized; three channels in colour, otherwise one.

    Raises UserError for a file that cannot be read or has more than 8 bits in a channel.
    """
    try:
        with Image.open(file) as opened:
            # Pillow would cut their values off at 255.
            if opened.mode[0] in "IF":
                raise ValueError("it has more than 8 bits in a channel")
            upright = ImageOps.exif_transpose(opened).convert("RGB" if colour else "L")
            pixels = np.array(upright.resize((width, height), Image.Resampling.BOX))
    # What a decoder raises on damaged data differs from format to format.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file} cannot be read as an image: {reason}; remove, replace or convert it"
        ) from None
    return torch.from_numpy(pixels).view(height, width, -1).permute(2, 0, 1)


def _mnist_like(
    name: str,
    openml_name: str,
    source: str,
    dir: str | None,
    pixels: Pixels,
    valid_images: int,
    batch_size: int,
    seed: int,
) -> ImageData:
    """Data as MNIST is distributed.

    source: address that the names of the files complete.
    """
    _check_options(pixels, ("binary", "grey"), batch_size)
    _check_least("valid_images", valid_images, 1)
    train, test = _find_images(name, openml_name, source, dir)
    if train.shape[1:] != test.shape[1:]:
        sizes = [" x ".join(map(str, images.shape[1:])) for images in (train, test)]
        raise UserError(
            f"the training images of {name} are {sizes[0]}, the test images {sizes[1]}: give "
            f"files that belong together"
        )
    if valid_images >= len(train):
        raise UserError(
            f"data.valid_images is {valid_images}; it must be below the {len(train):,} training "
            f"images that there are"
        )
    train, valid = train[:-valid_images], train[-valid_images:]
    train, valid, test = (_images(split[:, None], pixels) for split in (train, valid, test))
    return ImageData(train, valid, test, pixels, batch_size, seed, name)


def _find_images(
    name: str, openml_name: str, source: str, dir: str | None
) -> tuple[UInt8[Tensor, "train height width"], UInt8[Tensor, "test height width"]]:
    """Training and test images, from the first folder that has both or else from OpenML."""
    folders: list[Path] = []
    found: list[str] = []
    if dir is not None:
        folders = [Path(dir)]
    elif root := os.environ.get("GFNEM_DATA"):
        folders = [Path(root, name)]
    else:
        found.append(f"GFNEM_DATA, the folder to look for {' and '.join(IDX_FILES)} in, is not set")
    for folder in folders:
        files = [_packed_or_not(folder / file) for file in IDX_FILES]
        missing = [file.stem for file in files if not file.is_file()]
        if not missing:
            train, test = map(read_idx, files)
            return train, test
        found.append(f"{folder} has no {' and no '.join(missing)}")
    if dir is None:
        try:
            return _download(openml_name)
        # Beside a lost connection, an answer that breaks off or is not what was asked for.
        except (OSError, ValueError, EOFError, HTTPException) as error:
            found.append(f"OpenML cannot be read ({' '.join(str(error).split())})")
    raise UserError(
        f"{'; '.join(found)}: download {' and '.join(f'{file}.gz' for file in IDX_FILES)} from "
        f"{source} and set data.dir to their folder"
    )


def _packed_or_not(file: Path) -> Path:
    """The file itself if it is there, otherwise its name with .gz."""
    return file if file.is_file() else file.with_name(f"{file.name}.gz")


def _download(
    openml_name: str,
) -> tuple[UInt8[Tensor, "train height width"], UInt8[Tensor, "test height width"]]:
    from sklearn.datasets import fetch_openml

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of every further try
        # The parser that fetch_openml prefers needs pandas.
        rows, _ = fetch_openml(
            openml_name,
            version=1,
            as_frame=False,
            parser="liac-arff",
            n_retries=1,
            return_X_y=True,
        )
    images = torch.from_numpy(np.asarray(rows).astype(np.uint8)).view(-1, 28, 28)
    return images[:60_000], images[60_000:]


def _content(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        return gzip.decompress(content) if file.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file} is damaged, get it again: {error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def _images(
    levels: UInt8[Tensor, "images channels height width"], pixels: Pixels, full: int = 255
) -> Images:
    """Images of intensities from 0 to `full`."""
    if pixels == "binary":
        values = (levels > full / 2).float()
    else:
        values = levels.float().mul_(255 / full).round_().div_(255)
    return Images(values, torch.arange(len(values)))


def _cut(images: int, valid_images: int, test_images: int, seed: int) -> tuple[Tensor, ...]:
    """Which images are for training, validation and test, at random."""
    return _shuffled(images, f"split {seed}").split(
        [images - valid_images - test_images, valid_images, test_images]
    )


def _shuffled(images: int, seed: str) -> Int[Tensor, "images"]:
    # Text as a seed is hashed the same way in every process.
    order = list(range(images))
    random.Random(seed).shuffle(order)
    return torch.tensor(order)


def _check_options(pixels: str, allowed: Sequence[str], batch_size: int) -> None:
    if pixels not in allowed:
        raise UserError(f"data.pixels is {pixels}; it must be one of {', '.join(allowed)}")
    _check_least("batch_size", batch_size, 1)


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"data.{name} is {value}; it must be at least {least}")
