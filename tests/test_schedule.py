"""When M-steps may run, against schedules worked out by hand."""

from __future__ import annotations

import math

import pytest

from gfnem.errors import UserError
from gfnem.schedule import AdaptiveThreshold, Alternation, Schedule

# Losses of E-steps and their bias-corrected moving average with decay 1/2, worked out by hand:
# after n losses the sum of weights is 1 - 2^-n.
LOSSES = [5.0, 5.0, 1.0, 1.0, 9.0, 1.0]
AVERAGES = [5.0, 5.0, 2.375 / 0.875, 1.6875 / 0.9375, 5.34375 / 0.96875, 3.171875 / 0.984375]


def steps(schedule: Schedule, batches: int) -> str:
    """What each batch gets when every step is done that is due: E, M or both."""
    done, m_steps = [], 0
    for _ in range(batches):
        batch = ""
        if schedule.e_step_due():
            schedule.e_step_done(1.0)
            batch += "E"
        if schedule.m_step_due(m_steps):
            schedule.m_step_done()
            m_steps += 1
            batch += "M"
        done.append(batch)
    return " ".join(done)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Alternation(), "EM EM EM EM"),
        (Alternation(e_steps=3), "E E EM E E EM E"),
        (Alternation(m_steps=3), "EM M M EM M M EM"),
        (Alternation(e_steps=2, m_steps=2), "E EM M E EM M E"),
        (Alternation(warmup_e_steps=3), "E E E EM EM EM"),
        (Alternation(e_steps=2, m_steps=2, warmup_e_steps=1), "E E EM M E EM M E"),
    ],
)
def test_alternation(schedule: Alternation, expected: str) -> None:
    assert steps(schedule, len(expected.split())) == expected


def test_alternation_repeats_an_e_step_that_was_skipped() -> None:
    schedule = Alternation(e_steps=2)
    schedule.e_step_done(1.0)
    assert schedule.e_step_due() and not schedule.m_step_due(0)
    # The second one is not told of, as its update was skipped.
    assert schedule.e_step_due() and not schedule.m_step_due(0)
    schedule.e_step_done(1.0)
    assert schedule.m_step_due(0)


def test_average_is_corrected_for_its_start_at_zero() -> None:
    schedule = AdaptiveThreshold(maximum=4, minimum=2, horizon=2, decay=0.5)
    assert schedule.average == math.inf
    for loss, average in zip(LOSSES, AVERAGES, strict=True):
        schedule.e_step_done(loss)
        assert schedule.average == pytest.approx(average, rel=1e-12)


def test_average_without_memory_is_the_last_loss() -> None:
    schedule = AdaptiveThreshold(maximum=4, minimum=2, horizon=2, decay=0)
    for loss in LOSSES:
        schedule.e_step_done(loss)
        assert schedule.average == loss


def test_threshold_moves_linearly_and_then_stays() -> None:
    schedule = AdaptiveThreshold(maximum=6, minimum=3, horizon=4)
    assert [schedule.threshold(m) for m in range(7)] == [6, 5.25, 4.5, 3.75, 3, 3, 3]


def test_m_steps_wait_for_the_average() -> None:
    schedule = AdaptiveThreshold(maximum=4, minimum=2, horizon=2, decay=0.5)
    assert not schedule.m_step_due(0)
    due, m_steps = [], 0
    for loss in LOSSES:
        assert schedule.e_step_due()
        schedule.e_step_done(loss)
        due.append(schedule.m_step_due(m_steps))
        if due[-1]:
            schedule.m_step_done()
            m_steps += 1
    # Averages 5, 5, 2.71 against 4; then 1.8 against 3; then 5.5 and 3.2 against 2.
    assert due == [False, False, True, True, False, False]


def test_an_average_at_the_threshold_waits() -> None:
    schedule = AdaptiveThreshold(maximum=4, minimum=4, horizon=1, decay=0)
    schedule.e_step_done(4.0)
    assert not schedule.m_step_due(0)


def test_metrics() -> None:
    schedule = AdaptiveThreshold(maximum=6, minimum=3, horizon=4, decay=0)
    schedule.e_step_done(5.0)
    assert schedule.metrics(1) == {"schedule/average_e_loss": 5.0, "schedule/threshold": 5.25}
    assert Alternation().metrics(1) == {}


@pytest.mark.parametrize("batches", range(9))
def test_alternation_goes_on_from_its_state(batches: int) -> None:
    options = {"e_steps": 2, "m_steps": 3, "warmup_e_steps": 1}
    one, other = Alternation(**options), Alternation(**options)
    steps(one, batches)
    other.load_state_dict(one.state_dict())
    assert steps(other, 9) == steps(one, 9)


def test_adaptive_threshold_goes_on_from_its_state() -> None:
    one, other = (AdaptiveThreshold(4, 2, 2, decay=0.5) for _ in range(2))
    for loss in LOSSES[:4]:
        one.e_step_done(loss)
    state = one.state_dict()
    one.e_step_done(100.0)  # a state is no view of its schedule
    other.load_state_dict(state)
    for loss, average in zip(LOSSES[4:], AVERAGES[4:], strict=True):
        other.e_step_done(loss)
        assert other.average == pytest.approx(average, rel=1e-12)


@pytest.mark.parametrize(
    "options", [{"e_steps": 0}, {"m_steps": 0}, {"warmup_e_steps": -1}], ids=str
)
def test_alternation_with_impossible_numbers(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"must be at least 1, warmup_e_steps=.* at least 0"):
        Alternation(**options)


def test_adaptive_threshold_without_horizon() -> None:
    with pytest.raises(UserError, match=r"^schedule\.horizon is 0; it must be at least 1 M-step$"):
        AdaptiveThreshold(4, 2, horizon=0)


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_adaptive_threshold_with_impossible_decay(decay: float) -> None:
    with pytest.raises(UserError, match=r"^schedule\.decay is .*; it must be at least 0 and below"):
        AdaptiveThreshold(4, 2, horizon=2, decay=decay)
