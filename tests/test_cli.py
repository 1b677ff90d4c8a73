"""Every verb of the command line once, and every mistake once, on little data."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from nltk import Tree

import gfnem
from gfnem.app.main import main
from gfnem.run.lock import alone
from gfnem.tasks.discrete_vae.evaluate import DiscreteVAEEvaluator
from gfnem.tasks.grammar.evaluate import GrammarEvaluator
from gfnem.tasks.grammar.text import sources as data
from gfnem.tasks.mixture.evaluate import MixtureEvaluator
from gfnem.training.steps import Steps

GFLOWNET = ["schedule.warmup_e_steps=2", "policy.width=8"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module", autouse=True)
def toy_sentences_are_made_once() -> Iterator[None]:
    """Mistakes are made with the default data, the same each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "sample_trees", cache(data.sample_trees))
        yield


@pytest.fixture(scope="session")
def tiny(tiny_data: list[str], tiny_run: list[str]) -> list[str]:
    return [*tiny_data, *tiny_run, *GFLOWNET]


@pytest.fixture(scope="session")
def trained(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    path = tmp_path_factory.mktemp("trained") / "run"
    assert main([*tiny, f"run_dir={path}"]) == 0
    return path


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without figures, which take longer than all else."""
    monkeypatch.setattr(GrammarEvaluator, "report", lambda *arguments: None)


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong command line gives."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err.strip()


def state_of(run: Path, which: str) -> dict:
    return torch.load(run / "checkpoints" / f"{which}.pt", weights_only=True)


def assert_same(one: object, other: object) -> None:
    """Equal to the last bit, times aside."""
    assert type(one) is type(other)
    if isinstance(one, dict) and isinstance(other, dict):
        assert list(one) == list(other)
        for key in one:
            if key not in ("seconds", "time/seconds"):
                assert_same(one[key], other[key])
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("no_report")
class TestTrain:
    def test_leaves_a_complete_run(self, trained: Path) -> None:
        config = yaml.safe_load((trained / "config.yaml").read_text())
        assert config["em"]["m_steps"] == 4
        assert config["model"]["vocabulary"] == config["sizes"]["vocabulary"] > 1
        summary = json.loads((trained / "summary.json").read_text())
        assert summary["train/m_steps"] == 4
        assert summary["test/nll_per_token"] > 0
        assert [line["train/m_steps"] for line in read_metrics(trained)][-1] == 4
        assert list((trained / "plots").glob("*.png"))

    def test_says_what_it_does(
        self, tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        assert main(["train", *tiny, "run_dir=here"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "40" in lines[0]
        assert lines[1] == "device cpu, run directory here"
        chosen = r"the checkpoint of lowest valid/nll_per_token, \d\.\d+, is rated"
        assert any(re.fullmatch(chosen, line) for line in lines)
        assert any(re.fullmatch(r"test/nll_per_token +\d\.\d{4}", line) for line in lines)
        assert lines[-1] == "run directory here"
        assert os.listdir(tmp_path) == ["here"]

    def test_same_seed_same_run(self, trained: Path, tiny: list[str]) -> None:
        assert main([*tiny, "run_dir=again"]) == 0
        assert_same(read_metrics(Path("again")), read_metrics(trained))
        assert main([*tiny, "run_dir=other", "seed=1"]) == 0
        assert read_metrics(Path("other"))[0] != read_metrics(trained)[0]

    def test_runs_get_directories_of_their_own(self, tiny: list[str]) -> None:
        assert main([*tiny, "em.m_steps=1"]) == main([*tiny, "em.m_steps=1"]) == 0
        assert len(list(Path("runs/grammar").iterdir())) == 2

    def test_multirun(self, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["-m", *tiny, "seed=3,4", "em.m_steps=1", "run_dir=sweep"]) == 0
        jobs = ["seed=3", "seed=4"]
        assert sorted(os.listdir("sweep")) == ["multirun.yaml", *jobs]
        configs = [yaml.safe_load(Path("sweep", job, "config.yaml").read_text()) for job in jobs]
        assert [config["seed"] for config in configs] == [3, 4]
        assert [config["run_dir"] for config in configs] == [f"sweep/{job}" for job in jobs]
        out = capsys.readouterr().out
        assert "job 0: seed=3" in out and "job 1: seed=4" in out
        head, row = out.splitlines()[-2:]
        assert head.split()[:2] == ["seeds", "test/nll_per_token"]
        assert row.split()[0] == "2"

    def test_multirun_goes_on_after_a_job_that_fails(
        self, tiny: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        jobs = ["-m", "posterior.samples=0,2", "em.m_steps=1", "run_dir=sweep"]
        assert main([*tiny, *jobs]) == 2
        assert "posterior.samples is 0" in capsys.readouterr().err
        assert Path("sweep/posterior.samples=2/summary.json").exists()

    def test_multirun_of_an_experiment_that_says_what_it_sweeps_over(self, tiny: list[str]) -> None:
        Path("mine/experiment").mkdir(parents=True)
        swept = "hydra: {sweeper: {params: {seed: '3,4', objective: 'tb,vargrad'}}}\n"
        Path("mine/experiment/both.yaml").write_text(f"# @package _global_\n{swept}")
        given = ["-m", *tiny, "--config-dir", "mine", "experiment=both", "em.m_steps=1"]
        # What is given counts more.
        assert main([*given, "objective=db", "run_dir=sweep"]) == 0
        jobs = ["seed=3", "seed=4"]
        configs = [yaml.safe_load(Path("sweep", job, "config.yaml").read_text()) for job in jobs]
        assert [config["seed"] for config in configs] == [3, 4]
        assert {config["objective"]["_target_"] for config in configs} == {
            "gfnem.gflownet.objectives.DetailedBalance"
        }
        assert all("hydra" not in config for config in configs)

    def test_cfg_prints_what_would_be_stored_but_for_the_sizes_of_the_data(
        self, trained: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*tiny, "--cfg", "job", "--resolve", f"run_dir={trained}"]) == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        stored = yaml.safe_load((trained / "config.yaml").read_text())
        for name in ("vocabulary", "max_length"):
            for part in ("sizes", "model", "policy"):
                for config in (stored, printed):
                    config[part].pop(name, None)
        assert printed == stored
        assert os.listdir() == []

    @pytest.mark.parametrize(
        ("flags", "shown"),
        [
            (["--cfg", "hydra"], "output_subdir: null"),
            (["--info", "defaults"], "objective/vargrad"),
            (["--hydra-help"], "hydra/launcher: basic, joblib, submitit_local, submitit_slurm"),
        ],
    )
    def test_flags_of_hydra(
        self, flags: list[str], shown: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(flags) == 0
        assert shown in capsys.readouterr().out
        assert os.listdir() == []

    def test_own_config_dir(self, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        Path("mine/experiment").mkdir(parents=True)
        Path("mine/experiment/short.yaml").write_text("# @package _global_\nem:\n  log_every: 7\n")
        assert main([*tiny, "--config-dir", "mine", "experiment=short", "--cfg", "job"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["em"]["log_every"] == 2
        short = [option for option in tiny if not option.startswith("em.log_every")]
        assert main([*short, "--config-dir", "mine", "experiment=short", "--cfg", "job"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["em"]["log_every"] == 7


@contextmanager
def stopped_by(number: signal.Signals) -> Iterator[None]:
    """Runs get a signal in their third M-step."""
    m_step = Steps.m_step

    def interrupting(steps: Steps, *arguments) -> None:
        if steps.done.m_steps == 2:
            os.kill(os.getpid(), number)
        m_step(steps, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "m_step", interrupting)
        yield


def interrupt(tiny: list[str]) -> Path:
    """A run that gets a Ctrl-C."""
    with stopped_by(signal.SIGINT):
        assert main([*tiny, "run_dir=stopped"]) == 130
    return Path("stopped")


def interrupted(*arguments) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("no_report")
class TestResume:
    def test_is_as_if_it_had_never_stopped(
        self, tiny: list[str], trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupted = interrupt(tiny)
        assert state_of(interrupted, "last")["done"]["m_steps"] == 3
        assert main([f"resume={interrupted}"]) == 0
        assert_same(read_metrics(interrupted), read_metrics(trained))
        for which in ("last", "best"):
            assert_same(state_of(interrupted, which), state_of(trained, which))
        summaries = [
            json.loads((run / "summary.json").read_text()) for run in (interrupted, trained)
        ]
        assert_same(*summaries)

    def test_is_what_an_interrupted_run_proposes(
        self,
        tiny: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        interrupt(tiny)
        last = capsys.readouterr().out.splitlines()[-1]
        done = "stopped after 3 of 4 M-steps and 5 E-steps"
        assert last == f"{done}; go on with: gfnem resume=stopped"

    def test_longer(self, trained: Path, tiny: list[str]) -> None:
        assert main([*tiny, "run_dir=short", "em.m_steps=2"]) == 0
        assert main(["resume=short", "em.m_steps=4"]) == 0
        assert_same(state_of(Path("short"), "last")["model"], state_of(trained, "last")["model"])

    def test_finished(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = (trained / "metrics.jsonl").read_text()
        capsys.readouterr()
        assert main([f"resume={trained}"]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        assert "is finished, with 4 M-steps" in out
        assert (trained / "metrics.jsonl").read_text() == before

    def test_run_that_was_killed_before_its_first_checkpoint(
        self, tiny: list[str], trained: Path
    ) -> None:
        run = Path(shutil.copytree(trained, "run"))
        for path in (run / "summary.json", *(run / "checkpoints").iterdir()):
            path.unlink()
        os.truncate(run / "metrics.jsonl", 0)
        assert main([f"resume={run}"]) == 0
        assert_same(read_metrics(run), read_metrics(trained))
        assert_same(state_of(run, "best"), state_of(trained, "best"))

    def test_damaged_checkpoint(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = Path(shutil.copytree(trained, "run"))
        (run / "checkpoints" / "last.pt").write_bytes(b"damaged")
        line = failing([f"resume={run}"], capsys)
        assert line.endswith("there is another one, for checkpoint=best")
        assert main([f"resume={run}", "checkpoint=best"]) == 0
        assert_same(read_metrics(run), read_metrics(trained))

    def test_another_process_is_at_it(
        self, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with alone(trained):
            line = failing([f"resume={trained}", "em.m_steps=9"], capsys)
        assert line.startswith(f"gfnem: another process is training {trained}: wait")

    def test_a_terminal_that_hangs_up(self, tiny: list[str]) -> None:
        with stopped_by(signal.SIGHUP):
            assert main([*tiny, "run_dir=run"]) == 128 + signal.SIGHUP
        assert main(["resume=run"]) == 0

    def test_final_evaluation_that_was_killed_is_done_again(
        self, trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = Path(shutil.copytree(trained, "run"))
        with monkeypatch.context() as patch:
            patch.setattr("gfnem.run.Run.write_summary", interrupted)
            assert main([f"resume={run}", "em.m_steps=6"]) == 130
        assert json.loads((run / "summary.json").read_text())["train/m_steps"] == 4
        assert main([f"resume={run}"]) == 0
        assert json.loads((run / "summary.json").read_text())["train/m_steps"] == 6

    def test_prints_its_configuration(
        self, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        capsys.readouterr()
        assert main([f"resume={trained}", "em.m_steps=9", "--cfg", "job"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["em"]["m_steps"] == 9


class TestImages:
    """What the other task's verbs do; a stopped run goes on as one of sentences does."""

    def test_stop_resume_evaluate_and_pictures(
        self,
        tiny_images: list[str],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        options = [
            *tiny_images,
            "warm_start=vq",
            "warm_start.steps=1",
            "schedule.warmup_e_steps=2",
        ]
        monkeypatch.setattr(DiscreteVAEEvaluator, "report", lambda *arguments: None)
        assert main([*options, "run_dir=whole"]) == 0
        stopped = interrupt(options)
        assert state_of(stopped, "last")["done"]["m_steps"] == 3
        early = json.loads((stopped / "summary.json").read_text())
        assert early["train/m_steps"] == 3 and "test/nll" not in early
        assert main([f"resume={stopped}"]) == 0
        for which in ("last", "best"):
            assert_same(state_of(stopped, which), state_of(Path("whole"), which))
        capsys.readouterr()
        assert main(["evaluate", "run=stopped", "evaluator.nll_samples=4"]) == 0
        assert "test/exact_nll" in capsys.readouterr().out
        assert main(["generate", "run=stopped", "n=3", "file=drawn.png"]) == 0
        assert main(["reconstruct", "run=stopped"]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "3 images drawn from the model: drawn.png",
            "the first test images and their reconstructions: reconstructions.png",
        ]
        assert Path("drawn.png").exists() and Path("reconstructions.png").exists()


POSTERIORS = {
    "mcmc": ["posterior=mcmc", "posterior.steps=2", "posterior.burn_in=3"],
    "importance": ["posterior=importance", "posterior.proposals=8"],
}


class TestPosteriorsThatLearnNothing:
    """The mixture's are in its own tests."""

    @pytest.mark.usefixtures("no_report")
    @pytest.mark.parametrize("posterior", POSTERIORS)
    def test_sentences(
        self,
        posterior: str,
        tiny_data: list[str],
        tiny_run: list[str],
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        options = [*tiny_data, *tiny_run, *POSTERIORS[posterior], "latent=labelled"]
        assert main([*options, "run_dir=whole"]) == 0
        assert main([*options, "run_dir=half", "em.m_steps=2"]) == 0
        assert main(["resume=half", "em.m_steps=4"]) == 0
        for part in ("model", "posterior"):
            assert_same(state_of(Path("half"), "last")[part], state_of(Path("whole"), "last")[part])
        summary = json.loads(Path("whole/summary.json").read_text())
        assert summary["test/nll_per_token"] > 0
        assert ("test/posterior_gap" in summary) == (posterior == "importance")
        Path("sentences.txt").write_text("anna saw boris\n")
        capsys.readouterr()
        assert main(["parse", "run=whole", "file=sentences.txt"]) == 0
        assert Tree.fromstring(capsys.readouterr().out).leaves() == ["anna", "saw", "boris"]

    @pytest.mark.parametrize("posterior", POSTERIORS)
    def test_images(
        self, posterior: str, tiny_images: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(DiscreteVAEEvaluator, "report", lambda *arguments: None)
        options = [option for option in tiny_images if not option.startswith("policy.")]
        assert main([*options, *POSTERIORS[posterior], "em.m_steps=2", "run_dir=run"]) == 0
        assert json.loads(Path("run/summary.json").read_text())["test/exact_nll"] > 0
        assert main(["reconstruct", "run=run"]) == 0
        assert Path("reconstructions.png").exists()


class TestEvaluate:
    def test_prints_the_metrics_of_the_summary(
        self, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        capsys.readouterr()
        assert main(["evaluate", f"run={trained}"]) == 0
        printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
        summary = json.loads((trained / "summary.json").read_text())
        expected = {k: v for k, v in summary.items() if k.startswith("test/")}
        assert {k: float(printed[k]) for k in expected} == pytest.approx(expected, abs=5e-5)

    def test_split_and_checkpoint(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        assert main(["evaluate", f"run={trained}", "split=valid", "checkpoint=last"]) == 0
        assert "valid/nll_per_token" in capsys.readouterr().out


class TestParse:
    def test_file(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        long = " ".join(["anna"] * 9)
        lines = ["Anna saw boris", "anna", "", long, "anna saw Xyzzy", "xyzzy (plugh)", "a b c d"]
        Path("sentences.txt").write_text("\n".join(lines) + "\n")
        capsys.readouterr()
        assert main(["parse", f"run={trained}", "file=sentences.txt"]) == 0
        captured = capsys.readouterr()
        out = captured.out.split("\n")
        assert len(out) == len(lines) + 1
        for number in (0, 4, 5, 6):
            leaves = Tree.fromstring(out[number]).leaves()
            words = lines[number].replace("(", "-LRB-").replace(")", "-RRB-").split()
            assert leaves == words
        assert out[1] == out[2] == out[3] == ""
        notes = captured.err.splitlines()
        assert notes[0] == "line 2: 'anna' is one word, which has no tree"
        assert notes[1] == "line 4: 9 words, the model was made for at most 8"
        assert notes[2] == "line 5: unknown: Xyzzy"
        assert notes[3] == "line 6: no word of it is known"

    def test_standard_input(
        self,
        trained: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"anna saw boris\n")))
        capsys.readouterr()
        assert main(["parse", f"run={trained}", "decode=viterbi"]) == 0
        tree = Tree.fromstring(capsys.readouterr().out)
        assert tree.leaves() == ["anna", "saw", "boris"]
        assert all(len(node) in (1, 2) for node in tree.subtrees())


class TestEnsemble:
    @pytest.fixture
    def other(self, tiny: list[str], no_report: None) -> Path:
        """A run of other sentences, shorter ones, and so of another vocabulary."""
        of_exact = [option for option in tiny if option not in GFLOWNET]
        fewer = ["data.train_sentences=20", "data.max_length=6", "posterior=exact"]
        assert main([*of_exact, *fewer, "run_dir=other"]) == 0
        return Path("other")

    def test_parses_and_rates_several_runs(
        self, trained: Path, other: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lines = ["anna saw boris", " ".join(["anna"] * 7), "anna saw Xyzzy"]
        Path("sentences.txt").write_text("\n".join(lines) + "\n")
        capsys.readouterr()
        assert main(["parse", f"run=[{trained}, other]", "file=sentences.txt"]) == 0
        captured = capsys.readouterr()
        first, none, last = captured.out.splitlines()
        assert none == ""
        for line, tree in ((lines[0], first), (lines[2], last)):
            assert Tree.fromstring(tree).leaves() == line.split()
            assert tree.startswith("(S ") and "(X " in tree
        assert captured.err.splitlines() == [
            "line 2: other: 7 words, the model was made for at most 6",
            f"line 3: {trained}: unknown: Xyzzy; other: unknown: Xyzzy",
        ]
        assert main(["evaluate", f"run=[{trained},other]", "split=valid", "checkpoint=last"]) == 0
        captured = capsys.readouterr()
        printed = dict(line.split() for line in captured.out.splitlines())
        assert list(printed) == [
            f"valid/{f1}_f1_{name}"
            for name in ("ensemble", f"marginals/{trained}", "marginals/other")
            for f1 in ("sentence", "corpus")
        ]
        assert all(0 <= float(f1) <= 100 for f1 in printed.values())
        assert "sentences are left out: other was made for at most 6 words" in captured.err

    def test_one_run_is_an_ensemble_too(
        self, other: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("sentences.txt").write_text("anna saw boris\nthe old king saw anna\n")
        capsys.readouterr()
        assert main(["parse", "run=other", "decode=marginals", "file=sentences.txt"]) == 0
        single = capsys.readouterr().out.splitlines()
        assert main(["parse", "run=[other]", "file=sentences.txt"]) == 0
        unlabelled = capsys.readouterr().out.splitlines()
        for labelled, tree in zip(single, unlabelled, strict=True):
            (own,) = Tree.fromstring(re.sub(r"\(N\d ", "(X ", labelled))
            assert isinstance(own, Tree)
            own.set_label("S")
            assert own == Tree.fromstring(tree)

    def test_other_tasks_and_older_runs_are_refused(
        self, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name, change in (
            ("older", {"ensemble_verbs": None}),
            ("images", {"task": "discrete_vae", "ensemble_verbs": None}),
            ("mine", {"task": "mine", "ensemble_verbs": {"evaluate": "gfnem.run.FilesTracker"}}),
        ):
            shutil.copytree(trained, name)
            config = yaml.safe_load(Path(name, "config.yaml").read_text()) | change
            config = {key: value for key, value in config.items() if value is not None}
            Path(name, "config.yaml").write_text(yaml.safe_dump(config))
        for name, message in (
            ("older", "older (task=grammar) has no ensemble_verbs.evaluate in its config.yaml"),
            ("images", "images (task=discrete_vae) has no ensemble_verbs.evaluate in its"),
            ("mine", f"mine is not of the task of {trained}, so that no evaluate is of both"),
        ):
            assert message in failing(["evaluate", f"run=[{trained},{name}]"], capsys)


def test_a_run_of_an_older_version_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, "older")
    config = yaml.safe_load(Path("older", "config.yaml").read_text())
    del config["model_parts"], config["patterns"]
    Path("older", "config.yaml").write_text(yaml.safe_dump(config))
    for arguments in (["evaluate", "run=older"], ["resume=older"]):
        assert "model_parts is None; it must be a list of groups" in failing(arguments, capsys)
    assert main(["compare", "older", str(trained)]) == 0


class TestGenerate:
    def test_draws_sentences_with_their_trees(
        self, trained: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        capsys.readouterr()
        assert main(["generate", f"run={trained}", "n=5"]) == 0
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        assert len(lines) == 5 or f"{5 - len(lines)} of 5 sentences are missing" in captured.err
        assert lines
        for line in lines:
            sentence, tree = line.split("\t")
            assert Tree.fromstring(tree).leaves() == sentence.split()
            assert 2 <= len(sentence.split()) <= 8
        main(["generate", f"run={trained}", "n=5"])
        assert capsys.readouterr().out == captured.out
        main(["generate", f"run={trained}", "n=5", "seed=7"])
        assert capsys.readouterr().out != captured.out


class TestRulesThatSeeTheParent:
    def test_trains_exactly_parses_and_generates(
        self,
        tiny_data: list[str],
        tiny_run: list[str],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(GrammarEvaluator, "report", lambda *arguments: None)
        options = [*tiny_data, *tiny_run, "model=ncfg", "posterior=exact", "run_dir=ncfg"]
        assert main(options) == 0
        summary = json.loads(Path("ncfg/summary.json").read_text())
        assert summary["test/posterior_gap"] == pytest.approx(0, abs=1e-4)
        assert summary["test/nll_per_token"] > 0
        assert "test/sentence_f1_exact_mbr" in summary
        assert "test/sentence_f1_viterbi" not in summary
        Path("sentences.txt").write_text("anna saw boris\n")
        capsys.readouterr()
        assert main(["parse", "run=ncfg", "file=sentences.txt"]) == 0
        tree = Tree.fromstring(capsys.readouterr().out)
        assert tree.leaves() == ["anna", "saw", "boris"]
        assert re.fullmatch(r"N\d", tree[0].label())  # pyright: ignore
        assert main(["generate", "run=ncfg", "n=3"]) == 0
        capsys.readouterr()
        assert main(["parse", "run=ncfg", "file=sentences.txt", "decode=viterbi"]) == 0
        assert Tree.fromstring(capsys.readouterr().out).leaves() == ["anna", "saw", "boris"]

    @pytest.mark.parametrize("policy", ["root_flow", "light", "transformer"])
    def test_trains_with_a_policy_over_forests(
        self, policy: str, tiny: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(GrammarEvaluator, "report", lambda *arguments: None)
        options = ["model=ncfg", f"policy={policy}", "latent=labelled", "run_dir=forest"]
        more = ["refinement=back_and_forth", "objective=subtb", "posterior.sleep=1.0"]
        assert main([*tiny, *options, *more]) == 0
        summary = json.loads(Path("forest/summary.json").read_text())
        assert summary["test/posterior_gap"] > 0

    @pytest.mark.parametrize("latent", ["shape", "labelled"])
    def test_trains_with_a_chart(
        self, latent: str, tiny: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(GrammarEvaluator, "report", lambda *arguments: None)
        options = ["model=ncfg", "policy=chart", f"latent={latent}", "run_dir=chart"]
        more = ["refinement=back_and_forth", "objective=subtb", "posterior.sleep=1.0"]
        assert main([*tiny, *options, *more]) == 0
        summary = json.loads(Path("chart/summary.json").read_text())
        # Of a grammar that has hardly learned, the relaxation is close to exact.
        assert abs(summary["test/posterior_gap"]) < 0.1
        assert summary["test/iw_nll_per_token"] == pytest.approx(
            summary["test/nll_per_token"], abs=0.01
        )
        assert state_of(Path("chart"), "last")["posterior"]["policy.usage"].sum() > 0


class TestTreePrior:
    def test_is_learned_from_shapes_and_annealed_across_a_stop(
        self,
        tiny: list[str],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(GrammarEvaluator, "report", lambda *arguments: None)
        trees = "(S (N kings) (V (V saw) (N cats)))\n(S (D the) (J old) (N king) (V slept))\n"
        Path("trees.txt").write_text(10 * trees)
        shapes = ["task=tree_prior", "data=bracketed_shapes", "data.trees.train=trees.txt"]
        small = ["device=cpu", "model.width=4", "em.m_steps=4", "em.log_every=1"]
        few = ["posterior=mcmc", "posterior.steps=2", "posterior.burn_in=5", "run_dir=shapes"]
        assert main([*shapes, *small, *few]) == 0
        summary = json.loads(Path("shapes/summary.json").read_text())
        assert summary["test/pseudo_nll"] > 0
        assert Path("shapes/plots/learning_curves.png").exists()
        assert main(["evaluate", "run=shapes", "split=valid"]) == 0
        assert "split is 'tset'" in failing(["evaluate", "run=shapes", "split=tset"], capsys)
        learned = ["tree_prior=learned", "tree_prior.energy.run=shapes"]
        heated = ["annealing=linear", "final_temperature=3", "horizon=4"]
        options = [*learned, "tree_prior.energy.width=4", *(f"tree_prior.{h}" for h in heated)]
        assert main([*tiny, *options, "run_dir=whole"]) == 0
        assert main([*tiny, *options, "run_dir=parts", "em.m_steps=2"]) == 0
        # Whatever becomes of the run that it was learned in.
        Path("shapes").rename("elsewhere")
        assert main(["resume=parts", "em.m_steps=4"]) == 0
        for which in ("model", "posterior"):
            whole, parts = (state_of(Path(run), "last")[which] for run in ("whole", "parts"))
            assert_same(whole, parts)
        temperatures = [
            line["prior/temperature"]
            for line in read_metrics(Path("whole"))
            if "prior/temperature" in line
        ]
        assert temperatures[-1] in (2.0, 2.5, 3.0)
        assert len(set(temperatures)) > 1
        summary = json.loads(Path("whole/summary.json").read_text())
        assert "test/free_energy" in summary
        assert "test/posterior_gap" not in summary
        capsys.readouterr()
        assert main(["generate", "run=whole", "n=2"]) == 0
        assert "drawn from the grammar alone, without its tree prior" in capsys.readouterr().err
        refused = failing(["evaluate", "run=whole", "tree_prior.strength=2"], capsys)
        assert "tree_prior.strength=2: it means nothing to evaluate" in refused


class TestCompare:
    def test_puts_runs_beside_each_other(
        self,
        trained: Path,
        tiny: list[str],
        no_report: None,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        exact = [option for option in tiny if option not in GFLOWNET]
        assert main([*exact, "posterior=exact", "run_dir=runs/exact"]) == 0
        other = Path("runs/exact").rename("runs/lr=1")  # not an option
        tracker = ["tracker=wandb", "tracker.mode=disabled", "tracker.tags=[a]"]
        capsys.readouterr()
        options = ["metrics=test/nll_per_token,time/*", "out=report", *tracker]
        assert main(["compare", str(trained.parent), str(other), *options]) == 0
        head, *rows, last = capsys.readouterr().out.splitlines()
        assert head.split() == ["posterior", "seeds", "test/nll_per_token", "time/seconds"]
        for run, row, name in zip(
            (trained, other), rows, ("GFlowNetPosterior", "ExactPosterior"), strict=True
        ):
            nll = json.loads((run / "summary.json").read_text())["test/nll_per_token"]
            assert row.split()[:3] == [name, "1", f"{nll:.3f}"]
        assert last == "written to report"
        assert (Path("report") / "curves.png").exists()


class TestHelp:
    def test_lists_groups_and_comes_without_torch(self, root: Path) -> None:
        code = (
            "import sys; from gfnem.app.main import main; main(['--help']);"
            "assert not {'torch', 'gfn', 'wandb', 'nltk', 'hydra'} & set(sys.modules)"
        )
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        verbs = ("parse", "generate", "evaluate", "resume", "compare")
        for word in (*verbs, "back_and_forth", "root_flow"):
            assert word in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 100

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"gfnem {gfnem.__version__}\n"

    def test_module(self, root: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-m", "gfnem", "--frob"], env=environment, capture_output=True
        )
        assert done.returncode == 2
        assert done.stderr == b"gfnem: there is no flag --frob: see gfnem --help\n"


MISTAKES = [
    (["em.typo=1"], "em.typo is no option of this configuration"),
    (["+em.typo=1"], "em.typo is no option of gfnem.em.EM"),
    (["+typo=1"], "+typo=1: only options of data, model"),
    (["seed=0", "~seed"], "~seed: options can be changed, not removed"),
    (["~seed=0"], "~seed=0: options can be changed, not removed"),
    (["hydra.run.dir=x"], "hydra.run.dir=x has no effect: run_dir says where"),
    (["policy=nosuch"], "policy=nosuch: policy is one of chart, grid, light, mixture, root_flow"),
    (["refinement=null"], "refinement=null: did you mean none? refinement is one of"),
    (["=3"], "'=3' is not of the form key=value"),
    (["em.m_steps=[1"], "'em.m_steps=[1' is not of the form key=value"),
    (["seed=1,2"], "seed=1,2: several values need --multirun"),
    (["seed=${typo}"], "Interpolation key 'typo' not found"),
    (["em=3"], "em=3: only options of it can be set"),
    (["em.m_steps=abc"], "em.m_steps=abc: it must be a whole number"),
    (["em.m_steps=1.5"], "em.m_steps=1.5: it must be a whole number"),
    (["em.m_steps=null"], "em.m_steps=null: it must be a whole number"),
    (["em.m_steps=-1"], "em.m_steps is -1; it must be at least 0"),
    (["model_from=nosuch"], "run directory nosuch does not exist"),
    (["model_from=3"], "model_from=3: it must be text or null"),
    (["em.model_clip=high"], "em.model_clip=high: it must be a number or null"),
    (["seed=abc"], "seed=abc: it must be a whole number"),
    (["threads=0"], "threads is 0; it must be at least 1"),
    (["latent=words"], "latent=words: it must be one of shape, labelled"),
    (["run_dir=3"], "run_dir=3: it must be text"),
    (["objective.loss=huber"], "objective.loss=huber: it must be one of squared, linex,"),
    (["objective=tb_sleep", "objective.parts=3"], "objective.parts=3: it must be a mapping"),
    (["objective=tb_sleep", "objective.weights.tb=-1"], "objective.weights.tb is -1; it must be"),
    (
        ["objective=reverse_kl", "posterior.behaviour.temperature=2.0"],
        "posterior.behaviour has temperature=2.0 and epsilon=0.0; objective=reverse_kl needs",
    ),
    (["posterior.replay=0"], "posterior.replay is 0; it must be at least 1, or null for none"),
    (["policy=transformer", "policy.symbol_dropout=0.1"], "policy.symbol_dropout is no option of"),
    (["local_search=back_and_forth", "local_search.steps=0"], "steps of back_and_forth is 0; it"),
    (["local_search=back_and_forth", "objective=reverse_kl"], "objective=reverse_kl needs plain"),
    (["posterior.behaviour.epsilon=2"], "epsilon is 2; it must lie between 0 and 1"),
    (["posterior.behaviour.epsilon=x"], "posterior.behaviour.epsilon=x: it must be a number"),
    (["optimizer.model.lr=-1"], "optimizer.model: Invalid learning rate: -1"),
    (["+optimizer.model.typo=1"], "optimizer.model.typo is no option of torch.optim.Adam"),
    (["posterior.flow_lr=0.1"], "posterior.flow_lr is no option of this configuration"),
    (["data.batch_size=-1"], "batch_size is -1; it must be at least 1"),
    (["data=bracketed"], "data.train is missing: give it with data.train=..."),
    (["data=bracketed", "data.train=nosuch.ptb"], "nosuch.ptb cannot be read"),
    (["model._target_=no.such.Model"], "model._target_=no.such.Model cannot be imported"),
    (["--config-dir", "nosuch"], "--config-dir nosuch is no folder"),
    (["--frob"], "there is no flag --frob"),
    (["train", "abc"], "'abc' is not of the form key=value"),
    (["frobnicate"], "gfnem frobnicate needs run=DIR"),
    (["evaluate"], "gfnem evaluate needs run=DIR"),
    (["evaluate", "run=nosuch"], "run directory nosuch does not exist"),
    (["evaluate", "-m", "run=nosuch"], "gfnem evaluate takes no flags"),
    (["resume=nosuch"], "run directory nosuch does not exist"),
    (["compare"], "compare needs folders of runs, DIR DIR ..., or wandb=ENTITY/PROJECT"),
    (["compare", "nosuch"], "'nosuch' does not exist: check the path"),
    (["compare", "-m", "nosuch"], "gfnem compare takes no flags"),
    (["compare", "x", "seed=1"], "seed=1: compare takes wandb, metrics, out, reach, tracker, "),
    (["compare", "x", "tracker=no"], "tracker=no: it must be one of files, wandb"),
    (["compare", "x", "tracker.name=x"], "tracker.name=x: it has no effect without tracker=wandb"),
    (["compare", "x", "tracker=wandb", "tracker.mode=on"], "tracker.mode=on is unknown"),
    (["posterior=mcmc", "posterior.moves=???"], "posterior.moves is missing: give it with"),
    (["posterior=mcmc", "posterior.burn_in=-1"], "posterior.burn_in is -1; it must not be"),
    (["posterior=importance", "posterior.proposals=0"], "posterior.proposals is 0; it must be"),
    (["posterior=mcmc", "policy=light"], "policy has no effect with MCMC"),
    (["task=discrete_vae", "tree_prior=depth"], "tree_prior is no option of this"),
    (["tree_prior.strength=2"], "tree_prior.strength is no option of this configuration"),
    (["tree_prior=learned"], "tree_prior.energy.run is missing: give it with"),
    (["tree_prior=learned", "tree_prior.energy.run=no"], "run directory no does not exist"),
    (["tree_prior=depth", "tree_prior.horizon=3"], "tree_prior.horizon is 3, which has no effect"),
    (
        ["tree_prior=depth", "posterior=exact"],
        "ExactPosterior needs a model that is normalised; this NeuralPCFG is not, because it has a "
        "tree_prior: leave that out, or use GFlowNetPosterior or MCMC",
    ),
    (
        ["tree_prior=depth", "posterior.sleep=1"],
        "a sleep phase needs a model that is normalised; this NeuralPCFG is not, because it has a "
        "tree_prior: leave that out, or set sleep to 0",
    ),
    (["+task.typo=1"], "+task.typo=1: only options of data, model"),
    (["model_parts=3"], "model_parts is 3; it must be a list of groups"),
    (["patterns.console=loss"], "patterns.console is loss; it must be a list of patterns"),
    (["task=tree_prior"], "GFlowNetPosterior needs a policy: give one"),
    (["resume=nosuch", "-m"], "resume=DIR does not go with --multirun"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistake(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in failing(arguments, capsys)
    assert os.listdir() == []


WITHOUT_EFFECT = [
    (["policy=light"], "policy has no effect with ExactPosterior"),
    (["objective=vargrad"], "objective has no effect with ExactPosterior"),
    (["objective=tb"], "posterior.flow_lr is no option of gfnem.posteriors.exact.ExactPosterior"),
    (["refinement=weighting"], "refinement has no effect with ExactPosterior"),
    (["local_search=back_and_forth"], "local_search has no effect with ExactPosterior"),
    (["posterior.replay=4"], "posterior.replay is no option of this configuration"),
    (["posterior.sleep=1.0"], "posterior.sleep is no option of this configuration"),
    (["policy.width=8"], "policy.width is no option of this configuration"),
    (["schedule=adaptive"], "schedule has no effect"),
    (["em.posterior_clip=1.0"], "em.posterior_clip has no effect"),
    (["em.max_e_steps=5"], "em.max_e_steps has no effect"),
    (["optimizer.posterior.lr=0.1"], "optimizer.posterior.lr is no option of this configuration"),
]


@pytest.mark.parametrize(("arguments", "message"), WITHOUT_EFFECT)
def test_nothing_is_accepted_and_ignored(
    arguments: list[str],
    message: str,
    tiny_data: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in failing([*tiny_data, "posterior=exact", *arguments], capsys)


MISTAKES_WITH_A_RUN = [
    (["resume=RUN", "seed=3"], "seed=3: a resumed run keeps what it began with"),
    (["resume=RUN", "optimizer.model.lr=0.1"], "a resumed run keeps what it began with"),
    (["resume=RUN", "tree_prior=depth"], "a resumed run keeps what it began with"),
    (["resume=RUN", "tree_prior.strength=2"], "a resumed run keeps what it began with"),
    (["resume=RUN", "patterns.highest=[]"], "a resumed run keeps what it began with"),
    (["resume=RUN", "em.typo=1"], "em.typo is no option of this configuration"),
    (["resume=RUN", "tracker=wandb"], "tracker=wandb: only options of it can be set"),
    (["resume=RUN", "data.max_length=7"], "the data is not what the run began with"),
    (["run_dir=RUN"], "holds a run already"),
    (["resume=RUN", "model_from=RUN"], "a resumed run keeps what it began with"),
    (["evaluate", "run=RUN", "split=tset"], "split is 'tset'; use one of train, valid, test"),
    (["evaluate", "run=RUN", "checkpoint=3"], "checkpoint=3: it must be one of best, last"),
    (["evaluate", "run=RUN", "em.m_steps=3"], "em.m_steps=3: it means nothing to evaluate"),
    (["frobnicate", "run=RUN"], "there is no verb frobnicate for RUN: use evaluate, parse"),
    (["parse", "run=RUN", "file=nosuch.txt"], "file=nosuch.txt cannot be read"),
    (["parse", "run=RUN", "decode=best"], "decode=best: it must be one of mbr, marginals, sample"),
    (["parse", "run=RUN", "samples=[1"], "samples=[1: it must be a whole number"),
    (["parse", "run=RUN", "samples=0"], "samples is 0"),
    (["parse", "run=[]"], "run=[]: several runs are a list of directories, run=[DIR,DIR]"),
    (["parse", "run=[RUN"], "run=[RUN: several runs are a list of directories"),
    (["parse", "run=[RUN,[RUN]]"], "run=[RUN,[RUN]]: several runs are a list of directories"),
    (["parse", "run=[RUN,RUN/.]"], "run=[RUN,RUN/.]: RUN/. is there twice"),
    (["parse", "run=[RUN,nosuch]"], "run directory nosuch does not exist"),
    (["parse", "run=[RUN]", "decode=viterbi"], "decode=viterbi is of one run: several are decoded"),
    (["evaluate", "run=[RUN]", "evaluator.samples=3"], "evaluator.samples=3: it means nothing to"),
    (["frobnicate", "run=[RUN]"], "there is no verb frobnicate for RUN: use evaluate, parse"),
    (["generate", "run=[RUN]"], "RUN (task=grammar) has no ensemble_verbs.generate in its config"),
    (["generate", "run=RUN", "n=0"], "n is 0"),
    (["generate", "run=RUN", "n=many"], "n=many: it must be a whole number"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES_WITH_A_RUN)
def test_mistake_with_a_run(
    arguments: list[str],
    message: str,
    trained: Path,
    tiny: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    given = [argument.replace("RUN", str(trained)) for argument in arguments]
    if given[0].startswith("run_dir"):
        given = [*tiny, *given]
    assert message.replace("RUN", str(trained)) in failing(given, capsys)
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


@pytest.mark.parametrize("part", ["model", "posterior"])
@pytest.mark.parametrize(
    "verb", [["parse", "file=sentences.txt"], ["parse", "file=sentences.txt", "decode=sample"]]
)
def test_weights_that_nothing_can_be_drawn_with(
    part: str, verb: list[str], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("sentences.txt").write_text("anna saw boris\n")
    assert_diverged(verb, part, trained, capsys)


@pytest.mark.parametrize(("verb", "part"), [("generate", "model"), ("evaluate", "posterior")])
def test_other_verbs_that_nothing_can_be_drawn_with(
    verb: str, part: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_diverged([verb], part, trained, capsys)


def assert_diverged(
    verb: list[str], part: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose model or posterior is not finite gives one line and nothing else."""
    shutil.copytree(trained, "diverged")
    state = state_of(Path("diverged"), "best")
    for value in state[part].values():
        if torch.is_tensor(value) and value.is_floating_point():
            value.fill_(torch.nan)
    torch.save(state, "diverged/checkpoints/best.pt")
    capsys.readouterr()
    assert main([verb[0], "run=diverged", *verb[1:]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "gfnem: something is to be drawn with weights that are all zero or not finite: the model "
        "or its posterior has diverged, use another checkpoint or run\n"
    )


def test_full_disk(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments, **options) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "summary.json")

    monkeypatch.setattr("gfnem.em.EM.evaluate", write)
    line = failing(["evaluate", f"run={trained}"], capsys)
    assert line == "gfnem: [Errno 28] No space left on device: 'summary.json'"


def test_full_disk_in_training(
    tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    line = failing([*tiny, "run_dir=run"], capsys)
    assert "No space left on device" in line


def test_text_that_is_not_utf8(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("latin.txt").write_bytes("früh spät".encode("latin-1"))
    assert "latin.txt, line 1: not UTF-8 text" in failing(
        ["parse", f"run={trained}", "file=latin.txt"], capsys
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    assert "device=cuda, but no CUDA device" in failing(["device=cuda"], capsys)


class TestRatePosterior:
    @pytest.fixture
    def rated(self, trained: Path, tiny: list[str], no_report: None) -> Path:
        path = Path("rated")
        options = [f"run_dir={path}", f"model_from={trained}", "em.m_steps=0", "em.max_e_steps=5"]
        assert main([*tiny, "experiment=rate_posterior", "em.max_seconds=null", *options]) == 0
        return path

    def test_leaves_the_model_as_it_is(self, trained: Path, rated: Path) -> None:
        assert_same(state_of(trained, "best")["model"], state_of(rated, "last")["model"])
        summary = json.loads((rated / "summary.json").read_text())
        assert (summary["train/m_steps"], summary["train/e_steps"]) == (0, 5)
        assert {"train/posterior_gap", "test/posterior_gap", "valid/posterior_gap"} <= set(summary)

    def test_model_of_another_size(
        self, trained: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = failing([*tiny, f"model_from={trained}", "model.nonterminals=5"], capsys)
        assert line.endswith(
            "is not of this kind and size: choose the data, the model and its options as there"
        )

    def test_needs_a_model(self, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert "model_from" in failing([*tiny, "experiment=rate_posterior", "em.m_steps=0"], capsys)


class TestObjectives:
    """Studies of objectives: posteriors of models that begin at the truth, and stay there."""

    FEW = {
        "objectives": ["data.train_points=40", "data.valid_points=8", "data.test_points=8"],
        "objectives_grammar": [
            "data.train_sentences=40",
            "data.valid_sentences=8",
            "data.test_sentences=8",
        ],
    }

    @pytest.mark.parametrize("experiment", FEW)
    def test_a_run(self, experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for evaluator in (GrammarEvaluator, MixtureEvaluator):
            monkeypatch.setattr(evaluator, "report", lambda *arguments: None)
        given = [f"experiment={experiment}", *self.FEW[experiment], "em.max_e_steps=4"]
        steps = ["em.evaluate_every=2", "posterior.behaviour.epsilon=0.1", "run_dir=run"]
        assert main([*given, *steps, "device=cpu"]) == 0
        summary = json.loads(Path("run/summary.json").read_text())
        assert (summary["train/m_steps"], summary["train/e_steps"]) == (0, 4)
        assert summary["test/kl_q_p"] > 0 and summary["test/kl_p_q"] > 0
        assert summary["test/modes"] > 1 and summary["train/gradient_noise"] > 0
        first, last = (state_of(Path("run"), which)["model"] for which in ("best", "last"))
        assert_same(first, last)

    def test_a_mixture_that_is_not_the_truth(self, capsys: pytest.CaptureFixture[str]) -> None:
        few = [*self.FEW["objectives"], "model.start=points"]
        assert "model_from=RUN" in failing(["experiment=objectives", *few], capsys)
