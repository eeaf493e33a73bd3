"""Files of the block store: how they are written whole, read whole, and what their errors mean."""

from __future__ import annotations

import errno
import json
import os
import uuid as uuids
from typing import Any

from ukai.blockd.disk import Disk
from ukai.errors import DiskError, NoSpace, UsageError

META, GENERATIONS, SUMS, TEMPORARY = ".ukai.json", ".ukai.gen", ".ukai.sum", ".ukai.tmp"
REMOVED = "was removed while in use"
RECORD_BYTES = 512
"""Size of our own small files: one sector."""
COPY_BYTES = 2**20
HASH_BYTES = 16
HOLE = bytes(HASH_BYTES)
_ZEROS = bytes(4 * 2**20)

Bytes = bytes | bytearray | memoryview


def zeros(length: int) -> bytes:
    return _ZEROS[:length] if length <= len(_ZEROS) else bytes(length)


def is_zeros(data: Bytes) -> bool:
    """Compares memory, for views too, whose == goes byte by byte."""
    return _ZEROS.startswith(data) if len(data) <= len(_ZEROS) else bytearray(len(data)) == data


def disk_error(e: OSError, what: str, touched: bool = False) -> DiskError | NoSpace:
    """The error of ours for an OSError; ``touched`` says whether the file may have been altered."""
    text = f"{what}: {os.strerror(e.errno or errno.EIO)}"
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(text, touched=touched)
    return DiskError(text, touched=touched)


def gone(disk: Disk, fd: int, path: str) -> str:
    """Why an open file is no good any more; empty when it has its name."""
    try:
        return "" if disk.look(fd)[0] else f"{path} {REMOVED}"
    except OSError as e:
        return disk_error(e, path).message


def make_file(disk: Disk, directory: str, name: str, data: Bytes, size: int, source: int = -1) -> None:
    """Make or replace a file of ``size`` bytes that begins with ``data``, or with what another has (R8).

    After a crash it is the old or the new one.  The temporary file is never one whose fsync failed before.
    ``source`` is an open file.  Raises OSError.
    """
    temporary = f"{directory}/{TEMPORARY}"
    if disk.exists(temporary):
        disk.unlink(temporary)
    fd = disk.open(temporary, create=True)
    try:
        disk.truncate(fd, size)
        write_all(disk, fd, data, 0)
        if source >= 0:
            copy_data(disk, source, fd, size)
        disk.fsync(fd)
    finally:
        disk.close(fd)
    disk.rename(temporary, f"{directory}/{name}")
    disk.sync_directory(directory)


def copy_data(disk: Disk, source: int, target: int, size: int) -> None:
    """What is not a hole, from one open file to another.  Raises OSError."""
    at = disk.data_after(source, 0)
    while at is not None and at < size:
        part = disk.pread(source, min(COPY_BYTES, size - at), at)
        if not part:
            return
        write_all(disk, target, part, at)
        at = disk.data_after(source, at + len(part))


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
