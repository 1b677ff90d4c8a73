from __future__ import annotations

import pytest
import torch

from gfnem.posteriors.mcmc import MCMC
from gfnem.tasks.discrete_vae.moves import CodeGibbs
from tests.tasks.discrete_vae.tiny import (
    CODES,
    all_grids,
    counts,
    float64,
    images,
    make_model,
    p_value,
    posteriors,
    total_variation,
)

__all__ = ["float64"]
pytestmark = pytest.mark.usefixtures("float64")

Grid = tuple[int, ...]


def kernel_of(p: dict[Grid, float]) -> dict[Grid, dict[Grid, float]]:
    """Of one transition: at each of four positions as often, p(z | x) over the grids that are the
    same everywhere else.
    """
    kernel: dict[Grid, dict[Grid, float]] = {}
    for z in p:
        kernel[z] = dict.fromkeys(p, 0.0)
        for position in range(4):
            others = [(*z[:position], code, *z[position + 1 :]) for code in range(CODES)]
            total = sum(p[y] for y in others)
            for y in others:
                kernel[z][y] += p[y] / total / 4
    return kernel


def test_transitions_are_those_of_the_enumerated_kernel():
    model, x = make_model(noise=0.5), images(2)
    moves, repeats = CodeGibbs(), 500
    grids = all_grids()
    state = grids.repeat_interleave(repeats, 0).expand(2, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        end = moves.walk(moves.condition(model, x), state, 1)
    for row, p in enumerate(posteriors(model, x)):
        kernel = kernel_of(p)
        for z in p:
            assert sum(p[y] * kernel[y][z] for y in p) == pytest.approx(p[z])
        for grid, reached in zip(grids.tolist(), end[row].split(repeats), strict=True):
            assert p_value(counts(reached), kernel[tuple(grid)]) > 1e-5


def test_chains_have_the_exact_posterior():
    model, x, samples = make_model(noise=0.5), images(2), 6_000
    torch.manual_seed(0)
    latents = MCMC(CodeGibbs(), samples, burn_in=40).sample(model, x, samples)
    for row, p in enumerate(posteriors(model, x)):
        drawn = counts(latents.z.index[row])
        assert p_value(drawn, p) > 1e-3
        assert total_variation({z: n / samples for z, n in drawn.items()}, p) < 0.03


def test_a_transition_tries_all_codes_of_one_position(monkeypatch):
    model, x = make_model(), images(3)
    asked = []
    log_joint = model.log_joint
    monkeypatch.setattr(model, "log_joint", lambda x, z: asked.append(z.index) or log_joint(x, z))
    moves = CodeGibbs()
    with torch.no_grad():
        condition = moves.condition(model, x)
        state = moves.begin(condition, 5)
        after = moves.walk(condition, state, 1)
    assert state.shape == after.shape == (3, 5, 4)
    (index,) = asked
    tried = index.view(3, 5, 3, 4)
    differs = (tried != state[:, :, None]).any(2)
    assert (differs.sum(-1) == 1).all()
    assert (tried.sort(2).values == torch.arange(3)[:, None]).all(2)[differs].all()
    assert ((after != state) <= differs).all()
