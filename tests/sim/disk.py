"""A disk in memory with the faults of a real one.

What was written lies in the page cache until it is flushed.  A process that dies loses nothing; a node that
loses power loses any part of what was not flushed, sector by sector (torn writes), and directory entries that
were not synced.
"""

from __future__ import annotations

import errno
import os
import random

from ukai.blockd.disk import Disk

SECTOR = 512


Copy = tuple[dict[str, bytes], set[str]]
"""Files and directories of a disk at one moment."""


class _Inode:
    def __init__(self) -> None:
        self.cache = bytearray()
        self.stable = bytearray()
        self.dirty: set[int] = set()
        self.names = 0


class SimDisk(Disk):
    """The disk of one node; survives its processes."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.names_now: dict[str, _Inode] = {}
        self.names_stable: dict[str, _Inode] = {}
        self.directories: set[str] = set()
        self._open: dict[int, _Inode] = {}
        self._next = 3
        self.fail: dict[str, int] = {}
        """operation → how many of the next ones fail, with EIO."""
        self.full = False
        self.slow_s = 0.0
        """How long at most a thread waits for this disk."""
        self.locked = False

    def _may_fail(self, what: str) -> None:
        if self.fail.get(what, 0) > 0:
            self.fail[what] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    # --- what happens to the machine

    def process_died(self) -> None:
        self._open.clear()
        self.locked = False

    def power_cut(self) -> None:
        """Keep what was flushed and, of the rest, whatever chance keeps."""
        self.process_died()
        kept: dict[str, _Inode] = {}
        for path in sorted(set(self.names_now) | set(self.names_stable)):
            now, stable = self.names_now.get(path), self.names_stable.get(path)
            inode = now if now is stable or self.chance.random() < 0.5 else stable
            if inode is not None:
                kept[path] = inode
        for inode in {id(i): i for i in kept.values()}.values():
            data = bytearray(inode.stable)
            if len(inode.cache) != len(data) and self.chance.random() < 0.5:
                data = data[: len(inode.cache)] + bytes(max(0, len(inode.cache) - len(data)))
            for sector in sorted(inode.dirty):
                at = sector * SECTOR
                if at < len(data) and self.chance.random() < 0.5:
                    data[at : at + SECTOR] = inode.cache[at : min(at + SECTOR, len(data))]
            inode.cache, inode.stable = bytearray(data), bytearray(data)
            inode.dirty.clear()
        self.names_now, self.names_stable = dict(kept), dict(kept)

    # --- what happens to the files while no blockd has them

    def copy(self) -> Copy:
        """All files as they are now."""
        return {path: bytes(inode.cache) for path, inode in self.names_now.items()}, set(self.directories)

    def put_back(self, copy: Copy) -> None:
        """The files of a copy in the place of those there are."""
        self.names_now = {}
        for path, data in copy[0].items():
            inode = self.names_now[path] = _Inode()
            inode.cache, inode.stable = bytearray(data), bytearray(data)
        self.names_stable, self.directories = dict(self.names_now), set(copy[1])

    def remove(self, path: str) -> None:
        self.names_now.pop(path, None)
        self.names_stable.pop(path, None)

    def shorten(self, path: str, size: int) -> None:
        inode = self.names_now[path]
        del inode.cache[size:]
        del inode.stable[size:]

    def spoil(self, path: str, offset: int) -> bytes:
        """One sector is altered silently; what it holds now."""
        inode = self.names_now[path]
        end = min(offset + SECTOR, len(inode.cache))
        spoilt = bytes(byte ^ 0x55 for byte in inode.cache[offset:end])
        inode.cache[offset:end] = inode.stable[offset:end] = spoilt
        return spoilt

    def swap(self, other: SimDisk) -> None:
        """Each machine has the other one's disk."""
        self.names_now, other.names_now = other.names_now, self.names_now
        self.names_stable, other.names_stable = other.names_stable, self.names_stable
        self.directories, other.directories = other.directories, self.directories

    # --- the Disk

    def open(self, path: str, create: bool = False) -> int:
        self._may_fail("open")
        inode = self.names_now.get(path)
        if inode is None:
            if not create:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            inode = self.names_now[path] = _Inode()
        fd, self._next = self._next, self._next + 1
        self._open[fd] = inode
        return fd

    def inode(self, fd: int) -> _Inode:
        if fd not in self._open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._open[fd]

    def close(self, fd: int) -> None:
        self.inode(fd)
        del self._open[fd]

    def dup(self, fd: int) -> int:
        number, self._next = self._next, self._next + 1
        self._open[number] = self.inode(fd)
        return number

    def look(self, fd: int) -> tuple[bool, int]:
        inode = self.inode(fd)
        return any(i is inode for i in self.names_now.values()), len(inode.cache)

    def truncate(self, fd: int, size: int) -> None:
        self._may_fail("truncate")
        cache = self.inode(fd).cache
        if size < len(cache):
            del cache[size:]
        else:
            cache.extend(bytes(size - len(cache)))

    def _touch(self, inode: _Inode, offset: int, length: int) -> None:
        inode.dirty.update(range(offset // SECTOR, -(-(offset + length) // SECTOR)))

    def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        inode = self.inode(fd)
        if self.full and len(data) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        length = len(data)
        if self.fail.get("pwrite", 0) > 0:
            self.fail["pwrite"] -= 1
            length = self.chance.randrange(0, length + 1) // SECTOR * SECTOR
            if length == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        if len(inode.cache) < offset + length:
            inode.cache.extend(bytes(offset + length - len(inode.cache)))
        inode.cache[offset : offset + length] = data[:length]
        self._touch(inode, offset, length)
        return length

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        self._may_fail("pread")
        return bytes(self.inode(fd).cache[offset : offset + length])

    def pread_cached(self, fd: int, length: int, offset: int) -> bytearray | None:
        if self.chance.random() < 0.3:
            return None
        data = bytearray(self.pread(fd, length, offset))
        return data if len(data) == length else None

    def punch(self, fd: int, offset: int, length: int) -> None:
        self._may_fail("punch")
        inode = self.inode(fd)
        end = min(offset + length, len(inode.cache))
        inode.cache[offset:end] = bytes(end - offset)
        self._touch(inode, offset, length)

    def data_after(self, fd: int, offset: int) -> int | None:
        cache = self.inode(fd).cache
        rest = bytes(cache[offset:])
        stripped = rest.lstrip(b"\0")
        return offset + len(rest) - len(stripped) if stripped else None

    def fdatasync(self, fd: int) -> None:
        inode = self.inode(fd)
        if self.fail.get("fdatasync", 0) > 0:
            self.fail["fdatasync"] -= 1
            inode.dirty.clear()  # as Linux does: the pages are clean now, and not on the disk
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        size = len(inode.cache)
        del inode.stable[size:]
        inode.stable.extend(bytes(size - len(inode.stable)))
        for sector in inode.dirty:
            at = sector * SECTOR
            end = min(at + SECTOR, size)
            inode.stable[at:end] = inode.cache[at:end]
        inode.dirty.clear()

    def fsync(self, fd: int) -> None:
        self.fdatasync(fd)

    def rename(self, old: str, new: str) -> None:
        self._may_fail("rename")
        self.names_now[new] = self.names_now.pop(old)

    def unlink(self, path: str) -> None:
        if path not in self.names_now:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        del self.names_now[path]

    def mkdir(self, path: str) -> None:
        self.directories.add(path)

    def rmdir(self, path: str) -> None:
        self.directories.discard(path)

    def sync_directory(self, path: str) -> None:
        for name in [n for n in self.names_stable if n.rpartition("/")[0] == path and n not in self.names_now]:
            del self.names_stable[name]
        for name, inode in self.names_now.items():
            if name.rpartition("/")[0] == path:
                self.names_stable[name] = inode

    def names(self, path: str) -> list[str]:
        prefix = path + "/"
        inside = {p[len(prefix) :].split("/")[0] for p in [*self.names_now, *self.directories] if p.startswith(prefix)}
        return sorted(inside)

    def stat(self, path: str) -> tuple[int, int] | None:
        inode = self.names_now.get(path)
        return None if inode is None else (len(inode.cache), len(inode.cache))

    def exists(self, path: str) -> bool:
        return path in self.names_now or path in self.directories or bool(self.names(path))

    def read_file(self, path: str) -> bytes:
        return bytes(self.names_now[path].cache)

    def space(self, path: str) -> tuple[int, int]:
        return 2**30, 2**31

    def lock(self, fd: int) -> bool:
        if self.locked:
            return False
        self.locked = True
        return True

    def make_directories(self, path: str) -> None:
        self.directories.add(path)


def stored(disk: SimDisk, path: str) -> bytes:
    """What a power cut would leave of a file for certain."""
    inode = disk.names_stable.get(path)
    return b"" if inode is None else bytes(inode.stable)
