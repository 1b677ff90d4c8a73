"""Where images to encode come from: a training, a validation and a test set of one size.

Four sources make an `ImageData`: `digits` (scikit-learn's, needs no files), `mnist` and
`fashion_mnist` (their IDX files, or OpenML) and `image_folder` (image files of your own).

    data = digits(seed=0)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from gfnem.errors import UserError
from gfnem.files import user_path
from gfnem.tasks.discrete_vae.idx import find_images
from gfnem.tasks.discrete_vae.images import ImageData, Images, Pixels, shuffled
from gfnem.tasks.discrete_vae.pictures import facts_of, image_files, read_image


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
    height: int | None = None,
    width: int | None = None,
    pixels: Pixels | None = None,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    batch_size: int = 128,
    seed: int = 0,
) -> ImageData:
    """The image files in a folder, at any depth, split at random.

    Images of one content are in one split.

    dir: folder with files that end in .bmp, .gif, .jfif, .jpeg, .jpg, .pbm, .pgm, .png, .ppm, .tga,
        .tif, .tiff or .webp. Hidden files and folders are passed over.
    height, width: that images are resized to, whatever their proportions; None for the size that
        they all have. Smaller ones are made by averaging over the area of each new pixel (Pillow's
        BOX).
    pixels: "rgb", "grey" (both k/255) or "binary" (1 above half of the full intensity); None for
        what all the images are, "rgb" if there is colour in some. What is transparent shows white,
        and of 16 bits in a channel the upper 8 are read.
    valid_fraction, test_fraction: shares of the images; the others are for training.
    batch_size: of the training batches.
    seed: of the split and of the order of the training images.

    Raises UserError for a folder without images or with too few, for images of several sizes that
    no size is given for, for a file that cannot be read and for an option out of its range.
    """
    _check_options(pixels, ("rgb", "grey", "binary", None), batch_size)
    for name, value in (("height", height), ("width", width)):
        if value is not None:
            _check_least(name, value, 1)
    if (height is None) != (width is None):
        raise UserError(
            f"data.height is {height} and data.width is {width}: give both, or none of them to "
            f"keep the images' size"
        )
    if not (valid_fraction > 0 and test_fraction > 0 and valid_fraction + test_fraction < 1):
        raise UserError(
            f"data.valid_fraction is {valid_fraction} and data.test_fraction is {test_fraction}; "
            f"both must be above 0 and their sum below 1"
        )
    files, others = image_files(user_path(dir))
    found = [facts_of(file) for file in files]
    if height is None or width is None:
        height, width = _one_size(dir, [(facts.height, facts.width) for facts in found])
    if pixels is None:
        pixels = _kind([facts.kind for facts in found])
    images = torch.stack([read_image(file, height, width, pixels == "rgb") for file in files])
    copies = _copies(images > 127 if pixels == "binary" else images)
    valid_images, test_images = (round(f * len(copies)) for f in (valid_fraction, test_fraction))
    if min(valid_images, test_images, len(copies) - valid_images - test_images) < 1:
        raise UserError(
            f"{dir} has too few different images for three splits, {len(copies)}: add images or "
            f"change data.valid_fraction={valid_fraction} and data.test_fraction={test_fraction}"
        )
    chosen = (
        [number for content in contents.tolist() for number in copies[content]]
        for contents in _cut(len(copies), valid_images, test_images, seed)
    )
    train, valid, test = (_images(images[numbers], pixels) for numbers in chosen)
    more = len(files) - len(copies)
    notes = [f"{more:,} images are copies of others, and in their split"] if more else []
    deep = sum(facts.deep for facts in found)
    notes += [f"of {deep:,} images with 16 bits in a channel the upper 8 were read"] if deep else []
    notes += [others] if others else []
    return ImageData(train, valid, test, pixels, batch_size, seed, "image_folder", notes)


def _copies(images: Tensor) -> list[list[int]]:
    """The images of each content, by their numbers."""
    contents: dict[bytes, list[int]] = {}
    for number, image in enumerate(images):
        contents.setdefault(image.numpy().tobytes(), []).append(number)
    return list(contents.values())


def _one_size(dir: str, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size of all images of a folder."""
    counted = Counter(sizes)
    if len(counted) > 1:
        such = ", ".join(f"{n:,} of {h} x {w}" for (h, w), n in counted.most_common(3))
        raise UserError(
            f"{dir} has images of {len(counted)} sizes ({such}{' ...' if len(counted) > 3 else ''})"
            f": set data.height and data.width to resize them"
        )
    return sizes[0]


def _kind(kinds: Sequence[Pixels]) -> Pixels:
    """What holds pixels of all these kinds."""
    return next(kind for kind in ("rgb", "grey", "binary") if kind in kinds)


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
    train, test = find_images(name, openml_name, source, dir)
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
    return shuffled(images, f"split {seed}").split(
        [images - valid_images - test_images, valid_images, test_images]
    )


def _check_options(pixels: str | None, allowed: Sequence[str | None], batch_size: int) -> None:
    if pixels not in allowed:
        raise UserError(
            f"data.pixels is {pixels}; it must be one of {', '.join(filter(None, allowed))}"
        )
    _check_least("batch_size", batch_size, 1)


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"data.{name} is {value}; it must be at least {least}")
