"""How long the tasks' steps take, as a table and as JSON.

    python scripts/benchmark.py                    everything that needs no data
    python scripts/benchmark.py target             seconds to 5.45 nats per token on the treebank
    python scripts/benchmark.py inside recipe --threads 2 --json benchmark.json

Sections: `recipe`, one EM iteration of the default recipe; `small` and `large`, the published
settings (labelled trees, a transformer over all roots, 10 Metropolis-Hastings steps, sleep phase)
with a 128 wide, 2 layer and a 512 wide, 6 layer policy, in bfloat16 where the CPU has it; `ncfg`,
rules that see the parent, the same sizes with the chart policy and trained exactly; `scaling`, 16
sentences of equal length of 10 to 40 words, from 30 + 60 to 60 + 120 symbols, whose rows
`cost_figure.py` draws; `inside`, the inside algorithm beside torch-struct's where that is installed
(extra `bench`); `images`, the discrete VAE at the published size (128 binary images of 28 x 28,
4 x 4 codes of 8, 128 channels); `mixture`, whole training runs on the mixture of Gaussians, to the
likelihood of exact EM; `target`, whole training runs on the treebank sample, which needs its data.

Times are medians over repeats, each on another batch, after a warm-up of two; memory is the
largest resident size of the process so far. Sections run in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, product, repeat
from statistics import median
from typing import Any, Literal

import torch

from gfnem.app.machine import set_up
from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.gflownet import objectives
from gfnem.gflownet.refinement import BackAndForth, ImportanceWeighting
from gfnem.inference import inference
from gfnem.model import LatentVariableModel
from gfnem.posterior import Posterior
from gfnem.posteriors.exact import ExactPosterior
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.precision import Precision, cpu_has_bfloat16
from gfnem.schedule import Alternation
from gfnem.tasks.discrete_vae.causal import PriorName
from gfnem.tasks.discrete_vae.images import Images
from gfnem.tasks.discrete_vae.importance import log_weights
from gfnem.tasks.discrete_vae.model import DiscreteVAE
from gfnem.tasks.discrete_vae.policy import GridPolicy
from gfnem.tasks.discrete_vae.vector_quantized import VectorQuantized
from gfnem.tasks.grammar.inference import inside
from gfnem.tasks.grammar.networks import NeuralNCFG, NeuralPCFG
from gfnem.tasks.grammar.policies.chart import ChartPolicy
from gfnem.tasks.grammar.policies.root_flow import RootFlowPolicy
from gfnem.tasks.grammar.policies.transformer import TransformerPolicy
from gfnem.tasks.grammar.text.corpus import Sentences
from gfnem.tasks.grammar.text.sources import treebank
from gfnem.tasks.mixture.data import PointData, sampled
from gfnem.tasks.mixture.model import starting_at
from gfnem.tasks.mixture.policy import MixturePolicy
from gfnem.training.trainer import Trainer, minimise

NONTERMINALS, PRETERMINALS, VOCABULARY, LENGTH = 29, 60, 2283, 20
# Sentences of 2 to 20 words in the Penn Treebank sample, by length.
LENGTHS = [39, 41, 39, 43, 45, 66, 68, 90, 93, 118, 133, 129, 148, 149, 158, 163, 163, 160, 152]
TARGET = 5.45
# Nats per point between the mixture's exact EM and what is as good.
TOLERANCE = 0.005

Row = dict[str, Any]


def precisions() -> tuple[Precision, ...]:
    """Those that are worth a measurement on this CPU, the fastest last."""
    return ("float32", "bfloat16") if cpu_has_bfloat16() else ("float32",)


def batches(size: int) -> Iterator[Sentences]:
    """Batches of random words of nearly equal lengths, with the treebank's share of lengths."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor(LENGTHS, dtype=torch.float)
    lengths = 2 + torch.multinomial(weights, 40 * size, replacement=True, generator=generator)
    chunks = lengths.sort().values.split(size)
    for index in cycle(torch.randperm(len(chunks), generator=generator).tolist()):
        chunk = chunks[index]
        words = torch.randint(0, VOCABULARY, (size, int(chunk.max())), generator=generator)
        yield Sentences(words, chunk, torch.arange(size))


def measure(step: Callable[[], object], repeats: int) -> float:
    """Median seconds of a step."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return median(times[2:])


def gigabytes() -> float:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def trainers(
    model: LatentVariableModel, posterior: Posterior, lr: float = 1e-3
) -> tuple[Trainer, Trainer]:
    adam = partial(torch.optim.Adam, fused=True)
    return (
        Trainer("model", model.parameter_groups(), partial(adam, lr=lr), 3.0, 0),
        Trainer("posterior", posterior.parameter_groups(), partial(adam, lr=2 * lr), 5.0, 0),
    )


def iteration(
    model: LatentVariableModel,
    posterior: GFlowNetPosterior,
    source: Iterator[Sentences],
    repeats: int,
) -> Row:
    """E-step, refinement and M-step, one after the other on the same batch."""
    p, q = trainers(model, posterior)
    parts: dict[str, list[float]] = {"e_step": [], "refinement": [], "m_step": []}

    def step() -> None:
        x = next(source)
        times = [time.perf_counter()]
        estep = posterior.e_step(model, x)
        assert estep.loss is not None and estep.latents is not None
        q.step(estep.loss)
        times.append(time.perf_counter())
        with torch.no_grad():
            latents = posterior.refine(model, x, estep.latents)
        times.append(time.perf_counter())
        p.step(-model.expected_log_joint(x, latents).mean())
        times.append(time.perf_counter())
        for part, began, ended in zip(parts.values(), times, times[1:], strict=False):
            part.append(ended - began)

    total = measure(step, repeats)
    return {**{name: median(part[2:]) for name, part in parts.items()}, "iteration": total}


def recipe(repeats: int) -> list[Row]:
    """32 sentences, 4 shapes each: VarGrad with the root-flow policy."""
    torch.manual_seed(0)
    model = NeuralPCFG(VOCABULARY, NONTERMINALS, PRETERMINALS, max_length=LENGTH)
    posterior = GFlowNetPosterior(RootFlowPolicy(NONTERMINALS, PRETERMINALS, LENGTH))
    return [{"what": "default recipe", **iteration(model, posterior, batches(32), repeats)}]


def ncfg(repeats: int) -> list[Row]:
    """32 sentences of the treebank, or random words without it: the chart policy with 4 shapes each
    and, as published, with one labelled tree each and SubTB(1); exact training.
    """
    try:
        data = treebank(max_length=LENGTH, batch_size=32)
        corpus = list(data.split("train").batches(32))
        order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(0)).tolist()
        vocabulary, source = len(data.vocabulary), lambda: cycle(corpus[i] for i in order)
    except UserError as error:
        print(f"random words: {error}", file=sys.stderr)
        vocabulary, source = VOCABULARY, lambda: batches(32)
    sizes = NONTERMINALS, PRETERMINALS
    rows = []
    for latent, precision in product(("shape", "labelled"), ("highest", "medium")):
        torch.manual_seed(0)
        torch.set_float32_matmul_precision(precision)
        model = NeuralNCFG(vocabulary, *sizes, max_length=LENGTH, latent=latent)
        policy = ChartPolicy(*sizes, LENGTH, latent)
        if latent == "shape":
            posterior = GFlowNetPosterior(policy)
        else:
            posterior = GFlowNetPosterior(
                policy, objectives.SubTrajectoryBalance(lamda=1.0), samples=1
            )
        row: Row = {"what": f"ncfg, chart, {latent}, {precision}"}
        row.update(iteration(model, posterior, source(), repeats))
        row["m_step alone"] = m_step_alone(model, posterior, source(), repeats)
        row["peak memory, GB"] = gigabytes()
        rows.append(row)
        if latent == "shape" and precision == "highest":
            exact = exact_step(model, source(), max(repeats // 3, 3))
            rows.append({"what": "ncfg, exact", "iteration": exact})
    torch.set_float32_matmul_precision("highest")
    return rows


def m_step_alone(
    model: LatentVariableModel, posterior: Posterior, source: Iterator[Sentences], repeats: int
) -> float:
    """Median seconds of M-steps on draws that are at hand, with nothing left from an E-step."""
    p, _ = trainers(model, posterior)
    times = []
    for _ in range(repeats + 2):
        x = next(source)
        latents = posterior.sample(model, x, posterior.m_step_samples)
        began = time.perf_counter()
        p.step(-posterior.expected_log_joint(model, x, latents).mean())
        times.append(time.perf_counter() - began)
    return median(times[2:])


def exact_step(model: LatentVariableModel, source: Iterator[Sentences], repeats: int) -> float:
    """Median seconds of steps along the gradient of log p(x)."""
    posterior = ExactPosterior()
    p = Trainer("model", model.parameter_groups(), partial(torch.optim.Adam, fused=True), 3.0, 0)

    def step() -> object:
        return p.step(-posterior.expected_log_joint(model, next(source)).mean())

    return measure(step, repeats)


def scaling(repeats: int) -> list[Row]:
    """EM iterations of both grammars with their default policies, and exact steps."""
    rows: list[Row] = []
    few = max(repeats // 3, 3)
    grammars = (
        ("cfg, 30 + 60", 30, None),
        ("cfg, 60 + 120", 60, None),
        ("ncfg, 30 + 60", 30, None),
        ("ncfg, 30 + 60, rank 128", 30, 128),
        ("ncfg, 60 + 120, rank 128", 60, 128),
    )
    for (name, nonterminals, rank), length in product(grammars, (10, 20, 30, 40)):
        torch.manual_seed(0)
        symbols = nonterminals, 2 * nonterminals
        if name.startswith("cfg"):
            model = NeuralPCFG(VOCABULARY, *symbols, max_length=length)
            policy = RootFlowPolicy(*symbols, length)
        else:
            model = NeuralNCFG(VOCABULARY, *symbols, rank=rank, max_length=length)
            policy = ChartPolicy(*symbols, length)
        words = torch.randint(0, VOCABULARY, (16, length))
        x = Sentences(words, torch.full((16,), length), torch.arange(16))
        row: Row = {"what": name, "words": length}
        row.update(iteration(model, GFlowNetPosterior(policy), repeat(x), few))
        row["exact"] = exact_step(model, repeat(x), few)
        rows.append(row)
    return rows


def published(width: int, layers: int, precision: Precision, repeats: int) -> list[Row]:
    """32 sentences, one labelled tree each: SubTB(1) with a transformer over all roots."""
    torch.manual_seed(0)
    model = NeuralPCFG(VOCABULARY, NONTERMINALS, PRETERMINALS, max_length=LENGTH, latent="labelled")
    policy = TransformerPolicy(
        VOCABULARY,
        NONTERMINALS,
        PRETERMINALS,
        LENGTH,
        "labelled",
        width=width,
        layers=layers,
        precision=precision,
    )
    posterior = GFlowNetPosterior(
        policy,
        objectives.SubTrajectoryBalance(lamda=1.0),
        samples=1,
        sleep=1.0,
        refinement=BackAndForth(steps=10),
    )
    name = f"published, {width} x {layers}, {precision}"
    return [{"what": name, **iteration(model, posterior, batches(32), repeats)}]


def small(repeats: int) -> list[Row]:
    return [row for each in precisions() for row in published(128, 2, each, repeats)]


def large(repeats: int) -> list[Row]:
    return published(512, 6, precisions()[-1], max(repeats // 2, 3))


def inside_algorithm(repeats: int) -> list[Row]:
    """Forward, and forward and backward, of 32 sentences of equal length."""
    rows = []
    for length in (10, 20, 40):
        torch.manual_seed(0)
        model = NeuralPCFG(VOCABULARY, NONTERMINALS, PRETERMINALS, max_length=length)
        words = torch.randint(0, VOCABULARY, (32, length))
        lengths = torch.full((32,), length)
        x = Sentences(words, lengths, torch.arange(32))
        grammar = model.grammar().map(lambda table: table.detach().requires_grad_())
        leaves = list(vars(grammar).values())

        def value(grammar=grammar, x=x) -> torch.Tensor:
            return inside.log_partition(grammar.potentials(x.words, x.lengths)).sum()

        def gradient(value=value, leaves=leaves) -> object:
            return torch.autograd.grad(value(), leaves)

        with torch.no_grad():
            forward = measure(value, repeats)
        both = measure(gradient, repeats)
        row: Row = {"what": f"inside, {length} words", "forward": forward, "backward too": both}
        row.update(_torch_struct(grammar, words) if length <= 20 else {})
        rows.append(row)
    return rows


def _torch_struct(grammar: Any, words: torch.Tensor) -> Row:
    """The same by torch-struct, where it is installed; a few repeats only, it is slow."""
    try:
        from torch_struct import SentCFG  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    lengths = torch.full((len(words),), words.shape[1])
    terms = grammar.emission[0].detach().t()[words].requires_grad_()
    rules = grammar.binary[0].detach().expand(len(words), -1, -1, -1).clone().requires_grad_()
    roots = grammar.root.detach().expand(len(words), -1).clone().requires_grad_()

    def forward() -> torch.Tensor:
        return SentCFG((terms, rules, roots), lengths=lengths).partition.sum()

    def gradient() -> object:
        return torch.autograd.grad(forward(), (terms, rules, roots))

    return {"torch-struct forward": measure(forward, 3), "torch-struct both": measure(gradient, 3)}


def images(repeats: int) -> list[Row]:
    """The published discrete VAE, its embedding one number wide; steps with their updates."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(128, 1, 28, 28, generator=generator).gt(0.8).float()
    x = Images(pixels, torch.arange(128))
    priors: tuple[PriorName, ...] = ("masked_convolution", "uniform")
    rows = [_image_steps(*each, x, repeats) for each in product(priors, precisions())]
    model, policy = _published_vae("uniform", "distance", "float32")
    quantised = VectorQuantized(policy)
    p, q = trainers(model, quantised)

    def step() -> None:
        loss = quantised.e_step(model, x).loss
        assert loss is not None
        minimise(loss, p, q)

    seconds = measure(step, repeats)
    epoch = seconds * -(-60_000 // len(x))
    rows.append({"what": "VQ-VAE, published size", "step": seconds, "epoch": epoch})
    return rows


def _published_vae(
    prior: PriorName, logits: Literal["linear", "distance"], precision: Precision
) -> tuple[DiscreteVAE, GridPolicy]:
    torch.manual_seed(0)
    sizes = {"channels": 1, "height": 28, "width": 28, "embedding": 1, "precision": precision}
    model = DiscreteVAE(**sizes, decoder_width=128, prior=prior)
    return model, GridPolicy(**sizes, encoder_width=128, hidden=128, logits=logits)


def _image_steps(prior: PriorName, precision: Precision, x: Images, repeats: int) -> Row:
    """One trajectory for each image with TB, as published, and the default of four with VarGrad."""
    model, policy = _published_vae(prior, "linear", precision)
    one = GFlowNetPosterior(policy, objectives.TrajectoryBalance(), samples=1, sleep_samples=len(x))
    four = GFlowNetPosterior(policy, samples=4)
    # A rate of zero: a posterior that has learned a batch by heart draws few grids, which are
    # decoded once each.
    p, q = trainers(model, one, lr=0.0)

    def e_step(posterior: GFlowNetPosterior) -> None:
        loss = posterior.e_step(model, x).loss
        assert loss is not None
        q.step(loss)

    def sleep_step() -> None:
        loss = one.sleep_loss(model)
        assert loss is not None
        q.step(loss)

    def likelihood() -> None:
        with inference(model, policy):
            log_weights(policy, model, x.select(slice(1)), 5000)

    return {
        "what": f"discrete VAE, published size, prior {prior}, {precision}",
        "e_step": measure(partial(e_step, one), repeats),
        "e_step, 4 samples": measure(partial(e_step, four), repeats),
        "sleep_step": measure(sleep_step, repeats),
        "m_step": measure(lambda: p.step(-one.expected_log_joint(model, x).mean()), repeats),
        "likelihood, 5,000 samples": measure(likelihood, max(repeats // 3, 3)),
    }


def target(repeats: int) -> list[Row]:
    """Seconds of training to a validation likelihood, evaluations not counted."""
    rows = []
    for name in ("default recipe", "exact"):
        torch.manual_seed(0)
        data = treebank(max_length=LENGTH, batch_size=16)
        words = len(data.vocabulary)
        model = NeuralPCFG(words, NONTERMINALS, PRETERMINALS, max_length=LENGTH)
        if name == "exact":
            posterior = ExactPosterior()
        else:
            posterior = GFlowNetPosterior(RootFlowPolicy(NONTERMINALS, PRETERMINALS, LENGTH))
        reach = _Reach(partial(_nats_per_word, data), TARGET)
        em = EM(
            model,
            posterior,
            data,
            m_steps=2000,
            schedule=Alternation(warmup_e_steps=100),
            evaluator=reach,
            evaluate_every=25,
            seed=0,
        )
        reach.em = em
        em.fit()
        rows.append({"what": f"{name} to {TARGET}", "seconds": reach.seconds, "m_steps": reach.at})
    return rows


def _nats_per_word(data: Any, model: Any) -> float:
    nats = words = 0.0
    for x in data.split("valid").batches(64):
        nats -= float(model.log_likelihood(x).sum())
        words += int(x.lengths.sum())
    return nats / words


def mixture(repeats: int) -> list[Row]:
    """From so many starts, seconds of training until the training points have the likelihood that
    exact EM gives them from the same start, less a tolerance; evaluations not counted.
    """
    data = sampled()
    closed = partial(ExactPosterior, "closed")

    def gflownet() -> GFlowNetPosterior:
        policy = MixturePolicy(data)
        return GFlowNetPosterior(
            policy,
            sleep=1.0,
            sleep_samples=1000,
            refinement=ImportanceWeighting(),
            m_step="closed",
        )

    def fit(seed: int, make: Callable[[], Posterior], target: float = -math.inf) -> Row:
        torch.manual_seed(seed)
        model = starting_at(data)
        reach = _Reach(partial(_nats_per_point, data), target)
        em = EM(
            model,
            make(),
            data,
            m_steps=100,
            schedule=Alternation(warmup_e_steps=100),
            posterior_optimizer=partial(torch.optim.Adam, lr=1e-2, fused=True),
            evaluator=reach,
            evaluate_every=2,
        )
        reach.em = em
        em.fit()
        return {"nats": reach.nats, "seconds": reach.seconds, "m_steps": reach.at}

    runs: dict[str, list[Row]] = {"exact EM": [], "GFlowNet": []}
    for seed in range(repeats):
        best = fit(seed, closed)["nats"]
        for name, make in zip(runs, (closed, gflownet), strict=True):
            runs[name].append(fit(seed, make, best + TOLERANCE))
    return [
        {
            "what": f"mixture: {name} to within {TOLERANCE} nats of exact EM",
            "seconds": median(run["seconds"] for run in of_name),
            "m_steps": median(run["m_steps"] for run in of_name),
            "starts that get there": sum(run["m_steps"] > 0 for run in of_name),
            "starts": repeats,
        }
        for name, of_name in runs.items()
    ]


def _nats_per_point(data: PointData, model: Any) -> float:
    return -float(model.log_likelihood(data.train).mean())


class _Reach:
    """Stops training at the target and takes the evaluations' time out.

    rate: says how many nats a model needs.
    """

    em: EM

    def __init__(self, rate: Callable[[Any], float], target: float):
        self.rate = rate
        self.target = target
        self.nats = math.inf
        self.spent = 0.0
        self.seconds = float("nan")
        self.at = 0

    def __call__(self, model: Any, posterior: Any, split: str, final: bool = False) -> Row:
        began = time.perf_counter()
        self.nats = self.rate(model)
        if not self.at and self.nats <= self.target:
            self.seconds, self.at = self.em.done.seconds - self.spent, self.em.done.m_steps
            self.em.stop()
        self.spent += time.perf_counter() - began
        return {self.selection(model): self.nats}

    def selection(self, model: Any) -> str:
        return "valid/nll"

    def report(self, model: Any, posterior: Any, run: Any) -> None:
        """Nothing to report: figures are this script's."""


SECTIONS: dict[str, Callable[[int], list[Row]]] = {
    "recipe": recipe,
    "small": small,
    "large": large,
    "ncfg": ncfg,
    "scaling": scaling,
    "inside": inside_algorithm,
    "images": images,
    "mixture": mixture,
    "target": target,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="file to write the rows to")
    parser.add_argument("--only", choices=SECTIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        # As `gfnem` does before it trains.
        set_up(seed=0, threads=options.threads, device="cpu")
        rows = SECTIONS[options.only](options.repeats)
        print(json.dumps([{"peak memory, GB": gigabytes(), **row} for row in rows]))
        return
    rows = []
    for section in options.sections or [name for name in SECTIONS if name != "target"]:
        command = [sys.executable, __file__, "--only", section]
        command += ["--repeats", str(options.repeats), "--threads", str(options.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows += json.loads(done.stdout.splitlines()[-1])
        print(f"{section}: done", file=sys.stderr)
    about = {
        "torch": torch.__version__,
        "threads": options.threads,
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for row in rows:
        cells = [f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
        print("  ".join(cells).removeprefix("what "))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({**about, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
