"""Confidence intervals of means over sentences, by the percentile bootstrap.

On NumPy's arrays, so that runs are compared without torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 1000
LEVEL = 0.95
# Resamples at a time times sentences: what counts of a block's draws take is bounded.
BLOCK = 4_000_000


def mean_interval(
    values: Float[np.ndarray, "sentences statistics"], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Float[np.ndarray, "statistics"], Float[np.ndarray, "statistics"]]:
    """Give the ends of 95 % intervals of means over sentences.

    The same sentences are drawn for every statistic: of two systems' differences, sentence by
    sentence, it is the paired bootstrap (Efron and Tibshirani 1993, section 13.3).

    resamples: how often as many sentences are drawn with replacement.
    seed: of the draws.
    """
    counts = _counts(len(values), resamples, np.random.default_rng(seed))
    means = np.concatenate([block @ values / len(values) for block in counts])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def _counts(
    sentences: int, resamples: int, generator: np.random.Generator
) -> Iterator[Int[np.ndarray, "block sentences"]]:
    """How often each resample has each sentence, a block of resamples at a time."""
    size = max(BLOCK // sentences, 1)
    for first in range(0, resamples, size):
        block = min(size, resamples - first)
        drawn = generator.integers(sentences, size=(block, sentences))
        place = drawn + sentences * np.arange(block)[:, None]
        yield np.bincount(place.ravel(), minlength=block * sentences).reshape(block, sentences)
