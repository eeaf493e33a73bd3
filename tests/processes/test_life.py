"""Processes start in any order, can be restarted at any time, and leave nothing."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.cluster import PROCESSES, Cluster
from tests.machine import mount_answers, wait_for

pytestmark = pytest.mark.cluster
MakeCluster = Callable[..., Cluster]

# What the others say when a process that they talk to is gone.
LOST = r"(?i)metad|blockd|frontend|peer|connection|lost|unreachable|registered|does not answer|lease|mount"


def test_any_order_and_a_clean_end(make_cluster: MakeCluster, binding: str) -> None:
    cluster = make_cluster(nodes=2, frontends=(1, 2), binding=binding)
    assert {n["address"] for n in cluster.ctl("node", "list")["nodes"]} == set(cluster.addresses)
    assert mount_answers(cluster.mount(1))
    assert mount_answers(cluster.mount(2))


@pytest.mark.fuse
@pytest.mark.expect_log(LOST)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
@pytest.mark.parametrize("name", PROCESSES)
def test_each_process_finds_its_way_back(make_cluster: MakeCluster, name: str, number: signal.Signals) -> None:
    cluster = make_cluster(nodes=2)
    cluster.ctl("image", "create", "disk", "--size", "8M", "--block-size", "1M", "--location", cluster.addresses[0],
                "--location", cluster.addresses[1], "--hypervisor", cluster.addresses[0])  # fmt: skip
    wait_for(cluster.path("disk").exists, "disk in the mount", 10, cluster.tails)
    content = bytes(range(256)) * 4096
    with cluster.path("disk").open("r+b", buffering=0) as disk:
        disk.write(content)
    cluster.restart(1, name, number)
    wait_for(cluster.path("disk").exists, "disk in the mount", 10, cluster.tails)
    with cluster.path("disk").open("r+b", buffering=0) as disk:
        assert disk.read(len(content)) == content
        disk.write(content)
    cluster.ctl("sync", "start", "disk", "--wait")  # active blocks of a writer that ended count as out-of-sync (R5)
    cluster.wait_image("disk", "ok")
    assert cluster.compare_replicas("disk") == 16
