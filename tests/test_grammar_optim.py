"""The study of the M-step's optimizer, on runs of a few steps."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.text.corpus import Sentences

pytestmark = pytest.mark.slow


@pytest.fixture
def study(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(root / "scripts")
    return importlib.import_module("grammar_optim")


def test_words_given_the_others_are_a_distribution(study: Any) -> None:
    def logits(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    generator = torch.Generator().manual_seed(0)
    vocabulary = 5
    grammar = DenseGrammar(
        logits(2).log_softmax(-1),
        logits(1, 2, 25).log_softmax(-1).unflatten(-1, (5, 5)),
        logits(1, 3, vocabulary).log_softmax(-1),
    )
    # Every word in every place of two sentences.
    for place, length in ((0, 3), (2, 3), (1, 2)):
        words = torch.tensor([[1, 4, 2]]).repeat(vocabulary, 1)
        words[:, place] = torch.arange(vocabulary)
        x = Sentences(words, torch.full((vocabulary,), length), torch.arange(vocabulary))
        scores = study.word_scores(grammar, x)[:, place]
        assert float((-scores).exp().sum()) == pytest.approx(1)


def test_tries_are_followed_by_seeds_and_a_table(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "OPTIMIZERS", {k: study.OPTIMIZERS[k] for k in ("Adam", "DANA")})
    monkeypatch.setattr(study, "COLORS", {k: study.COLORS[k] for k in ("Adam", "DANA")})
    monkeypatch.setattr(study, "RATES", {"Adam": (1e-9, 1e-2), "DANA": (0.1, 1e-9)})
    monkeypatch.setattr(study, "SEEDS", (1,))
    few = [
        *("data=toy_english", "data.train_sentences=30", "data.valid_sentences=6"),
        *("data.test_sentences=6", "data.max_length=7", "model.width=4", "model.nonterminals=3"),
        *("model.preterminals=4", "em.m_steps=4", "em.evaluate_every=2", "device=cpu"),
    ]
    given = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--processes", "1"]
    assert study.main([*given, *few]) == 0
    said = capsys.readouterr().out
    assert "4 runs, 4 of them to be done" in said
    overall, tenths = (tmp_path / "out" / "grammar_optim.md").read_text().split("\n\n")
    rows = [line.split(" | ")[:2] for line in overall.splitlines()[2:]]
    assert rows == [["| Adam", "0.01"], ["| DANA", "0.1"]]
    assert len(tenths.strip().splitlines()) == 2 + 10
    assert (tmp_path / "out" / "grammar_optim.png").read_bytes().startswith(b"\x89PNG")
    # A second time nothing is trained.
    assert study.main([*given, *few]) == 0
    said = capsys.readouterr().out
    assert "4 runs, 0 of them" in said and "2 runs, 0 of them" in said
