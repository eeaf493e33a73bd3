"""The generations of the blocks of one image on this node: 8 bytes for each, in a file beside the blocks (R7, R8)."""

from __future__ import annotations

import array
import sys
from collections.abc import Collection

from ukai.blockd.disk import Disk
from ukai.blockd.files import GENERATIONS, disk_error, gone, make_file, read_all, write_all
from ukai.errors import DiskError

FAILED = 1 << 63
"""Beside a generation: an fdatasync of the block has failed, and the block was not made anew since (R7)."""


class Generations:
    """``numbers`` are the generations; 0: never written, or of no generation.  ``failed`` are blocks to be noted so."""

    def __init__(self, disk: Disk, directory: str, count: int, failed: Collection[int]) -> None:
        self._disk, self._directory, self._failed = disk, directory, failed
        self.path = f"{directory}/{GENERATIONS}"
        self.numbers = array.array("Q", bytes(8 * count))
        self.writes, self._synced = 0, -1
        """How many were written; how many of these writes are on the disk (−1: not known)."""
        self._borrowed_at = 0
        self.lost = ""
        """Why some that were written may not be on the disk: all are made anew before the next flush (R7)."""
        self._fd = -1

    def load(self) -> list[int]:
        """Read the file; the blocks that it notes as failed.  Raises OSError."""
        count = len(self.numbers)
        self._fd = self._disk.open(self.path, create=True)
        data = read_all(self._disk, self._fd, 8 * count)
        loaded = array.array("Q")
        loaded.frombytes(data[: len(data) // 8 * 8])
        if sys.byteorder == "big":
            loaded.byteswap()
        failed = [block for block, number in enumerate(loaded) if number >= FAILED]
        for block in failed:
            loaded[block] -= FAILED
        self.numbers[: len(loaded)] = loaded
        return failed

    def close(self) -> None:
        if self._fd >= 0:
            self._disk.close(self._fd)
            self._fd = -1

    def set(self, block: int, generation: int) -> None:
        """Raises DiskError, NoSpace."""
        data = (generation | FAILED if block in self._failed else generation).to_bytes(8, "little")
        try:
            write_all(self._disk, self._fd, data, 8 * block)
            self.writes += 1  # once it is in the page cache: a flush that begins after this has it
        except OSError as e:
            raise disk_error(e, self.path) from e
        self.numbers[block] = generation

    # --- what is on the disk

    def borrow(self) -> int:
        """A descriptor for a flush, or −1 where nothing was written since the last one.  Raises OSError."""
        if self.lost:
            self._renew()
        self._borrowed_at = self.writes
        return self._disk.dup(self._fd) if self._synced != self.writes else -1

    def look(self) -> None:
        """The file may have been removed: what it holds is lost then."""
        self.lost = self.lost or gone(self._disk, self._fd, self.path)

    def flushed(self, reason: str) -> None:
        """The flush of what was borrowed has ended; why it has lost some."""
        if not reason:
            self._synced = max(self._synced, self._borrowed_at)
        self.lost = self.lost or reason

    def sync(self) -> None:
        """What was just written is on the disk; nothing is said of what a former fdatasync lost.  Raises DiskError."""
        try:
            self._disk.fdatasync(self._fd)
        except OSError as e:
            error = disk_error(e, f"fdatasync of {self.path}")
            self.lost = error.message
            raise error from e

    def check(self) -> None:
        """Raises DiskError where the last flush could not store them (R7)."""
        if self.lost:
            raise DiskError(self.lost)

    def _renew(self) -> None:
        """Write all to a new file.  Raises OSError."""
        data = array.array("Q", self.numbers)
        for block in self._failed:
            data[block] |= FAILED
        if sys.byteorder == "big":
            data.byteswap()
        make_file(self._disk, self._directory, GENERATIONS, data.tobytes(), 8 * len(data))
        fd = self._disk.open(self.path)
        self._disk.close(self._fd)
        self._fd, self.lost = fd, ""
        self._synced = self.writes
