"""A disk whose N-th operation fails, once."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable
from typing import Any

import pytest

from ukai.blockd.disk import Disk

SYNCS = ("fdatasync", "fsync", "sync_directory")
MOVES = ("pwrite", "pread", "pread_cached")
CALLS = (
    *SYNCS,
    *MOVES,
    "open",
    "dup",
    "size",
    "look",
    "truncate",
    "punch",
    "data_after",
    "rename",
    "unlink",
    "mkdir",
    "make_directories",
    "rmdir",
    "names",
    "stat",
    "exists",
    "read_file",
    "lock",
)
"""All that may fail; ``close`` may not: of a local file it has nothing left to do."""

FAULTS: dict[str, tuple[tuple[str, ...], int]] = {
    "EIO": (CALLS, errno.EIO),
    "ENOSPC": (("pwrite", "open", "punch", "truncate", "mkdir", "make_directories", "rename"), errno.ENOSPC),
    "EMFILE": (("open", "dup"), errno.EMFILE),
    "sync": (SYNCS, errno.EIO),
    "short": (("pwrite", "pread"), 0),
    "torn": (("pwrite",), errno.EIO),
}
"""Name → which operations count, and the error; "short" moves one byte, "torn" half of it before it fails."""


class FaultyDisk(Disk):
    """The ``nth`` operation, counted from 1, of those that ``kind`` names fails; 0: none."""

    def __init__(self, kind: str, nth: int) -> None:
        self.kind, self.nth = kind, nth
        self.count = 0
        self.fired = ""
        calls, self._errno = FAULTS[kind]
        for name in calls:
            setattr(self, name, functools.partial(self._call, name, getattr(self, name)))

    def _call(self, name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count != self.nth:
            return None if name in SYNCS else real(*args, **kwargs)  # no power cut here: what is written is there
        self.fired = f"{name}{args}"[:200]
        if self.kind == "short":
            fd, what, offset = args
            return real(fd, what[:1] if name == "pwrite" else 1, offset)
        if self.kind == "torn":
            fd, data, offset = args
            real(fd, data[: len(data) // 2], offset)
        raise OSError(self._errno, f"fault {self.kind}", "somewhere")


def fails_once(monkeypatch: pytest.MonkeyPatch, disk: Disk, name: str) -> None:
    """The next operation of this name fails, all later ones are done."""
    real = getattr(disk, name)

    def fail(*_: Any) -> None:
        monkeypatch.setattr(disk, name, real)
        raise OSError(errno.EIO, "fault", "somewhere")

    monkeypatch.setattr(disk, name, fail)
