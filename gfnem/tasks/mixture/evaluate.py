"""How good a mixture and its posterior are: likelihood, bound and gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from gfnem import divergences
from gfnem.errors import UserError
from gfnem.gradients import gradient_noise
from gfnem.inference import device_of, inference
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.tasks.mixture.data import PointData, Points
from gfnem.tasks.mixture.model import HierarchicalMixture
from gfnem.training.parts import Metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gfnem.run import Run

PANELS: Mapping[str, tuple[str, ...]] = {
    "Log-likelihood (nats)": ("valid/log_likelihood",),
    "Evidence lower bound (nats)": ("valid/elbo",),
    "Posterior gap (nats)": ("valid/posterior_gap",),
    "E-step loss": ("train/e_loss*", "schedule/*"),
    "M-step loss": ("train/m_loss*",),
    "Effective samples": ("e_step/effective_samples",),
}
"""Panels of a run's learning curves -> the metrics in them."""

AXES = ("x", "y")


class MixtureEvaluator:
    """Likelihood and the posterior's fit, in nats for each point. Metrics are named `split/...`.

    log_likelihood: log p(x), exact.
    nll: the same with the other sign.
    elbo: E_q[log p(x, z) - log q(z | x)]; where the posterior's draws have weights.
    posterior_gap: log p(x) - elbo; where there is one.
    kl_p_q, kl_q_p, modes, modes_covered: see `gfnem.divergences`; with `divergences`.
    train/gradient_variance, train/gradient_noise: of E-steps on the first training batch, see
        `gfnem.gradients`; with `gradient_e_steps`.

    Evaluations on the validation split also say where the superclusters are, in the first two
    dimensions: `means/0_x`, `means/0_y`, `means/1_x`, ...

    data: what to rate on.
    samples: draws of q for each point.
    select: what is minimised on the validation split: "likelihood" (nll) or "posterior_gap", for a
        model that is not trained.
    divergences: whether to list q(z | x) of every z.
    gradient_e_steps: E-steps whose gradients are compared; None for none.
    """

    def __init__(
        self,
        data: PointData,
        samples: int = 16,
        select: Literal["likelihood", "posterior_gap"] = "likelihood",
        divergences: bool = False,
        gradient_e_steps: int | None = None,
    ):
        if samples < 1:
            raise UserError(f"evaluator.samples is {samples}; it must be at least 1")
        if select not in ("likelihood", "posterior_gap"):
            raise UserError(f"evaluator.select is {select!r}; use 'likelihood' or 'posterior_gap'")
        self.data = data
        self.samples = samples
        self.divergences = divergences
        self.gradient_e_steps = gradient_e_steps
        self.select = select

    def __call__(
        self, model: LatentVariableModel, posterior: Posterior, split: str, final: bool = False
    ) -> Metrics:
        assert isinstance(model, HierarchicalMixture)
        x = self.data.split(split).to(device_of(model))
        with inference(model, posterior):
            log_likelihood = float(model.log_likelihood(x).double().mean())
            log_weights = posterior.sample(model, x, self.samples).log_weights
            exact = divergences.rate(model, posterior, x) if self.divergences else {}
        metrics = {f"{split}/log_likelihood": log_likelihood, f"{split}/nll": -log_likelihood}
        if log_weights is not None:
            elbo = float(log_weights.double().mean())
            metrics |= {f"{split}/elbo": elbo, f"{split}/posterior_gap": log_likelihood - elbo}
        metrics |= {f"{split}/{name}": float(values.mean()) for name, values in exact.items()}
        if self.gradient_e_steps is not None:
            batch = self.data.train_batches(0)[0].to(device_of(model))
            of_gradients = gradient_noise(model, posterior, batch, self.gradient_e_steps)
            metrics |= {f"train/{name}": value for name, value in of_gradients.items()}
        if split == "valid":
            for number, mean in enumerate(model.means[:, :2].tolist()):
                metrics |= {f"means/{number}_{a}": v for a, v in zip(AXES, mean, strict=True)}
        return metrics

    def selection(self, model: LatentVariableModel) -> str:
        return "valid/nll" if self.select == "likelihood" else "valid/posterior_gap"

    def report(self, model: LatentVariableModel, posterior: Posterior, run: Run) -> None:
        """Learning curves, the test points with their components, and the means on their way."""
        from gfnem.run.plots import learning_curves, paths

        assert isinstance(model, HierarchicalMixture)
        metrics = run.metrics()
        run.add_figure("learning_curves", learning_curves(metrics, PANELS))
        test = self.data.test.to(device_of(model))
        run.add_figure("assignments", assignments(model, posterior, test))
        ways = ways_of_means(model, metrics)
        run.add_figure("means", paths(self.data.train.values[:, :2], [("", ways)]))


def assignments(model: HierarchicalMixture, posterior: Posterior, x: Points) -> Figure:
    """Points in their first two dimensions, colored by the supercluster and by the petal of a draw
    from q(z | x), and beside them of one from p(z | x).
    """
    from gfnem.run.plots import labelled_points

    with inference(model, posterior):
        drawn = {
            "q(z | x)": posterior.sample(model, x, 1).z,
            "p(z | x)": model.sample_posterior(x, 1),
        }
    centers = model.means[:, :2].detach()
    panels = [
        (f"{part} of a draw from {name}", getattr(z, part)[:, 0], centers)
        for part in ("supercluster", "petal")
        for name, z in drawn.items()
    ]
    return labelled_points(x.values[:, :2], panels)


def ways_of_means(
    model: HierarchicalMixture, metrics: Sequence[Mapping[str, float]]
) -> list[list[list[float]]]:
    """Where each supercluster was at the start of a run and at its evaluations, in order."""
    rated = [line for line in metrics if "means/0_x" in line]
    return [
        [start, *([line[f"means/{number}_{axis}"] for axis in AXES] for line in rated)]
        for number, start in enumerate(model.start[:, :2].tolist())
    ]
