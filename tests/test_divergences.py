from __future__ import annotations

from math import inf, log

import pytest
import torch
from scipy.stats import entropy

from gfnem.divergences import divergences, rate
from gfnem.errors import UserError
from gfnem.latents import LatentTable
from gfnem.posteriors.exact import ExactPosterior
from tests.tasks.mixture.tiny import make_model, points


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_divergences_are_scipys_and_modes_are_counted_by_hand():
    p = [0.4, 0.3, 0.25, 0.05, 0.0], [0.7, 0.3, 0.0, 0.0, 0.0]
    q = [0.25, 0.1, 0.3, 0.35, 0.0], [0.5, 0.5, 0.0, 0.0, 0.0]
    # p(x) is any number, and the last column is no latent.
    found = divergences(LatentTable(logs(*p) - log(7), logs(*q)))
    for row in range(2):
        assert float(found["kl_p_q"][row]) == pytest.approx(entropy(p[row], q[row]))
        assert float(found["kl_q_p"][row]) == pytest.approx(entropy(q[row], p[row]))
    # Of the first point .4, .3 and .25 are modes, and q gives all but .3 at least half; of the
    # second .7 alone.
    assert found["modes"].tolist() == [3, 1]
    assert found["modes_covered"].tolist() == [pytest.approx(2 / 3), 1]


def test_what_one_of_the_two_never_says_is_infinitely_far_from_the_other():
    one, two = logs([0.5, 0.5]), logs([1.0, 0.0])
    assert divergences(LatentTable(one, two))["kl_p_q"].tolist() == [inf]
    assert divergences(LatentTable(one, two))["kl_q_p"].tolist() == [pytest.approx(log(2))]
    assert divergences(LatentTable(two, one))["kl_q_p"].tolist() == [inf]


def test_a_posterior_that_lists_no_latents_is_refused():
    message = "^evaluator.divergences needs q.* of every z, which ExactPosterior does not list here"
    with pytest.raises(UserError, match=message):
        rate(make_model(), ExactPosterior(), points(3))
