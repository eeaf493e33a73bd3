"""Images with replication flush: what an fsync has completed is everywhere, the rest only where it may be lost (R7)."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.machine import wait_for
from tests.processes.guest import (
    MARKED,
    QUICK,
    MakeCluster,
    Recorder,
    create,
    out_of_sync,
    read_all,
    read_at,
    sync,
    wait_shown,
    write_at,
)
from tests.processes.test_links import ProxiedCluster
from tests.proxy import Proxy

pytestmark = [pytest.mark.cluster, pytest.mark.fuse]

MIB = 1 << 20
PIECE = 64 << 10


def create_flush(cluster: Cluster, locations: tuple[int, ...] = (1, 2), hypervisors: tuple[int, ...] = (1,)) -> Path:
    return create(cluster, locations=locations, hypervisors=hypervisors, options=("--replication", "flush"))


@pytest.mark.expect_log(MARKED)
@pytest.mark.expect_log(r"(write|fsync) of disk failed|open handles are closed|blockd")
def test_killed_writer_node(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """All of the writer's node dies under load; each record whose fsync was completed is on the other copy."""
    cluster = make_cluster(nodes=3, frontends=(2, 3), settings=QUICK)
    disk = create_flush(cluster, locations=(2, 3), hypervisors=(2, 3))
    there = cluster.path("disk", 3)
    with Recorder(disk, tmp_path / "log", step=61, count=67) as writer:
        writer.wait_written(100)
        for name in ("blockd", "frontend"):
            cluster.process(2, name).signal(signal.SIGKILL)
        for name in ("blockd", "frontend"):
            cluster.process(2, name).wait()
        assert writer.popen.wait(30) == 1
    writer.check(there, exact=False)
    cluster.start_all()
    sync(cluster, "disk")
    cluster.wait_image("disk", "ok")
    cluster.compare_replicas("disk")


def lag(cluster: Cluster) -> dict[str, float]:
    """What the writer's blockd publishes next of how far other copies are behind: metric → value, of image "disk"."""
    told = cluster.ctl("metrics", "--once", "--node", cluster.node(1), "--process", "blockd", "--name", "*_lag_*")
    assert all(item["labels"] == {"image": "disk"} for item in told["metrics"]), "only flush images can be behind"
    return {item["name"].removeprefix("ukai_replication_"): item["value"] for item in told["metrics"]}


@pytest.mark.parametrize(("size", "op", "messages"), [(PIECE, "w", 8), (4096, "wt", 1)])
def test_the_lag_is_in_the_metrics(tmp_path: Path, size: int, op: str, messages: int) -> None:
    """Bytes and requests that the other copy has not answered, until it has; small ones go several in a message."""
    behind, nothing = {"lag_bytes": 8 * size, "lag_requests": 8}, {"lag_bytes": 0, "lag_requests": 0}
    settings = {**QUICK, "replica_timeout": 15, "lease": 15, "active_idle": 60}  # no flush may overtake what is held
    with Proxy() as proxy, ProxiedCluster(tmp_path / "cluster", proxy, nodes=2, settings=settings) as cluster:
        other, disk = create(cluster, "other"), create_flush(cluster)
        write_at(other, 0, b"no copy of this one is ever behind")
        write_at(disk, 0, bytes(MIB))
        assert lag(cluster) == nothing
        with disk.open("r+b", buffering=0) as guest:
            held = proxy.rule("hold", op, client=cluster.node(1), server=cluster.node(2), count=-1)
            for at in range(0, 8 * size, size):
                os.pwrite(guest.fileno(), os.urandom(size), at)
            held.wait_met(messages)
            wait_for(lambda: lag(cluster) == behind, f"a lag of {behind}", 10, lambda: f"{lag(cluster)}")
            proxy.release(held)
            wait_for(lambda: lag(cluster) == nothing, "no lag once all is answered", 10, lambda: f"{lag(cluster)}")
            os.fsync(guest.fileno())
        assert out_of_sync(cluster, "disk", 2) == set()
        cluster.compare_replicas()


@pytest.mark.expect_log(MARKED)
@pytest.mark.expect_log("blockd")
def test_killed_blockd_loses_nothing(make_cluster: MakeCluster) -> None:
    """What only the local copy has outlives the blockd that acknowledged it, and the guest goes on."""
    cluster = make_cluster(nodes=2, settings={**QUICK, "replica_timeout": 10})
    disk = create_flush(cluster)
    data = os.urandom(2 * MIB)
    write_at(disk, 0, bytes(2 * MIB))
    with disk.open("r+b", buffering=0) as guest:
        cluster.stop(2, "blockd")
        for at in range(0, len(data), PIECE):
            os.pwrite(guest.fileno(), data[at : at + PIECE], at)
        assert out_of_sync(cluster, "disk", 2) == set(), "the frozen copy was to be behind, not given up"
        cluster.kill(1, "blockd")
        cluster.cont(2, "blockd")
        cluster.start(1, "blockd")
        assert os.pread(guest.fileno(), len(data), 0) == data
        os.pwrite(guest.fileno(), b"goes on", 0)
        os.fsync(guest.fileno())
    sync(cluster, "disk")
    cluster.wait_image("disk", "ok")
    assert read_all(disk)[: 2 * MIB] == b"goes on" + data[7:]
    cluster.compare_replicas("disk")


@pytest.mark.expect_log(MARKED)
def test_frozen_replica_fills_the_window(make_cluster: MakeCluster) -> None:
    """Writes go on at once until the window is full; then one pause, the mark, and they go on."""
    cluster = make_cluster(nodes=2, settings={**QUICK, "flush_window": MIB})
    disk = create_flush(cluster)
    data = os.urandom(4 * MIB)
    write_at(disk, 0, bytes(4 * MIB))
    pauses: list[tuple[int, float]] = []
    with disk.open("r+b", buffering=0) as guest:
        cluster.stop(2, "blockd")
        for at in range(0, len(data), PIECE):
            begun = time.monotonic()
            os.pwrite(guest.fileno(), data[at : at + PIECE], at)
            if time.monotonic() - begun > 0.5:
                pauses.append((at, time.monotonic() - begun))
        os.fsync(guest.fileno())
        assert pauses, "the window was to be filled"
        assert MIB - PIECE <= pauses[0][0] <= MIB + PIECE, pauses
        assert len(pauses) == 1, pauses
        assert os.pread(guest.fileno(), len(data), 0) == data
    assert out_of_sync(cluster, "disk", 2) >= {0, 1, 2, 3}, "and what was announced ahead"
    cluster.cont(2, "blockd")
    wait_for(lambda: not cluster.ctl("get_error_state")["nodes"], "the replica is back", 20, cluster.tails)
    sync(cluster, "disk")
    cluster.wait_image("disk", "ok")
    cluster.compare_replicas("disk")


def test_drained_before_the_role_moves(make_cluster: MakeCluster) -> None:
    """Nothing that was acknowledged is lost by migrate, nor by the change to sync under an open machine."""
    cluster = make_cluster(nodes=3, frontends=(1, 3), settings=QUICK)
    cluster.expect_log(r"write of disk failed")
    disk = create_flush(cluster, hypervisors=(1, 3))
    there = cluster.path("disk", 3)
    wait_shown(cluster, "disk", 3)
    data = os.urandom(8 * MIB)
    with disk.open("r+b", buffering=0) as guest:
        for at in range(0, len(data), PIECE):
            os.pwrite(guest.fileno(), data[at : at + PIECE], at)
        assert cluster.ctl("migrate", "disk", cluster.node(3))["image"]["writer"] == cluster.node(3)
        assert read_all(there)[: len(data)] == data
        assert cluster.image("disk")["health"] == "ok"
        with pytest.raises(OSError, match="Input/output error"):
            os.pwrite(guest.fileno(), b"too late", 0)
    with there.open("r+b", buffering=0) as guest:
        os.pwrite(guest.fileno(), b"early", 0)
        assert cluster.ctl("image", "set", "disk", "--replication", "sync")["image"]["replication"] == "sync"
        os.pwrite(guest.fileno(), b"late", 5)
        assert os.pread(guest.fileno(), 9, 0) == b"earlylate"
        cluster.ctl("image", "set", "disk", "--replication", "flush")
        os.pwrite(guest.fileno(), b"again", 9)
        os.fsync(guest.fileno())
    wait_for(lambda: not cluster.image("disk")["writer"], "the role given back", 10, cluster.tails)
    cluster.compare_replicas("disk")


@pytest.mark.expect_log(MARKED)
@pytest.mark.expect_log(r"(read|write|fsync) of disk failed|blockd")
def test_a_guest_whose_writes_are_gone_is_told(make_cluster: MakeCluster) -> None:
    """Another node takes the role, for reading alone, without the only copy that has them: EIO from then on (R2)."""
    cluster = make_cluster(nodes=3, frontends=(1, 3), settings={**QUICK, "replica_timeout": 10})
    disk = create_flush(cluster, hypervisors=(1, 3))
    there = cluster.path("disk", 3)
    wait_shown(cluster, "disk", 3)
    write_at(disk, 0, b"stored")
    with disk.open("r+b", buffering=0) as guest:
        os.pwrite(guest.fileno(), b"STORED", 0)
        os.fsync(guest.fileno())
        cluster.stop(2, "blockd")
        os.pwrite(guest.fileno(), b"gone!!", 0)
        assert os.pread(guest.fileno(), 6, 0) == b"gone!!"
        cluster.kill(1, "blockd")
        cluster.cont(2, "blockd")
        assert read_at(there, 0, 6) in (b"STORED", b"gone!!")
        cluster.start(1, "blockd")
        for request in (
            lambda: os.pread(guest.fileno(), 6, 0),
            lambda: os.pwrite(guest.fileno(), b"x", 0),
            lambda: os.fsync(guest.fileno()),
        ):
            with pytest.raises(OSError, match="Input/output error"):
                request()
    sync(cluster, "disk")
    cluster.wait_image("disk", "ok")
    assert read_all(disk) == read_all(there)
    cluster.compare_replicas("disk")
