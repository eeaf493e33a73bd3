"""Checksums of the blocks of one image (``image create --checksum``): what a disk alters silently is found out.

``.ukai.sum`` beside the blocks has for each chunk of 4096 bytes two sums of 8 bytes, little endian: of what the chunk
held before, and of what it holds.  They are written before the data are, and a chunk is good if it has either: a
process may die between the two.  Zeros have the sum 0, so an entry that was never written is that of a hole.

A write of a part of a chunk reads the rest of it and checks it first: it must not make damage look good.  Sums and
data are flushed together.  A machine that loses power may keep one without the other, but only in active blocks (R5);
their sums are then made anew from what there is (``Core``), as a resync does with those of its target.
"""

from __future__ import annotations

import array
import contextlib
import errno
import sys
from typing import TypeAlias

import xxhash

from ukai.blockd.disk import Disk
from ukai.blockd.files import SUMS, Bytes, write_all, zeros
from ukai.errors import Damaged

CHUNK_BYTES = 4096
ENTRY_BYTES = 16
KNOWN_BLOCKS = 1024
"""Of so many blocks it is remembered which of its sums a chunk has; of others it is looked up again."""

Entries: TypeAlias = "array.array[int]"
"""Former sum and sum of one chunk after the other."""

_of_zeros: dict[int, int] = {}


def sum_of(data: Bytes) -> int:
    """The sum of one chunk; 0 for zeros."""
    length = len(data)
    if length not in _of_zeros:
        _of_zeros[length] = xxhash.xxh3_64_intdigest(zeros(length))
    return xxhash.xxh3_64_intdigest(data) ^ _of_zeros[length]


def sums_of(data: Bytes) -> Entries:
    """The sums of data that begin at a chunk."""
    view = memoryview(data)
    return array.array("Q", [sum_of(view[at : at + CHUNK_BYTES]) for at in range(0, len(view), CHUNK_BYTES)])


class Sums:
    """The sums of one image.  All methods raise OSError for the file of the sums itself."""

    def __init__(self, disk: Disk, directory: str, size: int, block_size: int) -> None:
        self._disk, self.path = disk, f"{directory}/{SUMS}"
        self._size, self._block_size = size, block_size
        self._per_block = -(-block_size // CHUNK_BYTES)
        self.fd = -1
        self.lost = False
        """Whether there was no file, though there may be blocks."""
        self._known: dict[int, bytearray] = {}
        """block → 1 for each chunk that has its sum, not the former one, for certain."""

    def open(self) -> None:
        self.lost = not self._disk.exists(self.path)
        self.fd = self._disk.open(self.path, create=True)

    def close(self) -> None:
        if self.fd >= 0:
            self._disk.close(self.fd)
            self.fd = -1

    def bounds(self, block: int, offset: int, length: int) -> tuple[int, int]:
        """The whole chunks around a part of a block: (start, end)."""
        end = -(-(offset + length) // CHUNK_BYTES) * CHUNK_BYTES
        return offset // CHUNK_BYTES * CHUNK_BYTES, min(end, self._block_bytes(block))

    def _block_bytes(self, block: int) -> int:
        return min(self._block_size, self._size - block * self._block_size)

    def _load(self, block: int, start: int, end: int) -> Entries:
        """The entries of the chunks from ``start`` to ``end``."""
        length = -(-(end - start) // CHUNK_BYTES) * ENTRY_BYTES
        at = (block * self._per_block + start // CHUNK_BYTES) * ENTRY_BYTES
        # beyond the end of the file nothing was ever written
        entries = array.array("Q", self._read(self.fd, at, length).ljust(length, b"\0"))
        if sys.byteorder == "big":
            entries.byteswap()
        return entries

    def _store(self, block: int, start: int, entries: Entries) -> None:
        if sys.byteorder == "big":
            entries = array.array("Q", entries)
            entries.byteswap()
        at = (block * self._per_block + start // CHUNK_BYTES) * ENTRY_BYTES
        write_all(self._disk, self.fd, entries.tobytes(), at)

    def _of(self, block: int) -> bytearray:
        known = self._known.get(block)
        if known is None:
            if len(self._known) >= KNOWN_BLOCKS:
                del self._known[next(iter(self._known))]
            known = self._known[block] = bytearray(self._per_block)
        return known

    def clear(self, block: int) -> None:
        """A block reads as zeros from now on: it was made anew, or deleted."""
        self._known.pop(block, None)
        at, length = block * self._per_block * ENTRY_BYTES, self._per_block * ENTRY_BYTES
        if at >= self._disk.size(self.fd):
            return
        try:
            self._disk.punch(self.fd, at, length)
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise
            write_all(self._disk, self.fd, zeros(length), at)

    # --- writing

    def begin(self, fd: int, block: int, offset: int, length: int, data: Bytes | None) -> None:
        """A part of a block is about to be written, or with no data to be made zeros.

        Raises Damaged when the rest of a chunk, which stays, is not what it should be.
        """
        start, end = self.bounds(block, offset, length)
        entries = self._load(block, start, end)
        held = entries[1::2]
        edges = {at for at, cut in ((start, start < offset), (_last(end), offset + length < end)) if cut}
        new = array.array("Q", bytes(len(held) * 8))
        if data is not None:
            view = memoryview(data)
            for at in range(start, end, CHUNK_BYTES):
                if at not in edges:
                    size = min(CHUNK_BYTES, end - at)
                    new[(at - start) // CHUNK_BYTES] = sum_of(view[at - offset : at - offset + size])
        for at in sorted(edges | self._doubtful(block, start, entries)):
            index, size = (at - start) // CHUNK_BYTES, min(CHUNK_BYTES, end - at)
            chunk = bytearray(self._read(fd, at, size))
            now = sum_of(chunk)
            if now in entries[2 * index : 2 * index + 2] and len(chunk) == size:
                held[index] = now
            elif at in edges:
                raise mismatch(block, at)
            if at in edges:
                a, b = max(at, offset), min(at + size, offset + length)
                chunk[a - at : b - at] = bytes(b - a) if data is None else data[a - offset : b - offset]
                new[index] = sum_of(chunk)
        entries[0::2], entries[1::2] = held, new
        first = start // CHUNK_BYTES
        self._of(block)[first : first + len(held)] = bytes(len(held))
        self._store(block, start, entries)

    def _doubtful(self, block: int, start: int, entries: Entries) -> set[int]:
        """Chunks of which it is not known which of their sums they have."""
        first, count = start // CHUNK_BYTES, len(entries) // 2
        known = self._of(block)
        if known.find(0, first, first + count) < 0:
            return set()
        return {
            start + i * CHUNK_BYTES
            for i in range(count)
            if not known[first + i] and entries[2 * i] != entries[2 * i + 1]
        }

    def written(self, block: int, offset: int, length: int) -> None:
        """What begin() announced has been done."""
        start, end = self.bounds(block, offset, length)
        first, count = start // CHUNK_BYTES, -(-(end - start) // CHUNK_BYTES)
        self._of(block)[first : first + count] = b"\1" * count

    def accept(self, block: int, start: int, data: Bytes) -> None:
        """Take what whole chunks hold for right, where they have neither sum."""
        entries, now = self._load(block, start, start + len(data)), sums_of(data)
        for index in self._wrong(entries, now):
            entries[2 * index] = entries[2 * index + 1] = now[index]
        self._store(block, start, entries)

    def accept_failed(self, fd: int, block: int, offset: int, length: int) -> None:
        """A write has failed, and nobody can say what is there now; as far as it can be read, it can be read."""
        start, end = self.bounds(block, offset, length)
        with contextlib.suppress(OSError):
            data = self._read(fd, start, end - start)
            if len(data) == end - start:
                self.accept(block, start, data)

    def _read(self, fd: int, offset: int, length: int) -> bytes:
        """A part of a block file; less at its end."""
        data = self._disk.pread(fd, length, offset)
        while len(data) < length and (more := self._disk.pread(fd, length - len(data), offset + len(data))):
            data += more
        return data

    # --- reading

    def check(self, block: int, start: int, data: Bytes) -> None:
        """Raises Damaged when one of some whole chunks has neither of its sums."""
        entries, now = self._load(block, start, start + len(data)), sums_of(data)
        if now == entries[1::2]:
            return
        for index in self._wrong(entries, now):
            raise mismatch(block, start + index * CHUNK_BYTES)

    def check_hole(self, block: int, offset: int, length: int) -> None:
        """check() of a part that is known to read as zeros."""
        start, end = self.bounds(block, offset, length)
        entries = self._load(block, start, end)
        if any(entries):
            for index in self._wrong(entries, array.array("Q", bytes(len(entries) * 4))):
                raise mismatch(block, start + index * CHUNK_BYTES)

    @staticmethod
    def _wrong(entries: Entries, now: Entries) -> list[int]:
        return [i for i, s in enumerate(now) if s not in (entries[2 * i], entries[2 * i + 1])]


def _last(end: int) -> int:
    """Where the last chunk before ``end`` begins."""
    return (end - 1) // CHUNK_BYTES * CHUNK_BYTES


def mismatch(block: int, at: int) -> Damaged:
    return Damaged(f"checksum of chunk {at // CHUNK_BYTES} of block {block} does not match", at=at)
