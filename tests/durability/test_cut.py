"""The shim itself: a synced change stays, an unsynced one may go, whole or in part, and nothing else happens."""

from __future__ import annotations

import inspect
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.durability.cut import power_cut
from tests.durability.journal import JournaledDisk
from ukai.blockd.disk import Disk

LOOKS = {
    "close", "dup", "size", "pread", "pread_cached", "data_after", "names", "stat", "exists", "read_file", "space",
    "lock",
}  # fmt: skip
OLD, NEW = b"old" + bytes(4093), b"new" * 1365 + b"."
CUTS = 25


@pytest.fixture
def disk(tmp_path: Path) -> JournaledDisk:
    return JournaledDisk(str(tmp_path / "journal"))


def settle(disk: JournaledDisk, path: Path, data: bytes) -> int:
    """A file that has survived all: the descriptor."""
    fd = disk.open(str(path), create=True)
    disk.pwrite(fd, data, 0)
    disk.fdatasync(fd)
    disk.sync_directory(str(path.parent))
    return fd


def outcomes(tmp_path: Path, work: Callable[[JournaledDisk, Path], Callable[[], Any]]) -> set[Any]:
    """What is left after each of many cuts; ``work(disk, root)`` does something and returns how to look."""
    found: set[Any] = set()
    for seed in range(CUTS):
        root = tmp_path / str(seed)
        root.mkdir()
        disk = JournaledDisk(str(tmp_path / f"{seed}.journal"))
        look = work(disk, root)
        os.close(disk._log)
        power_cut(tmp_path / f"{seed}.journal", random.Random(seed))
        found.add(look())
    return found


def test_each_operation_of_a_disk_is_noted_or_only_looks() -> None:
    """Whoever adds one to ``Disk`` decides here: does it alter anything that a power cut could take back?"""
    all_of_them = {name for name, _ in inspect.getmembers(Disk, inspect.isfunction) if not name.startswith("_")}
    noted = {name for name in vars(JournaledDisk) if not name.startswith("_")}
    assert noted <= all_of_them
    assert all_of_them - noted == LOOKS


def test_a_synced_write_stays(tmp_path: Path) -> None:
    def work(disk: JournaledDisk, root: Path) -> Callable[[], Any]:
        fd = settle(disk, root / "f", OLD)
        disk.pwrite(fd, NEW, 0)
        disk.fdatasync(fd)
        disk.close(fd)
        return (root / "f").read_bytes

    assert outcomes(tmp_path, work) == {NEW}


def test_an_unsynced_write_may_be_there_or_not_or_in_part(tmp_path: Path) -> None:
    def work(disk: JournaledDisk, root: Path) -> Callable[[], Any]:
        fd = settle(disk, root / "f", OLD)
        disk.pwrite(fd, NEW, 0)
        disk.close(fd)
        return (root / "f").read_bytes

    found = outcomes(tmp_path, work)
    assert {OLD, NEW} < found
    for data in found:
        assert len(data) == len(OLD)
        assert all(data[at : at + 512] in (OLD[at : at + 512], NEW[at : at + 512]) for at in range(0, len(data), 512))


def test_a_failed_sync_covers_nothing_nor_does_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_disk: Disk, _fd: int) -> None:
        raise OSError(5, "no")

    def work(disk: JournaledDisk, root: Path) -> Callable[[], Any]:
        fd = settle(disk, root / "f", OLD)
        disk.pwrite(fd, NEW, 0)
        with monkeypatch.context() as patch:
            patch.setattr(Disk, "fdatasync", fail)
            with pytest.raises(OSError, match="no"):
                disk.fdatasync(fd)
        disk.fdatasync(fd)
        disk.close(fd)
        return (root / "f").read_bytes

    assert OLD in outcomes(tmp_path, work)


def test_what_is_written_after_the_sync_began_is_not_covered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(disk: JournaledDisk, root: Path) -> Callable[[], Any]:
        fd = settle(disk, root / "f", OLD)

        def late(_disk: Disk, _fd: int) -> None:
            disk.pwrite(fd, NEW, 0)

        with monkeypatch.context() as patch:
            patch.setattr(Disk, "fdatasync", late)
            disk.fdatasync(fd)
        disk.close(fd)
        return (root / "f").read_bytes

    assert OLD in outcomes(tmp_path, work)


def test_sizes_and_holes(tmp_path: Path) -> None:
    def work(disk: JournaledDisk, root: Path) -> Callable[[], Any]:
        fd = settle(disk, root / "f", NEW)
        disk.punch(fd, 0, 4096)
        disk.truncate(fd, 1000)
        disk.pwrite(fd, b"end", 9000)
        disk.close(fd)
        return lambda: ((root / "f").stat().st_size, (root / "f").read_bytes()[:512])

    found = outcomes(tmp_path, work)
    assert {(4096, NEW[:512]), (9003, bytes(512))} <= found
    assert {size for size, _ in found} == {1000, 4096, 9003}


@pytest.mark.parametrize("synced", [True, False])
def test_names(tmp_path: Path, synced: bool) -> None:
    """A replaced, a removed and a new file: what they were, or what they became; once synced only that."""

    def work(disk: JournaledDisk, root: Path) -> Callable[[], Any]:
        for name in ("replaced", "removed"):
            disk.close(settle(disk, root / name, OLD))
        fd = disk.open(str(root / "tmp"), create=True)
        disk.pwrite(fd, NEW, 0)
        disk.fsync(fd)
        assert disk.look(fd)[0]
        disk.rename(str(root / "tmp"), str(root / "replaced"))
        disk.unlink(str(root / "removed"))
        disk.mkdir(str(root / "new"))
        inner = disk.open(str(root / "new" / "f"), create=True)
        disk.sync_directory(str(root / "new"))
        disk.unlink(str(root / "new" / "f"))
        assert not disk.look(inner)[0]
        disk.close(inner)
        disk.close(fd)
        if synced:
            disk.sync_directory(str(root))
        return lambda: (
            (root / "replaced").read_bytes(),
            (root / "removed").exists(),
            (root / "new").exists(),
        )

    found = outcomes(tmp_path, work)
    if synced:
        assert found == {(NEW, False, True)}
    else:
        assert {(OLD, True, False), (NEW, False, True)} < found


def test_a_cut_ends_the_journal(tmp_path: Path, disk: JournaledDisk) -> None:
    root = tmp_path / "root"
    root.mkdir()
    fd = settle(disk, root / "f", OLD)
    disk.pwrite(fd, NEW, 0)
    disk.close(fd)
    os.close(disk._log)
    first = power_cut(tmp_path / "journal", random.Random(1))
    assert first.sectors == 8
    kept = (root / "f").read_bytes()
    again = JournaledDisk(str(tmp_path / "journal"))
    os.close(again._log)
    assert power_cut(tmp_path / "journal", random.Random(2)).sectors == 0
    assert (root / "f").read_bytes() == kept
