"""fdatasync without a thread: the kernel's own workers do it, and an eventfd tells the loop (Linux AIO).

A thread of ours has to be woken, waits for the interpreter before the call and after it while the loop looks for its
next message, and has to wake the loop.  Beside a small fdatasync that is more than half of the time.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import os
import platform
import struct
from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)

Synced = Callable[[list[int]], None]
"""Hears the errno of each fdatasync; 0: it is done."""

SLOTS = 64
"""So many at a time."""

_NUMBERS = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""io_setup, io_destroy, io_getevents, io_submit."""
_FDSYNC, _RESFD = 3, 1
_REQUEST, _EVENT = struct.Struct("=QIIHhIQQqQII"), struct.Struct("=QQqq")


def last_error() -> OSError:
    """Of the last call of libc in this thread that failed."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def outcome(fdatasync: Callable[[int], None], fd: int) -> int:
    """The errno of an fdatasync that is waited for; 0: it is done."""
    try:
        fdatasync(fd)
    except OSError as e:
        return e.errno or errno.EIO
    return 0


_call = ctypes.PyDLL(None, use_errno=True).syscall  # none of the calls waits: the interpreter is kept
_call.restype = ctypes.c_long


class _Batch:
    """What was asked for together."""

    __slots__ = ("done", "left", "numbers")

    def __init__(self, count: int, done: Synced) -> None:
        self.numbers, self.left, self.done = [0] * count, count, done

    def ended(self, at: int, number: int) -> None:
        self.numbers[at] = number
        self.left -= 1
        if self.left == 0:
            self.done(self.numbers)


class Aio:
    """Of one loop.  Raises OSError where there is no such thing, as on other processors or in some containers."""

    def __init__(self) -> None:
        if platform.machine() not in _NUMBERS:
            raise OSError(errno.ENOSYS, f"not on {platform.machine()}")
        setup, self._destroy, self._get, self._submit = map(ctypes.c_long, _NUMBERS[platform.machine()])
        self._context = ctypes.c_ulong(0)
        if _call(setup, ctypes.c_uint(SLOTS), ctypes.byref(self._context)) != 0:
            raise last_error()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._requests = ctypes.create_string_buffer(_REQUEST.size * SLOTS)
        first = ctypes.addressof(self._requests)
        self._places = (ctypes.c_void_p * SLOTS)(*(first + n * _REQUEST.size for n in range(SLOTS)))
        self._events = ctypes.create_string_buffer(_EVENT.size * SLOTS)
        self._at_once = (ctypes.c_long * 2)(0, 0)
        self._next = 0
        """Number of the next request."""
        self._waiting: dict[int, tuple[_Batch, int]] = {}
        """Number of a request → what it belongs to, and its place there."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._bell, self._rung)

    def fdatasync(self, fds: Sequence[int], done: Synced) -> bool:
        """Begin one for each of some descriptors; false: not here, nothing has been begun.

        They run side by side, also when nobody waits any more.  The descriptors stay open until ``done`` is called,
        which is in a later turn of the loop.
        """
        count = len(fds)
        if len(self._waiting) + count > SLOTS:
            return False
        batch, first = _Batch(count, done), self._next
        self._next += count
        for at, fd in enumerate(fds):
            request = first + at, 0, 0, _FDSYNC, 0, fd, 0, 0, 0, 0, _RESFD, self._bell
            _REQUEST.pack_into(self._requests, at * _REQUEST.size, *request)
            self._waiting[first + at] = batch, at
        begun: int = max(0, _call(self._submit, self._context, ctypes.c_long(count), self._places))
        for at in range(begun, count):
            del self._waiting[first + at]
            if begun:  # the kernel took some of them only: it has no memory
                batch.ended(at, outcome(os.fdatasync, fds[at]))
        return begun > 0

    def _rung(self) -> None:
        try:
            os.read(self._bell, 8)
        except BlockingIOError:
            return
        found = _call(self._get, self._context, ctypes.c_long(0), ctypes.c_long(SLOTS), self._events, self._at_once)
        for at in range(found):
            number, _, result, _ = _EVENT.unpack_from(self._events, at * _EVENT.size)
            batch, place = self._waiting.pop(number)
            try:
                batch.ended(place, -result)
            except Exception:  # the others must hear of theirs all the same
                log.exception("defect after an fdatasync")

    def close(self) -> None:
        """What was begun is done first."""
        self._loop.remove_reader(self._bell)
        _call(self._destroy, self._context)
        os.close(self._bell)
