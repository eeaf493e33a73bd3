"""A replica that is lost while the guest writes: one pause, no error, exactly the touched blocks out-of-sync (R4)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.machine import wait_for
from tests.processes.guest import (
    MARKED,
    QUICK,
    MakeCluster,
    Recorder,
    create,
    out_of_sync,
    read_all,
    replicas,
    sync,
    wait_unavailable,
    write_at,
)
from tests.processes.recorder import RECORD_BYTES

pytestmark = [pytest.mark.cluster, pytest.mark.fuse]

BLOCK = 1 << 20
SLOTS_PER_BLOCK = BLOCK // RECORD_BYTES
PAUSE_SLACK_S = 1.5
"""What the commit at metad and a busy machine may add to replica_timeout."""


@pytest.mark.expect_log(MARKED)
@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_lost_replica_while_writing(make_cluster: MakeCluster, tmp_path: Path, how: str) -> None:
    cluster = make_cluster(nodes=2, settings=QUICK)
    disk = create(cluster)
    write_at(disk, 0, os.urandom(6 * BLOCK))  # blocks 0 to 5; 6 to 15 have never been written
    with Recorder(disk, tmp_path / "log", first=4 * SLOTS_PER_BLOCK, step=SLOTS_PER_BLOCK // 2, count=8) as writer:
        writer.wait_pass()  # blocks 4 to 7
        assert out_of_sync(cluster, "disk", 2) == set()
        if how == "killed":
            cluster.kill(2, "blockd")
        else:
            cluster.stop(2, "blockd")
        writer.wait_written(20)
        wait_for(lambda: len(out_of_sync(cluster, "disk", 2)) >= 4, "the touched blocks out-of-sync", 20)
        listed = wait_unavailable(cluster, 2)[cluster.node(2)]
        assert listed["reason"]
        assert listed["since"] > 0
        writer.wait_pass()
        writer.end()
    pauses_s = [p for p in writer.pauses_s if p > QUICK["replica_timeout"] / 2]  # type: ignore[operator]
    assert len(pauses_s) <= 1, f"the guest waited more than once: {pauses_s}"
    assert all(p < QUICK["replica_timeout"] + PAUSE_SLACK_S for p in pauses_s), pauses_s  # type: ignore[operator]
    if how == "frozen":
        assert pauses_s, "a frozen replica was to be waited for"
    assert out_of_sync(cluster, "disk", 2) == {4, 5, 6, 7}
    assert all(replicas(cluster, "disk", 2)[b]["reason"] for b in (4, 5, 6, 7))
    assert out_of_sync(cluster, "disk", 1) == set()
    assert cluster.image("disk")["health"] == "degraded"
    writer.check()
    if how == "killed":
        cluster.start(2, "blockd")
    else:
        cluster.cont(2, "blockd")
    wait_unavailable(cluster)
    assert out_of_sync(cluster, "disk", 2) == {4, 5, 6, 7}, "coming back is no proof of being in sync (R8)"
    writer.check()
    sync(cluster, "disk")
    cluster.wait_image("disk", "ok")
    assert cluster.compare_replicas("disk") == 32


@pytest.mark.expect_log(MARKED)
def test_degraded_before_the_write_is_acknowledged(make_cluster: MakeCluster) -> None:
    """The mark is durable when the writer goes on: metad, killed at that moment, still knows it (R4)."""
    cluster = make_cluster(nodes=2, settings=QUICK)
    disk = create(cluster)
    write_at(disk, 0, bytes(range(256)) * 16)
    with disk.open("r+b", buffering=0) as guest:
        cluster.kill(2, "blockd")
        os.pwrite(guest.fileno(), b"after the loss", 0)
        cluster.kill(1, "metad")
    cluster.expect_log(r"metad")
    cluster.start(1, "metad", ready=False)
    wait_for(lambda: cluster.try_ask("ping"), "metad", 10, cluster.tails)
    assert out_of_sync(cluster, "disk", 2) == {0}


@pytest.mark.expect_log(MARKED)
def test_remote_only_hypervisor(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """An image without a replica on the hypervisor works through remote ones, and through one of them alone."""
    cluster = make_cluster(nodes=3, settings=QUICK)
    disk = create(cluster, locations=(2, 3), hypervisors=(1,))
    content = os.urandom(3 * BLOCK + 12345)
    write_at(disk, BLOCK - 77, content)
    assert read_all(disk)[BLOCK - 77 :][: len(content)] == content
    assert not (cluster.data_root(1) / "disk").exists()
    with Recorder(disk, tmp_path / "log", first=8 * SLOTS_PER_BLOCK, step=SLOTS_PER_BLOCK, count=4) as writer:
        writer.wait_pass()
        cluster.kill(2, "blockd")
        writer.wait_pass()
        writer.end()
    assert out_of_sync(cluster, "disk", 2) == {8, 9, 10, 11}
    writer.check()
    assert read_all(disk)[BLOCK - 77 :][: len(content)] == content, "read from the other remote copy"
    cluster.start(2, "blockd")
    sync(cluster, "disk")
    assert cluster.compare_replicas("disk") == 32
