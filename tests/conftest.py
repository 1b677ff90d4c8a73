"""What tests share: the settings of small runs, and where real data may lie."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gfnem.tasks.grammar.text import sources as data
from gfnem.tasks.grammar.text.words import WordForms


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from a second thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """Processes that run tests side by side ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def subnormal_numbers() -> None:
    """Whatever a run from the command line before has set."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).parents[1]


def data_folder(root: Path) -> Path:
    """Where real data may be."""
    return Path(os.environ.get("GFNEM_DATA", root.parent / "shared" / "data")).resolve()


@pytest.fixture(scope="session")
def real_data(root: Path) -> Path:
    """The folder with real data; the test is skipped where there is none."""
    folder = data_folder(root)
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set GFNEM_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def cases(root: Path) -> Path:
    """The folder with small inputs as people have them; the test is skipped where there is none."""
    folder = data_folder(root).parent / "cases"
    if not folder.is_dir():
        pytest.skip(f"no inputs in {folder}: they lie beside the folder that GFNEM_DATA names")
    return folder


@pytest.fixture(scope="session", autouse=True)
def real_trees_are_parsed_once(root: Path) -> Iterator[None]:
    """Treebanks take seconds each time."""
    folder = str(data_folder(root))
    parsed: dict[tuple[str, WordForms, bool], Any] = {}
    read_trees = data.read_trees

    def once(file: Any, forms: WordForms, keep_currency: bool) -> Any:
        if not str(file).startswith(folder):
            return read_trees(file, forms, keep_currency)
        key = str(file), forms, keep_currency
        if key not in parsed:
            parsed[key] = read_trees(file, forms, keep_currency)
        return parsed[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "read_trees", once)
        yield


@pytest.fixture(scope="session")
def tiny_data() -> list[str]:
    """Overrides for little data made on the spot."""
    return [
        "device=cpu",
        "data=toy_english",
        "data.train_sentences=40",
        "data.valid_sentences=8",
        "data.test_sentences=8",
        "data.max_length=8",
        "data.batch_size=8",
    ]


@pytest.fixture(scope="session")
def tiny_images() -> list[str]:
    """Overrides for a discrete VAE of a second or two."""
    return [
        "device=cpu",
        "task=discrete_vae",
        "model.decoder_width=4",
        "model.blocks=1",
        "model.prior_width=4",
        "policy.hidden=4",
        "em.m_steps=4",
        "em.evaluate_every=2",
        "em.log_every=2",
        "evaluator.samples=4",
        "evaluator.nll_samples=8",
        "evaluator.images=8",
        "evaluator.test_images=8",
        "evaluator.train_images=8",
        "evaluator.temperature_images=8",
    ]


@pytest.fixture(scope="session")
def tiny_mixture() -> list[str]:
    """Overrides for a hierarchical mixture of a second, whatever the data and the posterior."""
    return [
        "device=cpu",
        "task=mixture",
        "em.m_steps=4",
        "em.evaluate_every=2",
        "em.log_every=2",
        "evaluator.samples=4",
    ]


@pytest.fixture(scope="session")
def tiny_run() -> list[str]:
    """Overrides for a run of a second or two, whatever the data and the posterior."""
    return [
        "model.nonterminals=3",
        "model.preterminals=4",
        "model.width=8",
        "em.m_steps=4",
        "em.evaluate_every=2",
        "em.log_every=2",
        "evaluator.samples=4",
        "evaluator.iw_samples=8",
    ]
