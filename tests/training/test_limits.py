from __future__ import annotations

from dataclasses import replace

import pytest

from gfnem.training.limits import Counters, Limits


@pytest.mark.parametrize(
    ("limits", "done", "expected"),
    [
        (Limits(9, 20), Counters(3, 7), ("m-step", 3, 9)),
        (Limits(0, 20, 60.0), Counters(0, 7, seconds=11.0), ("e-step", 7, 20)),
        (Limits(0, seconds=60.5), Counters(0, 7, seconds=11.9), ("second", 11, 61)),
        (Limits(9), Counters(0, 4), ("warm-up e-step", 4, 5)),
        (Limits(9), Counters(0, 5), ("m-step", 0, 9)),
        (Limits(0, 9), Counters(0, 4), ("e-step", 4, 9)),
    ],
)
def test_what_is_counted(limits: Limits, done: Counters, expected: tuple[str, int, int]) -> None:
    assert replace(limits, warmup=5).progress(done) == expected


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        (Limits(50), 80.0),  # 10 steps in 20 seconds, 40 to go
        (Limits(50, 50), 40.0),  # 20 E-steps in 20 seconds come to their end before
        (Limits(50, 50, 55.0), 25.0),
        (Limits(50, 50, 500.0), 40.0),
    ],
)
def test_time_left_is_that_to_the_first_limit(limits: Limits, left: float) -> None:
    since, done = Counters(0, -10, seconds=10.0), Counters(10, 10, seconds=30.0)
    assert limits.seconds_left(since, done) == pytest.approx(left)


def test_time_left_is_not_known_before_anything_is_done() -> None:
    assert Limits(50).seconds_left(Counters(), Counters()) is None


@pytest.mark.parametrize(
    ("done", "reached"),
    [
        (Counters(2, 4, seconds=4.9), False),
        (Counters(3, 0), True),
        (Counters(0, 5), True),
        (Counters(0, 0, seconds=5.0), True),
    ],
)
def test_the_first_limit_ends_training(done: Counters, reached: bool) -> None:
    assert Limits(3, 5, 5.0).reached(done) == reached
