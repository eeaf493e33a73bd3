"""Block files that blockd has lent, and the reads that go straight to them.

Asked for over a socket of their own, because descriptors can't travel through ZeroMQ.  ``shortcut.py`` decides.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ukai import messages
from ukai.errors import RemoteProtocolError, UkaiError
from ukai.frontend.core import Handle
from ukai.frontend.shortcut import Loan, Shortcut
from ukai.loans import ZEROS
from ukai.messages import Header
from ukai.page import MappedPage

log = logging.getLogger(__name__)

ANSWER_SECONDS = 0.1
"""blockd answers at once, or is busy: then reads go through it anyway."""
PAUSE_SECONDS = 1.0
"""After a failure, nothing is asked for so long."""
SWEEP_SECONDS = 1.0
REPLY_BYTES = 4096
_ZEROS = bytes(2**20)

Waits = Callable[[], AbstractContextManager[None]]


class LentFile:
    """A descriptor; closed when nobody reads from it any more, whoever drops it first."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


def _at_once(fd: int, into: memoryview, offset: int) -> bool:
    """Whether all of it could be read without waiting for a disk."""
    try:
        return os.preadv(fd, (into,), offset, os.RWF_NOWAIT) == len(into)
    except OSError:  # nothing of it is in memory, or this filesystem can't say
        return False


class Borrower:
    """All loans of this process.  ``read`` may be called from any thread, as may all else."""

    def __init__(self, path: str, files_limit: int) -> None:
        self._path, self._limit = path, files_limit
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._pages: dict[int, MappedPage] = {}
        """By the name that blockd gave it."""
        self._kept: OrderedDict[tuple[int, int], tuple[Shortcut, Loan]] = OrderedDict()
        """Shortcut and block → loan, oldest first."""
        self._quiet_until = self._sweep_at = 0.0

    def read(
        self, shortcut: Shortcut, block: int, within: int, offset: int, into: memoryview, waits: Waits = nullcontext
    ) -> bool:
        """Fill ``into`` from ``within`` a block, which is at ``offset`` of the image; false: ask blockd.

        ``waits`` is entered while a disk has to be waited for.
        """
        length = len(into)
        loan = shortcut.loan(block, offset, length, time.monotonic())
        if loan is None:
            return False
        if loan.file is None:
            into[:] = _ZEROS[:length] if length <= len(_ZEROS) else bytes(length)
        else:
            try:
                if not _at_once(loan.fd, into, within):
                    with waits():
                        if os.preadv(loan.fd, (into,), within) != length:
                            return False
            except OSError as e:
                log.info("a lent block file can't be read: %s", e.strerror)
                return False
            loan.used = True
        return shortcut.good(loan, block, offset, length, time.monotonic())

    def ask(self, handle: Handle, block: int) -> None:
        """Ask for the loan of a block that blockd has offered.  Whatever goes wrong, reads go through blockd."""
        if time.monotonic() < self._quiet_until or not self._lock.acquire(blocking=False):
            return
        try:
            self._ask(handle, block)
        except (OSError, UkaiError) as e:
            log.debug("no loan of block %d of %s: %s", block, handle.disk.name, e)
            self._quiet_until = time.monotonic() + PAUSE_SECONDS
            self._disconnect()
        finally:
            self._lock.release()

    def _ask(self, handle: Handle, block: int) -> None:
        """Raises OSError, UkaiError."""
        shortcut: Shortcut = handle.shortcut
        if self._socket is None:
            self._socket = _connected(self._path)
        page = next((p for p in self._pages.values() if p is shortcut.page), None)
        known = page.name if page is not None else 0
        request: Header = {"op": "lend", "id": 1, "inc": handle.at, "h": handle.number, "b": block, "page": known}
        self._socket.send(messages.pack(request))
        data, fds, flags, _ = socket.recv_fds(self._socket, REPLY_BYTES, 2)
        files = [LentFile(fd) for fd in fds]  # closed whatever happens now
        if not data or flags & socket.MSG_CTRUNC:
            raise OSError(errno.ECONNRESET, "blockd gave no whole answer")
        reply = messages.unpack(data)
        if "err" in reply:
            return  # something has come between; blockd will offer it again
        name, number = messages.integer(reply, "page", 1), messages.integer(reply, "number", 1, ZEROS)
        if name != known:
            lent = _pop(files)
            self._pages[name] = page = MappedPage(os.dup(lent.fd))
            page.name = name
        if page is None:
            raise RemoteProtocolError("a loan without a page")
        file = None if number == ZEROS else _pop(files)
        loan = Loan(page, number, file, file.fd if file is not None else -1)
        shortcut.take(block, loan)
        if loan.file is not None:
            self._kept[id(shortcut), block] = (shortcut, loan)
            self._evict()

    def _evict(self) -> None:
        """Give up the oldest loans beyond the limit; one that was used since it came to the front has another turn."""
        while len(self._kept) > self._limit:
            key, (shortcut, loan) = self._kept.popitem(last=False)
            if loan.used:
                loan.used = False
                self._kept[key] = (shortcut, loan)
            elif shortcut.loans.get(key[1]) is loan:
                del shortcut.loans[key[1]]

    def look_around(self) -> None:
        """Called often: each second, close what was taken back.  A deleted file takes space as long as it is open."""
        now = time.monotonic()
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_SECONDS
            self._sweep()

    def _sweep(self) -> None:
        with self._lock:
            for key, (shortcut, loan) in list(self._kept.items()):
                if loan.page is not shortcut.page or loan.page.numbers[key[1]] != loan.number:
                    del self._kept[key]
                    if shortcut.loans.get(key[1]) is loan:
                        del shortcut.loans[key[1]]
            used = {id(shortcut.page) for shortcut, _ in self._kept.values()}
            self._pages = {n: p for n, p in self._pages.items() if id(p) in used}

    def forget(self, shortcut: Shortcut) -> None:
        """Nobody has the image open any more."""
        shortcut.drop()
        self._sweep()

    def reset(self) -> None:
        """The blockd that lent it all is gone."""
        with self._lock:
            for shortcut, _ in self._kept.values():
                shortcut.drop()
            self._kept.clear()
            self._pages.clear()
            self._disconnect()
            self._quiet_until = 0.0

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _connected(path: str) -> socket.socket:
    """Raises OSError."""
    to_blockd = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        to_blockd.settimeout(ANSWER_SECONDS)
        to_blockd.connect(path)
    except BaseException:
        to_blockd.close()
        raise
    return to_blockd


def _pop(files: list[LentFile]) -> Any:
    """Raises RemoteProtocolError."""
    if not files:
        raise RemoteProtocolError("a loan without its descriptor")
    return files.pop(0)
