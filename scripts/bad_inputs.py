"""Gives gfnem what it cannot use, hundreds of kinds of it, and sees that it says so in a line.

    python scripts/bad_inputs.py                  # all kinds, in about half an hour on one core
    python scripts/bad_inputs.py --only images    # or 'text|runs': groups with this in their names

Kinds come from tables: options of every task times values at the edge, kinds of files times
damage, files of a run's directory times damage times what is done with the run, command lines.
Each is tried in a process of its own, forked from one that has imported everything, with bounded
memory and time. An input passes if the process ends by itself, without a traceback, and, where its
exit status is not 0, with a line that says why. It prints a table of the groups, and what failed
with its output.
"""

from __future__ import annotations

import argparse
import os
import pkgutil
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from bad_input_kinds import RUNS, Kind, options, other_kinds, placed, write_good

from gfnem.app.main import main as gfnem

# Of the CPU, which other programs do not take away, and ten times as long by the clock.
SECONDS = 40
MEMORY = 6 * 2**30
OUTPUT = "output.txt"
ENDS = ("refused", "accepted", "traceback", "silent", "hang", "signal")
FINE = ENDS[:2]


@dataclass(frozen=True)
class Outcome:
    kind: Kind
    end: str
    output: str


def import_all() -> None:
    """Import what processes would import one by one."""
    own = pkgutil.walk_packages(import_module("gfnem").__path__, "gfnem.")
    for name in (*(module.name for module in own), "matplotlib.figure", "nltk", "sklearn.datasets"):
        import_module(name)


def prepare(folder: Path) -> None:
    """Good inputs, and runs that were trained on such."""
    write_good(folder)
    for name, overrides in RUNS.items():
        trained = Kind("", name, [*overrides, f"run_dir={folder / name}"])
        outcome = attempt(trained, folder, folder)
        if outcome.end != "accepted":
            raise SystemExit(f"a small run of {name} does not train: {outcome.output}")


def attempt(kind: Kind, here: Path, prepared: Path) -> Outcome:
    """Run gfnem on an input in a process of its own, in a folder of its own."""
    kind.prepare(here, prepared)
    child = os.fork()
    if child == 0:
        _run(kind, here, prepared)
    status = os.waitpid(child, 0)[1]
    output = (here / OUTPUT).read_text(errors="replace")
    return Outcome(kind, _end(status, output), output)


def _run(kind: Kind, here: Path, prepared: Path) -> NoReturn:
    """What the process does, to its end."""
    status = 1
    try:
        _bound(here, kind.stdin)
        status = gfnem(placed(kind.arguments, prepared))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _bound(here: Path, stdin: bytes | None) -> None:
    """Limit the process's time and memory, and lead its input and output to files."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(10 * SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(here)
    output = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", errors="replace") for number in (1, 2))
    if stdin is None:
        os.close(0)
        sys.stdin = None
    else:
        Path("stdin").write_bytes(stdin)
        os.dup2(os.open("stdin", os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0)


def _end(status: int, output: str) -> str:
    """Which of ENDS an attempt came to."""
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGXCPU)
        return "hang" if late else "signal"
    if "Traceback" in output:
        return "traceback"
    if os.WEXITSTATUS(status) == 0:
        return "accepted"
    return "refused" if re.search(r"(?m)^gfnem: .", output) else "silent"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a pattern of groups' names")
    parser.add_argument("--part", default="1/1", help="1/2 and 2/2 are halves of it")
    given = parser.parse_args(arguments)
    part, of = map(int, given.part.split("/"))
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared")
        prepared.mkdir()
        import_all()
        prepare(prepared)
        found = [*options(prepared), *other_kinds()]
        found = [kind for kind in found if re.search(given.only, kind.group)]
        kinds = found[part - 1 :: of]
        outcomes = []
        for number, kind in enumerate(kinds):
            here = Path(folder, str(number))
            here.mkdir()
            outcomes.append(outcome := attempt(kind, here, prepared))
            shutil.rmtree(here, ignore_errors=True)
            if outcome.end not in FINE:
                print(
                    f"{kind.group}: {kind.name}: {outcome.end}\n{outcome.output[-1500:]}",
                    flush=True,
                )
    print(table(outcomes))
    return 0 if all(outcome.end in FINE for outcome in outcomes) else 1


def table(outcomes: Sequence[Outcome]) -> str:
    """How many inputs of each group came to which end."""
    groups: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.kind.group, Counter())[outcome.end] += 1
        groups.setdefault("all", Counter())[outcome.end] += 1
    groups["all"] = groups.pop("all", Counter())
    lines = [f"| inputs | kinds | {' | '.join(ENDS)} |", "|---|" + "---:|" * (1 + len(ENDS))]
    for group, ends in groups.items():
        counts = " | ".join(str(ends[end]) for end in ENDS)
        lines.append(f"| {group} | {ends.total()} | {counts} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
