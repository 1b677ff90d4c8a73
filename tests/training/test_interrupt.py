"""Signals end training after the batch at hand."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gfnem.em import EM
from gfnem.run import Run
from gfnem.training.interrupt import SIGNALS
from tests.training.tiny import (
    Mixture,
    Rater,
    Table,
    Told,
    Urn,
    fail,
    interrupt,
    interrupt_twice,
    stopping,
)


@pytest.fixture
def handlers() -> Iterator[list[Any]]:
    """Those of all signals that are heard, which nothing may change for good."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield before
    after = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)
    assert after == before


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_ends_after_the_batch_at_hand(
    run: Run, told: Told, handlers: list[Any], number: signal.Signals
) -> None:
    posterior = Table()
    data = stopping(3, how=lambda: signal.raise_signal(number))
    em = EM(Mixture(), posterior, data, 100, run=run, evaluator=Rater())
    summary = em.fit()
    assert em.stopped == number
    assert posterior.order.endswith("m2 e3 m3")
    assert summary["train/m_steps"] == run.summary()["train/m_steps"] == 4
    assert run.load_checkpoint("last")["done"]["m_steps"] == 4
    assert told.ends == ["stopped"]


def test_a_signal_that_is_ignored_stays_so(run: Run, handlers: list[Any]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        data = stopping(3, how=lambda: signal.raise_signal(signal.SIGHUP))
        em = EM(Mixture(), Table(), data, 6, run=run)
        em.fit()
    finally:
        signal.signal(signal.SIGHUP, handlers[-1])
    assert not em.stopped and em.done.m_steps == 6


def test_signal_during_an_evaluation_lets_it_end(run: Run, handlers: list[Any]) -> None:
    evaluator = Rater(before=lambda split: interrupt())
    em = EM(Mixture(), Table(), Urn(), 100, evaluator=evaluator, evaluate_every=5, run=run)
    summary = em.fit()
    assert evaluator.calls == [("valid", False)]
    assert summary["train/m_steps"] == 5 and "valid/nll" in summary
    assert run.load_checkpoint("best")["done"]["m_steps"] == 5


def test_second_signal_ends_at_once(run: Run, told: Told, handlers: list[Any]) -> None:
    posterior = Table()
    em = EM(Mixture(), posterior, stopping(3, how=interrupt_twice), 100, run=run)
    with pytest.raises(KeyboardInterrupt):
        em.fit()
    assert posterior.order.endswith("m2")
    assert told.ends == ["stopped"]


def test_interrupt_after_a_termination_ends_at_once(run: Run, handlers: list[Any]) -> None:
    def both() -> None:
        signal.raise_signal(signal.SIGTERM)
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        EM(Mixture(), Table(), stopping(3, how=both), 100, run=run).fit()


def test_handlers_come_back_after_an_error(handlers: list[Any]) -> None:
    with pytest.raises(RuntimeError):
        EM(Mixture(), Table(), stopping(3, how=fail), 100).fit()


def test_own_handler_takes_the_second_signal() -> None:
    caught = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        em = EM(Mixture(), Table(), stopping(3, how=interrupt_twice), 100)
        em.fit()
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught == [signal.SIGINT] and em.done.m_steps == 4


def test_in_a_thread_of_its_own_signals_are_left_alone(handlers: list[Any]) -> None:
    during = []
    data = Urn(used=lambda x, device: during.append(signal.getsignal(signal.SIGINT)))
    em = EM(Mixture(), Table(), data, 5, evaluator=Rater())
    summaries = []
    thread = threading.Thread(target=lambda: summaries.append(em.fit()))
    thread.start()
    thread.join()
    assert summaries[0]["train/m_steps"] == 5
    assert during == [handlers[0]] * 5
