"""The block files of a node.

    data_root/.ukai/store.json       which store this is, and what it has seen (R8, R12)
    data_root/<image>/.ukai.json     uuid, sizes, highest epoch seen (R1)
    data_root/<image>/.ukai.gen      generation of each block, 8 bytes little endian, 0: never written (R8)
    data_root/<image>/<block>        the block, named by blockname_format

A file alone proves nothing: a block is good only with the right image uuid, the right size and the generation
that the metadata names.  Nothing is deleted but on an administrator's order.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import sys
import uuid as uuids
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import xxhash

from ukai.blockd.disk import Disk
from ukai.errors import Busy, Damaged, DiskError, Exists, NoSpace, NotFound, StaleEpoch, UkaiError, UsageError
from ukai.model import check_name, check_sizes
from ukai.ranges import RangeMap, join

META, GENERATIONS, TEMPORARY = ".ukai.json", ".ukai.gen", ".ukai.tmp"
RECORD_BYTES = 512
"""Size of our own small files: one sector."""
HASH_BYTES = 16
HOLE = bytes(HASH_BYTES)
_ZEROS = bytes(4 * 2**20)

Bytes = bytes | bytearray | memoryview


def zeros(length: int) -> bytes:
    return _ZEROS[:length] if length <= len(_ZEROS) else bytes(length)


def disk_error(e: OSError, what: str, touched: bool = False) -> DiskError | NoSpace:
    """The error of ours for an OSError; ``touched`` says whether the file may have been altered."""
    text = f"{what}: {os.strerror(e.errno or errno.EIO)}"
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(text, touched=touched)
    return DiskError(text, touched=touched)


def make_file(disk: Disk, directory: str, name: str, data: Bytes, size: int) -> None:
    """Make or replace a file of ``size`` bytes that begins with ``data`` (R8).  Raises OSError.

    After a crash it is the old or the new one.  The temporary file is never one whose fsync failed before.
    """
    temporary = f"{directory}/{TEMPORARY}"
    if disk.exists(temporary):
        disk.unlink(temporary)
    fd = disk.open(temporary, create=True)
    try:
        disk.truncate(fd, size)
        write_all(disk, fd, data, 0)
        disk.fsync(fd)
    finally:
        disk.close(fd)
    disk.rename(temporary, f"{directory}/{name}")
    disk.sync_directory(directory)


def keep_record(disk: Disk, directory: str, name: str, fields: dict[str, Any]) -> None:
    """Make or replace a small file of ours, also where the disk is full: an image stays readable then (R10).

    A full disk has no room for a temporary file.  The record is then overwritten where it is: it fills one sector,
    which a disk writes whole or not at all.  Raises OSError.
    """
    data = json.dumps(fields).encode().ljust(RECORD_BYTES)
    try:
        make_file(disk, directory, name, data, len(data))
    except OSError as e:
        path = f"{directory}/{name}"
        if e.errno not in (errno.ENOSPC, errno.EDQUOT) or not disk.exists(path):
            raise
        fd = disk.open(path)
        try:
            if disk.size(fd) != len(data):
                raise
            write_all(disk, fd, data, 0)
            disk.fsync(fd)
        finally:
            disk.close(fd)


def read_all(disk: Disk, fd: int, length: int) -> bytes:
    """pread until the end of the file or of ``length``.  Raises OSError."""
    parts: list[bytes] = []
    done = 0
    while done < length and (part := disk.pread(fd, length - done, done)):
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def whole(fields: dict[str, Any], name: str) -> int:
    """A number of a file of ours.  Raises KeyError, ValueError."""
    value = fields[name]
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is no number")
    return value


def words(fields: dict[str, Any], name: str) -> str:
    """A text of a file of ours.  Raises KeyError, ValueError."""
    value = fields[name]
    if type(value) is not str:
        raise ValueError(f"{name} is no text")
    return value


def check_uuid(uuid: str) -> str:
    """Raises UsageError."""
    try:
        uuids.UUID(uuid)
    except ValueError:
        raise UsageError(f"{uuid!r:.50} is no uuid") from None
    return uuid


def write_all(disk: Disk, fd: int, data: Bytes, offset: int) -> None:
    """pwrite until all is written.  Raises OSError."""
    done = 0
    while done < len(data):
        n = disk.pwrite(fd, memoryview(data)[done:], offset + done)
        if n == 0:
            raise OSError(errno.EIO, "short write")
        done += n


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
        self.generations = array.array("Q", bytes(8 * self.block_count))
        self.unflushed: set[int] = set()
        self.poisoned: dict[int, str] = {}
        """Blocks whose fdatasync failed: it never succeeds again as if nothing had happened (R7)."""
        self._gen_fd = -1
        self._gen_lost = ""
        """Why generations that were written may not be on the disk: they are made anew before the next flush (R7)."""

    def load(self) -> None:
        """Read the generations.  Raises DiskError, NoSpace."""
        path = f"{self.directory}/{GENERATIONS}"
        try:
            self._gen_fd = self.disk.open(path, create=True)
            data = read_all(self.disk, self._gen_fd, 8 * self.block_count)
        except OSError as e:
            self.close()
            raise disk_error(e, path) from e
        loaded = array.array("Q")
        loaded.frombytes(data[: len(data) // 8 * 8])
        if sys.byteorder == "big":
            loaded.byteswap()
        loaded.extend([0] * (self.block_count - len(loaded)))
        self.generations = loaded

    def close(self) -> None:
        self.store.forget_files(self.uuid)
        if self._gen_fd >= 0:
            self.disk.close(self._gen_fd)
            self._gen_fd = -1

    def path(self, block: int) -> str:
        return f"{self.directory}/{self.store.blockname_format % block}"

    def block_bytes(self, block: int) -> int:
        return min(self.block_size, self.size - block * self.block_size)

    def save(self, epoch: int) -> None:
        """Persist the highest epoch seen before anything of that epoch touches a file (R1).  Raises DiskError."""
        fields = {"uuid": self.uuid, "size": self.size, "block_size": self.block_size, "epoch": epoch}
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
            self._check_size(fd, block)
        except UkaiError:
            self.disk.close(fd)
            raise
        self.store.keep_file(key, fd)
        return fd

    def _check_size(self, fd: int, block: int) -> None:
        """Raises Damaged, DiskError."""
        path = self.path(block)
        try:
            size = self.disk.size(fd)
        except OSError as e:
            raise disk_error(e, path) from e
        if size not in (self.block_bytes(block), self.block_size):
            raise Damaged(f"block file {path} has {size} bytes instead of {self.block_bytes(block)}")

    def _create(self, block: int) -> None:
        """Make a block file that reads as zeros.  Raises DiskError, NoSpace."""
        try:
            make_file(self.disk, self.directory, self.store.blockname_format % block, b"", self.block_bytes(block))
        except OSError as e:
            raise disk_error(e, self.path(block)) from e

    def set_generation(self, block: int, generation: int) -> None:
        """Raises DiskError, NoSpace."""
        data = generation.to_bytes(8, "little")
        try:
            write_all(self.disk, self._gen_fd, data, 8 * block)
        except OSError as e:
            raise disk_error(e, f"{self.directory}/{GENERATIONS}") from e
        self.generations[block] = generation

    def ready(self, block: int, generation: int) -> int:
        """Make a block writable in ``generation``; returns its descriptor.  Raises Damaged, DiskError, StaleEpoch."""
        have = self.generations[block]
        if generation == have and have:
            return self.file(block)
        if generation < have:
            raise StaleEpoch(f"generation {generation} of block {block} is over; this node has {have}")
        if have == 0 and not self._there(block):
            self._create(block)
        fd = self.file(block)
        self.set_generation(block, generation)
        return fd

    def _there(self, block: int) -> bool:
        """Raises DiskError."""
        try:
            return self.disk.exists(self.path(block))
        except OSError as e:
            raise disk_error(e, self.path(block)) from e

    def write(self, block: int, offset: int, data: Bytes, generation: int) -> None:
        """Raises Damaged, NoSpace or DiskError; ``touched`` in its details: whether the file may have changed."""
        fd = self.ready(block, generation)
        self.unflushed.add(block)
        try:
            done = self.disk.pwrite(fd, data, offset)
        except OSError as e:
            touched = e.errno not in (errno.ENOSPC, errno.EDQUOT)
            raise disk_error(e, f"write to {self.path(block)}", touched) from e
        if done != len(data):
            try:
                write_all(self.disk, fd, memoryview(data)[done:], offset + done)
            except OSError as e:
                raise disk_error(e, f"write to {self.path(block)}", touched=True) from e

    def punch(self, block: int, offset: int, length: int, generation: int) -> None:
        """Make a part read as zeros and free its space.  Raises as write()."""
        fd = self.ready(block, generation)
        self.unflushed.add(block)
        try:
            self.disk.punch(fd, offset, length)
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise disk_error(e, f"discard in {self.path(block)}", touched=True) from e
            self.write(block, offset, zeros(length), generation)

    def check(self, block: int, generation: int) -> None:
        """Raises Damaged unless the block is of this generation (R8)."""
        if self.generations[block] != generation:
            raise Damaged(
                f"block {block} of image {self.name} has generation {self.generations[block]}, not {generation}"
            )

    def read(self, block: int, offset: int, length: int) -> bytes:
        """Raises Damaged, DiskError."""
        return self._pread(self.file(block), block, length, offset)

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
        try:
            return self.disk.pread_cached(self.file(block), length, offset)
        except OSError as e:
            raise disk_error(e, f"read of {self.path(block)}") from e

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
            return self._pread(fd, block, length, offset)
        finally:
            self.disk.close(fd)

    def flush_begin(self, blocks: Iterable[int]) -> list[tuple[int, int, str]]:
        """What flush_beside() needs: (block, borrowed descriptor, reason why there is none); −1: the generations."""
        out: list[tuple[int, int, str]] = []
        try:
            if self._gen_lost:
                self._renew_generations()
            out.append((-1, self.disk.dup(self._gen_fd), ""))
        except OSError as e:
            out.append((-1, -1, disk_error(e, f"{self.directory}/{GENERATIONS}").message))
        for block in blocks:
            if block in self.poisoned:
                out.append((block, -1, self.poisoned[block]))
                continue
            try:
                out.append((block, self.borrow(block), ""))
            except UkaiError as e:
                out.append((block, -1, e.message))
        return out

    def flush_beside(self, work: list[tuple[int, int, str]]) -> dict[int, str]:
        """fdatasync of generations and blocks, in a thread; block → reason for those that failed (R7)."""
        failed: dict[int, str] = {}
        lost = ""
        for block, fd, given in work:
            reason = given or self._flush_one(block, fd)
            if block < 0:
                self._gen_lost = self._gen_lost or reason
                lost = self._gen_lost
            elif reason or lost:
                failed[block] = reason or lost
        return failed

    def _flush_one(self, block: int, fd: int) -> str:
        """fdatasync of one borrowed descriptor, which is closed; why it failed."""
        what = f"{self.directory}/{GENERATIONS}" if block < 0 else self.path(block)
        try:
            self.disk.fdatasync(fd)
            if not self.disk.linked(fd):
                return f"{what} was removed while in use"
            if block >= 0:
                self._check_size(fd, block)
        except OSError as e:
            return f"fdatasync of {what}: {os.strerror(e.errno or errno.EIO)}"
        except UkaiError as e:
            return e.message
        finally:
            self.disk.close(fd)
        return ""

    def flush_end(self, failed: dict[int, str]) -> None:
        """A block whose flush failed keeps failing until it is made anew (R7).

        One that failed for its generation alone does not: generations are made anew before the next flush.
        """
        self.poisoned.update({b: reason for b, reason in failed.items() if reason != self._gen_lost})

    def _renew_generations(self) -> None:
        """Write all generations to a new file.  Raises OSError."""
        data = array.array("Q", self.generations)
        if sys.byteorder == "big":
            data.byteswap()
        make_file(self.disk, self.directory, GENERATIONS, data.tobytes(), 8 * self.block_count)
        fd = self.disk.open(f"{self.directory}/{GENERATIONS}")
        self.disk.close(self._gen_fd)
        self._gen_fd, self._gen_lost = fd, ""

    def take_unflushed(self) -> set[int]:
        """The blocks with writes that no flush has covered; later writes go to a new set."""
        blocks, self.unflushed = self.unflushed, set()
        return blocks

    def renew(self, block: int) -> None:
        """Make a block of an out-of-sync replica writable, whatever its file is like, before its resync (R11).

        A missing file is made, one of a wrong size gets the right one, one whose flush failed is made anew: what
        the page cache shows of it may not be on the disk.  What has lost data by that is of no generation any
        more, so that it can't pass for a good one.  Raises DiskError, NoSpace.
        """
        path = self.path(block)
        self.store.forget_files(self.uuid, block)
        try:
            found = self.disk.stat(path)
            if block not in self.poisoned and found and found[0] in (self.block_bytes(block), self.block_size):
                return
            if self.generations[block]:
                self.set_generation(block, 0)
            if block not in self.poisoned and found is not None:
                fd = self.disk.open(path)
                try:
                    self.disk.truncate(fd, self.block_bytes(block))
                    self.disk.fsync(fd)
                finally:
                    self.disk.close(fd)
                return
            self._create(block)
        except OSError as e:
            raise disk_error(e, path) from e
        self.poisoned.pop(block, None)

    def hash_beside(self, fd: int, block: int, offset: int, length: int, chunk: int) -> bytes:
        """16 bytes per chunk, zeros for one that reads as zeros; holes are not read.

        In a thread, on a borrowed descriptor.  Raises as read().
        """
        out = []
        data_at: int | None = -1
        try:
            self._check_size(fd, block)  # beyond its end a file that was cut looks like a hole
            for at in range(offset, offset + length, chunk):
                size = min(chunk, offset + length - at)
                if data_at is not None and data_at < at:
                    data_at = self.disk.data_after(fd, at)
                if data_at is None or data_at >= at + size:
                    out.append(HOLE)
                    continue
                data = self._pread(fd, block, size, at)
                out.append(HOLE if data == zeros(size) else xxhash.xxh3_128_digest(data))
        except OSError as e:
            raise disk_error(e, f"read of {self.path(block)}") from e
        finally:
            self.disk.close(fd)
        return b"".join(out)

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
            elif fault := self._wrong(block, size):
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
        try:
            self.disk.fdatasync(self._gen_fd)
        except OSError as e:
            raise disk_error(e, f"{self.directory}/{GENERATIONS}") from e

    def drop(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Delete block files: only on an administrator's order.  Raises DiskError."""
        for first, last in ranges:
            for block in range(first, min(last, self.block_count - 1) + 1):
                self.store.forget_files(self.uuid, block)
                self.unflushed.discard(block)
                self.poisoned.pop(block, None)
                try:
                    if self.generations[block]:
                        self.set_generation(block, 0)
                    with contextlib.suppress(FileNotFoundError):
                        self.disk.unlink(self.path(block))
                except OSError as e:
                    raise disk_error(e, self.path(block)) from e


class Store:
    """All images of this node and the identity of the store."""

    def __init__(self, root: str, blockname_format: str, disk: Disk, open_files_limit: int) -> None:
        self.root, self.blockname_format, self.disk = root, blockname_format, disk
        self.images: dict[str, ImageStore] = {}
        self.files: OrderedDict[tuple[str, int], int] = OrderedDict()
        self.open_files_limit = open_files_limit
        self.store_id = ""
        self.cluster_id = ""
        self.serial = 0
        self.highest_seq = 0
        self.strange: list[str] = []
        """Directories under data_root that hold no image of ours, with the reason."""
        self._lock_fd = -1

    def open(self, new_id: str) -> None:
        """Lock the store, read its identity (a new store takes ``new_id``) and its images.

        Raises Busy when another blockd has it, UsageError when data_root can't be used.
        """
        private = f"{self.root}/.ukai"
        try:
            self.disk.make_directories(private)
            self._lock_fd = self.disk.open(f"{private}/lock", create=True)
            if not self.disk.lock(self._lock_fd):
                raise Busy(f"another blockd uses {self.root}; stop it first")
            if self.disk.exists(f"{private}/store.json"):
                self._identify(self.disk.read_file(f"{private}/store.json"))
            else:
                self.store_id = new_id
                self.save()
            for name in self.disk.names(self.root):
                if not name.startswith(".") and self.disk.exists(f"{self.root}/{name}/{META}"):
                    self._load(name)
        except OSError as e:
            self.close()
            raise UsageError(f"data_root {self.root} can't be used: {e.strerror}: {e.filename or private}") from e
        except UkaiError:
            self.close()
            raise

    def _identify(self, data: bytes) -> None:
        """Raises UsageError."""
        try:
            fields = json.loads(data)
            self.store_id, self.cluster_id = words(fields, "store_id"), words(fields, "cluster_id")
            self.serial, self.highest_seq = whole(fields, "serial"), whole(fields, "highest_seq")
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            path = f"{self.root}/.ukai/store.json"
            raise UsageError(f"{path} is damaged ({e}); bring it back from a copy or move it away") from e

    def _load(self, name: str) -> None:
        try:
            meta = json.loads(self.disk.read_file(f"{self.root}/{name}/{META}"))
            image = ImageStore(self, name, meta)
            if image.uuid in self.images:
                raise ValueError(f"the same image as {self.images[image.uuid].name}")
            image.load()
        except (ValueError, KeyError, TypeError, RecursionError, OSError, UkaiError) as e:
            self.strange.append(f"{self.root}/{name}: {META} can't be used: {e}")
            return
        self.images[image.uuid] = image

    def save(self) -> None:
        """Raises OSError."""
        fields = {
            "store_id": self.store_id,
            "cluster_id": self.cluster_id,
            "serial": self.serial,
            "highest_seq": self.highest_seq,
        }
        keep_record(self.disk, f"{self.root}/.ukai", "store.json", fields)

    def image(self, uuid: str) -> ImageStore:
        """Raises Damaged."""
        image = self.images.get(uuid)
        if image is None:
            raise Damaged(
                f"no data of image {uuid} under {self.root}; if they are lost, remove this location and add it again"
            )
        return image

    def prepare(self, uuid: str, name: str, size: int, block_size: int, mode: str) -> ImageStore:
        """Make room for an image (``create``, ``adopt`` or ``join``).

        Raises Exists where data of another image, or any data but at an adoption, are in the way; UsageError for
        what can't be an image; DiskError, NoSpace.  After an error nothing is left of it.
        """
        if mode not in ("create", "adopt", "join"):
            raise UsageError(f"mode {mode!r} is not known")
        known = self.images.get(uuid)
        if known is not None and mode != "create":
            if (known.name, known.size, known.block_size) != (name, size, block_size):
                raise Exists(f"{known.directory} holds image {known.name} in another form; move it away")
            return known
        image = ImageStore(self, check_name(name), {"uuid": uuid, "size": size, "block_size": block_size, "epoch": 0})
        directory = image.directory
        try:
            fresh = not self.disk.exists(directory)
            names = [] if fresh else [n for n in self.disk.names(directory) if n not in (TEMPORARY, GENERATIONS)]
            if META in names:
                raise Exists(f"{directory} holds another image; move it away or choose another name")
            if names and mode == "create":
                raise Exists(f"{directory} holds data; move them away, or bring them online with add_image")
            if names and mode == "join":
                raise Exists(f"{directory} holds data of something else; move them away")
            if mode == "adopt":
                present, bad = image.adopt()
                if bad and not present:
                    raise Exists(f"the block files in {directory} have another size than {block_size} bytes")
        except OSError as e:
            raise disk_error(e, directory) from e
        self._furnish(image, fresh)
        self.images[uuid] = image
        return image

    def _furnish(self, image: ImageStore, fresh: bool) -> None:
        """Make the directory, if it is ``fresh``, and our own files in it.  Raises DiskError, NoSpace."""
        try:
            if fresh:
                self.disk.mkdir(image.directory)
                self.disk.sync_directory(self.root)
            with contextlib.suppress(FileNotFoundError):
                self.disk.unlink(f"{image.directory}/{GENERATIONS}")  # without META beside it, of nothing
            image.load()
            image.save(0)
        except OSError as e:
            self._clear(image, fresh)
            raise disk_error(e, image.directory) from e
        except UkaiError:
            self._clear(image, fresh)
            raise

    def _clear(self, image: ImageStore, fresh: bool) -> None:
        """Take back what ``_furnish`` made, as far as the disk lets us."""
        image.close()
        for mine in (META, GENERATIONS, TEMPORARY):
            with contextlib.suppress(OSError):
                self.disk.unlink(f"{image.directory}/{mine}")
        if fresh:
            with contextlib.suppress(OSError):
                self.disk.rmdir(image.directory)

    def drop(self, uuid: str, name: str) -> None:
        """Delete an image's block files and directory: only on an administrator's order.  Raises DiskError.

        Files that are none of ours stay, and their directory with them.
        """
        image = self.images.get(uuid)
        if image is None:
            raise NotFound(f"no data of image {name} ({uuid}) under {self.root}")
        image.drop([(0, image.block_count - 1)])
        self.forget(uuid)

    def forget(self, uuid: str) -> None:
        """Take back ``prepare``: our own files go, block files stay, and their directory with them."""
        image = self.images.get(uuid)
        if image is None:
            return
        self.release(uuid)
        try:
            for mine in (GENERATIONS, TEMPORARY, META):
                with contextlib.suppress(FileNotFoundError):
                    self.disk.unlink(f"{image.directory}/{mine}")
            with contextlib.suppress(OSError):  # not empty: something that is not ours
                self.disk.rmdir(image.directory)
            self.disk.sync_directory(self.root)
        except OSError as e:
            raise disk_error(e, image.directory) from e

    def release(self, uuid: str) -> None:
        """Forget an image without touching its files."""
        image = self.images.pop(uuid, None)
        if image is not None:
            image.close()

    def forget_files(self, uuid: str, block: int | None = None) -> None:
        """Close descriptors of an image, or of one block."""
        keys = [k for k in self.files if k[0] == uuid] if block is None else [(uuid, block)]
        for key in keys:
            fd = self.files.pop(key, -1)
            if fd >= 0:
                self.disk.close(fd)

    def keep_file(self, key: tuple[str, int], fd: int) -> None:
        """Remember a descriptor; those unused for longest, and flushed, are closed when there are too many."""
        self.files[key] = fd
        excess = len(self.files) - self.open_files_limit
        if excess <= 0:
            return
        for old in list(self.files):
            image = self.images.get(old[0])
            if old != key and (image is None or old[1] not in image.unflushed):
                self.disk.close(self.files.pop(old))
                excess -= 1
                if not excess:
                    return

    def close(self) -> None:
        for uuid in list(self.images):
            self.release(uuid)
        if self._lock_fd >= 0:
            self.disk.close(self._lock_fd)
            self._lock_fd = -1
