from __future__ import annotations

from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor

from gfnem.errors import UserError
from gfnem.latents import EStep, Latents
from gfnem.posterior import Posterior
from gfnem.posteriors.exact import ExactPosterior
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.posteriors.importance import ImportancePosterior
from gfnem.posteriors.mcmc import MCMC
from gfnem.run import Run
from gfnem.tasks.discrete_vae.codes import Codes
from gfnem.tasks.discrete_vae.evaluate import (
    DiscreteVAEEvaluator,
    most_likely,
    posterior_samples,
)
from gfnem.tasks.discrete_vae.images import ImageData, Images
from gfnem.tasks.discrete_vae.moves import CodeGibbs
from gfnem.tasks.discrete_vae.vector_quantized import VectorQuantized
from tests.tasks.discrete_vae.tiny import (
    all_grids,
    float64,
    images,
    log_joint_table,
    log_reconstruction,
    make_model,
    make_policy,
    q_table,
)

__all__ = ["float64"]
pytestmark = pytest.mark.usefixtures("float64")

EXACT = {
    "exact_nll",
    "elbo",
    "posterior_gap",
    "reconstruction_nll",
    "distinct_codes",
    "bits_per_dim",
    "codebook_perplexity",
    "codebook_usage",
}
SAMPLED = {"nll", "nll_samples", "proposal_temperature", "effective_samples"}
FINAL = {"nll_at_temperature_1"}


def make_data(test: int = 6) -> ImageData:
    return ImageData(images(9, seed=1), images(7, seed=2), images(test, seed=3), "binary")


def gflownet(**options: Any) -> Any:
    return GFlowNetPosterior(make_policy(**options))


def large_model() -> Any:
    """More grids than are enumerated."""
    return make_model(grid=(4, 4))


class Fixed(Posterior):
    """The same grids for every image, of weight one; remembers what it was asked."""

    def __init__(self, index: list[list[int]]):
        super().__init__()
        self.index = torch.tensor(index)
        self.ids: list[int] = []
        self.modes: set[bool] = set()

    def e_step(self, model, x) -> EStep:
        raise NotImplementedError

    def sample(self, model, x: Images, samples: int) -> Latents:
        self.ids += x.ids.tolist()
        self.modes.add(self.training)
        assert samples == len(self.index)
        return Latents(Codes(self.index.expand(len(x), -1, -1)), torch.zeros(len(x), samples))


def named(split: str, *groups: set[str]) -> set[str]:
    return {f"{split}/{name}" for group in groups for name in group}


def test_metrics_of_a_gflownet_on_a_model_that_can_be_enumerated():
    evaluator = DiscreteVAEEvaluator(make_data(), samples=3, nll_samples=5)
    metrics = evaluator(make_model(), gflownet(), "valid")
    assert set(metrics) == named("valid", EXACT, SAMPLED)
    assert evaluator.selection(make_model()) == "valid/exact_nll"
    assert metrics["valid/nll_samples"] == 3
    metrics = evaluator(make_model(), gflownet(), "test", final=True)
    of_training = {"exact_nll", "nll", "posterior_gap"}
    assert set(metrics) == named("test", EXACT, SAMPLED, FINAL) | named("train", of_training)
    assert metrics["test/nll_samples"] == 5


def test_metrics_of_a_gflownet_on_a_model_that_is_too_large():
    data = make_data()
    evaluator = DiscreteVAEEvaluator(data, samples=2, nll_samples=3)
    posterior = gflownet(grid=(4, 4))
    metrics = evaluator(large_model(), posterior, "test", final=True)
    unknown = {"exact_nll", "posterior_gap"}
    assert set(metrics) == named("test", EXACT - unknown, SAMPLED, FINAL) | {"train/nll"}
    assert evaluator.selection(large_model()) == "valid/nll"
    assert metrics["test/bits_per_dim"] == pytest.approx(metrics["test/nll"] / 16 / log(2))


def test_the_exact_posterior_has_the_exact_likelihood_and_no_gap():
    data, model = make_data(), make_model()
    table = log_joint_table(model, data.test)
    evaluator = DiscreteVAEEvaluator(data, samples=3)
    metrics = evaluator(model, ExactPosterior(), "test", final=True)
    assert set(metrics) == named("test", EXACT) | {"train/exact_nll", "train/posterior_gap"}
    nll = -float(table.logsumexp(-1).mean())
    assert metrics["test/exact_nll"] == pytest.approx(nll, abs=1e-10)
    assert metrics["test/bits_per_dim"] == pytest.approx(nll / 16 / log(2))
    assert metrics["test/elbo"] == pytest.approx(-nll, abs=1e-10)
    assert metrics["test/posterior_gap"] == pytest.approx(0, abs=1e-10)
    assert metrics["train/posterior_gap"] == pytest.approx(0, abs=1e-10)
    nll = -float(log_joint_table(model, data.train).logsumexp(-1).mean())
    assert metrics["train/exact_nll"] == pytest.approx(nll, abs=1e-10)
    grids = all_grids()[table.argmax(-1)]
    right = [log_reconstruction(model, *pair) for pair in zip(data.test.pixels, grids, strict=True)]
    assert metrics["test/reconstruction_nll"] == pytest.approx(-sum(right) / len(right))


def test_draws_without_weights_have_neither_bound_nor_gap():
    data, model, posterior = make_data(), make_model(), MCMC(CodeGibbs())
    evaluator = DiscreteVAEEvaluator(data, samples=3)
    metrics = evaluator(model, posterior, "test", final=True)
    unknown = {"elbo", "posterior_gap"}
    assert set(metrics) == named("test", EXACT - unknown) | {"train/exact_nll"}
    assert evaluator.selection(model) == "valid/exact_nll"
    nll = -float(log_joint_table(model, data.test).logsumexp(-1).mean())
    assert metrics["test/exact_nll"] == pytest.approx(nll, abs=1e-10)


def test_draws_without_weights_of_a_model_that_is_too_large():
    message = (
        "^MCMC draws without weights, and 3 codes on a grid of 4 x 4 are too many to enumerate, so "
        "no likelihood is known: make the grid smaller or use another posterior$"
    )
    with pytest.raises(UserError, match=message):
        DiscreteVAEEvaluator(make_data())(large_model(), MCMC(CodeGibbs()), "valid")


def test_the_bound_of_resampled_draws_is_the_likelihood_where_no_other_is_known():
    data, posterior = make_data(), ImportancePosterior(proposals=8)
    metrics = DiscreteVAEEvaluator(data)(make_model(), posterior, "test", final=True)
    assert set(metrics) == named("test", EXACT) | {"train/exact_nll", "train/posterior_gap"}
    evaluator = DiscreteVAEEvaluator(data)
    metrics = evaluator(large_model(), posterior, "test", final=True)
    unknown = {"exact_nll", "posterior_gap"}
    assert set(metrics) == named("test", EXACT - unknown, {"nll"}) | {"train/nll"}
    assert metrics["test/nll"] == pytest.approx(-metrics["test/elbo"])
    assert evaluator.selection(large_model()) == "valid/nll"


def test_the_best_of_its_draws_stands_for_a_posterior_without_a_policy():
    model, x = make_model(), images(4)
    index = [[0, 0, 1, 2], [2, 1, 1, 0], [0, 2, 0, 1]]
    grids = [tuple(grid) for grid in all_grids().tolist()]
    table = log_joint_table(model, x)[:, [grids.index(tuple(grid)) for grid in index]]
    best = [[index[chosen]] for chosen in table.argmax(-1).tolist()]
    draws = Codes(torch.tensor(index).expand(4, -1, -1))
    assert most_likely(model, Fixed(index), x, draws).index.tolist() == best
    drawn = most_likely(model, MCMC(CodeGibbs(), burn_in=10), x)
    assert drawn.index.shape == (4, 1, 4)


def test_gap_bound_and_likelihood_are_those_of_enumeration():
    data, model, posterior = make_data(test=3), make_model(), gflownet()
    table = log_joint_table(model, data.test)
    q = torch.tensor([list(of_x.values()) for of_x in q_table(posterior.policy, model, data.test)])
    assert q.sum(-1).tolist() == pytest.approx([1, 1, 1])
    elbo = float((q * (table - q.log())).sum(-1).mean())
    nll = -float(table.logsumexp(-1).mean())
    torch.manual_seed(0)
    evaluator = DiscreteVAEEvaluator(data, samples=20_000, nll_samples=20_000, batch_size=2)
    metrics = evaluator(model, posterior, "test", final=True)
    assert metrics["test/exact_nll"] == pytest.approx(nll, abs=1e-10)
    # The relative variance of an estimate is about one over the effective samples.
    assert 2000 < metrics["test/effective_samples"] <= 20_000
    tolerance = 5 / (3 * metrics["test/effective_samples"]) ** 0.5
    assert metrics["test/nll"] == pytest.approx(nll, abs=tolerance)
    variance = (table.exp() ** 2 / q).sum(-1) / table.exp().sum(-1) ** 2 - 1
    tolerance = 5 * float(variance.sum() / 20_000) ** 0.5 / 3
    assert metrics["test/nll_at_temperature_1"] == pytest.approx(nll, abs=tolerance)
    spread = float((q * (table - q.log() - elbo) ** 2).sum(-1).mean()) ** 0.5
    error = spread / (3 * 20_000) ** 0.5
    assert 5 * error < -nll - elbo, "too few draws to tell the gap from none"
    assert metrics["test/elbo"] == pytest.approx(elbo, abs=5 * error)
    assert metrics["test/posterior_gap"] == pytest.approx(-nll - elbo, abs=5 * error)


def test_reconstruction_and_bound_of_a_deterministic_posterior():
    data, model = make_data(), make_model()
    policy = make_policy(logits="distance", autoregressive=False)
    metrics = DiscreteVAEEvaluator(data, samples=3)(model, VectorQuantized(policy), "valid")
    assert set(metrics) == named("valid", EXACT, SAMPLED, {"deterministic_bound"})
    x = data.valid
    # Factorised: the most likely grid is the most likely one of all.
    best = torch.tensor([list(of_x.values()) for of_x in q_table(policy, model, x)]).argmax(-1)
    grids = all_grids()[best]
    right = [log_reconstruction(model, *pair) for pair in zip(x.pixels, grids, strict=True)]
    joint = log_joint_table(model, x).gather(1, best[:, None])
    assert metrics["valid/reconstruction_nll"] == pytest.approx(-sum(right) / len(right))
    assert metrics["valid/deterministic_bound"] == pytest.approx(-float(joint.mean()))


def test_codes_of_a_hand_worked_case():
    # Of eight codes one half is 0 and a quarter 1; nothing draws 3. Two of three grids are one.
    index = [[0, 0, 1, 2], [0, 0, 1, 2], [0, 2, 0, 1]]
    metrics = DiscreteVAEEvaluator(make_data(), samples=3)(
        make_model(codes=4), Fixed(index), "valid"
    )
    assert metrics["valid/codebook_perplexity"] == pytest.approx(2**1.5)
    assert metrics["valid/codebook_usage"] == 3
    assert metrics["valid/distinct_codes"] == 2
    assert metrics["valid/elbo"] == 0


def test_the_first_images_of_a_split_are_rated():
    evaluator = DiscreteVAEEvaluator(
        make_data(), samples=1, images=3, test_images=2, train_images=5, batch_size=2
    )
    for split, number in (("train", 5), ("valid", 3), ("test", 2)):
        posterior = Fixed([[0, 1, 2, 0]])
        evaluator(make_model(), posterior, split)
        assert posterior.ids == list(range(number))
    evaluator = DiscreteVAEEvaluator(make_data(), samples=1, images=None)
    posterior = Fixed([[0, 1, 2, 0]])
    evaluator(make_model(), posterior, "valid")
    assert posterior.ids == list(range(7))


def test_the_temperature_is_chosen_on_validation_images(monkeypatch):
    asked: list[tuple[Tensor, int]] = []

    def choose(policy, model, x: Images, samples: int) -> float:
        asked.append((x.pixels, samples))
        return 2.0

    monkeypatch.setattr("gfnem.tasks.discrete_vae.evaluate.choose_temperature", choose)
    data = make_data()
    evaluator = DiscreteVAEEvaluator(data, samples=3, nll_samples=5, temperature_images=4)
    metrics = evaluator(make_model(), gflownet(), "test", final=True)
    ((pixels, samples),) = asked
    assert torch.equal(pixels, data.valid.pixels[:4])
    assert samples == 5
    assert metrics["test/proposal_temperature"] == 2


def test_a_fixed_model_is_selected_by_the_gap():
    evaluator = DiscreteVAEEvaluator(make_data(), samples=2, select="posterior_gap")
    metrics = evaluator(make_model(), gflownet(), "valid")
    assert evaluator.selection(make_model()) == "valid/posterior_gap"
    assert "valid/posterior_gap" in metrics
    message = "evaluator.select=posterior_gap: 3 codes on a grid of 4 x 4 are too many to enumer"
    with pytest.raises(UserError, match=message):
        evaluator(large_model(), gflownet(grid=(4, 4)), "valid")


def test_rating_runs_in_evaluation_mode_prints_nothing_and_leaves_the_mode_as_it_was(capsys):
    model, posterior = make_model().eval(), Fixed([[0, 1, 2, 0]])
    DiscreteVAEEvaluator(make_data(), samples=1)(model, posterior, "test", final=True)
    assert posterior.modes == {False}
    assert (model.training, posterior.training) == (False, True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name",
    [
        "samples",
        "nll_samples",
        "images",
        "test_images",
        "train_images",
        "batch_size",
        "temperature_images",
    ],
)
def test_settings_out_of_range_are_refused(name):
    settings: dict[str, Any] = {name: 0}
    with pytest.raises(UserError, match=f"evaluator.{name} is 0; it must be at least 1"):
        DiscreteVAEEvaluator(make_data(), **settings)


def test_an_unknown_selection_is_refused():
    wrong: Any = "elbo"
    message = "evaluator.select is 'elbo'; use 'likelihood' or 'posterior_gap'"
    with pytest.raises(UserError, match=message):
        DiscreteVAEEvaluator(make_data(), select=wrong)


def mcmc() -> Any:
    return MCMC(CodeGibbs(), burn_in=10)


@pytest.mark.parametrize("posterior", [gflownet, ExactPosterior, mcmc])
def test_report_draws_all_pictures(posterior, tmp_path):
    run = Run.create(tmp_path / "run", {})
    run.log({"valid/exact_nll": 2.0}, {"train/m_steps": 1})
    DiscreteVAEEvaluator(make_data(), samples=2).report(make_model(), posterior(), run)
    assert {path.name for path in (run.path / "plots").iterdir()} == {
        "learning_curves.png",
        "reconstructions.png",
        "samples.png",
        "posterior_samples.png",
    }


def test_the_report_shows_the_image_with_most_entropy(monkeypatch, tmp_path):
    data, model = make_data(), make_model(noise=0.5)
    shown = []

    def show(model, posterior, x):
        shown.append(x.ids.tolist())
        return posterior_samples(model, posterior, x)

    monkeypatch.setattr("gfnem.tasks.discrete_vae.evaluate.posterior_samples", show)
    evaluator = DiscreteVAEEvaluator(data, batch_size=2)
    evaluator.report(model, ExactPosterior(), Run.create(tmp_path / "run", {}))
    p = log_joint_table(model, data.test).softmax(-1)
    perplexity = [exp(-sum(v * log(v) for v in row if v > 0)) for row in p.tolist()]
    assert shown == [[perplexity.index(max(perplexity))]]


def test_draws_of_the_exact_posterior_stand_under_those_of_another():
    model, x = make_model(), images(1)
    for posterior, rows in ((gflownet(), 2), (mcmc(), 2), (ExactPosterior(), 1)):
        (axes,) = posterior_samples(model, posterior, x).axes
        assert len(axes.texts) == rows
        assert len(axes.images) == 16 * rows


def test_the_report_of_draws_shows_the_image_whose_draws_differ_most(monkeypatch, tmp_path):
    class Sure(ImportancePosterior):
        """Of every image but the third."""

        def sample(self, model, x: Images, samples: int) -> Latents:
            index = torch.arange(samples)[None, :, None].expand(len(x), -1, 4) % 2
            return Latents(Codes(index * (x.ids == 2)[:, None, None]), torch.zeros(len(x), samples))

    shown = []

    def show(model, posterior, x):
        shown.append(x.ids.tolist())
        return posterior_samples(model, posterior, x)

    monkeypatch.setattr("gfnem.tasks.discrete_vae.evaluate.posterior_samples", show)
    evaluator = DiscreteVAEEvaluator(make_data(), batch_size=2)
    evaluator.report(make_model(), Sure(), Run.create(tmp_path / "run", {}))
    assert shown == [[2]]
