"""What EM learns, and what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.latents import EStep, Latents
from gfnem.model import ClosedFormModel, LatentVariableModel
from gfnem.posteriors.exact import ExactPosterior
from gfnem.run import Run
from gfnem.schedule import Alternation
from tests.training.tiny import (
    COMPONENTS,
    COUNTS,
    ENTROPY,
    SYMBOLS,
    Joint,
    Mixture,
    Rater,
    Symbols,
    Table,
    Told,
    Urn,
    curve,
    everything,
    fast,
    parameters,
    same,
)


def test_exact_em_climbs_to_the_maximum_of_the_likelihood(run: Run) -> None:
    data = Urn(batch_size=sum(COUNTS))
    descent = partial(torch.optim.SGD, lr=1.0)  # Adam overshoots
    em = EM(
        Mixture(), ExactPosterior(), data, 300, model_optimizer=descent, evaluator=Rater(),
        evaluate_every=20, run=run,
    )  # fmt: skip
    summary = em.fit()
    nll = curve(run, "valid/nll")
    assert len(nll) == 15 and nll == sorted(nll, reverse=True)
    assert summary["test/nll"] == pytest.approx(ENTROPY, abs=1e-4)


class Counting(Mixture, ClosedFormModel):
    """Its maximum is where all probabilities are the latents' relative frequencies."""

    def enumerate(self, x: Symbols) -> Latents:
        z = torch.arange(COMPONENTS).expand(len(x.values), -1)
        return Latents(z, None, self.all_log_joints(x).softmax(-1))

    def maximise(self, x: Symbols, latents: Latents) -> None:
        weights = latents.m_step_weights
        if weights is None:
            weights = torch.full(latents.z.shape, 1 / latents.z.shape[1])
        component = nn.functional.one_hot(latents.z, COMPONENTS) * weights[..., None]
        symbol = nn.functional.one_hot(x.values, SYMBOLS).float()
        table = torch.einsum("nsc,nv->cv", component, symbol)
        self.component.copy_(table.sum(1).log())
        self.symbol.copy_(table.log())


def test_exact_em_in_closed_form(run: Run) -> None:
    model, data = Counting(), Urn(batch_size=sum(COUNTS))
    em = EM(
        model, ExactPosterior("closed"), data, 20, evaluator=Rater(), evaluate_every=1,
        log_every=1, run=run,
    )  # fmt: skip
    summary = em.fit()
    # Any mixture whose symbols have the data's frequencies is a maximum, and EM finds one at once.
    assert summary["test/nll"] == pytest.approx(ENTROPY, abs=1e-5)
    nll, loss = curve(run, "valid/nll"), curve(run, "train/m_loss")
    assert len(nll) == len(loss) == 20
    x = everything()
    with torch.no_grad():
        every = model.enumerate(x)
        expected = -every.mean(model.log_joint(x, every.z)).mean()
    assert loss[-1] == pytest.approx(float(expected), abs=1e-5)
    assert em.steps.model_trainer.optimizer.state_dict()["state"] == {}


def test_learned_posterior_goes_to_the_maximum_of_its_draws() -> None:
    class Closed(Table):
        @property
        def closed_m_step(self) -> bool:
            return True

    torch.manual_seed(0)
    model, posterior = Counting(), Closed()
    EM(model, posterior, Urn(batch_size=sum(COUNTS)), 1, schedule=Alternation(2, 1)).fit()
    z = posterior.events[-1][2].z
    (x,) = Urn(batch_size=sum(COUNTS)).train_batches(1)
    frequency = torch.zeros(COMPONENTS, SYMBOLS)
    for value, drawn in zip(x.values.tolist(), z.tolist(), strict=True):
        for component in drawn:
            frequency[component, value] += 0.5
    torch.testing.assert_close(model.symbol.exp(), frequency)


def test_closed_form_needs_a_model_that_has_one() -> None:
    message = (
        "^posterior.m_step=closed needs a model that knows its maximum; Mixture does not: take"
    )
    with pytest.raises(UserError, match=message):
        EM(Mixture(), ExactPosterior("closed"), Urn(), 1)


def test_learned_posterior_takes_the_model_there_too() -> None:
    model, posterior = Mixture(), Table(dropout=0)
    data = Urn(batch_size=sum(COUNTS))
    em = EM(
        model, posterior, data, 250, schedule=Alternation(3, 1), evaluator=Rater(),
        model_clip=None, **fast(0.05),
    )  # fmt: skip
    summary = em.fit()
    assert ENTROPY - 1e-5 < summary["test/nll"] < ENTROPY + 0.02
    x = everything()
    with torch.no_grad():
        exact = model.all_log_joints(x).log_softmax(-1)
        gap = (posterior.log_q(x).exp() * (posterior.log_q(x) - exact)).sum(-1).mean()
    assert gap < 0.02


def test_posterior_gap_is_logged_whatever_batch_has_the_e_step(run: Run) -> None:
    """Every second batch is without an E-step, and so is every one that ends a window."""
    posterior = Table()
    model = Mixture()
    first = Urn().train_batches(0)[0]
    log_likelihood = model.log_likelihood(first).detach()
    EM(model, posterior, Urn(), 12, schedule=Alternation(1, 2), log_every=2, run=run).fit()
    gaps = curve(run, "train/posterior_gap")
    assert len(gaps) == 6
    log_weights = posterior.events[0][2].log_weights
    assert gaps[0] == pytest.approx(float((log_likelihood[:, None] - log_weights).mean()))


class Annealed(Mixture):
    """Not normalised, and moved by how many M-steps there were."""

    normalised = False  # pyright: ignore

    def m_step_done(self, m_steps: int) -> None:
        self.seen = [*getattr(self, "seen", []), m_steps]

    def metrics(self) -> dict[str, float]:
        return {"prior/temperature": float(len(getattr(self, "seen", [])))}


def test_the_model_is_told_of_m_steps_and_has_figures_of_its_own(run: Run) -> None:
    """Without a gap, whose log p(x) is not the sum of its joint."""
    model = Annealed()
    EM(model, Table(), Urn(), 6, log_every=2, run=run).fit()
    assert model.seen == [1, 2, 3, 4, 5, 6]
    assert curve(run, "prior/temperature") == [2, 4, 6]
    assert curve(run, "train/posterior_gap") == []
    joint = Annealed()
    EM(joint, Joint(), Urn(), 3).fit()
    assert joint.seen == [1, 2, 3]


def test_lines_are_means_since_the_line_before(run: Run) -> None:
    losses = []

    class Noting(Table):
        def e_step(self, model: LatentVariableModel, x: Symbols) -> EStep:
            estep = super().e_step(model, x)
            assert estep.loss is not None
            losses.append(estep.loss.item())
            return estep

    EM(Mixture(), Noting(), Urn(), 7, log_every=3, run=run).fit()
    means = [sum(losses[:3]) / 3, sum(losses[3:6]) / 3]
    assert curve(run, "train/e_loss") == pytest.approx(means)
    assert curve(run, "train/m_steps") == curve(run, "train/e_steps") == [3, 6]
    assert curve(run, "train/skipped") == [0, 0]


def test_same_seed_same_numbers_and_no_seed_no_reseeding() -> None:
    def fit(seed: int | None) -> list[Tensor]:
        em = EM(Mixture(), Table(), Urn(), 5, seed=seed)
        em.fit()
        return parameters(em)

    state = torch.get_rng_state()
    EM(Mixture(), Table(), Urn(), 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(fit(1), fit(1))
    assert not same(fit(1), fit(2))
    assert not same(fit(None), fit(None))


def test_posterior_alone(run: Run) -> None:
    rater = Rater()
    em = EM(Mixture(), Table(), Urn(), 0, max_e_steps=7, evaluator=rater, evaluate_every=3, run=run)
    before = parameters(em)
    summary = em.fit()
    assert (summary["train/m_steps"], summary["train/e_steps"]) == (0, 7)
    after = parameters(em)
    assert same(before[:2], after[:2]) and not same(before[2:], after[2:])
    # After 3, 6 and the last of the E-steps.
    assert rater.calls == [("valid", False)] * 3 + [("test", True)]


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_posterior_alone_for_some_time(clock: Any) -> None:
    em = EM(Mixture(), Table(), Urn(), 0, max_seconds=0.05, clock=clock)
    em.fit()
    assert em.done.m_steps == 0 and em.done.e_steps > 1 and 0.05 <= em.done.seconds < 5


def test_posterior_alone_needs_parameters() -> None:
    with pytest.raises(UserError, match="^em.m_steps=0 trains the posterior alone, but it has no"):
        EM(Mixture(), ExactPosterior(), Urn(), 0, max_e_steps=3)


def test_data_without_batches(run: Run, told: Told) -> None:
    class Nothing:
        def train_batches(self, epoch: int) -> list[Symbols]:
            return []

    with pytest.raises(UserError, match="^the training data has no batches"):
        EM(Mixture(), Table(), Nothing(), 5, run=run).fit()
    assert told.ends == ["failed"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"m_steps": -1}, "em.m_steps is -1; it must be at least 0"),
        ({"m_steps": 0}, "em.m_steps=0 trains the posterior alone: say when to stop"),
        ({"max_seconds": -1.0}, "em.max_seconds is -1.0; it must be at least 0"),
        ({"clock": "sun"}, "em.clock is 'sun'; use 'wall' or 'cpu'"),
        ({"max_e_steps": 0}, "em.max_e_steps is 0; it must be at least 1"),
        ({"evaluate_every": 0}, "em.evaluate_every is 0; it must be at least 1"),
        ({"log_every": 0}, "em.log_every is 0; it must be at least 1"),
        ({"checkpoint_minutes": 0.0}, "em.checkpoint_minutes is 0.0; it must be positive"),
        ({"matmul_precision": "low"}, "em.matmul_precision is 'low'; use 'highest', 'high' or 'me"),
        ({"warmup": -1}, "em.warmup is -1; it must be at least 0"),
        ({"model_clip": 0.0}, "em.model_clip is 0.0; it must be positive, or null for none"),
        ({"posterior_clip": -1.0}, "em.posterior_clip is -1.0; it must be positive, or null"),
    ],
)
def test_options_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"m_steps": 1} | wrong
    with pytest.raises(UserError, match=f"^{message}"):
        EM(Mixture(), Table(), Urn(), **options)
