"""The N-th operation of a node's disk fails, N = 1, 2, 3 … until none does, through the life of a cluster.

Create, write, read, discard, flush, a second copy by resync, a move of the writer, retiring, restart and registration,
removal of a location: the guest reads what it wrote or gets an error in time, no defect shows, and all is in-sync again
once the disk is well.  One fault is one event: the log has a line for it if it cost a replica or a resync anything,
with the block range and the reason, and no other.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.blockd.faults import CALLS, SYNCS
from tests.costs import Costs, check_one_event, costs
from tests.processes.sample import ALL
from tests.sim.disk import SimDisk
from tests.sim.loop import CURRENT, VirtualLoop
from tests.sim.scenario import BLOCK_BYTES, BLOCKS, Scenario, bury, world_time
from tests.sim.world import CONFIG, NODES
from ukai.errors import UkaiError

SECTORS = BLOCKS * BLOCK_BYTES // 512
LIMIT = 5_000
KINDS: dict[str, tuple[tuple[str, ...], int]] = {
    "EIO": (tuple(c for c in CALLS if c != "lock"), errno.EIO),
    "ENOSPC": (("pwrite", "open", "punch", "truncate", "mkdir", "make_directories", "rename"), errno.ENOSPC),
    "sync": (SYNCS, errno.EIO),
    "short": (("pwrite", "pread"), 0),
}
STEPS = {"EIO": 61, "ENOSPC": 17, "sync": 17, "short": 17}
"""Every so many operations are enough for each day."""


class NthDisk(SimDisk):
    """The ``nth`` operation of a kind fails, once; 0: none."""

    def __init__(self, kind: str, nth: int) -> None:
        super().__init__(random.Random("disk"))
        self.kind, self.nth = kind, nth
        self.calls = 0
        self.fired = ""
        self.trace: list[str] = []
        names, self._errno = KINDS[kind]
        for name in names:
            setattr(self, name, functools.partial(self._call, name, getattr(self, name)))

    def _call(self, name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.trace.append(f"{name}{args[:1]}")
        if self.calls != self.nth:
            return real(*args, **kwargs)
        self.fired = f"{name}{args}"[:120]
        if self.kind == "short":
            fd, what, offset = args
            return real(fd, what[:1] if name == "pwrite" else 1, offset)
        if name == "fdatasync":
            self.inode(args[0]).dirty.clear()  # as Linux does
        raise OSError(self._errno, os.strerror(self._errno), "somewhere")


class Lines(logging.Handler):
    """What was said at warning or above, and each traceback."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        self.defects: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        (self.defects if record.exc_info else self.said).append(record.getMessage())


@dataclass
class Outcome:
    fired: str
    violations: list[str]
    said: list[str]
    defects: list[str]
    refused: list[str] = field(default_factory=list)
    """Requests of the guest that failed."""
    calls: int = 0
    trace: list[str] = field(default_factory=list)
    """Each operation of the disk that counted."""
    costs: Costs = field(default_factory=Costs)


class Story(Scenario):
    """One life of a cluster whose node ``victim`` has a disk with a fault."""

    def __init__(self, victim: int, kind: str, nth: int) -> None:
        super().__init__(1, forced={"threads": 0, "slow_ms": 0.2, "repeat": 0.0, "lossy_publish": 0.0, "rare": []})
        self.victim = NODES[victim]
        self.disk = NthDisk(kind, nth)
        self.world.disks[self.victim] = self.disk
        self.refused: list[str] = []

    async def run(self) -> None:
        world = self.world
        world.net.slow = 0.0002
        world.start_metad()
        for node in NODES:
            self._start(node)
        await self._registered()
        await self._ordered(
            "image.create", name="disk", size=BLOCKS * BLOCK_BYTES, block_size=BLOCK_BYTES,
            locations=list(NODES[:2]), hypervisors=list(NODES),
        )  # fmt: skip
        self._boot_guest(NODES[0])
        watcher = self._task(self._watch())
        await self._use(0)
        await self._ordered("location.add", name="disk", node=NODES[2])
        await self._synced()
        await self._use(1)
        await self._end_guest(flush=False)
        self._boot_guest(NODES[1])
        await self._use(2)
        await asyncio.sleep(CONFIG.active_idle + 3 * CONFIG.beat_interval)  # all is retired
        world.kill_blockd(self.victim)
        self._start(self.victim)
        await self._registered()
        await self._use(3)
        await self._synced()
        if self.victim != NODES[0]:
            await self._ordered("location.remove", name="disk", node=self.victim)
            await self._use(4)
            await self._ordered("location.add", name="disk", node=self.victim)
        await self._synced()
        await self._end_guest(flush=True)
        self._boot_guest(NODES[2])
        await self._use(5)
        await self._synced()
        await self._end_guest(flush=True)
        self.check_replicas()
        watcher.cancel()
        for task in self.tasks:
            task.cancel()

    def _start(self, node: str) -> None:
        """Start a blockd; one that can't is started again by supervisord."""
        try:
            self.world.start_blockd(node)
        except UkaiError as e:
            self.world.note(f"{node} does not start: {e.message}")
            self.world.disks[node].process_died()
            self.world.start_blockd(node)
        if self.world.blockds[node].store.strange:  # the log says of which image; an administrator starts it again
            self.world.kill_blockd(node)
            self.world.start_blockd(node)

    async def _registered(self) -> None:
        blockds = self.world.blockds
        await self._until("all nodes are registered", lambda: all(b.core.registered for b in blockds.values()), 10)
        if any(image.failed_before for b in blockds.values() for image in b.store.images.values()):
            self.world.violation("metad would be told of a failed fdatasync again, when it is long mended")

    async def _ordered(self, op: str, **fields: Any) -> None:
        """An order of the administrator; he gives it again when the fault was in its way."""
        for last in (False, True):
            try:
                await self.world.ctl(op, **fields)
                return
            except UkaiError as e:
                self.world.note(f"{op} refused: {e.message}")
                if last or not self.disk.fired:
                    self.world.violation(f"{op}: {e.message}")

    async def _synced(self) -> None:
        """All copies in-sync, as the administrator orders where they aren't."""
        end = world_time() + 30
        while not self._all_in_sync():
            if world_time() > end:
                self.world.violation(f"not all in-sync: {self._statuses()}")
                return
            await self._order("sync.start", name="disk")
            await asyncio.sleep(0.3)

    async def _use(self, turn: int) -> None:
        """Write some parts, discard one, flush, read everything."""
        guest = self.guest
        assert guest is not None
        for step in range(BLOCKS):
            first = step * (SECTORS // BLOCKS) + 3 * turn
            self._note(await guest.write(first, 5), f"write {turn}.{step}")
        self._note(await guest.write(2 + turn, 4, discard=True), f"discard {turn}")
        self._note(await guest.flush(), f"flush {turn}")
        for first in range(0, SECTORS, 8):
            self._note(await guest.read(first, min(8, SECTORS - first)), f"read {turn}.{first}")

    def _note(self, good: bool, what: str) -> None:
        if not good:
            self.refused.append(what)


def live(victim: int, kind: str, nth: int) -> Outcome:
    """One life on a virtual clock."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    lines = Lines()
    root = logging.getLogger("ukai")
    root.addHandler(lines)
    story: Story | None = None
    try:
        CURRENT.set(None)

        async def main() -> None:
            nonlocal story
            story = Story(victim, kind, nth)
            await story.run()

        loop.run_until_complete(main())
    finally:
        root.removeHandler(lines)
        if story is not None:
            bury(story.world)
        asyncio.set_event_loop(None)
        loop.close()
    assert story is not None
    w = story.world
    return Outcome(
        story.disk.fired, w.violations, lines.said, lines.defects, story.refused, story.disk.calls, story.disk.trace,
        costs(w.database.entries, {i.uuid: i.name for i in w.database.committed.images.values()}),
    )  # fmt: skip


@pytest.mark.expect_log(r"session|the connection was lost")
def test_a_life_without_a_fault() -> None:
    for victim in range(len(NODES)):
        found = live(victim, "EIO", 0)
        assert (found.violations, found.defects, found.refused) == ([], [], [])
        check_one_event(found.said, Costs())
        assert found.calls > 100


def nth_of(victim: int, name: str, path: str) -> list[int]:
    """Which operations of a life without a fault are of this name and path."""
    return [n for n, call in enumerate(live(victim, "EIO", 0).trace, 1) if call.startswith(f"{name}('{path}")]


@pytest.mark.expect_log(r"")
@pytest.mark.parametrize(
    ("name", "path"), [("stat", "/data/disk/0"), ("exists", "/data/disk/0"), ("unlink", "/data/disk/.ukai")]
)
def test_operations_that_were_once_in_the_way(name: str, path: str) -> None:
    """Hashing a block without a file, and forgetting an image: an error of ours, and it goes well when asked again."""
    found = nth_of(1, name, path)
    assert found
    for nth in found:
        one = live(1, "EIO", nth)
        assert one.fired
        assert (one.violations, one.defects, one.refused) == ([], [], []), f"fault {nth}: {one}"


@pytest.mark.expect_log(r"")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("victim", range(len(NODES)), ids=["writer", "replica", "target"])
def test_the_nth_operation_fails(victim: int, kind: str) -> None:
    """There is always another copy, so the guest is never told of anything."""
    step = 1 if ALL else STEPS[kind]
    for nth in range(1, LIMIT, step):
        found = live(victim, kind, nth)
        if not found.fired:
            assert nth > 2 * step, "the loop has run over the whole story"
            return
        assert (found.violations, found.defects, found.refused) == ([], [], []), f"fault {nth}: {found}"
        check_one_event(found.said, found.costs)
    raise AssertionError("the loop did not come to its end")
