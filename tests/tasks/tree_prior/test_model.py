"""The model of shapes held to the enumeration of all of them."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.latents import Latents
from gfnem.posteriors.mcmc import MCMC
from gfnem.run import Run
from gfnem.tasks.grammar.text.sources import toy_english
from gfnem.tasks.grammar.trees.energy import trained_network
from gfnem.tasks.grammar.trees.tree import Trees
from gfnem.tasks.tree_prior.data import ShapeData, Shapes
from gfnem.tasks.tree_prior.evaluate import (
    ShapeEvaluator,
    every_shape,
    log_partition,
    pseudo_nll,
)
from gfnem.tasks.tree_prior.model import ShapeModel
from gfnem.tasks.tree_prior.moves import ShapeRotations
from tests.tasks.grammar import oracle
from tests.tasks.grammar.tiny import FixedModel, count_trees, p_value


def noisy_model(seed: int = 0) -> ShapeModel:
    torch.manual_seed(seed)
    model = ShapeModel(width=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.7 * torch.randn_like(parameter)
    return model


def probabilities(model: ShapeModel, length: int) -> dict[oracle.Shape, float]:
    """p(shape | n), from energies of trees written out one by one."""
    shapes = oracle.shapes(length)
    with torch.no_grad():
        energies = model.energy(oracle.to_trees([shapes], torch.tensor([length])))[0]
    return dict(zip(shapes, (-energies).softmax(-1).tolist(), strict=True))


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6])
def test_every_shape_is_there_once(length):
    trees = every_shape(length)
    found = [trees.spans(0, number) for number in range(trees.start.shape[1])]
    assert len(found) == len(set(found))
    assert set(found) == set(oracle.shapes(length))


def test_pseudo_likelihood_is_of_the_neighbours():
    model, length = noisy_model(), 5
    p = probabilities(model, length)
    shapes = oracle.shapes(length)
    lengths = torch.tensor([5, 2])
    trees = oracle.to_trees([shapes, oracle.shapes(2) * 14], lengths)
    with torch.no_grad():
        values = pseudo_nll(model, trees)
    assert not values[1].any()
    for number, shape in enumerate(shapes):
        near = [other for other in shapes if len(shape - other) == 1]
        assert len(near) == length - 2
        expected = p[shape] / (p[shape] + sum(p[other] for other in near))
        assert float((-values[0, number]).exp()) == pytest.approx(expected, rel=1e-4)


def test_chains_have_the_models_distribution():
    model, lengths = noisy_model(), torch.tensor([5, 3, 2])
    trees = Trees.random(lengths)
    x = Shapes(trees, torch.arange(3))
    torch.manual_seed(0)
    z = MCMC(ShapeRotations(), 5_000, steps=10, burn_in=40).m_step_latents(model, x).z
    for row, length in enumerate(lengths.tolist()):
        assert p_value(count_trees(z, row), probabilities(model, length)) > 1e-3


def test_the_gradient_is_that_of_the_likelihood():
    """With every shape in place of draws, each counting by its probability."""
    model, length = noisy_model(), 5
    gold = every_shape(length).select(torch.tensor([[3]]))
    log_p = -model.energy(gold).squeeze() - log_partition(model, length)
    expected = torch.autograd.grad(log_p, list(model.parameters()))
    z = every_shape(length)
    with torch.no_grad():
        weights = (-model.energy(z)).softmax(-1)
    drawn = Latents(z, None, weights)
    climbed = drawn.mean(model.log_joint(Shapes(gold, torch.zeros(1).long()), z)).sum()
    for one, other in zip(
        torch.autograd.grad(climbed, list(model.parameters())), expected, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


class Few(ShapeData):
    """Shapes over five words, some more frequent than others."""

    def __init__(self):
        shapes = oracle.shapes(5)
        counts = Counter({shape: 2 for shape in shapes})
        counts.update({shapes[0]: 48, shapes[3]: 30, shapes[5]: 12, shapes[13]: 12})
        total = counts.total()
        self.p = {shape: count / total for shape, count in counts.items()}
        each = [[shape] for shape in counts.elements()]
        self.x = Shapes(oracle.to_trees(each, torch.full((total,), 5)), torch.arange(total))

    def train_batches(self, epoch):
        return [self.x]


def test_it_learns_the_shapes_that_there_are():
    data = Few()
    torch.manual_seed(0)
    model = ShapeModel(width=8)
    posterior = MCMC(ShapeRotations(), samples=4, steps=4, burn_in=10)

    def divergence() -> float:
        """KL from the data's shapes to the model."""
        q = probabilities(model, 5)
        p = torch.tensor(list(data.p.values()))
        return float((p * (p / torch.tensor([q[shape] for shape in data.p])).log()).sum())

    before = divergence()
    optimizer = partial(torch.optim.Adam, lr=5e-3)
    EM(model, posterior, data, m_steps=150, model_optimizer=optimizer).fit()
    assert before > 0.7
    assert divergence() < 0.05


def test_figures_are_those_of_enumeration():
    corpora = toy_english(train_sentences=5, valid_sentences=12, test_sentences=1, max_length=6)
    data, model = ShapeData(corpora, batch_size=5), noisy_model()
    posterior = MCMC(ShapeRotations(), samples=1, burn_in=50)
    metrics = ShapeEvaluator(data, samples=50)(model, posterior, "valid")
    shapes = [
        (x.trees.spans(row), length)
        for x in data.batches("valid")
        for row, length in enumerate(x.lengths.tolist())
    ]
    p = [probabilities(model, length) for _, length in shapes]
    nll = [-torch.tensor(q[shape]).log() for q, (shape, _) in zip(p, shapes, strict=True)]
    assert metrics["valid/short_nll"] == pytest.approx(float(torch.stack(nll).mean()), rel=1e-3)
    uniform = torch.tensor([float(len(q)) for q in p]).log().mean()
    assert metrics["valid/uniform_short_nll"] == pytest.approx(float(uniform), rel=1e-5)
    right = depth = model_right = below = 0.0
    for q, (shape, length) in zip(p, shapes, strict=True):
        depth += max(sum(i <= word < j for i, j in shape) for word in range(length))
        if length > 2:
            below += 1
            right += share_of_right_children(shape, length)
            model_right += sum(
                value * share_of_right_children(other, length) for other, value in q.items()
            )
    assert metrics["valid/depth"] == pytest.approx(depth / len(shapes))
    assert metrics["valid/right_branching"] == pytest.approx(right / below)
    assert metrics["valid/model_right_branching"] == pytest.approx(model_right / below, abs=0.05)
    assert metrics["valid/pseudo_nll"] > 0
    assert 0 < metrics["valid/model_sentence_f1"] < 100


def share_of_right_children(shape: oracle.Shape, length: int) -> float:
    """Of the nodes below the root."""
    right = 0
    for i, j in shape:
        parents = [(a, b) for a, b in shape if a <= i and j <= b and (a, b) != (i, j)]
        if parents:
            _, end = min(parents, key=lambda span: span[1] - span[0])
            right += end == j
    return right / (length - 2)


def test_what_cannot_be():
    with pytest.raises(UserError, match="^model.width is 0; it must be at least 1$"):
        ShapeModel(width=0)
    with pytest.raises(UserError, match="^evaluator.samples is 0; it must be at least 1$"):
        ShapeEvaluator(Few(), samples=0)
    message = "^posterior.moves=ShapeRotations are of model=tree_energy, which FixedModel is not"
    with pytest.raises(UserError, match=message):
        ShapeRotations().condition(FixedModel(oracle.random_grammar()), Few().x)
    with pytest.raises(NotImplementedError, match="^how long sentences are is no part"):
        ShapeModel().sample(3)


def test_trained_networks_are_read_from_their_run(tmp_path):
    run = Run.create(tmp_path / "run", {})
    model = noisy_model()
    run.save_checkpoint({"model": model.state_dict()}, best=True)
    network = trained_network(str(tmp_path / "run"), width=4)
    trees = every_shape(5)
    assert network(trees).equal(model.energy(trees))
    with pytest.raises(UserError, match="has no network of width 8: give a run of task=tree_prior"):
        trained_network(str(tmp_path / "run"), width=8)
    assert not trained_network(None)(trees).any()
