"""A guest whose every acknowledged write is known outside: ``recorder.py IMAGE LOG FIRST STEP COUNT PASS``.

Writes records of 4 KiB over ``COUNT`` slots, from slot ``FIRST`` on and ``STEP`` apart, pass after pass from ``PASS``
on, with an fsync after each.  A line ``W slot pass seconds`` in LOG is an acknowledged write; ``E slot errno`` is one
that failed, and ends it.  SIGTERM ends it between two records.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import struct
import sys
import time
from types import FrameType

RECORD_BYTES = 4096
HEAD = struct.Struct("<8sQQ")
MAGIC = b"recorded"


def record(slot: int, number: int) -> bytes:
    """What pass ``number`` writes to a slot."""
    head = HEAD.pack(MAGIC, slot, number)
    return head + hashlib.shake_128(head).digest(RECORD_BYTES - len(head))


def number_in(data: bytes, slot: int) -> int:
    """The pass that wrote this record; 0: none did.  Raises AssertionError for anything else than a whole record."""
    if not any(data):
        return 0
    _, _, number = HEAD.unpack_from(data)
    assert data == record(slot, number), f"slot {slot} holds no whole record: {data[:32].hex()}"
    return int(number)


def main(image: str, log: str, first: int, step: int, count: int, begin: int) -> int:
    """Write until told to stop; the exit code is 0 unless a write failed."""
    stopping = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    disk = os.open(image, os.O_RDWR)
    for number in itertools.count(begin):
        for slot in range(first, first + step * count, step):
            if stopping:
                return 0
            begun = time.monotonic()
            try:
                os.pwrite(disk, record(slot, number), slot * RECORD_BYTES)
                os.fsync(disk)
            except OSError as error:
                os.write(out, f"E {slot} {error.errno}\n".encode())
                return 1
            os.write(out, f"W {slot} {number} {time.monotonic() - begun:.6f}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:7])))
