"""Kills runs of several kinds at any time, resumes them, and sees that nothing is lost or differs.

    python scripts/kill_runs.py                   # 20 kills of each of five kinds of runs
    python scripts/kill_runs.py --kills 3 --seed 7

Each run is a process of its own, forked from one that has imported everything. It gets SIGKILL at
a moment that is drawn from all of its time, start-up and final evaluation included, is resumed, and
half of the resumed runs are killed once more. In the end its lines, its summary and its checkpoints
must be those of a run that nobody killed, to the last bit but for times, and no temporary file may
be left. It prints when the runs were killed, and what differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gfnem.app.main import main as gfnem

QUICK = ["threads=1", "device=cpu", "em.log_every=5", "em.evaluate_every=10", "em.m_steps=30"]
WORDS = ["data.train_sentences=64", "data.valid_sentences=16", "data.test_sentences=32"]
WORDS += ["model.nonterminals=3", "model.preterminals=4", "evaluator.samples=4", "policy.width=16"]
IMAGES = ["task=discrete_vae", "model.decoder_width=4", "model.blocks=1", "policy.hidden=8"]
IMAGES += ["evaluator.samples=4", "evaluator.nll_samples=16"]

KINDS: dict[str, list[str]] = {
    "grammar": [*WORDS, "posterior.replay=4", "em.average=0.9", "schedule.warmup_e_steps=10"],
    "grammar, adaptive": [*WORDS, "schedule=adaptive", "objective=tb_sleep"],
    "grammar, chains": [o for o in [*WORDS, "posterior=mcmc"] if not o.startswith("policy")],
    "mixture": ["task=mixture", "evaluator.samples=4", "schedule.warmup_e_steps=5"],
    "images": [*IMAGES, "warm_start=vq", "warm_start.steps=12"],
}


def start(arguments: Sequence[str], folder: Path) -> int:
    """Fork a process that runs a command line in a folder; returns its number."""
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os._exit(gfnem(arguments))


def finish(arguments: Sequence[str], folder: Path) -> float:
    """Run a command line to its end; returns its seconds.

    Raises RuntimeError, with the output, where it fails.
    """
    began = time.monotonic()
    _, status = os.waitpid(start(arguments, folder), 0)
    if status:
        output = (folder / "output.txt").read_text()
        raise RuntimeError(f"{' '.join(arguments)} ended with {status}:\n{output}")
    return time.monotonic() - began


def kill(arguments: Sequence[str], folder: Path, seconds: float) -> None:
    """Run a command line, but kill it after so many seconds."""
    child = start(arguments, folder)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def when(run: Path) -> str:
    """What a run was doing when it was killed."""
    if not (run / "config.yaml").exists():
        return "before it had a directory"
    if (run / "summary.json").exists():
        return "after its end"
    if not (run / "checkpoints" / "last.pt").exists():
        return "before its first checkpoint"
    done = torch.load(run / "checkpoints" / "last.pt", weights_only=True)["done"]
    return "in its last evaluation" if done["m_steps"] == 30 else "in training"


def left(run: Path) -> dict[str, Any]:
    """All that a run left, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    states = {
        which: torch.load(run / "checkpoints" / f"{which}.pt", weights_only=True)
        for which in ("last", "best")
    }
    return {
        "lines": plain(lines),
        "summary": plain(json.loads((run / "summary.json").read_text())),
        **{which: plain(state) for which, state in states.items()},
    }


def plain(value: Any) -> Any:
    """Tensors as numbers, and everything without times."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        times = ("seconds", "time/seconds")
        return {key: plain(item) for key, item in value.items() if key not in times}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return repr(value)  # NaN equals itself


def try_kind(options: Sequence[str], kills: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Kill runs of a kind; returns when they were killed, and what went wrong."""
    folder.mkdir()
    command = [*QUICK, *options, "run_dir=run"]
    seconds = finish(command, folder)
    expected = left(folder / "run")
    moments: Counter[str] = Counter()
    wrong = []
    for number in range(kills):
        place = folder / str(number)
        place.mkdir()
        run = place / "run"
        kill(command, place, random.uniform(0, seconds))
        moments[when(run)] += 1
        again = ["resume=run"] if (run / "config.yaml").exists() else command
        if number % 2:
            kill(again, place, random.uniform(0, seconds))
            again = ["resume=run"] if (run / "config.yaml").exists() else command
        try:
            finish(again, place)
        except RuntimeError as error:
            wrong.append(f"run {number}: {error}")
            continue
        found = left(run)
        wrong += [f"run {number}: {part} differ" for part in found if found[part] != expected[part]]
        wrong += [f"run {number} leaves {file.name}" for file in run.rglob(".*.tmp")]
        shutil.rmtree(place)
    return moments, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--only", choices=KINDS, help="one kind of runs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args(arguments)
    random.seed(given.seed)
    torch.set_num_threads(1)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate([given.only] if given.only else KINDS):
            moments, wrong = try_kind(KINDS[name], given.kills, Path(folder, str(number)))
            told = ", ".join(f"{count} {moment}" for moment, count in sorted(moments.items()))
            print(f"{name}: {told}; {len(wrong)} things wrong", flush=True)
            for line in wrong:
                print(f"  {line}", flush=True)
            failures += len(wrong)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
