"""SIGKILL of each process in turn under load: no acknowledged write is lost, in-sync copies are equal."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster import Cluster, program
from tests.machine import mount_answers, wait_for
from tests.processes.guest import (
    MARKED,
    QUICK,
    MakeCluster,
    Recorder,
    create,
    fio,
    fio_ends_well,
    out_of_sync,
    sync,
    wait_shown,
)

pytestmark = [pytest.mark.cluster, pytest.mark.fuse, pytest.mark.expect_log(MARKED)]

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
LOST = r"the frontend .*; its \d+ open handles are closed|metad has not been reached|cleaned|dead mount|failed"
VICTIMS = [(1, "metad"), (1, "blockd"), (2, "blockd")]
SECONDS = float(os.environ.get("UKAI_TEST_KILL_SECONDS", "20"))
"""How long fio writes while a replica's blockd is killed again and again."""
EVERY_S = 5.0


@pytest.mark.expect_log(LOST)
@pytest.mark.parametrize(("node", "name"), VICTIMS, ids=["metad", "local-blockd", "remote-blockd"])
def test_killed_under_load(make_cluster: MakeCluster, tmp_path: Path, node: int, name: str) -> None:
    """The guest sees no error, only a pause."""
    cluster = make_cluster(nodes=2, settings=QUICK)
    disk = create(cluster)
    with Recorder(disk, tmp_path / "log", step=61, count=67) as writer:
        for _ in range(2):
            writer.wait_written(40)
            assert cluster.kill(node, name) == -signal.SIGKILL
            cluster.start(node, name)
            writer.wait_written(40)
        writer.end()
        writer.check()
    sync(cluster, "disk")
    cluster.wait_image("disk", "ok")
    assert cluster.compare_replicas("disk") == 32
    writer.check()


def test_a_replica_that_is_killed_is_not_waited_for(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """The end of its connection tells; the next ping and replica_timeout are far away here."""
    settings = {"replica_timeout": 24, "beat_interval": 6, "lease": 12, "io_timeout": 40}
    cluster = make_cluster(nodes=2, settings=settings)
    with Recorder(create(cluster), tmp_path / "log", count=8) as writer:
        writer.wait_pass()
        cluster.stop(2, "blockd")
        counts = [-1]

        def stands() -> bool:
            counts.append(writer.written)
            return counts[-1] == counts[-2]

        wait_for(stands, "a write that waits for the replica", 20)
        cluster.kill(2, "blockd")
        killed = time.monotonic()
        writer.wait_written(8)
        assert time.monotonic() - killed < 2
        writer.end()
        writer.check()


@pytest.mark.expect_log(LOST)
def test_frontend_killed_under_load(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """The guest's disk is gone with its frontend (ENOTCONN); what was acknowledged is there after the new start."""
    cluster = make_cluster(nodes=2, settings=QUICK)
    disk = create(cluster)
    with Recorder(disk, tmp_path / "log", step=61, count=67) as writer:
        writer.wait_written(100)
        cluster.kill(1, "frontend")
        assert writer.popen.wait(30) == 1, "the guest was to see its disk go"
    assert not mount_answers(cluster.mount(1))
    cluster.start(1, "frontend")
    wait_shown(cluster, "disk")
    writer.check(exact=False)
    sync(cluster, "disk")
    cluster.wait_image("disk", "ok")
    writer.check(exact=False)


@pytest.mark.expect_log(r"")  # who dies takes the connections of all others
def test_all_killed_at_once_under_load(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(nodes=2, settings=QUICK)
    disk = create(cluster)
    with Recorder(disk, tmp_path / "log", step=61, count=67) as writer:
        writer.wait_written(100)
        for process in cluster.processes.values():
            process.signal(signal.SIGKILL)
        for process in cluster.processes.values():
            process.wait()
        assert writer.popen.wait(30) == 1
    cluster.start_all()
    wait_shown(cluster, "disk")
    writer.check(exact=False)
    sync(cluster, "disk")
    cluster.wait_image("disk", "ok")
    assert cluster.compare_replicas("disk") == 32


@pytest.mark.slow
def test_fio_verifies_while_a_replica_dies_every_five_seconds(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=2, settings=QUICK)
    disk = create(cluster, size="64M", block_size="4M")
    kills = 0
    with fio(disk, "64M", "--time_based", f"--runtime={SECONDS:g}", "--rate_iops=,1500") as guest:
        begun = time.monotonic()
        while time.monotonic() - begun < SECONDS - EVERY_S:
            next_s = begun + (kills + 1) * EVERY_S - 2
            wait_for(lambda at=next_s: time.monotonic() >= at, "the time of the next kill", EVERY_S)  # type: ignore[misc]
            assert guest.poll() is None, "fio was to write while the replica dies"
            cluster.kill(2, "blockd")
            kills += 1
            wait_for(lambda: out_of_sync(cluster, "disk", 2), "blocks of node 2 out-of-sync", 10, cluster.tails)
            cluster.start(2, "blockd")
            sync(cluster, "disk")
        assert kills >= SECONDS // EVERY_S - 1
        fio_ends_well(guest)
    sync(cluster, "disk")
    cluster.wait_image("disk", "ok")
    assert cluster.compare_replicas("disk") == 32


class Supervised:
    """One node's group under a supervisord of its own, with the very files that are deployed."""

    def __init__(self, cluster: Cluster, node: int, where: Path) -> None:
        self.cluster, self.node, self.where = cluster, node, where
        self.popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.where.mkdir()
        for name in ("supervisord.conf", "ukai.toml"):
            (self.where / name).symlink_to(DEPLOY / name)
        env = self.cluster.environment(self.node)
        env["PATH"] = f"{Path(program('ukai-ctl')).parent}:{env['PATH']}"
        with (self.where / "out").open("wb") as out:
            self.popen = subprocess.Popen(
                [program("supervisord"), "-n", "-c", self.where / "supervisord.conf", "--minfds", "1024"],
                env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd="/", start_new_session=True,
            )  # fmt: skip

    def pid(self, name: str) -> int:
        """The process that runs as a program of the group; 0 while there is none."""
        if self.popen is None or self.popen.poll() is not None:
            return 0
        for child in psutil.Process(self.popen.pid).children():
            try:
                if any(part.endswith(f"ukai-{name}") for part in child.cmdline()):
                    return int(child.pid)
            except psutil.Error:
                continue
        return 0

    def stop(self) -> None:
        if self.popen is None:
            return
        self.popen.terminate()
        try:
            self.popen.wait(40)
        finally:
            if self.popen.poll() is None:
                for child in psutil.Process(self.popen.pid).children():
                    child.kill()
                self.popen.kill()
                self.popen.wait()


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[list[Supervised]]:
    """Nodes that run under supervisord; they end before their cluster is looked at."""
    nodes: list[Supervised] = []
    yield nodes
    for node in nodes:
        node.stop()


@pytest.mark.slow
@pytest.mark.expect_log(r"")
def test_supervisord_restarts_what_is_killed(tmp_path: Path, supervised: list[Supervised]) -> None:
    """Each process of a node in turn, SIGKILLed under load, comes back by itself."""
    cluster = Cluster(tmp_path / "cluster", nodes=2, settings=QUICK)
    try:
        for node in (1, 2):
            one = Supervised(cluster, node, tmp_path / f"node{node}")
            supervised.append(one)
            one.start()
        wait_up(cluster)
        disk = create(cluster)
        for turn, (node, name) in enumerate([*VICTIMS, (1, "frontend")]):
            group = supervised[node - 1]
            with Recorder(disk, tmp_path / f"log-{node}-{name}", first=turn, step=60, count=67) as writer:
                writer.wait_written(30)
                pid = group.pid(name)
                os.kill(pid, signal.SIGKILL)
                wait_for(lambda g=group, n=name, p=pid: g.pid(n) not in (0, p), f"{name} started anew", 20)  # type: ignore[misc]
                if name == "frontend":
                    assert writer.popen.wait(30) == 1
                else:
                    writer.wait_written(60)
                    writer.end()
            wait_up(cluster)
            wait_shown(cluster, "disk")
            writer.check(exact=name != "frontend")
        sync(cluster, "disk")
        cluster.wait_image("disk", "ok")
        assert cluster.compare_replicas("disk") == 32
    finally:
        for group in reversed(supervised):
            group.stop()
        faults = cluster.close()
    assert not faults, "; ".join(faults)


def wait_up(cluster: Cluster) -> None:
    """Until metad answers, both nodes are up and the mount of node 1 answers."""

    def up() -> bool:
        reply = cluster.try_ask("node.list")
        return reply is not None and {n["address"] for n in reply["nodes"] if n["state"] == "up"} == set(
            cluster.addresses
        )

    wait_for(up, "both nodes up", 30)
    wait_for(lambda: mount_answers(cluster.mount(1)), "the mount", 30)
