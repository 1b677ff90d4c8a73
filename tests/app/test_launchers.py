"""Launchers run jobs side by side, in processes that find what the command line found."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gfnem.app.main import main

pytestmark = pytest.mark.slow

# Its jobs go on when both are there: one after the other, they never would.
MEETING = """\
import time
from gfnem.run import FilesTracker

class Meeting(FilesTracker):
    def start(self, path, config):
        (path.parent / f"{path.name}.here").touch()
        for _ in range(600):
            if len(list(path.parent.glob("*.here"))) == 2:
                return
            time.sleep(0.1)
        raise RuntimeError("nobody came")
"""
# An array of jobs, all at once, and no cluster.
SBATCH = """\
#!/bin/bash
script="${@: -1}"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for task in $(seq 0 "$last"); do
  SLURM_JOB_ID=$task SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=$task SLURM_NTASKS=1 SLURM_PROCID=0 \
  SLURM_LOCALID=0 SLURM_NNODES=1 SLURM_NODEID=0 SLURM_JOB_NODELIST=here \
    bash "$script" > /dev/null 2>&1 &
done
echo Submitted batch job 7
"""
SRUN = """\
#!/bin/bash
while [[ $1 == -* ]]; do
  case $1 in --output|--error) shift 2 ;; *) shift ;; esac
done
exec "$@"
"""
SACCT = """\
#!/bin/bash
printf 'JobID|State|NodeList\\n7_0|RUNNING|here\\n7_1|RUNNING|here\\n'
"""
PLUGINS = {
    "joblib": "hydra_joblib_launcher",
    "submitit_local": "hydra_submitit_launcher",
    "submitit_slurm": "hydra_submitit_launcher",
}


def missing(launcher: str) -> bool:
    return (
        find_spec("hydra_plugins") is None
        or find_spec(f"hydra_plugins.{PLUGINS[launcher]}") is None
    )


@pytest.mark.parametrize("launcher", PLUGINS)
def test_jobs_run_at_the_same_time(
    launcher: str,
    tiny_mixture: list[str],
    tmp_path: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if missing(launcher):
        pytest.skip(f"no {PLUGINS[launcher]}: pip install 'gfnem[dev]'")
    (tmp_path / "mine/tracker").mkdir(parents=True)
    (tmp_path / "mine/tracker/meeting.yaml").write_text("_target_: meeting.Meeting\n")
    (tmp_path / "meeting.py").write_text(MEETING)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    few = ["data.train_points=40", "data.valid_points=8", "data.test_points=8", "posterior=exact"]
    given = [*tiny_mixture, *few, "em.evaluate_every=4", "tracker=meeting", "run_dir=sweep"]
    at_once = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    done = subprocess.run(
        [sys.executable, "-m", "gfnem", "-m", "--config-dir", "mine", f"hydra/launcher={launcher}"]
        + [*at_once, *given, "seed=0,1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *_, head, row = done.stdout.splitlines()
    assert head.split()[:2] == ["seeds", "test/log_likelihood"]
    assert row.split()[0] == "2"
    # Whoever reads a run finds its modules, too.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["evaluate", "run=sweep/seed=0", "--config-dir", "mine"]) == 0


@pytest.mark.parametrize("launcher", PLUGINS)
def test_a_ready_configuration_of_each(launcher: str, capsys: pytest.CaptureFixture[str]) -> None:
    if missing(launcher):
        pytest.skip(f"no {PLUGINS[launcher]}: pip install 'gfnem[dev]'")
    capsys.readouterr()
    assert main(["--cfg", "hydra", f"launcher={launcher}"]) == 0
    assert f"hydra/launcher: {launcher}" in capsys.readouterr().out
