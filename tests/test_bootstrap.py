from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from gfnem import bootstrap
from gfnem.bootstrap import mean_interval


def test_intervals_are_scipys_within_the_noise_of_resampling():
    generator = np.random.default_rng(1)
    values = np.stack([generator.normal(40, 20, 150), generator.exponential(30, 150)], -1)
    low, high = mean_interval(values, resamples=40_000)
    expected = stats.bootstrap(
        (values,),
        np.mean,
        axis=0,
        n_resamples=40_000,
        confidence_level=0.95,
        method="percentile",
        rng=generator,
    ).confidence_interval
    # A tail's quantile of so many means is off by about a hundredth of its standard deviation.
    error = values.std(0) / np.sqrt(150)
    assert (abs(low - expected.low) < 0.05 * error).all()
    assert (abs(high - expected.high) < 0.05 * error).all()


def test_two_sentences_by_hand():
    # Means of two draws are 0, 50 and 100 with probabilities 1/4, 1/2 and 1/4.
    low, high = mean_interval(np.array([[0.0, 7.0], [100.0, 7.0]]))
    assert (low.tolist(), high.tolist()) == ([0, 7], [100, 7])


def test_pairs_stay_together():
    values = np.random.default_rng(2).uniform(0, 100, 50)
    low, high = mean_interval(np.stack([values, values - 3, -values], -1))
    assert low[1] == pytest.approx(low[0] - 3) and high[1] == pytest.approx(high[0] - 3)
    assert low[2] == pytest.approx(-high[0])


def test_blocks_of_resamples_make_no_difference(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(3).uniform(0, 100, (20, 2))
    together = mean_interval(values)
    monkeypatch.setattr(bootstrap, "BLOCK", 70)
    for one, other in zip(together, mean_interval(values), strict=True):
        assert one == pytest.approx(other)
