"""The power cut: what no sync had covered is lost, sector by sector and name by name, as chance has it."""

from __future__ import annotations

import os
import random
import shutil
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack

from tests.durability.journal import A_DIRECTORY, ABSENT, BOOT, INODES, LOG, SECTOR

KEEP = (0.0, 0.5, 0.95)
"""Chances that something unsynced is on the disk all the same; each cut draws one."""


@dataclass
class Loss:
    """What a cut found unsynced, and what of it it took away."""

    sectors: int = 0
    sectors_lost: int = 0
    names: int = 0
    names_lost: int = 0

    def __iadd__(self, other: Loss) -> Loss:
        self.sectors += other.sectors
        self.sectors_lost += other.sectors_lost
        self.names += other.names
        self.names_lost += other.names_lost
        return self


@dataclass
class _Unsynced:
    """What there was before each change that no sync has covered, oldest first."""

    records: list[list[Any]] = field(default_factory=list)
    gone: dict[int, list[bytes]] = field(default_factory=dict)
    """sector → contents before, where a sync has failed: no later sync brings back what that one had to write."""


def power_cut(directory: Path, chance: random.Random) -> Loss:
    """Take back a part of what was not synced.  All that used the disk is dead; the next run is another boot."""
    keep = chance.choice(KEEP)
    loss = Loss()
    files, names = _unsynced(directory)
    # Data first: the inodes are all linked in the journal's directory, whatever their names become.
    for inode, unsynced in sorted(files.items()):
        _lose_data(directory / INODES / str(inode), unsynced, keep, chance, loss)
    _lose_names(directory, names, keep, chance, loss)
    (directory / LOG).unlink(missing_ok=True)
    shutil.rmtree(directory / INODES)
    (directory / BOOT).unlink(missing_ok=True)
    return loss


def boot_file(directory: Path) -> Path:
    """The file that names this run of the machine: another one after each cut."""
    path = directory / BOOT
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{uuid.uuid4()}\n")
    return path


def _records(directory: Path) -> Iterator[list[Any]]:
    log = directory / LOG
    if not log.exists():
        return
    with log.open("rb") as f:
        yield from msgpack.Unpacker(f, max_buffer_size=2**31 - 1)  # what was cut off at the end was not done either


def _unsynced(directory: Path) -> tuple[dict[int, _Unsynced], dict[str, list[int]]]:
    """inode → what of it is unsynced; path → the values that its name had since its directory was synced."""
    files: dict[int, _Unsynced] = defaultdict(_Unsynced)
    names: dict[str, list[tuple[str, int]]] = defaultdict(list)  # directory → (path, value before)
    begun: dict[int, tuple[int | str, int]] = {}
    for kind, *fields in _records(directory):
        if kind in ("data", "size"):
            files[fields[0]].records.append([kind, *fields[1:]])
        elif kind == "name":
            names[os.path.dirname(fields[0])].append((fields[0], fields[1]))
        elif kind == "begin":
            number, what = fields
            covered = len(files[what].records) if isinstance(what, int) else len(names[what])
            begun[number] = (what, covered)
        else:
            number, good = fields
            what, covered = begun.pop(number)
            if isinstance(what, int):
                _end_sync(files[what], covered, good, begun, what)
            elif good:
                del names[what][:covered]
                begun = {n: (w, max(0, c - covered) if w == what else c) for n, (w, c) in begun.items()}
    found: dict[str, list[int]] = defaultdict(list)
    for entries in names.values():
        for path, value in entries:
            found[path].append(value)
    return files, found


def _end_sync(
    unsynced: _Unsynced, covered: int, good: bool, begun: dict[int, tuple[int | str, int]], inode: int
) -> None:
    for kind, *fields in unsynced.records[:covered]:
        if kind != "data":
            continue
        for sector, before in _sectors(*fields):
            if good:
                unsynced.gone.pop(sector, None)
            else:
                unsynced.gone.setdefault(sector, []).append(before)
    del unsynced.records[:covered]
    for number, (what, count) in begun.items():
        if what == inode:
            begun[number] = (what, max(0, count - covered))


def _sectors(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    for at in range(0, len(data), SECTOR):
        yield (offset + at) // SECTOR, data[at : at + SECTOR]


def _lose_data(path: Path, unsynced: _Unsynced, keep: float, chance: random.Random, loss: Loss) -> None:
    versions: dict[int, list[bytes]] = {sector: list(before) for sector, before in unsynced.gone.items()}
    sizes: list[int] = []
    for kind, *fields in unsynced.records:
        if kind == "size":
            sizes.append(fields[0])
        else:
            for sector, before in _sectors(*fields):
                versions.setdefault(sector, []).append(before)
    if not versions and not sizes:
        return
    fd = os.open(path, os.O_RDWR)
    try:
        now = os.fstat(fd).st_size
        size = now if not sizes or chance.random() < keep else chance.choice(sizes)
        if size > now:
            os.ftruncate(fd, size)
        for sector, earlier in sorted(versions.items()):
            loss.sectors += 1
            if chance.random() >= keep:
                loss.sectors_lost += 1
                # mostly what the last sync left, at times what was written between
                os.pwrite(fd, earlier[0] if chance.random() < 0.7 else chance.choice(earlier), sector * SECTOR)
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _lose_names(directory: Path, names: dict[str, list[int]], keep: float, chance: random.Random, loss: Loss) -> None:
    for path, before in sorted(names.items()):  # a directory before what is in it
        loss.names += 1
        if chance.random() < keep:
            continue
        loss.names_lost += 1
        _put_back(directory, Path(path), before[0] if chance.random() < 0.7 else chance.choice(before))


def _put_back(directory: Path, path: Path, value: int) -> None:
    """Make a name what it was, where its directory is still there."""
    if not path.parent.is_dir():
        return
    if value == A_DIRECTORY:
        path.mkdir(exist_ok=True)
        return
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if value != ABSENT:
        os.link(directory / INODES / str(value), path)
