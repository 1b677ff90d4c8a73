"""What `gfnem --help` prints. Imports nothing heavy, so that it answers at once."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

USAGE = """\
gfnem: latent variable models with compositional latents, trained by GFlowNet-EM

usage:
  gfnem [train] [OVERRIDE ...]             train; the results are in one directory, run_dir
  gfnem resume=DIR [OVERRIDE ...]          go on with a run that was stopped, or train it longer
  gfnem evaluate run=DIR [split=test]      rate a trained model
  gfnem parse run=DIR [file=FILE] [decode=mbr] [samples=16]
                                           sentences in, one a line (standard input by default),
                                           bracketed trees out; decode is mbr, marginals, sample
                                           or viterbi
  gfnem generate run=DIR [n=16] [file=samples.png]
                                           sentences and their trees, drawn from the model, or a
                                           picture of images, written to file
  gfnem reconstruct run=DIR [file=reconstructions.png]
                                           a picture of test images and what their codes keep
  gfnem compare DIR DIR ... [out=comparison] [metrics=test/nll*,time/seconds] [tracker=wandb]
                                           runs beside each other, seeds as mean ± deviation: a
                                           table and curves; a DIR may hold many runs or be a
                                           quoted pattern; wandb=ENTITY/PROJECT reads from there,
                                           'reach=valid/posterior_gap<0.1' counts steps to there

  verbs with run=DIR read the best checkpoint; checkpoint=last reads the last one.
  parse and evaluate take several grammars, 'run=[DIR,DIR]': trees of their averaged span marginals.

flags:
  -h, --help          this text
  --version           gfnem's version
  --cfg               print the whole configuration and stop
  -m, --multirun      one run for every combination of comma-separated values, one after another
  --config-dir DIR    configuration files of your own, beside gfnem's

An OVERRIDE is key=value, as Hydra reads it: GROUP=OPTION chooses a part, GROUP.KEY=VALUE sets one
of its options (gfnem --cfg prints them all); seed, run_dir, threads, model_from and latent are
set directly.

groups and their options:
"""

EXAMPLES = """\
examples:
  gfnem
  gfnem posterior=exact
  gfnem --multirun seed=1,2,3 posterior=gflownet,exact
  gfnem compare runs/grammar metrics=test/nll_per_token,test/posterior_gap
  echo "the old king slept" | gfnem parse run=DIR
"""


def config_folder() -> Path:
    """gfnem's conf/: within the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def groups_in(folder: Path) -> dict[str, dict[str, str]]:
    """Group -> option -> the first comment in its file."""
    groups: dict[str, dict[str, str]] = {}
    for file in sorted(folder.glob("*/*.yaml")):
        groups.setdefault(file.parent.name, {})[file.stem] = next(_comments(file), "")
    return groups


def _comments(file: Path) -> Iterator[str]:
    for line in file.read_text().splitlines():
        comment = line.removeprefix("#").strip()
        if line.startswith("#") and not comment.startswith("@package"):
            yield comment


def text() -> str:
    """The whole help text."""
    lines = []
    for group, options in groups_in(config_folder()).items():
        for number, (option, comment) in enumerate(options.items()):
            start = f"  {group if number == 0 else '':<14}{option:<18}"
            lines += textwrap.wrap(
                start + comment, width=100, subsequent_indent=" " * len(start), tabsize=1
            )
    # Those of a task are comments in its file.
    tasks = sorted(config_folder().glob("task/*.yaml"))
    of_tasks = [c for file in tasks for c in _comments(file) if c.startswith("gfnem ")]
    examples = "".join(f"  {example}\n" for example in of_tasks)
    return f"{USAGE}{chr(10).join(lines)}\n\n{EXAMPLES}{examples}"
