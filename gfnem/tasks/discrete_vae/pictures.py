"""Image files of any kind, as pixels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from gfnem.errors import UserError
from gfnem.files import find_files
from gfnem.tasks.discrete_vae.images import Pixels

IMAGE_FILES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tga", ".tif"}
    | {".tiff", ".webp"}
)
# Modes of Pillow; the others are colour.
GREY = ("L", "LA", "I", "I;16", "I;16B", "I;16L")
KINDS: dict[str, Pixels] = {"1": "binary", **{mode: "grey" for mode in GREY}}
PHOTOMETRIC = 262  # TIFF's tag that says what 0 is


def image_files(folder: Path) -> tuple[list[Path], str]:
    """All image files below a folder in the order of their paths, and what is said of others.

    Raises UserError for a folder that does not exist and for one without images.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: set data.dir to a folder with images")
    files, others = find_files(folder, IMAGE_FILES)
    if not files:
        raise UserError(
            f"{folder} has no images in it: their names must end in one of "
            f"{', '.join(sorted(IMAGE_FILES))}"
        )
    return files, others


class Facts(NamedTuple):
    """Height and width of an image, upright, what its pixels are, and whether they have 16 bits."""

    height: int
    width: int
    kind: Pixels
    deep: bool


def facts_of(file: Path) -> Facts:
    """What a file says of itself.

    Raises UserError as `read_image` does.
    """
    with _opened(file) as image:
        deep = _is_deep(image)
        grey = _has_grey_palette(image) or any("LA;16" in str(args) for args in _arguments(image))
        # Of some files the pixels are read with it, after which the decoder is forgotten.
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        width, height = image.size[::-1] if turned else image.size
        return Facts(height, width, "grey" if grey else KINDS.get(image.mode, "rgb"), deep)


def read_image(
    file: Path, height: int, width: int, colour: bool
) -> UInt8[Tensor, "channels height width"]:
    """An image, upright, resized; three channels in colour, otherwise one.

    What is transparent shows white, or black where nothing could be told from white. Of 16 bits in
    a channel the upper 8 are read.

    Raises UserError for a file that cannot be read, for one of other depths or without anything in
    the upper 8 of 16 bits, and for a JPEG file in CMYK that does not say whether its colours are
    inverted.
    """
    with _opened(file) as image:
        deep = _is_deep(image)
        upright = _in_8_bits(ImageOps.exif_transpose(image))
        shown = _opaque(upright).convert("RGB" if colour else "L")
        pixels = np.array(shown.resize((width, height), Image.Resampling.BOX))
        if deep and not pixels.any():
            raise ValueError("it has 16 bits in a channel, and the upper 8 are black everywhere")
    return torch.from_numpy(pixels).view(height, width, -1).permute(2, 0, 1)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            if image.mode == "F" or (image.mode[0] == "I" and not _is_deep(image)):
                raise ValueError(
                    f"what is black and white in its numbers ({image.mode}) is unknown"
                )
            if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
                raise ValueError("it is in CMYK and does not say whether 0 is white or black")
            yield image
    # What a decoder raises on damaged data differs from format to format.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file} cannot be read as an image: {reason}; remove, replace or convert it"
        ) from None


def _is_deep(image: Image.Image) -> bool:
    """Whether a channel has 16 bits in the file, or as many as Pillow makes 16 of."""
    arguments = _arguments(image)
    if image.format == "PPM":
        # The decoder is told the highest value, and scales by it.
        return image.mode == "I" or any(isinstance(a, tuple) and a[1] > 255 for a in arguments)
    # Five or six bits in each of three channels are 16 together.
    deep = any(re.search(r"(?<!BGR);16", str(argument)) for argument in arguments)
    # Pillow leaves signs, and TIFF's white at 0, to its callers.
    usual = image.mode != "I" and getattr(image, "tag_v2", {}).get(PHOTOMETRIC, 1) != 0
    return deep and usual


def _arguments(image: Image.Image) -> list[Any]:
    """What decoders are told of the pixels in the file, before they are read."""
    return [tile.args for tile in getattr(image, "tile", [])]


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits in 8, which Pillow's conversion would cut off at 255."""
    if image.mode[0] != "I":
        return image
    return Image.fromarray((np.array(image) >> 8).astype(np.uint8))


def _has_grey_palette(image: Image.Image) -> bool:
    if image.mode != "P":
        return False
    colours = np.array(image.getpalette()).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all())


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    white, black = (Image.new("RGBA", image.size, ground) for ground in ("white", "black"))
    shown = Image.alpha_composite(white, image)
    if shown.tobytes() == white.tobytes() and image.getchannel("A").getbbox():
        shown = Image.alpha_composite(black, image)
    return shown
