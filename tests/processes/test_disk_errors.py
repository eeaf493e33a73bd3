"""The disk of a node fails once under its real blockd: the N-th operation, N = 1, 2, 3 … until none does.

A filesystem of ours lies under data_root.  A guest writes, reads, discards and flushes; the faulty node loses its
location, gets it back, and is brought in-sync under that load.  Another copy is good throughout, so the guest sees what
it wrote, in time and without an error; what the fault cost is marked, told of in one line, and mended by a resync.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.cluster import Cluster
from tests.costs import Costs, check_one_event, costs
from tests.faultfs import KINDS, Done, FaultFilesystem
from tests.machine import wait_for
from tests.processes.guest import wait_shown
from tests.processes.sample import ALL, SEED
from ukai.blockd.disk import Disk
from ukai.errors import UkaiError

pytestmark = [pytest.mark.cluster, pytest.mark.fuse, pytest.mark.expect_log("image case")]

T = TypeVar("T")

WRITER, REPLICA = 1, 2
BLOCK, BLOCKS = 128 << 10, 4
SETTINGS: dict[str, object] = {
    "replica_timeout": 8,
    "lease": 8,
    "io_timeout": 30,
    "beat_interval": 0.3,
    "role_linger": 0.3,
    "sync_chunk": 32 << 10,
}
"""Nothing is silent here: what takes longer than usual is a slow machine."""
SYNC_RATE = 2 << 20
"""Bytes per second, so that the guest goes on beside a resync."""
LIMIT = 2_000
STEPS = {"EIO": 90, "ENOSPC": 30, "sync": 14, "short": 60, "torn": 25}
"""Every so many operations are enough for each day."""


class Stage:
    """Two nodes whose disks are ours."""

    def __init__(self, root: Path) -> None:
        self.disks = {node: FaultFilesystem(root / f"disk{node}") for node in (WRITER, REPLICA)}
        self.root = root / "cluster"
        for node, disk in self.disks.items():
            own = self.root / f"127.0.0.{node}"
            own.mkdir(parents=True)
            (own / "data").symlink_to(disk.where / "data")
        self.cluster = Cluster(self.root, nodes=2, settings=SETTINGS)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    one = Stage(tmp_path_factory.mktemp("errors"))
    with one.disks[WRITER], one.disks[REPLICA]:
        for disk in one.disks.values():
            (disk.where / "data").mkdir()
        with one.cluster:
            yield one


class Life:
    """One image on both nodes; the disk of ``victim`` is to fail once."""

    numbers = itertools.count(1)

    def __init__(self, stage: Stage, victim: int) -> None:
        self.cluster, self.disk = stage.cluster, stage.disks[victim]
        self.victim = stage.cluster.node(victim)
        self.name = f"case{next(self.numbers)}"
        self.content = bytearray(BLOCK * BLOCKS)
        self.chance = random.Random(self.name)
        self.refused: list[UkaiError] = []
        """Orders of the administrator that the fault was in the way of."""
        self.since = int(self.cluster.ask("ping", since=-1)["seq"])

    # --- the guest

    def _timed(self, what: str, do: Callable[[], T]) -> T:
        began = time.monotonic()
        try:
            return do()
        finally:
            took = time.monotonic() - began
            assert took < float(str(SETTINGS["io_timeout"])), f"{what} took {took:.1f} s"

    def write(self, block: int) -> None:
        at = block * BLOCK + 4096 * self.chance.randrange(BLOCK // 4096 - 4)
        data = self.chance.randbytes(4 * 4096)
        assert self._timed("a write", lambda: os.pwrite(self.fd, data, at)) == len(data)
        self.content[at : at + len(data)] = data

    def discard(self, block: int) -> None:
        at = block * BLOCK + 8192
        self._timed("a discard", lambda: Disk().punch(self.fd, at, 16384))
        self.content[at : at + 16384] = bytes(16384)

    def use(self) -> None:
        for block in range(BLOCKS):
            self.write(block)
        self.discard(self.chance.randrange(BLOCKS))
        self._timed("an fsync", lambda: os.fsync(self.fd))
        assert self._timed("a read", lambda: os.pread(self.fd, len(self.content), 0)) == self.content

    # --- the administrator

    def order(self, op: str, **fields: object) -> dict[str, Any]:
        """One that is refused is given again."""
        try:
            return self.cluster.ask(op, 20.0, **fields)
        except UkaiError as e:
            self.refused.append(e)
            return self.cluster.ask(op, 20.0, **fields)

    def sync(self) -> None:
        """Until all is in-sync, with the guest at work."""

        def whole() -> bool:
            if self.cluster.image(self.name)["health"] == "ok":
                return True
            jobs = self.cluster.ask("sync.status")["jobs"]
            if not any(job["image"] == self.name and job["state"] == "running" for job in jobs):
                self.cluster.ask("sync.start", name=self.name, rate=SYNC_RATE)
            self.use()
            return False

        wait_for(
            whole, f"{self.name} all in-sync", 60, lambda: f"{self.cluster.image(self.name)}{self.cluster.tails()}"
        )

    def run(self, kind: str, nth: int) -> str:
        """The operation that failed; empty: none did."""
        cluster = self.cluster
        self.disk.arm(kind, nth, f"/{self.name}", lose=True)
        try:
            both = [cluster.node(WRITER), cluster.node(REPLICA)]
            self.order(
                "image.create", name=self.name, size=BLOCK * BLOCKS, block_size=BLOCK, locations=both,
                hypervisors=both[:1],
            )  # fmt: skip
            wait_shown(cluster, self.name)
            self.fd = os.open(cluster.path(self.name), os.O_RDWR)
            try:
                self.use()
                self.sync()
                self.order("location.remove", name=self.name, node=self.victim)
                self.use()
                self.order("location.add", name=self.name, node=self.victim)
                self.sync()
                self.use()
                self.sync()
            finally:
                os.close(self.fd)
            fired, done = self.disk.fired, self.disk.done
            self.disk.disarm()
            self.check(fired, done)
            return fired
        except BaseException as e:
            e.add_note(f"fault {kind} at operation {nth} of {self.victim}: {self.disk.fired}; {self.refused}")
            self.disk.disarm()
            raise

    def check(self, fired: str, done: list[Done]) -> None:
        assert self.cluster.compare_replicas(self.name) == 2 * BLOCKS
        lost: set[int] = set()
        for one in done:
            if one.call == "create":
                lost.discard(one.inode)  # a new file that has an old one's number
            elif one.call == "fsync":
                assert one.inode not in lost, f"an fsync of {one.path} had failed and was tried again"
                lost |= set() if one.good else {one.inode}
        found = self.costs()
        check_one_event(self.serious(), found)
        assert {node for _, node, _ in found.marks} <= {self.victim}
        assert len(self.refused) <= (0 if found.lines or not fired else 1), self.refused

    def costs(self) -> Costs:
        reply = self.cluster.ask("image.show", since=self.since, name=self.name)
        assert "changes" in reply, "metad remembers what it did"
        return costs(reply["changes"], {reply["image"]["uuid"]: self.name})

    def serious(self) -> list[str]:
        """What the log says of this image, of level warning or above."""
        mine = re.compile(rf"\b{self.name}\b")
        return [line.message for line in self.cluster.log_lines() if line.serious and mine.search(line.message)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("victim", [WRITER, REPLICA], ids=["writer", "replica"])
def test_the_nth_operation_fails(stage: Stage, victim: int, kind: str) -> None:
    step = 1 if ALL else STEPS[kind]
    first = 1 if ALL else 1 + SEED * 7 % step
    for nth in range(first, LIMIT, step):
        life = Life(stage, victim)
        fired = life.run(kind, nth)
        stage.cluster.ask("image.offline", 20.0, name=life.name)
        stage.cluster.ask("image.remove", 20.0, name=life.name)
        if not fired:
            assert nth > first, "the loop has run over the whole story"
            return
    raise AssertionError("the loop did not come to its end")
