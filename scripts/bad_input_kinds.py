"""Kinds of input that gfnem cannot use, in tables; `bad_inputs.py` tries them."""

from __future__ import annotations

import pickle
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from gfnem.app.composition import compose

BEYOND = 2**70  # of what 64 bits hold
LARGE = str(10**12)
NOISE = np.random.default_rng(0).bytes(3_000)


@dataclass(frozen=True)
class Kind:
    """A kind of bad input.

    arguments: of the command line; "@" is the folder with what was prepared once.
    prepare: puts files into the folder that the process is in.
    stdin: what the process reads; None where standard input is closed.
    """

    group: str
    name: str
    arguments: Sequence[str]
    prepare: Callable[[Path, Path], object] = lambda here, prepared: None
    stdin: bytes | None = b""


# Small runs, which are also what bad options are added to.

SHORT = ["device=cpu", "em.m_steps=2", "em.evaluate_every=1", "em.max_seconds=3"]
TOY = ["data=toy_english", "data.train_sentences=20", "data.valid_sentences=4"]
TOY += ["data.test_sentences=4", "data.max_length=6", "data.batch_size=8"]
OF_GRAMMAR = ["model.nonterminals=3", "model.preterminals=4", "model.width=8"]
OF_GRAMMAR += ["evaluator.samples=2", "evaluator.iw_samples=4"]
OF_IMAGES = ["task=discrete_vae", "model.decoder_width=4", "model.blocks=1", "model.prior_width=4"]
OF_IMAGES += ["evaluator.samples=2", "evaluator.nll_samples=4", "evaluator.images=8"]
OF_IMAGES += ["evaluator.test_images=8", "evaluator.train_images=8"]
OF_IMAGES += ["evaluator.temperature_images=8"]
OF_POINTS = ["task=mixture", "evaluator.samples=2"]
POINTS = ["data.train_points=40", "data.valid_points=8", "data.test_points=8"]
GFLOWNET = ["schedule.warmup_e_steps=1"]
SMALL_SLEEP = ["e_step.sleep_samples=8"]
SHAPES = ["task=tree_prior", "posterior=mcmc", "data=bracketed_shapes", "model.width=4"]
SHAPES += ["posterior.steps=2", "posterior.burn_in=2"]

GRAMMAR = [*SHORT, *TOY, *OF_GRAMMAR]
IMAGES = [*SHORT, *OF_IMAGES, *GFLOWNET, *SMALL_SLEEP]
MIXTURE = [*SHORT, *OF_POINTS, *GFLOWNET, *SMALL_SLEEP]

RUNS = {
    "grammar": [*GRAMMAR, *GFLOWNET, "policy.width=8"],
    "images": IMAGES,
    "points": [*MIXTURE, *POINTS],
}

VARIANTS = {
    "grammar": RUNS["grammar"],
    "grammar, other parts": [
        *GRAMMAR,
        *["policy=light", "objective=subtb", "local_search=back_and_forth", "schedule=adaptive"],
        *["refinement=back_and_forth", "tree_prior=depth", "optimizer=dana"],
    ],
    "grammar, chart": [*GRAMMAR, *GFLOWNET, "model=ncfg", "policy=chart", "objective=tb_sleep"],
    "grammar, chains": [*GRAMMAR, "posterior=mcmc"],
    "grammar, proposals": [*GRAMMAR, "posterior=importance"],
    "raw text": [*SHORT, "data=text", "data.train=@/plain.txt", *OF_GRAMMAR, "posterior=exact"],
    "random grammar": [*SHORT, "data=random_grammar", "posterior=exact"],
    "images": IMAGES,
    "images, factors": [*SHORT, *OF_IMAGES, "posterior=mean_field"],
    "images, warm start": [*IMAGES, "warm_start=vq", "refinement=resampling"],
    "images, folder": [*IMAGES, "data=image_folder", "data.dir=@/pictures"],
    "points": RUNS["points"],
    "points, factors": [*SHORT, *OF_POINTS, *POINTS, "posterior=mean_field"],
    "points, file": [*MIXTURE, "data=points", "data.file=@/points.csv"],
    "shapes": [*SHORT, *SHAPES, "data.trees.train=@/trees.mrg"],
}


def write_good(folder: Path) -> None:
    """Inputs that can be used."""
    words = ("the a one", "dog cat king", "sees likes", "a the", "fish bird")
    sentences = [" ".join(said) for said in product(*(some.split() for some in words))]
    (folder / "plain.txt").write_text("\n".join(sentences))
    (folder / "trees.mrg").write_bytes(trees(sentences))
    (folder / "points.csv").write_bytes(csv(good_points()))
    (folder / "pictures").mkdir()
    for number in range(12):
        drawn = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(drawn).save(folder / "pictures" / f"{number}.png")


def trees(sentences: Sequence[str]) -> bytes:
    return "".join(
        "(S (NP (D {}) (N {})) (VP (V {}) (NP (D {}) (N {}))) (. .))\n".format(*line.split())
        for line in sentences
    ).encode()


def good_points() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(40, 2))


def csv(points: np.ndarray) -> bytes:
    return "".join(",".join(map(str, row)) + "\n" for row in points.tolist()).encode()


# Options.

EDGES = {
    float: ["nan", "inf", "-inf", "-1", "1e10"],
    int: ["-1", "0", LARGE, str(BEYOND), "nan"],
    type(None): ["nan", "-1", str(BEYOND)],
    str: ["nosuch", "''"],
    bool: ["maybe"],
    list: ["[nosuch]", "[-1]", f"[{BEYOND}]"],
}
# What ends a run or says where it goes is given by every kind. Of some a great many take long.
MANY = re.compile(r".*(steps|_samples|burn_in|sweeps|tries|proposals)")
LEFT_ALONE = re.compile(r"hydra|run_dir|verbs|ensemble_verbs|patterns|sizes|.*\._partial_")


def options(prepared: Path) -> Iterator[Kind]:
    """Each option with the values that are at the edge for its type."""
    seen = set()
    for variant, overrides in VARIANTS.items():
        own = placed(overrides, prepared)
        for path, value, part in leaves(OmegaConf.to_container(compose(own))):
            interpolated = isinstance(value, str) and "${" in value
            if (path, part) in seen or interpolated or LEFT_ALONE.match(path):
                continue
            seen.add((path, part))
            for edge in EDGES[type(value)]:
                if edge == LARGE and MANY.fullmatch(path):
                    continue
                kept = [o for o in overrides if o.partition("=")[0] != path]
                yield Kind(f"options, {variant}", f"{path}={edge}", [*kept, f"{path}={edge}"])


def leaves(config: Any, path: str = "", part: str = "") -> Iterator[tuple[str, Any, str]]:
    """Path, value, and what takes it."""
    for name, value in config.items():
        where = f"{path}.{name}".removeprefix(".")
        if isinstance(value, dict):
            yield from leaves(value, where, value.get("_target_", part))
        else:
            yield where, value, part


def sizes() -> Iterator[Kind]:
    """What no memory holds, and learning rates that no model survives."""
    large = [
        *[("grammar", f"model.{name}={10**6}") for name in ("nonterminals", "preterminals")],
        *[("grammar", "model.width=10000000"), ("grammar", "policy.width=10000000")],
        *[("grammar", "data.batch_size=1000000000000"), ("grammar", "data.max_length=1000000")],
        *[("images", "model.codes=1000000000"), ("images", "model.decoder_width=1000000")],
        *[("images", "e_step.samples=1000000000"), ("images", "model.embedding=1000000000")],
        *[("points", "model.superclusters=1000000000"), ("points", "model.petals=1000000000")],
        *[("points", "data.train_points=100000000000"), ("points", "e_step.samples=1000000000")],
    ]
    for run, override in large:
        yield Kind("sizes and rates", f"{run}, {override}", [*RUNS[run], override])
    for run, network, rate in product(
        RUNS, ("model", "posterior"), ("1e5", "1e10", "1e38", "1e300")
    ):
        override = f"optimizer.{network}.lr={rate}"
        more = ["em.m_steps=20", "em.evaluate_every=10"]
        yield Kind("sizes and rates", f"{run}, {override}", [*RUNS[run], *more, override])
    for optimizer, rate in product(("adamw", "dana", "sgd"), ("1e5", "1e10", "1e38")):
        given = [f"optimizer={optimizer}", f"optimizer.model.lr={rate}", "em.m_steps=20"]
        yield Kind("sizes and rates", " ".join(given), [*RUNS["grammar"], *given])
    for threads in ("0", "-1", "100000", str(2**31), str(BEYOND), "nan", "1.5"):
        yield Kind("sizes and rates", f"threads={threads}", [*RUNS["points"], f"threads={threads}"])
    for run, seed in product(RUNS, ("-1", str(2**63), str(2**64), str(-(2**63)), str(BEYOND))):
        yield Kind("sizes and rates", f"{run}, seed={seed}", [*RUNS[run], f"seed={seed}"])


# Command lines.

ODD = ["=", "==", "a=", "=a", "a", "a=b=c", "[]", "{}", "a={", "a='", 'a="', "a=[1", "a=(", "a=$x"]
ODD += ["a=${a", "a=${seed}", "seed=${oc.env:HOME}", "seed=${seed}", "~", "~seed", "++", "+a=1"]
ODD += ["@a=b", "a@b=c", "seed=1,2", "seed=range(3)", "seed=\\", "a\nb=1", "seed=1\n2", "sëed=1"]
ODD += ["seed=\x1b[31m", "\ud800=1", "seed=\ud800", "", " ", "a" * 10_000, "a" * 10_000 + "=1"]
ODD += ["seed=" + "9" * 5_000, "seed=" + "[" * 5_000, "a.b.c.d=1", "em..m_steps=1", ".=1"]
ODD += ["seed={a:1}", "em=null", "em=[]", "data=", "data=null", "task=nosuch", "task=", "-", "--"]
ODD += ["---", "--seed=1", "-x", "--cfg=nosuch", "--cfg", "--config-dir", "--package", "--info=no"]
ODD += ["-m", "hydra/launcher=nosuch", "hydra.mode=nosuch", "hydra/sweeper=nosuch", "--multirun=1"]
ODD += ["data._target_=os.system", "model._target_=nosuch", "model._target_=builtins.exec"]
ODD += ["model._target_=torch.load", "tracker=nosuch", "tracker.mode=nosuch", "device=nosuch"]
ODD += ["device=cuda", "device.nosuch=1", "module_folders=nosuch", "module_folders=[nosuch]"]
ODD += ["experiment=nosuch", "experiment=", "run_dir=", "run_dir=/dev/null", "run_dir=/proc/nosuch"]
ODD += ["run_dir=" + "a" * 300, "run_dir=a\nb", "resume=", "resume=1", "model_from=", "run=x"]
VERBS = ("evaluate", "parse", "generate", "reconstruct", "compare", "nosuch", "")


def command_lines() -> Iterator[Kind]:
    for argument in ODD:
        short = argument if len(argument) < 40 else f"{argument[:20]}...{argument[-3:]}"
        yield Kind("command lines", f"train {short!r}", [*RUNS["points"], argument])
    for verb, argument in product(
        VERBS, ("--frob", "run=", "=", "a='", "~", "\ud800=1", "x", "-m")
    ):
        yield Kind("command lines", f"{verb} {argument!r}", [verb, argument])
    for line in (
        ["parse", "run=[@/grammar,@/images]"],
        ["parse", "run=[]"],
        ["evaluate"],
        ["-h", "x"],
    ):
        yield Kind("command lines", " ".join(line), line)
    for run, verb in product(RUNS, ("evaluate", "parse", "generate", "reconstruct", "encode")):
        yield Kind("command lines", f"{verb} of {run}, option", [verb, f"run=@/{run}", "nosuch=1"])


# Paths.

LONG = "a" * 5_000


def places(here: Path, prepared: Path) -> None:
    (here / "empty").mkdir()
    (here / "void").write_bytes(b"")
    (here / "noise").write_bytes(NOISE)
    (here / "dangling").symlink_to("nosuch")
    (here / "loop").symlink_to("loop")


NAMED = ["nosuch", "empty", "void", "noise", "dangling", "loop", "/dev/null", "''", "~nosuch/a"]
NAMED += [LONG, "'a\nb'", ".", "/", "null", "3", "[]", "[nosuch]", "void/a"]
TAKERS = {
    "trees": [*SHORT, *OF_GRAMMAR, "data=bracketed", "data.train="],
    "text": [*SHORT, *OF_GRAMMAR, "data=text", "data.train="],
    "validation": [*SHORT, *OF_GRAMMAR, "data=text", "data.train=@/plain.txt", "data.valid="],
    "treebank": [*SHORT, *OF_GRAMMAR, "data=treebank", "data.dir="],
    "brown": [*SHORT, *OF_GRAMMAR, "data=brown", "data.dir="],
    "gum": [*SHORT, *OF_GRAMMAR, "data=gum", "data.dir="],
    "ptb": [*SHORT, *OF_GRAMMAR, "data=ptb", "data.dir="],
    "images": [*IMAGES, "data=image_folder", "data.dir="],
    "mnist": [*IMAGES, "data=mnist", "data.dir="],
    "points": [*MIXTURE, "data=points", "data.file="],
    "run": ["evaluate", "run="],
    "resume": ["resume="],
    "model_from": [*RUNS["points"], "model_from="],
    "compare": ["compare", ""],
    "sentences": ["parse", "run=@/grammar", "file="],
    "--config-dir": [*RUNS["points"], "--config-dir="],
    "energy": [*RUNS["grammar"], "tree_prior=learned", "tree_prior.energy.run="],
}


def paths() -> Iterator[Kind]:
    for (taker, arguments), name in product(TAKERS.items(), NAMED):
        if name == "/" and taker not in ("run", "resume", "sentences", "points"):
            continue  # all of a disk is a valid folder to look through
        if taker in ("treebank", "brown", "mnist") and name == "null":
            continue  # what is meant by it is downloaded
        given = [*arguments[:-1], arguments[-1] + name]
        yield Kind(f"paths, {taker}", name[:20].replace("\n", "\\n"), given, places)


# Files of data.

GOOD = trees(["the dog sees a fish", "a cat likes the bird"] * 10)
TEXTS = {
    "nothing": b"",
    "white space": b" \n\t\n",
    "a byte order mark": b"\xef\xbb\xbf",
    "NUL bytes": b"\0" * 1_000,
    "NUL in a word": GOOD.replace(b"dog", b"d\0g"),
    "Latin-1": GOOD.replace(b"dog", b"d\xf6g"),
    "UTF-16": GOOD.decode().encode("utf-16"),
    "UTF-16 without a mark": GOOD.decode().encode("utf-16-le"),
    "UTF-16 cut in a character": GOOD.decode().encode("utf-16")[:-1],
    "UTF-32": GOOD.decode().encode("utf-32"),
    "surrogates": GOOD.replace(b"dog", b"\xed\xa0\x80"),
    "cut": GOOD[:-20],
    "a bracket too many": GOOD + b")",
    "words outside of brackets": GOOD + b"dog\n",
    "one tree": GOOD.splitlines()[0],
    "one word each": b"(S (N dog))\n" * 20,
    "punctuation alone": b"(S (. .) (, ,))\n" * 20,
    "traces alone": b"(S (-NONE- *) (-NONE- *T*-1))\n" * 20,
    "empty brackets": b"()\n(())\n( ( ) ( ) )\n" * 5,
    "100,000 brackets opened": b"(" * 100_000,
    "100,000 brackets closed": b")" * 100_000,
    "a tree 20,000 deep": b"(X " * 20_000 + b"(A a) (B b)" + b")" * 20_000,
    "a binary tree 3,000 deep": b"(X (A a) " * 3_000 + b"(B b)" + b")" * 3_000,
    "a word of 1,000,000 characters": GOOD.replace(b"dog", b"d" * 1_000_000),
    "a sentence of 20,000 words": b"(S " + b"(A a) " * 20_000 + b")",
    "control characters": GOOD.replace(b"dog", b"\x1b[31m\x07\x08"),
    "joiners and directions": GOOD.replace(b"dog", "‮\u200b\u2060".encode()),
    "backslashes": GOOD.replace(b"dog", b"\\\\(\\)"),
    "a table": b"id,text\n1,the dog\n",
    "JSON": b'{"sentences": ["the dog"]}',
    "XML": b"<s>\n<graph/></s>\n" * 10,
    "a picture": b"\x89PNG\r\n\x1a\n" + NOISE,
    "noise": NOISE,
    "gzip": b"\x1f\x8b\x08" + NOISE,
    "a pickle": pickle.dumps(["the dog sees a fish"] * 20),
    "<unk> alone": b"(S (A <unk>) (B <unk>))\n" * 20,
}
READERS = {
    "trees": ["data=bracketed", "data.train=file"],
    "trees to test on": ["data=bracketed", "data.train=@/trees.mrg", "data.test=file"],
    "raw text": ["data=text", "data.train=file"],
    "raw text, tokenised": ["data=text", "data.train=file", "data.tokenize=true"],
}


def written(content: bytes, name: str = "file") -> Callable[[Path, Path], object]:
    return lambda here, prepared: (here / name).write_bytes(content)


def texts() -> Iterator[Kind]:
    base = [*SHORT, *OF_GRAMMAR, *GFLOWNET, "policy.width=8"]
    for (reader, overrides), (name, content) in product(READERS.items(), TEXTS.items()):
        yield Kind(f"text, {reader}", name, [*base, *overrides], written(content))
    for name, content in TEXTS.items():
        shapes = [*SHORT, *SHAPES, "data.trees.train=file"]
        yield Kind("text, shapes of trees", name, shapes, written(content))


def npy(values: Any) -> bytes:
    file = BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def with_value(value: float) -> np.ndarray:
    points = good_points()
    points[3, 1] = value
    return points


TABLES = {
    **{f"{value} in it": csv(with_value(value)) for value in (np.nan, np.inf, 1e20, 1e160, 1e308)},
    "1e400 in it": csv(good_points()) + b"1e400,0\n",
    "text in it": csv(good_points()) + b"high,low\n",
    "a header": b"x,y\n" + csv(good_points()),
    "a row too short": csv(good_points()) + b"1\n",
    "a row too long": csv(good_points()) + b"1,2,3\n",
    "an empty field": csv(good_points()) + b"1,\n",
    "semicolons": csv(good_points()).replace(b",", b";"),
    "decimal commas": b'"1,5";"2,5"\n' * 20,
    "two points": b"1,2\n3,4\n",
    "one point": b"1,2\n",
    "no columns": b"\n" * 20,
    "one value each": b"1\n" * 40,
    "the same point": b"1,2\n" * 40,
    "5,000 columns": b",".join([b"1"] * 5_000) + b"\n",
    "complex numbers": b"1+2j,3\n" * 20,
    "hexadecimal": b"0x10,0x20\n" * 20,
    "underscores": b"1_000,2\n" * 20,
    **{name: TEXTS[name] for name in ("nothing", "white space", "NUL bytes", "UTF-16", "noise")},
}
ARRAYS = {
    **{f"{value} in it": npy(with_value(value)) for value in (np.nan, np.inf, 1e20, 1e160, 1e308)},
    "no points": npy(np.zeros((0, 2))),
    "no dimensions": npy(np.zeros((40, 0))),
    "one dimension": npy(np.zeros(40)),
    "three dimensions": npy(np.zeros((40, 2, 2))),
    "a number": npy(1.0),
    "complex numbers": npy(np.ones((40, 2), dtype=complex)),
    "text": npy(np.array([["a", "b"]] * 40)),
    "objects": npy(np.array([[1, None]] * 40, dtype=object)),
    "records": npy(np.zeros(40, dtype=[("x", float), ("y", float)])),
    "times": npy(np.zeros((40, 2), dtype="M8[s]")),
    "truth values": npy(np.zeros((40, 2), dtype=bool)),
    "long doubles": npy(np.full((40, 2), np.longdouble("1e4000"))),
    "whole numbers beyond 53 bits": npy(np.full((40, 2), 2**63, dtype=np.uint64)),
    "cut": npy(good_points())[:-100],
    "cut in its header": npy(good_points())[:40],
    "a header that lies": npy(good_points()).replace(b"(40, 2)", b"(99, 9)"),
    "a header of petabytes": npy(good_points()).replace(b"(40, 2), }", b"(9**15, 2)"),
    "a header that is no dictionary": npy(good_points()).replace(b"{'descr'", b"['descr'"),
    "an archive": b"PK\x03\x04" + NOISE,
    "a pickle": pickle.dumps(good_points().tolist()),
    **{name: TEXTS[name] for name in ("nothing", "NUL bytes", "noise", "a table")},
}


def points() -> Iterator[Kind]:
    for ending, table in (("csv", TABLES), ("npy", ARRAYS)):
        for name, content in table.items():
            given = [*MIXTURE, "data=points", f"data.file=file.{ending}"]
            yield Kind(f"points, {ending}", name, given, written(content, f"file.{ending}"))


def drawn(
    mode: str = "RGB", size: tuple[int, int] = (8, 8), form: str = "png", **how: Any
) -> bytes:
    file = BytesIO()
    Image.new(mode, size).save(file, form, **how)
    return file.getvalue()


PICTURES = {
    "nothing": b"",
    "text": b"no picture",
    "noise": NOISE,
    **{
        f"{form}, cut": drawn(form=form)[:-20]
        for form in ("png", "jpeg", "gif", "bmp", "tiff", "tga")
    },
    **{
        f"{form}, cut in its header": drawn(form=form)[:9]
        for form in ("png", "jpeg", "gif", "tiff")
    },
    "a picture of other size": drawn(size=(9, 8)),
    "a picture of 0 x 0": drawn().replace(struct.pack(">II", 8, 8), bytes(8)),
    "a picture of 100,000 x 100,000": drawn().replace(
        struct.pack(">II", 8, 8), struct.pack(">II", 100_000, 100_000)
    ),
    "pixels in floating point": drawn("F", form="tiff"),
    "pixels of 32 bits": drawn("I", form="tiff"),
    "black in 16 bits": drawn("I;16"),
    "CMYK": drawn("CMYK", form="jpeg"),
    "LAB": drawn("LAB", form="tiff"),
    "several frames": drawn(
        "L", form="gif", save_all=True, append_images=[Image.new("L", (8, 8), 9)]
    ),
    "a palette": drawn("P"),
    "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a PDF": b"%PDF-1.4\n",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
}


def with_images(content: bytes) -> Callable[[Path, Path], object]:
    def put(here: Path, prepared: Path) -> None:
        shutil.copytree(prepared / "pictures", here / "own")
        (here / "own" / "bad.png").write_bytes(content)

    return put


def idx(count: int = 20, height: int = 8, width: int = 8, magic: int = 0x803) -> bytes:
    return struct.pack(">4I", magic, count, height, width) + bytes(count * height * width)


BYTES = {
    "nothing": b"",
    "noise": NOISE,
    "labels": struct.pack(">2I", 0x801, 20) + bytes(20),
    "cut": idx()[:-9],
    "cut in its header": idx()[:9],
    "too long": idx() + b"more",
    "no images": idx(0),
    "images without height": idx(20, 0),
    "petabytes": struct.pack(">4I", 0x803, 2**31, 2**15, 2**15),
    "floating point": idx(magic=0xD03),
    "images of other size": idx(width=9),
    "gzip, cut": b"\x1f\x8b\x08\0\0\0\0\0",
    "gzip of noise": b"\x1f\x8b\x08" + NOISE,
}


def images() -> Iterator[Kind]:
    for name, content in PICTURES.items():
        given = [*IMAGES, "data=image_folder", "data.dir=own"]
        yield Kind("images, folder", name, given, with_images(content))
    for options_of_folder in (
        ["data.height=0", "data.width=8"],
        ["data.height=8"],
        ["data.height=1000000", "data.width=1000000"],
        ["data.pixels=nosuch"],
        ["data.valid_fraction=0.99"],
        ["model.grid=[3,3]"],
        ["model.grid=[4]"],
        ["model.grid=[0,0]"],
        ["model.grid=[100,100]"],
        ["data.height=1", "data.width=1"],
    ):
        name = " ".join(options_of_folder)
        given = [*IMAGES, "data=image_folder", "data.dir=@/pictures", *options_of_folder]
        yield Kind("images, folder", name, given)
    files = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
    for bad, (name, content) in product(files, BYTES.items()):

        def put(here: Path, prepared: Path, bad: str = bad, content: bytes = content) -> None:
            for file in files:
                (here / file).write_bytes(content if file == bad else idx())

        given = [*IMAGES, "data=mnist", "data.dir=.", "data.valid_images=5"]
        yield Kind("images, IDX", f"{name} in {bad[:5]}", given, put)


# Directories of runs.

DAMAGE: dict[str, Callable[[Path], object]] = {
    "is missing": Path.unlink,
    "is empty": lambda file: file.write_bytes(b""),
    "is cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3]),
    "is noise": lambda file: file.write_bytes(NOISE),
    "is a list": lambda file: file.write_bytes(b"[1, 2]\n"),
    "is a folder": lambda file: (file.unlink(), file.mkdir()),
}
USES = {
    "grammar": {
        "evaluate": ["evaluate", "run=run"],
        "parse": ["parse", "run=run", "file=@/plain.txt"],
        "generate": ["generate", "run=run", "n=1"],
        "resume": ["resume=run", "em.m_steps=3"],
        "compare": ["compare", "run"],
        "model_from": [*RUNS["grammar"], "model_from=run"],
    },
    "images": {
        "evaluate": ["evaluate", "run=run"],
        "reconstruct": ["reconstruct", "run=run"],
        "generate": ["generate", "run=run", "n=1"],
        "resume": ["resume=run", "em.m_steps=3"],
    },
    "points": {
        "evaluate": ["evaluate", "run=run"],
        "resume": ["resume=run", "em.m_steps=3"],
        "compare": ["compare", "run", "@/points"],
        "model_from": [*RUNS["points"], "model_from=run"],
    },
}


def copied(run: str, change: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    """A copy of a run with a change in it."""

    def put(here: Path, prepared: Path) -> None:
        shutil.copytree(prepared / run, here / "run", ignore=shutil.ignore_patterns("plots"))
        change(here / "run")

    return put


def changed(old: str, new: str) -> Callable[[Path], object]:
    """Changes lines of the configuration, told by how they begin."""

    def change(run: Path) -> None:
        config = run / "config.yaml"
        text = re.sub(rf"(?m)^{old}.*$", lambda found: new, config.read_text(), count=1)
        assert text != config.read_text(), f"nothing to change: {old}"
        config.write_text(text)

    return change


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{one}: &{one} [{', '.join([f'*{other}'] * 10)}]\n"
    for one, other in zip("bcdefghij", "abcdefghi", strict=True)
)
CONFIGS: dict[str, Callable[[Path], object]] = {
    "another seed": changed("seed: 0", "seed: nosuch"),
    "a sequence": lambda run: (run / "config.yaml").write_text("- 1\n- 2\n"),
    "a bomb": lambda run: (run / "config.yaml").write_text(BOMB),
    "an anchor to itself": lambda run: (run / "config.yaml").write_text("a: &a [*a]\n"),
    "100,000 brackets": lambda run: (run / "config.yaml").write_text("a: " + "[" * 100_000),
    "an object of Python": changed("seed: 0", "seed: !!python/object/apply:os.getpid []"),
    "an interpolation": changed("seed: 0", "seed: ${oc.env:HOME}"),
    "an interpolation of itself": changed("seed: 0", "seed: ${seed}"),
    "no keys": lambda run: (run / "config.yaml").write_text("{}\n"),
    "duplicate keys": changed("seed: 0", "seed: 0\nseed: 0"),
    "tabs": changed("seed: 0", "\tseed: 0"),
    "no task": changed("task: ", "tusk: grammar"),
    "a task that is none": changed("task: ", "task: nosuch"),
    "no model": changed("model:", "mdl:"),
    "the model null": changed("model:", "model: null\nmdl:"),
    "no sizes": changed("sizes:", "szs:"),
    "no data": changed("data:", "dt:"),
    "a function in place of the model": changed("  _target_: gfnem.tasks", "  _target_: os.getcwd"),
    "verbs null": changed("verbs:", "verbs: null\nvrbs:"),
    "a larger model": changed("  (nonterminals|codes|superclusters): ", "  nonterminals: 7"),
}


def foreign(which: str, content: Callable[[], Any]) -> Callable[[Path], object]:
    return lambda run: torch.save(content(), run / "checkpoints" / f"{which}.pt")


FOREIGN: dict[str, Callable[[], Any]] = {
    "nothing": dict,
    "a list": lambda: [1, 2],
    "None": lambda: None,
    "a model alone": lambda: {"model": {}},
    "a model of text": lambda: {"model": "nosuch", "em": 3},
}


def runs() -> Iterator[Kind]:
    for run, uses in USES.items():
        files = ["config.yaml", "metrics.jsonl", "summary.json"]
        files += [f"checkpoints/{which}.pt" for which in ("best", "last")]
        for file, (damage, change), (use, given) in product(files, DAMAGE.items(), uses.items()):

            def damaged(
                path: Path, file: str = file, change: Callable[[Path], object] = change
            ) -> object:
                return change(path / file)

            name = f"{file} {damage}, {use}"
            yield Kind(f"runs, {run}", name, given, copied(run, damaged))
    for run, (name, change) in product(("grammar", "images"), CONFIGS.items()):
        for use in ("evaluate", "generate", "resume"):
            put = copied(run, change)
            yield Kind(f"runs, configuration of {run}", f"{name}, {use}", USES[run][use], put)
    for run, which, (name, content) in product(USES, ("best", "last"), FOREIGN.items()):
        for use in ("evaluate", "resume"):
            put = copied(run, foreign(which, content))
            yield Kind(f"runs, foreign {which}.pt", f"{name}, {use} of {run}", USES[run][use], put)


# What is done with a run.

SENTENCES = {
    **{name: TEXTS[name] for name in ("nothing", "white space", "NUL bytes", "Latin-1", "UTF-16")},
    **{name: TEXTS[name] for name in ("noise", "a picture", "surrogates", "control characters")},
    "one word": b"dog\n",
    "unknown words": b"qwerty asdf\n",
    "too many words": b"dog " * 1_000_000,
    "a word of 1,000,000 characters": b"d" * 1_000_000 + b" dog\n",
    "10,000 empty lines": b"\n" * 10_000,
    "trees": GOOD,
    "brackets": b"( ( )\n",
    "carriage returns": b"the dog\rthe cat\r",
}
OF_VERBS = {
    "grammar": {
        "parse": ["decode=nosuch", "decode=marginals", "samples=0", "samples=-1", "samples=nan"]
        + [f"samples={BEYOND}", "samples=1000000000000", "samples=1.5", "file=nosuch", "file=."]
        + ["decode=null", "checkpoint=nosuch", "seed=-1", f"seed={BEYOND}", "seed=nan", "n=1"]
        + ["device=nosuch", "threads=100000", "threads=0", "run=@/images", "split=test"],
        "generate": ["n=0", "n=-1", "n=nan", "n=inf", "n=1.5", f"n={BEYOND}", "n=1000000000000"]
        + ["seed=nosuch", f"seed={BEYOND}", "file=x", "checkpoint=3", "n=", "n=[1]"],
        "evaluate": ["split=nosuch", "split=3", "evaluator.samples=0", "evaluator.samples=nan"]
        + [f"evaluator.samples={BEYOND}", "evaluator.iw_samples=0", "model.width=9"]
        + ["evaluator.batch_size=0", "evaluator.select=nosuch", "evaluator.lengths=[nosuch]"]
        + ["data.max_length=9", "data.train_sentences=30", "data=text", "data.seed=1"],
    },
    "images": {
        "generate": ["n=0", "n=1000000000", f"n={BEYOND}", "file=a.nosuch", "file=no/a.png"]
        + ["file=.", "file=", "file=3", "n=nan", "n=20000"],
        "reconstruct": ["file=a.nosuch", "file=no/a.png", "file=/dev/full", "n=3", "split=valid"],
        "evaluate": ["evaluator.nll_samples=0", f"evaluator.nll_samples={BEYOND}", "split=nosuch"]
        + ["evaluator.images=0", "evaluator.images=-1", "data.valid_images=0", "data.pixels=grey"]
        + ["evaluator.temperature_images=0", "data=mnist"],
    },
    "points": {
        "evaluate": ["evaluator.samples=0", f"evaluator.samples={BEYOND}", "split=nosuch"]
        + ["data.train_points=0", "data.dimensions=3", "data.spacing=nan", "data.deviation=-1"],
        "generate": ["n=1"],
        "parse": ["file=@/plain.txt"],
    },
}
COMPARED = ["metrics=nosuch", "metrics=", "metrics=[", "out=", "out=/dev/null/x", "reach=nosuch=1"]
COMPARED += [
    "reach=3",
    "reach=nan",
    "tracker=nosuch",
    "wandb=nosuch",
    "run=x",
    "metrics=*",
    "out=3",
]


def verbs() -> Iterator[Kind]:
    for name, content in SENTENCES.items():
        given = ["parse", "run=@/grammar"]
        yield Kind(
            "verbs, sentences", f"{name} from a file", [*given, "file=file"], written(content)
        )
        yield Kind("verbs, sentences", f"{name} from standard input", given, stdin=content)
    yield Kind(
        "verbs, sentences", "standard input is closed", ["parse", "run=@/grammar"], stdin=None
    )
    for run, of_run in OF_VERBS.items():
        for verb, some in of_run.items():
            for option in some:
                yield Kind(f"verbs, {run}", f"{verb} {option}", [verb, f"run=@/{run}", option])
    for option in COMPARED:
        yield Kind("verbs, compare", option, ["compare", "@/grammar", "@/images", option])


def other_kinds() -> list[Kind]:
    """All kinds but those of options, for which every task has to be composed."""
    tables = (sizes(), command_lines(), paths(), texts(), points(), images(), runs(), verbs())
    return [kind for table in tables for kind in table]


def placed(arguments: Sequence[str], prepared: Path) -> list[str]:
    return [argument.replace("@/", f"{prepared}/") for argument in arguments]
