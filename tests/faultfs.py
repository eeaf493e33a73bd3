"""A filesystem of ours whose N-th operation fails: ``python -m tests.faultfs DIRECTORY MOUNT_POINT``.

It passes all on to a directory, each system call as a request of its own (direct I/O, no attributes kept), so that a
real process meets an error where its disk would give it one: SQLite below its statements, blockd below ``Disk``, a
frontend at a file that it was lent.  Orders come as lines of JSON on the standard input, each is answered by one.
What an fsync failed on may be gone, as on Linux: with ``lose`` it is, at once.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from tests import machine

T = TypeVar("T")

SYNCS = ("fsync", "fsyncdir")
MOVES = ("read", "write")
CALLS = (*SYNCS, *MOVES, "open", "create", "truncate", "punch", "rename", "unlink", "mkdir", "rmdir", "readdir")
KINDS: dict[str, tuple[tuple[str, ...], int]] = {
    "EIO": (CALLS, errno.EIO),
    "ENOSPC": (("write", "create", "truncate", "punch", "rename", "mkdir"), errno.ENOSPC),
    "sync": (SYNCS, errno.EIO),
    "short": (MOVES, 0),
    "torn": (("write",), errno.EIO),
}
"""Name → which operations count, and the error; "short" moves a part, "torn" writes a part before it fails."""

HIDDEN = ".fuse_hidden"
"""How libfuse calls a file that was removed while it is open."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]


class Done(NamedTuple):
    """One operation; ``inode`` is that of an open file, also of one that was created, else 0."""

    call: str
    path: str
    inode: int
    good: bool


class Faults:
    """Which operation fails, what was done since that was said, and what no fsync has covered."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._undo: dict[int, list[tuple[int, bytes, int]]] = {}
        """Inode → for each change since its last fsync: (offset, bytes before, size before)."""
        self.arm("EIO", 0)

    def arm(self, kind: str, nth: int, match: str = "", calls: Sequence[str] = (), lose: bool = False) -> None:
        """The ``nth`` operation from now on fails, of those of ``kind`` (or ``calls``) with ``match`` in their path."""
        with self._lock:
            self._kind, self._nth, self._match, self._lose = kind, nth, match, lose
            every, self._errno = KINDS[kind]
            self._calls = calls or every
            self._count, self._fired = 0, ""
            self._done: list[Done] = []

    def report(self) -> dict[str, Any]:
        """``fired``: the operation that failed, ``count`` of those that might, and all that were ``done``."""
        with self._lock:
            return {"fired": self._fired, "count": self._count, "done": self._done}

    def call(self, name: str, path: str, do: Callable[[], T], fd: int = -1, part: Callable[[], T] | None = None) -> T:
        """Carry an operation out, or not; ``part`` moves a part of its data.  Raises OSError."""
        with self._lock:
            inode = os.fstat(fd).st_ino if fd >= 0 else 0
            if name in self._calls and self._match in path:
                self._count += 1
                if self._count == self._nth:
                    self._fired = f"{name} {path}"
                    self._done.append(Done(name, path, inode, False))
                    return self._fail(name, fd, part)
            result = do()
            if isinstance(result, int) and name == "create":
                inode = os.fstat(result).st_ino
            self._done.append(Done(name, path, inode, True))
            if name == "fsync":
                self._undo.pop(inode, None)
            return result

    def _fail(self, name: str, fd: int, part: Callable[[], T] | None) -> T:
        if self._kind in ("short", "torn"):
            assert part is not None
            moved = part()
            if self._kind == "short":
                return moved
        if name == "fsync" and self._lose:
            self._take_back(fd, self._undo.pop(os.fstat(fd).st_ino, []))
        raise OSError(self._errno, os.strerror(self._errno))

    def copy_after_power_cut(self, root: str, target: str) -> None:
        """What of a directory would be there, in the worst case, if power went off now; its names are all kept."""
        with self._lock:
            shutil.copytree(root, target)
            for where, _, names in os.walk(root):
                for name in names:
                    path = os.path.join(where, name)
                    with open(target + path.removeprefix(root), "r+b") as file:
                        self._take_back(file.fileno(), self._undo.get(os.stat(path).st_ino, []))

    @staticmethod
    def _take_back(fd: int, changes: list[tuple[int, bytes, int]]) -> None:
        for offset, before, size in reversed(changes):
            os.pwrite(fd, before, offset)
            os.ftruncate(fd, size)

    def before_change(self, fd: int, offset: int, length: int) -> None:
        """Keep what a part of a file holds."""
        st = os.fstat(fd)
        self._undo.setdefault(st.st_ino, []).append((offset, os.pread(fd, length, offset), st.st_size))


class Passthrough:
    """The callbacks, as mfusepy calls them."""

    use_ns = True

    def __init__(self, root: str, faults: Faults) -> None:
        self._root, self._faults = root, faults

    def init_with_config(self, _connection: Any, config: Any) -> None:
        config.direct_io = 1
        config.attr_timeout = config.entry_timeout = config.negative_timeout = 0.0

    def _real(self, path: str) -> str:
        return self._root + path

    # --- names

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        st = os.fstat(fh) if fh is not None else os.lstat(self._real(path))
        names = ("mode", "nlink", "uid", "gid", "size", "ino", "blocks", "blksize")
        fields = {f"st_{name}": getattr(st, f"st_{name}") for name in names}
        for name in ("atime", "mtime", "ctime"):
            fields[f"st_{name}"] = getattr(st, f"st_{name}_ns")
        if HIDDEN in path:
            fields["st_nlink"] = 0
        return fields

    def readdir(self, path: str, _fh: int) -> list[str]:
        names = self._faults.call("readdir", path, lambda: os.listdir(self._real(path)))
        return [".", "..", *(name for name in names if not name.startswith(HIDDEN))]

    def mkdir(self, path: str, mode: int) -> None:
        self._faults.call("mkdir", path, lambda: os.mkdir(self._real(path), mode))

    def rmdir(self, path: str) -> None:
        self._faults.call("rmdir", path, lambda: os.rmdir(self._real(path)))

    def unlink(self, path: str) -> None:
        self._faults.call("unlink", path, lambda: os.unlink(self._real(path)))

    def rename(self, old: str, new: str) -> None:
        self._faults.call("rename", f"{old} {new}", lambda: os.rename(self._real(old), self._real(new)))

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._real(path), mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(self._real(path), uid, gid)

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        os.utime(self._real(path), ns=times or (time.time_ns(),) * 2)

    def statfs(self, path: str) -> dict[str, int]:
        st = os.statvfs(self._real(path))
        return {name: getattr(st, name) for name in dir(st) if name.startswith("f_")}

    # --- open files

    def open(self, path: str, flags: int) -> int:
        flags = flags & ~(os.O_ACCMODE | os.O_APPEND | os.O_DIRECT) | os.O_RDWR | os.O_CLOEXEC
        return self._faults.call("open", path, lambda: os.open(self._real(path), flags))

    def create(self, path: str, mode: int, _flags: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        return self._faults.call("create", path, lambda: os.open(self._real(path), flags, mode))

    def release(self, _path: str, fh: int) -> None:
        os.close(fh)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return self._faults.call(
            "read", path, lambda: os.pread(fh, size, offset), fh, lambda: os.pread(fh, max(size // 2, 1), offset)
        )

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        def write(count: int) -> int:
            self._faults.before_change(fh, offset, count)
            return os.pwrite(fh, data[:count], offset)

        return self._faults.call("write", path, lambda: write(len(data)), fh, lambda: write(max(len(data) // 2, 1)))

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        def cut() -> None:
            fd = os.open(self._real(path), os.O_RDWR | os.O_CLOEXEC) if fh is None else fh
            try:
                self._faults.before_change(fd, length, max(0, os.fstat(fd).st_size - length))
                os.ftruncate(fd, length)
            finally:
                if fh is None:
                    os.close(fd)

        self._faults.call("truncate", path, cut)

    def fallocate(self, path: str, mode: int, offset: int, length: int, fh: int) -> None:
        def punch() -> None:
            self._faults.before_change(fh, offset, length)
            if _libc.fallocate(fh, mode, offset, length) != 0:
                raise OSError(ctypes.get_errno(), "fallocate")

        self._faults.call("punch", path, punch, fh)

    def fsync(self, path: str, _datasync: int, fh: int) -> None:
        self._faults.call("fsync", path, lambda: None, fh)  # nothing loses power here: what is written is there

    def fsyncdir(self, path: str, _datasync: int, _fh: int) -> None:
        self._faults.call("fsyncdir", path, lambda: None)


def _serve(root: str, where: str) -> None:
    os.environ["FUSE_LIBRARY_NAME"] = "fuse3"  # mfusepy takes libfuse2 first
    import mfusepy

    faults = Faults()

    def orders() -> None:
        for line in sys.stdin:
            order = json.loads(line)
            failed = ""
            try:
                if "copy" in order:
                    faults.copy_after_power_cut(*order["copy"])
                elif order:
                    faults.arm(**order)
            except OSError as e:
                failed = str(e)
            sys.stdout.write(json.dumps({**faults.report(), "failed": failed}) + "\n")
            sys.stdout.flush()
        machine.unmount(Path(where))  # whoever began us is gone

    threading.Thread(target=orders, daemon=True).start()
    mfusepy.FUSE(
        Passthrough(root, faults), where, foreground=True, max_threads=10, fsname="faultfs", nosuid=True, nodev=True
    )


class FaultFilesystem:
    """``root/disk``, a filesystem over ``root/real`` whose operations fail as they are told to.  A context manager."""

    def __init__(self, root: Path) -> None:
        self.real, self.where = root / "real", root / "disk"
        self.real.mkdir(parents=True)
        self.where.mkdir()

    def __enter__(self) -> Self:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tests.faultfs", self.real, self.where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            start_new_session=True,
        )
        machine.wait_for(lambda: machine.mount_answers(self.where), f"a mount at {self.where}", 20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        machine.unmount(self.where)
        self._popen.communicate(timeout=20)

    def _say(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(json.dumps(order) + "\n")
        self._popen.stdin.flush()
        answer: dict[str, Any] = json.loads(self._popen.stdout.readline())
        assert not answer["failed"], answer["failed"]
        return answer

    def arm(self, kind: str, nth: int, match: str = "", calls: Sequence[str] = (), lose: bool = False) -> None:
        """See ``Faults.arm``."""
        self._say({"kind": kind, "nth": nth, "match": match, "calls": list(calls), "lose": lose})

    def disarm(self) -> None:
        """Nothing fails any more."""
        self.arm("EIO", 0)

    def copy_after_power_cut(self, path: Path, target: Path) -> None:
        """See ``Faults.copy_after_power_cut``; ``path`` is below ``where``."""
        self._say({"copy": [str(self.real / path.relative_to(self.where)), str(target)]})

    @property
    def fired(self) -> str:
        """The operation that failed; empty: none has."""
        return str(self._say({})["fired"])

    @property
    def done(self) -> list[Done]:
        """All that was done since the last order."""
        return [Done(*one) for one in self._say({})["done"]]


if __name__ == "__main__":
    _serve(*sys.argv[1:3])
