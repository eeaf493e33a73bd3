"""All processes are killed at once and what was not synced is lost: each copy alone has what the guest was told of."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.durability.blockd import journal
from tests.durability.cut import Loss, power_cut
from tests.durability.manifest import Manifest, Writer, in_block_files, in_mount, metadata
from tests.processes.guest import QUICK, MakeCluster, create, sync, wait_shown, write_at

pytestmark = [pytest.mark.cluster, pytest.mark.fuse]

COMMANDS = {"blockd": [sys.executable, "-m", "tests.durability.blockd"]}
BATCHES = 60
CUTS_LIMIT = 10


def run_until_cut(cluster: Cluster, disk: Path, log: Path, seed: int) -> tuple[Manifest, Loss]:
    """Write, kill everything in the midst of it, lose what was not synced."""
    chance = random.Random(seed)
    with Writer(disk, log, seed) as writer:
        writer.wait_done(BATCHES + chance.randrange(BATCHES))
        cluster.kill_all()
        manifest = writer.ended()
    loss = Loss()
    for node in cluster.addresses:
        loss += power_cut(journal(cluster.data_root(node)), chance)
    return manifest, loss


def check_each_copy(cluster: Cluster, manifest: Manifest, copies: int) -> None:
    """The block files of each replica that metad calls in-sync, without any process of ours."""
    image = metadata(cluster.root / "metadata")["disk"]
    found = [
        manifest.check(in_block_files(image, node, cluster.data_root(node)), f"the copy of {node}")
        for node in sorted(image.locations)
    ]
    assert len(found) == copies
    assert min(found) > 0
    assert len(set(found)) == 1, f"no replica was to be marked: {found}"


def start_alone(cluster: Cluster, node: int) -> None:
    """metad, and of the others the processes of one node, which was the last to come back.

    A machine that was started anew has perhaps lost acknowledged writes that no sync covered.  While another may have
    them its copies of active blocks are out-of-sync; those of the last one to come back stay (R9).
    """
    others = [n for n in cluster.addresses if n != cluster.node(node)]
    cluster.start(1, "metad", ready=False)
    for other in others:
        cluster.start(other, "blockd")
    cluster.start(node, "blockd")
    for other in others:
        cluster.kill(other, "blockd")
    cluster.start(node, "frontend", ready=False)
    cluster.wait_mounted(node)


def save(cluster: Cluster, to: Path) -> Callable[[], None]:
    """Copy all that is on the disks; the answer puts it back."""
    roots = {"metadata": cluster.root / "metadata", **{n: cluster.data_root(n) for n in cluster.addresses}}
    for name, root in roots.items():
        shutil.copytree(root, to / name)

    def put_back() -> None:
        for name, root in roots.items():
            shutil.rmtree(root)
            shutil.copytree(to / name, root)
            shutil.rmtree(journal(root), ignore_errors=True)  # of files that are gone; the next run is a new boot

    return put_back


@pytest.mark.expect_log(r"")
@pytest.mark.parametrize(("copies", "replication"), [(1, "sync"), (2, "sync"), (3, "sync"), (2, "flush")])
def test_each_copy_alone_has_what_was_synced(
    make_cluster: MakeCluster, tmp_path: Path, copies: int, replication: str
) -> None:
    nodes = range(1, copies + 1)
    settings = {**QUICK, "active_idle": 0.3, "active_age": 2}  # blocks are retired and announced all the time
    cluster = make_cluster(nodes=copies, frontends=nodes, settings=settings, commands=COMMANDS)
    disk = create(cluster, locations=nodes, hypervisors=nodes, options=("--replication", replication))
    manifest, loss = run_until_cut(cluster, disk, tmp_path / "log", copies)
    check_each_copy(cluster, manifest, copies)
    for more in range(1, CUTS_LIMIT):
        if loss.sectors + loss.names:
            break
        # just then all was synced: that cut took nothing, and does not count
        cluster.start_all()
        cluster.ctl("image", "remove", "disk", "--delete-data")
        disk = create(cluster, locations=nodes, hypervisors=nodes, options=("--replication", replication))
        manifest, loss = run_until_cut(cluster, disk, tmp_path / f"log{more}", copies + 10 * more)
        check_each_copy(cluster, manifest, copies)
    assert loss.sectors + loss.names, "all was synced: nothing could be lost"
    put_back = save(cluster, tmp_path / "saved")
    for node in nodes:
        start_alone(cluster, node)
        wait_shown(cluster, "disk", node)
        manifest.check(in_mount(cluster.path("disk", node)), f"node {node} alone")
        cluster.kill_all()
        put_back()
    cluster.start_all()
    wait_shown(cluster, "disk")
    manifest.check(in_mount(disk), "the cluster")
    write_at(disk, 0, b"it goes on")
    sync(cluster, "disk")
    cluster.wait_image("disk", "ok")
    manifest.slots.pop(0, None)
    manifest.check(in_mount(disk), "the cluster after a resync")
