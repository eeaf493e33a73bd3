"""When spare threads begin and end, with made-up requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.machine import wait_for
from ukai.frontend.spare import LIMIT, THREADS, Spares

PATIENCE_S = 5


class Crowd:
    """Says that so many wait; spare threads take requests from ``requests``."""

    def __init__(self) -> None:
        self.crowded, self.crowd, self.number = threading.Event(), 0, 0
        self.requests = threading.Semaphore(0)
        self.ended = False

    def under_way(self) -> tuple[int, int]:
        return self.number, 0

    def set(self, number: int) -> None:
        self.number = number
        if number >= self.crowd:
            self.crowded.set()

    def serve(self, wanted: Callable[[], bool]) -> None:
        while wanted() and not self.ended:
            self.requests.acquire()


@pytest.fixture
def crowd() -> Crowd:
    return Crowd()


@pytest.fixture
def spares(crowd: Crowd) -> Iterator[Spares]:
    spares = Spares(crowd)
    spares.start(crowd.serve)
    yield spares
    crowd.ended = True
    crowd.requests.release(LIMIT)
    spares.close()
    assert spares.count() == 0


def test_they_begin_when_all_wait_and_end_when_few_do(crowd: Crowd, spares: Spares) -> None:
    crowd.set(THREADS - 1)
    wait_for(lambda: spares.count() == THREADS - 1, "as many again", PATIENCE_S)
    crowd.set(2 * THREADS - 1)
    wait_for(lambda: spares.count() == 3 * THREADS - 2, "more", PATIENCE_S)
    crowd.set(1)
    wait_for(lambda: not spares._needed, "the end of the need", PATIENCE_S)
    crowd.requests.release(spares.count())
    wait_for(lambda: spares.count() == 0, "their end", PATIENCE_S)


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


def test_none_begins_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    looked, pause = threading.Event(), threading.Event()

    class Looked(Crowd):
        def under_way(self) -> tuple[int, int]:
            looked.set()
            return super().under_way()

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
