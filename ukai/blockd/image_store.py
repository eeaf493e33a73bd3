"""The part of one image that is on this node: block files, their generations, and what of them can be trusted (R8)."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import xxhash

from ukai.blockd.aio import outcome
from ukai.blockd.files import (
    GENERATIONS,
    HOLE,
    META,
    REMOVED,
    SUMS,
    Bytes,
    check_uuid,
    disk_error,
    gone,
    is_zeros,
    keep_record,
    make_file,
    whole,
    words,
    write_all,
    zeros,
)
from ukai.blockd.generations import Generations
from ukai.blockd.sums import Sums
from ukai.errors import Damaged, DiskError, NotReady, StaleEpoch, UkaiError
from ukai.model import check_sizes
from ukai.ranges import RangeMap, RangeSet, join

if TYPE_CHECKING:
    from ukai.blockd.store import Store

Borrowed = list[tuple[int, int, str]]
"""What a flush works on: (block, borrowed descriptor, or −1, and the reason why there is none)."""

CHECKS_BESIDE = 4
"""How often a thread looks at a chunk that does not match its checksum before the loop is asked."""


log = logging.getLogger(__name__)


class ImageStore:
    """The part of one image that is on this node.

    Raises KeyError, ValueError, TypeError, UsageError for a ``meta`` that describes no image.
    """

    def __init__(self, store: Store, name: str, meta: dict[str, Any]) -> None:
        self.store, self.disk, self.name = store, store.disk, name
        self.directory = f"{store.root}/{name}"
        self.uuid = check_uuid(words(meta, "uuid"))
        self.size, self.block_size, self.epoch = whole(meta, "size"), whole(meta, "block_size"), whole(meta, "epoch")
        check_sizes(self.size, self.block_size)
        self.block_count = -(-self.size // self.block_size)
        self.sums = Sums(self.disk, self.directory, self.size, self.block_size) if meta.get("checksum") else None
        """The checksums of an image that asks for them."""
        self.unflushed: set[int] = set()
        self.poisoned: dict[int, str] = {}
        """Blocks whose fdatasync failed: it never succeeds again as if nothing had happened (R7)."""
        self.failed_before: dict[int, str] = {}
        """Those of a former process, until metad has heard of them."""
        self.remade: set[int] = set()
        """Blocks that this process made ready for a resync: they are of no generation until they are whole (R11)."""
        self._deleting: list[RangeSet] = []
        """Blocks whose files a thread is deleting."""
        self._gens = Generations(self.disk, self.directory, self.block_count, self.poisoned)
        self.generations = self._gens.numbers

    def load(self) -> None:
        """Read the generations, open the checksums.  Raises DiskError, NoSpace."""
        try:
            failed = self._gens.load()
        except OSError as e:
            self.close()
            raise disk_error(e, self._gens.path) from e
        if self.sums is not None:
            try:
                self.sums.open()
                self.sums.lost = self.sums.lost and any(self.generations)
            except OSError as e:
                self.close()
                raise disk_error(e, self.sums.path) from e
        for block in failed:
            self._failed_before(block)

    def _failed_before(self, block: int) -> None:
        """A block whose fdatasync failed in a former process: what is read of it may not be on the disk.

        It is made anew from what is read, so that this is on the disk from now on.  Where that is not all that was
        acknowledged, the guest has heard of it; another replica may have more, so metad is told.
        """
        reason = f"an fdatasync of {self.path(block)} had failed before blockd was started"
        self.failed_before[block] = self.poisoned[block] = reason
        try:
            fd = self.disk.open(self.path(block))
            try:
                name = self.store.blockname_format % block
                make_file(self.disk, self.directory, name, b"", self.disk.size(fd), fd)
            finally:
                self.disk.close(fd)
            del self.poisoned[block]
            self.set_generation(block, self.generations[block])
        except (OSError, UkaiError) as e:
            self.poisoned[block] = reason
            log.warning("%s; it could not be made anew: %s", reason, e)
            return
        log.warning("%s; it was made anew from what could be read", reason)

    def close(self) -> None:
        self.store.forget_files(self.uuid)
        self._gens.close()
        if self.sums is not None:
            self.sums.close()

    def path(self, block: int) -> str:
        return f"{self.directory}/{self.store.blockname_format % block}"

    def block_bytes(self, block: int) -> int:
        return min(self.block_size, self.size - block * self.block_size)

    def save(self, epoch: int) -> None:
        """Persist the highest epoch seen before anything of that epoch touches a file (R1).  Raises DiskError."""
        fields = {"uuid": self.uuid, "size": self.size, "block_size": self.block_size, "epoch": epoch}
        if self.sums is not None:
            fields["checksum"] = True
        try:
            keep_record(self.disk, self.directory, META, fields)
        except OSError as e:
            raise disk_error(e, f"{self.directory}/{META}") from e
        self.epoch = epoch

    def admit(self, epoch: int) -> None:
        """Refuse an epoch below the highest seen, persist a higher one (R1).  Raises StaleEpoch, DiskError."""
        if epoch < self.epoch:
            raise StaleEpoch(f"epoch {epoch} of image {self.name} is over; {self.epoch} has begun", epoch=self.epoch)
        if epoch > self.epoch:
            self.save(epoch)

    # --- files

    def file(self, block: int) -> int:
        """Descriptor of a block file that is there and has its size.  Raises Damaged, DiskError (R8)."""
        files = self.store.files
        key = (self.uuid, block)
        fd = files.get(key)
        if fd is not None:
            files.move_to_end(key)
            return fd
        path = self.path(block)
        try:
            fd = self.disk.open(path)
        except FileNotFoundError:
            raise Damaged(f"block file {path} is missing though it was written") from None
        except OSError as e:
            raise disk_error(e, path) from e
        try:
            self._check(fd, block)
        except UkaiError:
            self.disk.close(fd)
            raise
        self.store.keep_file(key, fd)
        return fd

    def _check(self, fd: int, block: int) -> None:
        """Whether an open block file has its name and its size.  Raises Damaged, DiskError."""
        try:
            linked, size = self.disk.look(fd)
        except OSError as e:
            raise disk_error(e, self.path(block)) from e
        if not linked:
            raise Damaged(f"{self.path(block)} {REMOVED}")
        if size not in (self.block_bytes(block), self.block_size):
            raise Damaged(f"block file {self.path(block)} has {size} bytes instead of {self.block_bytes(block)}")

    def _create(self, block: int) -> None:
        """Make a block file that reads as zeros.  Raises DiskError, NoSpace."""
        name = self.store.blockname_format % block
        try:
            if self.sums is not None:
                self.sums.clear(block)
            make_file(self.disk, self.directory, name, b"", self.block_bytes(block))
        except OSError as e:
            # one whose name is perhaps not on the disk must not be taken for a good one later
            with contextlib.suppress(OSError):
                self.disk.unlink(self.path(block))
            raise disk_error(e, self.path(block)) from e

    def set_generation(self, block: int, generation: int) -> None:
        """Raises DiskError, NoSpace."""
        self._gens.set(block, generation)

    def ready(self, block: int, generation: int, least: int) -> int:
        """Make a block of generation ``least`` or above one of ``generation``; returns its descriptor.

        ``least`` is what the metadata required of this replica until the block was announced: a replica that has
        less is an older copy, and stays one (R8).  One that was never written (0) begins with a new file of zeros,
        whatever lies there.  Raises Damaged, DiskError, StaleEpoch.
        """
        have = self.generations[block]
        if generation == have and have:
            return self.file(block)
        self._check_kept(block)
        if generation < have:
            raise StaleEpoch(f"generation {generation} of block {block} is over; this node has {have}")
        self.check_least(block, least)
        if have == 0:
            self.store.forget_files(self.uuid, block)
            self._create(block)
            self.poisoned.pop(block, None)
        fd = self.file(block)
        self.set_generation(block, generation)
        return fd

    def there(self, block: int) -> bool:
        """Whether there is a block file.  Raises DiskError."""
        try:
            return self.disk.exists(self.path(block))
        except OSError as e:
            raise disk_error(e, self.path(block)) from e

    def _nothing(self, block: int) -> bool:
        """Whether nothing was ever written to a block, or it was dropped since.  Raises DiskError."""
        return not self.generations[block] and not self.there(block)

    def _target(self, block: int, generation: int) -> int:
        """The descriptor for a write.  Raises as ready().

        A block in the making takes writes too, and gets its generation once it is whole; all others were stamped.
        """
        have = self.generations[block]
        if have == generation or block not in self.remade:
            return self.ready(block, generation, generation)
        return self.file(block) if have == 0 else self.ready(block, generation, have)

    def write(self, block: int, offset: int, data: Bytes, generation: int) -> None:
        """Raises Damaged, NoSpace or DiskError; ``touched`` in its details: whether the file may have changed."""
        fd = self._target(block, generation)
        self.unflushed.add(block)
        sums = self.sums
        if sums is not None:
            self._announce(sums, fd, block, offset, len(data), data)
        try:
            done = self.disk.pwrite(fd, data, offset)
        except OSError as e:
            if sums is not None:
                sums.accept_failed(fd, block, offset, len(data))
            touched = e.errno not in (errno.ENOSPC, errno.EDQUOT)
            raise disk_error(e, f"write to {self.path(block)}", touched) from e
        if done != len(data):
            try:
                write_all(self.disk, fd, memoryview(data)[done:], offset + done)
            except OSError as e:
                if sums is not None:
                    sums.accept_failed(fd, block, offset, len(data))
                raise disk_error(e, f"write to {self.path(block)}", touched=True) from e
        if sums is not None:
            sums.written(block, offset, len(data))

    def _announce(self, sums: Sums, fd: int, block: int, offset: int, length: int, data: Bytes | None) -> None:
        """Store the checksums of what is about to be written.  Raises Damaged, DiskError, NoSpace."""
        try:
            sums.begin(fd, block, offset, length, data)
        except OSError as e:
            raise disk_error(e, f"checksums of {self.path(block)}") from e

    def punch(self, block: int, offset: int, length: int, generation: int) -> None:
        """Make a part read as zeros and free its space.  Raises as write()."""
        fd = self._target(block, generation)
        self.unflushed.add(block)
        sums = self.sums
        if sums is not None:
            self._announce(sums, fd, block, offset, length, None)
        try:
            self.disk.punch(fd, offset, length)
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                if sums is not None:
                    sums.accept_failed(fd, block, offset, length)
                raise disk_error(e, f"discard in {self.path(block)}", touched=True) from e
            self.write(block, offset, zeros(length), generation)
        if sums is not None:
            sums.written(block, offset, length)

    def check(self, block: int, generation: int) -> None:
        """Raises Damaged unless the block is of this generation (R8)."""
        if self.generations[block] != generation:
            raise Damaged(
                f"block {block} of image {self.name} has generation {self.generations[block]}, not {generation}"
            )

    def check_least(self, block: int, least: int) -> None:
        """Raises Damaged where the block is of a generation below ``least`` (R8)."""
        have = self.generations[block]
        if have < least:
            raise Damaged(f"block {block} of image {self.name}: generation {have} is below {least}: an older copy")

    def read(self, block: int, offset: int, length: int) -> bytes:
        """Raises Damaged, DiskError."""
        fd = self.file(block)
        return self._pread(fd, block, length, offset) if self.sums is None else self._checked(fd, block, offset, length)

    def _checked(self, fd: int, block: int, offset: int, length: int) -> bytes:
        """Whole chunks are read and checked.  Raises Damaged, DiskError."""
        assert self.sums is not None
        start, end = self.sums.bounds(block, offset, length)
        data = self._pread(fd, block, end - start, start)
        self._check_sums(self.sums, block, start, data)
        return data[offset - start : offset - start + length]

    def _check_sums(self, sums: Sums, block: int, start: int, data: Bytes) -> None:
        """Raises Damaged, DiskError."""
        try:
            sums.check(block, start, data)
        except OSError as e:
            raise disk_error(e, f"checksums of {self.path(block)}") from e

    def _checked_beside(self, fd: int, block: int, offset: int, length: int) -> bytes:
        """_checked() in a thread: what the loop was just writing is read again.

        Where that does not help, only a look in the loop can tell.
        """
        for _ in range(CHECKS_BESIDE):
            with contextlib.suppress(Damaged):
                return self._checked(fd, block, offset, length)
        return self._checked(fd, block, offset, length)

    def _pread(self, fd: int, block: int, length: int, offset: int) -> bytes:
        """Raises Damaged, DiskError."""
        try:
            data = self.disk.pread(fd, length, offset)
            while len(data) < length and (more := self.disk.pread(fd, length - len(data), offset + len(data))):
                data += more
        except OSError as e:
            raise disk_error(e, f"read of {self.path(block)}") from e
        if len(data) != length:
            raise Damaged(f"block file {self.path(block)} ends at {offset + len(data)} of {self.block_bytes(block)}")
        return data

    def read_cached(self, block: int, offset: int, length: int) -> bytearray | None:
        """As read(), or None where the disk itself would be needed."""
        sums = self.sums
        start, end = (offset, offset + length) if sums is None else sums.bounds(block, offset, length)
        try:
            data = self.disk.pread_cached(self.file(block), end - start, start)
        except OSError as e:
            raise disk_error(e, f"read of {self.path(block)}") from e
        if sums is None or data is None:
            return data
        self._check_sums(sums, block, start, data)
        return data[offset - start : offset - start + length] if end - start != length else data

    def borrow(self, block: int) -> int:
        """A descriptor of the block file for a thread beside the loop, which closes it.  Raises as file()."""
        fd = self.file(block)
        try:
            return self.disk.dup(fd)
        except OSError as e:
            raise disk_error(e, self.path(block)) from e

    def read_beside(self, fd: int, block: int, offset: int, length: int) -> bytes:
        """read() in a thread, on a borrowed descriptor."""
        try:
            if self.sums is None:
                return self._pread(fd, block, length, offset)
            return self._checked_beside(fd, block, offset, length)
        finally:
            self.disk.close(fd)

    def matches_beside(self, fd: int, block: int, offset: int, length: int) -> bool:
        """Whether some whole chunks have their checksums; in a thread, on a borrowed descriptor."""
        assert self.sums is not None
        try:
            data_at = self.disk.data_after(fd, offset)
            if data_at is None or data_at >= offset + length:
                self.sums.check_hole(block, offset, length)
            else:
                self.sums.check(block, offset, self._pread(fd, block, length, offset))
        except Damaged:
            return False
        except OSError as e:
            raise disk_error(e, f"read of {self.path(block)}") from e
        finally:
            self.disk.close(fd)
        return True

    def accept(self, block: int, offset: int, length: int) -> None:
        """Take what some whole chunks hold for right: nothing better is known.  Raises Damaged, DiskError."""
        assert self.sums is not None
        data = self._pread(self.file(block), block, length, offset)
        try:
            self.sums.accept(block, offset, data)
        except OSError as e:
            raise disk_error(e, self.sums.path) from e
        self.unflushed.add(block)

    def flush_begin(self, blocks: Iterable[int]) -> Borrowed:
        """What a flush of some blocks has to bring to the disk.  All of it goes to flush_look(), then to flush_end().

        As blocks −1 stands for the generations, −2 for the checksums.
        """
        out: Borrowed = []
        try:
            if (fd := self._gens.borrow()) >= 0:
                out.append((-1, fd, ""))
        except OSError as e:
            out.append((-1, -1, disk_error(e, self._gens.path).message))
        if self.sums is not None:
            try:
                out.append((-2, self.disk.dup(self.sums.fd), ""))
            except OSError as e:
                out.append((-2, -1, disk_error(e, self.sums.path).message))
        for block in blocks:
            if block in self.poisoned:
                out.append((block, -1, self.poisoned[block]))
                continue
            try:
                if self._nothing(block):
                    continue  # announced, but its writer died before it was stamped
                out.append((block, self.borrow(block), ""))
            except UkaiError as e:
                out.append((block, -1, e.message))
        return out

    def flush_beside(self, work: Borrowed) -> list[int]:
        """fdatasync of each descriptor, in a thread; the errno of each, 0 for those that are done.

        Nothing else is done there: after each system call the thread would have to wait for the interpreter.
        """
        return [outcome(self.disk.fdatasync, fd) for _, fd, _ in work if fd >= 0]

    def flush_look(self, work: Borrowed) -> None:
        """Note what was removed or cut while in use.  There is time for that while the disk works."""
        self._gens.look()
        for at, (block, fd, _) in enumerate(work):
            if fd < 0 or block == -1:
                continue
            if block == -2:
                work[at] = block, fd, gone(self.disk, fd, self._borrowed(block))
                continue
            try:
                self._check(fd, block)
            except UkaiError as e:
                work[at] = block, fd, e.message

    def _borrowed(self, block: int) -> str:
        return self.path(block) if block >= 0 else f"{self.directory}/{GENERATIONS if block == -1 else SUMS}"

    def flush_end(self, work: Borrowed, numbers: Iterable[int]) -> dict[int, str]:
        """Close what was borrowed; block → reason for those that failed.  ``numbers``: the errno of each descriptor.

        They keep failing until they are made anew (R7).  One that failed for its generation alone does not:
        generations are made anew before the next flush.  Where checksums were lost, none can tell
        those of which blocks.
        """
        faults = {block: reason for block, _, reason in work if reason}
        borrowed = [(block, fd) for block, fd, _ in work if fd >= 0]
        for (block, fd), number in zip(borrowed, numbers, strict=True):
            self.disk.close(fd)
            if number:
                faults[block] = f"fdatasync of {self._borrowed(block)}: {os.strerror(number)}"
        if work and work[0][0] == -1:
            self._gens.flushed(faults.pop(-1, ""))
        sums_lost = faults.pop(-2, "")
        lost = sums_lost or self._gens.lost
        if not faults and not lost:
            return {}
        failed = {block: faults.get(block, lost) for block, _, _ in work if block >= 0 and (lost or block in faults)}
        new = {b: reason for b, reason in failed.items() if reason != self._gens.lost}
        if sums_lost:
            new |= dict.fromkeys(self.unflushed, sums_lost)
        for block in new.keys() - self.poisoned.keys():
            self.poisoned[block] = new[block]
            try:
                if self._nothing(block):
                    del self.poisoned[block]  # dropped meanwhile
                else:
                    self.set_generation(block, self.generations[block])
            except UkaiError as e:
                log.warning("%s; a blockd that is started anew will not know: %s", new[block], e)
        return failed

    def take_unflushed(self) -> set[int]:
        """The blocks with writes that no flush has covered; later writes go to a new set."""
        blocks, self.unflushed = self.unflushed, set()
        return blocks

    def renew(self, block: int) -> None:
        """Make a block of an out-of-sync replica writable, whatever its file is like, before its resync (R11).

        A missing file is made, one of a wrong size gets the right one, one whose flush failed is made anew: what
        the page cache shows of it may not be on the disk.  Until it is whole it is of no generation, so that it
        can't pass for a good one.  Raises DiskError, NoSpace.
        """
        self._check_kept(block)
        path = self.path(block)
        self.store.forget_files(self.uuid, block)
        self.failed_before.pop(block, None)
        try:
            found = self.disk.stat(path)
            self.disown(block)
            self.remade.add(block)
            if block not in self.poisoned and found is not None:
                if found[0] not in (self.block_bytes(block), self.block_size):
                    self._resize(block)
                return
            self._create(block)
        except OSError as e:
            raise disk_error(e, path) from e
        if self.poisoned.pop(block, None) is not None:
            self.set_generation(block, self.generations[block])

    def _resize(self, block: int) -> None:
        """Raises OSError."""
        fd = self.disk.open(self.path(block))
        try:
            self.disk.truncate(fd, self.block_bytes(block))
            self.disk.fsync(fd)
        finally:
            self.disk.close(fd)

    def disown(self, block: int) -> None:
        """What lies here of a block is of no generation any more: nobody takes it for data.  Raises DiskError."""
        if self.generations[block]:
            self.set_generation(block, 0)

    def hash_beside(self, fd: int, block: int, offset: int, length: int, chunk: int) -> bytes:
        """16 bytes per chunk, zeros for one that reads as zeros; holes are not read.

        In a thread, on a borrowed descriptor.  Raises as read().
        """
        out = []
        data_at: int | None = -1
        try:
            self._check(fd, block)  # beyond its end a file that was cut looks like a hole
            for at in range(offset, offset + length, chunk):
                size = min(chunk, offset + length - at)
                if data_at is not None and data_at < at:
                    data_at = self.disk.data_after(fd, at)
                if (data_at is None or data_at >= at + size) and self._hole(block, at, size):
                    out.append(HOLE)
                    continue
                if self.sums is None:
                    data = self._pread(fd, block, size, at)
                else:
                    data = self._checked_beside(fd, block, at, size)
                out.append(HOLE if is_zeros(data) else xxhash.xxh3_128_digest(data))
        except OSError as e:
            raise disk_error(e, f"read of {self.path(block)}") from e
        finally:
            self.disk.close(fd)
        return b"".join(out)

    def _hole(self, block: int, offset: int, length: int) -> bool:
        """Whether a part that looks like a hole may be one: checksums may say that there were data.  Raises OSError."""
        if self.sums is not None:
            try:
                self.sums.check_hole(block, offset, length)
            except Damaged:
                return False  # written meanwhile, or lost
        return True

    def allocated(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Bytes that block files take on the disk.  Raises DiskError."""
        total = 0
        for first, last in ranges:
            for block in range(first, last + 1):
                try:
                    if self.generations[block] and (st := self.disk.stat(self.path(block))) is not None:
                        total += st[1]
                except OSError as e:
                    raise disk_error(e, self.path(block)) from e
        return total

    # --- what there is (R8)

    def inventory(self) -> dict[str, Any]:
        """uuid, name, epoch, generations as ranges, and what is bad, for registration."""
        gens: list[list[int]] = []
        bad: RangeMap[str] = RangeMap()
        sizes = self._sizes()
        for block, generation in enumerate(self.generations):
            if not generation:
                continue
            if gens and gens[-1][2] == generation and gens[-1][1] == block - 1:
                gens[-1][1] = block
            else:
                gens.append([block, block, generation])
            size = sizes if isinstance(sizes, str) else sizes.get(self.store.blockname_format % block)
            if size is None:
                bad.set(block, block, "block file is missing though it was written")
            elif fault := self._wrong(block, size) or self.failed_before.get(block, ""):
                bad.set(block, block, fault)
        return {"uuid": self.uuid, "name": self.name, "epoch": self.epoch, "gens": gens, "bad": [list(b) for b in bad]}

    def _wrong(self, block: int, size: int | str) -> str:
        """What is wrong with a block file of this size, or whose size can't be told for this reason."""
        if isinstance(size, str):
            return f"block file can't be looked at: {size}"
        if size in (self.block_bytes(block), self.block_size):
            return ""
        return f"block file has {size} bytes instead of {self.block_bytes(block)}"

    def _sizes(self) -> dict[str, int | str] | str:
        """Size of each file, or the reason why it, or all of them, can't be told."""
        out: dict[str, int | str] = {}
        try:
            names = self.disk.names(self.directory)
        except OSError as e:
            return e.strerror or str(e)
        for name in names:
            if name.startswith("."):
                continue
            try:
                found = self.disk.stat(f"{self.directory}/{name}")
            except OSError as e:
                out[name] = e.strerror or str(e)
            else:
                if found is not None:
                    out[name] = found[0]
        return out

    def adopt(self) -> tuple[list[tuple[int, int]], list[list[Any]]]:
        """Look at block files made by hand: (ranges present, [[first, last, reason]] of a wrong size).

        Raises DiskError.
        """
        sizes = self._sizes()
        if isinstance(sizes, str):
            raise DiskError(f"{self.directory}: {sizes}")
        present: list[int] = []
        bad: RangeMap[str] = RangeMap()
        for block in range(self.block_count):
            size = sizes.get(self.store.blockname_format % block)
            if size is None:
                continue
            if fault := self._wrong(block, size):
                bad.set(block, block, fault)
            else:
                present.append(block)
        return join(present), [list(b) for b in bad]

    def adopted(self, ranges: Iterable[tuple[int, int]], generation: int) -> None:
        """Write the generation beside block files that were adopted.  Raises DiskError."""
        for first, last in ranges:
            for block in range(first, last + 1):
                self.set_generation(block, generation)
        self._gens.sync()

    def disowned(self, ranges: Iterable[tuple[int, int]]) -> None:
        """What lies here of some blocks is of no generation any more, and that is on the disk.  Raises DiskError."""
        for first, last in ranges:
            for block in range(first, last + 1):
                if self.generations[block] or self._gens.lost:
                    self.set_generation(block, 0)
        self._gens.sync()

    def check_generations(self) -> None:
        """Raises DiskError where the last flush could not store the generations (R7)."""
        self._gens.check()

    def drop(self, ranges: Iterable[tuple[int, int]]) -> Callable[[], None]:
        """Let go of blocks: only on an administrator's order.  Raises DiskError.

        Returns what deletes their files, to be run in a thread: the system may take seconds for a few gigabytes that
        are being written back.  Raises DiskError.  Until it has ended, no file is made there.
        """
        last_block = self.block_count - 1
        blocks = RangeSet((first, min(last, last_block)) for first, last in ranges if first <= last_block)
        for block in blocks.indexes():
            self.store.forget_files(self.uuid, block)
            self.unflushed.discard(block)
            self.poisoned.pop(block, None)
            try:
                if self.generations[block]:
                    self.set_generation(block, 0)
                if self.sums is not None:
                    self.sums.clear(block)
            except OSError as e:
                raise disk_error(e, self.path(block)) from e
        self._deleting.append(blocks)
        return functools.partial(self._delete, blocks)

    def _delete(self, blocks: RangeSet) -> None:
        try:
            for block in blocks.indexes():
                try:
                    with contextlib.suppress(FileNotFoundError):
                        self.disk.unlink(self.path(block))
                except OSError as e:
                    raise disk_error(e, self.path(block)) from e
        finally:
            self._deleting.remove(blocks)

    def _check_kept(self, block: int) -> None:
        """Raises NotReady."""
        if any(blocks.within(block, block) for blocks in self._deleting):
            raise NotReady(f"the file of block {block} is being deleted here")
