"""Runs that come from strangers execute nothing, and say why they are left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gfnem.app.main import main

ATTACKS: dict[str, dict[str, Any]] = {
    "torch.load": {"_target_": "torch.load", "f": "poison"},
    "numpy.load": {"_target_": "numpy.load", "file": "poison", "allow_pickle": True},
    "joblib.load": {"_target_": "joblib.load", "filename": "poison"},
    "torch.hub.load": {"_target_": "torch.hub.load", "repo_or_dir": ".", "model": "poison"},
    "shutil.copyfile": {"_target_": "shutil.copyfile", "src": "poison", "dst": "executed"},
    "os.system": {"_target_": "os.system", "command": "touch executed"},
    "a module behind gfnem's": {
        "_target_": "gfnem.app.main.os.system",
        "command": "touch executed",
    },
    "a module behind torch's optimizers": {
        "_target_": "torch.optim.optimizer.torch.hub.load",
        "repo_or_dir": ".",
    },
    "torch's optimizers' own": {"_target_": "torch.optim.sys.exit"},
    "a module that is imported": {"_target_": "poison.anything"},
    "what gfnem does not name": {
        "_target_": "gfnem.run.checkpoint.atomic_write",
        "path": "executed",
    },
}
POISON = "open('executed', 'w').close()\n"


@pytest.fixture
def run(
    mixture_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[dict[str, Any]], Any]], Path]:
    """Makes a run whose configuration is changed, in a folder with a poisoned module."""
    monkeypatch.chdir(tmp_path)
    Path("poison.py").write_text(POISON)
    Path("hubconf.py").write_text(POISON)
    monkeypatch.syspath_prepend(tmp_path)

    def changed(change: Callable[[dict[str, Any]], Any]) -> Path:
        path = Path(shutil.copytree(mixture_run, "stranger"))
        config = yaml.safe_load((path / "config.yaml").read_text())
        text = change(config)
        text = text if isinstance(text, str) else yaml.safe_dump(config)
        (path / "config.yaml").write_text(text)
        return path

    return changed


@pytest.fixture(scope="session")
def mixture_run(tiny_mixture: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixture") / "run"
    assert main([*tiny_mixture, f"run_dir={path}"]) == 0
    return path


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What all that reads a run says of it."""
    lines = set()
    for command in (["evaluate", f"run={path}"], [f"resume={path}", "em.m_steps=9"]):
        capsys.readouterr()
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        lines.add(error)
    assert not Path("executed").exists()
    return lines.pop()


@pytest.mark.parametrize("part", ["tracker", "data", "deep"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_not_of_gfnem_is_not_called(
    attack: str, part: str, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(config: dict[str, Any]) -> None:
        if part == "deep":
            config["evaluator"]["samples"] = [{"anything": ATTACKS[attack]}]
        else:
            config[part] = ATTACKS[attack]

    line = refused(run(change), capsys)
    assert f"names {ATTACKS[attack]['_target_']} in its config.yaml, which is not of gfnem" in line


def set_verbs(config: dict[str, Any]) -> None:
    config["verbs"] = {"evaluate": "os.system", "poison": "poison.anything"}


def with_defaults(config: dict[str, Any]) -> None:
    config["defaults"] = ["/posterior: gflownet"]


def interpolate(config: dict[str, Any]) -> None:
    config["run_dir"] = "${oc.env:HOME}"


def with_searchpath(config: dict[str, Any]) -> None:
    config["hydra"] = {"searchpath": ["pkg://poison"]}


def laugh(config: dict[str, Any]) -> str:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    return "\n".join(levels)


def nest(config: dict[str, Any]) -> str:
    return "a: " + "[" * 100_000


def twice(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config) + "seed: 1\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_verbs, "names poison.anything in its config.yaml"),
        (with_defaults, "has defaults in its config.yaml"),
        (with_searchpath, "has hydra in its config.yaml"),
        (interpolate, "has run_dir: ${oc.env:HOME} in its config.yaml, where runs have values"),
        (laugh, "has a config.yaml that is too large"),
        (nest, "config.yaml is not a YAML mapping"),
        (twice, "duplicate key seed"),
    ],
)
def test_configurations_that_no_run_has(
    change: Any, message: str, run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(run(change), capsys)


@pytest.mark.parametrize("state", [{}, {"model": "text"}, {"model": {}, "posterior": {}}])
def test_checkpoints_of_something_else(
    state: dict[str, Any], run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run(lambda config: None)
    for which in ("last", "best"):
        torch.save(state, path / "checkpoints" / f"{which}.pt")
    assert "is not one of the model in its config.yaml" in refused(path, capsys)


def test_torch_s_own_optimizers_are_no_strangers(run: Any) -> None:
    def change(config: dict[str, Any]) -> None:
        config["optimizer"]["model"] = {
            "_target_": "torch.optim.RMSprop",
            "_partial_": True,
            "lr": 0.01,
        }

    assert main(["evaluate", f"run={run(change)}"]) == 0


def test_what_a_config_dir_names_is_trusted(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("tasks/conf/tracker").mkdir(parents=True)
    Path("tasks/mine.py").write_text("from gfnem.run import FilesTracker as Mine\n")
    Path("tasks/conf/tracker/mine.yaml").write_text("_target_: mine.Mine\n")
    path = run(lambda config: config.update(tracker={"_target_": "mine.Mine"}))
    assert "--config-dir DIR" in refused(path, capsys)
    assert main(["evaluate", f"run={path}", "--config-dir", "tasks/conf"]) == 0
    assert main([f"resume={path}", "em.m_steps=5", "--config-dir", "tasks/conf"]) == 0
