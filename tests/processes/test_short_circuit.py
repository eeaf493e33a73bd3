"""Reads that go around blockd, to the block files that it has lent: they end when blockd's own would."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.machine import wait_for
from tests.processes.guest import MARKED, QUICK, MakeCluster, create, read_at, write_at

pytestmark = [pytest.mark.cluster, pytest.mark.fuse]

MIB = 1 << 20
OLD, NEW = b"old", b"new"


def open_blocks(cluster: Cluster, node: int = 1) -> Iterator[str]:
    """The block files that a node's frontend has open."""
    root = str(cluster.data_root(node))
    for fd in Path(f"/proc/{cluster.process(node, 'frontend').pid}/fd").iterdir():
        try:
            target = str(fd.readlink())
        except OSError:  # closed meanwhile
            continue
        if target.startswith(root):
            yield target


def borrow(cluster: Cluster, guest: int, block: int = 0) -> None:
    """Read until the frontend has the block file open."""

    def lent() -> bool:
        os.pread(guest, 512, block * MIB)
        return any(name.endswith(f"{block:016d}") for name in open_blocks(cluster))

    wait_for(lent, "a loan", 10, cluster.tails)


@pytest.mark.expect_log(MARKED)
@pytest.mark.expect_log(r"(write|fsync|read) of disk failed|open handles are closed")
def test_a_frozen_blockd_lends_no_longer_than_its_lease(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=3, frontends=(1, 3), settings=QUICK)
    disk = create(cluster, locations=(1, 2), hypervisors=(1, 3))
    with disk.open("r+b", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        guest = file.fileno()
        os.pwrite(guest, OLD, 0)
        os.fsync(guest)
        borrow(cluster, guest)
        cluster.stop(1, "blockd")
        assert os.pread(guest, 3, 0) == OLD, "without blockd"
        write_at(cluster.path("disk", 3), 0, NEW)  # takes over once the lease is over
        late = beside.submit(os.pread, guest, 3, 0)
        cluster.cont(1, "blockd")
        assert late.result(30) == NEW


@pytest.mark.expect_log(MARKED)
@pytest.mark.expect_log(r"(write|fsync|read) of disk failed|open handles are closed")
def test_a_new_blockd_ends_the_loans_of_the_killed_one(make_cluster: MakeCluster) -> None:
    """The lease would go on for long; but the role is free as soon as the new process is registered."""
    cluster = make_cluster(nodes=3, frontends=(1, 3), settings={**QUICK, "lease": 60, "io_timeout": 30})
    disk = create(cluster, locations=(1, 2), hypervisors=(1, 3))
    with disk.open("r+b", buffering=0) as file:
        guest = file.fileno()
        os.pwrite(guest, OLD, 0)
        os.fsync(guest)
        borrow(cluster, guest)
        cluster.kill(1, "blockd", signal.SIGKILL)
        assert os.pread(guest, 3, 0) == OLD, "blockd's page is as good as its lease"
        cluster.start(1, "blockd")
        wait_for(lambda: cluster.image("disk")["writer"] == "", "the role free", 20, cluster.tails)
        write_at(cluster.path("disk", 3), 0, NEW)
        assert os.pread(guest, 3, 0) == NEW


def test_a_removed_copy_is_not_read(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=2, frontends=(1,), settings=QUICK)
    disk = create(cluster, locations=(1, 2), hypervisors=(1,))
    with disk.open("r+b", buffering=0) as file:
        guest = file.fileno()
        os.pwrite(guest, OLD, 0)
        os.fsync(guest)
        borrow(cluster, guest)
        cluster.ctl("location", "remove", "disk", cluster.node(1))
        os.pwrite(guest, NEW, 0)
        assert os.pread(guest, 3, 0) == NEW
        wait_for(lambda: not any(open_blocks(cluster)), "the deleted files closed", 10)


def test_switched_off_nothing_is_lent(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1, frontends=(1,), settings={**QUICK, "short_circuit": "false"})
    disk = create(cluster, locations=(1,), hypervisors=(1,))
    write_at(disk, 0, OLD)
    with disk.open("rb", buffering=0) as file:
        assert {os.pread(file.fileno(), 3, 0) for _ in range(20)} == {OLD}
        assert not any(open_blocks(cluster))
    assert read_at(disk, 0, 3) == OLD
