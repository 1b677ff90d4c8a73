"""Data of one's own from its files to trees and pictures, with the command line alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from nltk import Tree
from PIL import Image

from gfnem.app.main import main

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """What a command line prints."""
    capsys.readouterr()
    assert main(list(arguments)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


def test_a_german_treebank(tiny_run: list[str], capsys: pytest.CaptureFixture[str]):
    choose = random.Random(0).choice
    trees = [
        f"(TOP (S (NP (ART Der) (NN {choose(['Hund', 'Mann'])})) "
        f"(VVFIN {choose(['bellt', 'ruft'])}){choose(['', ' ($, ,) (ADV laut)'])}) ($. .))"
        for _ in range(40)
    ]
    Path("tiger.mrg").write_text("\n".join(trees), encoding="utf-8")
    run = ["device=cpu", "data=bracketed", "data.train=tiger.mrg", "data.batch_size=8", *tiny_run]
    (read, *_) = lines(capsys, *run, "schedule.warmup_e_steps=2", "run_dir=run")
    assert read.startswith("bracketed: train 32 sentences, ")
    commas = sum("$," in tree for tree in trees)
    assert read.endswith(f"; dropped {40 + commas} punctuation (. ,)")
    Path("new.txt").write_text("\ufeffDer Hund ruft laut\r\n", encoding="utf-8")
    (line,) = lines(capsys, "parse", "run=run", "file=new.txt")
    assert Tree.fromstring(line).leaves() == ["Der", "Hund", "ruft", "laut"]
    drawn = [line.split("\t") for line in lines(capsys, "generate", "run=run", "n=3")]
    assert all(Tree.fromstring(tree).leaves() == words.split() for words, tree in drawn)
    assert {"trees.png", "f1.png"} <= {file.name for file in Path("run/plots").iterdir()}


def test_text_as_people_write_it(tiny_run: list[str], capsys: pytest.CaptureFixture[str]):
    choose = random.Random(0).choice
    said = [
        f"The {choose(['dog', 'king'])} sings{choose(['.', '!', ', doesn’t it?'])}"
        for _ in range(40)
    ]
    Path("own.txt").write_text("\ufeff" + "\r\n".join(said), encoding="utf-8")
    run = ["device=cpu", "data=text", "data.train=own.txt", "data.tokenize=true", *tiny_run]
    lines(capsys, *run, "schedule.warmup_e_steps=2", "run_dir=run")
    Path("new.txt").write_text("The dog sings, doesn’t it?", encoding="utf-8")
    assert main(["parse", "run=run", "file=new.txt"]) == 0
    tree = Tree.fromstring(capsys.readouterr().out)
    assert tree.leaves() == ["The", "dog", "sings", "does", "n't", "it"]


@pytest.mark.parametrize(("mode", "size"), [("L", 24), ("RGB", 32)])
def test_a_folder_of_images(
    mode: str, size: int, tiny_images: list[str], capsys: pytest.CaptureFixture[str]
):
    noise = np.random.default_rng(0).integers(0, 256, (20, size, size, 3), dtype=np.uint8)
    Path("own").mkdir()
    for number, drawn in enumerate(noise):
        Image.fromarray(drawn).convert(mode).save(f"own/{number}.{('png', 'TGA')[number % 2]}")
    run = [*tiny_images, "data=image_folder", "data.dir=own", "schedule.warmup_e_steps=2"]
    (read, *_) = lines(capsys, *run, "run_dir=run")
    kind = {"L": "grey", "RGB": "rgb"}[mode]
    assert read == (
        f"image_folder: 16 training, 2 validation, 2 test images, {size} x {size}, {kind}"
    )
    assert lines(capsys, "generate", "run=run", "n=2", "file=new.png")
    assert lines(capsys, "reconstruct", "run=run", "file=own.png")
    for file in ("new.png", "own.png", "run/plots/samples.png"):
        pixels = imread(file)[..., :3]
        grey = (pixels == pixels[..., :1]).all(-1)
        # The ground is tinted a little.
        assert (grey.mean() > 0.2) == (mode == "L")
