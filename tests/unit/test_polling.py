"""When a process looks for its next message, and when it sleeps."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Iterator

import pytest

from ukai import polling
from ukai.polling import LATE_S, BusySelector, Patience

LIMIT_US = 300
LIMIT_S = LIMIT_US / 1e6
SHORT_S, LONG_S = LIMIT_S / 2, LIMIT_S * 2


class Clock:
    """Stands still but for what yields cost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.yields = 0.0
        self.yield_s = LIMIT_S / 10
        monkeypatch.setattr(polling, "monotonic", lambda: self.now)
        monkeypatch.setattr(os, "sched_yield", self._yield)

    def _yield(self) -> None:
        self.yields += 1
        self.now += self.yield_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def eager(limit_us: float = LIMIT_US) -> Patience:
    patience = Patience(limit_us)
    patience.waited(0, False)
    return patience


def test_it_pays_after_a_short_wait_and_not_before() -> None:
    patience = Patience(LIMIT_US)
    assert not patience.pays
    patience.waited(SHORT_S, False)
    assert patience.pays


def test_zero_switches_it_off() -> None:
    assert not eager(0).pays


def test_looking_in_vain_ends_it_soon_and_short_waits_bring_it_back() -> None:
    patience = eager()
    for _ in range(100):
        patience.waited(SHORT_S, True)
    assert turns(patience, LONG_S, True) == 2
    for _ in range(100):
        patience.waited(LONG_S, False)
    assert turns(patience, SHORT_S, False) == 5


def turns(patience: Patience, seconds: float, looked: bool) -> int:
    """How many such waits it takes to change its mind."""
    before = patience.pays
    for count in range(1, 100):
        patience.waited(seconds, looked)
        if patience.pays is not before:
            return count
    raise AssertionError


def test_a_guest_with_few_requests_costs_no_looking() -> None:
    """The answer of the other node comes soon, the next request does not: looking would be in vain each time."""
    patience = eager()
    looked = 0
    for _ in range(100):
        for seconds in (SHORT_S, LONG_S):
            pays = patience.pays
            looked += pays and seconds is LONG_S
            patience.waited(seconds, pays)
    assert looked <= 1


def test_what_is_looked_for_is_found(clock: Clock) -> None:
    patience = eager()
    assert patience.look(lambda: "it" if clock.yields == 3 else "", LIMIT_S) == "it"
    assert clock.yields == 3
    assert patience.pays


@pytest.mark.parametrize("limit_s", [LIMIT_S, LIMIT_S / 2, LIMIT_S * 100])
def test_nothing_is_looked_for_longer_than_the_limits(clock: Clock, limit_s: float) -> None:
    assert eager().look(lambda: None, limit_s) is None
    assert 0 <= clock.now - min(limit_s, LIMIT_S) <= 1.01 * clock.yield_s


def test_who_is_given_the_core_back_late_sleeps_for_a_while(clock: Clock) -> None:
    patience = eager()
    clock.yield_s = LATE_S * 1.1
    assert patience.look(lambda: None, LIMIT_S) is None
    assert clock.yields == 1
    assert not patience.pays
    for _ in range(8):
        patience.waited(SHORT_S, False)
        assert not patience.pays
    patience.waited(SHORT_S, False)
    assert patience.pays


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def watching(patience: Patience, fd: int) -> BusySelector:
    selector = BusySelector(patience)
    selector.register(fd, selectors.EVENT_READ)
    return selector


def test_a_loop_sees_what_comes_while_it_looks(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_yield", lambda: os.write(pipe[1], b"x"))
    with watching(eager(), pipe[0]) as selector:
        monkeypatch.setattr(selector, "_epoll", None)  # to sleep would fail
        assert [key.fd for key, _ in selector.select(10)] == [pipe[0]]


def test_a_loop_hears_what_it_has_asked_for(pipe: tuple[int, int]) -> None:
    """As the base class tells it, with the end of a connection too."""
    with BusySelector(Patience(0)) as busy, selectors.EpollSelector() as plain:
        for fd, wanted in zip(pipe, (selectors.EVENT_READ, selectors.EVENT_WRITE), strict=True):
            for selector in (busy, plain):
                selector.register(fd, wanted, "data")
        other = os.dup(pipe[1])
        for _ in range(2):
            assert sorted(busy.select(0)) == sorted(plain.select(0)) != []
            os.write(other, b"x")
        os.close(other)
        for selector in (busy, plain):
            selector.unregister(pipe[1])
            selector.modify(pipe[0], selectors.EVENT_WRITE)
        assert busy.select(0) == plain.select(0) == []


def test_a_loop_that_does_not_look_sleeps(pipe: tuple[int, int], clock: Clock) -> None:
    with watching(Patience(LIMIT_US), pipe[0]) as selector:
        os.write(pipe[1], b"x")
        assert len(selector.select(10)) == 1
        os.read(pipe[0], 1)
        assert selector.select(0.001) == []
    assert clock.yields == 0


@pytest.mark.parametrize("timeout", [0, -1, 0.00005, 0.01])
def test_a_loop_is_not_late_for_its_timers(pipe: tuple[int, int], timeout: float) -> None:
    with watching(eager(10_000_000), pipe[0]) as selector:
        began = time.monotonic()
        assert selector.select(timeout) == []
        assert time.monotonic() - began < max(timeout, 0) + 1


def test_a_timer_says_nothing_of_waits(pipe: tuple[int, int]) -> None:
    patience = Patience(10_000_000)
    with watching(patience, pipe[0]) as selector:
        for _ in range(3):
            assert selector.select(0.001) == []
    assert not patience.pays, "nothing came, soon or late"
