"""The operating system's files, as the block store uses them.

All the store asks of a disk goes through one object, so that a test can make the N-th operation fail and a
simulator can lose what was not flushed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import threading

from ukai.blockd.aio import Aio, last_error

PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01

PIECE_BYTES = 64 * 2**10
"""The most that one pwrite hands to the kernel.

The page cache keeps what one call writes in pieces as large as the call, and ext4 walks over all of such a piece, 4 KiB
by 4 KiB, at each later write into it: after calls of 1 MiB a write of 4 KiB costs four times as much.
"""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
_statx = ctypes.PyDLL(None, use_errno=True).statx  # what is asked for is in memory: the interpreter is kept
_statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]

AT_EMPTY_PATH = 0x1000
STATX_NLINK, STATX_SIZE = 0x004, 0x200
_LINKS_AND_SIZE = struct.Struct("=16xI20xQ")


class _Room(threading.local):
    """Where statx puts what it finds."""

    def __init__(self) -> None:
        self.bytes = ctypes.create_string_buffer(256)


_room = _Room()


class Disk:
    """Thin names for the system calls; all raise OSError."""

    def open(self, path: str, create: bool = False) -> int:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o640)

    def close(self, fd: int) -> None:
        os.close(fd)

    def dup(self, fd: int) -> int:
        """A second descriptor of the same open file, for a thread beside the loop."""
        return os.dup(fd)

    def look(self, fd: int) -> tuple[bool, int]:
        """Whether the open file still has a name; its size.

        Nothing is asked about times, as fstat would: that makes the next write to the file note a new one (Linux 6.13
        and later), which the next fdatasync then has to store, one more write to the disk for each.
        """
        found = _room.bytes
        if _statx(fd, b"", AT_EMPTY_PATH, STATX_NLINK | STATX_SIZE, found) != 0:
            raise last_error()
        links, size = _LINKS_AND_SIZE.unpack_from(found)
        return links > 0, size

    def size(self, fd: int) -> int:
        return self.look(fd)[1]

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        """Bytes written, which may be fewer than given: of more than PIECE_BYTES those up to a multiple of it."""
        if len(data) > PIECE_BYTES:
            data = memoryview(data)[: PIECE_BYTES - offset % PIECE_BYTES]
        return os.pwrite(fd, data, offset)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return os.pread(fd, length, offset)

    def pread_cached(self, fd: int, length: int, offset: int) -> bytearray | None:
        """What the page cache has; None when any of it would have to come from the disk."""
        buffer = bytearray(length)
        try:
            if os.preadv(fd, [buffer], offset, os.RWF_NOWAIT) != length:
                return None
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return None
            raise
        return buffer

    def punch(self, fd: int, offset: int, length: int) -> None:
        if _libc.fallocate(fd, PUNCH_HOLE_KEEP_SIZE, offset, length) != 0:
            raise last_error()

    def data_after(self, fd: int, offset: int) -> int | None:
        """Offset of the first data at or after ``offset``; None when the rest is a hole."""
        try:
            return os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return None
            raise

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def aio(self) -> Aio:
        """For fdatasyncs without a thread, on the running loop.  Raises OSError where there is no such thing."""
        return Aio()

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        os.mkdir(path, 0o750)

    def make_directories(self, path: str) -> None:
        os.makedirs(path, mode=0o750, exist_ok=True)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def sync_directory(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def names(self, path: str) -> list[str]:
        """Names in a directory, sorted; empty when there is none."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def stat(self, path: str) -> tuple[int, int] | None:
        """(size, allocated) in bytes of a regular file; None when there is none."""
        try:
            st = os.stat(path)
        except FileNotFoundError:
            return None
        return st.st_size, st.st_blocks * 512

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def read_file(self, path: str) -> bytes:
        with open(path, "rb") as f:
            return f.read()

    def space(self, path: str) -> tuple[int, int]:
        """(free, total) bytes of the filesystem under ``path``."""
        st = os.statvfs(path)
        return st.f_bavail * st.f_frsize, st.f_blocks * st.f_frsize

    def lock(self, fd: int) -> bool:
        """Take the exclusive lock of an open file; false when another process has it."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno == errno.EWOULDBLOCK:
                return False
            raise
        return True
