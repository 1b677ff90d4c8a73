"""A task of the tests' own: a mixture of categorical distributions.

x is one of five symbols and z one of three components. A model that fits gives every symbol the
probability that it has in the data, so that the lowest negative log-likelihood is the entropy of
the data.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gfnem.em import EM
from gfnem.latents import EStep, Latents
from gfnem.model import LatentVariableModel, TractableModel
from gfnem.posterior import Posterior
from gfnem.run import FilesTracker, Run

COMPONENTS, SYMBOLS = 3, 5
COUNTS = (20, 12, 8, 6, 2)  # of each symbol in the data
ENTROPY = -sum(n / sum(COUNTS) * math.log(n / sum(COUNTS)) for n in COUNTS)

NAN, INF = math.nan, math.inf
SGD = partial(torch.optim.SGD, lr=1.0)

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
        self.selected = "valid/nll"

    def selection(self, model: LatentVariableModel) -> str:
        return self.selected

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


def optimizers() -> dict[str, Any]:
    return {
        "model_optimizer": partial(torch.optim.Adam, lr=0.03, fused=True),
        "posterior_optimizer": partial(torch.optim.Adam, lr=0.05, fused=True),
    }


def stopping(*numbers: int, how: Callable[[], None] = interrupt) -> Urn:
    """Data that stops training while the batches of these numbers are at hand."""
    return Urn(used=lambda x, device: how() if x.number in numbers else None)


def interrupt_twice() -> None:
    interrupt()
    interrupt()


def fast(lr: float) -> dict[str, Any]:
    adam = partial(torch.optim.Adam, lr=lr)
    return {"model_optimizer": adam, "posterior_optimizer": adam}


def infinite_gradient(weight: Tensor) -> Tensor:
    return (weight - weight.detach()).sqrt().sum()


class Joint(Table):
    """Its loss, -log p(x) at best, trains the model as well."""

    @property
    def joint(self) -> bool:
        return True

    def divergence(self, model: Mixture, x: Symbols, log_q: Tensor) -> Float[Tensor, ""]:
        return (log_q.exp() * (log_q - model.all_log_joints(x))).sum(-1).mean()


def fail() -> None:
    raise RuntimeError("out of memory")
