"""q(z | x) over grids of codes: an image encoder and a correction that sees the codes before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from gfn.states import DiscreteStates
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from gfnem.categorical import sample_categorical
from gfnem.errors import UserError
from gfnem.gflownet.estimator import PolicyEstimator
from gfnem.gflownet.policy import Behaviour
from gfnem.gflownet.sequence import SequencePolicy
from gfnem.precision import Precision, check_precision, training_precision
from gfnem.tasks.discrete_vae.causal import CausalLinear
from gfnem.tasks.discrete_vae.codes import Codes, distinct
from gfnem.tasks.discrete_vae.env import GridEnv
from gfnem.tasks.discrete_vae.images import Images
from gfnem.tasks.discrete_vae.layers import downwards, grid_of
from gfnem.tasks.discrete_vae.model import DiscreteVAE


@dataclass(frozen=True)
class GridCondition:
    """A batch of images as policies see it.

    base: logits of each code at each position, from the image alone.
    given: what the correction takes from the image.
    """

    x: Images
    model: DiscreteVAE
    base: Float[Tensor, "batch positions codes"]
    given: Float[Tensor, "batch positions hidden"]

    def select(self, rows: Int[Tensor, "rows"]) -> GridCondition:
        """The same of chosen images, which may repeat."""
        return GridCondition(self.x.select(rows), self.model, self.base[rows], self.given[rows])


class GridPolicy(SequencePolicy):
    """Fills a grid in raster order; the encoder runs once for each image.

    The logits of a code are those that the encoder gives it from the image alone and, with
    `autoregressive`, a correction that sees the codes placed before and starts at zero.

    channels, height, width, grid, codes, embedding: of the model.
    encoder_width: channels of the encoder's convolutions.
    blocks: its residual blocks.
    hidden: width of the correction's network, which gives log Z(x) and the state flows too.
    logits: "linear" in the encoder's features; "distance": - beta |h - e|^2 of a learned
        projection h of them to the codebook's entries e, as in a VQ-VAE; or "bounded_distance",
        the same with h between -1 and 1.
    autoregressive: False for a factorised q.
    precision: "bfloat16" trains the encoder's convolutions in autocast; evaluations are in float32
        all the same.
    compile: the encoder's convolutions with torch.compile.
    """

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        grid: Sequence[int] | None = None,
        codes: int = 8,
        embedding: int = 32,
        encoder_width: int = 32,
        blocks: int = 2,
        hidden: int = 64,
        logits: Literal["linear", "distance", "bounded_distance"] = "linear",
        autoregressive: bool = True,
        precision: Precision = "float32",
        compile: bool = False,
    ):
        rows, columns = grid_of((height, width), grid)
        super().__init__(steps=rows * columns)
        for name, value, least in (
            ("encoder_width", encoder_width, 1),
            ("blocks", blocks, 0),
            ("hidden", hidden, 1),
        ):
            if value < least:
                raise UserError(f"policy.{name} is {value}; it must be at least {least}")
        if logits not in ("linear", "distance", "bounded_distance"):
            raise UserError(
                f"policy.logits is {logits!r}; use 'linear', 'distance' or 'bounded_distance'"
            )
        check_precision("policy", precision)
        self.precision: Precision = precision
        self.positions = self.steps
        self.codes = codes
        self.embedding = embedding
        self.logits = logits
        self.autoregressive = autoregressive
        self.encoder = downwards(channels, encoder_width, blocks, (height, width), (rows, columns))
        if compile:
            self.encoder.compile()
        self.projection: nn.Module = nn.Linear(
            encoder_width, codes if logits == "linear" else embedding
        )
        if logits == "bounded_distance":
            self.projection = nn.Sequential(self.projection, nn.Tanh())
        self.log_beta = None if logits == "linear" else nn.Parameter(torch.zeros(()))
        self.correction = CausalLinear(self.positions, codes, hidden, context=encoder_width)
        self.correct = nn.Linear(hidden, codes) if autoregressive else None
        if self.correct is not None:
            nn.init.zeros_(self.correct.weight)
            nn.init.zeros_(self.correct.bias)
        self.flow = nn.Linear(hidden, 1)

    def make_env(self, device: torch.device) -> GridEnv:
        return GridEnv(self.steps, self.codes, device)

    def actions(self, choices: Int[Tensor, "rows positions"]) -> Int[Tensor, "rows positions"]:
        return choices

    def latents(self, index: Int[Tensor, "batch samples positions"]) -> Codes:
        return Codes(index)

    def features(self, x: Images) -> Float[Tensor, "batch positions encoder_width"]:
        """The encoder's features of each position of the grid."""
        with training_precision(self, self.precision):
            features = self.encoder(x.pixels)
        return features.flatten(2).mT.to(x.pixels.dtype)

    def base_logits(
        self, model: DiscreteVAE, projected: Float[Tensor, "batch positions width"]
    ) -> Float[Tensor, "batch positions codes"]:
        """Logits of a factorised q, from the projected features."""
        if self.log_beta is None:
            return projected
        entries = model.codebook.weight.detach()
        # |h|^2 is the same for all entries.
        distance = entries.square().sum(-1) - 2 * projected @ entries.t()
        return -self.log_beta.exp() * distance

    def condition(self, model: DiscreteVAE, x: Images) -> GridCondition:
        features = self.features(x)
        base = self.base_logits(model, self.projection(features))
        return GridCondition(x, model, base, self.correction.given(features))

    def draw(
        self, condition: GridCondition, samples: int, temperature: float = 1.0
    ) -> tuple[Codes, Float[Tensor, "batch samples"]]:
        """Grids drawn from q at a temperature, and the log-probabilities with which they were."""
        with torch.no_grad():
            index = self._draw(condition, samples, Behaviour(temperature))
            log_q = self._log_probabilities(condition, index, temperature).sum(-1)
        return Codes(index), log_q

    @torch.no_grad()
    def most_likely(self, condition: GridCondition) -> Codes:
        """The most likely code, position by position."""
        return Codes(self._draw(condition, 1, None))

    @torch.no_grad()
    def _draw(
        self,
        condition: GridCondition,
        samples: int,
        behaviour: Behaviour | None,
        kept: Int[Tensor, "batch samples before"] | None = None,
    ) -> Int[Tensor, "batch samples positions"]:
        """Fill grids, behind the codes kept; behaviour None takes the most likely codes."""
        base, given = condition.base[:, None], condition.given[:, None]
        if kept is None:
            kept = base.new_zeros(len(base), samples, 0, dtype=torch.long)
        first = kept.shape[-1]
        if self.correct is None:
            logits = base[:, :, first:].expand(-1, samples, -1, -1)
            return torch.cat([kept, self._choose(logits, behaviour)], -1)
        index = kept
        one_hot = functional.one_hot(index, self.codes).to(base.dtype)
        for position in range(first, self.positions):
            # Before the first code, all draws of an image are the same.
            before = one_hot if position else one_hot[:, :1]
            hidden = self.correction.at(position, before, given)
            logits = base[:, :, position] + self.correct(hidden)
            chosen = self._choose(logits.expand(-1, samples, -1), behaviour)
            index = torch.cat([index, chosen[..., None]], -1)
            placed = functional.one_hot(chosen[..., None], self.codes).to(base.dtype)
            one_hot = torch.cat([one_hot, placed], -2)
        return index

    def _choose(
        self, logits: Float[Tensor, "*batch codes"], behaviour: Behaviour | None
    ) -> Int[Tensor, "*batch"]:
        if behaviour is None:
            return logits.argmax(-1)
        return sample_categorical(behaviour.probabilities(logits))

    def _log_probabilities(
        self,
        condition: GridCondition,
        index: Int[Tensor, "batch samples positions"],
        temperature: float = 1.0,
    ) -> Float[Tensor, "batch samples positions"]:
        """log q of each code given those before it, all positions in one pass.

        Grids that repeat among an image's draws are scored once.
        """
        if self.correct is None:
            log_q = (condition.base[:, None] / temperature).log_softmax(-1)
            log_q = log_q.expand(*index.shape, -1)
            return log_q.gather(-1, index[..., None]).squeeze(-1)
        batch, samples = index.shape[:2]
        grids, grid = distinct(index.flatten(0, 1), self.codes)
        image = torch.arange(batch, device=grid.device).repeat_interleave(samples)
        pair, row = (image * len(grids) + grid).unique(return_inverse=True)
        image, chosen = pair // len(grids), grids[pair % len(grids)]
        one_hot = functional.one_hot(chosen, self.codes).to(condition.given.dtype)
        hidden = self.correction(one_hot, condition.given[image])
        log_q = ((condition.base[image] + self.correct(hidden)) / temperature).log_softmax(-1)
        log_q = log_q.gather(-1, chosen[..., None]).squeeze(-1)
        return log_q[row].unflatten(0, (batch, samples))

    def _hidden(
        self, condition: GridCondition, index: Int[Tensor, "batch samples positions"]
    ) -> Float[Tensor, "batch samples positions hidden"]:
        one_hot = functional.one_hot(index, self.codes).to(condition.given.dtype)
        return self.correction(one_hot, condition.given[:, None])

    def _flows(
        self,
        condition: GridCondition,
        index: Int[Tensor, "batch samples positions"],
        log_joint: Float[Tensor, "batch samples"],
    ) -> tuple[Float[Tensor, "steps rows"], Float[Tensor, "steps rows"]]:
        """Learned log flow of the states before each action, and log p of the codes placed there.

        What a code says of the image is not known before the grid is full, its prior is.
        """
        # A position's features may not see all of the image, which log Z(x) depends on.
        hidden = self._hidden(condition, index) + condition.given.mean(1)[:, None, None]
        learned = self.flow(hidden).squeeze(-1).flatten(0, 1).t()
        with torch.no_grad():
            placed = condition.model.prior.log_prob(index.flatten(0, 1)).cumsum(-1).t()
        none = torch.zeros_like(learned[:1])
        fixed = torch.cat([none, placed[:-1], log_joint.flatten()[None]])
        return torch.cat([learned, none]), fixed

    def estimators(self, condition: GridCondition) -> tuple[GridEstimator, GridEstimator]:
        return GridEstimator(self, condition, False), GridEstimator(self, condition, True)

    def flow_parameters(self) -> list[nn.Parameter]:
        return list(self.flow.parameters())


class GridEstimator(PolicyEstimator):
    """P_F or P_B at given states of a `GridEnv`, for torchgfn's own samplers."""

    def __init__(self, policy: GridPolicy, condition: GridCondition, is_backward: bool):
        super().__init__(policy, condition, is_backward, policy.codes + 1)

    def forward(
        self, states: DiscreteStates, conditions: Float[Tensor, "*batch 1"]
    ) -> Float[Tensor, "*batch actions"]:
        policy: GridPolicy = self.policy
        shape = states.batch_shape
        if self.is_backward:
            return conditions.new_zeros(*shape, policy.codes)
        condition = self.condition.select(conditions[..., 0].long().flatten())
        filled = states.tensor.reshape(-1, policy.positions)
        here = (filled >= 0).sum(-1).clamp(max=policy.positions - 1)
        logits = condition.base
        if policy.correct is not None:
            hidden = policy._hidden(condition, filled.clamp(min=0)[:, None]).squeeze(1)
            logits = logits + policy.correct(hidden)
        logits = logits[torch.arange(len(here), device=here.device), here]
        return torch.cat([logits, torch.zeros_like(logits[:, :1])], -1).view(*shape, -1)
