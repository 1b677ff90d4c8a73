"""Symbol dropout, replay and local search: what they are, and that q still goes to p(z | x)."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor

from gfnem.em import EM
from gfnem.errors import UserError
from gfnem.gflownet.objectives import ForwardKL, ReverseKL, SubTrajectoryBalance, VarGrad, sleep
from gfnem.gflownet.policy import Policy
from gfnem.gflownet.refinement import BackAndForth
from gfnem.gflownet.replay import Replay
from gfnem.posteriors.gflownet import GFlowNetPosterior
from gfnem.tasks.grammar.networks import NeuralPCFG
from gfnem.tasks.grammar.policies.encoder import SpanEncoder
from gfnem.tasks.grammar.policies.root_flow import RootFlowPolicy
from gfnem.tasks.grammar.text.sources import toy_english
from tests.posteriors.test_gflownet import SETTINGS, distances, setting, train
from tests.tasks.discrete_vae import tiny as images
from tests.tasks.grammar import oracle, parents_oracle
from tests.tasks.grammar.policies.test_chart import make_policy as make_chart
from tests.tasks.grammar.policies.test_chart import ncfg, q_of
from tests.tasks.grammar.tiny import (
    FixedModel,
    count_trees,
    enumerate_trees,
    make_policy,
    sentences,
    total_variation,
    words_of,
)
from tests.tasks.mixture import tiny as mixtures

SEARCH = BackAndForth(steps=1, depth=3)


# What they lead to.


@pytest.mark.parametrize(
    "latent, steps, tools",
    [
        ("shape", 80, {"local_search": SEARCH}),
        ("shape", 130, {"objective": SubTrajectoryBalance(), "flow_lr": 0.1, "replay": 6}),
        ("labelled", 120, {"local_search": SEARCH, "replay": 6}),
    ],
)
def test_trained_posterior_is_that_of_enumeration(latent: Any, steps: int, tools: dict[str, Any]):
    model, posterior, x = setting(latent, samples=16, **tools)
    assert min(distances(model, posterior, x, latent)) > 0.1
    train(model, posterior, x, steps)
    assert max(distances(model, posterior, x, latent)) < 0.05


# A corrected symbol of a labelled tree weighs more than one that is summed out.
@pytest.mark.parametrize("latent, probability", [("shape", 0.1), ("labelled", 0.05)])
def test_trained_posterior_is_that_of_enumeration_with_symbol_dropout(
    latent: Any, probability: float
):
    grammar, lengths, seed = SETTINGS[latent]
    model, x = FixedModel(grammar, latent), sentences(lengths, seed=seed)
    policy = make_policy(
        "root_flow", latent, nonterminals=2, noise=0.1, width=16, symbol_dropout=probability
    )
    posterior = GFlowNetPosterior(policy, samples=32)
    assert min(distances(model, posterior.eval(), x, latent)) > 0.1
    train(model, posterior.train(), x, steps=150)
    assert max(distances(model, posterior.eval(), x, latent)) < 0.05


def test_trained_posterior_of_a_chart_is_that_of_enumeration():
    x, latent = sentences([4, 3]), "labelled"
    model: Any = ncfg(latent, seed=4).float()
    policy = make_chart(latent, "relaxation")
    posterior = GFlowNetPosterior(policy, samples=32, local_search=SEARCH, replay=6)
    grammar = model.grammar()
    rules = [getattr(grammar, name).detach() for name in ("root", "binary", "emission")]
    exact = [
        oracle.posterior(parents_oracle.enumerate_labelled(type(grammar)(*rules), words))
        for words in (words_of(x, 0), words_of(x, 1))
    ]

    def distance() -> float:
        q = q_of(policy, model, x)
        return max(total_variation(p, found) for p, found in zip(exact, q, strict=True))

    assert distance() > 0.1
    # On its own draws alone it loses trees, and is at 0.3 then.
    train(model, posterior, x, steps=200)
    assert distance() < 0.05


# What the objective sees.


@pytest.mark.parametrize("latent", ["shape", "labelled"])
def test_the_loss_is_over_all_trajectories_of_a_sentence(latent: Any, monkeypatch):
    model, posterior, x = setting(latent, samples=3, local_search=SEARCH, replay=2)
    policy: Any = posterior.policy
    seen: dict[str, list[Any]] = {"sample": [], "retrace": [], "walk": []}

    def spy(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def told(*arguments: Any) -> Any:
            seen[name].append(call(*arguments))
            return seen[name][-1]

        monkeypatch.setattr(owner, name, told)

    spy(policy, "sample")
    spy(policy, "retrace")
    spy(posterior.local_search, "walk")
    before = None
    for _ in range(2):
        for values in seen.values():
            values.clear()
        step = posterior.e_step(model, x)
        (drawn,), (searched, replayed), (walked,) = seen.values()
        scores = torch.cat([paths.log_weights for paths in (drawn, searched, replayed)], 1)
        assert scores.shape == (2, 3 + 3 + 2)
        expected = (scores - scores.mean(-1, keepdim=True)).square().mean()
        torch.testing.assert_close(step.loss, expected)
        assert torch.equal(searched.z.numbers, walked.numbers)
        if before is not None:
            assert torch.equal(replayed.z.numbers, before)
        assert isinstance(posterior.replay, Replay)
        before = posterior.replay.recall(x.ids, drawn.z.numbers)
        # The M-step has plain draws alone.
        assert step.latents is not None
        assert torch.equal(step.latents.z.numbers, drawn.z.numbers)
        torch.testing.assert_close(step.latents.log_weights, drawn.log_weights.detach())


def test_gradients_are_those_of_the_policy_alone():
    _, posterior, x = setting(
        "shape", objective=SubTrajectoryBalance(), local_search=SEARCH, replay=2
    )
    model = NeuralPCFG(8, 2, 3, width=8, max_length=5)
    step = posterior.e_step(model, x)
    assert step.loss is not None
    step.loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in posterior.policy.flow_parameters())


# What is kept.


def test_the_best_of_all_that_was_shown_is_kept():
    replay, size = Replay(3), 3
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(5, 4**2, generator=generator)
    seen: dict[int, set[tuple[int, ...]]] = {number: set() for number in range(5)}

    def value(number: int, latent: tuple[int, ...]) -> float:
        return float(table[number, 4 * latent[0] + latent[1]])

    for ids in ([1, 3], [0, 1], [3, 4, 1], [1, 3], [0, 4, 3]):
        drawn = torch.randint(4, (len(ids), 2, 2), generator=generator)
        recalled = replay.recall(torch.tensor(ids), drawn)
        shown = torch.cat([drawn, recalled], 1)
        log_joint = torch.stack(
            [
                table[number, 4 * row[:, 0] + row[:, 1]]
                for number, row in zip(ids, shown, strict=True)
            ]
        )
        replay.show(torch.tensor(ids), shown, log_joint)
        for number, rows in zip(ids, drawn.tolist(), strict=True):
            seen[number] |= {tuple(row) for row in rows}
            best = sorted(seen[number], key=lambda z, n=number: -value(n, z))[:size]
            kept = replay.kept.table[number].tolist()
            assert kept == [*map(list, best), *[[-1, -1]] * (size - len(best))]
    assert (replay.kept.table[2] == -1).all()


def test_latents_that_are_missing_are_replaced_by_draws_and_the_impossible_is_not_kept():
    replay = Replay(4)
    ids, drawn = torch.tensor([1]), torch.tensor([[[1, 2], [3, 4]]])
    assert replay.recall(ids, drawn).tolist() == [[[1, 2], [3, 4], [1, 2], [3, 4]]]
    replay.show(
        ids, torch.tensor([[[5, 6], [7, 8], [7, 8], [0, 0]]]), torch.tensor([[1, 2, 2, -inf]])
    )
    assert replay.recall(ids, drawn).tolist() == [[[7, 8], [5, 6], [1, 2], [3, 4]]]
    # Of a batch with a longer data point in it.
    longer = torch.tensor([[[1, 2, 0], [3, 4, 0]]])
    assert replay.recall(ids, longer)[:, :2].tolist() == [[[7, 8, 0], [5, 6, 0]]]


@pytest.mark.parametrize("latent", ["shape", "labelled"])
def test_a_sentence_keeps_its_best_trees_under_the_model_as_it_is(latent: Any):
    model, posterior, x = setting(latent, samples=100, replay=5)
    other = FixedModel(oracle.random_grammar(2, 3, seed=9), latent)
    replay: Any = posterior.replay
    for grammar in (model, other):
        for _ in range(8):
            posterior.e_step(grammar, x)
        found = grammar.grammar()
        rules = replace(
            found, **{n: getattr(found, n).detach() for n in ("root", "binary", "emission")}
        )
        numbers = replay.recall(x.ids, torch.zeros(2, 1, 8 if latent == "labelled" else 4).long())
        condition = posterior.policy.condition(grammar, x)
        z = posterior.policy.from_numbers(condition, numbers)  # type: ignore[attr-defined]
        for row in range(len(x)):
            log_p = enumerate_trees(rules, words_of(x, row), latent)
            best = sorted(log_p, key=lambda tree, p=log_p: -p[tree])[:5]
            assert set(count_trees(z, row)) == set(best)


def test_what_is_rated_is_left_as_it_is():
    model, posterior, x = setting("shape", replay=3)
    posterior.e_step(model, x)
    assert posterior.replay is not None
    before = posterior.replay.kept.table.clone()
    posterior.eval()
    for _ in range(5):
        posterior.e_step(model, x)
    assert torch.equal(posterior.replay.kept.table, before)


@pytest.mark.parametrize("task", [images, mixtures])
def test_replay_is_of_all_tasks(task: Any):
    model, policy = task.make_model(), task.make_policy()
    x = task.images(3) if task is images else task.points(3)
    posterior = GFlowNetPosterior(policy, samples=64, replay=4, local_search=SEARCH)
    for _ in range(10):
        step = posterior.e_step(model, x)
    assert step.loss is not None and step.loss.isfinite()
    table = task.log_joint_table(model, x)
    every = images.all_grids() if task is images else torch.tensor(mixtures.components())
    best = every[table.topk(4).indices]
    assert posterior.replay is not None
    assert torch.equal(posterior.replay.kept.table, best)


def em(run_length: int) -> EM:
    data = toy_english(20, 8, 8, max_length=6, batch_size=4)
    torch.manual_seed(0)
    sizes: Any = data.sizes()
    model = NeuralPCFG(**sizes, nonterminals=3, preterminals=4, width=8)
    policy = RootFlowPolicy(3, 4, data.max_length, width=8, symbol_dropout=0.3)
    posterior = GFlowNetPosterior(policy, replay=2, local_search=SEARCH)
    return EM(model, posterior, data, m_steps=run_length)


def test_a_run_goes_on_as_if_it_had_not_stopped():
    whole, first, second = em(9), em(4), em(9)
    torch.manual_seed(1)
    whole.fit()
    torch.manual_seed(1)
    first.fit()
    state = first.state_dict()
    assert state["posterior"]["replay._extra_state"]["kept"].shape[:2] == (20, 2)
    torch.manual_seed(2)
    second.load_state_dict(state)
    second.fit()
    ends = [run.state_dict() for run in (whole, second)]
    for part in ("model", "posterior"):
        torch.testing.assert_close(ends[0][part], ends[1][part], rtol=0, atol=0)


# What symbol dropout hides.


def encoded(encoder: SpanEncoder, words: Tensor) -> Tensor:
    torch.manual_seed(3)
    return encoder(words, torch.tensor([4, 4])).scores


def test_symbols_are_hidden_from_whole_sentences_in_training_alone():
    torch.manual_seed(0)
    make = partial(SpanEncoder, preterminals=4, labels=5, symbols=1, max_length=4, width=8)
    encoder, plain = make(symbol_dropout=0.4), make()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_()
    plain.load_state_dict(encoder.state_dict())
    words = torch.rand(2, 4, 4, requires_grad=True)
    scores = encoded(encoder, words)
    hidden_labels = (scores == 0).all(1)
    assert ((scores == 0).any(1) == hidden_labels).all()
    (seen,) = torch.autograd.grad(scores.square().sum(), words)
    hidden_preterminals = (seen == 0).all(1)
    assert ((seen == 0).any(1) == hidden_preterminals).all()
    for hidden in (hidden_labels, hidden_preterminals):
        assert hidden.any() and not hidden.all() and not torch.equal(hidden[0], hidden[1])
    # The others are as if the hidden preterminals had probability 0.
    shown = words.detach() * ~hidden_preterminals[:, None] / 0.6
    torch.testing.assert_close(scores, encoded(plain, shown) * ~hidden_labels[:, None])
    torch.testing.assert_close(encoded(encoder.eval(), words), encoded(plain, words))


def test_trajectories_of_an_e_step_have_the_same_symbols_hidden():
    grammar, lengths, seed = SETTINGS["shape"]
    model, x = FixedModel(grammar), sentences(lengths, seed=seed)
    policy = make_policy("root_flow", "shape", nonterminals=2, noise=0.5, symbol_dropout=0.5)
    condition = policy.condition(model, x)
    paths = policy.sample(condition, 4)
    order = {"log_forward": torch.exp(policy.retrace(condition, paths.z).log_forward.sum(0))}
    again = policy.tabulate(condition)
    # q of a shape is no less than P_F of one of the orders in which it can be made.
    assert again.log_q.exp().sum(-1).tolist() == pytest.approx([1, 1])
    assert (order["log_forward"] <= again.log_q.exp().amax(-1, keepdim=True) + 1e-6).all()
    other = policy.tabulate(policy.condition(model, x))
    assert not torch.equal(other.log_q, again.log_q)


# What cannot be.


class Silent(Policy):
    """A policy that cannot tell its latents in numbers."""

    def __init__(self, policy: Any):
        super().__init__()
        self.estimators = policy.estimators

    condition = sample = retrace = regrow = trajectories = None  # type: ignore[assignment]
    estimators = flow_parameters = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"replay": 0}, "posterior.replay is 0; it must be at least 1, or null for none"),
        (
            {"replay": 2, "objective": ReverseKL()},
            "objective=reverse_kl needs plain draws of the policy: set local_search=none and "
            "posterior.replay=null, or use another objective",
        ),
        (
            {"local_search": SEARCH, "objective": ForwardKL()},
            "objective=forward_kl needs plain draws of the policy: set local_search=none and",
        ),
        (
            {"local_search": SEARCH, "objective": sleep()},
            "local_search and posterior.replay have no effect with objective=sleep, which asks for",
        ),
        (
            {"replay": 2, "objective": sleep()},
            "local_search and posterior.replay have no effect with objective=sleep, which asks for",
        ),
    ],
)
def test_options_that_make_no_posterior(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        setting("shape", **options)


@pytest.mark.parametrize("option", ["dropout", "symbol_dropout"])
def test_symbols_and_features_that_are_all_hidden(option: str):
    message = f"policy.{option} is 1.0; it must be at least 0 and below 1"
    with pytest.raises(UserError, match=f"^{message}$"):
        make_policy("root_flow", "shape", **{option: 1.0})  # pyright: ignore


def test_policies_whose_latents_cannot_be_kept():
    policy = Silent(make_policy("root_flow", "shape"))
    message = "posterior.replay is 2, but Silent cannot tell latents in numbers, to keep them: set"
    with pytest.raises(UserError, match=f"^{message}"):
        GFlowNetPosterior(policy, VarGrad(), replay=2)


def test_data_points_without_ids():
    model, posterior, x = setting("shape", replay=2)
    message = "posterior.replay tells data points apart by their ids, and some have none: set post"
    with pytest.raises(UserError, match=f"^{message}"):
        posterior.e_step(model, replace(x, ids=torch.tensor([0, -1])))


def test_another_number_of_kept_latents():
    model, posterior, x = setting("shape", replay=2)
    posterior.e_step(model, x)
    _, other, _ = setting("shape", replay=3)
    message = "posterior.replay is 3, but 2 latents were kept of each data point: leave it as it"
    with pytest.raises(UserError, match=f"^{message}"):
        other.load_state_dict(posterior.state_dict())
