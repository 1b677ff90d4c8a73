"""Checkpoints are whole or absent, and reading one never runs code."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from gfnem.errors import UserError
from gfnem.run.checkpoint import atomic_write, load_state, save_state


def training_state() -> dict[str, object]:
    """A state as a training run has it: module, optimizer, random states, counters."""
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {
        "model": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": {"torch": torch.get_rng_state(), "python": random.getstate()},
        "lines": 7,
        "best": None,
        "schedule": [0.5, "warm", True, (1, 2)],
    }


def test_state_survives_writing_and_reading(tmp_path: Path) -> None:
    state = training_state()
    save_state(tmp_path / "last.pt", state)
    loaded = load_state(tmp_path / "last.pt", "none")
    torch.testing.assert_close(loaded["model"], state["model"], rtol=0, atol=0)
    assert loaded["random"]["python"] == random.getstate()
    assert loaded["schedule"] == state["schedule"]
    assert loaded["lines"] == 7 and loaded["best"] is None
    optimizer = torch.optim.Adam(torch.nn.Linear(3, 2).parameters())
    optimizer.load_state_dict(loaded["optimizer"])
    assert optimizer.state_dict()["state"][0]["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    save_state(path, {"step": 1})

    def half(state: object, file: object) -> None:
        file.write(b"half a checkpoint")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_state(path, {"step": 2})
    assert load_state(path, "none") == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_old_file_stands_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_state(path, training_state())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(torch.get_rng_state().numpy().tobytes()) + 100] ^= 1
    for damaged in (b"", whole[:100], whole[:-1], b"text\n" * 50, bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"last\.pt cannot be read, it is damaged .*: use best"):
            load_state(path, "use best.pt")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint .*best\.pt does not exist: start again"):
        load_state(tmp_path / "best.pt", "start again")


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"model": Harm()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_state(tmp_path / "last.pt", "none")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": {"b": [1, np.float64(2.0)]}}, r"state\['a'\]\['b'\]\[1\] is a float64"),
        ({"path": Path("x")}, r"state\['path'\] is a \w*Path"),
        ({Path("x"): 1}, r"the key .* of state is a \w*Path"),
    ],
)
def test_unreadable_state_is_refused_when_written(
    tmp_path: Path, state: dict[object, object], where: str
) -> None:
    with pytest.raises(TypeError, match=where):
        save_state(tmp_path / "last.pt", state)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
