"""``ukai-ctl verify`` on real processes: what was altered behind UKAI's back is found, marked and healed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, CtlError
from tests.machine import wait_for
from tests.processes.guest import (
    MARKED,
    QUICK,
    MakeCluster,
    create,
    fio,
    fio_ends_well,
    out_of_sync,
    read_all,
    read_at,
    replicas,
    sync,
    wait_shown,
    wait_unavailable,
    write_at,
)

pytestmark = [pytest.mark.cluster, pytest.mark.fuse, pytest.mark.expect_log(MARKED)]

MIB = 1 << 20
CHUNK = 64 << 10
SETTINGS = {**QUICK, "sync_chunk": CHUNK, "io_timeout": 8}


def block_file(cluster: Cluster, node: int, block: int) -> Path:
    return cluster.data_root(node) / "disk" / f"{block:016d}"


def garbage(cluster: Cluster, node: int, block: int, offset: int = 0, length: int = 4096) -> None:
    """What a disk does that returns wrong bytes without an error."""
    with block_file(cluster, node, block).open("r+b", buffering=0) as f:
        assert os.pwrite(f.fileno(), os.urandom(length), offset) == length


def verify(cluster: Cluster, *options: str) -> dict[str, Any]:
    """A verify that found no difference; its figures."""
    job: dict[str, Any] = cluster.ctl("verify", "disk", "--wait", "--timeout", "30", *options)["job"]
    assert (job["kind"], job["state"], job["blocks_differed"]) == ("verify", "done", 0), job
    return job


def verify_finds(cluster: Cluster, blocks: int, *options: str) -> None:
    """A verify that finds so many blocks that differ, and says so by its exit code."""
    with pytest.raises(CtlError) as found:
        cluster.ctl("verify", "disk", "--wait", "--timeout", "30", *options)
    assert found.value.code == 1
    (job,) = cluster.ctl("sync", "status", "disk")["jobs"]
    assert (job["kind"], job["state"], job["blocks_differed"]) == ("verify", "done", blocks), job
    assert f"{blocks} differed" in job["reason"]


def reason(cluster: Cluster, node: int, block: int) -> str:
    text: str = replicas(cluster, "disk", node)[block]["reason"]
    return text


def test_what_differs_is_found_and_healed(make_cluster: MakeCluster) -> None:
    """Of two copies that of the guest's node is kept; missing and cut files, and figures."""
    cluster = make_cluster(nodes=2, settings=SETTINGS)
    disk = create(cluster, size="16M")
    content = os.urandom(4 * MIB)
    write_at(disk, 0, content)
    write_at(disk, 5 * MIB, b"a few bytes in a hole")
    job = verify(cluster)
    assert job["blocks_total"] == job["blocks_done"] == 16
    assert job["bytes_total"] == job["bytes_done"] == 16 * MIB
    assert (job["bytes_equal"], job["bytes_hole"]) == (4 * MIB + CHUNK, 12 * MIB - CHUNK)
    garbage(cluster, 2, 1, 3 * CHUNK + 100, 1)
    garbage(cluster, 2, 5, MIB - 10, 10)
    block_file(cluster, 2, 0).unlink()
    os.truncate(block_file(cluster, 2, 3), 1000)
    verify_finds(cluster, 4)
    assert out_of_sync(cluster, "disk", 2) == {0, 1, 3, 5}
    assert f"differs from node {cluster.node(1)} in the {CHUNK} bytes at {3 * CHUNK}" in reason(cluster, 2, 1)
    assert "was removed" in reason(cluster, 2, 0)
    assert "1000 bytes instead of" in reason(cluster, 2, 3)
    assert out_of_sync(cluster, "disk", 1) == set()
    assert read_all(disk)[: 4 * MIB] == content
    sync(cluster, "disk")
    verify(cluster)
    assert cluster.compare_replicas("disk") == 32


def test_of_three_the_one_that_stands_alone_is_marked(make_cluster: MakeCluster) -> None:
    """Also where it is the copy that the guest reads; only the nodes and blocks that are asked for are compared."""
    cluster = make_cluster(nodes=3, settings=SETTINGS)
    disk = create(cluster, size="8M", locations=(1, 2, 3))
    content = os.urandom(8 * MIB)
    write_at(disk, 0, content)
    garbage(cluster, 1, 2)
    garbage(cluster, 3, 6)
    verify(cluster, "--blocks", "0-1,3-5,7")
    verify(cluster, "--blocks", "6", "--node", cluster.node(2))
    verify_finds(cluster, 2)
    assert [out_of_sync(cluster, "disk", n) for n in (1, 2, 3)] == [{2}, set(), {6}]
    assert read_all(disk) == content
    sync(cluster, "disk")
    verify(cluster)


def test_under_fio_stopped_limited_and_taken_up(make_cluster: MakeCluster) -> None:
    """Writes are no differences; one order at a time; it goes on after restarts of everything."""
    cluster = make_cluster(nodes=2, settings=SETTINGS)
    disk = create(cluster, size="32M")
    write_at(disk, 0, os.urandom(32 * MIB))

    def status() -> dict[str, Any]:
        job: dict[str, Any] = cluster.ctl("sync", "status", "disk")["jobs"][0]
        return job

    with fio(disk, "32M", "--time_based", "--runtime=4", "--rate_iops=,600") as guest:
        verify(cluster, "--rate", "none")
        assert guest.poll() is None, "fio was to write meanwhile"
        fio_ends_well(guest)
    cluster.ctl("verify", "disk", "--rate", "4M")
    for command in (["sync", "start", "disk"], ["verify", "disk"]):
        with pytest.raises(CtlError, match="a verify of image disk is under way"):
            cluster.ctl(*command)
    stopped = cluster.ctl("verify", "disk", "--stop")["job"]
    assert (stopped["kind"], stopped["state"]) == ("verify", "stopped")
    number = cluster.ctl("verify", "disk", "--rate", "2M")["job"]["number"]
    wait_for(lambda: status()["bytes_done"] > MIB, "some progress", 20, cluster.tails)
    assert (status()["state"], status()["rate_limit"]) == ("running", 2 * MIB)
    cluster.kill(2, "blockd")
    wait_for(lambda: cluster.node(2) in status()["reason"], "a reason why it stands still", 20, cluster.tails)
    cluster.start(2, "blockd")
    wait_unavailable(cluster)
    cluster.ctl("sync", "rate", "disk", "none")
    cluster.kill(1, "metad")
    cluster.start(1, "metad")
    wait_for(lambda: status()["state"] == "done", "its end", 30, cluster.tails)
    assert (status()["number"], status()["blocks_done"], status()["blocks_differed"]) == (number, 32, 0)
    assert cluster.compare_replicas("disk") == 64


def test_what_the_writer_s_end_left_comes_first(make_cluster: MakeCluster) -> None:
    """A verify waits for the comparison of what a killed writer had under way (R5), and goes on then."""
    cluster = make_cluster(nodes=2, settings=SETTINGS)
    disk = create(cluster, size="16M")
    write_at(disk, 0, os.urandom(16 * MIB))
    number = cluster.ctl("verify", "disk", "--rate", "1M")["job"]["number"]
    write_at(disk, 0, b"the block is active", fsync=False)
    cluster.kill(1, "blockd", signal.SIGKILL)
    cluster.start(1, "blockd")
    write_at(disk, MIB, b"a new grant")
    wait_for(lambda: not out_of_sync(cluster, "disk", 2), "what was under way is compared", 20, cluster.tails)
    cluster.ctl("sync", "rate", "disk", "none")
    wait_for(lambda: cluster.ctl("sync", "status", "disk")["jobs"][0]["state"] == "done", "its end", 30, cluster.tails)
    (job,) = cluster.ctl("sync", "status", "disk")["jobs"]
    assert (job["kind"], job["number"], job["blocks_done"], job["blocks_differed"]) == ("verify", number, 16, 0)


def test_checksums_keep_a_guest_from_what_a_disk_altered(make_cluster: MakeCluster) -> None:
    """Read right from the other copy, marked with its reason, healed; a part of a chunk is not written over damage."""
    cluster = make_cluster(nodes=3, settings=SETTINGS)
    disk = create(cluster, size="16M", checksum=True)
    assert cluster.image("disk")["checksum"] is True
    content = bytearray(os.urandom(12 * MIB))
    write_at(disk, 0, bytes(content))
    assert verify(cluster)["bytes_equal"] == 12 * MIB
    garbage(cluster, 1, 0, 8192 + 17, 1)
    garbage(cluster, 1, 3, 40960, 100_000)
    garbage(cluster, 1, 5, 0, 10)
    assert read_at(disk, 8192, 4096) == content[8192 : 8192 + 4096]
    assert read_at(disk, 3 * MIB, MIB) == content[3 * MIB : 4 * MIB]
    write_at(disk, 5 * MIB + 512, b"a part of a spoilt chunk")
    content[5 * MIB + 512 : 5 * MIB + 536] = b"a part of a spoilt chunk"
    assert out_of_sync(cluster, "disk", 1) == {0, 3, 5}
    assert reason(cluster, 1, 0) == "checksum of chunk 2 of block 0 does not match"
    assert read_all(disk)[: 12 * MIB] == content
    sync(cluster, "disk")
    garbage(cluster, 1, 7, 500_000)
    garbage(cluster, 2, 8, 0, MIB)
    verify_finds(cluster, 2)
    assert "checksum of chunk 122 of block 7" in reason(cluster, 1, 7)
    assert (out_of_sync(cluster, "disk", 1), out_of_sync(cluster, "disk", 2)) == ({7}, {8})
    sync(cluster, "disk")
    garbage(cluster, 1, 2, 4096)  # the source of a resync is read and checked as well
    cluster.ctl("location", "add", "disk", cluster.node(3))
    sync(cluster, "disk")
    verify(cluster)
    assert "checksum of chunk 1 of block 2" in reason(cluster, 1, 2) or not out_of_sync(cluster, "disk", 1)
    sync(cluster, "disk")
    assert read_all(disk)[: 12 * MIB] == content
    assert cluster.compare_replicas("disk") == 48


def test_the_last_copy_with_damage_says_so_and_a_whole_chunk_heals_it(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1, settings=SETTINGS)
    cluster.expect_log("checksum of chunk [23] of block [12] does not match")
    disk = create(cluster, size="4M", locations=(1,), checksum=True)
    content = bytearray(os.urandom(4 * MIB))
    write_at(disk, 0, bytes(content))
    garbage(cluster, 1, 1, 3 * 4096, 1)
    with pytest.raises(OSError, match="Input/output error"):
        read_at(disk, MIB + 3 * 4096, 512)
    assert read_at(disk, MIB, 3 * 4096) == content[MIB : MIB + 3 * 4096]
    assert "checksum of chunk 3 of block 1" in reason(cluster, 1, 1)
    assert out_of_sync(cluster, "disk", 1) == set(), "it stays, since there is no other"
    verify_finds(cluster, 1)
    cluster.restart(1, "blockd")
    write_at(disk, MIB + 3 * 4096, bytes(4096))
    content[MIB + 3 * 4096 : MIB + 4 * 4096] = bytes(4096)
    assert read_all(disk) == content
    verify(cluster)
    garbage(cluster, 1, 2, 8192, 16)
    with pytest.raises(OSError, match="Input/output error"):
        read_at(disk, 2 * MIB + 8192, 16)
    accepted = cluster.ctl("image", "accept", "disk", cluster.node(1), "--yes")["accepted"]
    assert accepted == [[2, 2]], "an administrator's word takes it as it is"
    wait_shown(cluster, "disk")
    found = read_all(disk)
    assert found[: 2 * MIB + 8192] == content[: 2 * MIB + 8192]
    assert found[2 * MIB + 8192 + 16 :] == content[2 * MIB + 8192 + 16 :]
    verify(cluster)
