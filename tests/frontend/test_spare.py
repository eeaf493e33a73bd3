"""When spare threads begin and end, with made-up requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.machine import wait_for
from ukai.frontend import spare
from ukai.frontend.spare import DEPUTIES, LIMIT, THREADS, Spares

PATIENCE_S = 5


class Crowd:
    """Says that so many wait; spare threads take requests from ``requests``."""

    def __init__(self) -> None:
        self.crowded, self.crowd, self.number = threading.Event(), 0, 0
        self.stand_in: Callable[[], None] | None = None
        self.requests = threading.Semaphore(0)
        self.ended = False
        self.taken: Callable[[], None] = lambda: None

    def waiting(self) -> int:
        return self.number

    def set(self, number: int) -> None:
        self.number = number
        if number >= self.crowd:
            self.crowded.set()

    def serve(self, wanted: Callable[[], bool]) -> None:
        while wanted() and not self.ended:
            self.requests.acquire()
            self.taken()


@pytest.fixture
def crowd() -> Crowd:
    return Crowd()


@pytest.fixture
def spares(crowd: Crowd) -> Iterator[Spares]:
    spares = Spares(crowd)
    spares.start(crowd.serve)
    yield spares
    crowd.ended = True
    crowd.requests.release(LIMIT + DEPUTIES)
    spares.close()
    assert spares.count() == 0


def test_they_begin_when_all_wait_and_end_when_few_do(crowd: Crowd, spares: Spares) -> None:
    crowd.set(THREADS - 1)
    wait_for(lambda: spares.count() == THREADS - 1, "as many again", PATIENCE_S)
    crowd.set(2 * THREADS - 1)
    wait_for(lambda: spares.count() == 3 * THREADS - 2, "more", PATIENCE_S)
    crowd.set(1)
    wait_for(lambda: not spares._needed, "the end of the need", PATIENCE_S)

    def ended() -> bool:
        crowd.requests.release()
        return spares.count() == 0

    wait_for(ended, "their end", PATIENCE_S)


def test_there_is_a_limit(crowd: Crowd, spares: Spares) -> None:
    crowd.set(10 * LIMIT)
    wait_for(lambda: spares.count() == LIMIT, "the most", PATIENCE_S)


def test_none_begins_for_want_of_processor(crowd: Crowd, spares: Spares, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def process_time() -> float:
        nonlocal looks
        looks += 1
        return time.monotonic()

    monkeypatch.setattr(time, "process_time", process_time)
    crowd.set(THREADS)
    wait_for(lambda: looks >= 10, "five looks", PATIENCE_S)
    assert spares.count() == 0
    monkeypatch.undo()
    wait_for(lambda: spares.count() == THREADS, "as many again: who waits already does not say so again", PATIENCE_S)


def test_they_end_when_they_only_disturb_each_other(
    crowd: Crowd, spares: Spares, monkeypatch: pytest.MonkeyPatch
) -> None:
    crowd.set(THREADS)
    wait_for(lambda: spares.count() == THREADS, "as many again", PATIENCE_S)
    monkeypatch.setattr(time, "process_time", time.monotonic)
    wait_for(lambda: not spares._needed, "the end of the need", PATIENCE_S)


def read_much(crowd: Crowd, spares: Spares, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many reads, each of which needs little but the processor; returns when all deputies pause, and none is left."""

    def process_time() -> float:
        spares.served += 1000
        return time.monotonic()

    monkeypatch.setattr(time, "process_time", process_time)
    monkeypatch.setattr(spare, "NEEDLESS", 1)

    def paused() -> bool:
        crowd.requests.release()
        return spares._out == 0

    wait_for(paused, "all deputies to pause", PATIENCE_S)
    assert crowd.stand_in is not None
    while crowd.requests.acquire(blocking=False):
        pass


def takes_one(crowd: Crowd) -> bool:
    """Whether somebody takes a request within a moment."""
    taken = threading.Event()
    crowd.taken = taken.set
    crowd.requests.release()
    if not (found := taken.wait(0.1)):
        assert crowd.requests.acquire(blocking=False)
    return found


def test_deputies_pause_where_reads_need_the_interpreter(
    crowd: Crowd, spares: Spares, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_much(crowd, spares, monkeypatch)
    assert not takes_one(crowd)


def test_for_each_thread_that_waits_a_deputy_stands_in(
    crowd: Crowd, spares: Spares, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_much(crowd, spares, monkeypatch)
    monkeypatch.setattr(spares, "_set_alone", lambda *_: None)
    for number in (1, 2):
        crowd.number = number
        assert crowd.stand_in is not None
        crowd.stand_in()
        assert spares._out == number
        assert takes_one(crowd)
        assert spares._out == number, "it pauses though somebody waits still"
    spares._stand_in()
    assert spares._out == 2, "more than wait"
    crowd.number = 0
    assert takes_one(crowd)
    wait_for(lambda: spares._out == 1, "the pause of one", PATIENCE_S)
    assert takes_one(crowd)
    wait_for(lambda: spares._out == 0, "the pause of both", PATIENCE_S)
    assert not takes_one(crowd)


def test_a_deputy_that_is_needed_now_and_then_does_not_pause(
    crowd: Crowd, spares: Spares, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_much(crowd, spares, monkeypatch)
    monkeypatch.setattr(spares, "_set_alone", lambda *_: None)
    monkeypatch.setattr(spare, "NEEDLESS", 3)
    crowd.number = 1
    spares._stand_in()
    for _ in range(3):
        for crowd.number in (0, 0, 1):
            assert not spares._is_needless()
    crowd.number = 0
    assert [spares._is_needless() for _ in range(3)] == [False, False, True]
    spares._all_out()


def test_all_deputies_come_back_where_the_processor_is_not_needed(
    crowd: Crowd, spares: Spares, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread may wait where nobody says so."""
    read_much(crowd, spares, monkeypatch)
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    wait_for(lambda: spares._out == DEPUTIES, "all deputies", PATIENCE_S)
    assert crowd.stand_in is None
    assert takes_one(crowd)


def test_no_deputy_pauses_where_each_read_is_large(
    crowd: Crowd, spares: Spares, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def process_time() -> float:
        nonlocal looks
        looks += 1
        spares.served += 10
        return time.monotonic()

    monkeypatch.setattr(time, "process_time", process_time)
    wait_for(lambda: looks >= 10, "five looks", PATIENCE_S)
    assert crowd.stand_in is None
    assert takes_one(crowd)
    assert spares._out == DEPUTIES


def test_none_begins_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    looked, pause = threading.Event(), threading.Event()

    class Looked(Crowd):
        def waiting(self) -> int:
            looked.set()
            return super().waiting()

    watched = Looked()
    spares = Spares(watched)

    def serve(wanted: Callable[[], bool]) -> None:
        while wanted():
            pause.wait(0.001)

    spares.start(serve)
    watched.set(THREADS)
    assert looked.wait(PATIENCE_S)
    spares.close()
    assert spares.count() == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "spare"]
