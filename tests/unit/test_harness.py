"""The tools of the tests find what they are for."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from tests.blocks import block_digest, differences
from tests.faultfs import FaultFilesystem
from tests.logs import LogFile
from tests.machine import PortRange, mount_answers, wait_for


def test_zeros_and_holes_and_missing_files_are_the_same(tmp_path: Path) -> None:
    zeros, hole, short = tmp_path / "zeros", tmp_path / "hole", tmp_path / "short"
    zeros.write_bytes(bytes(3_000_000))
    with hole.open("wb") as f:
        f.truncate(3_000_000)
    short.write_bytes(b"\0" * 5)
    assert len({block_digest(p, 3_000_000) for p in (zeros, hole, short, tmp_path / "none")}) == 1


@pytest.mark.parametrize("offset", [0, 1, 1_048_575, 1_048_576, 2_999_999])
def test_one_byte_makes_a_difference(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "block"
    with path.open("wb") as f:
        f.truncate(3_000_000)
    before = block_digest(path, 3_000_000)
    with path.open("r+b") as f:
        f.seek(offset)
        f.write(b"x")
    assert block_digest(path, 3_000_000) != before


def test_differences_look_at_in_sync_copies_only(tmp_path: Path) -> None:
    roots = {node: tmp_path / node for node in ("a", "b", "c")}
    for node, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (roots[node] / "disk").mkdir(parents=True)
        (roots[node] / "disk" / "0").write_bytes(content)
    replicas = {"a": {"status": 0}, "b": {"status": 2}, "c": {"status": 0}}
    placement = [{"first": 0, "last": 0, "replicas": replicas}]
    image = {
        "name": "disk",
        "size": 4096,
        "block_size": 4096,
        "writer": "a",
        "active": [[0, 0]],
        "placement": placement,
    }
    assert differences(image, roots, str) == (2, [])
    replicas["b"]["status"] = 0
    copies, found = differences(image, roots, str)
    assert copies == 3
    assert [d.block_index for d in found] == [0]
    assert differences({**image, "writer": None}, roots, str) == (3, [])


def test_log_lines_that_are_not_ours_are_serious(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "127.0.0.1-metad.log")
    fields = {"time": 1.0, "node": "127.0.0.1", "process": "metad", "logger": "x", "message": "hello"}
    lines = [json.dumps({**fields, "level": level}) for level in ("info", "warning")]
    log.path.write_text("\n".join([*lines, "Traceback (most recent call last):", "half a li"]))
    assert [line.serious for line in log.news()] == [False, True, True]
    assert list(log.news()) == []


def test_port_ranges_do_not_meet() -> None:
    one, two = PortRange(["127.0.0.1"], 6), PortRange(["127.0.0.1"], 6)
    try:
        assert abs(one.first - two.first) >= 6
    finally:
        one.close()
        two.close()


def test_waiting_in_vain_says_for_what() -> None:
    with pytest.raises(AssertionError, match=r"0\.1 s for rain in vain\nall dry"):
        wait_for(lambda: False, "rain", 0.1, lambda: "all dry")


@pytest.mark.fuse
def test_a_disk_fails_as_it_is_told_to(tmp_path: Path) -> None:
    with FaultFilesystem(tmp_path / "faulty") as disk:
        path = disk.where / "file"
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            os.pwrite(fd, b"a" * 8192, 0)
            os.fdatasync(fd)
            for kind, nth, error in (("EIO", 2, errno.EIO), ("ENOSPC", 2, errno.ENOSPC), ("torn", 2, errno.EIO)):
                disk.arm(kind, nth)
                os.pwrite(fd, b"b" * 100, 0)
                with pytest.raises(OSError, match=r"error|space") as failed:
                    os.pwrite(fd, b"c" * 100, 4096)
                assert (failed.value.errno, disk.fired) == (error, "write /file")
                os.pwrite(fd, b"b" * 100, 0)
            assert os.pread(fd, 100, 4096) == b"c" * 50 + b"a" * 50, "the torn write, and no other"
            disk.arm("short", 1, match="other")
            assert os.pread(fd, 100, 0) == b"b" * 100
            disk.arm("short", 1)
            assert os.pread(fd, 100, 0) == b"b" * 50
            disk.copy_after_power_cut(disk.where, tmp_path / "copy")
            assert (tmp_path / "copy" / "file").read_bytes() == b"a" * 8192
            disk.arm("sync", 1, lose=True)
            os.pwrite(fd, b"d" * 100, 9000)
            with pytest.raises(OSError, match="Input/output"):
                os.fsync(fd)
            os.fsync(fd)
            assert path.read_bytes() == b"a" * 8192
            assert [(one.call, one.good) for one in disk.done if one.call == "fsync"] == [
                ("fsync", False),
                ("fsync", True),
            ]
            assert os.listdir(disk.where) == ["file"]
            path.unlink()
            assert os.fstat(fd).st_nlink == 0
            assert os.listdir(disk.where) == []
        finally:
            os.close(fd)
    assert not mount_answers(disk.where)
