"""What the frontend decides: which part of a request lies inside the image, what a fallocate means, what to do
after an error, and when a handle is good.

Pure: no socket, thread or clock.  The states of a handle:

| state  | means                                     | a request                      | left by                        |
|--------|-------------------------------------------|--------------------------------|--------------------------------|
| open   | ``at`` names the running blockd           | is sent                        | new blockd, handle not known   |
| adrift | ``at`` is empty or names an earlier one   | opens it again with its epoch  | reply to ``open``              |
| stale  | another node has had the writer role (R2) | fails with EIO                 | nothing                        |

A request is sent to one blockd process at a time, and to the next one only when the former is known to be gone or
has said that it did nothing.  So none is executed behind the back of a later one.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar

from ukai.errors import NoSpace, StaleHandle, StaleSession, UkaiError
from ukai.frontend.shortcut import Shortcut
from ukai.model import Image

T = TypeVar("T")

NEW_HANDLE_EPOCH = -1

BLKSIZE_BYTES = 131072
SECTOR_BYTES = 512
DEFAULT_MODE = 0o660

FALLOC_KEEP_SIZE = 0x01
FALLOC_PUNCH_HOLE = 0x02
FALLOC_ZERO_RANGE = 0x10

ZERO_PIECE_BYTES = 2**30
"""A request to zero more is sent in pieces, so that each is done within io_timeout."""

PAIRS_WANTED = 2
"""So often a single write was followed by an fsync before it is taken for a habit."""

PAUSE_FIRST_S = 0.02
PAUSE_LAST_S = 0.25

HOLD_TIMEOUTS = 3
"""blockd answers each request within io_timeout of its arrival; what it has not answered after so many of them,
while it was not silent, it never got."""

REFUSED = {
    "mknod": errno.EPERM,
    "mkdir": errno.EPERM,
    "unlink": errno.EPERM,
    "rmdir": errno.EPERM,
    "symlink": errno.EPERM,
    "rename": errno.EPERM,
    "link": errno.EPERM,
    "create": errno.EPERM,
    "readlink": errno.EINVAL,
}
"""Operations that are never possible.  Those not named here nor implemented (extended attributes, locks, access,
flush, ioctl …) are left out on purpose: the kernel learns that from one ENOSYS and then does what is right by
itself (EOPNOTSUPP for attributes, locks within the host, ENOTTY for ioctl) without asking again."""


@dataclass(slots=True)
class Disk:
    """An image as the mount shows it; shared by all its handles.  What chmod, chown and touch set lives as long
    as the process.
    """

    name: str
    uuid: str
    size: int
    mtime_ns: int
    mode: int = DEFAULT_MODE
    uid: int = 0
    gid: int = 0
    allocated_bytes: int = 0
    allocated_until: float = 0.0


class Habit:
    """How a handle is used: whether each single write is followed by an fsync.

    Then the next write is sent as a synchronous one: its data are flushed on the way, on all nodes at once, and the
    fsync finds nothing left to do.  A guess that was wrong costs one fdatasync; nothing depends on it.
    """

    __slots__ = ("_pairs", "_writes")

    def __init__(self) -> None:
        self._pairs = self._writes = 0

    def write_begins(self) -> bool:
        """Whether an fsync is likely to come next."""
        self._writes += 1
        if self._writes > 1:
            self._pairs = 0
        return self._pairs >= PAIRS_WANTED

    def fsync_begins(self) -> None:
        if self._writes:
            self._pairs = self._pairs + 1 if self._writes == 1 else 0
            self._writes = 0


@dataclass(slots=True, eq=False)
class Handle:
    """One open file."""

    number: int
    disk: Disk
    synchronous: bool
    """Opened with O_SYNC or O_DSYNC: the kernel sends no FSYNC for it under direct I/O (R7)."""
    size: int = 0
    block_size: int = 1
    epoch: int = NEW_HANDLE_EPOCH
    at: str = ""
    stale: str = ""
    lost: str = ""
    """What the next fsync must tell: a write was posted, and can't be done any more (R7)."""
    gate: Any = None
    """Lets one thread at a time open the handle again."""
    shortcut: Shortcut = field(default_factory=Shortcut)
    """Shared by all handles of the image."""
    habit: Habit = field(default_factory=Habit)
    reads: Any = None
    writes: Any = None
    """Statistics, kept here to save a look-up per request."""


class Overdue(Generic[T]):
    """Writes that got no answer within their time, by image.

    Each may yet be done, by a blockd that was frozen, say, and connections have no order among each other.  So no
    other write of the image is sent until it is answered or its blockd is gone: else it could overwrite what was
    written later.  A blockd that answers all else for long enough has lost it.
    """

    def __init__(self, io_timeout_s: float) -> None:
        self._hold_s = HOLD_TIMEOUTS * io_timeout_s
        self.by_image: dict[str, list[tuple[T, float]]] = {}
        """uuid → (what the write is known by, held until)."""

    def hold(self, uuid: str, write: T, now: float) -> None:
        self.by_image.setdefault(uuid, []).append((write, now + self._hold_s))

    def let_go(self, now: float, silent: bool, answered: Callable[[T], bool]) -> list[T]:
        """Those that hold back nothing any more; ``silent``: blockd has not answered anything for a while."""
        gone: list[T] = []
        for uuid, held in list(self.by_image.items()):
            kept = []
            for write, until in held:
                until = now + self._hold_s if silent else until
                if answered(write) or now >= until:
                    gone.append(write)
                else:
                    kept.append((write, until))
            self.by_image[uuid] = kept
            if not kept:
                del self.by_image[uuid]
        return gone

    def clear(self) -> list[T]:
        """The blockd that they were sent to is gone; all of them."""
        gone = [write for held in self.by_image.values() for write, _ in held]
        self.by_image.clear()
        return gone


class Verdict(Enum):
    """What an error reply means for the request."""

    FAIL = "fail"
    AGAIN = "again"
    REOPEN = "reopen"
    STALE = "stale"


def after_error(error: UkaiError) -> Verdict:
    """What to do with a request that was answered with ``error``."""
    if isinstance(error, StaleHandle):
        return Verdict.STALE
    if isinstance(error, StaleSession):
        return Verdict.REOPEN
    return Verdict.AGAIN if error.retry else Verdict.FAIL


def pause_s(attempt: int) -> float:
    """How long to wait before attempt number ``attempt`` (from 0) is repeated."""
    return float(min(PAUSE_FIRST_S * 2 ** min(attempt, 10), PAUSE_LAST_S))


def data_errno(error: UkaiError) -> int:
    """What the caller of read, write, fsync or fallocate sees: ENOSPC (R10), else EIO.

    Other errnos would be misread: QEMU takes EINVAL for a wrong alignment, and tools take ENOENT for a lost race.
    """
    return errno.ENOSPC if isinstance(error, NoSpace) else errno.EIO


def part_to_read(size: int, offset: int, length: int) -> int:
    """How many bytes of the request lie inside the image; 0 past the end."""
    return max(0, min(length, size - offset))


def part_to_write(size: int, offset: int, length: int) -> int:
    """How many bytes of the request lie inside the image, as on a block device.

    Raises OSError (ENOSPC) when the request is not empty and begins at the end or past it.
    """
    if offset + length <= size:
        return length
    if offset >= size and length:
        raise OSError(errno.ENOSPC, f"write at {offset}: the image ends at {size}")
    return max(0, size - offset)


def parts_to_zero(mode: int, size: int, block_size: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The ranges (offset, length) that a fallocate makes zero, each to be sent as one request.

    Cut at block boundaries, so that a whole block's space is freed as a whole.  Raises OSError: EOPNOTSUPP for
    every mode but PUNCH_HOLE and ZERO_RANGE (a plain preallocation too: space can't be promised on every
    replica), ENOSPC where the file would have to grow.
    """
    if mode not in (FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, FALLOC_ZERO_RANGE, FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE):
        raise OSError(errno.EOPNOTSUPP, f"fallocate mode {mode:#x}")
    if not mode & FALLOC_KEEP_SIZE and offset + length > size:
        raise OSError(errno.ENOSPC, f"fallocate to {offset + length}: the image ends at {size}")
    return _pieces(offset, min(offset + length, size), block_size)


def _pieces(offset: int, end: int, block_size: int) -> Iterator[tuple[int, int]]:
    step = max(1, ZERO_PIECE_BYTES // block_size) * block_size
    while offset < end:
        cut = min(end, (offset // step + 1) * step)
        yield offset, cut - offset
        offset = cut


def shown(images: Iterable[Image], node: str, before: dict[str, Disk], now_ns: int) -> dict[str, Disk]:
    """The disks to show on ``node``, by name: online images that list it as a hypervisor.

    A disk that was shown before keeps its state; ``now_ns`` is the time of last change of a new one.
    """
    known = {disk.uuid: disk for disk in before.values()}
    found = {}
    for image in images:
        if not image.online or node not in image.hypervisors:
            continue
        disk = known.get(image.uuid)
        if disk is None:
            disk = Disk(image.name, image.uuid, image.size, now_ns)
        disk.name, disk.size = image.name, image.size
        found[image.name] = disk
    return found
