from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color

from gfnem.errors import UserError
from gfnem.gradients import gradient_noise
from gfnem.posteriors.exact import ExactPosterior
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.posteriors.mcmc import MCMC, Gibbs
from gfnem.run import Run
from gfnem.tasks.mixture.evaluate import MixtureEvaluator, assignments, ways_of_means
from tests.tasks.mixture.tiny import (
    float64,  # noqa: F401
    log_joint_table,
    make_data,
    make_model,
    make_policy,
    q_tables,
)

pytestmark = pytest.mark.usefixtures("float64")


def test_the_exact_posterior_has_the_likelihood_of_scipy_and_no_gap():
    data, model = make_data(), make_model()
    evaluator = MixtureEvaluator(data, samples=3)
    assert evaluator.selection(model) == "valid/nll"
    metrics = evaluator(model, ExactPosterior(), "test", final=True)
    expected = float(log_joint_table(model, data.test).logsumexp(-1).mean())
    assert metrics == {
        "test/log_likelihood": pytest.approx(expected, abs=1e-6),
        "test/nll": pytest.approx(-expected, abs=1e-6),
        "test/elbo": pytest.approx(expected, abs=1e-6),
        "test/posterior_gap": pytest.approx(0, abs=1e-9),
    }


def test_gap_and_bound_of_a_gflownet_are_those_of_enumeration():
    data, model, policy = make_data(), make_model(), make_policy()
    table = log_joint_table(model, data.test)
    q = torch.tensor([list(of_x.values()) for of_x in q_tables(policy, model, data.test)])
    elbo = float((q * (table - q.log())).sum(-1).mean())
    torch.manual_seed(0)
    metrics = MixtureEvaluator(data, samples=20_000)(model, GFlowNetPosterior(policy), "test")
    spread = float((q * (table - q.log() - elbo) ** 2).sum(-1).mean()) ** 0.5
    error = spread / (len(table) * 20_000) ** 0.5
    assert 20 * error < metrics["test/posterior_gap"]
    assert metrics["test/elbo"] == pytest.approx(elbo, abs=5 * error)
    gap = metrics["test/log_likelihood"] - metrics["test/elbo"]
    assert metrics["test/posterior_gap"] == pytest.approx(gap)


def test_validation_says_where_the_means_are():
    model = make_model(superclusters=2, dimensions=3)
    data = make_data()
    for split in ("train", "valid", "test"):
        x = data.split(split)
        x.values.resize_(len(x), 3)
    metrics = MixtureEvaluator(data)(model, ExactPosterior(), "valid")
    means = {key: value for key, value in metrics.items() if key.startswith("means/")}
    assert means == {
        f"means/{n}_{axis}": float(model.means[n, d])
        for n in range(2)
        for d, axis in enumerate("xy")
    }
    lines: list[Any] = [{"train/m_steps": 1}, metrics, {**metrics, "means/1_y": 7.0}]
    model.start += 1
    ways = ways_of_means(model, lines)
    assert ways[0] == [model.start[0, :2].tolist(), *2 * [model.means[0, :2].tolist()]]
    assert ways[1][2] == [float(model.means[1, 0]), 7.0]


def test_a_fixed_model_is_selected_by_the_gap():
    evaluator = MixtureEvaluator(make_data(), select="posterior_gap")
    metrics = evaluator(make_model(), GFlowNetPosterior(make_policy()), "valid")
    assert evaluator.selection(make_model()) == "valid/posterior_gap"
    assert "valid/posterior_gap" in metrics


def test_divergences_and_noise_are_told_where_they_are_asked_for():
    data, model, policy = make_data(), make_model(), make_policy()
    posterior = GFlowNetPosterior(policy)
    metrics = MixtureEvaluator(data, divergences=True, gradient_e_steps=3)(model, posterior, "test")
    p = log_joint_table(model, data.test).softmax(-1).double()
    q = torch.tensor([list(of_x.values()) for of_x in q_tables(policy, model, data.test)])
    kl = (p * (p / q).log()).sum(-1).mean(), (q * (q / p).log()).sum(-1).mean()
    assert metrics["test/kl_p_q"] == pytest.approx(float(kl[0]), abs=1e-6)
    assert metrics["test/kl_q_p"] == pytest.approx(float(kl[1]), abs=1e-6)
    assert 1 <= metrics["test/modes"] < 12 and 0 <= metrics["test/modes_covered"] <= 1
    torch.manual_seed(0)
    expected = gradient_noise(model, posterior, data.train, 3)
    assert expected.keys() == {"gradient_variance", "gradient_noise"}
    assert {f"train/{name}" for name in expected} <= metrics.keys()
    assert metrics["train/gradient_variance"] > 0
    plain = MixtureEvaluator(data)(model, posterior, "test")
    assert metrics.keys() - plain.keys() == {
        *(f"test/{name}" for name in ("kl_p_q", "kl_q_p", "modes", "modes_covered")),
        *(f"train/{name}" for name in expected),
    }


def test_draws_without_weights_have_neither_bound_nor_gap():
    data, model = make_data(), make_model()
    metrics = MixtureEvaluator(data)(model, MCMC(Gibbs()), "test", final=True)
    expected = float(log_joint_table(model, data.test).logsumexp(-1).mean())
    assert metrics == {
        "test/log_likelihood": pytest.approx(expected, abs=1e-6),
        "test/nll": pytest.approx(-expected, abs=1e-6),
    }


@pytest.mark.parametrize(
    "posterior",
    [lambda: GFlowNetPosterior(make_policy()), lambda: MCMC(Gibbs())],
)
def test_report_draws_all_pictures(posterior, tmp_path):
    posterior = posterior()
    run, model = Run.create(tmp_path / "run", {}), make_model()
    evaluator = MixtureEvaluator(make_data())
    run.log(evaluator(model, posterior, "valid"), {"train/m_steps": 1})
    evaluator.report(model, posterior, run)
    pictures = {path.name for path in (run.path / "plots").iterdir()}
    assert pictures == {"learning_curves.png", "assignments.png", "means.png"}


def test_points_are_colored_by_posterior_and_part():
    """Where p(z | x) leaves no doubt, its panels and those of a policy differ as their draws do."""
    data, model = make_data(), make_model()
    with torch.no_grad():
        model.means.mul_(40)
    figure = assignments(model, ExactPosterior(), data.test)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "supercluster of a draw from q(z | x)",
        "supercluster of a draw from p(z | x)",
        "petal of a draw from q(z | x)",
        "petal of a draw from p(z | x)",
    ]
    best = log_joint_table(model, data.test).argmax(-1)
    colors = [np.asarray(axes.collections[0].get_facecolor()) for axes in figure.axes]
    for part, labels in zip(colors[::2], (best // 4, best % 4), strict=True):
        for one, a in zip(part, labels, strict=True):
            for other, b in zip(part, labels, strict=True):
                assert same_color(one, other) == bool(a == b)
    assert (colors[0] == colors[1]).all() and (colors[2] == colors[3]).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"samples": 0}, "evaluator.samples is 0; it must be at least 1"),
        ({"select": "elbo"}, "evaluator.select is 'elbo'; use 'likelihood' or 'posterior_gap'"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"^{message}$"):
        MixtureEvaluator(make_data(), **options)
