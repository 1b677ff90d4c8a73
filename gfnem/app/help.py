"""What `gfnem --help` prints. Imports nothing heavy, so that it answers at once."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from gfnem.app.documented import Documented
from gfnem.app.folders import (
    EVALUATE,
    check_folders,
    comments,
    config_folder,
    groups_in,
    task_verbs,
)
from gfnem.app.nearest import did_you_mean
from gfnem.errors import UserError

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
  -h, --help          this text; after a verb, what the verb does and takes
  --version           gfnem's version
  -c, --cfg job       print the whole configuration and stop; --resolve: without references
  -m, --multirun      a sweep, one run for every combination of comma-separated values, each in a
                      folder of run_dir; a job that fails leaves error.txt there, and others go on
  -cd, --config-dir DIR
                      configuration files of your own, beside gfnem's; modules in the folder that
                      holds DIR are found
  -i, --info          how the configuration is put together; --hydra-help: what else Hydra offers
  -sc, --shell-completion install=bash
                      completion for a shell: eval "$(gfnem -sc install=bash)"; zsh or fish, too

An OVERRIDE is key=value, as Hydra reads it: GROUP=OPTION chooses a part, GROUP.KEY=VALUE sets one
of its options (gfnem --cfg job prints them all); seed, run_dir, threads, model_from and latent are
set directly.

groups and their options:
"""

_COMPARE = """\
gfnem compare DIR DIR ... [out=comparison] [metrics=PATTERN,...] [reach=METRIC<VALUE]
              [wandb=ENTITY/PROJECT] [tracker=wandb] [tracker.KEY=VALUE]

Below, project is what wandb names, and tracker is what tracker=wandb and its options choose.
"""

_OVERRIDES = """\
An OVERRIDE sets an option of the data, the device, the number of threads, the evaluator or the
seed: data.max_length=20.
"""

EXAMPLES = """\
examples:
  gfnem
  gfnem posterior=exact
  gfnem --multirun seed=1,2,3 posterior=gflownet,exact
  gfnem compare runs/grammar metrics=test/nll_per_token,test/posterior_gap
  echo "the old king slept" | gfnem parse run=DIR
"""


def text(verb: str = "train", folder: Path | None = None) -> str:
    """The whole help text, or that of a verb.

    folder: more configuration files, beside gfnem's own.

    Raises UserError for a folder that cannot be used, and for a verb that no task has.
    """
    folders = [] if folder is None else [folder]
    check_folders(folders)
    if verb != "train":
        return _of_verb(verb, folders)
    lines = []
    for group, options in groups_in(config_folder(), *folders).items():
        for number, (option, comment) in enumerate(options.items()):
            start = f"  {group if number == 0 else '':<14}{option:<18}"
            lines += textwrap.wrap(
                start + comment, width=100, subsequent_indent=" " * len(start), tabsize=1
            )
    # Those of a task are comments in its file.
    tasks = [
        file for one in (config_folder(), *folders) for file in sorted(one.glob("task/*.yaml"))
    ]
    of_tasks = [c for file in tasks for c in comments(file) if c.startswith("gfnem ")]
    examples = "".join(f"  {example}\n" for example in of_tasks)
    return f"{USAGE}{chr(10).join(lines)}\n\n{EXAMPLES}{examples}"


def _of_verb(verb: str, folders: list[Path]) -> str:
    if verb == "compare":
        documented = Documented.read("gfnem.run.compare.compare")
        assert documented is not None
        return f"{_COMPARE}\n{documented.text}\n"
    sys.path += [str(folder.resolve().parent) for folder in folders]
    calls = verbs_of(folders)
    if verb not in calls:
        reason = did_you_mean(verb, calls) or f"the verbs are {', '.join(calls)}"
        raise UserError(f"there is no verb {verb}: {reason}")
    texts = []
    for task, call in calls[verb].items():
        documented = Documented.read(call)
        options = documented.options if documented else {}
        shown = [f"[{name}={default}]" for name, default in options.items()]
        words = ["gfnem", verb, "run=DIR", "[checkpoint=best]", *shown, "[OVERRIDE ...]"]
        of_task = f"of task={task}:\n" if task else ""
        texts.append(f"{of_task}{' '.join(words)}\n\n{documented.text if documented else call}\n")
    return "\n".join([*texts, _OVERRIDES])


def verbs_of(folders: Iterable[Path]) -> dict[str, dict[str, str]]:
    """Verb -> task, "" where it is of all, -> what does it; of gfnem and of more folders."""
    return {
        "train": {},
        "compare": {},
        "evaluate": {"": EVALUATE},
        **task_verbs(config_folder(), *folders),
    }
