"""Every file in conf/ composes, and what it describes can be made and takes a step."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from gfnem.app.build import build, make
from gfnem.app.composition import compose
from gfnem.app.folders import config_folder, groups_in
from gfnem.app.main import main
from gfnem.errors import UserError
from gfnem.posteriors.mean_field import MeanField
from gfnem.tasks.mixture.data import sampled
from gfnem.tasks.mixture.model import starting_at
from tests.tasks.grammar.text.test_brown import write_corpora

GROUPS = groups_in(config_folder())
OF_SWEEPS = ("launcher", "sweeper")
OPTIONS = [
    (group, option)
    for group, options in GROUPS.items()
    for option in options
    if group not in OF_SWEEPS
]
TREE = "(S (NP (DT The) (JJ old) (NN king)) (VP (VBD saw) (NP (DT a) (NN cat))) (. .))\n"
IMAGES = {
    ("task", "discrete_vae"),
    ("model", "discrete_vae"),
    ("policy", "grid"),
    ("optimizer", "adamw"),
    ("posterior", "mean_field"),
    ("posterior", "vq"),
    ("posterior", "fsq"),
    ("refinement", "greedy"),
    ("warm_start", "vq"),
    ("warm_start", "gumbel"),
    ("data", "digits"),
    ("data", "mnist"),
    ("data", "fashion_mnist"),
    ("data", "image_folder"),
    ("experiment", "digits"),
    ("experiment", "rate_encoder"),
    ("experiment", "mnist_small"),
    ("experiment", "mnist_k4"),
    ("experiment", "mnist_k8"),
    ("experiment", "mnist_k10"),
}
MIXTURES = {
    ("task", "mixture"),
    ("model", "mixture"),
    ("policy", "mixture"),
    ("data", "sampled"),
    ("data", "points"),
    ("experiment", "published_mixture"),
    ("experiment", "objectives"),
}
SHAPES = {
    ("task", "tree_prior"),
    ("model", "tree_energy"),
    ("data", "treebank_shapes"),
    ("data", "bracketed_shapes"),
}
# What belongs to the data that the model draws.
DRAWN = {
    ("data", "random_grammar"),
    ("model", "random_pcfg"),
    ("experiment", "objectives_grammar"),
}
# A prior on tree shapes of a second, from the file train.txt.
SHAPE_RUN = [
    "device=cpu",
    "task=tree_prior",
    "posterior=mcmc",
    "posterior.burn_in=2",
    "posterior.steps=1",
    "data=bracketed_shapes",
    "data.trees.train=train.txt",
    "model.width=4",
    "em.m_steps=2",
]
FILES = {"bracketed": 20 * TREE, "text": 20 * "the old king saw a cat\n"}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option(
    group: str,
    option: str,
    tiny_data: list[str],
    tiny_run: list[str],
    tiny_images: list[str],
    tiny_mixture: list[str],
    request: pytest.FixtureRequest,
) -> None:
    overrides = [*tiny_data, *tiny_run, f"{group}={option}"]
    if (group, option) in IMAGES:
        overrides = [*tiny_images, f"{group}={option}", *_image_options(group, option, request)]
    elif (group, option) in MIXTURES:
        overrides = [*tiny_mixture, f"{group}={option}"]
        if option == "points":
            Path("points.csv").write_text(10 * "1,2\n3.5,-4\n")
            overrides.append("data.file=points.csv")
    elif (group, option) in SHAPES:
        Path("train.txt").write_text(FILES["bracketed"])
        folder = request.getfixturevalue("real_data") / "nltk_data"
        given = {
            "bracketed_shapes": ["data.trees.train=train.txt"],
            "treebank_shapes": [f"data.trees.dir={folder}", "data.trees.max_length=5"],
        }
        data = option if group == "data" else "bracketed_shapes"
        overrides = ["device=cpu", "task=tree_prior", "posterior=mcmc", f"{group}={option}"]
        overrides += [f"data={data}", *given[data]]
    elif (group, option) in DRAWN:
        few = [f"data.{split}_sentences=8" for split in ("train", "valid", "test")]
        overrides = ["device=cpu", f"{group}={option}", *few, "policy.width=8"]
        if group == "model":
            overrides.append("data=random_grammar")
    elif (group, option) in (("experiment", "brown"), ("experiment", "grammar_optim")):
        write_corpora(Path())
        overrides = ["device=cpu", *tiny_run, f"{group}={option}", "data.dir=.", "policy.width=8"]
    elif group == "data" and option != "toy_english":
        overrides = ["device=cpu", *tiny_run, f"data={option}"]
        if option == "brown":
            write_corpora(Path())
            overrides.append("data.dir=.")
        elif option in FILES:
            Path("train.txt").write_text(FILES[option])
            overrides.append("data.train=train.txt")
        elif option == "ptb":
            for number in range(2, 24):
                Path(f"{number:02}").mkdir()
                Path(f"{number:02}", "wsj.mrg").write_text(TREE)
            overrides.append("data.dir=.")
        else:
            folder = "nltk_data" if option == "treebank" else option
            real_data = request.getfixturevalue("real_data")
            overrides += [f"data.dir={real_data / folder}", "data.max_length=5"]
    if (group, option) == ("policy", "chart"):
        overrides.append("model=ncfg")
    if option == "rate_posterior":
        main([*tiny_data, *tiny_run, "posterior=exact", "run_dir=model"])
        overrides.append("model_from=model")
    if option in ("learned", "grammar_cfg_prior"):
        Path("train.txt").write_text(FILES["bracketed"])
        main([*SHAPE_RUN, "run_dir=shapes"])
        overrides += ["tree_prior.energy.run=shapes", "tree_prior.energy.width=4"]
    if group == "device":
        overrides.remove("device=cpu")
        if option == "cuda" and not torch.cuda.is_available():
            with pytest.raises(UserError, match="no CUDA device"):
                build(compose(overrides))
            return
    built = build(compose(overrides))
    em = built.em
    (x, *_) = em.data.train_batches(0)
    x = x.to(em.device)
    loss = em.posterior.e_step(em.model, x).loss
    if loss is not None:
        loss.backward()
        assert loss.isfinite()
    latents = em.posterior.sample(em.model, x, 2)
    assert em.posterior.expected_log_joint(em.model, x, latents).isfinite().all()
    make(built.config["tracker"]).start(Path(), {})


def _image_options(group: str, option: str, request: pytest.FixtureRequest) -> list[str]:
    """What an option of the discrete VAE needs beside itself."""
    if option == "gumbel":
        return ["posterior=mean_field"]
    if option == "image_folder":
        for number in range(10):
            Image.new("RGB", (8, 8), (25 * number, 0, 0)).save(f"{number}.png")
        return ["data.dir=.", "data.height=8", "data.width=8", "model.grid=[2,2]"]
    if "mnist" in option:
        # The smallest file that is one: Fashion-MNIST itself is not at hand.
        for name in ("train", "t10k"):
            content = struct.pack(">4I", 0x803, 6, 28, 28) + bytes(6 * 28 * 28)
            Path(f"{name}-images-idx3-ubyte").write_bytes(content)
        return ["data.dir=.", "data.valid_images=2"]
    return []


@pytest.mark.parametrize("objective", GROUPS["objective"])
@pytest.mark.parametrize("task", ["tiny_images", "tiny_mixture"])
def test_objectives_are_of_all_tasks(
    objective: str, task: str, request: pytest.FixtureRequest
) -> None:
    """The grammar has every option of a group above."""
    em = build(compose([*request.getfixturevalue(task), f"objective={objective}"])).em
    (x, *_) = em.data.train_batches(0)
    step = em.posterior.e_step(em.model, x)
    assert step.loss is not None and step.loss.isfinite()
    step.loss.backward()
    # What the data suggests beside objectives that have a sleep phase of their own.
    asleep = {"sleep", "wake_sleep", "tb_sleep"}
    assert em.posterior.sleep == (0.0 if objective in asleep else 1.0)


def test_every_option_is_composed_with_its_task() -> None:
    assert set(OPTIONS) >= IMAGES | MIXTURES | SHAPES | DRAWN


def test_what_mean_field_is_depends_on_the_task(
    tiny_images: list[str], tiny_mixture: list[str]
) -> None:
    of_images = compose([*tiny_images, "posterior=mean_field"]).posterior
    assert of_images._target_ == "gfnem.tasks.discrete_vae.mean_field.MeanField"
    # The task may be an experiment's, too.
    assert compose(["experiment=digits", "posterior=mean_field"]).posterior == of_images
    em = build(compose([*tiny_mixture, "posterior=mean_field"])).em
    assert isinstance(em.posterior, MeanField)
    (x,) = em.data.train_batches(0)
    assert em.posterior.expected_log_joint(em.model, x).isfinite().all()
    with pytest.raises(UserError, match="^task=grammar has no such posterior: choose another one$"):
        compose(["posterior=mean_field"])
    for ignored in ("policy=mixture", "refinement=weighting", "schedule=adaptive"):
        part = ignored.partition("=")[0]
        with pytest.raises(UserError, match=f"^{ignored} has no effect: this run has no {part}$"):
            compose([*tiny_mixture, "posterior=mean_field", ignored])
    compose([*tiny_mixture, "posterior=mean_field", "refinement=none"])


@pytest.mark.parametrize("ignored", ["optimizer.model.lr=0.1", "em.model_clip=1"])
def test_options_of_gradients_that_no_m_step_follows_are_refused(
    ignored: str, tiny_mixture: list[str]
) -> None:
    message = f"^{ignored} has no effect: M-steps go to the maximum at once; set posterior.m_step="
    with pytest.raises(UserError, match=message):
        compose([*tiny_mixture, ignored])
    compose([*tiny_mixture, ignored, "posterior.m_step=gradient"])


@pytest.mark.parametrize("task", ["grammar", "discrete_vae", "mixture"])
def test_how_chains_move_depends_on_the_task(task: str) -> None:
    moves = {
        "grammar": "gfnem.tasks.grammar.policies.moves.Rotations",
        "discrete_vae": "gfnem.tasks.discrete_vae.moves.CodeGibbs",
        "mixture": "gfnem.posteriors.mcmc.Gibbs",
    }
    config = compose([f"task={task}", "posterior=mcmc"])
    assert config.posterior.moves._target_ == moves[task]
    assert config.get("policy") is None


@pytest.mark.parametrize("posterior", ["gflownet", "exact", "mean_field", "mcmc", "importance"])
@pytest.mark.parametrize("start", ["normal", "points"])
def test_the_same_seed_starts_every_posterior_at_the_same_means(
    posterior: str, start: Any, tiny_mixture: list[str]
) -> None:
    given = [*tiny_mixture, "seed=3", f"model.start={start}"]
    model: Any = build(compose([*given, f"posterior={posterior}"])).em.model
    torch.manual_seed(3)
    assert model.means.equal(starting_at(sampled(), start=start).means)


def test_defaults_are_the_toy_experiment() -> None:
    plain, toy = (OmegaConf.to_container(compose(given)) for given in ([], ["experiment=toy"]))
    assert plain == toy


def test_command_line_wins_over_data_and_experiment() -> None:
    config = compose(["experiment=treebank", "data=toy_english", "em.m_steps=7"])
    assert config.data._target_.endswith("toy_english")
    assert config.em.m_steps == 7
    config = compose(["data=treebank", "model.nonterminals=5"])
    assert (config.model.nonterminals, config.model.preterminals) == (5, 60)


@pytest.mark.parametrize("data", ["treebank", "gum", "ptb"])
@pytest.mark.parametrize("experiment", ["grammar_cfg", "grammar_ncfg"])
def test_grammars_of_all_treebanks(experiment: str, data: str) -> None:
    baselines = (
        ["posterior=exact"],
        ["posterior=exact", "posterior.m_step=sample"],
        ["posterior=mcmc"],
        ["posterior=gflownet"],
    )
    for posterior in baselines:
        config = compose([f"experiment={experiment}", f"data={data}", *posterior])
        assert config.data._target_ == compose([f"data={data}"]).data._target_
        assert (config.model.nonterminals, config.model.preterminals) == (30, 60)
        assert config.model._target_.endswith("NCFG" if experiment == "grammar_ncfg" else "PCFG")


def test_experiments_say_how_the_e_step_draws() -> None:
    posterior = compose(["experiment=published_grammar"]).posterior
    assert (posterior.sleep, posterior.behaviour.temperature) == (1.0, 1.1)
    posterior = compose(["experiment=published_grammar", "posterior.sleep=0.5"]).posterior
    assert posterior.sleep == 0.5


def test_latent_reaches_model_and_policy(tiny_data: list[str], tiny_run: list[str]) -> None:
    config = build(compose([*tiny_data, *tiny_run, "latent=labelled"])).config
    assert config["model"]["latent"] == config["policy"]["latent"] == "labelled"


def test_every_option_says_what_it_is() -> None:
    assert all(comment for options in GROUPS.values() for comment in options.values())


def test_numbers_that_slow_a_cpu_down_are_zero(tiny_data: list[str], tiny_run: list[str]) -> None:
    torch.set_flush_denormal(False)
    tiny = torch.tensor(1e-39)
    assert tiny / 2 > 0
    build(compose([*tiny_data, *tiny_run]))
    assert tiny / 2 == 0
