"""What people use on a disk image works on the mount: QEMU's tools, dd, fio, ext4 with discard, du."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.machine import tool, unmount, wait_for
from tests.processes.guest import (
    QUICK,
    MakeCluster,
    create,
    fio,
    fio_ends_well,
    read_all,
    read_at,
    replicas,
    write_at,
)

pytestmark = [pytest.mark.cluster, pytest.mark.fuse]

MIB = 1 << 20
ODD = "50000000"
"""The original page's block size, no multiple of 4096."""


def run(*command: str | Path) -> str:
    """What the command printed.  Raises AssertionError when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def allocated(cluster: Cluster, image: str) -> list[int]:
    """Bytes that the block files of an image take on each node."""
    found = []
    for address in cluster.addresses:
        files = (cluster.data_root(address) / image).glob("[0-9]*")
        found.append(sum(path.stat().st_blocks * 512 for path in files))
    return found


@pytest.fixture
def pair(make_cluster: MakeCluster, binding: str) -> Cluster:
    """Two nodes, each binding in turn."""
    return make_cluster(nodes=2, binding=binding, settings=QUICK)


def test_qemu_img(pair: Cluster, tmp_path: Path) -> None:
    """Converted in and out, compared, and told the truth about."""
    disk = create(pair, size="96M", block_size=ODD)
    raw, qcow2, out = tmp_path / "in.raw", tmp_path / "in.qcow2", tmp_path / "out.raw"
    with raw.open("wb") as file:
        file.truncate(96 * MIB)
        for offset in (0, 49_999_000, 90 * MIB + 512):
            os.pwrite(file.fileno(), os.urandom(2 * MIB + 512), offset)
    img = tool("qemu-img")
    run(img, "convert", "-f", "raw", "-O", "qcow2", raw, qcow2)
    run(img, "convert", "-n", "-t", "none", "-f", "qcow2", "-O", "raw", qcow2, disk)
    assert "identical" in run(img, "compare", "-f", "raw", "-F", "raw", raw, disk)
    run(img, "convert", "-T", "none", "-f", "raw", "-O", "raw", disk, out)
    assert "identical" in run(img, "compare", "-f", "raw", "-F", "raw", raw, out)
    info = json.loads(run(img, "info", "-f", "raw", "--output=json", disk))
    assert info["virtual-size"] == 96 * MIB
    here, there = allocated(pair, "disk")
    assert 6 * MIB <= here <= 12 * MIB, "what was sparse stays sparse"
    assert there == here
    wait_for(lambda: abs(disk.stat().st_blocks * 512 - here) <= 64 << 10, "a truthful st_blocks", 5)
    assert abs(json.loads(run(img, "info", "-f", "raw", "--output=json", disk))["actual-size"] - here) <= 64 << 10
    assert abs(int(run("du", "--block-size=1", disk).split()[0]) - here) <= 64 << 10


@pytest.mark.parametrize("aio", ["threads", "native", "io_uring"])
def test_qemu_io(pair: Cluster, aio: str) -> None:
    """Patterns with cache none, at odd places, over block borders; zeroed and discarded."""
    disk = create(pair, size="100M", block_size=ODD)
    orders = [
        "write -P 0x11 0 64k",
        "write -P 0x22 49999360 1M",  # blocks 0 and 1
        "aio_write -P 0x33 60M 512k",
        "aio_write -P 0x44 62M 4k",
        "aio_flush",
        "flush",
        "read -P 0x11 0 64k",
        "read -P 0x22 49999360 1M",
        "read -P 0x33 60M 512k",
        "read -P 0x44 62M 4k",
        "write -z 60M 256k",
        "discard 60M 128k",
        "discard 0 64k",
        "read -P 0 60M 256k",
        "read -P 0x33 61696k 256k",
        "read -P 0 0 64k",
        "read -P 0 99M 1M",
    ]
    command: list[str | Path] = [tool("qemu-io"), "-f", "raw", "-t", "none", "-i", aio, "-d", "unmap"]
    for order in orders:
        command += ["-c", order]
    printed = run(*command, disk)
    assert "failed" not in printed, printed
    assert pair.compare_replicas("disk") == 6


@pytest.mark.parametrize("block_size", ["4096", ODD, ""], ids=["4096", "odd", "default"])
def test_any_offset_and_length(pair: Cluster, block_size: str) -> None:
    """Reads and writes over block borders, at any offset; past the end short reads and ENOSPC."""
    size = 1 * MIB if block_size == "4096" else 160 * MIB
    disk = create(pair, size=str(size), block_size=block_size or "64M")
    border = int(block_size or 64 * MIB)
    model = bytearray(size)
    spots = [0, 1, border - 1, border, 2 * border - 3, size - 10_000]
    with disk.open("r+b", buffering=0) as guest:
        fd = guest.fileno()
        for spot in spots:
            for length in (1, 511, 4096, 9999):
                data = os.urandom(length)
                assert os.pwrite(fd, data, spot) == length
                model[spot : spot + length] = data
        for spot in spots:
            start = max(0, spot - 4097)
            assert os.pread(fd, 20_001, start) == model[start : start + 20_001]
        assert os.pread(fd, 5000, size - 100) == model[-100:]
        assert os.pread(fd, 100, size) == b""
        with pytest.raises(OSError, match="No space left"):
            os.pwrite(fd, b"past the end", size)
        os.fsync(fd)
    assert read_all(disk) == model
    copied = pair.root / "copy"
    run("dd", f"if={disk}", f"of={copied}", "bs=100001", "status=none")
    assert copied.read_bytes() == model
    run("dd", f"if={copied}", f"of={disk}", "bs=1M", "conv=notrunc,fsync", "oflag=direct", "status=none")
    assert read_all(disk) == model


def test_fio_verifies(pair: Cluster) -> None:
    disk = create(pair, size="32M", block_size="5000000")
    with fio(disk, "32M", "--bsrange=512-128k", "--blockalign=512", "--trim_percentage=0", "--loops=1") as guest:
        fio_ends_well(guest)


@contextlib.contextmanager
def loop_mount(disk: Path, where: Path) -> Iterator[Path]:
    """The image's filesystem, through a loop device."""
    where.mkdir(exist_ok=True)
    run("mount", "-o", "loop", disk, where)
    try:
        yield where
    finally:
        done = subprocess.run(["umount", where], capture_output=True, check=False)
        if done.returncode:
            unmount(where)
    assert done.returncode == 0, done.stderr


def test_ext4_with_discard(pair: Cluster, tmp_path: Path) -> None:
    """mkfs, loop mount, files, fsck, fstrim: what is deleted is freed in the block files of every replica."""
    disk = create(pair, size="128M", block_size="16M")
    run(tool("mkfs.ext4"), "-q", "-F", disk)
    fresh = allocated(pair, "disk")
    contents = {f"file{i}": os.urandom(4 * MIB) for i in range(6)}
    with loop_mount(disk, tmp_path / "fs") as fs:
        for name, data in contents.items():
            (fs / name).write_bytes(data)
        os.sync()
    run(tool("e2fsck"), "-f", "-n", disk)
    full = allocated(pair, "disk")
    assert all(f >= e + 24 * MIB for f, e in zip(full, fresh, strict=True))
    with loop_mount(disk, tmp_path / "fs") as fs:
        assert {name: (fs / name).read_bytes() for name in contents} == contents
        for name in contents:
            (fs / name).unlink()
        os.sync()
        run(tool("fstrim"), fs)
    run(tool("e2fsck"), "-f", "-n", disk)
    trimmed = allocated(pair, "disk")
    assert all(t <= f - 20 * MIB for t, f in zip(trimmed, full, strict=True)), (fresh, full, trimmed)
    assert pair.compare_replicas("disk") == 16


def test_fresh_image_takes_no_time_and_no_space(pair: Cluster) -> None:
    begun = time.monotonic()
    made = pair.ask("image.create", name="huge", size=100 << 30, block_size=64 << 20, locations=pair.addresses,
                    hypervisors=pair.addresses[:1])  # fmt: skip
    assert time.monotonic() - begun < 1
    assert made["image"]["blocks"] == 1600
    disk = pair.path("huge")
    wait_for(disk.exists, "huge in the mount", 10)
    assert disk.stat().st_size == 100 << 30
    assert disk.stat().st_blocks == 0
    assert allocated(pair, "huge") == [0, 0]
    assert int(run("du", "--block-size=1", disk).split()[0]) == 0
    write_at(disk, (100 << 30) - 5, b"ended")
    assert read_at(disk, (100 << 30) - 10, 100) == bytes(5) + b"ended"
    assert {b for b, r in replicas(pair, "huge", 2).items() if r["generation"]} == {1599}
    assert max(allocated(pair, "huge")) <= 64 << 10
    free = os.statvfs(pair.mount(1))
    real = os.statvfs(pair.data_root(1))
    assert abs(free.f_bavail * free.f_frsize - real.f_bavail * real.f_frsize) < 1 << 30
