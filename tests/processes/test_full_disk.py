"""Disks without space: of one copy, of the last one, of metad, of the target of a resync (R10)."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster, CtlError
from tests.machine import tool, unmount
from tests.processes.guest import (
    MARKED,
    QUICK,
    MakeCluster,
    create,
    out_of_sync,
    read_all,
    read_at,
    replicas,
    sync,
    write_at,
)

pytestmark = [pytest.mark.cluster, pytest.mark.fuse]

BLOCK = 1 << 20
SMALL_BYTES = 48 << 20


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 48 MiB on a loop device."""
    image, where = tmp_path / "small.img", tmp_path / "small"
    with image.open("wb") as file:
        file.truncate(SMALL_BYTES)
    subprocess.run([tool("mkfs.ext4"), "-q", "-m", "0", "-O", "^has_journal", image], check=True)
    where.mkdir()
    subprocess.run(["mount", "-o", "loop", image, where], check=True)
    try:
        yield where
    finally:
        unmount(where)


def fill(where: Path, leave_bytes: int = 8 << 20) -> Path:
    """A file that takes all the space but a rest."""
    filler = where / "filler"
    stats = os.statvfs(where)
    free = stats.f_bavail * stats.f_frsize
    with filler.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, free - max(leave_bytes, BLOCK))
        if not leave_bytes:
            file.seek(0, os.SEEK_END)
            with contextlib.suppress(OSError):  # there is none left
                while True:
                    file.write(bytes(4096))
    return filler


def place(small: Path, tmp_path: Path, node: int) -> None:
    """The data of a node of the first cluster go to the small filesystem."""
    own = tmp_path / "cluster0" / f"127.0.0.{node}"
    own.mkdir(parents=True)
    (small / "data").mkdir()
    (own / "data").symlink_to(small / "data")


@pytest.mark.expect_log(MARKED)
@pytest.mark.expect_log(r"last copy|(write|fsync) of solo failed")
@pytest.mark.parametrize("node", [1, 2], ids=["local", "remote"])
def test_full_disk(small_filesystem: Path, make_cluster: MakeCluster, tmp_path: Path, node: int) -> None:
    """One replica without space is degraded; the last one is ENOSPC, still readable, and goes on later (R10)."""
    place(small_filesystem, tmp_path, node)
    cluster = make_cluster(nodes=2, settings=QUICK)
    pair, solo = create(cluster, "pair"), create(cluster, "solo", locations=(node,))
    kept = os.urandom(2 * BLOCK)
    write_at(solo, 0, kept)
    filler = fill(small_filesystem)

    content = os.urandom(16 * BLOCK)
    for at in range(0, len(content), BLOCK):
        write_at(pair, at, content[at : at + BLOCK])
    lost = out_of_sync(cluster, "pair", node)
    assert lost, "the small disk was to be full"
    assert out_of_sync(cluster, "pair", 3 - node) == set()
    shown = replicas(cluster, "pair", node)
    assert all("No space left" in shown[block]["reason"] for block in lost), shown
    assert read_all(pair) == content

    with pytest.raises(OSError, match="No space left") as refused:
        write_at(solo, 2 * BLOCK, os.urandom(14 * BLOCK))
    assert refused.value.errno == errno.ENOSPC
    assert cluster.image("solo")["health"] == "ok", "the last copy stays (R9)"
    assert read_all(solo)[: len(kept)] == kept
    write_at(solo, 0, kept[::-1])  # where there is space already
    assert read_all(solo)[: len(kept)] == kept[::-1]

    filler.unlink()
    write_at(solo, 2 * BLOCK, content[: 4 * BLOCK])
    assert read_all(solo)[2 * BLOCK : 6 * BLOCK] == content[: 4 * BLOCK]
    sync(cluster, "pair")
    cluster.wait_image("pair", "ok")
    assert read_all(pair) == content
    assert cluster.compare_replicas() == 32 + 16


@pytest.mark.expect_log(r"(write|fsync) of disk failed")
def test_what_is_posted_to_a_full_disk_is_written_when_there_is_space(
    small_filesystem: Path, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    """Until then each fsync says that there is none, and what was acknowledged is read (R7, R10)."""
    place(small_filesystem, tmp_path, 1)
    cluster = make_cluster(nodes=1, settings={**QUICK, "active_idle": 60, "lease": 15, "replica_timeout": 15})
    disk = create(cluster, locations=(1,), options=("--replication", "flush"))
    piece, count = os.urandom(4096), 16
    with disk.open("r+b", buffering=0) as guest:
        fd = guest.fileno()
        for at in range(0, count * 4096, 4096):
            os.pwrite(fd, b"first" + bytes(4091), at)
        os.fsync(fd)
        filler = fill(small_filesystem, 0)
        cluster.stop(1, "blockd")
        os.pwrite(fd, piece, BLOCK // 2)
        cluster.cont(1, "blockd")
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                os.fsync(fd)
            assert os.pread(fd, 4096, BLOCK // 2) == piece
        filler.unlink()
        os.fsync(fd)
        assert os.pread(fd, 4096, BLOCK // 2) == piece
    assert read_at(disk, BLOCK // 2, 4096) == piece


@pytest.mark.expect_log(r"resync of image disk: failed: .*No space left|out-of-sync: resync interrupted")
def test_resync_onto_a_full_disk(small_filesystem: Path, make_cluster: MakeCluster, tmp_path: Path) -> None:
    """It fails and says why, harms nobody, and goes well when there is space."""
    place(small_filesystem, tmp_path, 2)
    cluster = make_cluster(nodes=2, settings=QUICK)
    disk = create(cluster, locations=(1,))
    content = os.urandom(16 * BLOCK)
    write_at(disk, 0, content)
    filler = fill(small_filesystem)
    cluster.ctl("location", "add", "disk", cluster.node(2))
    with pytest.raises(CtlError, match="No space left"):
        cluster.ctl("sync", "start", "disk", "--wait", "--timeout", "30")
    assert out_of_sync(cluster, "disk", 2)
    write_at(disk, 0, content[::-1])
    assert read_all(disk) == content[::-1]
    assert out_of_sync(cluster, "disk", 1) == set()
    filler.unlink()
    sync(cluster, "disk")
    cluster.wait_image("disk", "ok")
    assert cluster.compare_replicas() == 32


def test_a_writer_moves_though_the_disks_are_full(
    small_filesystem: Path, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    """The new epoch is stored where there is no room for another file (R1, R10)."""
    place(small_filesystem, tmp_path, 2)
    cluster = make_cluster(nodes=2, frontends=(1, 2), settings=QUICK)
    create(cluster, hypervisors=(1, 2))
    write_at(cluster.path("disk", 1), 0, os.urandom(BLOCK))
    epoch = cluster.image("disk")["epoch"]
    filler = fill(small_filesystem, 0)
    with pytest.raises(OSError, match="No space left"):
        (small_filesystem / "more").write_bytes(bytes(65536))
    for node in (2, 1, 2):
        content = os.urandom(4096)
        write_at(cluster.path("disk", node), 8192, content)
        assert read_at(cluster.path("disk", 3 - node), 8192, 4096) == content
    assert cluster.image("disk")["epoch"] >= epoch + 3
    assert out_of_sync(cluster, "disk", 2) == set()
    filler.unlink()


def fill_metadata(cluster: Cluster) -> list[str]:
    """Make images until metad has no space for another; the names of those that were acknowledged."""
    made: list[str] = []
    while len(made) < 3000:
        name = f"image{len(made)}"
        reply = cluster.try_ask(
            "image.create", 10.0, name=name, size=4096, block_size=4096, locations=[cluster.node(1)], hypervisors=[]
        )
        assert reply is not None
        if "err" in reply:
            assert "full" in reply["msg"], reply
            return made
        made.append(name)
    raise AssertionError("the disk of metad was to be full")


@pytest.mark.expect_log(r"database or disk is full|disk I/O error|write of disk failed: not done within the time")
def test_metad_without_space(small_filesystem: Path, make_cluster: MakeCluster) -> None:
    """What was acknowledged stays, what can't be stored is refused, running machines go on, and so does metad later."""
    cluster = make_cluster(nodes=2, settings={**QUICK, "metadata_root": small_filesystem / "metadata", "io_timeout": 8})
    disk = create(cluster)
    kept = os.urandom(BLOCK)
    with disk.open("r+b", buffering=0) as guest:
        os.pwrite(guest.fileno(), kept, 0)
        filler = fill(small_filesystem, 0)
        made = fill_metadata(cluster)
        os.pwrite(guest.fileno(), kept[::-1], 0)  # an active block needs no metad
        os.fsync(guest.fileno())
        assert os.pread(guest.fileno(), BLOCK, 0) == kept[::-1]
        with pytest.raises(OSError, match=r"error|space") as refused:  # noqa: PT012  # each may be the one
            for block in range(1, 16):
                os.pwrite(guest.fileno(), kept, block * BLOCK)
        assert refused.value.errno in (errno.EIO, errno.ENOSPC)
        assert set(cluster.images()) == {"disk", *made}
        filler.unlink()
        for block in range(16):
            os.pwrite(guest.fileno(), kept, block * BLOCK)
        os.fsync(guest.fileno())
    assert read_all(disk) == kept * 16
    cluster.ctl("image", "create", "later", "--size", "1M", "--location", cluster.node(1))
    cluster.restart(1, "metad")
    assert set(cluster.images()) == {"disk", "later", *made}
    cluster.wait_image("disk", "ok")
