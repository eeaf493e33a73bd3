"""The threads that work at files."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from ukai.blockd.server import DiskThreads

COUNT = 3
WAIT_S = 10.0


@pytest.fixture
def pool() -> Iterator[DiskThreads]:
    threads = DiskThreads(COUNT)
    yield threads
    threads.close()


def test_all_work_is_done_and_no_more_at_once_than_there_are_threads() -> None:
    pool = DiskThreads(COUNT)
    guard, gate = threading.Lock(), threading.Semaphore(0)
    full = threading.Event()
    under_way = most = done = 0

    def work() -> None:
        nonlocal under_way, most, done
        with guard:
            under_way += 1
            most = max(most, under_way)
            if under_way == COUNT:
                full.set()
        assert gate.acquire(timeout=WAIT_S)
        with guard:
            under_way -= 1
            done += 1

    for _ in range(10 * COUNT):
        pool.submit(work)
    assert full.wait(WAIT_S), "they work beside each other"
    for _ in range(10 * COUNT):
        gate.release()
    pool.close()  # what was submitted is done first
    assert (most, done, under_way) == (COUNT, 10 * COUNT, 0)
    assert not [t for t in threading.enumerate() if t.name.startswith("disk ")]


def test_one_piece_after_the_other_wakes_one_thread(pool: DiskThreads) -> None:
    names = []
    for _ in range(50):
        done = threading.Event()

        def work(done: threading.Event = done) -> None:
            names.append(threading.current_thread().name)
            done.set()

        pool.submit(work)
        assert done.wait(WAIT_S)
        deadline = time.monotonic() + WAIT_S
        while len(pool._idle) < COUNT:  # it puts itself back after its work
            assert time.monotonic() < deadline
    assert len(set(names[1:])) == 1
