"""Image files of any kind, as pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
KINDS: dict[str, Pixels] = {"1": "binary", "L": "grey", "LA": "grey"}


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


def size_and_kind(file: Path) -> tuple[int, int, Pixels]:
    """Height and width of an image, upright, and what its pixels are.

    Raises UserError as `read_image` does.
    """
    with _opened(file) as image:
        # Only what the file says of itself is read, not the pixels.
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        width, height = image.size[::-1] if turned else image.size
        return height, width, "grey" if _has_grey_palette(image) else KINDS.get(image.mode, "rgb")


def read_image(
    file: Path, height: int, width: int, colour: bool
) -> UInt8[Tensor, "channels height width"]:
    """An image, upright, resized; three channels in colour, otherwise one.

    What is transparent shows white, or black where nothing could be told from white.

    Raises UserError for a file that cannot be read, that has more than 8 bits in a channel, and
    for a JPEG file in CMYK that does not say whether its colours are inverted.
    """
    with _opened(file) as image:
        upright = _opaque(ImageOps.exif_transpose(image)).convert("RGB" if colour else "L")
        pixels = np.array(upright.resize((width, height), Image.Resampling.BOX))
    return torch.from_numpy(pixels).view(height, width, -1).permute(2, 0, 1)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(file) as image:
            if _is_deep(image):
                # Pillow would cut their values off, at 255 or to the upper eight bits.
                raise ValueError("it has more than 8 bits in a channel")
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
    """Whether a channel has more than 8 bits in the file; for colours the mode does not tell."""
    arguments = [tile.args for tile in getattr(image, "tile", [])]
    # Of portable pixmaps the decoder is told the highest value.
    highest = [a[1] for a in arguments if image.format == "PPM" and isinstance(a, tuple)]
    return (
        image.mode[0] in "IF"
        or any(";16" in str(argument) for argument in arguments)
        or any(isinstance(value, int) and value > 255 for value in highest)
    )


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
