"""Mistakes that are told at once: before torch is imported and any data is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gfnem.app.main import main
from gfnem.app.nearest import nearest

MISTAKES = {
    "em.m_step=3": "em.m_step: did you mean em.m_steps?",
    "modle.width=3": "modle.width: did you mean model.width?",
    "polciy=light": "polciy: did you mean policy?",
    "policy=root_flwo": "policy=root_flwo: did you mean root_flow? policy is one of chart,",
    "task=grammer": "task=grammer: did you mean grammar?",
    "hydra.job.chdirr=true": "hydra.job.chdirr: did you mean hydra.job.chdir?",
    "-m seed=1,2 policy=light,chrat": "policy=chrat: did you mean chart?",
    "-m seed=range(1,4) em.m_step=3": "em.m_step: did you mean em.m_steps?",
    "-m launcher=jobib seed=1,2": "launcher=jobib: did you mean joblib?",
    "--multrun seed=1,2": "there is no flag --multrun: did you mean --multirun?",
    "parse rnu=x": "rnu=x: did you mean run?",
    "evalute": "gfnem evalute: did you mean evaluate?",
    "compare . metric=test/nll": "metric=test/nll: did you mean metrics?",
    "data=mnist": "data=mnist is of task=discrete_vae, and this run is of task=grammar: choose",
    "policy=grid": "policy=grid is of task=discrete_vae, and this run is of task=grammar: choose",
    "posterior=vq": "posterior=vq is of task=discrete_vae, and this run is of task=grammar:",
    "warm_start=vq": "warm_start=vq is of task=discrete_vae, and this run is of task=grammar:",
    "task=mixture policy=chart": "policy=chart is of task=grammar, and this run is of task=mixture",
    "experiment=digits task=grammar": "data=digits is of task=discrete_vae, and this run is of",
    "-m data=toy_english,mnist": "data=mnist is of task=discrete_vae, and this run is of",
    "seed=abc": "seed=abc: it must be a whole number",
    "em.m_steps=1.5": "em.m_steps=1.5: it must be a whole number",
    "posterior.behaviour.epsilon=x": "posterior.behaviour.epsilon=x: it must be a number",
    "evaluator.select=f2": "evaluator.select=f2: it must be one of likelihood,",
    "-m seed=1,x": "seed=x: it must be a whole number",
    "-m seed=interval(0,1)": "not all values of an interval can be taken; list some, or use",
    "-m seed=1,2 hydra.launcher.n_job=2": "hydra.launcher.n_job is no option of this",
    "-m run_dir=a,b": "run_dir is one for all jobs of a sweep, which have folders in it",
    "launcher=joblib": "launcher=joblib has no effect without --multirun",
    "hydra/sweeper=basic": "hydra/sweeper=basic has no effect without --multirun",
    "model_from=nosuch": "run directory nosuch does not exist: check the path",
    "resume=nosuch": "run directory nosuch does not exist: check the path",
    "evaluate run=nosuch": "run directory nosuch does not exist: check the path",
    "compare nosuch": "'nosuch' does not exist: check the path",
    "--cfg": "--cfg takes one of job, hydra, all, as --cfg job",
    "-m --cfg job": "--multirun and --cfg do not go together: give one of them",
    "em.m_steps": "'em.m_steps' is not of the form key=value: see gfnem --help",
    "parse --multirun": "gfnem parse takes no flags: see gfnem parse --help",
    "prase --help": "there is no verb prase: did you mean parse?",
}


@pytest.fixture(scope="module")
def told(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each of the mistakes gives on standard error, in a process that never imports torch."""
    code = (
        "import contextlib, io, json, sys\n"
        "from gfnem.app.main import main\n"
        "told = {}\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said:\n"
        "        assert main(line.split()) == 2, line\n"
        "    told[line] = said.getvalue()\n"
        "    assert 'torch' not in sys.modules, line\n"
        "print(json.dumps(told))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(MISTAKES))],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=tmp_path_factory.mktemp("empty"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("line", MISTAKES)
def test_mistake(line: str, told: dict[str, str]) -> None:
    assert MISTAKES[line] in told[line]
    assert told[line].count("\n") == 1


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("em.m_step", ["em.m_steps", "em.model_clip"], "em.m_steps"),
        ("em.typo", ["em.m_steps", "em.model_clip"], None),
        ("emm.m_steps", ["em.m_steps", "em"], "em.m_steps"),
        ("optimizer.posterior.lr", ["optimizer.posterior"], None),
        ("rnu", ["run", "checkpoint"], "run"),
        ("tb", ["db", "subtb"], None),
    ],
)
def test_nearest(name: str, known: list[str], meant: str | None) -> None:
    assert nearest(name, known) == meant


def test_two_files_of_one_name(
    tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/digits.yaml").write_text("_target_: mine.digits\n")
    for arguments in (["data=digits"], ["--help"], ["-m", "seed=1,2"]):
        capsys.readouterr()
        assert main(["--config-dir", str(tmp_path), *arguments]) == 2
        own = root / "conf/data/digits.yaml"
        said = f"gfnem: {tmp_path}/data/digits.yaml has the name of {own}: give it another one\n"
        assert capsys.readouterr().err == said


def test_a_plug_in_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hydra.core.config_store import ConfigStore

    monkeypatch.setattr(ConfigStore, "list", lambda store, path: ["basic.yaml"])
    for choice, extra in (
        ("launcher=joblib", "joblib"),
        ("hydra/launcher=submitit_slurm", "slurm"),
        ("hydra/sweeper=optuna", "optuna"),
    ):
        assert main(["-m", "seed=1,2", choice]) == 2
        said = f"gfnem: {choice} needs a plug-in: pip install 'gfnem[{extra}]'\n"
        assert capsys.readouterr().err == said
