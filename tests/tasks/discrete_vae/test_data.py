"""Reading, splitting and batching of images, and the errors of what cannot be read."""

from __future__ import annotations

import gzip
import inspect
import struct
import zlib
from collections.abc import Callable
from http.client import IncompleteRead
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import sklearn.datasets
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf
from PIL import Image

from gfnem.app.signatures import annotations_of, fits
from gfnem.errors import UserError
from gfnem.tasks.discrete_vae.data import digits, fashion_mnist, image_folder, mnist
from gfnem.tasks.discrete_vae.idx import read_idx
from gfnem.tasks.discrete_vae.images import ImageData, Images
from gfnem.tasks.discrete_vae.pictures import facts_of, read_image

SPLITS = ("train", "valid", "test")
TRAIN, TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"

# Two images of 2 x 3 pixels: header and pixels as the format says, byte by byte.
TWO_IMAGES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(
    [0, 1, 2, 127, 128, 255, 255, 254, 100, 3, 0, 0]
)


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GFNEM_DATA", raising=False)


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """No test reaches for the network; what was asked of OpenML."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def fail(name: str, **options: Any) -> None:
        asked.append((name, options))
        raise URLError("no\nnetwork")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fail)
    return asked


@pytest.fixture(scope="module")
def real_mnist(real_data: Path) -> Path:
    folder = real_data / "mnist"
    if not folder.is_dir():
        pytest.skip(f"no MNIST in {folder}")
    return folder


@pytest.fixture(scope="module")
def small() -> ImageData:
    """Ten training images, whose single pixel is their place."""
    images = Images(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))
    return ImageData(images, images, images, "grey", batch_size=4, seed=1)


def idx(images: np.ndarray) -> bytes:
    return b"\0\0\x08\x03" + struct.pack(">3I", *images.shape) + images.tobytes()


def write_idx(folder: Path, train: int = 6, test: int = 2, width: int = 3) -> str:
    """Files like MNIST's whose image i has the pixels 40 i, 40 i + 1, ...; packed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in ((TRAIN, train), (TEST, test)):
        pixels = 40 * np.arange(images)[:, None, None] + np.arange(2 * width).reshape(2, width)
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(pixels.astype(np.uint8))))
    return str(folder)


def write_images(folder: Path, images: int = 20) -> str:
    """Image i has the grey level i."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        Image.new("RGB", (4, 4), (i, i, i)).save(folder / f"{i:02}.png")
    return str(folder)


def order(data: ImageData, epoch: int) -> list[int]:
    return [i for x in data.train_batches(epoch) for i in x.ids.tolist()]


def levels(images: Images) -> np.ndarray:
    """Grey levels, 0 to 255."""
    scaled = images.pixels.double().numpy() * 255
    assert np.abs(scaled - scaled.round()).max() < 1e-4
    return scaled.round().astype(int)


# Batches.


def test_images_can_be_chosen(small: ImageData):
    chosen = small.train.select(torch.tensor([7, 2, 2]))
    assert chosen.ids.tolist() == [7, 2, 2] == chosen.pixels.flatten().tolist()
    assert small.train.select(slice(3, 5)).ids.tolist() == [3, 4]
    assert len(chosen) == 3 and chosen.to("meta").pixels.is_meta and chosen.to("meta").ids.is_meta


def test_every_training_image_comes_once_in_an_epoch(small: ImageData):
    batches = small.train_batches(0)
    assert [len(x) for x in batches] == [len(batches[i]) for i in range(len(batches))] == [4, 4, 2]
    assert sorted(order(small, 0)) == list(range(10))
    for x in batches:
        assert x.pixels.flatten().tolist() == x.ids.tolist()
    with pytest.raises(IndexError):
        batches[3]


def test_the_order_depends_on_seed_and_epoch_alone(small: ImageData):
    def again(seed: int) -> ImageData:
        return ImageData(small.train, small.valid, small.test, "grey", 4, seed)

    assert order(small, 3) == order(again(1), 3)
    orders = [order(again(seed), epoch) for seed in (0, 1) for epoch in (0, 1, 10)]
    assert len({tuple(each) for each in orders}) == 6
    assert list(range(10)) not in orders


# The sources.


def test_digits_are_those_of_scikit_learn():
    rows, _ = sklearn.datasets.load_digits(return_X_y=True)
    data, grey = digits(), digits(pixels="grey")
    assert data.describe() == (
        "digits: 1,437 training, 180 validation, 180 test images, 8 x 8, binary"
    )
    assert data.sizes() == {"channels": 1, "height": 8, "width": 8, "pixels": "binary"}
    # Where each digit went is told by its grey levels, which the binary images leave out.
    greys = np.concatenate([levels(grey.split(name)) for name in SPLITS]).reshape(1797, 64)
    binary = torch.cat([data.split(name).pixels for name in SPLITS]).view(1797, 64).numpy()
    sixteenths = np.rint(greys * 16 / 255)
    assert np.abs(greys - sixteenths * 255 / 16).max() <= 0.5
    assert sorted(map(tuple, sixteenths)) == sorted(map(tuple, rows))
    assert (binary == (sixteenths / 16 > 0.5)).all()
    assert data.train.ids.tolist() == list(range(1437))
    assert data.split("test") is data.test
    with pytest.raises(UserError, match="split is 'tset'; use one of train, valid, test"):
        data.split("tset")


def test_the_split_of_digits_depends_on_the_seed_alone():
    assert torch.equal(digits(seed=3).test.pixels, digits(seed=3, batch_size=7).test.pixels)
    assert not torch.equal(digits(seed=3).test.pixels, digits(seed=4).test.pixels)
    assert [len(digits(valid_images=1700, test_images=7).split(name)) for name in SPLITS] == [
        *(90, 1700, 7)
    ]


@pytest.mark.parametrize("name", ["images-idx3-ubyte", "images-idx3-ubyte.gz"])
def test_an_idx_file_is_read_byte_by_byte(tmp_path: Path, name: str):
    file = tmp_path / name
    file.write_bytes(gzip.compress(TWO_IMAGES) if name.endswith(".gz") else TWO_IMAGES)
    assert read_idx(file).tolist() == [
        [[0, 1, 2], [127, 128, 255]],
        [[255, 254, 100], [3, 0, 0]],
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("kind", ["-idx3-ubyte", ".idx3-ubyte"])
def test_idx_files_are_judged_by_content(tmp_path: Path, packed: bool, ending: str, kind: str):
    content = gzip.compress(TWO_IMAGES) if packed else TWO_IMAGES
    for name in (TRAIN, TEST):
        (tmp_path / (name.replace("-idx3-ubyte", kind) + ending)).write_bytes(content)
    data = mnist(dir=str(tmp_path), pixels="grey", valid_images=1)
    assert levels(data.train).tolist() == [[[[0, 1, 2], [127, 128, 255]]]]


def test_mnist_from_its_files(tmp_path: Path):
    folder = write_idx(tmp_path)
    data = mnist(dir=folder, pixels="grey", valid_images=2)
    first = [levels(data.split(name))[:, 0, 0, 0].tolist() for name in SPLITS]
    assert first == [[0, 40, 80, 120], [160, 200], [0, 40]]
    assert levels(data.train)[1].tolist() == [[[40, 41, 42], [43, 44, 45]]]
    assert data.train.pixels[1, 0, 1, 2] == torch.tensor(45 / 255)
    assert data.valid.ids.tolist() == [0, 1]
    assert data.describe() == "mnist: 4 training, 2 validation, 2 test images, 2 x 3, grey"
    (tmp_path / TRAIN).write_bytes(TWO_IMAGES)
    plain = mnist(dir=folder, valid_images=1)
    assert plain.train.pixels.tolist() == [[[[0, 0, 0], [0, 1, 1]]]]


def test_where_mnist_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_download: list[Any]
):
    monkeypatch.setenv("GFNEM_DATA", str(tmp_path))
    # The files of both have the same names: only a folder's name tells them apart.
    for folder, images in ((tmp_path, 3), (tmp_path / "mnist", 4), (tmp_path / "fashion_mnist", 5)):
        write_idx(folder, train=images)
    assert len(mnist(valid_images=1).train) == 3
    assert len(fashion_mnist(valid_images=1).train) == 4
    assert fashion_mnist(valid_images=1).name == "fashion_mnist"
    assert no_download == []


@pytest.mark.parametrize(
    ("factory", "name"), [(mnist, "mnist_784"), (fashion_mnist, "Fashion-MNIST")]
)
def test_mnist_from_openml(
    monkeypatch: pytest.MonkeyPatch, factory: Callable[..., ImageData], name: str
):
    def fetch(asked: str, *, version: int, as_frame: bool, **_: Any) -> tuple[np.ndarray, None]:
        assert (asked, version, as_frame) == (name, 1, False)
        rows = np.zeros((60_003, 784))
        rows[:, 1] = np.arange(60_003) % 251
        return rows, None

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    data = factory(valid_images=50_000, pixels="grey")
    assert [len(data.split(split)) for split in SPLITS] == [10_000, 50_000, 3]
    assert data.sizes() == {"channels": 1, "height": 28, "width": 28, "pixels": "grey"}
    for split, start in zip(SPLITS, (0, 10_000, 60_000), strict=True):
        pixels = levels(data.split(split).select(slice(0, 3)))
        assert pixels[:, 0, 0, 1].tolist() == [(start + i) % 251 for i in range(3)]


def test_images_of_a_folder(tmp_path: Path):
    write_images(tmp_path / "deep" / "er")
    folder = str(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "deep" / "er" / "07.png").rename(tmp_path / "07.PNG")
    data = image_folder(folder, height=2, width=3, valid_fraction=0.2)
    assert data.sizes() == {"channels": 3, "height": 2, "width": 3, "pixels": "rgb"}
    assert data.describe() == (
        "image_folder: 14 training, 4 validation, 2 test images, 2 x 3, rgb; "
        f"not read in {folder}: 1 .txt"
    )
    found = [levels(data.split(name)) for name in SPLITS]
    assert all((each == each[:, :1, :1, :1]).all() for each in found)
    values = [int(value) for each in found for value in each[:, 0, 0, 0]]
    assert sorted(values) == list(range(20)) != values
    again = image_folder(folder, 2, 3, valid_fraction=0.2, batch_size=1)
    assert torch.equal(again.test.pixels, data.test.pixels)
    other = image_folder(folder, 2, 3, valid_fraction=0.2, seed=1)
    assert not torch.equal(other.test.pixels, data.test.pixels)


@pytest.mark.parametrize(
    ("pixels", "image"),
    [
        ("rgb", [[[255, 255]], [[0, 255]], [[0, 255]]]),
        ("grey", [[[76, 255]]]),
        ("binary", [[[0, 255]]]),
    ],
)
def test_pixels_of_a_folder(tmp_path: Path, pixels: Any, image: list[Any]):
    """Red is 255 · 0.299 = 76 as grey (ITU-R BT.601), so below half of the full intensity."""
    for i in range(10):
        # The last pixels tell the images apart.
        numbered = [(255, 255, 255) if i >> bit & 1 else (0, 0, 0) for bit in range(4)]
        drawn = Image.new("RGB", (6, 1))
        drawn.putdata([(255, 0, 0), (255, 255, 255), *numbered])
        drawn.convert("P" if i % 2 else "RGBA").save(tmp_path / f"{i}.png")
    data = image_folder(str(tmp_path), pixels=pixels)
    assert all(found == image for found in levels(data.train)[..., :2].tolist())
    assert data.pixels == pixels


def test_images_are_averaged_and_turned_upright(tmp_path: Path):
    file = tmp_path / "big.png"
    pixels = np.array([[0, 10, 100, 100], [20, 30, 100, 104]], dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(file)
    assert read_image(file, 1, 2, colour=False).tolist() == [[[15, 101]]]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    image.save(file, exif=exif)
    assert read_image(file, 4, 2, colour=False)[0].tolist() == np.rot90(pixels, -1).tolist()


def same_everywhere(found: torch.Tensor, wanted: list[int]) -> bool:
    return found.flatten(1).T.unique(dim=0).tolist() == [wanted]


@pytest.mark.parametrize(
    ("mode", "colour", "rgb", "grey"),
    [
        # Naive conversion: (255 - c)(255 - k) / 255; grey by ITU-R BT.601.
        ("CMYK", (0, 255, 255, 0), [255, 0, 0], [76]),
        ("CMYK", (0, 0, 0, 0), [255] * 3, [255]),
        ("RGBA", (255, 0, 0, 0), [255] * 3, [255]),
        ("RGBA", (0, 0, 0, 51), [204] * 3, [204]),
        ("RGBA", (255, 255, 255, 51), [51] * 3, [51]),  # nothing could be told from white
        ("LA", (0, 0), [255] * 3, [255]),
        ("LA", (0, 255), [0] * 3, [0]),
        ("1", 1, [255] * 3, [255]),
    ],
)
def test_colours_and_transparency(
    tmp_path: Path, mode: str, colour: Any, rgb: list[int], grey: list[int]
):
    file = tmp_path / "own.tif"
    Image.new(mode, (8, 8), colour).save(file)
    assert same_everywhere(read_image(file, 8, 8, colour=True), rgb)
    assert same_everywhere(read_image(file, 8, 8, colour=False), grey)


def deep_png(colour_type: int, channels: int) -> bytes:
    """A PNG file of 2 x 2 pixels of 16 bits, as the format says, byte by byte."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    rows = (b"\0" + bytes([200, 7] * channels * 2)) * 2
    header = struct.pack(">2I5B", 2, 2, 16, colour_type, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_tiff(bits: int, white: int = 1, kind: int = 1) -> bytes:
    """A TIFF file of 2 x 1 grey pixels, as the format says, byte by byte."""
    tags = {
        256: 2,
        257: 1,
        258: bits,
        259: 1,
        262: white,
        273: 8,
        277: 1,
        278: 1,
        279: 4,
        339: kind,
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    pixels = bytes([7, 200, 7, 100])
    return b"II*\0\x0c\0\0\0" + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("content", "kind", "shown"),
    [
        (deep_png(0, 1), "grey", 200),
        (deep_png(2, 3), "rgb", 200),
        (deep_png(4, 2), "grey", 212),  # 200 on white: 200 * 200 / 255 + 55
        (deep_png(6, 4), "rgb", 212),
        (b"P6 1 1 65535\n" + bytes([200, 7] * 3), "rgb", 199),  # Pillow divides by 257
        (b"P5 1 1 65535\n" + bytes([200, 7]), "grey", 200),
        (b"P5 1 1 1023\n" + bytes([2, 0]), "grey", 128),
        (deep_tiff(16), "grey", 200),
    ],
)
def test_of_16_bits_the_upper_8_are_read(tmp_path: Path, content: bytes, kind: str, shown: int):
    file = tmp_path / "own.png"
    file.write_bytes(content)
    facts = facts_of(file)
    assert facts.deep and facts.kind == kind
    found = read_image(file, facts.height, facts.width, colour=kind == "rgb")
    assert found.flatten(1)[:, 0].tolist() == [shown] * (3 if kind == "rgb" else 1)


@pytest.mark.parametrize("content", [deep_tiff(16, white=0), deep_tiff(16, kind=2), deep_tiff(12)])
def test_depths_that_say_too_little(tmp_path: Path, content: bytes):
    file = tmp_path / "own.tif"
    file.write_bytes(content)
    raises(
        f"^{file} .*: what is black and white in its numbers .I(;16)?. is unknown",
        facts_of,
        file=file,
    )


def test_images_of_16_bits_are_told(tmp_path: Path):
    folder = write_images(tmp_path)
    (tmp_path / "deep.png").write_bytes(deep_png(2, 3))
    told = "; of 1 images with 16 bits in a channel the upper 8 were read"
    assert image_folder(folder, 4, 4).describe().endswith(told)


def test_jpeg_files_in_cmyk(tmp_path: Path):
    """Adobe's, which say so, are inverted; of others nobody knows."""
    file = tmp_path / "own.jpg"
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(file)
    assert same_everywhere(read_image(file, 8, 8, colour=True), [255] * 3)
    content = file.read_bytes()
    marker = content.index(b"\xff\xee")
    length = 2 + int.from_bytes(content[marker + 2 : marker + 4], "big")
    file.write_bytes(content[:marker] + content[marker + length :])
    raises(
        "it is in CMYK and does not say whether 0 is white",
        read_image,
        file=file,
        height=8,
        width=8,
        colour=True,
    )


@pytest.mark.parametrize(
    ("modes", "pixels", "channels"),
    [
        (["L"], "grey", 1),
        (["1"], "binary", 1),
        (["1", "LA"], "grey", 1),
        (["RGB"], "rgb", 3),
        (["L", "P"], "rgb", 3),
    ],
)
def test_size_and_kind_of_the_source_are_kept(
    tmp_path: Path, modes: list[str], pixels: str, channels: int
):
    noise = np.random.default_rng(0).integers(0, 256, (12, 24, 20, 3), dtype=np.uint8)
    for number, drawn in enumerate(noise):
        image = Image.fromarray(drawn).convert(modes[number % len(modes)])
        image.save(tmp_path / f"{number:02}.png")
    data = image_folder(str(tmp_path))
    assert data.sizes() == {"channels": channels, "height": 24, "width": 20, "pixels": pixels}
    if modes == ["L"]:
        found = {image.tobytes() for image in levels(data.train)[:, 0].astype(np.uint8)}
        assert found < {np.array(Image.fromarray(drawn).convert("L")).tobytes() for drawn in noise}
    asked = image_folder(str(tmp_path), height=12, width=10, pixels="rgb")
    assert asked.sizes() == {"channels": 3, "height": 12, "width": 10, "pixels": "rgb"}


def test_a_palette_of_greys_is_grey(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (10, 9, 7), dtype=np.uint8)
    for number, drawn in enumerate(noise):
        Image.fromarray(drawn).save(tmp_path / f"{number}.gif")
    assert {Image.open(file).mode for file in tmp_path.iterdir()} == {"P"}
    data = image_folder(str(tmp_path))
    assert data.pixels == "grey"
    found = {image.tobytes() for image in levels(data.train)[:, 0].astype(np.uint8)}
    assert found < {drawn.tobytes() for drawn in noise}


def test_images_of_several_sizes_are_resized_where_a_size_is_given(tmp_path: Path):
    folder = write_images(tmp_path)
    Image.new("RGB", (5, 4)).save(tmp_path / "wide.png")
    raises(
        f"^{folder} has images of 2 sizes .20 of 4 x 4, 1 of 4 x 5.: set data.height and",
        image_folder,
        dir=folder,
    )
    assert len(image_folder(folder, 4, 4).train) == 17
    # A camera that was turned.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 5)).save(tmp_path / "wide.png", exif=exif)
    raises("1 of 4 x 5", image_folder, dir=folder)


def test_copies_are_in_one_split(tmp_path: Path):
    folder = write_images(tmp_path)
    for number in range(20):
        again = Image.open(tmp_path / f"{number:02}.png")
        again.save(tmp_path / f"again {number}.bmp")
        again.convert("L").save(tmp_path / f"third {number}.TGA")
    for seed in range(3):
        data = image_folder(folder, valid_fraction=0.2, seed=seed)
        found = [levels(data.split(name))[:, 0, 0, 0].tolist() for name in SPLITS]
        assert sorted(sum(found, [])) == sorted(3 * list(range(20)))
        assert [len(values) for values in found] == [3 * len(set(values)) for values in found]
        assert [len(values) for values in found] == [42, 12, 6]
        assert data.describe().endswith("; 40 images are copies of others, and in their split")


def test_hidden_images_are_passed_over(tmp_path: Path):
    folder = write_images(tmp_path)
    for name in ("._01.png", ".ipynb_checkpoints/02.png", "README", "x.npy", "y.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    Image.new("RGB", (4, 4), (99, 99, 99)).save(tmp_path / "99.jfif", format="JPEG")
    data = image_folder(folder)
    assert sum(len(data.split(name)) for name in SPLITS) == 21
    assert data.describe().endswith(f"; not read in {folder}: 2 .npy, 1 without ending")


def test_images_of_people(cases: Path, tmp_path: Path):
    folder = cases / "images"
    raises(
        "rgb16_dark.png .* the upper 8 are black everywhere; remove", image_folder, dir=str(folder)
    )
    shape = read_image(folder / "alpha_only.png", 32, 32, colour=False)
    alpha = np.array(Image.open(folder / "alpha_only.png"))[:, :, 3]
    assert shape[0].tolist() == (255 - alpha).tolist()
    assert set(alpha.flatten().tolist()) == {0, 255}


# Real data.


def test_facts_of_mnist(real_mnist: Path):
    """Mean and deviation are those that everybody normalises by."""
    data = mnist(dir=str(real_mnist), pixels="grey")
    assert [len(data.split(name)) for name in SPLITS] == [55_000, 5000, 10_000]
    assert data.sizes() == {"channels": 1, "height": 28, "width": 28, "pixels": "grey"}
    training = torch.cat([data.train.pixels, data.valid.pixels])
    assert training.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert training.std().item() == pytest.approx(0.3081, abs=5e-5)
    assert data.test.pixels.mean().item() == pytest.approx(0.1325, abs=5e-5)
    binary = mnist(dir=str(real_mnist))
    assert torch.equal(binary.valid.pixels, (data.valid.pixels > 0.5).float())


# The configuration.


@pytest.mark.parametrize("name", ["digits", "mnist", "fashion_mnist", "image_folder"])
def test_configuration_says_the_defaults(root: Path, name: str):
    options = OmegaConf.to_container(OmegaConf.load(root / "conf" / "data" / f"{name}.yaml"))
    assert isinstance(options, dict)
    factory = get_object(options["data"].pop("_target_"))
    parameters = inspect.signature(factory).parameters.values()
    empty = inspect.Parameter.empty
    assert options["data"] == {
        p.name: "???" if p.default is empty else p.default for p in parameters
    }
    annotations = annotations_of(factory)
    assert all(fits(value, annotations[name]) for name, value in options["data"].items())
    assert not fits("green", annotations["pixels"])


# What cannot be used.


def raises(message: str, factory: Callable[..., Any], **options: Any) -> str:
    with pytest.raises(UserError, match=message) as caught:
        factory(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("factory", [digits, mnist, fashion_mnist, image_folder])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "^data.batch_size is 0; it must be at least 1$"),
        ({"pixels": "green"}, "^data.pixels is green; it must be one of .*binary"),
    ],
)
def test_options_out_of_range(factory: Callable[..., Any], options: dict[str, Any], message: str):
    given = {"dir": "nowhere"} if factory is not digits else {}
    raises(message, factory, **given, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid_images": 0}, "^data.valid_images is 0; it must be at least 1$"),
        ({"test_images": -1}, "^data.test_images is -1; it must be at least 1$"),
        (
            {"valid_images": 1000, "test_images": 797},
            "^data.valid_images is 1000 and data.test_images is 797; together they must be below "
            "the 1,797 digits",
        ),
        ({"pixels": "rgb"}, "^data.pixels is rgb; it must be one of binary, grey$"),
    ],
)
def test_digits_that_there_are_not(options: dict[str, Any], message: str):
    raises(message, digits, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TWO_IMAGES[:-1], "is truncated: 11 bytes follow the header, .* 2 images of 2 x 3; get it"),
        (TWO_IMAGES + b"\0", "is too long: 13 bytes follow the header, which tells of 2 images"),
        (TWO_IMAGES[:10], "is truncated: it ends within its header"),
        (b"", "is truncated: it ends within its header"),
        (b"\x89PNG" + TWO_IMAGES, "starts with 89504e47, an IDX file of images with 00000803"),
        (b"\0\0\x0d\x03" + TWO_IMAGES[4:], "starts with 00000d03, an IDX file of images with"),
        (b"\0\0\x08\x01" + TWO_IMAGES[4:], "has dimensions: 1, an IDX file of images has 3"),
        (b"\0\0\x08\x03" + bytes(12), "holds no images: give another file"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_broken_idx_files(tmp_path: Path, content: bytes, message: str, packed: bool):
    folder = write_idx(tmp_path)
    (tmp_path / f"{TEST}.gz").unlink()
    file = tmp_path / (f"{TEST}.gz" if packed else TEST)
    file.write_bytes(gzip.compress(content) if packed else content)
    assert raises(message, mnist, dir=folder, valid_images=1).startswith(str(file))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda packed: packed[:-12], "is damaged, get it again: Compressed file ended before"),
        (lambda packed: packed[:10] + b"\xff" * 20, "is damaged, get it again: Error -3"),
        (lambda packed: packed[:-8] + bytes(8), "is damaged, get it again: CRC check failed"),
    ],
)
def test_broken_gzip_files(tmp_path: Path, damage: Callable[[bytes], bytes], message: str):
    folder = write_idx(tmp_path)
    file = tmp_path / f"{TRAIN}.gz"
    file.write_bytes(damage(file.read_bytes()))
    assert raises(message, mnist, dir=folder).startswith(str(file))


def test_idx_files_that_cannot_be_opened(tmp_path: Path):
    raises("images cannot be read: No such file or directory$", read_idx, file=tmp_path / "images")


def test_idx_files_that_do_not_belong_together(tmp_path: Path):
    folder = write_idx(tmp_path)
    (tmp_path / TEST).write_bytes(idx(np.zeros((1, 4, 5), np.uint8)))
    raises(
        "the training images of mnist are 2 x 3, the test images 4 x 5: give files that belong",
        mnist,
        dir=folder,
    )


def test_validation_images_that_there_are_not(tmp_path: Path):
    raises("data.valid_images is 0; it must be at least 1", mnist, valid_images=0)
    raises(
        "data.valid_images is 6; it must be below the 6 training images",
        mnist,
        dir=write_idx(tmp_path),
        valid_images=6,
    )


def test_a_given_folder_without_mnist(tmp_path: Path, no_download: list[Any]):
    folder = write_idx(tmp_path)
    (tmp_path / f"{TEST}.gz").unlink()
    message = raises(f"^{tmp_path} has no {TEST}: download .*mnist/ and", mnist, dir=folder)
    assert "data.dir" in message
    raises(f"has no {TRAIN} and no {TEST}: .*fashion-mnist", fashion_mnist, dir="nowhere")
    assert no_download == []


def test_mnist_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_download: list[tuple[str, dict[str, Any]]]
):
    failed = "OpenML cannot be read .*no network.*: download .* from .* and set data.dir"
    raises(f"^GFNEM_DATA, .*{TRAIN} and {TEST} in, is not set; {failed}", mnist)
    write_idx(tmp_path)
    monkeypatch.setenv("GFNEM_DATA", str(tmp_path))
    raises(f"^{tmp_path}/fashion_mnist has no {TRAIN} and no {TEST}; {failed}", fashion_mnist)
    # A folder with one of the two files does not count.
    write_idx(tmp_path / "fashion_mnist")
    (tmp_path / "fashion_mnist" / f"{TRAIN}.gz").unlink()
    raises(f"^{tmp_path}/fashion_mnist has no {TRAIN}; {failed}", fashion_mnist)
    assert [name for name, _ in no_download] == ["mnist_784", "Fashion-MNIST", "Fashion-MNIST"]


def test_a_download_that_breaks_off(monkeypatch: pytest.MonkeyPatch):
    def fetch(*_: Any, **__: Any) -> None:
        raise IncompleteRead(b"half")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    raises("OpenML cannot be read .IncompleteRead", mnist)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 0}, "^data.height is 0; it must be at least 1$"),
        ({"width": -2}, "^data.width is -2; it must be at least 1$"),
        ({"width": 2}, "^data.height is None and data.width is 2: give both, or none of them"),
        ({"valid_fraction": 0.0}, "^data.valid_fraction is 0.0 and data.test_fraction is 0.1;"),
        ({"test_fraction": float("nan")}, "data.test_fraction is nan; both must be above 0"),
        ({"valid_fraction": 0.9}, "data.valid_fraction is 0.9 and .* their sum below 1"),
        ({"dir": "nowhere"}, "^nowhere is no folder: set data.dir"),
    ],
)
def test_image_folders_with_wrong_options(tmp_path: Path, options: dict[str, Any], message: str):
    raises(message, image_folder, **{"dir": write_images(tmp_path), **options})


def test_folders_without_images(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("no image")
    message = raises(
        "has no images in it: their names must end in", image_folder, dir=str(tmp_path)
    )
    assert message.startswith(str(tmp_path)) and ".jpg, .pbm, .pgm, .png" in message


@pytest.mark.parametrize(("images", "fraction"), [(4, 0.1), (10, 0.899)])
def test_folders_with_too_few_images(tmp_path: Path, images: int, fraction: float):
    folder = write_images(tmp_path, images)
    message = f"^{folder} has too few different images for three splits, {images}: add images or"
    raises(message, image_folder, dir=folder, valid_fraction=fraction)


def test_images_that_cannot_be_read(tmp_path: Path):
    folder = write_images(tmp_path)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    broken = tmp_path / "broken.png"
    noise.save(broken)
    broken.write_bytes(broken.read_bytes()[:2000])
    raises(f"^{broken} cannot be read as an image: .*truncated", image_folder, dir=folder)
    broken.write_bytes(b"no image")
    raises(f"^{broken} cannot be read as an image: .*remove", image_folder, dir=folder)
    broken.write_bytes(b"")
    raises(f"^{broken} cannot be read as an image", image_folder, dir=folder)
    Image.fromarray(np.full((4, 4), 255, dtype=np.uint16)).save(broken)
    raises(f"^{broken} .*: it has 16 bits in a channel, and the up", image_folder, dir=folder)
