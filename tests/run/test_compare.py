"""Runs beside each other: seeds become rows, and the columns tell what differs."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from omegaconf import OmegaConf

from gfnem.app.composition import compose
from gfnem.errors import UserError
from gfnem.run import FilesTracker, Run
from gfnem.run.compare import Comparison, Target, compare
from gfnem.run.finished import FinishedRun, finished_runs
from gfnem.run.plots import banded_curves
from gfnem.run.settings import differences, settings_of

CONFIG = {
    "seed": 0,
    "run_dir": "runs/0",
    "latent": "shape",
    "model": {"_target_": "tasks.Grammar", "latent": "shape", "width": 8, "vocabulary": 49},
    "refinement": None,
    "optimizer": {"model": {"lr": 0.001}, "posterior": {"lr": 0.002}},
    "data": {"_target_": "tasks.text", "seed": 0, "batch_size": 16},
    "tracker": {"_target_": "gfnem.run.FilesTracker"},
    "sizes": {"vocabulary": 49},
    "evaluator": {"batch_size": 64},
}


def changed(**values: Any) -> dict[str, Any]:
    """CONFIG with some values changed, whose dots are written as two underscores."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in values.items():
        *path, name = key.split("__")
        part = config
        for step in path:
            part = part[step]
        part[name] = value
    return config


def finished(config: Mapping[str, Any], nll: float, **more: float) -> FinishedRun:
    summary = {"train/m_steps": 4, "test/nll": nll, "time/seconds": 2.0}
    summary |= {key.replace("__", "/"): value for key, value in more.items()}
    name = f"run {config['seed']}"
    return FinishedRun.of(name, config, summary, [{"train/m_steps": 4, "valid/nll": nll + 1}])


def write_run(path: Path, config: Mapping[str, Any], nll: float) -> Path:
    run = Run.create(path, config)
    for step in (2, 4):
        metrics = {"valid/nll": nll + 1 / step, "time/seconds": 0.5 * step}
        run.log(metrics, {"train/m_steps": step})
    run.write_summary({"train/m_steps": 4, "test/nll": nll, "time/seconds": 2.0})
    return path


def cells(text: str) -> list[list[str]]:
    return [line.strip("| \n").split(" | ") for line in text.splitlines()]


class TestSettings:
    def columns(self, *configs: Mapping[str, Any]) -> dict[str, list[str]]:
        return differences([setting.options for setting in settings_of(configs)])

    def rows(self, *configs: Mapping[str, Any]) -> list[list[int]]:
        return [setting.runs for setting in settings_of(configs)]

    def test_seeds_are_one_row(self) -> None:
        tracker = {"_target_": "gfnem.run.WandbTracker", "name": "b"}
        a = [changed(), changed(seed=1, run_dir="runs/1", tracker=tracker)]
        b = [changed(seed=seed, model__width=16) for seed in (0, 1)]
        assert self.rows(a[0], b[0], a[1], b[1]) == [[0, 2], [1, 3]]
        assert self.columns(*a, *b) == {"width": ["8", "16"]}

    def test_data_seed_belongs_to_the_seed_where_each_seed_has_its_own(self) -> None:
        # Other sentences have another vocabulary.
        other = {"model__vocabulary": 45, "sizes__vocabulary": 45}
        together = [changed(), changed(seed=1, data__seed=1, **other)]
        assert self.rows(*together) == [[0, 1]]
        assert self.columns(*together) == {}
        crossed = [changed(seed=s, data__seed=d) for s in (0, 1) for d in (0, 1)]
        assert self.rows(*crossed) == [[0, 2], [1, 3]]
        assert self.columns(*crossed) == {"data.seed": ["0", "1"]}
        alone = [changed(), changed(data__seed=1, **other)]
        assert self.columns(*alone) == {"data.seed": ["0", "1"]}
        mixed = [*together, *(changed(seed=s, latent="labelled") for s in (0, 1))]
        assert self.columns(*mixed)["data.seed"] == ["with seed", "0"]

    def test_names_are_short_but_clear(self) -> None:
        columns = self.columns(
            changed(), changed(optimizer__model__lr=0.01, data__batch_size=8, model__width=4)
        )
        assert list(columns) == ["width", "data.batch_size", "model.lr"]

    def test_copies_of_an_option_are_left_out(self) -> None:
        columns = self.columns(changed(), changed(latent="labelled", model__latent="labelled"))
        assert columns == {"latent": ["shape", "labelled"]}

    def test_sizes_are_named_where_nothing_else_tells_the_data_apart(self) -> None:
        sizes = {"model__vocabulary": 45, "sizes__vocabulary": 45}
        assert self.columns(changed(), changed(**sizes)) == {"vocabulary": ["49", "45"]}
        longer = changed(data__batch_size=8, **sizes)
        assert self.columns(changed(), longer) == {"data.batch_size": ["16", "8"]}

    def test_classes_stand_for_their_options(self) -> None:
        search = {"_target_": "posteriors.BackAndForth", "steps": 10}
        longer = {"_target_": "posteriors.BackAndForth", "steps": 20}
        weighting = {"_target_": "posteriors.Weighting", "steps": 5}
        columns = self.columns(changed(), changed(refinement=search), changed(refinement=weighting))
        assert columns == {"refinement": ["", "BackAndForth", "Weighting"]}
        columns = self.columns(changed(), changed(refinement=search), changed(refinement=longer))
        assert columns == {
            "refinement": ["", "BackAndForth", "BackAndForth"],
            "steps": ["", "10", "20"],
        }
        mine = {"_target_": "mine.Weighting", "steps": 5}
        columns = self.columns(changed(refinement=mine), changed(refinement=weighting))
        assert columns == {"refinement": ["mine.Weighting", "posteriors.Weighting"]}

    def test_null_and_whole_numbers_are_what_they_mean(self) -> None:
        # A later version has one more option; another format has one kind of number.
        assert self.rows(changed(), changed(new=None, model__width=8.0)) == [[0, 1]]

    @pytest.mark.parametrize(
        ("task", "options", "expected"),
        [
            (
                "grammar",
                ["posterior=gflownet", "posterior=exact"],
                {"posterior": ["GFlowNetPosterior", "ExactPosterior"]},
            ),
            (
                "grammar",
                ["objective=vargrad", "objective=tb", "posterior=exact"],
                {
                    "posterior": ["GFlowNetPosterior", "GFlowNetPosterior", "ExactPosterior"],
                    "objective": ["VarGrad", "TrajectoryBalance", ""],
                    "flow_lr": ["", "0.01", ""],
                },
            ),
            (
                "grammar",
                ["em.posterior_clip=5.0", "em.posterior_clip=null"],
                {"posterior_clip": ["5", ""]},
            ),
            (
                "discrete_vae",
                ["posterior=gflownet", "posterior=mean_field", "posterior=vq"],
                {
                    "posterior": ["GFlowNetPosterior", "MeanField", "VectorQuantized"],
                    "refinement": ["ImportanceWeighting", "ImportanceWeighting", ""],
                    "autoregressive": ["true", "false", "false"],
                    "logits": ["linear", "linear", "distance"],
                },
            ),
        ],
    )
    def test_real_configurations(
        self, task: str, options: list[str], expected: dict[str, list[str]]
    ) -> None:
        configs = [
            OmegaConf.to_container(compose([f"task={task}", option, "run_dir=x"]), resolve=True)
            for option in options
        ]
        assert self.columns(*configs) == expected  # pyright: ignore[reportArgumentType]


class TestComparison:
    def test_mean_and_deviation_by_hand(self) -> None:
        runs = [finished(changed(seed=seed), nll) for seed, nll in enumerate((1.0, 2.0, 6.0))]
        runs.append(finished(changed(model__width=16), 1.23456))
        comparison = Comparison(runs)
        columns, rows = comparison.numbers()
        assert columns[:4] == ["width", "seeds", "test/nll", "test/nll sd"]
        # Deviations from the mean 3 are -2, -1 and 3.
        assert rows[0][:3] == ["8", 3, 3.0] and rows[0][3] == pytest.approx(sqrt(14 / 2))
        assert rows[1][:4] == ["16", 1, 1.23456, ""]
        assert cells(comparison.markdown()) == [
            ["width", "seeds", "test/nll", "train/m_steps", "time/seconds"],
            ["---", "---:", "---:", "---:", "---:"],
            ["8", "3", "3.0 ± 2.6", "4", "2"],
            ["16", "1", "1.2", "4", "2"],
        ]

    def test_numbers_that_some_lack(self) -> None:
        runs = [
            finished(changed(seed=0), 1.0, test__f1=30.0, test__gap=1.0),
            finished(changed(seed=1), 2.0, test__f1=31.0),
            finished(changed(model__width=16), 3.0, test__f1=float("nan")),
        ]
        assert Comparison(runs).metrics == ["test/nll", "test/f1", "train/m_steps", "time/seconds"]
        comparison = Comparison(runs, "test/gap,test/*f1")
        assert comparison.metrics == ["test/gap", "test/f1"]
        assert [row[2:] for row in cells(comparison.markdown())[2:]] == [
            ["nan", "30.50 ± 0.71"],
            ["–", "nan"],
        ]

    def test_last_evaluation(self) -> None:
        comparison = Comparison([finished(changed(), 1.0)], "last/valid/*")
        assert cells(comparison.markdown())[2] == ["1", "2"]
        assert comparison.curves == ["valid/nll"]

    def test_steps_to_a_value(self) -> None:
        def run(seed: int, gaps: list[float], **more: Any) -> FinishedRun:
            lines = [
                {"train/m_steps": 10 * n, "train/e_steps": n, "valid/gap": gap}
                for n, gap in enumerate(gaps, 1)
            ]
            summary = {"train/m_steps": 10 * len(gaps), "test/nll": 1.0}
            config = changed(seed=seed, **more)
            return FinishedRun.of(f"run {seed}", config, summary, [{"train/m_steps": 0}, *lines])

        fast = [run(0, [0.5, 0.09, 0.2]), run(1, [0.5, 0.2, 0.1, 0.05])]
        slow = [run(seed, gaps, model__width=16) for seed, gaps in enumerate(([0.5], [0.05]))]
        other = [finished(changed(model__width=32), 1.0)]
        comparison = Comparison([*fast, *slow, *other], "test/nll", Target.read("valid/gap<0.1"))
        columns, rows = comparison.texts()
        assert columns[-2:] == ["test/nll", "steps to valid/gap<0.1"]
        assert [row[-1] for row in rows] == ["30 ± 14", "inf", "–"]
        rising = Comparison(fast, "test/nll", Target.read("valid/gap>.15"))
        assert rising.result(0, "steps to valid/gap>0.15") == (10, 0)

    def test_steps_are_e_steps_where_the_model_stays(self) -> None:
        lines = [{"train/m_steps": 0, "train/e_steps": 7, "valid/gap": 0.0}]
        run = FinishedRun.of("run", changed(), {"train/m_steps": 0, "test/nll": 1.0}, lines)
        assert Target.read("valid/gap<1e-1").steps(run) == 7

    def test_bar_in_a_value(self) -> None:
        runs = [finished(changed(data__file=file), 1.0) for file in ("a|b", "c")]
        assert "| a\\|b |" in Comparison(runs).markdown()

    def test_repeated_seed_counts_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        comparison = Comparison([finished(changed(), 1.0), finished(changed(), 2.0)])
        assert comparison.result(0, "test/nll") == (1.0, pytest.approx(float("nan"), nan_ok=True))
        assert "left out: run 0 repeats run 0" in capsys.readouterr().err

    def test_narrow_terminal_turns_the_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        def shown(width: int) -> list[str]:
            monkeypatch.setenv("COLUMNS", str(width))
            monkeypatch.setattr(sys, "stdout", Terminal())
            Comparison([finished(changed(), 1.0)]).show()
            assert isinstance(sys.stdout, Terminal)
            return re.sub(r"\x1b\[[\d;]*m", "", sys.stdout.getvalue()).split()

        monkeypatch.setenv("TERM", "xterm")
        wide, narrow = shown(200), shown(30)
        assert wide[:2] == ["seeds", "test/nll"]
        assert narrow[:2] == ["seeds", "1"]
        assert narrow[-2:] == ["time/seconds", "2"]


SCORES = Path("tables", "scores_test.csv")


def write_scores(run: Path, f1: list[float], words: int = 5) -> None:
    rows = [(number, words, value, 50.0) for number, value in enumerate(f1)]
    Run.open(run).add_table("scores_test", ("sentence", "words", "f1", "right_f1"), rows)


class TestDifferences:
    @pytest.fixture
    def runs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """Two settings of two seeds; the second is better by 10 and by 20 in the mean of seeds."""
        monkeypatch.chdir(tmp_path)
        runs = []
        scores = {8: ([0.0, 20.0], [20.0, 40.0]), 16: ([30.0, 50.0], [10.0, 50.0])}
        for width, of_seeds in scores.items():
            for seed, f1 in enumerate(of_seeds):
                path = Path(f"runs/{width}-{seed}")
                runs.append(write_run(path, changed(seed=seed, model__width=width), 1.0))
                Run.open(path).write_summary(
                    {"train/m_steps": 4, "test/f1": sum(f1) / 2, "test/f1_low": 0.0}
                )
                write_scores(path, f1)
        return runs

    def test_by_hand(self, runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
        compare(["runs"])
        out = capsys.readouterr().out
        assert "test/f1_low" not in out
        title = "differences to width=8, with 95 % intervals over sentences:"
        # Means of two draws of 10 and 20 are 10, 15 and 20, the first and the last of them often.
        text = Path("comparison/differences.md").read_text()
        assert title in out and text.startswith(f"{title}\n\n| width | test/f1 |\n")
        assert cells(text)[-1] == ["16", "+15.00 (+10.00 to +20.00)"]
        with Path("comparison/differences.csv").open(newline="") as file:
            assert list(csv.reader(file)) == [
                ["width", "test/f1", "test/f1 low", "test/f1 high"],
                ["16", "15.0", "10.0", "20.0"],
            ]
        compare(["runs"], metrics="train/m_steps")
        assert not list(Path("comparison").glob("differences*"))

    def test_other_sentences_are_left_out(
        self, runs: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_scores(runs[3], [10.0, 50.0], words=6)
        compare(["runs"])
        captured = capsys.readouterr()
        assert captured.err == (
            "left out of the differences: width=16, whose runs have no scores of the same "
            "sentences\n"
        )
        assert "differences to" not in captured.out
        write_scores(runs[2], [10.0, 50.0], words=6)
        compare(["runs"])
        assert capsys.readouterr().err == (
            "left out of the differences: width=16, with other sentences than width=8\n"
        )

    def test_the_first_setting_that_has_scores_is_what_others_are_compared_to(
        self, runs: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = changed(model__width=4)
        write_run(Path("runs/4-0"), config, 1.0)
        Run.open("runs/4-0").write_summary({"train/m_steps": 4, "test/f1": 1.0})
        compare(["runs"])
        captured = capsys.readouterr()
        assert "differences to width=8" in captured.out and not captured.err

    def test_runs_of_before_have_none(
        self, runs: list[Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        for run in runs[:2]:
            (run / SCORES).unlink()
        compare(["runs"])
        captured = capsys.readouterr()
        assert "differences" not in captured.out + captured.err

    @pytest.mark.parametrize("content", ["", "a,b\n", "sentence,words,f1\n0,5,x\n", "a\n0\n"])
    def test_broken_tables(
        self, runs: list[Path], content: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (runs[0] / SCORES).write_text(content)
        compare(["runs"])
        message = f"left out: {runs[0] / SCORES} is no table of scores: restore or remove it\n"
        assert capsys.readouterr().err == message


class TestFinishedRuns:
    def test_at_any_depth_each_once_in_natural_order(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for number in (9, 10):
            write_run(Path(f"runs/deep/{number}"), changed(seed=number), 1.0)
        write_run(Path("runs/a"), changed(seed=3), 1.0)
        for other in ("runs/.hydra", "runs/wandb/files", "runs/a/plots"):
            Path(other).mkdir(parents=True)
            Path(other, "config.yaml").touch()
        found = finished_runs(["runs/deep", "runs", "runs/*"])
        assert [run.name for run in found] == ["runs/deep/9", "runs/deep/10", "runs/a"]
        assert found[0].numbers["last/valid/nll"] == 1.25

    def test_unfinished_and_broken_runs_are_named(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        good = write_run(tmp_path / "good", changed(), 1.0)
        Run.create(tmp_path / "running", changed())
        Run.create(tmp_path / "stopped", changed()).write_summary({"train/m_steps": 1})
        broken = write_run(tmp_path / "zbroken", changed(), 1.0)
        (broken / "metrics.jsonl").write_text("oops\n")
        (tmp_path / "zlost").mkdir()
        (tmp_path / "zlost" / "metrics.jsonl").touch()
        assert [run.name for run in finished_runs([str(tmp_path)])] == [str(good)]
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith(f"left out: {tmp_path / 'running'} has no summary.json")
        assert lines[1].startswith(f"left out: {tmp_path / 'stopped'} has no test results")
        assert lines[2].startswith(f"left out: line 1 of {broken / 'metrics.jsonl'} is not")
        assert lines[3].startswith(f"left out: {tmp_path / 'zlost'} has no config.yaml")
        good.rename(tmp_path.parent / "elsewhere")
        with pytest.raises(UserError, match="none of 4 runs can be compared"):
            finished_runs([str(tmp_path)])

    @pytest.mark.parametrize(
        ("place", "message"),
        [
            ("nosuch", "'nosuch' does not exist: check the path"),
            ("", "'' does not exist"),
            ("empty", "empty holds no runs: give directories"),
            ("nosuch*", r"nosuch\* matches no folder: check the pattern"),
            ("f?le", r"f\?le matches no folder"),
            ("file", "file is no folder: give the directory of a run"),
        ],
    )
    def test_places_without_runs(
        self, place: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("empty").mkdir()
        Path("file").touch()
        with pytest.raises(UserError, match=f"^{message}"):
            finished_runs([place])


class TestCompare:
    def test_writes_and_replaces_its_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for seed in (0, 1):
            write_run(Path(f"runs/{seed}"), changed(seed=seed), 1.0 + seed)
        compare(["runs"])
        out = capsys.readouterr().out.splitlines()
        assert out[0].split() == ["seeds", "test/nll", "train/m_steps", "time/seconds"]
        assert out[1].split() == ["2", "1.50", "±", "0.71", "4", "2"]
        assert out[2:] == ["written to comparison"]
        assert sorted(os.listdir("comparison")) == ["curves.png", "table.csv", "table.md"]
        assert cells(Path("comparison/table.md").read_text())[2][1] == "1.50 ± 0.71"
        with Path("comparison/table.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        assert float(row["test/nll"]) == 1.5
        assert float(row["test/nll sd"]) == pytest.approx(sqrt(0.5))
        assert Path("comparison/curves.png").read_bytes().startswith(b"\x89PNG")
        compare(["runs/1"], metrics="time/seconds")
        assert sorted(os.listdir("comparison")) == ["table.csv", "table.md"]
        assert cells(Path("comparison/table.md").read_text())[2] == ["1", "2"]

    def test_tracker_is_told_of_a_run_of_its_own(self, tmp_path: Path) -> None:
        told: list[tuple[Any, ...]] = []

        class Recorder(FilesTracker):
            def __getattribute__(self, name: str) -> Any:
                return lambda *given: told.append((name, *given))

        run = write_run(tmp_path / "run", changed(), 1.0)
        out = tmp_path / "out"
        (out / "wandb").mkdir(parents=True)
        (out / "wandb" / "run-id.txt").write_text("before")
        compare([str(run)], metrics="test/nll", out=str(out), tracker=Recorder())
        assert told == [
            ("start", out, {"compare": [str(run)], "metrics": ["test/nll"]}),
            ("table", "comparison", ["seeds", "test/nll", "test/nll sd"], [[1, 1.0, ""]]),
            ("figure", "curves", out / "curves.png"),
            ("finish", "finished"),
        ]
        assert not (out / "wandb" / "run-id.txt").exists()

    def test_what_cannot_be_used(self, tmp_path: Path) -> None:
        run = str(write_run(tmp_path / "run", changed(), 1.0))
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="compare needs folders of runs, DIR DIR"):
            compare([])
        for target in ("valid/nll", "<0.1", "valid/nll<", "valid/nll<low", "a<b<0.1"):
            with pytest.raises(UserError, match=f"^reach={target} is not of the form NAME<VALUE"):
                compare([run], reach=target)
        with pytest.raises(UserError, match="^no run has a curve of valid/gap: see their metrics"):
            compare([run], reach="valid/gap<0.1", out=str(tmp_path / "out"))
        with pytest.raises(UserError, match=r"metrics=test/f\* fits no metric: .* test/nll, and"):
            compare([run], metrics="test/nll,test/f*")
        with pytest.raises(UserError, match=r"out=.*run holds a run: name another folder"):
            compare([run], out=run)
        with pytest.raises(UserError, match=r"out=.*file cannot be written \(File exists\)"):
            compare([run], out=str(tmp_path / "file"))

    def test_comes_without_torch(self, tmp_path: Path, root: Path) -> None:
        run = write_run(tmp_path / "run", changed(), 1.0)
        code = (
            "import sys; from gfnem.app.main import main; main(['compare', sys.argv[1]]);"
            "assert not {'torch', 'gfn', 'wandb', 'nltk', 'hydra'} & set(sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, run],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "comparison" / "curves.png").exists()


class TestCurves:
    RUNS = [
        [
            {"train/m_steps": 0, "time/seconds": 0.0, "valid/nll": 1.0},
            {"train/m_steps": 10, "time/seconds": 10.0, "valid/nll": 3.0, "train/m_loss": 1.0},
        ],
        [
            {"train/m_steps": 0, "time/seconds": 5.0, "valid/nll": 3.0},
            {"train/m_steps": 10, "time/seconds": 15.0, "valid/nll": 7.0},
        ],
    ]

    def test_mean_and_band_by_hand(self) -> None:
        figure = banded_curves(
            {"a $b$": self.RUNS, "one": self.RUNS[:1]},
            ["valid/nll"],
            {"train/m_steps": "M-steps", "time/seconds": "seconds"},
        )
        steps, seconds = figure.axes
        assert [axes.get_xlabel() for axes in figure.axes] == ["M-steps", "seconds"]
        mean, one = steps.lines
        np.testing.assert_array_equal(mean.get_xydata(), [[0, 2.0], [10, 5.0]])
        np.testing.assert_array_equal(one.get_xydata(), [[0, 1.0], [10, 3.0]])
        # Values 1, 3 and 3, 7: half their distance times the root of 2 to either side.
        (band, _) = (np.asarray(c.get_paths()[0].vertices) for c in steps.collections)
        assert sorted(set(np.round(band[band[:, 0] == 10, 1], 6))) == pytest.approx(
            [5 - 2 * sqrt(2), 5 + 2 * sqrt(2)], abs=1e-6
        )
        # Both are there from 5 s to 10 s: 2 and 3 of the first, 3 and 5 of the second.
        np.testing.assert_array_equal(seconds.lines[0].get_xydata(), [[5, 2.5], [10, 4.0]])
        figure.savefig(io.BytesIO())  # dollars are no formula
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["a $b$", "one"]

    def test_first_curve_of_each_kind_that_most_settings_have(self) -> None:
        def run(width: int, *names: str) -> FinishedRun:
            lines = [{"train/m_steps": 1, **dict.fromkeys(names, 1.0)}]
            return FinishedRun.of("run", changed(model__width=width), {"test/nll": 1.0}, lines)

        exact = run(8, "valid/nll", "valid/iw_nll", "valid/posterior_gap", "valid/perplexity")
        bound = run(16, "valid/iw_nll")
        assert Comparison([exact, bound]).curves == ["valid/iw_nll", "valid/posterior_gap"]

    def test_what_runs_say_of_their_metrics(self) -> None:
        def run(width: int, **patterns: list[str]) -> FinishedRun:
            config = changed(model__width=width) | {"patterns": patterns}
            return replace(
                finished(config, 1.0, test__f1=2.0, test__f1_low=1.0, test__f1_over=0.5),
                lines=[{"train/m_steps": 1, "valid/nll": 1.0, "valid/elbo": 1.0, "valid/f1": 1.0}],
            )

        said = run(8, curves=["valid/*f1", "valid/nll"], details=["*_over", "*_low"])
        one, both = Comparison([said]), Comparison([said, run(16)])
        assert one.curves == ["valid/f1", "valid/nll"]
        assert both.curves == ["valid/f1", "valid/nll", "valid/elbo"]
        usual = ["test/nll", "test/f1", "train/m_steps", "time/seconds"]
        assert one.metrics == both.metrics == usual
        assert list(both.settings) == ["width"]

    def test_posteriors_of_a_fixed_model_over_e_steps(self) -> None:
        lines = [{"train/m_steps": 0, "train/e_steps": e, "valid/nll": 1.0} for e in (1, 5)]
        summary = {"test/nll": 1.0, "train/m_steps": 0}
        figure = Comparison([FinishedRun.of("run", changed(), summary, lines)]).figure()
        assert figure is not None
        assert figure.axes[0].get_xlabel() == "E-steps"
        np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), [1, 5])


class StoredRun:
    """A run as the service gives it."""

    def __init__(self, name: str, config: dict[str, Any], summary: dict[str, Any]) -> None:
        self.name, self.id, self.config, self.summary = name, f"id-{name}", config, summary

    def scan_history(self) -> list[dict[str, Any]]:
        return [
            {"_step": 0, "train/m_steps": 2, "valid/nll": 1.5, "time/seconds": 1.0},
            {"_step": 1, "train/m_steps": 4, "valid/nll": "NaN", "plots/curves": {"_type": "f"}},
        ]


class TestWandb:
    @pytest.fixture
    def stored(self, monkeypatch: pytest.MonkeyPatch) -> list[StoredRun]:
        """The runs of the project team/gfnem."""
        runs: list[StoredRun] = []

        class Api:
            def __init__(self, timeout: int) -> None: ...

            def runs(self, path: str, lazy: bool) -> list[StoredRun]:
                if path != "team/gfnem":
                    raise ValueError(f"Could not find project {path}\nand more")
                return runs

        monkeypatch.setattr(wandb, "setup", lambda settings: None)
        monkeypatch.setattr(wandb, "Api", Api)
        return runs

    def test_final_numbers_and_curves(
        self, stored: list[StoredRun], capsys: pytest.CaptureFixture[str]
    ) -> None:
        final = {"valid/nll": {"min": 1.5}, "final/test/nll": 1.0, "final/train/m_steps": 4}
        stored += [
            StoredRun("0", changed(), final),
            StoredRun("1", changed(seed=1, model__width=8.0), final | {"final/test/nll": "NaN"}),
            StoredRun("comparison", {"compare": ["0"]}, {}),
            StoredRun("2", changed(seed=2), {"valid/nll": {"min": 1.5}}),
        ]
        runs = finished_runs([], "team/gfnem")
        assert [run.name for run in runs] == ["0 (team/gfnem/id-0)", "1 (team/gfnem/id-1)"]
        assert capsys.readouterr().err == (
            "left out: 2 (team/gfnem/id-2) has no test results: the run is not complete, "
            "resume it\n"
        )
        assert set(runs[0].numbers) == {"test/nll", "train/m_steps", "last/valid/nll"}
        comparison = Comparison(runs)
        assert [len(row) for row in comparison.rows] == [2]
        assert cells(comparison.markdown())[2] == ["2", "nan", "4"]
        figure = comparison.figure()
        assert figure is not None
        np.testing.assert_array_equal(figure.axes[0].lines[0].get_xydata(), [[2, 1.5]])

    def test_what_cannot_be_read(self, stored: list[StoredRun]) -> None:
        with pytest.raises(UserError, match="^wandb=gfnem is not of the form ENTITY/PROJECT$"):
            finished_runs([], "gfnem")
        with pytest.raises(
            UserError, match=r"^wandb=team/x cannot be read \(ValueError: .* team/x\): check its"
        ):
            finished_runs([], "team/x")
        with pytest.raises(UserError, match="none of 0 runs can be compared"):
            finished_runs([], "team/gfnem")

    def test_missing_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(UserError, match=r"wandb=a/b needs a package .*: pip install wandb"):
            finished_runs([], "a/b")

    def test_without_login(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        with pytest.raises(UserError, match=r"UsageError: No API key .*and `wandb login`$"):
            finished_runs([], "a/b")
        wandb.teardown()


def test_names_from_strangers_are_shown_and_not_interpreted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["=HYPERLINK(0)", "<script>|`x`", "\x1b[2Jgone\nnext", "$\\frac", "[bold]"]
    for number, name in enumerate(names):
        write_run(tmp_path / str(number), changed(latent=name), 2.0)
    weird = write_run(tmp_path / "weird", changed(), 2.0)
    (weird / "config.yaml").write_text("patterns: {console: 7}\nseed: [[], {}]\n")
    compare([str(tmp_path)], out=str(tmp_path / "out"))
    captured = capsys.readouterr()
    assert captured.err.startswith("left out: patterns.console is 7")
    assert "\x1b" not in captured.out and r"\x1b[2Jgone\nnext" in captured.out
    table = (tmp_path / "out" / "table.md").read_text()
    assert "<script>" not in table and table.count("\n") == 2 + len(names)
    rows = (tmp_path / "out" / "table.csv").read_text().splitlines()
    assert len(rows) == 1 + len(names)
    assert not any(row.startswith(("=", "+", "@")) for row in rows)
    assert (tmp_path / "out" / "curves.png").exists()
