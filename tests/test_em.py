"""The loop of E- and M-steps on a task of the tests' own: a mixture of categorical distributions.

x is one of five symbols and z one of three components. A model that fits gives every symbol the
probability that it has in the data, so that the lowest negative log-likelihood is the entropy of
the data.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.latents import EStep, Latents
from gfnem.model import ClosedFormModel, LatentVariableModel, TractableModel
from gfnem.posterior import Posterior
from gfnem.posteriors.exact import ExactPosterior
from gfnem.run import FilesTracker, Run
from gfnem.schedule import AdaptiveThreshold, Alternation
from gfnem.training.trainer import Diverged, Trainer

COMPONENTS, SYMBOLS = 3, 5
COUNTS = (20, 12, 8, 6, 2)  # of each symbol in the data
ENTROPY = -sum(n / sum(COUNTS) * math.log(n / sum(COUNTS)) for n in COUNTS)

Metrics = dict[str, float]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass(frozen=True)
class Symbols:
    """A batch of x, the number of it since training began, and whoever is told when it is used."""

    values: Int[Tensor, "batch"]
    number: int = 0
    used: Callable[[Symbols, torch.device], None] = lambda x, device: None

    def to(self, device: torch.device) -> Symbols:
        self.used(self, device)
        return dataclasses.replace(self, values=self.values.to(device))


class Urn:
    """All symbols in an order that depends on the epoch; batches are numbered across epochs."""

    def __init__(
        self,
        batch_size: int = 7,
        used: Callable[[Symbols, torch.device], None] = lambda x, device: None,
    ) -> None:
        self.batch_size = batch_size
        self.used = used

    def train_batches(self, epoch: int) -> list[Symbols]:
        order = torch.randperm(sum(COUNTS), generator=torch.Generator().manual_seed(epoch))
        batches = everything().values[order].split(self.batch_size)
        first = epoch * len(batches)
        return [Symbols(values, n, self.used) for n, values in enumerate(batches, first)]


def everything() -> Symbols:
    return Symbols(torch.arange(SYMBOLS).repeat_interleave(torch.tensor(COUNTS)))


class Mixture(TractableModel):
    def __init__(self) -> None:
        super().__init__()
        self.component = nn.Parameter(normal(COMPONENTS, seed=1))
        self.symbol = nn.Parameter(normal(COMPONENTS, SYMBOLS, seed=2))

    def log_joint(self, x: Symbols, z: Tensor) -> Float[Tensor, "batch samples"]:
        log_symbol = self.symbol.log_softmax(-1)[z, x.values[:, None]]
        return self.component.log_softmax(-1)[z] + log_symbol

    def all_log_joints(self, x: Symbols) -> Float[Tensor, "batch components"]:
        z = torch.arange(COMPONENTS, device=x.values.device)
        return self.log_joint(x, z.expand(len(x.values), -1))

    def log_likelihood(self, x: Symbols) -> Float[Tensor, "batch"]:
        return self.all_log_joints(x).logsumexp(-1)

    def sample_posterior(self, x: Symbols, samples: int) -> Tensor:
        return torch.multinomial(self.all_log_joints(x).softmax(-1), samples, replacement=True)

    def sample(
        self, n: int, generator: torch.Generator | None = None
    ) -> tuple[Symbols, Int[Tensor, "n 1"]]:
        z = torch.multinomial(self.component.softmax(-1), n, True, generator=generator)
        x = torch.multinomial(self.symbol.softmax(-1)[z], 1, generator=generator)
        return Symbols(x[:, 0]), z[:, None]


class Table(Posterior):
    """q(z | x) as a table of logits with dropout, brought closer to p(z | x) in KL(q || p).

    events: what it was asked for: ("e", number of the batch), ("m", number, latents given).
    """

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.logits = nn.Parameter(normal(SYMBOLS, COMPONENTS, seed=3))
        self.dropout = dropout
        self.events: list[tuple[Any, ...]] = []

    @property
    def m_step_samples(self) -> int:
        return 2

    def log_q(self, x: Symbols) -> Float[Tensor, "batch components"]:
        logits = nn.functional.dropout(self.logits[x.values], self.dropout, self.training)
        return logits.log_softmax(-1)

    def divergence(self, model: Mixture, x: Symbols, log_q: Tensor) -> Float[Tensor, ""]:
        """KL(q || p(x, z)), -log p(x) at best."""
        with torch.no_grad():
            log_joint = model.all_log_joints(x)
        return (log_q.exp() * (log_q - log_joint)).sum(-1).mean()

    def e_step(self, model: LatentVariableModel, x: Symbols) -> EStep:
        assert isinstance(model, Mixture)
        log_q = self.log_q(x)
        latents = self._draw(model, x, log_q.detach(), 2)
        self.events.append(("e", x.number, latents))
        entropy = -(log_q.exp() * log_q).sum(-1).mean().detach()
        return EStep(self.divergence(model, x, log_q), latents, {"e_step/entropy": entropy})

    @torch.no_grad()
    def sample(self, model: LatentVariableModel, x: Symbols, samples: int) -> Latents:
        return self._draw(model, x, self.log_q(x), samples)

    def expected_log_joint(
        self, model: LatentVariableModel, x: Symbols, latents: Latents | None = None
    ) -> Float[Tensor, "batch"]:
        self.events.append(("m", x.number, latents))
        return super().expected_log_joint(model, x, latents)

    @staticmethod
    @torch.no_grad()
    def _draw(model: LatentVariableModel, x: Symbols, log_q: Tensor, samples: int) -> Latents:
        z = torch.multinomial(log_q.exp(), samples, replacement=True)
        return Latents(z, model.log_joint(x, z) - log_q.gather(-1, z))

    @property
    def order(self) -> str:
        return " ".join(f"{step}{number}" for step, number, _ in self.events)


class Rater:
    """Exact and sampled negative log-likelihood of all the data.

    before: called with the split before anything is computed.
    scores: what the selection is to be, one after the other, in place of the true one.
    """

    selection = "valid/nll"

    def __init__(
        self,
        before: Callable[[str], None] = lambda split: None,
        scores: list[float] | None = None,
    ) -> None:
        self.before = before
        self.scores = iter(scores or [])
        self.calls: list[tuple[str, bool]] = []
        self.rated: list[Tensor] = []
        self.reported = 0

    def __call__(
        self, model: LatentVariableModel, posterior: Posterior, split: str, final: bool = False
    ) -> Metrics:
        self.calls.append((split, final))
        self.before(split)
        assert not (model.training or posterior.training or torch.is_grad_enabled())
        assert isinstance(model, Mixture)
        self.rated.append(model.symbol.clone())
        x = everything().to(model.symbol.device)
        log_weights = posterior.sample(model, x, 4).log_weights
        assert log_weights is not None
        nll = -float(model.log_likelihood(x).mean())
        return {
            f"{split}/nll": next(self.scores, nll) if split == "valid" else nll,
            f"{split}/bound": -float((log_weights.logsumexp(-1) - math.log(4)).mean()),
        }

    def report(self, model: LatentVariableModel, posterior: Posterior, run: Run) -> None:
        self.reported += 1
        run.add_table("nll", ("split",), [("test",)])


class Told(FilesTracker):
    """Remembers how runs ended."""

    def __init__(self) -> None:
        self.ends: list[str] = []

    def finish(self, status: str) -> None:
        self.ends.append(status)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def run(tmp_path: Path, told: Told) -> Run:
    return Run.create(tmp_path / "run", {"task": "mixture"}, told)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time of these tests otherwise; tests of the run directory wait for it."""
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture(autouse=True)
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        yield


def without_times(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if not key.startswith("time/")}


def lines(run: Run) -> list[str]:
    """`metrics.jsonl` without its times, every digit of it."""
    return [json.dumps(without_times(line)) for line in run.metrics()]


def curve(run: Run, key: str) -> list[float]:
    return [line[key] for line in run.metrics() if key in line]


def parameters(em: EM) -> list[Tensor]:
    networks = em.model, em.posterior
    return [p.detach().clone() for network in networks for p in network.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def plain(state: Any) -> Any:
    """Tensors as numbers, so that two states can be compared to the last bit."""
    if isinstance(state, Tensor):
        return state.tolist()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list):
        return [plain(value) for value in state]
    return state


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


# One network.


def weights(*values: float) -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(torch.tensor(values))]}]


SGD = partial(torch.optim.SGD, lr=1.0)


def test_learning_rates_of_all_groups_rise_linearly() -> None:
    groups = weights(0.0) + weights(0.0)
    groups[1]["lr"] = 0.4
    trainer = Trainer("model", groups, partial(torch.optim.SGD, lr=0.1), None, warmup=4)
    at = [[0.0, 0.0]]
    for _ in range(6):
        trainer.step(sum((p.sum() for p in trainer.parameters), torch.zeros(())))
        at.append([p.item() for p in trainer.parameters])
    moved = torch.tensor(at).diff(dim=0)
    factors = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    torch.testing.assert_close(moved, -factors[:, None] * torch.tensor([0.1, 0.4]))


@pytest.mark.parametrize("warmup", [0, 1])
def test_no_warmup(warmup: int) -> None:
    adam = partial(torch.optim.Adam, lr=0.1)
    group, expected = weights(1.0, -2.0), nn.Parameter(torch.tensor([1.0, -2.0]))
    trainer, optimizer = Trainer("model", group, adam, None, warmup), adam([expected])
    for _ in range(5):
        trainer.step(group[0]["params"][0].square().sum())
        optimizer.zero_grad()
        expected.square().sum().backward()
        optimizer.step()
        assert torch.equal(group[0]["params"][0], expected)


@pytest.mark.parametrize(
    ("clip", "moved"), [(1.0, [-0.6, -0.8]), (10.0, [-3.0, -4.0]), (None, [-3.0, -4.0])]
)
def test_gradient_is_clipped_to_a_norm(clip: float | None, moved: list[float]) -> None:
    group = weights(0.0, 0.0)
    trainer = Trainer("model", group, SGD, clip, warmup=0)
    assert trainer.step((group[0]["params"][0] * torch.tensor([3.0, 4.0])).sum())
    torch.testing.assert_close(group[0]["params"][0].detach(), torch.tensor(moved))


def infinite_loss(weight: Tensor) -> Tensor:
    return weight.sum() * math.inf


def loss_not_a_number(weight: Tensor) -> Tensor:
    return weight.sum() * math.nan


def infinite_gradient(weight: Tensor) -> Tensor:
    return (weight - weight.detach()).sqrt().sum()


@pytest.mark.parametrize("bad", [infinite_loss, loss_not_a_number, infinite_gradient])
@pytest.mark.parametrize("clip", [1.0, None])
def test_update_that_is_not_finite_is_skipped(
    bad: Callable[[Tensor], Tensor], clip: float | None
) -> None:
    group = weights(1.0, 2.0)
    (weight,) = group[0]["params"]
    trainer = Trainer("model", group, partial(torch.optim.Adam, lr=0.1), clip, warmup=5)
    assert trainer.step(weight.square().sum())
    before = weight.detach().clone()
    state = plain(trainer.state_dict())
    assert not trainer.step(bad(weight))
    assert torch.equal(weight, before)
    assert plain(trainer.state_dict()) == state | {"skipped": 1, "skipped_in_a_row": 1}
    assert trainer.step(weight.square().sum())
    assert weight.isfinite().all() and not torch.equal(weight, before)
    assert (trainer.skipped, trainer.skipped_in_a_row) == (1, 0)


def test_tenth_skipped_update_in_a_row_ends_training() -> None:
    group = weights(1.0)
    (weight,) = group[0]["params"]
    trainer = Trainer("model", group, SGD, None, warmup=0)
    for _ in range(9):
        assert not trainer.step(loss_not_a_number(weight))
    assert trainer.step(weight.sum())
    for _ in range(9):
        assert not trainer.step(infinite_gradient(weight))
    message = (
        "^the model's loss or gradient was not finite 10 times in a row: "
        "lower its learning rate or gradient clipping$"
    )
    with pytest.raises(Diverged, match=message):
        trainer.step(loss_not_a_number(weight))
    assert trainer.skipped == 19


def test_trainer_goes_on_from_its_state() -> None:
    def loss(group: list[dict[str, Any]]) -> Tensor:
        return group[0]["params"][0].square().sum()

    adam = partial(torch.optim.Adam, lr=0.1)
    one, other = weights(1.0), weights(1.0)
    trainer, resumed = (Trainer("model", group, adam, None, warmup=6) for group in (one, other))
    for _ in range(3):
        trainer.step(loss(one))
    trainer.step(loss(one) * math.nan)
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    other[0]["params"][0].data.copy_(one[0]["params"][0].data)
    assert (resumed.skipped, resumed.skipped_in_a_row) == (1, 1)
    for _ in range(6):
        trainer.step(loss(one))
        resumed.step(loss(other))
        assert torch.equal(one[0]["params"][0], other[0]["params"][0])


# The order of steps.


def test_alternation() -> None:
    posterior = Table()
    schedule = Alternation(e_steps=2, m_steps=3, warmup_e_steps=1)
    em = EM(Mixture(), posterior, Urn(), m_steps=8, schedule=schedule)
    em.fit()
    expected = "e0 e1 e2 m2 m3 m4 e5 e6 m6 m7 m8 e9 e10 m10 m11"
    assert posterior.order == expected
    assert (em.m_steps, em.e_steps) == (8, 7)


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

    evaluator.selection = "valid/loss"  # pyright: ignore
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
    assert em.batches_seen == summary["train/m_steps"] == 7
    assert em.e_steps == summary["train/e_steps"] == 0
    assert (em.epoch, em.position) == (2, 1)


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
    assert em.m_steps == 3


class CountsWaits(TorchDispatchMode):
    """How often a number is taken off the device, for which a step has to wait."""

    waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing_but_whether_loss_and_gradient_are_finite() -> None:
    with CountsWaits() as counts:
        EM(Mixture(), Table(), Urn(), m_steps=10, log_every=1000).fit()
    assert counts.waits == 10 * 2 * 2


# Gradients.


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


# Learning.


def fast(lr: float) -> dict[str, Any]:
    adam = partial(torch.optim.Adam, lr=lr)
    return {"model_optimizer": adam, "posterior_optimizer": adam}


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
    assert em.model_trainer.optimizer.state_dict()["state"] == {}


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


# The end, and evaluation.


def test_ends_after_so_many_e_steps(told: Told, run: Run) -> None:
    evaluator = Rater()
    schedule = Alternation(e_steps=2, m_steps=1)
    em = EM(Mixture(), Table(), Urn(), 100, 5, schedule, evaluator=evaluator, run=run)
    summary = em.fit()
    assert summary["train/e_steps"] == 5 and summary["train/m_steps"] == 2
    assert evaluator.calls == [("valid", False), ("test", True)]
    assert told.ends == ["finished"]


def test_ends_before_the_first_m_step(run: Run) -> None:
    schedule = Alternation(warmup_e_steps=10)
    em = EM(Mixture(), Table(), Urn(), 9, 4, schedule, evaluator=Rater(), run=run)
    summary = em.fit()
    assert summary["train/m_steps"] == summary["train/best_m_steps"] == 0
    assert "test/nll" in summary


@pytest.mark.parametrize(("m_steps", "at"), [(10, [4, 8, 10]), (8, [4, 8]), (3, [3])])
def test_evaluations(run: Run, m_steps: int, at: list[int]) -> None:
    evaluator = Rater()
    schedule = Alternation(e_steps=2)  # batches without an M-step must not rate a second time
    em = EM(
        Mixture(), Table(), Urn(), m_steps, schedule=schedule, evaluator=evaluator,
        evaluate_every=4, run=run,
    )  # fmt: skip
    summary = em.fit()
    assert evaluator.calls == [("valid", False)] * len(at) + [("test", True)]
    assert [line["train/m_steps"] for line in run.metrics() if "valid/nll" in line] == at
    assert evaluator.reported == 1
    assert without_times(run.summary()) == without_times(summary)
    keys = {f"{split}/{name}" for split in ("valid", "test") for name in ("nll", "bound")}
    counters = {"train/m_steps", "train/e_steps", "train/best_m_steps", "time/seconds"}
    assert set(summary) == keys | counters
    assert summary["train/m_steps"] == m_steps and summary["train/e_steps"] == 2 * m_steps
    assert summary["time/seconds"] > 0


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([3.0, 1.0, 2.0], 2),
        ([2.0, 2.0], 1),
        ([3.0, NAN, 2.0, NAN], 3),
        ([NAN, 5.0, 4.0, 6.0], 3),
        ([NAN, INF, 4.0], 3),
        ([INF, INF], 1),
        ([NAN, NAN], 2),
    ],
)
def test_best_checkpoint_is_tested(run: Run, scores: list[float], best: int) -> None:
    evaluator = Rater(scores=scores)
    em = EM(Mixture(), Table(), Urn(), len(scores), evaluator=evaluator, evaluate_every=1, run=run)
    summary = em.fit()
    assert summary["train/best_m_steps"] == best
    assert summary["valid/nll"] == pytest.approx(scores[best - 1], nan_ok=True)
    *valid, test = evaluator.rated
    assert [torch.equal(test, rated) for rated in valid].index(True) == best - 1
    assert torch.equal(run.load_checkpoint("best")["model"]["symbol"], test)
    assert run.load_checkpoint("last")["counters"]["m_steps"] == len(scores)


def test_a_selection_that_is_no_metric() -> None:
    evaluator = Rater()
    evaluator.selection = "valid/posterior_gap"
    message = (
        "^valid/posterior_gap is to tell which checkpoint is best, but it is not known of this "
        "model with Table: use another evaluator.select$"
    )
    with pytest.raises(UserError, match=message):
        EM(Mixture(), Table(), Urn(), 1, evaluator=evaluator).fit()


@pytest.mark.parametrize("log_every", [1, 4])
def test_evaluation_does_not_change_training(tmp_path: Path, log_every: int) -> None:
    logged, trained = [], []
    for every in (5, 7):
        run = Run.create(tmp_path / str(every), {})
        em = EM(
            Mixture(), Table(), Urn(), 20, schedule=Alternation(2, 3), evaluator=Rater(),
            evaluate_every=every, log_every=log_every, run=run, seed=0,
        )  # fmt: skip
        em.fit()
        logged.append([line for line in lines(run) if "valid/" not in line])
        trained.append(run.load_checkpoint("last")["model"])
    assert logged[0] == logged[1] and len(logged[0]) > 4
    assert same(*(list(state.values()) for state in trained))


def test_evaluation_leaves_modes_and_random_numbers_even_when_it_fails() -> None:
    def fail(split: str) -> None:
        torch.rand(3)
        if split == "test":
            raise KeyboardInterrupt

    em = EM(Mixture(), Table(), Urn(), 1, evaluator=Rater(before=fail))
    em.posterior.eval()
    state = torch.get_rng_state()
    em.evaluate("valid")
    with pytest.raises(KeyboardInterrupt):
        em.evaluate("test")
    assert em.model.training and not em.posterior.training
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_draws_the_same_numbers_every_time() -> None:
    em = EM(Mixture(), Table(), Urn(), 1, evaluator=Rater())
    rated = em.evaluate("valid")
    torch.rand(1)
    assert em.evaluate("valid") == rated


def test_without_run_and_with_it_the_same_is_learned(run: Run) -> None:
    summaries, trained = [], []
    for where in (run, None):
        em = EM(Mixture(), Table(), Urn(), 9, evaluator=Rater(scores=[1.0]), run=where, seed=0)
        summaries.append(without_times(em.fit()))
        trained.append(parameters(em))
    assert summaries[0] == summaries[1] and same(*trained)


def test_without_evaluator(run: Run) -> None:
    model = Mixture()
    summary = EM(model, Table(), Urn(), 4, run=run).fit()
    counters = {"train/m_steps": 4, "train/e_steps": 4, "train/best_m_steps": 4}
    assert without_times(summary) == without_times(run.summary()) == counters
    assert torch.equal(run.load_checkpoint("last")["model"]["symbol"], model.symbol)
    assert EM(Mixture(), Table(), Urn(), 4).fit().keys() == summary.keys()


def test_batches_are_moved_to_the_device() -> None:
    devices = []
    data = Urn(used=lambda x, device: devices.append(device))
    EM(Mixture(), Table(), data, 3, device="cpu").fit()
    assert devices == [torch.device("cpu")] * 3


# Stopping and going on.


def optimizers() -> dict[str, Any]:
    return {
        "model_optimizer": partial(torch.optim.Adam, lr=0.03, fused=True),
        "posterior_optimizer": partial(torch.optim.Adam, lr=0.05, fused=True),
    }


def alternating(run: Run, data: Urn | None = None, **options: Any) -> EM:
    """26 batches: 3 for warm-up, then cycles of 4; 7 in an epoch, 4 between lines."""
    options = {"evaluator": Rater(), "device": "cpu"} | options
    schedule = Alternation(e_steps=2, m_steps=3, warmup_e_steps=3)
    return EM(
        Mixture(), Table(), data or Urn(), m_steps=17, schedule=schedule, evaluate_every=5,
        log_every=4, warmup=12, run=run, seed=0, **optimizers(), **options,
    )  # fmt: skip


def adaptive(run: Run, data: Urn | None = None, **options: Any) -> EM:
    """26 batches, of which 16 have an M-step."""
    options = {"evaluator": Rater(), "device": "cpu"} | options
    schedule = AdaptiveThreshold(maximum=1.9, minimum=1.7, horizon=10, decay=0.8)
    return EM(
        Mixture(), Table(), data or Urn(), m_steps=100, max_e_steps=26, schedule=schedule,
        evaluate_every=5, log_every=4, warmup=12, average=0.7, run=run, seed=0, **optimizers(),
        **options,
    )  # fmt: skip


def stopping(*numbers: int, how: Callable[[], None] = interrupt) -> Urn:
    """Data that stops training while the batches of these numbers are at hand."""
    return Urn(used=lambda x, device: how() if x.number in numbers else None)


def resumed(make: Callable[..., EM], path: Path, **options: Any) -> tuple[EM, Run]:
    run = Run.open(path)
    em = make(run, **options)
    em.load_state_dict(run.load_checkpoint("last"))
    return em, run


@dataclasses.dataclass
class Reference:
    """A run that was never stopped."""

    make: Callable[..., EM]
    lines: list[str]
    summary: Metrics
    trained: dict[str, Any]

    @classmethod
    def of(cls, make: Callable[..., EM], path: Path) -> Reference:
        run = Run.create(path, {})
        em = make(run)
        summary = without_times(em.fit())
        assert em.batches_seen == 26
        return cls(make, lines(run), summary, run.load_checkpoint("last"))

    def assert_equals(self, run: Run, summary: Metrics) -> None:
        """To the last bit."""
        assert lines(run) == self.lines
        assert without_times(summary) == self.summary
        assert without_times(run.summary()) == self.summary
        state = run.load_checkpoint("last")
        for part in state.keys() - {"counters"}:
            assert plain(state[part]) == plain(self.trained[part]), part


@pytest.fixture(scope="module", params=[alternating, adaptive], ids=lambda make: make.__name__)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    with torch.random.fork_rng([]):
        return Reference.of(request.param, tmp_path_factory.mktemp("reference"))


def test_reference_holds_what_its_tests_need(reference: Reference) -> None:
    rated = [json.loads(line) for line in reference.lines if '"valid/nll"' in line]
    m_steps = int(reference.summary["train/m_steps"])
    # The last one is out of turn.
    assert [line["train/m_steps"] for line in rated] == [5, 10, 15, m_steps]
    assert m_steps in (16, 17) and reference.summary["train/e_steps"] != m_steps
    assert sum('"train/m_loss"' in line for line in reference.lines) >= 5


def test_average_of_weights_is_rated_and_kept(run: Run) -> None:
    class Noting(Mixture):
        def m_step_done(self, m_steps: int) -> None:
            trained.append(self.symbol.detach().clone())

    trained: list[Tensor] = []
    rater = Rater()
    em = EM(
        Noting(), Table(), Urn(), m_steps=3, evaluate_every=1, average=0.2, run=run, seed=0,
        evaluator=rater, **optimizers(),
    )  # fmt: skip
    average = Mixture().symbol.detach()
    em.fit()
    for decay, weights, valid in zip((0.1, 2 / 11, 0.2), trained, rater.rated, strict=False):
        average = decay * average + (1 - decay) * weights
        torch.testing.assert_close(valid, average)
    torch.testing.assert_close(run.load_checkpoint("last")["model"]["symbol"], average)
    with pytest.raises(UserError, match="em.average is 1; it must be from 0 to below 1, or null"):
        EM(Mixture(), Table(), Urn(), m_steps=3, average=1)


@pytest.mark.parametrize(
    ("reference", "number"),
    [(alternating, number) for number in range(26)] + [(adaptive, n) for n in (3, 9, 16, 25)],
    indirect=["reference"],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_stopped_run_goes_on(reference: Reference, tmp_path: Path, told: Told, number: int) -> None:
    """In mid-cycle, mid-epoch, mid-window, before, with and after evaluations."""
    stopped = Run.create(tmp_path / "run", {}, told)
    em = reference.make(stopped, stopping(number))
    summary = em.fit()
    assert em.batches_seen == number + 1
    assert told.ends == ["stopped"]
    assert without_times(stopped.summary()) == without_times(summary)
    assert not any(key.startswith("test/") for key in summary)

    em, run = resumed(reference.make, stopped.path)
    reference.assert_equals(run, em.fit())
    assert em.seconds > summary["time/seconds"]


def test_run_goes_on_after_many_stops(reference: Reference, tmp_path: Path) -> None:
    stops = 2, 3, 11, 18, 25
    reference.make(Run.create(tmp_path / "run", {}), stopping(*stops)).fit()
    for _ in stops[1:]:
        resumed(reference.make, tmp_path / "run", data=stopping(*stops))[0].fit()
    em, run = resumed(reference.make, tmp_path / "run")
    reference.assert_equals(run, em.fit())


def test_best_score_is_kept_across_a_stop(run: Run) -> None:
    alternating(run, stopping(10), evaluator=Rater(scores=[1.0])).fit()
    em, _ = resumed(alternating, run.path, evaluator=Rater(scores=[2.0, 3.0, NAN]))
    summary = em.fit()
    assert (summary["train/best_m_steps"], summary["valid/nll"]) == (5, 1.0)


def test_second_stop_tells_of_the_evaluation_before_the_first(tmp_path: Path) -> None:
    once, twice = (Run.create(tmp_path / name, {}) for name in ("once", "twice"))
    expected = without_times(alternating(once, stopping(11)).fit())
    alternating(twice, stopping(10)).fit()
    em, run = resumed(alternating, twice.path, data=stopping(11))
    assert without_times(em.fit()) == without_times(run.summary()) == expected
    assert "valid/nll" in expected


def test_fit_called_again_goes_on(reference: Reference, run: Run) -> None:
    em = reference.make(run, stopping(10))
    em.fit()
    reference.assert_equals(run, em.fit())


def test_finished_run_is_only_rated_again(reference: Reference, run: Run) -> None:
    reference.make(run).fit()
    evaluator = Rater()
    em, again = resumed(reference.make, run.path, evaluator=evaluator)
    reference.assert_equals(again, em.fit())
    assert evaluator.calls == [("test", True)]


def fail() -> None:
    raise RuntimeError("out of memory")


def interrupt_twice() -> None:
    interrupt()
    interrupt()


@pytest.mark.parametrize(
    ("how", "error", "status"),
    [(fail, RuntimeError, "failed"), (interrupt_twice, KeyboardInterrupt, "stopped")],
)
@pytest.mark.parametrize("where", ["training", "evaluation", "test"])
@pytest.mark.parametrize("reference", [alternating], indirect=True, ids=["alternating"])
def test_broken_run_goes_on_from_its_last_checkpoint(
    reference: Reference,
    run: Run,
    told: Told,
    where: str,
    how: Callable[[], None],
    error: type[BaseException],
    status: str,
) -> None:
    breaking = {"training": [], "evaluation": ["valid"] * 3, "test": ["test"]}[where]

    def count(split: str) -> None:
        if split in breaking:
            breaking.remove(split)
            if not breaking:
                how()

    data = stopping(20, how=how) if where == "training" else Urn()
    with pytest.raises(error):
        alternating(run, data, evaluator=Rater(before=count)).fit()
    assert told.ends == [status]
    assert not (run.path / "summary.json").exists()
    em, run = resumed(alternating, run.path)
    assert em.m_steps == {"training": 10, "evaluation": 10, "test": 17}[where]
    reference.assert_equals(run, em.fit())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_run_on_a_gpu_goes_on_there_and_on_the_cpu(tmp_path: Path) -> None:
    make = partial(alternating, device="cuda")
    reference = Reference.of(make, tmp_path / "reference")
    for name, device in (("gpu", "cuda"), ("cpu", "cpu")):
        stopped = Run.create(tmp_path / name, {})
        make(stopped, stopping(10)).fit()
        em, run = resumed(partial(alternating, device=device), stopped.path)
        summary = em.fit()
        assert parameters(em)[0].device.type == device
        if device == "cuda":
            reference.assert_equals(run, summary)


# Signals.


@pytest.fixture
def handlers() -> Iterator[list[Any]]:
    """Those of SIGINT and SIGTERM, which nothing may change for good."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield before
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_ends_after_the_batch_at_hand(
    run: Run, told: Told, handlers: list[Any], number: signal.Signals
) -> None:
    posterior = Table()
    data = stopping(3, how=lambda: signal.raise_signal(number))
    summary = EM(Mixture(), posterior, data, 100, run=run, evaluator=Rater()).fit()
    assert posterior.order.endswith("m2 e3 m3")
    assert summary["train/m_steps"] == run.summary()["train/m_steps"] == 4
    assert run.load_checkpoint("last")["counters"]["m_steps"] == 4
    assert told.ends == ["stopped"]


def test_signal_during_an_evaluation_lets_it_end(run: Run, handlers: list[Any]) -> None:
    evaluator = Rater(before=lambda split: interrupt())
    em = EM(Mixture(), Table(), Urn(), 100, evaluator=evaluator, evaluate_every=5, run=run)
    summary = em.fit()
    assert evaluator.calls == [("valid", False)]
    assert summary["train/m_steps"] == 5 and "valid/nll" in summary
    assert run.load_checkpoint("best")["counters"]["m_steps"] == 5


def test_second_signal_ends_at_once(run: Run, told: Told, handlers: list[Any]) -> None:
    posterior = Table()
    em = EM(Mixture(), posterior, stopping(3, how=interrupt_twice), 100, run=run)
    with pytest.raises(KeyboardInterrupt):
        em.fit()
    assert posterior.order.endswith("m2")
    assert told.ends == ["stopped"]


def test_interrupt_after_a_termination_ends_at_once(run: Run, handlers: list[Any]) -> None:
    def both() -> None:
        signal.raise_signal(signal.SIGTERM)
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        EM(Mixture(), Table(), stopping(3, how=both), 100, run=run).fit()


def test_handlers_come_back_after_an_error(handlers: list[Any]) -> None:
    with pytest.raises(RuntimeError):
        EM(Mixture(), Table(), stopping(3, how=fail), 100).fit()


def test_own_handler_takes_the_second_signal() -> None:
    caught = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        em = EM(Mixture(), Table(), stopping(3, how=interrupt_twice), 100)
        em.fit()
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [signal.SIGINT] and em.m_steps == 4


def test_in_a_thread_of_its_own_signals_are_left_alone(handlers: list[Any]) -> None:
    during = []
    data = Urn(used=lambda x, device: during.append(signal.getsignal(signal.SIGINT)))
    em = EM(Mixture(), Table(), data, 5, evaluator=Rater())
    summaries = []
    thread = threading.Thread(target=lambda: summaries.append(em.fit()))
    thread.start()
    thread.join()
    assert summaries[0]["train/m_steps"] == 5
    assert during == [handlers[0]] * 5


# Divergence and other errors.


class Poisoned(Mixture):
    """A likelihood that is not a number in M-steps of these numbers, counted from 0."""

    def __init__(self, *poisoned: int) -> None:
        super().__init__()
        self.poisoned = poisoned
        self.m_steps = 0

    def log_joint(self, x: Symbols, z: Tensor) -> Float[Tensor, "batch samples"]:
        value = super().log_joint(x, z)
        if torch.is_grad_enabled():
            self.m_steps += 1
            if self.m_steps - 1 in self.poisoned:
                return value * math.nan
        return value


def test_skipped_updates_are_counted_and_kept_out_of_the_means(run: Run) -> None:
    em = EM(Poisoned(1, 2, 7), Table(), Urn(), 10, log_every=5, run=run)
    em.fit()
    assert curve(run, "train/skipped") == [2, 3]
    assert all(math.isfinite(loss) for loss in curve(run, "train/m_loss"))
    assert em.m_steps == 10


def test_diverged_run_keeps_the_parameters_of_its_last_update(run: Run, told: Told) -> None:
    evaluator = Rater()
    em = EM(
        Poisoned(*range(5, 100)), Table(), Urn(), 100, evaluator=evaluator, evaluate_every=5,
        run=run,
    )  # fmt: skip
    with pytest.raises(Diverged, match="^the model's loss"):
        em.fit()
    assert em.m_steps == 14
    assert told.ends == ["failed"]
    assert not (run.path / "summary.json").exists()
    for which in ("last", "best"):
        kept = run.load_checkpoint(which)["model"]["symbol"]
        assert torch.equal(kept, evaluator.rated[0]) and kept.isfinite().all()


def test_posterior_that_diverges_is_named() -> None:
    class Broken(Table):
        def divergence(self, model: Mixture, x: Symbols, log_q: Tensor) -> Float[Tensor, ""]:
            return super().divergence(model, x, log_q) * math.inf

    em = EM(Mixture(), Broken(), Urn(), 100)
    with pytest.raises(Diverged, match="^the posterior's loss or gradient was not finite 10 times"):
        em.fit()
    assert em.m_steps == 0  # no M-step before the E-steps of its cycle are done


# A model that stays as it is.


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
    assert em.m_steps == 0 and em.e_steps > 1 and 0.05 <= em.seconds < 5


def test_posterior_alone_needs_parameters() -> None:
    with pytest.raises(UserError, match="^em.m_steps=0 trains the posterior alone, but it has no"):
        EM(Mixture(), ExactPosterior(), Urn(), 0, max_e_steps=3)


# E- and M-step in one.


class Joint(Table):
    """Its loss, -log p(x) at best, trains the model as well."""

    @property
    def joint(self) -> bool:
        return True

    def divergence(self, model: Mixture, x: Symbols, log_q: Tensor) -> Float[Tensor, ""]:
        return (log_q.exp() * (log_q - model.all_log_joints(x))).sum(-1).mean()


def test_one_backward_pass_trains_both_networks() -> None:
    """As a single optimizer of all parameters would."""
    model, posterior = Mixture(), Joint(dropout=0.0)
    sgd = partial(torch.optim.SGD, lr=0.1)
    options: dict[str, Any] = {"model_optimizer": sgd, "posterior_optimizer": sgd}
    em = EM(model, posterior, Urn(), 5, model_clip=None, posterior_clip=None, **options)
    em.fit()
    assert (em.m_steps, em.e_steps, em.batches_seen) == (5, 5, 5)
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
    assert same(before, parameters(em)) and (em.m_steps, em.e_steps) == (1, 1)
    trainers = [em.model_trainer, em.posterior_trainer]
    assert [trainer.skipped for trainer in trainers if trainer is not None] == [1, 1]
    em.total_m_steps = 2
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
        ({"warmup": -1}, "em.warmup is -1; it must be at least 0"),
        ({"model_clip": 0.0}, "em.model_clip is 0.0; it must be positive, or null for none"),
        ({"posterior_clip": -1.0}, "em.posterior_clip is -1.0; it must be positive, or null"),
    ],
)
def test_options_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"m_steps": 1} | wrong
    with pytest.raises(UserError, match=f"^{message}"):
        EM(Mixture(), Table(), Urn(), **options)
