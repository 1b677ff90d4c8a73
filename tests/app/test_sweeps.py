"""Names and directories of the jobs of a sweep, and what becomes of those that fail."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from gfnem.app.main import main
from gfnem.app.sweeps import name_of
from gfnem.em import EM
from gfnem.run import Run
from gfnem.tasks.mixture.evaluate import MixtureEvaluator

FEW = ["data.train_points=40", "data.valid_points=8", "data.test_points=8", "posterior=exact"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MixtureEvaluator, "report", lambda *arguments: None)


@pytest.fixture
def sweep(tiny_mixture: list[str]) -> list[str]:
    return ["--multirun", *tiny_mixture, *FEW, "run_dir=sweep"]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["seed=1", "posterior=exact", "em.m_steps=3"], "seed=1,posterior=exact"),
        (["+model.rank=2", "em.m_steps=3"], "model.rank=2"),
        (["data.train='some where/a,b.txt'"], "data.train=some_where_a_b.txt"),
        (["model.grid=[2,2]", "run=${x}"], "model.grid=_2_2_,run=_x_"),
        (["em.m_steps=3"], "job"),
    ],
)
def test_name(overrides: list[str], name: str) -> None:
    assert name_of(overrides, fixed=["em.m_steps"]) == name


def test_long_names_are_cut_and_stay_apart() -> None:
    names = [name_of([f"{300 * 'a'}={value}"], fixed=[]) for value in (1, 2)]
    assert [len(name) for name in names] == [128, 128]
    assert names[0][:100] == names[1][:100] and names[0] != names[1]


def test_jobs_of_one_name_are_numbered(sweep: list[str]) -> None:
    Path("a").mkdir()
    Path("a/b.csv").write_text(10 * "1,2\n")
    Path("a_b.csv").write_text(10 * "1,2\n")
    points = ["data=points", "data.file=a/b.csv,a_b.csv"]
    fewer = [option for option in sweep if not option.endswith(("=40", "=8"))]
    assert main([*fewer, *points]) == 0
    files = [
        yaml.safe_load(Path("sweep", job, "config.yaml").read_text())["data"]["file"]
        for job in ("data.file=a_b.csv", "data.file=a_b.csv_2")
    ]
    assert files == ["a/b.csv", "a_b.csv"]


def test_more_jobs_go_beside_those_that_are_there_but_never_over_them(
    sweep: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*sweep, "seed=1,2"]) == 0
    capsys.readouterr()
    assert main([*sweep, "seed=2,3"]) == 2
    err = capsys.readouterr().err
    assert err == "gfnem: sweep/seed=2 is there already: name another run_dir, or remove it\n"
    assert not Path("sweep/seed=3").exists()
    assert main([*sweep, "seed=3,4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "2"  # seeds in the table


def test_one_raising_job_of_three(
    sweep: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create = Run.create

    def raising(path: str, config: Any, *rest: Any) -> Run:
        if config["seed"] == 1:
            raise RuntimeError("the disk is upside down")
        return create(path, config, *rest)

    monkeypatch.setattr(Run, "create", raising)
    assert main([*sweep, "seed=0,1,2"]) == 1
    captured = capsys.readouterr()
    line = "RuntimeError: the disk is upside down (sweep/seed=1/error.txt)\n"
    assert f"job 1 failed: {line}" in captured.out
    assert captured.err == f"gfnem: seed=1 failed: {line}"
    text = Path("sweep/seed=1/error.txt").read_text()
    assert text.startswith("Traceback") and "in raising" in text
    assert [Path(f"sweep/seed={seed}/summary.json").exists() for seed in (0, 2)] == [True, True]
    head, row = captured.out.splitlines()[-2:]
    assert head.split()[0] == "seeds" and row.split()[0] == "2"


def test_stopping_a_job_ends_the_sweep(
    sweep: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take_steps = EM._take_steps

    def stopping(em: EM, *arguments: Any) -> bool:
        em.stop()
        return take_steps(em, *arguments)

    monkeypatch.setattr(EM, "_take_steps", stopping)
    assert main([*sweep, "seed=0,1"]) == 130
    assert sorted(path.name for path in Path("sweep").iterdir()) == ["multirun.yaml", "seed=0"]


def test_names_of_jobs_need_no_quotes_where_paths_are_given(
    sweep: list[str], tiny_mixture: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*sweep, "seed=0,1", "model.start=normal,points"]) == 0
    one, other = (f"sweep/seed={seed},model.start=normal" for seed in (0, 1))
    given = [*tiny_mixture, *FEW, "em.m_steps=1"]
    assert main([*given, f"model_from={one}", "run_dir=a/seed=3,b"]) == 0
    assert Path("a/seed=3,b/summary.json").exists()
    assert main(["evaluate", f"run={one}"]) == 0
    assert main([f"resume={one}", "em.m_steps=5"]) == 0
    # Two of them with a comma between are two values of a sweep.
    several = [f"model_from={one},{other}", "run_dir=from"]
    assert main(["-m", *given, *several]) == 0
    assert len(list(Path("from").glob("model_from=*/summary.json"))) == 2
    capsys.readouterr()
    assert main(["compare", one, other, "metrics=test/nll"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "2"


def test_names_of_jobs_are_no_options_of_compare(
    sweep: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*sweep, "seed=0,1"]) == 0
    monkeypatch.chdir("sweep")
    capsys.readouterr()
    assert main(["compare", "seed=0", "seed=?", "metrics=test/nll"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[0] == "2"


class TestOptuna:
    @pytest.fixture(autouse=True)
    def plug_in(self) -> None:
        pytest.importorskip(
            "hydra_plugins.hydra_optuna_sweeper", reason="pip install 'gfnem[optuna]'"
        )

    @pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
    @pytest.mark.parametrize("chosen", ["sweeper=optuna", "hydra/sweeper=optuna"])
    def test_minimises_the_best_value_of_the_selection(self, chosen: str, sweep: list[str]) -> None:
        given = [chosen, "hydra.sweeper.sampler.seed=1", "hydra.sweeper.n_trials=5"]
        going_on = "hydra.sweeper.max_failure_rate=1"
        # No mixture has a negative deviation: that job fails, and counts as none.
        assert main([*sweep, *given, going_on, "model.deviation=choice(0.5,2.0,-1.0)"]) == 2
        values = {
            min(line.get("valid/nll", math.inf) for line in run.metrics()): run.config["model"]
            for run in map(Run.open, Path("sweep").glob("model.deviation=[02]*"))
        }
        assert len(values) == 2  # what is tried again gives the same
        found = yaml.safe_load(Path("sweep/optimization_results.yaml").read_text())
        assert found["best_value"] == pytest.approx(min(values))
        best = values[min(values)]["deviation"]
        assert found["best_params"] == {"model.deviation": best}
        assert Path("sweep/model.deviation=-1.0/error.txt").exists()

    def test_a_sweep_of_which_no_job_ends(
        self, sweep: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ["sweeper=optuna", "hydra.sweeper.n_trials=1", "model.deviation=choice(-1.0,-2.0)"]
        assert main([*sweep, *given]) == 2
        first, *_ = (line for line in capsys.readouterr().err.splitlines() if "gfnem: " in line)
        assert first.startswith("gfnem: the sweep has ended early: ValueError: ")
        assert Path("sweep/error.txt").read_text().startswith("Traceback")

    def test_wrong_values_are_told_before_anything_starts(
        self, sweep: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        capsys.readouterr()
        assert main([*sweep, "sweeper=optuna", "seed=choice(0,x)"]) == 2
        assert capsys.readouterr().err == "gfnem: seed=x: it must be a whole number\n"
        assert not Path("sweep").exists()
