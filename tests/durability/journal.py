"""A disk that can lose power: each change is noted with what was there before, each sync with what it covers.

The notes outlive ``kill -9`` in ``DIRECTORY/log``; ``cut.power_cut`` takes back, after all processes are dead, a part
of what no sync that succeeded had covered.  Each file is also linked to ``DIRECTORY/inodes``, so that a removed or
replaced one can come back and no inode number is used twice.

A record is a list: ["data", inode, offset, bytes before], ["size", inode, bytes before], ["name", path, value before],
["begin", number, inode or directory], ["end", number, whether it succeeded].
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgpack

from ukai.blockd.aio import Aio, Synced
from ukai.blockd.disk import Disk

SECTOR = 512
ABSENT, A_DIRECTORY = 0, -1
"""What a name may be, beside an inode number."""

LOG, INODES, BOOT = "log", "inodes", "boot"
SYNC_S = 0.004
"""How long a sync takes at least, as on a real disk: what is written meanwhile is not covered by it."""


class JournaledDisk(Disk):
    """The disk of a blockd, with an undo journal in ``directory``, which lies on the same filesystem."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        os.makedirs(f"{directory}/{INODES}", exist_ok=True)
        self._log = os.open(f"{directory}/{LOG}", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock = threading.RLock()
        """Held over a note and its change: a sync that begins later covers both or neither."""
        self._syncs = itertools.count(os.fstat(self._log).st_size)

    def _note(self, *record: object) -> None:
        data = msgpack.packb(record)
        if os.write(self._log, data) != len(data):
            raise AssertionError("the journal is full: the test can't tell what would be lost")

    def _value(self, path: str) -> int:
        """What a name is now; a file gets its link."""
        try:
            st = os.lstat(path)
        except FileNotFoundError:
            return ABSENT
        if os.path.isdir(path):
            return A_DIRECTORY
        with contextlib.suppress(FileExistsError):
            os.link(path, f"{self.directory}/{INODES}/{st.st_ino}")
        return st.st_ino

    def _note_name(self, path: str) -> None:
        self._note("name", path, self._value(path))

    def _note_data(self, fd: int, offset: int, length: int) -> None:
        """Whole sectors around a part of a file."""
        st = os.fstat(fd)
        first, end = offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR
        self._note("data", st.st_ino, first, os.pread(fd, end - first, first).ljust(end - first, b"\0"))
        if offset + length > st.st_size:
            self._note("size", st.st_ino, st.st_size)

    # --- what alters

    def open(self, path: str, create: bool = False) -> int:
        with self._lock:
            if create and not os.path.lexists(path):
                self._note_name(path)
            fd = super().open(path, create)
            self._value(path)
            return fd

    def truncate(self, fd: int, size: int) -> None:
        with self._lock:
            st = os.fstat(fd)
            if size < st.st_size:
                self._note_data(fd, size, st.st_size - size)
            self._note("size", st.st_ino, st.st_size)
            super().truncate(fd, size)

    def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        with self._lock:
            self._note_data(fd, offset, len(data))
            return super().pwrite(fd, data, offset)

    def punch(self, fd: int, offset: int, length: int) -> None:
        with self._lock:
            for first, end in _data_in(fd, offset, offset + length):
                self._note_data(fd, first, end - first)
            super().punch(fd, offset, length)

    def rename(self, old: str, new: str) -> None:
        with self._lock:
            self._note_name(old)
            self._note_name(new)
            super().rename(old, new)

    def unlink(self, path: str) -> None:
        with self._lock:
            self._note_name(path)
            super().unlink(path)

    def mkdir(self, path: str) -> None:
        with self._lock:
            self._note_name(path)
            super().mkdir(path)

    def make_directories(self, path: str) -> None:
        with self._lock:
            parent = path
            while not os.path.isdir(parent):
                self._note_name(parent)
                parent = os.path.dirname(parent)
            super().make_directories(path)

    def rmdir(self, path: str) -> None:
        with self._lock:
            self._note_name(path)
            super().rmdir(path)

    # --- what makes it stay

    def fdatasync(self, fd: int) -> None:
        self._synced(os.fstat(fd).st_ino, super().fdatasync, fd)

    def fsync(self, fd: int) -> None:
        self._synced(os.fstat(fd).st_ino, super().fsync, fd)

    def sync_directory(self, path: str) -> None:
        self._synced(path, super().sync_directory, path)

    def _sync_begins(self, what: int | str) -> int:
        """Note that an inode, or a directory, is about to be synced; the number of the sync."""
        with self._lock:
            number = next(self._syncs)
            self._note("begin", number, what)
        return number

    def _synced(self, what: int | str, sync: Callable[..., None], argument: int | str) -> None:
        number = self._sync_begins(what)
        time.sleep(SYNC_S)
        try:
            sync(argument)
        except BaseException:
            self._note("end", number, False)
            raise
        self._note("end", number, True)

    def aio(self) -> Aio:
        return JournaledAio(self)

    # --- what is not quite what it is with other disks

    def look(self, fd: int) -> tuple[bool, int]:
        found = os.fstat(fd)
        return found.st_nlink > 1, found.st_size  # one link is the journal's


class JournaledAio(Aio):
    """fdatasyncs without a thread, noted as those of a thread are."""

    def __init__(self, disk: JournaledDisk) -> None:
        super().__init__()
        self._disk = disk

    def fdatasync(self, fds: Sequence[int], done: Synced) -> bool:
        numbers = [self._disk._sync_begins(os.fstat(fd).st_ino) for fd in fds]

        def ended(errors: list[int]) -> None:
            for number, error in zip(numbers, errors, strict=True):
                self._disk._note("end", number, not error)
            done(errors)

        def begin() -> None:
            assert super(JournaledAio, self).fdatasync(fds, ended), "the test has more under way than there is room for"

        asyncio.get_running_loop().call_later(SYNC_S, begin)
        return True


def _data_in(fd: int, first: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of a file between two places that are no holes."""
    while first < end:
        try:
            at = os.lseek(fd, first, os.SEEK_DATA)
        except OSError:  # ENXIO: only holes follow
            return
        if at >= end:
            return
        first = min(end, os.lseek(fd, at, os.SEEK_HOLE))
        yield at, first
