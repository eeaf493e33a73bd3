"""fdatasync by the kernel's workers."""

from __future__ import annotations

import asyncio
import errno
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.blockd.files import descriptors
from ukai.blockd.aio import SLOTS, Aio

DEADLINE_S = 10


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[int]]:
    fds = [os.open(tmp_path / str(n), os.O_RDWR | os.O_CREAT) for n in range(SLOTS + 1)]
    for fd in fds:
        os.pwrite(fd, b"data", 0)
    yield fds
    for fd in fds:
        os.close(fd)


def with_aio(work: Callable[[Aio, Callable[[list[int]], None]], None]) -> list[int]:
    """What ``work`` has begun hears its end through the function that it is given; the result."""

    async def run() -> list[int]:
        aio = Aio()
        try:
            ended: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
            work(aio, ended.set_result)
            async with asyncio.timeout(DEADLINE_S):
                return await ended
        finally:
            aio.close()

    return asyncio.run(run())


def taken(yes: bool) -> None:
    assert yes


def never(_numbers: list[int]) -> None:
    raise AssertionError("nothing was begun")


def test_those_of_a_call_end_together(files: list[int]) -> None:
    assert with_aio(lambda aio, done: taken(aio.fdatasync(files[:3], done))) == [0, 0, 0]


def test_what_finds_no_room_is_not_begun(files: list[int]) -> None:
    def work(aio: Aio, done: Callable[[list[int]], None]) -> None:
        assert not aio.fdatasync(files, never)
        assert aio.fdatasync(files[:SLOTS], done)
        assert not aio.fdatasync(files[:1], never)

    assert with_aio(work) == [0] * SLOTS


def test_room_is_given_back(files: list[int]) -> None:
    async def run() -> int:
        aio = Aio()
        rounds = 0
        try:
            async with asyncio.timeout(DEADLINE_S):
                for _ in range(5):
                    ended: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
                    assert aio.fdatasync(files[:SLOTS], ended.set_result)
                    assert await ended == [0] * SLOTS
                    rounds += 1
        finally:
            aio.close()
        return rounds

    assert asyncio.run(run()) == 5


def test_what_the_kernel_does_not_take_is_not_begun(files: list[int]) -> None:
    reading, writing = os.pipe()
    try:

        def work(aio: Aio, done: Callable[[list[int]], None]) -> None:
            assert not aio.fdatasync([reading, files[0]], never), "a pipe can't be flushed"
            assert aio.fdatasync([files[0], writing, files[1]], done)

        assert with_aio(work) == [0, errno.EINVAL, 0], "it took the first, the others were done in place"
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.expect_log("defect after an fdatasync")
def test_a_defect_in_one_does_not_hold_up_the_others(files: list[int]) -> None:
    def work(aio: Aio, done: Callable[[list[int]], None]) -> None:
        assert aio.fdatasync(files[:1], never)
        assert aio.fdatasync(files[1:2], done)

    assert with_aio(work) == [0]


def test_the_end_leaves_nothing_open(files: list[int]) -> None:
    before = len(descriptors())

    with_aio(lambda aio, done: taken(aio.fdatasync(files[:1], done)))
    assert len(descriptors()) == before


def test_elsewhere_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "sparc64")

    async def run() -> None:
        with pytest.raises(OSError, match="not on sparc64"):
            Aio()

    asyncio.run(run())
