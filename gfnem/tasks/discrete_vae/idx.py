"""Images as MNIST is distributed: IDX files in a folder, or OpenML."""

from __future__ import annotations

import gzip
import os
import struct
import warnings
import zlib
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from gfnem.errors import UserError
from gfnem.files import user_path

IDX_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
GZIP = b"\x1f\x8b"


def find_images(
    name: str, openml_name: str, source: str, dir: str | None
) -> tuple[UInt8[Tensor, "train height width"], UInt8[Tensor, "test height width"]]:
    """Training and test images, from the first folder that has both or else from OpenML."""
    folders: list[Path] = []
    found: list[str] = []
    if dir is not None:
        folders = [user_path(dir)]
    elif root := os.environ.get("GFNEM_DATA"):
        folders = [Path(root, name)]
    else:
        found.append(f"GFNEM_DATA, the folder to look for {' and '.join(IDX_FILES)} in, is not set")
    for folder in folders:
        files = [_there(folder / file) for file in IDX_FILES]
        missing = [file.name for file in files if not file.is_file()]
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


def read_idx(file: Path) -> UInt8[Tensor, "images height width"]:
    """The images of an IDX file of bytes in three dimensions, packed by gzip or not.

    What it is is told by its content, whatever its name.

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


def _there(file: Path) -> Path:
    """The file itself if it is there, or by another of the names that are usual."""
    dotted = file.name.replace("-idx", ".idx")
    names = [name for stem in (file.name, dotted) for name in (stem, f"{stem}.gz")]
    files = [file.with_name(name) for name in names]
    return next((file for file in files if file.is_file()), file)


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
        return gzip.decompress(content) if content.startswith(GZIP) else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file} is damaged, get it again: {error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
