"""Images with replication flush: what an fsync has completed is everywhere, the rest only where it may be lost (R7)."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.machine import process_state, wait_for
from tests.processes.guest import (
    MARKED,
    QUICK,
    MakeCluster,
    Recorder,
    create,
    in_sync,
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
def create_on_two(cluster: Cluster) -> tuple[Path, Path]:
    """At the hypervisor where it is used first, and at the one that it moves to."""
    disk = create_flush(cluster, hypervisors=(1, 3))
    wait_shown(cluster, "disk", 3)
    return disk, cluster.path("disk", 3)


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


SMALL = 4096
POSTS = 16
PATIENT = {**QUICK, "replica_timeout": 15, "lease": 15, "io_timeout": 30, "active_idle": 60}
"""A blockd may be frozen for a while, and what it has lent stays lent."""


def posted(cluster: Cluster, guest: int) -> dict[int, bytes]:
    """Freeze the guest's blockd; writes that are acknowledged all the same: offset → data."""
    os.pwrite(guest, bytes(2 * MIB), 0)
    os.fsync(guest)
    for at in range(0, POSTS * SMALL, SMALL):  # by the last one at the latest the frontend has the loan
        os.pwrite(guest, b"old" + bytes(SMALL - 3), at)
    os.fsync(guest)
    cluster.stop(1, "blockd")
    data = {at: os.urandom(SMALL) for at in range(0, POSTS * 2 * SMALL, 2 * SMALL)}
    for at, piece in data.items():
        os.pwrite(guest, piece, at)
    return data


def check_posted(disk: Path, data: dict[int, bytes]) -> None:
    found = read_all(disk)
    assert {at: found[at : at + SMALL] for at in data} == data


@pytest.mark.expect_log(MARKED)
@pytest.mark.expect_log("blockd")
def test_what_is_posted_outlives_its_blockd(make_cluster: MakeCluster) -> None:
    """It was acknowledged and never read from the socket: it is sent to the next one."""
    cluster = make_cluster(nodes=2, settings=PATIENT)
    disk = create_flush(cluster)
    with disk.open("r+b", buffering=0) as guest:
        data = posted(cluster, guest.fileno())
        cluster.kill(1, "blockd")
        cluster.start(1, "blockd")
        assert os.pread(guest.fileno(), SMALL, 0) == data[0], "sent again or not"
        os.fsync(guest.fileno())
        check_posted(disk, data)
    in_sync(cluster, "disk")
    check_posted(disk, data)
    cluster.compare_replicas("disk")


@pytest.mark.expect_log(r"open handles are closed")
def test_what_is_posted_outlives_its_frontend(make_cluster: MakeCluster) -> None:
    """It is in the socket, and blockd reads that to its end."""
    cluster = make_cluster(nodes=2, settings=PATIENT)
    disk = create_flush(cluster)
    guest = os.open(disk, os.O_RDWR)
    try:
        data = posted(cluster, guest)
        cluster.kill(1, "frontend")
        cluster.cont(1, "blockd")
    finally:
        with contextlib.suppress(OSError):  # its mount is gone
            os.close(guest)
    cluster.start(1, "frontend")
    wait_shown(cluster, "disk")
    check_posted(disk, data)
    wait_for(lambda: not cluster.image("disk")["writer"], "the role given back", 30, cluster.tails)
    cluster.compare_replicas("disk")


def test_an_overlapping_write_waits_for_what_is_posted(make_cluster: MakeCluster) -> None:
    """And so does what is as large as to be sent the usual way, a discard, and an fsync."""
    cluster = make_cluster(nodes=2, settings=PATIENT)
    disk = create_flush(cluster)
    with disk.open("r+b", buffering=0) as guest, ThreadPoolExecutor(3) as beside:
        fd = guest.fileno()
        data = posted(cluster, fd)
        last = 2 * SMALL * (POSTS - 1)
        small = beside.submit(os.pwrite, fd, b"newer", 0)
        large = beside.submit(os.pwrite, fd, b"newest" * 20_000, SMALL)
        read = beside.submit(os.pread, fd, SMALL, last)
        time.sleep(0.3)
        assert not any((small.done(), large.done(), read.done()))
        cluster.cont(1, "blockd")
        assert (small.result(30), large.result(30)) == (5, 120_000)
        assert read.result(30) in (data[last], (b"newest" * 20_000)[last - SMALL : last])
        os.fsync(fd)
        assert os.pread(fd, SMALL + 6, 0) == b"newer" + data[0][5:] + b"newest"
    cluster.compare_replicas("disk")


def test_switched_off_nothing_is_posted(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=2, settings={**PATIENT, "posted_writes": "false"})
    disk = create_flush(cluster)
    with disk.open("r+b", buffering=0) as guest, ThreadPoolExecutor(1) as beside:
        writes = beside.submit(posted, cluster, guest.fileno())
        pid = cluster.process(1, "blockd").pid
        wait_for(lambda: process_state(pid) == "T", "blockd frozen", 20, cluster.tails)
        time.sleep(0.3)
        assert not writes.done()
        cluster.cont(1, "blockd")
        check_posted(disk, writes.result(30))


def test_what_is_posted_moves_with_the_role(make_cluster: MakeCluster) -> None:
    """A machine writes all the time, without an fsync, while its image is migrated: what it was told of is there."""
    cluster = make_cluster(nodes=3, frontends=(1, 3), settings=QUICK)
    cluster.expect_log(r"write of disk failed")
    disk, there = create_on_two(cluster)
    with disk.open("r+b", buffering=0) as guest, ThreadPoolExecutor(1) as beside:
        os.pwrite(guest.fileno(), bytes(16 * MIB), 0)
        written: list[int] = []

        def write() -> None:
            for number in itertools.count(1):
                try:
                    os.pwrite(guest.fileno(), number.to_bytes(8, "big") * (SMALL // 8), number * SMALL % (16 * MIB))
                except OSError:
                    return
                written.append(number)

        writer = beside.submit(write)
        wait_for(lambda: len(written) > 1000, "writes under way", 30, cluster.tails)
        cluster.ctl("migrate", "disk", cluster.node(3))
        writer.result(30)
        found = read_all(there)
    for number in written[-16 * MIB // SMALL :]:
        at = number * SMALL % (16 * MIB)
        value = int.from_bytes(found[at : at + 8], "big")
        assert value == number, f"{written[-1] - number} writes before the last one"
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
    disk, there = create_on_two(cluster)
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
    disk, there = create_on_two(cluster)
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
