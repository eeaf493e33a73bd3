"""The mounted filesystem: a flat directory of images, each a file of fixed size."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from os import preadv
from time import monotonic
from typing import NoReturn, cast

from ukai.errors import NotFound, UkaiError
from ukai.frontend import core
from ukai.frontend.client import Client
from ukai.frontend.core import Disk, Handle
from ukai.page import MappedPage
from ukai.telemetry import Metrics, OpStats

log = logging.getLogger(__name__)

USAGE_SECONDS = 1.0
USAGE_WAIT_S = 2.0
STATFS_WAIT_S = 5.0
STATFS_UNIT_BYTES = 4096
COMPLAINT_SECONDS = 1.0

_SYNCHRONOUS = os.O_SYNC | os.O_DSYNC


class Files:
    """Implements ``binding.Filesystem`` over ``client``.  Called from libfuse's threads."""

    def __init__(self, client: Client, metrics: Metrics, io_timeout_s: float) -> None:
        self._client, self._metrics, self._io_timeout_s = client, metrics, io_timeout_s
        self._disks: dict[str, Disk] = {}
        self._known = threading.Event()
        self._count = threading.Lock()
        self._at_once = os.RWF_NOWAIT
        """How a lent file is read: what waits for a disk is read where others know that a thread waits."""
        self._complained = 0.0
        self._unsaid = 0
        self.on_release: Callable[[], None] = lambda: None
        self._began_ns = time.time_ns()

    @property
    def disks(self) -> dict[str, Disk]:
        return self._disks

    def show(self, disks: dict[str, Disk]) -> None:
        """From now on these are the images of this node."""
        for name in self._disks.keys() - disks.keys():
            self._metrics.forget(name)
        self._disks = disks
        for handle in self._client.handles():
            disk = disks.get(handle.disk.name)
            if disk is handle.disk and handle.size:
                handle.size = disk.size
        self._known.set()

    # -- names and attributes

    def _disk(self, path: bytes | None, fh: int | None) -> Disk | None:
        """The image meant; None: the directory.  Raises NotFound."""
        if fh is not None and (handle := self._client.handle(fh)) is not None:
            return handle.disk
        if path is None or path == b"/":
            return None
        self._await_metadata()
        disk = self._disks.get(path[1:].decode("utf-8", "replace"))
        if disk is None:
            raise NotFound("no such image is online on this node")
        return disk

    def _await_metadata(self) -> None:
        """An image is not missing because metad has not been heard yet."""
        if not self._known.is_set() and not self._known.wait(self._io_timeout_s):
            log.warning("metad has not been reached: which images there are is not known")
            raise OSError(errno.EIO, "the metadata is not known yet")

    def getattr(self, path: bytes | None, fh: int | None) -> dict[str, int]:
        disk = self._disk(path, fh)
        if disk is None:
            now = self._began_ns
            return {
                "st_mode": stat.S_IFDIR | 0o755,
                "st_nlink": 2,
                "st_blksize": core.BLKSIZE_BYTES,
                "st_atime": now,
                "st_mtime": now,
                "st_ctime": now,
            }
        return {
            "st_mode": stat.S_IFREG | disk.mode,
            "st_nlink": 1,
            "st_uid": disk.uid,
            "st_gid": disk.gid,
            "st_size": disk.size,
            "st_blksize": core.BLKSIZE_BYTES,
            "st_blocks": self._allocated_bytes(disk) // core.SECTOR_BYTES,
            "st_atime": disk.mtime_ns,
            "st_mtime": disk.mtime_ns,
            "st_ctime": disk.mtime_ns,
        }

    def _allocated_bytes(self, disk: Disk) -> int:
        """What one copy takes on disk; the last known figure while blockd is away."""
        now = time.monotonic()
        if now >= disk.allocated_until:
            disk.allocated_until = now + USAGE_SECONDS
            if self._client.connected:
                try:
                    reply = self._client.call({"op": "stat", "image": disk.name}, min(USAGE_WAIT_S, self._io_timeout_s))
                    disk.allocated_bytes = int(reply["allocated"])
                except (UkaiError, KeyError, TypeError, ValueError) as e:
                    log.info("allocated size of %s is not known: %s", disk.name, e)
        return disk.allocated_bytes

    def readdir(self) -> list[str]:
        self._await_metadata()
        return list(self._disks)

    def statfs(self) -> dict[str, int]:
        reply = self._client.call({"op": "statfs"}, min(STATFS_WAIT_S, self._io_timeout_s))
        free, total = (int(reply.get(name) or 0) // STATFS_UNIT_BYTES for name in ("free", "total"))
        return {
            "f_bsize": STATFS_UNIT_BYTES,
            "f_frsize": STATFS_UNIT_BYTES,
            "f_blocks": total,
            "f_bfree": free,
            "f_bavail": free,
            "f_files": len(self._disks) + 1,
            "f_namemax": 100,
        }

    def chmod(self, path: bytes | None, fh: int | None, mode: int) -> None:
        if (disk := self._disk(path, fh)) is not None:
            disk.mode = stat.S_IMODE(mode)

    def chown(self, path: bytes | None, fh: int | None, uid: int, gid: int) -> None:
        if (disk := self._disk(path, fh)) is not None:
            disk.uid = disk.uid if uid == -1 else uid
            disk.gid = disk.gid if gid == -1 else gid

    def utimens(self, path: bytes | None, fh: int | None, mtime_ns: int | None) -> None:
        if (disk := self._disk(path, fh)) is not None:
            disk.mtime_ns = time.time_ns() if mtime_ns is None else mtime_ns

    def truncate(self, path: bytes | None, fh: int | None, length: int) -> None:
        """The same size only; growing is an administrator's command."""
        disk = self._disk(path, fh)
        if disk is None:
            raise OSError(errno.EISDIR, "a directory")
        if length != disk.size:
            raise OSError(errno.EPERM, "an image's size is changed with ukai-ctl")

    # -- data

    def open(self, path: bytes, flags: int) -> int:
        disk = self._disk(path, None)
        if disk is None:
            raise OSError(errno.EISDIR, "a directory")
        if flags & os.O_TRUNC and flags & os.O_ACCMODE != os.O_RDONLY and disk.size:
            raise OSError(errno.EPERM, "an image can't be truncated")
        handle = Handle(0, disk, bool(flags & _SYNCHRONOUS))
        handle.reads = self._metrics.op("read", disk.name)
        handle.writes = self._metrics.op("write", disk.name)
        begin = monotonic()
        try:
            self._client.open(handle)
        except UkaiError as e:
            self._complain("open", disk, e)
            self._done(self._metrics.op("open", disk.name), begin, 0, True)
            raise
        self._done(self._metrics.op("open", disk.name), begin, 0, False)
        return handle.number

    def release(self, fh: int) -> None:
        if (handle := self._client.handle(fh)) is not None:
            self._client.close_handle(handle)
        self.on_release()

    def _handle(self, fh: int) -> Handle:
        handle = self._client.handle(fh)
        if handle is None:
            raise OSError(errno.EBADF, "not open")
        return handle

    def read(self, fh: int, into: memoryview, offset: int) -> int:
        """The way of a read of a lent block is short on purpose: with sixteen at a time each call counts."""
        begin = monotonic()
        handle = self._client.handle(fh) or self._handle(fh)
        length = len(into)
        if offset + length > handle.size:
            length = core.part_to_read(handle.size, offset, length)
            if not length:
                return 0
            into = into[:length]
        shortcut, block_size = handle.shortcut, handle.block_size
        block = offset // block_size
        within = offset - block * block_size
        loan = shortcut.loans.get(block)
        if loan is not None and not shortcut.writes and within + length <= block_size:
            # What Shortcut.loan and, after the read, Shortcut.good say where nothing is written.
            page, number = cast(MappedPage, loan.page), loan.number
            lease, numbers = page.lease, page.numbers
            if page is shortcut.page and begin < lease[0] and numbers[block] == number:
                try:
                    count = preadv(loan.fd, (into,), within, self._at_once)
                except OSError as e:
                    count = 0  # tried again below, and told
                    if e.errno == errno.EOPNOTSUPP:
                        self._at_once = 0
                end = monotonic()
                if count == length and end < lease[0] and numbers[block] == number and not shortcut.writes:
                    loan.used = True
                    stats: OpStats = handle.reads
                    stats.done(end - begin, length)
                    return length
        try:
            self._client.read(handle, offset, into)
        except UkaiError as e:
            self._failed("read", handle, handle.reads, begin, e)
        self._done(handle.reads, begin, length, False)
        return length

    def write(self, fh: int, data: memoryview, offset: int) -> int:
        begin = monotonic()
        handle = self._handle(fh)
        length = len(data)
        if offset + length > handle.size:
            length = core.part_to_write(handle.size, offset, length)
            data = data[:length]
        try:
            self._client.write(handle, offset, data)
        except UkaiError as e:
            self._failed("write", handle, handle.writes, begin, e)
        handle.disk.mtime_ns = time.time_ns()
        self._done(handle.writes, begin, length, False)
        return length

    def fsync(self, fh: int) -> None:
        begin = monotonic()
        handle = self._handle(fh)
        stats = self._metrics.op("flush", handle.disk.name)
        try:
            self._client.flush(handle)
        except UkaiError as e:
            self._failed("fsync", handle, stats, begin, e)
        self._done(stats, begin, 0, False)

    def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        begin = monotonic()
        handle = self._handle(fh)
        parts = core.parts_to_zero(mode, handle.size, handle.block_size, offset, length)
        stats = self._metrics.op("discard", handle.disk.name)
        try:
            for at, size in parts:
                self._client.zero(handle, at, size)
        except UkaiError as e:
            self._failed("fallocate", handle, stats, begin, e)
        handle.disk.mtime_ns = time.time_ns()
        handle.disk.allocated_until = 0.0
        self._done(stats, begin, length, False)

    # -- what came of it

    def _done(self, stats: OpStats, begin: float, size: int, failed: bool) -> None:
        with self._count:
            stats.done(monotonic() - begin, size, failed)

    def _failed(self, what: str, handle: Handle, stats: OpStats, begin: float, error: UkaiError) -> NoReturn:
        self._done(stats, begin, 0, True)
        self._complain(what, handle.disk, error)
        raise OSError(core.data_errno(error), error.message)

    def _complain(self, what: str, disk: Disk, error: UkaiError) -> None:
        """One line a second: a guest that goes on trying must not fill the log."""
        now = time.monotonic()
        if now < self._complained + COMPLAINT_SECONDS:
            self._unsaid += 1
            return
        more, self._unsaid, self._complained = self._unsaid, 0, now
        log.warning("%s of %s failed: %s%s", what, disk.name, error.message, f" ({more} more)" if more else "")
