"""The writer role moves: from a dead or frozen node, and by order (R1–R3)."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from tests.cluster import CtlError
from tests.machine import wait_for
from tests.processes.guest import (
    MARKED,
    QUICK,
    MakeCluster,
    Recorder,
    create,
    read_all,
    read_at,
    sync,
    wait_shown,
    write_at,
)

pytestmark = [pytest.mark.cluster, pytest.mark.fuse]

MIB = 1 << 20


@pytest.mark.expect_log(MARKED)
@pytest.mark.expect_log(r"(write|fsync) of disk failed|open handles are closed")
@pytest.mark.parametrize("what", ["blockd", "node"])
def test_frozen_writer_is_fenced(make_cluster: MakeCluster, what: str) -> None:
    """Thawed, the old writer gets EIO and changes nothing."""
    cluster = make_cluster(nodes=3, frontends=(1, 3), settings=QUICK)
    disk = create(cluster, locations=(1, 2), hypervisors=(1, 3))
    there = cluster.path("disk", 3)
    old = os.urandom(2 * MIB)
    write_at(disk, 0, old)
    frozen = ["blockd"] if what == "blockd" else ["frontend", "blockd"]
    with disk.open("r+b", buffering=0) as guest:
        assert os.pwrite(guest.fileno(), b"the old writer", 4 * MIB) == 14
        os.fsync(guest.fileno())
        assert cluster.image("disk")["writer"] == cluster.node(1)
        for name in frozen:
            cluster.stop(1, name)
        write_at(there, 0, b"the new writer")
        image = cluster.image("disk")
        assert image["writer"] == cluster.node(3)
        assert read_all(there)[: 2 * MIB] == b"the new writer" + old[14:]
        assert read_at(there, 4 * MIB, 14) == b"the old writer"
        for name in reversed(frozen):
            cluster.cont(1, name)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error") as refused:
                os.pwrite(guest.fileno(), b"too late", 0)
            assert refused.value.errno == errno.EIO
        assert cluster.image("disk")["writer"] == cluster.node(3)
        assert os.pread(guest.fileno(), 14, 0) == b"the new writer", "a stale handle reads what there is"
    assert read_all(there)[: 2 * MIB] == b"the new writer" + old[14:]
    sync(cluster, "disk")
    cluster.wait_image("disk", "ok")
    assert cluster.compare_replicas("disk") == 32
    with disk.open("r+b", buffering=0) as guest:  # opened anew, it is a writer like any other
        os.pwrite(guest.fileno(), b"anew", 0)
        os.fsync(guest.fileno())
    assert read_all(there)[:4] == b"anew"


@pytest.mark.expect_log(MARKED)
@pytest.mark.expect_log(r"(write|fsync) of disk failed|open handles are closed|blockd")
def test_killed_writer_node(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """All of the writer's node dies under load; on another hypervisor the image has all that was acknowledged."""
    cluster = make_cluster(nodes=3, frontends=(2, 3), settings=QUICK)
    disk = create(cluster, locations=(2, 3), hypervisors=(2, 3))
    there = cluster.path("disk", 3)
    with Recorder(disk, tmp_path / "log", step=61, count=67) as writer:
        writer.wait_written(100)
        for name in ("blockd", "frontend"):
            cluster.process(2, name).signal(signal.SIGKILL)
        for name in ("blockd", "frontend"):
            cluster.process(2, name).wait()
        assert writer.popen.wait(30) == 1
    writer.check(there, exact=False)
    write_at(there, 15 * MIB, b"on the other hypervisor")
    assert cluster.image("disk")["writer"] == cluster.node(3)
    cluster.start_all()
    sync(cluster, "disk")
    cluster.wait_image("disk", "ok")
    assert cluster.compare_replicas("disk") == 32
    writer.check(there, exact=False)


@pytest.mark.expect_log(r"write of disk failed")
def test_no_copy_no_takeover(make_cluster: MakeCluster) -> None:
    """The only in-sync copy is on the dead node: refused, and the message names the node (R3)."""
    cluster = make_cluster(nodes=3, frontends=(1, 3), settings={**QUICK, "io_timeout": 5})
    disk = create(cluster, locations=(2,), hypervisors=(1, 3))
    write_at(disk, 0, b"only here")
    cluster.kill(2, "blockd")
    with pytest.raises(OSError, match="Input/output error"):
        write_at(cluster.path("disk", 3), 0, b"never")
    cluster.wait_log(r"write of disk failed.*needs node 127\.0\.0\.2")
    cluster.start(2, "blockd")
    assert read_all(cluster.path("disk", 3))[:9] == b"only here"


def test_migrate_command(make_cluster: MakeCluster) -> None:
    """The role goes to the node named; handles of the old writer get EIO, those opened before at the new one work."""
    cluster = make_cluster(nodes=3, frontends=(1, 3), settings=QUICK)
    cluster.expect_log(r"write of disk failed")
    disk = create(cluster, locations=(1, 2), hypervisors=(1, 3))
    there = cluster.path("disk", 3)
    wait_shown(cluster, "disk", 3)
    with disk.open("r+b", buffering=0) as source, there.open("r+b", buffering=0) as destination:
        os.pwrite(source.fileno(), b"source", 0)
        assert os.pread(destination.fileno(), 6, 0) == b"source", "opening and reading is not owning (R2)"
        assert cluster.image("disk")["writer"] == cluster.node(1)
        os.pwrite(source.fileno(), b"Source", 0)
        epoch = cluster.image("disk")["epoch"]
        moved = cluster.ctl("migrate", "disk", cluster.node(3))["image"]
        assert moved["writer"] == cluster.node(3)
        assert moved["epoch"] > epoch
        os.pwrite(destination.fileno(), b"there", 10)
        assert os.pread(destination.fileno(), 6, 0) == b"Source"
        with pytest.raises(OSError, match="Input/output error"):
            os.pwrite(source.fileno(), b"again", 0)
        with pytest.raises(CtlError, match="no hypervisor") as refused:
            cluster.ctl("migrate", "disk", cluster.node(2))
        assert refused.value.code == 1
    assert cluster.image("disk")["health"] == "ok"
    wait_for(lambda: not cluster.image("disk")["writer"], "the role given back", 10, cluster.tails)
