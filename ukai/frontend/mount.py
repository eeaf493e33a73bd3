"""The mount point: what is mounted there, whether it is dead, and how to get rid of it."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path

from ukai.errors import UkaiError

log = logging.getLogger(__name__)

KIND = "fuse.ukai"
ANSWER_WAIT_S = 3.0
CONNECTIONS = Path("/sys/fs/fuse/connections")
FUSE_CONF = Path("/etc/fuse.conf")

_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Mount:
    """A line of mountinfo."""

    where: str
    kind: str
    connection: int
    """Number of the FUSE connection: the minor of the device."""


def find(mount_point: str) -> Mount | None:
    """What is mounted at ``mount_point`` itself, the topmost; asks no filesystem, so a dead one doesn't matter."""
    wanted = os.path.normpath(mount_point)
    found = None
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(" ")
        where = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
        if where == wanted:
            found = Mount(where, fields[fields.index("-") + 1], int(fields[2].partition(":")[2]))
    return found


def prepare(mount_point: str) -> None:
    """Make the directory if it isn't there and free it from a dead mount of ours.

    Raises UkaiError with one line when it can't be mounted on.
    """
    while (mount := find(mount_point)) is not None:
        if mount.kind != KIND:
            raise UkaiError(
                f"{mount_point} has a filesystem of type {mount.kind} mounted on it; choose another mount_point"
            )
        state = _state(mount_point)
        if state == errno.ENOTCONN:
            log.info("unmounting what an earlier frontend left at %s", mount_point)
            detach(mount_point)
        elif state is None:
            raise UkaiError(f"{mount_point} does not answer; end the process behind it, then: umount -l {mount_point}")
        else:
            raise UkaiError(
                f"{mount_point} is served by another ukai-frontend; choose another mount_point or stop that one"
            )
    try:
        os.makedirs(mount_point, exist_ok=True)
        with os.scandir(mount_point) as entries:
            if any(entries):
                raise UkaiError(
                    f"{mount_point} is not empty; its files would be hidden: move them or choose another mount_point"
                )
    except OSError as e:
        raise UkaiError(f"mount_point {mount_point} can't be used: {e.strerror}") from None


def _state(mount_point: str) -> int | None:
    """errno of a look at the mount, 0 if it is well, None when it doesn't answer."""
    result: list[int] = []

    def look() -> None:
        try:
            # stat would be answered from the kernel's cache for a second after the process has died
            os.close(os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            result.append(0)
        except OSError as e:
            result.append(e.errno or errno.EIO)

    thread = threading.Thread(target=look, name="look", daemon=True)
    thread.start()
    thread.join(ANSWER_WAIT_S)
    return result[0] if result else None


def check_device() -> None:
    """Raises UkaiError when FUSE itself is not to be had."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        hint = "run as root" if e.errno in (errno.EACCES, errno.EPERM) else "load it with: modprobe fuse"
        raise UkaiError(f"/dev/fuse can't be opened ({e.strerror}); {hint}") from None
    if os.geteuid() != 0 and _fusermount() is None:
        raise UkaiError("fusermount is missing, which a mount by another user than root needs; install fuse3")


def allows_other() -> bool:
    """Whether other users (QEMU under libvirt is one) can be let in: root always may, others if fuse.conf says so."""
    if os.geteuid() == 0:
        return True
    try:
        text = FUSE_CONF.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return re.search(r"^\s*user_allow_other\s*$", text, re.MULTILINE) is not None


def _fusermount() -> str | None:
    return shutil.which("fusermount3") or shutil.which("fusermount")


def unmount(mount_point: str, lazy: bool = False) -> bool:
    """Unmount; false when a file in it is open (never with ``lazy``).  Raises OSError for other reasons."""
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(mount_point), _MNT_DETACH if lazy else 0) == 0:
            return True
        number = ctypes.get_errno()
        if number == errno.EBUSY:
            return False
        raise OSError(number, os.strerror(number), mount_point)
    command = [_fusermount() or "fusermount3", "-u", *(["-z"] if lazy else []), "--", mount_point]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode == 0:
        return True
    if "busy" in done.stderr:
        return False
    raise OSError(errno.EIO, done.stderr.strip() or "fusermount failed", mount_point)


def detach(mount_point: str) -> None:
    """Unmount at once, whatever is open.  Raises UkaiError."""
    try:
        unmount(mount_point, lazy=True)
    except OSError as e:
        raise UkaiError(f"{mount_point} can't be unmounted: {e.strerror}; try: umount -l {mount_point}") from None


def abort(mount: Mount) -> bool:
    """Have the kernel fail all requests of a FUSE connection, so that its threads end; false if that can't be done."""
    path = CONNECTIONS / str(mount.connection) / "abort"
    try:
        if not path.exists():
            _libc.mount(b"fusectl", os.fsencode(CONNECTIONS), b"fusectl", 0, None)
        path.write_text("1", encoding="ascii")
    except OSError:
        return False
    return True
