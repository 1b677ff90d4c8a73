"""Drawing, reading, splitting and batching of points, and the errors of what cannot be read."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from gfnem.errors import UserError
from gfnem.tasks.mixture.components import petal_offsets
from gfnem.tasks.mixture.data import PointData, Points, lattice, points, read_points, sampled

SPLITS = ("train", "valid", "test")


def test_default_problem():
    """16 components on one regular lattice, with the likelihood of such a truth."""
    data = sampled()
    assert [len(data.split(split)) for split in SPLITS] == [4000, 1000, 1000]
    assert data.describe() == (
        "sampled: 4,000 training, 1,000 validation, 1,000 test points, 2 dimensions"
    )
    means, offsets = lattice(4, 2).numpy(), petal_offsets(4, 2).numpy()
    centers = (means[:, None] + offsets).reshape(-1, 2)
    axis = sqrt(2) * np.array([-1.5, -0.5, 0.5, 1.5])
    expected = sorted((x, y) for x in axis for y in axis)
    rounded = sorted(centers.astype(float).round(4).tolist())
    np.testing.assert_allclose(rounded, expected, atol=1e-4)
    x = data.train.values.numpy()
    normal: Any = multivariate_normal
    densities = np.array([normal(center, 0.25**2).logpdf(x) for center in centers])
    log_likelihood = float(np.logaddexp.reduce(densities).mean()) - log(16)
    assert log_likelihood == pytest.approx(-2.82, abs=0.03)


def test_parts_by_name():
    data = sampled(train_points=3, valid_points=2, test_points=1)
    assert data.split("valid") is data.valid
    with pytest.raises(UserError, match="split is 'tset'; use one of train, valid, test"):
        data.split("tset")


def test_lattices_and_petals_of_other_sizes():
    spacing = 2 * sqrt(2)
    assert lattice(1, 3).tolist() == [[0, 0, 0]]
    torch.testing.assert_close(
        lattice(3, 4),
        torch.tensor([[-1.0, -1, 0, 0], [2, -1, 0, 0], [-1, 2, 0, 0]]) * spacing / 3,
    )
    torch.testing.assert_close(petal_offsets(2, 3), torch.tensor([[0.0, 1, 0], [0, -1, 0]]))
    assert petal_offsets(7, 2).norm(dim=-1).tolist() == pytest.approx([1] * 7)
    data = sampled(5, 3, 4, train_points=30, valid_points=2, test_points=1)
    assert data.train.values.shape == (30, 4) and data.sizes() == {"dimensions": 4}
    assert data.test.ids.tolist() == [0]


def test_petals_of_neighbours_can_coincide():
    """Four superclusters sqrt(2) apart: 16 petals at 9 places, 4 of them in the middle."""
    data = sampled(spacing=sqrt(2), train_points=3000)
    assert data.truth is not None
    centers = (data.truth.means[:, None] + petal_offsets(4, 2)).flatten(0, 1).numpy().round(4) + 0.0
    places, count = np.unique(centers, axis=0, return_counts=True)
    assert sorted(count) == [1, 1, 1, 1, 2, 2, 2, 2, 4]
    assert places[count == 4].tolist() == [[0, 0]]
    distance = np.abs(data.train.values.numpy()[:, None] - places).max(-1)
    # Each place has as many points as petals.
    near = np.bincount(distance.argmin(1), minlength=9) / 3000
    np.testing.assert_allclose(near, count / 16, atol=0.03)


def test_points_scatter_as_they_are_told():
    values = sampled(1, 1, deviation=0.5, train_points=4000).train.values
    assert values.std(0).tolist() == pytest.approx([0.5, 0.5], rel=0.05)


def test_points_depend_on_the_seed_alone():
    one, same, other = (sampled(train_points=20, seed=seed) for seed in (0, 0, 1))
    for split in SPLITS:
        values = [data.split(split).values for data in (one, same, other)]
        assert values[0].equal(values[1]) and not values[0].equal(values[2])
    flat = torch.cat([one.split(split).values for split in SPLITS])
    assert len(flat.unique(dim=0)) == len(flat)


def test_batches():
    data = sampled(train_points=10)
    (batch,) = data.train_batches(3)
    assert batch is data.train
    data = sampled(train_points=10, batch_size=4)
    batches = data.train_batches(0)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    ids = torch.cat([batch.ids for batch in batches])
    assert ids.sort().values.tolist() == list(range(10))
    values = torch.cat([batch.values for batch in batches])
    assert values.equal(data.train.values[ids])
    orders = [torch.cat([b.ids for b in data.train_batches(n)]).tolist() for n in (0, 0, 1)]
    assert orders[0] == orders[1] == ids.tolist() != orders[2]
    assert batches[0].to("cpu").select(slice(1)).ids.tolist() == ids[:1].tolist()


def test_center_and_spread():
    train = Points.numbered(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    data = PointData(train, train, train)
    assert data.center.tolist() == [1, 2]
    assert float(data.spread) == pytest.approx(sqrt((1 + 4) / 2))


def test_files_are_read_and_split(tmp_path: Path):
    array = np.arange(60, dtype=np.int64).reshape(20, 3)
    np.save(tmp_path / "points.npy", array)
    lines = [", ".join(map(str, row)) for row in array.tolist()]
    (tmp_path / "points.csv").write_text("\n".join(["", *lines, " "]) + "\n")
    for name in ("points.npy", "points.csv"):
        assert read_points(tmp_path / name).equal(torch.from_numpy(array).float())
        data = points(str(tmp_path / name), valid_fraction=0.2, test_fraction=0.1, seed=4)
        assert [len(data.split(split)) for split in SPLITS] == [14, 4, 2]
        assert data.describe().startswith(f"{name}: 14 training, 4 validation, 2 test points, 3 ")
        rows = torch.cat([data.split(split).values for split in SPLITS])
        assert rows[:, 0].sort().values.equal(torch.arange(0.0, 60, 3))
        again = points(str(tmp_path / name), valid_fraction=0.2, test_fraction=0.1, seed=4)
        other = points(str(tmp_path / name), valid_fraction=0.2, test_fraction=0.1, seed=5)
        assert data.test.values.equal(again.test.values)
        assert not data.valid.values.equal(other.valid.values)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf1,2\r\n3,4\r\n", b"1,2\r3,4\r"])
def test_byte_order_marks_and_line_ends(tmp_path: Path, content: bytes):
    (tmp_path / "own.csv").write_bytes(content)
    assert read_points(tmp_path / "own.csv").tolist() == [[1, 2], [3, 4]]


def test_points_of_people(cases: Path):
    values = read_points(cases / "pts_bom_crlf.csv")
    assert values.shape == (60, 2)
    assert values[[0, 2]].equal(torch.tensor([[0.1257, -0.1321], [-0.5357, 0.3616]]))
    # The other file has the same points, times 1e20.
    scaled = np.load(cases / "pts_1e20.npy") / 1e20
    assert np.abs(values.numpy() - scaled).max() < 1e-4
    with pytest.raises(UserError, match=r"pts_1e20.npy has a number in point 1 that is beyond"):
        read_points(cases / "pts_1e20.npy")


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.csv").write_text("1,2\n" * 10)
    assert len(points("~/own.csv").train) == 8


def write(text: str) -> Callable[[Path], Any]:
    return lambda file: file.write_text(text)


def save(array: Any) -> Callable[[Path], Any]:
    return lambda file: np.save(file, np.array(array), allow_pickle=True)


MISTAKES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("a.csv", lambda file: None, " cannot be read: No such file or directory; check data.file"),
    ("a.npy", lambda file: None, " cannot be read: No such file or directory; check data.file"),
    ("a.txt", write("1,2\n"), " is neither a CSV nor an NPY file: its name must end in .csv"),
    ("a.csv", write("x,y\n1,2\n"), ", line 1: 'x' is no number; give numbers between commas, "),
    ("a.csv", write("1,2\n1,\n"), ", line 2: '' is no number; give numbers between commas, "),
    ("a.csv", write("1,2\n\n1,2,3\n"), ", line 3 has 3 numbers, the lines before have 2: give"),
    ("a.csv", write("1,2\n3,nan\n"), " has a number in point 2 that is not finite: remove"),
    ("a.csv", write("1\n2\n"), " holds an array of 2 x 1: give one of points x dimensions, with"),
    ("a.csv", write("\n"), " holds an array of 0: give one of points x dimensions, with"),
    ("a.csv", lambda file: file.write_bytes(b"1,2\n\xe9,2"), ", line 2: not UTF-8 text; convert"),
    ("a.csv", write("1,2\n3,-1e20\n"), " has a number in point 2 that is beyond 1e+15, too large"),
    ("a.npy", save([[1e300, 2.0]]), " has a number in point 1 that is beyond 1e+15, too large to"),
    ("a.npy", write("1,2\n"), " is damaged or no NPY file: write it with numpy.save"),
    ("a.npy", write("PK\x03\x04 an archive"), " is damaged or no NPY file: write it with numpy.s"),
    (
        "a.npy",
        lambda file: file.write_bytes(b"\x93NUMPY\x01\0\x0a\0{'descr': (1"),
        " is damaged or no NPY file: write it with numpy.save",
    ),
    ("a.npy", save([[{}, 1]]), " is damaged or no NPY file: write it with numpy.save"),
    ("a.npy", save([["a", "b"]]), " holds no real numbers: give an array of them"),
    ("a.npy", save([[1j, 2]]), " holds no real numbers: give an array of them"),
    ("a.npy", save([1.0, 2.0]), " holds an array of 2: give one of points x dimensions, with"),
    ("a.npy", save([[1.0, np.inf]]), " has a number in point 1 that is not finite: remove"),
    ("a.csv", write("1,2\n" * 4), " has too few points for three splits, 4: add points or"),
]


@pytest.mark.parametrize("name, make, message", MISTAKES)
def test_files_that_hold_no_points(name, make, message, tmp_path: Path):
    file = tmp_path / name
    make(file)
    with pytest.raises(UserError, match=f"^{re.escape(str(file) + message)}") as caught:
        points(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make, options, message",
    [
        (sampled, {"superclusters": 0}, "data.superclusters is 0; it must be at least 1"),
        (sampled, {"petals": 0}, "data.petals is 0; it must be at least 1"),
        (sampled, {"dimensions": 1}, "data.dimensions is 1; it must be at least 2"),
        (sampled, {"train_points": 0}, "data.train_points is 0; it must be at least 1"),
        (sampled, {"valid_points": 0}, "data.valid_points is 0; it must be at least 1"),
        (sampled, {"test_points": 0}, "data.test_points is 0; it must be at least 1"),
        (sampled, {"spacing": 0.0}, "data.spacing is 0.0; it must be positive"),
        (sampled, {"deviation": 0.0}, "data.deviation is 0.0; it must be positive"),
        (sampled, {"batch_size": 0}, "data.batch_size is 0; it must be at least 1"),
        (points, {"file": "a.csv", "batch_size": 0}, "data.batch_size is 0; it must be at least 1"),
        (
            points,
            {"file": "a.csv", "valid_fraction": 0.5, "test_fraction": 0.5},
            "data.valid_fraction is 0.5 and data.test_fraction is 0.5; both must be above 0 and "
            "their sum below 1",
        ),
    ],
)
def test_options_out_of_range(make, options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        make(**options)
