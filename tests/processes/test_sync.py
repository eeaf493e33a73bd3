"""Replicas come back in sync while the guest writes (R11), the last copy stays (R9), a disk moves while in use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.cluster import Cluster, CtlError
from tests.machine import wait_for
from tests.processes.guest import (
    MARKED,
    QUICK,
    MakeCluster,
    Recorder,
    create,
    fio,
    fio_ends_well,
    out_of_sync,
    read_all,
    sync,
    wait_shown,
    wait_unavailable,
    write_at,
)
from tests.processes.recorder import RECORD_BYTES

pytestmark = [pytest.mark.cluster, pytest.mark.fuse, pytest.mark.expect_log(MARKED)]

MIB = 1 << 20
CHUNK = 64 << 10
SETTINGS = {**QUICK, "sync_chunk": CHUNK}


def missed(cluster: Cluster, disk: Path, writes: dict[int, bytes]) -> None:
    """Writes (offset → data) that node 2 misses: its blockd is down meanwhile."""
    cluster.kill(2, "blockd")
    for offset, data in writes.items():
        write_at(disk, offset, data)
    cluster.start(2, "blockd")
    wait_unavailable(cluster)


def in_sync(cluster: Cluster) -> int:
    """How many blocks of node 2 are in-sync."""
    count: int = cluster.image("disk")["locations"][cluster.node(2)]["in_sync"]
    return count


def test_only_what_differs_is_copied(make_cluster: MakeCluster) -> None:
    """Figures of ``sync status``: of three blocks one chunk differs in each; holes are told from equal data."""
    cluster = make_cluster(nodes=2, settings=SETTINGS)
    disk = create(cluster, size="8M")
    write_at(disk, 0, os.urandom(4 * MIB))
    write_at(disk, 5 * MIB, b"a few bytes of a block that is a hole else")
    missed(cluster, disk, {0: b"1", 2 * MIB + 3 * CHUNK: b"2", 5 * MIB + 5 * CHUNK + 7: b"3"})
    assert out_of_sync(cluster, "disk", 2) == {0, 2, 5}
    sync(cluster, "disk")
    (job,) = cluster.ctl("sync", "status", "disk")["jobs"]
    assert job["state"] == "done"
    assert job["blocks_total"] == job["blocks_done"] == 3
    assert job["bytes_total"] == job["bytes_done"] == 3 * MIB
    assert job["bytes_copied"] == 3 * CHUNK
    assert job["bytes_equal"] == 2 * (MIB - CHUNK) + CHUNK
    assert job["bytes_hole"] == MIB - 2 * CHUNK
    cluster.wait_image("disk", "ok")
    assert cluster.compare_replicas("disk") == 16
    again = sync(cluster, "disk")
    assert again["bytes_total"] == 0


def test_node_and_blocks(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=3, settings=SETTINGS)
    disk = create(cluster, size="8M", locations=(1, 2, 3))
    write_at(disk, 0, os.urandom(8 * MIB))
    cluster.kill(2, "blockd")
    cluster.kill(3, "blockd")
    write_at(disk, 0, os.urandom(8 * MIB))
    cluster.start_all()
    wait_unavailable(cluster)
    every = set(range(8))
    assert (out_of_sync(cluster, "disk", 2), out_of_sync(cluster, "disk", 3)) == (every, every)
    sync(cluster, "disk", "--node", cluster.node(3), "--blocks", "2-3,6")
    assert (out_of_sync(cluster, "disk", 2), out_of_sync(cluster, "disk", 3)) == (every, every - {2, 3, 6})
    sync(cluster, "disk", "--node", cluster.node(2))
    assert (out_of_sync(cluster, "disk", 2), out_of_sync(cluster, "disk", 3)) == (set(), every - {2, 3, 6})
    sync(cluster, "disk")
    assert cluster.compare_replicas("disk") == 24


def test_sync_under_fio_stopped_and_taken_up(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=2, settings=SETTINGS)
    disk = create(cluster, size="32M")
    write_at(disk, 0, os.urandom(32 * MIB))
    missed(cluster, disk, {at: os.urandom(MIB) for at in range(0, 32 * MIB, MIB)})
    assert len(out_of_sync(cluster, "disk", 2)) == 32
    with fio(disk, "32M", "--time_based", "--runtime=6", "--rate_iops=,600") as guest:
        cluster.ctl("sync", "start", "disk", "--rate", "8M")
        wait_for(lambda: in_sync(cluster) > 2, "some blocks in sync", 20, cluster.tails)
        running = cluster.ctl("sync", "status", "disk")["jobs"][0]
        assert running["state"] == "running"
        assert 0 < running["bytes_done"] < running["bytes_total"] == 32 * MIB
        assert running["rate_limit"] == 8 * MIB
        with pytest.raises(CtlError, match="under way") as refused:
            cluster.ctl("sync", "start", "disk")
        assert refused.value.code == 1
        cluster.ctl("sync", "stop", "disk")

        def still() -> bool:
            locations = cluster.image("disk")["locations"]
            return all(counts["syncing"] == 0 for counts in locations.values())

        wait_for(still, "nothing syncing after the stop", 10, cluster.tails)
        assert cluster.ctl("sync", "status", "disk")["jobs"][0]["state"] == "stopped"
        left = out_of_sync(cluster, "disk", 2)
        assert 0 < len(left) < 32
        assert guest.poll() is None, "fio was to write meanwhile"
        job = sync(cluster, "disk")
        assert job["bytes_total"] == len(left) * MIB, "it is taken up where it stopped"
        assert guest.poll() is None, "fio was to write meanwhile"
        fio_ends_well(guest)
    cluster.wait_image("disk", "ok")
    assert cluster.compare_replicas("disk") == 64


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_target_lost_in_the_middle(make_cluster: MakeCluster, number: signal.Signals) -> None:
    """Never syncing for ever; the reason is shown, and the order goes on by itself when the node is back."""
    cluster = make_cluster(nodes=2, settings=SETTINGS)
    disk = create(cluster, size="32M")
    write_at(disk, 0, os.urandom(32 * MIB))
    content = os.urandom(32 * MIB)
    missed(cluster, disk, {at: content[at : at + MIB] for at in range(0, 32 * MIB, MIB)})
    cluster.ctl("sync", "start", "disk", "--rate", "8M")
    wait_for(lambda: in_sync(cluster) > 2, "some blocks in sync", 20, cluster.tails)
    if number == signal.SIGKILL:
        cluster.kill(2, "blockd")
    else:
        cluster.stop(2, "blockd")

    def waiting() -> str:
        job = cluster.ctl("sync", "status", "disk")["jobs"][0]
        reason: str = job["reason"] if job["state"] == "waiting" else ""
        return reason

    assert cluster.node(2) in wait_for(waiting, "a reason why the resync stands still", 20, cluster.tails)
    image = cluster.image("disk")
    assert image["locations"][cluster.node(2)]["syncing"] == 0
    assert 0 < image["locations"][cluster.node(2)]["out_of_sync"] < 32
    assert read_all(disk) == content
    if number == signal.SIGKILL:
        cluster.start(2, "blockd")
    else:
        cluster.cont(2, "blockd")
    cluster.ctl("sync", "rate", "disk", "none")
    cluster.wait_image("disk", "ok")
    assert read_all(disk) == content
    assert cluster.compare_replicas("disk") == 64


def test_the_last_copy_stays(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=2, settings=SETTINGS)
    disk = create(cluster, size="8M")
    content = os.urandom(8 * MIB)
    write_at(disk, 0, content)
    missed(cluster, disk, {at: content[at : at + MIB] for at in (2 * MIB, 3 * MIB, 6 * MIB)})
    before = cluster.image("disk")["placement"]
    files = sorted(p.name for p in (cluster.data_root(1) / "disk").iterdir())
    for command in (["location", "remove"], ["remove_location"]):
        done = cluster.ctl_run(*command, "disk", cluster.node(1))
        assert done.returncode == 1
        assert "2-3,6" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    assert cluster.image("disk")["placement"] == before
    assert sorted(p.name for p in (cluster.data_root(1) / "disk").iterdir()) == files
    cluster.ctl("location", "remove", "disk", cluster.node(1), "--blocks", "0-1")  # there is another copy of these
    assert read_all(disk) == content
    sync(cluster, "disk")
    cluster.ctl("location", "remove", "disk", cluster.node(1))
    assert not (cluster.data_root(1) / "disk").exists()
    assert read_all(disk) == content
    assert cluster.compare_replicas("disk") == 8


def test_disk_moves_while_in_use(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """From node 1 to node 3, under a guest that writes; then it is opened there."""
    cluster = make_cluster(nodes=3, frontends=(1, 3), settings=SETTINGS)
    disk = create(cluster, size="16M", locations=(1,), hypervisors=(1, 3))
    content = os.urandom(8 * MIB)
    write_at(disk, 8 * MIB, content)
    with Recorder(disk, tmp_path / "log", step=16, count=8 * MIB // RECORD_BYTES // 16) as writer:
        writer.wait_written(10)
        cluster.ctl("location", "add", "disk", cluster.node(3))
        assert out_of_sync(cluster, "disk", 3) == set(range(16)), "a new location is out-of-sync at first"
        writer.wait_written(10)
        sync(cluster, "disk")
        writer.wait_written(10)
        cluster.ctl("location", "remove", "disk", cluster.node(1))
        writer.wait_written(10)
        writer.end()
    assert set(cluster.image("disk")["locations"]) == {cluster.node(3)}
    assert not (cluster.data_root(1) / "disk").exists()
    wait_shown(cluster, "disk", 3)
    there = cluster.path("disk", 3)
    assert writer.check(there)
    assert read_all(there)[8 * MIB :] == content
    write_at(there, 0, b"written on node 3")
    assert cluster.image("disk")["writer"] == cluster.node(3)
