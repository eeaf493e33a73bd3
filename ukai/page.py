"""The page of an image's loans in memory that two processes share; ``loans.py`` says what it means.

8 bytes: lease, a double · 8 bytes: unused · 4 bytes for each block: the number of its loan
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import MutableSequence
from pathlib import Path
from typing import cast

HEADER_BYTES = 16
NUMBER_BYTES = 4


class MappedPage:
    """Implements ``loans.Page`` over an open file, which it closes; ``path`` is where its maker finds it again."""

    def __init__(self, fd: int, path: Path | None = None) -> None:
        self.fd, self._path = fd, path
        self.name = 0
        """What its maker calls it."""
        size = os.fstat(fd).st_size
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | (mmap.PROT_WRITE if path else 0))
        whole = memoryview(self._map)
        # aligned and of native size, so that each is stored and loaded as a whole
        self.lease = cast("MutableSequence[float]", whole[:8].cast("d"))
        self.numbers = cast("MutableSequence[int]", whole[HEADER_BYTES:].cast("I"))

    def __del__(self) -> None:
        os.close(self.fd)

    def clear(self) -> None:
        self._map[HEADER_BYTES:] = bytes(len(self._map) - HEADER_BYTES)

    def end(self) -> None:
        self.lease[0] = 0.0
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def make(directory: Path, name: str, block_count: int) -> MappedPage:
    """A new page on which nothing is lent.  Raises OSError."""
    path = directory / name
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(
            fd, 0, HEADER_BYTES + NUMBER_BYTES * block_count
        )  # a full disk must show here, not as SIGBUS
        return MappedPage(fd, path)
    except BaseException:
        os.close(fd)
        path.unlink()
        raise


def end_all(directory: Path) -> None:
    """End the pages of a process that is gone: whoever still has one sees its lease go.  Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        for path in directory.iterdir():
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.pwrite(fd, bytes(HEADER_BYTES), 0)
            finally:
                os.close(fd)
            path.unlink()
