"""A disk fails once under a real blockd, or under metad: the N-th operation, N = 1, 2, 3 … until none does.

A filesystem of ours lies under data_root.  A guest writes, reads, discards and flushes; the faulty node loses its
location, gets it back, and is brought in-sync under that load.  Another copy is good throughout, so the guest sees what
it wrote, in time and without an error; what the fault cost is marked, told of in one line, and mended by a resync.
What is flushed would outlive a power cut on each copy that counts.  A last copy gives right data or an error.  metad
keeps each change that it acknowledged, and goes on by itself or once it is started again.
"""

from __future__ import annotations

import array
import contextlib
import errno
import itertools
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.cluster import Cluster
from tests.costs import Costs, check_one_event, costs
from tests.faultfs import KINDS, Done, FaultFilesystem
from tests.machine import wait_for
from tests.processes.guest import replicas, wait_shown
from tests.processes.sample import ALL, SEED
from ukai.blockd.disk import Disk
from ukai.blockd.files import GENERATIONS
from ukai.errors import Busy, UkaiError

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
BLOCK_FILE = re.compile(r"/\d{16}$")
LIMIT = 2_000
STEPS = {"EIO": 130, "ENOSPC": 50, "sync": 22, "short": 90, "torn": 35}
METAD_STEPS = {"EIO": 700, "ENOSPC": 60, "sync": 3, "short": 900, "torn": 60}
"""Every so many operations are enough for each day."""


class Stage:
    """Two nodes and a metad whose disks are ours."""

    def __init__(self, root: Path) -> None:
        self.disks = {node: FaultFilesystem(root / f"disk{node}") for node in (WRITER, REPLICA)}
        self.metadata = FaultFilesystem(root / "metadata")
        self.root = root / "cluster"
        for node, disk in self.disks.items():
            own = self.root / f"127.0.0.{node}"
            own.mkdir(parents=True)
            (own / "data").symlink_to(disk.where / "data")
        settings = {**SETTINGS, "metadata_root": self.metadata.where / "metadata"}
        self.cluster = Cluster(self.root, nodes=2, settings=settings)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    one = Stage(tmp_path_factory.mktemp("errors"))
    with one.disks[WRITER], one.disks[REPLICA], one.metadata:
        for disk in one.disks.values():
            (disk.where / "data").mkdir()
        with one.cluster:
            yield one


class Life:
    """One image on both nodes, or ``alone`` on the ``victim``, whose disk is to fail once."""

    numbers = itertools.count(1)

    def __init__(self, stage: Stage, victim: int, alone: bool = False) -> None:
        self.cluster, self.disk, self.alone = stage.cluster, stage.disks[victim], alone
        self.victim = stage.cluster.node(victim)
        self.copies = stage.root / "copies"
        self.name = f"case{next(self.numbers)}"
        self.content = bytearray(BLOCK * BLOCKS)
        self.chance = random.Random(self.name)
        self.refused: list[UkaiError] = []
        """Orders of the administrator that the fault was in the way of."""
        self.errors: list[OSError] = []
        """What the guest of a last copy was told."""
        self.unsure: set[int] = set()
        """Bytes that a request which failed may have altered, or an fsync that failed may have lost."""
        self.unflushed: set[int] = set()
        self.written: set[int] = set()
        """Blocks to which a write succeeded."""
        self.fired = ""
        self.done: list[Done] = []
        self.since = int(self.cluster.ask("ping", since=-1)["seq"])

    # --- the guest

    def _timed(self, what: str, do: Callable[[], T]) -> T:
        began = time.monotonic()
        try:
            return do()
        finally:
            took = time.monotonic() - began
            assert took < float(str(SETTINGS["io_timeout"])), f"{what} took {took:.1f} s"

    def _try(self, what: str, do: Callable[[], T]) -> T | None:
        """A request of the guest; None: it failed, which is allowed where there is no other copy."""
        try:
            return self._timed(what, do)
        except OSError as e:
            if not self.alone or e.errno not in (errno.EIO, errno.ENOSPC):
                raise
            self.errors.append(e)
            return None

    def _alter(self, what: str, at: int, data: bytes, do: Callable[[], object]) -> None:
        place = range(at, at + len(data))
        failed = len(self.errors)
        self._try(what, do)
        if len(self.errors) > failed:
            self.unsure.update(place)
        else:
            self.content[at : at + len(data)] = data
            self.unsure.difference_update(place)
            self.written.add(at // BLOCK)
        self.unflushed.update(place)

    def write(self, block: int) -> None:
        at = block * BLOCK + 4096 * self.chance.randrange(BLOCK // 4096 - 4)
        data = self.chance.randbytes(4 * 4096)
        self._alter("a write", at, data, lambda: os.pwrite(self.fd, data, at))

    def discard(self, block: int) -> None:
        at = block * BLOCK + 8192
        self._alter("a discard", at, bytes(16384), lambda: Disk().punch(self.fd, at, 16384))

    def fsync(self) -> bool:
        failed = len(self.errors)
        self._try("an fsync", lambda: os.fsync(self.fd))
        if len(self.errors) > failed:
            self.unsure |= self.unflushed
            return False
        self.unflushed.clear()
        return True

    def use(self) -> None:
        for block in range(BLOCKS):
            self.write(block)
        self.discard(self.chance.randrange(BLOCKS))
        if self.fsync():
            self.stored()
        found = self._try("a read", lambda: os.pread(self.fd, len(self.content), 0))
        assert found is None or self.wrong(found) == []

    def wrong(self, found: bytes, at: int = 0) -> list[int]:
        """Bytes that are not what was written, from ``at`` on."""
        wanted = self.content[at : at + len(found)]
        if found == wanted:
            return []
        pairs = enumerate(zip(found, wanted, strict=True), at)
        return [i for i, (a, b) in pairs if a != b and i not in self.unsure]

    def stored(self) -> None:
        """What was flushed, and its generation, would outlive a power cut on the faulty disk, where it counts (R7)."""
        here = replicas(self.cluster, self.name, self.victim)
        held = {block: replica for block, replica in here.items() if replica["status"] == 0 and block in self.written}
        if not held:
            return
        shutil.rmtree(self.copies, ignore_errors=True)
        self.disk.copy_after_power_cut(self.disk.where / "data" / self.name, self.copies)
        kept = (self.copies / GENERATIONS).read_bytes().ljust(8 * BLOCKS, b"\0")  # cut short where a write was torn
        generations = array.array("Q", kept)
        for block, replica in held.items():
            found = (self.copies / f"{block:016d}").read_bytes()
            assert self.wrong(found, block * BLOCK) == [], f"block {block} is flushed and not on the disk"
            assert generations[block] == replica["generation"], f"block {block} is flushed and its generation is not"

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
            with contextlib.suppress(Busy):  # one is under way
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
            places = [cluster.node(n) for n in (WRITER, REPLICA)]
            self.order(
                "image.create", name=self.name, size=BLOCK * BLOCKS, block_size=BLOCK,
                locations=[self.victim] if self.alone else places, hypervisors=places[:1],
            )  # fmt: skip
            wait_shown(cluster, self.name)
            self.fd = os.open(cluster.path(self.name), os.O_RDWR)
            try:
                if self.alone:
                    self.live_alone()
                else:
                    self.live()
                self.end_of_fault()
                self.check()
            finally:
                os.close(self.fd)
            return self.fired
        except BaseException as e:
            e.add_note(f"fault {kind} at operation {nth} of {self.victim}: {self.disk.fired}; {self.refused}")
            self.disk.disarm()
            raise

    def end_of_fault(self) -> None:
        self.fired, self.done = self.fired or self.disk.fired, self.done + self.disk.done
        self.disk.disarm()

    def live(self) -> None:
        self.use()
        self.sync()
        self.order("location.remove", name=self.name, node=self.victim)
        self.use()
        self.order("location.add", name=self.name, node=self.victim)
        self.sync()
        self.use()
        self.sync()

    def live_alone(self) -> None:
        """An fsync that has failed goes on failing, until blockd is started anew, unless all is written again."""
        for _ in range(3):
            self.use()
        if any(one.call == "fsync" and not one.good and BLOCK_FILE.search(one.path) for one in self.disk.done):
            assert not self.fsync(), "as if nothing had been lost"
        if self.errors:
            self.end_of_fault()
            self.cluster.restart(self.victim, "blockd")
            self.use()
            self.errors.clear()
            self.use()
            assert not self.errors, "the disk is well again"

    def check(self) -> None:
        assert self.cluster.compare_replicas(self.name) == (1 if self.alone else 2) * BLOCKS
        lost: set[int] = set()
        for one in self.done:
            if one.call == "create":
                lost.discard(one.inode)  # a new file that has an old one's number
            elif one.call == "fsync":
                assert one.inode not in lost, f"an fsync of {one.path} had failed and was tried again"
                lost |= set() if one.good else {one.inode}
        if self.alone:
            return
        found = self.costs()
        check_one_event(self.serious(), found)
        assert {node for _, node, _ in found.marks} <= {self.victim}
        assert len(self.refused) <= (0 if found.lines or not self.fired else 1), self.refused

    def remove(self) -> None:
        wait_for(lambda: not self.cluster.image(self.name)["open"], f"{self.name} closed", 20)
        self.cluster.ask("image.offline", 20.0, name=self.name)
        self.cluster.ask("image.remove", 20.0, name=self.name, delete_data=True)

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
    _each(stage, victim, kind, STEPS[kind], alone=False)


@pytest.mark.expect_log(r"of case\d+ failed|before blockd was started")
@pytest.mark.parametrize("kind", KINDS)
def test_the_nth_operation_of_a_last_copy_fails(stage: Stage, kind: str) -> None:
    _each(stage, REPLICA, kind, STEPS[kind] // 2, alone=True)


def _each(stage: Stage, victim: int, kind: str, step: int, alone: bool) -> None:
    step = 1 if ALL else step
    first = 1 if ALL else 1 + SEED * 7 % step
    for nth in range(first, LIMIT, step):
        life = Life(stage, victim, alone)
        fired = life.run(kind, nth)
        life.remove()
        if not fired:
            assert nth > first, "the loop has run over the whole story"
            return
    raise AssertionError("the loop did not come to its end")


class MetadLife:
    """Changes of the metadata on a disk that fails once, with an end of metad by SIGKILL among them."""

    numbers = itertools.count(1)

    def __init__(self, stage: Stage) -> None:
        self.cluster, self.disk = stage.cluster, stage.metadata
        self.log = stage.cluster.process(WRITER, "metad").log
        self.before = len(self.serious())
        self.made: list[str] = []

    def serious(self) -> list[str]:
        return [line.message for line in self.log.lines() if line.serious]

    def make(self) -> None:
        """An image, with another name as often as it takes: of one whose order failed a node may hold the data."""

        def there() -> bool:
            name = f"made{next(self.numbers)}"
            reply = self.cluster.try_ask(
                "image.create", name=name, size=BLOCK, block_size=BLOCK, hypervisors=[],
                locations=[self.cluster.node(REPLICA)],
            )  # fmt: skip
            if reply is None or "err" in reply:
                return False
            self.made.append(name)
            return True

        wait_for(there, "an image made", 20, self.cluster.tails)

    def start_again(self) -> None:
        """SIGKILL, and a start; where the disk is in its way, another one, as supervisord does."""
        process = self.cluster.process(WRITER, "metad")
        self.cluster.kill(WRITER, "metad")
        self.cluster.start(WRITER, "metad", ready=False)

        def answers() -> bool:
            if process.popen is not None and process.popen.poll() is not None:
                assert process.wait() == 1
                self.cluster.start(WRITER, "metad", ready=False)
            return (reply := self.cluster.try_ask("image.list")) is not None and "err" not in reply

        wait_for(answers, "metad answers", 20, self.cluster.tails)

    def run(self, kind: str, nth: int) -> str:
        """The operation that failed; empty: none did."""
        self.disk.arm(kind, nth, "/metadata/", lose=True)
        try:
            self.make()
            self.make()
            self.start_again()
            self.make()
            fired = self.disk.fired
            self.disk.disarm()
            self.start_again()
            assert set(self.made) <= set(self.cluster.images())
            said = self.serious()[self.before :]
            assert len(said) <= (1 if fired else 0), said
            self.cluster.wait_ready()
            for name in self.cluster.images():
                self.cluster.ask("image.offline", 20.0, name=name)
                self.cluster.ask("image.remove", 20.0, name=name, delete_data=True)
            return fired
        except BaseException as e:
            e.add_note(f"fault {kind} at operation {nth} of metad: {self.disk.fired}")
            self.disk.disarm()
            raise


@pytest.mark.expect_log(r"metadata\.db|metadata_root")
@pytest.mark.parametrize("kind", KINDS)
def test_the_nth_operation_of_metad_fails(stage: Stage, kind: str) -> None:
    step = 1 if ALL else METAD_STEPS[kind]
    first = 1 if ALL else 1 + SEED * 7 % step
    for nth in range(first, LIMIT, step):
        if not MetadLife(stage).run(kind, nth):
            assert nth > first, "the loop has run over the whole story"
            return
    raise AssertionError("the loop did not come to its end")
