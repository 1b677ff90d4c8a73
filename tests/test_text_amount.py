"""Grammars of different texts side by side, on runs of a few steps."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from gfnem.app.main import main
from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.rules.dense import DenseGrammar
from gfnem.tasks.grammar.text.corpus import Vocabulary
from tests.tasks.grammar.text.test_brown import read, write_corpora


@pytest.fixture
def script(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(root / "scripts")
    return importlib.import_module("text_amount")


def test_an_unknown_word_is_any_that_is_not_common(script: Any) -> None:
    def logits(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    generator = torch.Generator().manual_seed(0)
    grammar = DenseGrammar(
        logits(2).log_softmax(-1),
        logits(1, 2, 25).log_softmax(-1).unflatten(-1, (5, 5)),
        logits(1, 3, 4).log_softmax(-1),
    )
    own, common = Vocabulary(["<unk>", "a", "b", "c"]), Vocabulary(["<unk>", "c"])
    lengths = torch.tensor([3])
    (merged,) = inside.log_partition(
        script.merge(grammar, own, common).potentials(torch.tensor([[1, 0, 1]]), lengths)
    )
    every = [
        inside.log_partition(grammar.potentials(torch.tensor([[3, word, 3]]), lengths))
        for word in (own.id("<unk>"), own.id("a"), own.id("b"))
    ]
    torch.testing.assert_close(merged, torch.cat(every).logsumexp(0))


def test_right_branching_trees(script: Any, tmp_path: Path) -> None:
    write_corpora(tmp_path)
    corpus = read(tmp_path, treebank_text=False).test
    assert [len(sentence) for sentence in corpus.sentences] == [4, 4, 2]
    # Of four words, one of two spans is that of the gold tree, its only one; two have one tree.
    assert script.right_branching_f1(corpus) == pytest.approx(100 * (2 / 3 + 2 / 3 + 1) / 3)


def test_runs_end_in_a_table_and_a_figure(
    script: Any, tmp_path: Path, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpora(tmp_path)
    runs = str(tmp_path / "runs")
    options = [f"data.dir={tmp_path}", "data.min_count=1", "posterior=exact", "device=cpu"]
    options += [option for option in tiny_run if not option.startswith("em.m_steps")]
    given = ["data=brown", *options, "em.m_steps=2"]
    for name, option in (("all", []), ("alone", ["data.treebank_text=false"])):
        assert main([*given, *option, f"run_dir={runs}/{name}"]) == 0
    capsys.readouterr()
    out = tmp_path / "out"
    assert script.main([runs, "--out", str(out)]) == 0
    # Brown's words alone, "<unk>" left out.
    assert "16 words are common to all runs" in capsys.readouterr().out
    head, _, *lines = (out / "text_amount.md").read_text().splitlines()
    assert head.startswith("| text | seeds | training sentences | nats per word, common")
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| Brown's alone", "1", "2"],
        ["| the treebank's and Brown's", "1", "3"],
        ["| right-branching trees", "", ""],
    ]
    assert (out / "text_amount.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "corpora")])
    assert "hold no runs" in capsys.readouterr().err
