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
from ukai.errors import Busy, Damaged, DiskError, Exists, NoSpace, NotFound, StaleEpoch, UsageError
from ukai.ranges import RangeMap, join

META, GENERATIONS, TEMPORARY = ".ukai.json", ".ukai.gen", ".ukai.tmp"
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


def replace_file(disk: Disk, directory: str, name: str, data: bytes) -> None:
    """Write a small file so that after a crash it is the old or the new one."""
    temporary = f"{directory}/{TEMPORARY}"
    fd = disk.open(temporary, create=True)
    try:
        disk.truncate(fd, 0)
        write_all(disk, fd, data, 0)
        disk.fsync(fd)
    finally:
        disk.close(fd)
    disk.rename(temporary, f"{directory}/{name}")
    disk.sync_directory(directory)


def write_all(disk: Disk, fd: int, data: Bytes, offset: int) -> None:
    """pwrite until all is written.  Raises OSError."""
    done = disk.pwrite(fd, data, offset)
    while done < len(data):
        n = disk.pwrite(fd, memoryview(data)[done:], offset + done)
        if n == 0:
            raise OSError(errno.EIO, "short write")
        done += n


class ImageStore:
    """The part of one image that is on this node."""

    def __init__(self, store: Store, name: str, meta: dict[str, Any]) -> None:
        self.store, self.disk, self.name = store, store.disk, name
        self.directory = f"{store.root}/{name}"
        self.uuid = str(meta["uuid"])
        self.size, self.block_size = int(meta["size"]), int(meta["block_size"])
        self.epoch = int(meta["epoch"])
        self.block_count = -(-self.size // self.block_size)
        self.generations = array.array("Q", bytes(8 * self.block_count))
        self.unflushed: set[int] = set()
        self.poisoned: dict[int, str] = {}
        """Blocks whose fdatasync failed: it never succeeds again as if nothing had happened (R7)."""
        self._gen_fd = -1

    def load(self) -> None:
        """Read the generations.  Raises DiskError, Damaged."""
        path = f"{self.directory}/{GENERATIONS}"
        try:
            if self._gen_fd < 0:
                self._gen_fd = self.disk.open(path, create=True)
            data = self.disk.pread(self._gen_fd, 8 * self.block_count, 0)
        except OSError as e:
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

    def _meta(self, epoch: int) -> bytes:
        fields = {"uuid": self.uuid, "size": self.size, "block_size": self.block_size, "epoch": epoch}
        return json.dumps(fields).encode()

    def save(self, epoch: int) -> None:
        """Persist the highest epoch seen before anything of that epoch touches a file (R1).  Raises DiskError."""
        try:
            replace_file(self.disk, self.directory, META, self._meta(epoch))
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
        size = self.disk.size(fd)
        if size not in (self.block_bytes(block), self.block_size):
            self.disk.close(fd)
            raise Damaged(f"block file {path} has {size} bytes instead of {self.block_bytes(block)}")
        self.store.keep_file(key, fd)
        return fd

    def _create(self, block: int) -> None:
        """Make a block file that reads as zeros: temporary name, fsync, rename, fsync of the directory (R8)."""
        path, temporary = self.path(block), f"{self.directory}/{TEMPORARY}"
        try:
            if self.disk.exists(path):
                size = (self.disk.stat(path) or (0, 0))[0]
                raise Damaged(
                    f"block file {path} ({size} bytes) is there although this block was never written; move it away"
                )
            fd = self.disk.open(temporary, create=True)
            try:
                self.disk.truncate(fd, 0)
                self.disk.truncate(fd, self.block_bytes(block))
                self.disk.fsync(fd)
            finally:
                self.disk.close(fd)
            self.disk.rename(temporary, path)
            self.disk.sync_directory(self.directory)
        except OSError as e:
            raise disk_error(e, path) from e

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
        if have == 0 and self.disk.stat(self.path(block)) is None:
            self._create(block)
        fd = self.file(block)
        self.set_generation(block, generation)
        return fd

    def write(self, block: int, offset: int, data: Bytes, generation: int) -> None:
        """Raises Damaged, NoSpace or DiskError; ``touched`` in its details: whether the file may have changed."""
        fd = self.ready(block, generation)
        try:
            done = self.disk.pwrite(fd, data, offset)
        except OSError as e:
            raise disk_error(e, f"write to {self.path(block)}", touched=e.errno != errno.ENOSPC) from e
        self.unflushed.add(block)
        if done != len(data):
            try:
                write_all(self.disk, fd, memoryview(data)[done:], offset + done)
            except OSError as e:
                raise disk_error(e, f"write to {self.path(block)}", touched=True) from e

    def punch(self, block: int, offset: int, length: int, generation: int) -> None:
        """Make a part read as zeros and free its space.  Raises as write()."""
        fd = self.ready(block, generation)
        try:
            self.disk.punch(fd, offset, length)
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise disk_error(e, f"discard in {self.path(block)}", touched=True) from e
            self.write(block, offset, zeros(length), generation)
        self.unflushed.add(block)

    def check(self, block: int, generation: int) -> None:
        """Raises Damaged unless the block is of this generation (R8)."""
        if self.generations[block] != generation:
            raise Damaged(
                f"block {block} of image {self.name} has generation {self.generations[block]}, not {generation}"
            )

    def read(self, block: int, offset: int, length: int) -> bytes:
        """Raises Damaged, DiskError."""
        try:
            data = self.disk.pread(self.file(block), length, offset)
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
        return self.disk.dup(self.file(block))

    def read_beside(self, fd: int, block: int, offset: int, length: int) -> bytes:
        """read() in a thread, on a borrowed descriptor."""
        try:
            data = self.disk.pread(fd, length, offset)
        except OSError as e:
            raise disk_error(e, f"read of {self.path(block)}") from e
        finally:
            self.disk.close(fd)
        if len(data) != length:
            raise Damaged(f"block file {self.path(block)} ends at {offset + len(data)} of {self.block_bytes(block)}")
        return data

    def flush_begin(self, blocks: Iterable[int]) -> list[tuple[int, int, str]]:
        """What flush_beside() needs: (block, borrowed descriptor, reason why there is none)."""
        out: list[tuple[int, int, str]] = []
        with contextlib.suppress(OSError):
            out.append((-1, self.disk.dup(self._gen_fd), ""))
        if not out:
            return [(b, -1, f"no descriptor is left to flush block {b}") for b in blocks]
        for block in blocks:
            if block in self.poisoned:
                out.append((block, -1, self.poisoned[block]))
                continue
            try:
                out.append((block, self.borrow(block), ""))
            except (DiskError, NoSpace) as e:
                out.append((block, -1, e.message))
            except OSError as e:
                out.append((block, -1, disk_error(e, self.path(block)).message))
        return out

    def flush_beside(self, work: list[tuple[int, int, str]]) -> dict[int, str]:
        """fdatasync of generations and blocks, in a thread; block → reason for those that failed (R7)."""
        failed: dict[int, str] = {}
        lost = ""
        for block, fd, reason in work:
            if fd >= 0:
                what = f"{self.directory}/{GENERATIONS}" if block < 0 else self.path(block)
                try:
                    self.disk.fdatasync(fd)
                    if not self.disk.linked(fd):
                        reason = f"{what} was removed while in use"
                except OSError as e:
                    reason = f"fdatasync of {what}: {os.strerror(e.errno or errno.EIO)}"
                finally:
                    self.disk.close(fd)
            if block < 0:
                lost = reason
            elif reason or lost:
                failed[block] = reason or lost
        return failed

    def flush_end(self, failed: dict[int, str]) -> None:
        """A block whose flush failed keeps failing until it is made anew (R7)."""
        self.poisoned.update(failed)

    def take_unflushed(self) -> set[int]:
        """The blocks with writes that no flush has covered; later writes go to a new set."""
        blocks, self.unflushed = self.unflushed, set()
        return blocks

    def renew(self, block: int) -> None:
        """Make a block of an out-of-sync replica writable, whatever its file is like, before its resync (R11).

        A missing file is made, one of a wrong size gets the right one, one whose flush failed is made anew: what
        the page cache shows of it may not be on the disk.  Raises DiskError.
        """
        path = self.path(block)
        try:
            st = self.disk.stat(path)
            if st is not None and block in self.poisoned:
                self.store.forget_files(self.uuid, block)
                self.disk.unlink(path)
                st = None
            self.poisoned.pop(block, None)
            if st is None:
                self.store.forget_files(self.uuid, block)
                self._create(block)
            elif st[0] not in (self.block_bytes(block), self.block_size):
                self.store.forget_files(self.uuid, block)
                fd = self.disk.open(path)
                try:
                    self.disk.truncate(fd, self.block_bytes(block))
                    self.disk.fsync(fd)
                finally:
                    self.disk.close(fd)
        except OSError as e:
            raise disk_error(e, path) from e

    def hash_beside(self, fd: int, block: int, offset: int, length: int, chunk: int) -> bytes:
        """16 bytes per chunk, zeros for one that reads as zeros; holes are not read.

        In a thread, on a borrowed descriptor.  Raises as read().
        """
        out = []
        data_at: int | None = -1
        try:
            for at in range(offset, offset + length, chunk):
                size = min(chunk, offset + length - at)
                if data_at is not None and data_at < at:
                    data_at = self.disk.data_after(fd, at)
                if data_at is None or data_at >= at + size:
                    out.append(HOLE)
                    continue
                data = self.disk.pread(fd, size, at)
                if len(data) != size:
                    raise Damaged(f"block file {self.path(block)} ends at {at + len(data)}")
                out.append(HOLE if data == zeros(size) else xxhash.xxh3_128_digest(data))
        except OSError as e:
            raise disk_error(e, f"read of {self.path(block)}") from e
        finally:
            self.disk.close(fd)
        return b"".join(out)

    def allocated(self, ranges: Iterable[tuple[int, int]]) -> int:
        """Bytes that block files take on the disk."""
        total = 0
        for first, last in ranges:
            for block in range(first, last + 1):
                if self.generations[block] and (st := self.disk.stat(self.path(block))) is not None:
                    total += st[1]
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
            size = sizes.get(self.store.blockname_format % block)
            if size is None:
                bad.set(block, block, "block file is missing though it was written")
            elif size not in (self.block_bytes(block), self.block_size):
                bad.set(block, block, f"block file has {size} bytes instead of {self.block_bytes(block)}")
        return {"uuid": self.uuid, "name": self.name, "epoch": self.epoch, "gens": gens, "bad": [list(b) for b in bad]}

    def _sizes(self) -> dict[str, int]:
        out = {}
        for name in self.disk.names(self.directory):
            if not name.startswith(".") and (st := self.disk.stat(f"{self.directory}/{name}")) is not None:
                out[name] = st[0]
        return out

    def adopt(self) -> tuple[list[tuple[int, int]], list[list[Any]]]:
        """Look at block files made by hand: (ranges present, [[first, last, reason]] of a wrong size)."""
        sizes = self._sizes()
        present: list[int] = []
        bad: RangeMap[str] = RangeMap()
        for block in range(self.block_count):
            size = sizes.get(self.store.blockname_format % block)
            if size is None:
                continue
            if size in (self.block_bytes(block), self.block_size):
                present.append(block)
            else:
                bad.set(block, block, f"block file has {size} bytes instead of {self.block_bytes(block)}")
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
                fields = json.loads(self.disk.read_file(f"{private}/store.json"))
                self.store_id = str(fields["store_id"])
                self.cluster_id = str(fields["cluster_id"])
                self.serial, self.highest_seq = int(fields["serial"]), int(fields["highest_seq"])
            else:
                self.store_id = new_id
                self.save()
            for name in self.disk.names(self.root):
                if not name.startswith(".") and self.disk.exists(f"{self.root}/{name}/{META}"):
                    self._load(name)
        except OSError as e:
            raise UsageError(f"data_root {self.root} can't be used: {e.strerror}: {e.filename}") from e
        except (ValueError, KeyError, TypeError) as e:
            raise UsageError(f"{private}/store.json is damaged ({e}); bring it back from a copy or move it away") from e

    def _load(self, name: str) -> None:
        try:
            meta = json.loads(self.disk.read_file(f"{self.root}/{name}/{META}"))
            image = ImageStore(self, name, meta)
            uuids.UUID(image.uuid)
            if image.uuid in self.images:
                raise ValueError(f"the same image as {self.images[image.uuid].name}")
            image.load()
        except (ValueError, KeyError, TypeError, OSError, DiskError) as e:
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
        replace_file(self.disk, f"{self.root}/.ukai", "store.json", json.dumps(fields).encode())

    def image(self, uuid: str) -> ImageStore:
        """Raises Damaged."""
        image = self.images.get(uuid)
        if image is None:
            raise Damaged(f"no data of image {uuid} under {self.root}")
        return image

    def prepare(self, uuid: str, name: str, size: int, block_size: int, mode: str) -> ImageStore:
        """Make room for an image (``create``, ``adopt`` or ``join``).

        Raises Exists where data of another image, or any data at a create, are in the way; DiskError.
        """
        directory = f"{self.root}/{name}"
        if uuid in self.images and mode != "create":
            return self.images[uuid]
        names = self.disk.names(directory)
        if META in names:
            raise Exists(f"{directory} holds another image; move it away or choose another name")
        if names and mode == "create":
            raise Exists(f"{directory} holds data; move them away, or bring them online with add_image")
        if names and mode == "join":
            raise Exists(f"{directory} holds data of something else; move them away")
        try:
            if not self.disk.exists(directory):
                self.disk.mkdir(directory)
                self.disk.sync_directory(self.root)
            meta = {"uuid": uuid, "size": size, "block_size": block_size, "epoch": 0}
            image = ImageStore(self, name, meta)
            if mode == "adopt" and any(r for r in image.adopt()[1]) and not image.adopt()[0]:
                raise Exists(f"the block files in {directory} have another size than {block_size} bytes")
            image.save(0)
            image.load()
        except OSError as e:
            raise disk_error(e, directory) from e
        self.images[uuid] = image
        return image

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
        for key in [k for k in self.files if k[0] == uuid and (block is None or k[1] == block)]:
            self.disk.close(self.files.pop(key))

    def keep_file(self, key: tuple[str, int], fd: int) -> None:
        """Remember a descriptor; the one unused for longest, and flushed, is closed when there are too many."""
        self.files[key] = fd
        if len(self.files) > self.open_files_limit:
            for old in self.files:
                image = self.images.get(old[0])
                if old != key and (image is None or old[1] not in image.unflushed):
                    self.disk.close(self.files.pop(old))
                    return

    def close(self) -> None:
        for uuid in list(self.images):
            self.release(uuid)
        if self._lock_fd >= 0:
            self.disk.close(self._lock_fd)
            self._lock_fd = -1
