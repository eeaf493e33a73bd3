"""A filesystem of one file, over the frontend's binding: python -m bench.passthrough FILE MOUNT_POINT."""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ukai.errors import NotFound, Refused
from ukai.frontend import binding
from ukai.frontend.main import SWITCH_INTERVAL_S
from ukai.frontend.spare import Spares

NAME = "file"


class Crowd:
    """Implements ``spare.Crowd``: no request waits for another process."""

    def __init__(self) -> None:
        self.crowded, self.crowd = threading.Event(), 0
        self.stand_in: Callable[[], None] | None = None

    def waiting(self) -> int:
        return 0


class Passthrough:
    """Implements ``binding.Filesystem`` over one file."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR)

    def getattr(self, path: bytes | None, fh: int | None) -> dict[str, int]:
        if fh is None and path == b"/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        if fh is None and path != f"/{NAME}".encode():
            raise NotFound("no such file")
        found = os.fstat(self._fd)
        return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": found.st_size, "st_blksize": 131072}

    def readdir(self) -> list[str]:
        return [NAME]

    def open(self, path: bytes, flags: int) -> int:
        return self._fd

    def read(self, fh: int, into: memoryview, offset: int) -> int:
        return os.preadv(fh, [into], offset)

    def write(self, fh: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fh, data, offset)

    def fsync(self, fh: int) -> None:
        os.fdatasync(fh)

    def release(self, fh: int) -> None:
        pass

    def truncate(self, path: bytes | None, fh: int | None, length: int) -> None:
        raise Refused("the size is fixed")

    def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        raise Refused("not needed here")

    def statfs(self) -> dict[str, int]:
        return {"f_bsize": 4096}

    def chmod(self, path: bytes | None, fh: int | None, mode: int) -> None:
        pass

    def chown(self, path: bytes | None, fh: int | None, uid: int, gid: int) -> None:
        pass

    def utimens(self, path: bytes | None, fh: int | None, mtime_ns: int | None) -> None:
        pass


def main() -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    library = binding.load("auto")
    path, mount_point = Path(sys.argv[1]), sys.argv[2]
    # in a thread, as in the frontend; it ends with its mount namespace
    words = (Passthrough(path), mount_point, False, lambda: None, Spares(Crowd()))
    serve = threading.Thread(target=library.run, args=words)
    serve.start()
    serve.join()


if __name__ == "__main__":
    main()
