"""The order of E- and M-steps, their gradients, and both in one."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.latents import EStep, Latents
from gfnem.model import LatentVariableModel
from gfnem.posteriors.exact import ExactPosterior
from gfnem.run import Run
from gfnem.schedule import AdaptiveThreshold, Alternation
from tests.training.tiny import (
    ENTROPY,
    SGD,
    Joint,
    Mixture,
    Rater,
    Symbols,
    Table,
    Urn,
    curve,
    fast,
    infinite_gradient,
    parameters,
    same,
)


def test_alternation() -> None:
    posterior = Table()
    schedule = Alternation(e_steps=2, m_steps=3, warmup_e_steps=1)
    em = EM(Mixture(), posterior, Urn(), m_steps=8, schedule=schedule)
    em.fit()
    expected = "e0 e1 e2 m2 m3 m4 e5 e6 m6 m7 m8 e9 e10 m10 m11"
    assert posterior.order == expected
    assert (em.done.m_steps, em.done.e_steps) == (8, 7)


class NotesPrecision(Table):
    """Notes in which precision matrices are multiplied in its E-steps, and where else it draws."""

    def __init__(self) -> None:
        super().__init__()
        self.training_steps: set[str] = set()
        self.evaluations: set[str] = set()

    def e_step(self, model: LatentVariableModel, x: Any) -> EStep:
        self.training_steps.add(torch.get_float32_matmul_precision())
        return super().e_step(model, x)


def test_matrices_are_multiplied_in_the_precision_asked_for_in_training_alone() -> None:
    posterior = NotesPrecision()

    def evaluator(model: Any, posterior: Any, split: str, final: bool = False) -> Any:
        posterior.evaluations.add(torch.get_float32_matmul_precision())
        return {"valid/loss": 0.0}

    evaluator.selection = lambda model: "valid/loss"  # pyright: ignore
    EM(
        Mixture(),
        posterior,
        Urn(),
        m_steps=3,
        evaluator=evaluator,  # pyright: ignore
        matmul_precision="medium",
    ).fit()
    assert posterior.training_steps == {"medium"}
    assert posterior.evaluations == {"highest"} == {torch.get_float32_matmul_precision()}


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match="em.matmul_precision is 'low'; use 'highest', 'high' or"):
        EM(Mixture(), Table(), Urn(), m_steps=3, matmul_precision="low")  # pyright: ignore


def test_first_m_step_of_a_cycle_takes_the_latents_of_its_batch() -> None:
    posterior = Table()
    schedule = Alternation(e_steps=2, m_steps=2)
    EM(Mixture(), posterior, Urn(), m_steps=6, schedule=schedule).fit()
    drawn = {number: latents for step, number, latents in posterior.events if step == "e"}
    given = [(number, latents) for step, number, latents in posterior.events if step == "m"]
    assert [number for number, _ in given] == [1, 2, 4, 5, 7, 8]
    for number, latents in given:
        assert latents is drawn.get(number)  # None, for fresh ones, on a batch without E-step


def test_m_step_draws_as_many_latents_as_the_posterior_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    sample = Table.sample

    def counting(self: Table, model: Mixture, x: Symbols, samples: int) -> Latents:
        asked.append((x.number, samples))
        return sample(self, model, x, samples)

    monkeypatch.setattr(Table, "sample", counting)
    EM(Mixture(), Table(), Urn(), m_steps=3, schedule=Alternation(m_steps=3)).fit()
    assert asked == [(1, 2), (2, 2)]


def test_posterior_without_parameters_gets_an_m_step_on_every_batch() -> None:
    em = EM(Mixture(), ExactPosterior(), Urn(batch_size=16), m_steps=7, schedule=Alternation(5, 1))
    summary = em.fit()
    assert em.done.batches == summary["train/m_steps"] == 7
    assert em.done.e_steps == summary["train/e_steps"] == 0
    assert (em.done.epoch, em.done.position) == (2, 1)


def test_m_steps_wait_for_the_posterior() -> None:
    """The averages are 5, 5, 2.7, 1.8, 5.5, 3.2, 2.1, 1.5; the threshold is 4, 3, then 2."""

    class Scripted(Table):
        losses = iter([5.0, 5.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0])

        def e_step(self, model: LatentVariableModel, x: Symbols) -> EStep:
            estep = super().e_step(model, x)
            assert estep.loss is not None
            loss = estep.loss - estep.loss.detach() + next(self.losses)
            return dataclasses.replace(estep, loss=loss)

    posterior = Scripted()
    schedule = AdaptiveThreshold(maximum=4, minimum=2, horizon=2, decay=0.5)
    EM(Mixture(), posterior, Urn(), m_steps=3, schedule=schedule).fit()
    assert posterior.order == "e0 e1 e2 m2 e3 m3 e4 e5 e6 e7 m7"


def test_schedules_hear_of_the_objective_where_the_loss_has_more_to_it() -> None:
    class More(Table):
        def e_step(self, model: LatentVariableModel, x: Symbols) -> EStep:
            estep = super().e_step(model, x)
            assert estep.loss is not None
            return dataclasses.replace(estep, loss=estep.loss + 100, objective=estep.loss)

    schedule = AdaptiveThreshold(maximum=50, minimum=50, horizon=2, decay=0.5)
    em = EM(Mixture(), More(), Urn(), m_steps=3, max_e_steps=3, schedule=schedule)
    em.fit()
    assert em.done.m_steps == 3


class CountsWaits(TorchDispatchMode):
    """How often a number is taken off the device, for which a step has to wait."""

    waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_waits_once_for_whether_loss_and_gradient_are_finite() -> None:
    with CountsWaits() as counts:
        EM(Mixture(), Table(), Urn(), m_steps=10, log_every=1000).fit()
    assert counts.waits == 10 * 2


def test_expected_log_joint() -> None:
    """Its gradient reaches the model alone, and weights count as they say."""

    class Weighted(Table):
        def refine(self, model: LatentVariableModel, x: Symbols, latents: Latents) -> Latents:
            first = self.logits[x.values, :1].sigmoid()
            return dataclasses.replace(latents, m_step_weights=torch.cat([first, 1 - first], 1))

    x, z = Symbols(torch.tensor([0, 3])), torch.tensor([[0, 2], [1, 1]])
    for posterior in (Table(), Weighted()):
        model = Mixture()
        first = posterior.logits[x.values, 0].sigmoid() if isinstance(posterior, Weighted) else 0.5
        log_joint = model.log_joint(x, z)
        expected = first * log_joint[:, 0] + (1 - first) * log_joint[:, 1]
        value = posterior.expected_log_joint(model, x, Latents(z, None))
        torch.testing.assert_close(value, expected)
        value.sum().backward()
        assert posterior.logits.grad is None
        assert model.symbol.grad is not None and model.component.grad is not None


def test_a_posterior_that_leaks_gradients_moves_nothing() -> None:
    """q's loss may reach the model and the model's q: each step counts its own gradient alone."""

    class Leaking(Table):
        def divergence(self, model: Mixture, x: Symbols, log_q: Tensor) -> Float[Tensor, ""]:
            return (log_q.exp() * (log_q - model.all_log_joints(x))).sum(-1).mean()

        def expected_log_joint(
            self, model: LatentVariableModel, x: Symbols, latents: Latents | None = None
        ) -> Float[Tensor, "batch"]:
            value = super().expected_log_joint(model, x, latents)
            return value + self.logits[x.values].square().sum(-1)

    trained = []
    for posterior in (Table(), Leaking()):
        torch.manual_seed(0)
        em = EM(Mixture(), posterior, Urn(), m_steps=9, schedule=Alternation(2, 3))
        em.fit()
        trained.append(parameters(em))
    assert same(*trained)


def test_one_backward_pass_trains_both_networks() -> None:
    """As a single optimizer of all parameters would."""
    model, posterior = Mixture(), Joint(dropout=0.0)
    sgd = partial(torch.optim.SGD, lr=0.1)
    options: dict[str, Any] = {"model_optimizer": sgd, "posterior_optimizer": sgd}
    em = EM(model, posterior, Urn(), 5, model_clip=None, posterior_clip=None, **options)
    em.fit()
    assert (em.done.m_steps, em.done.e_steps, em.done.batches) == (5, 5, 5)
    assert posterior.order == "e0 e1 e2 e3 e4"

    expected, q = Mixture(), Joint(dropout=0.0)
    together = [*expected.parameters(), *q.parameters()]
    optimizer = torch.optim.SGD(together, lr=0.1)
    for x in Urn().train_batches(0)[:5]:
        optimizer.zero_grad()
        q.divergence(expected, x, q.log_q(x)).backward()
        optimizer.step()
    torch.testing.assert_close(parameters(em), [p.detach() for p in together])


def test_clips_of_joint_networks_are_their_own() -> None:
    em = EM(Mixture(), Joint(), Urn(), 1, model_clip=1e-3, posterior_clip=None,
            model_optimizer=SGD, posterior_optimizer=SGD)  # fmt: skip
    before = parameters(em)
    em.fit()
    moved = [float((b - a).norm()) for a, b in zip(before, parameters(em), strict=True)]
    assert sum(m * m for m in moved[:2]) ** 0.5 == pytest.approx(1e-3, rel=1e-2)
    assert moved[2] > 1e-2


def test_joint_training_finds_the_maximum(run: Run) -> None:
    em = EM(Mixture(), Joint(dropout=0.0), Urn(42 + 6), 300, run=run, evaluator=Rater(),
            evaluate_every=100, **fast(0.05))  # fmt: skip
    summary = em.fit()
    assert summary["test/nll"] == pytest.approx(ENTROPY, abs=0.02)
    assert (summary["train/m_steps"], summary["train/e_steps"]) == (300, 300)
    assert curve(run, "train/joint_loss")[-1] < curve(run, "train/joint_loss")[0]
    assert curve(run, "train/e_loss") == curve(run, "train/m_loss") == []


def test_joint_update_that_is_not_finite_is_skipped_by_both() -> None:
    class Broken(Joint):
        def divergence(self, model: Mixture, x: Symbols, log_q: Tensor) -> Float[Tensor, ""]:
            value = super().divergence(model, x, log_q)
            # Finite, with a gradient for q alone that is not.
            return value if x.number else value + infinite_gradient(self.logits)

    em = EM(Mixture(), Broken(), Urn(), 1)
    before = parameters(em)
    em.fit()
    assert same(before, parameters(em)) and (em.done.m_steps, em.done.e_steps) == (1, 1)
    trainers = [em.steps.model_trainer, em.steps.posterior_trainer]
    assert [trainer.skipped for trainer in trainers if trainer is not None] == [1, 1]
    em.limits.m_steps = 2
    em.fit()
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters(em), strict=True))


def test_posterior_alone_cannot_be_joint() -> None:
    message = (
        "^em.m_steps=0 trains the posterior alone, but Joint and the model learn in one step: use "
        "another posterior$"
    )
    with pytest.raises(UserError, match=message):
        EM(Mixture(), Joint(), Urn(), 0, max_e_steps=3)


def test_parameter_groups_of_the_model_have_options_of_their_own() -> None:
    """Weight decay for some of its parameters, where all else has no gradient."""

    class Decaying(Mixture):
        def parameter_groups(self) -> list[dict[str, Any]]:
            return [{"params": [self.component]}, {"params": [self.symbol], "weight_decay": 0.0}]

        def log_joint(self, x: Symbols, z: Tensor) -> Float[Tensor, "batch samples"]:
            return 0 * super().log_joint(x, z)

    model = Decaying()
    component, symbol = model.component.detach().clone(), model.symbol.detach().clone()
    adamw = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    EM(model, ExactPosterior(), Urn(), 3, model_optimizer=adamw).fit()
    torch.testing.assert_close(model.component.detach(), component * 0.95**3)
    assert torch.equal(model.symbol, symbol)
