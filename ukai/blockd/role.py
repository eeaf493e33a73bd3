"""The writer role of one image on this node: taken, fenced, given up, lost.

metad grants it with a new epoch, in two steps with fencing between (R3); here it ends when metad asks for it, when
a replica knows a higher epoch, or some time after the last handle was closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from ukai import faults
from ukai.errors import Damaged, NotCoordinator, StaleEpoch, UkaiError
from ukai.messages import integer
from ukai.model import IN_SYNC, written
from ukai.ranges import RangeSet, join

if TYPE_CHECKING:
    from ukai.blockd.coordinator import Coordinator

log = logging.getLogger(__name__)

RETRY_S = 0.05


class Role:
    """Whether this node writes the image; ``Coordinator.epoch`` and ``.held`` say what came of it."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self._purpose = ""
        self._lock = asyncio.Lock()
        self._released = 0
        """The last epoch that ended here with nothing left unflushed."""
        self.left: list[list[int]] = []
        """Blocks that stay active after it, where they are: their last copy is an older one, or this node was never
        told that they are active; nothing was written to them."""

    @property
    def wanted(self) -> bool:
        """Whether metad is being asked for it."""
        return self._lock.locked()

    async def acquire(self, opened_epoch: int, purpose: str, deadline: float) -> None:
        """Hold the writer role (R1–R3).  Raises StaleHandle, Timeout, or what forbids it."""
        c = self._c
        while not self._suffices(purpose):
            if c.frozen is not None:
                await c.frozen.wait()
                continue
            try:
                async with self._lock:
                    if not self._suffices(purpose):
                        self.lose("it was taken for reading only, and writing begins")
                        await self._grant(opened_epoch, purpose)
                    return
            except UkaiError as e:
                if not e.retry or c.now() >= deadline:
                    raise
                c.hindrance = e.message
            await asyncio.sleep(RETRY_S)

    def _suffices(self, purpose: str) -> bool:
        """Whether the role is held for this purpose: one taken to read or to resync stops no other machine (R2)."""
        return self._c.held and (self._purpose == "io" or purpose != "io")

    async def _grant(self, opened_epoch: int, purpose: str) -> None:
        c = self._c
        core = c.core
        await faults.pause("grant.ask")
        reply = await core.metad("grant", {"image": c.uuid, "opened_epoch": opened_epoch, "purpose": purpose})
        epoch, holders = int(reply["epoch"]), [str(n) for n in reply["holders"]]
        await faults.pause("grant.reserved")
        vacated = reply.get("vacated") is True
        fences = await asyncio.gather(*(self._fence(n, epoch) for n in holders))
        fenced = {n: until for n, until in zip(holders, fences, strict=True) if until is not None}
        await faults.pause("grant.fenced")
        if not vacated and (left := max(fenced.values(), default=0.0) - c.now()) > 0:
            await asyncio.sleep(left)  # the passing of a lease is the condition itself
        await core.metad("grant.commit", {"image": c.uuid, "epoch": epoch, "fenced": list(fenced)})
        c.epoch, c.held, self._purpose, c.hindrance = epoch, True, purpose, ""
        c.idle_since = c.now()
        c.changed(None)
        c.marker = c.new_marker()
        c.activity.begin(c.image.active, c.now())
        c.flusher.begin(c.image.active)
        log.info("image %s: this node is the writer, epoch %d", c.name(), epoch)
        faults.point("grant.held")

    async def _fence(self, node: str, epoch: int) -> float | None:
        """Have a replica persist the epoch (R3); None when it can't be reached.

        Returns when the lease is over that it may have confirmed last to another writer, on this loop's clock.
        """
        c = self._c
        try:
            if node == c.own:
                c.core.store.image(c.uuid).admit(epoch)
                ago_s = c.core.replica.confirmed_ago_s(c.uuid, node)
            else:
                peer = c.core.peer(node)
                if not await peer.settled():
                    return None
                reply, _ = await peer.ask("fence", {"i": c.uuid, "e": epoch})
                ago_s = integer(reply, "ago", default=0) / 1000
            return c.now() + c.core.config.lease - ago_s
        except StaleEpoch:
            raise
        except UkaiError as e:
            log.info("image %s: node %s is not fenced: %s", c.name(), node, e.message)
            return None

    def lose(self, reason: str) -> None:
        """The role went to another node, or can't be told to be ours any more."""
        c = self._c
        if not c.held:
            return
        log.info("image %s: this node is no longer the writer (epoch %d): %s", c.name(), c.epoch, reason)
        c.held = False
        c.readable.end()
        c.changed(None)
        c.activity.end()
        c.marker.abandon(NotCoordinator(reason))
        c.core.role_lost(c.uuid)

    async def release(self, epoch: int, deadline: float) -> bool:
        """Drain, flush and give the role up; whether nothing is left active.  Requests wait meanwhile."""
        self._c.posts.refusals += 1
        try:
            return await self._release(epoch, deadline)
        finally:
            self._c.posts.refusals -= 1

    async def _release(self, epoch: int, deadline: float) -> bool:
        c = self._c
        while True:
            while c.frozen is not None:
                await c.frozen.wait()  # it is being given up already, by this node's own accord or because metad asked
            if not c.holds(epoch):
                return self._released == epoch
            if c.posts.refuse() or c.now() >= deadline:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await c.posts.passed()
        c.frozen = asyncio.Event()
        clean = False
        try:
            async with asyncio.timeout_at(deadline):
                await faults.pause("release.begin")
                await c.writes.drained()
                await faults.pause("release.drained")
                left: list[int] = []
                try:
                    while cold := [b for b in c.activity.active if b not in c.activity.warm]:
                        await c.activity.make_warm(cold)
                except Damaged:
                    left = await c.activity.retire_all()
                await c.flusher.flush()
                for block in list(c.marker.pending):
                    await c.marker.settled(block)
                await faults.pause("release.flushed")
                # what metad made active and could not answer was never stamped: it must stay active
                known = RangeSet(join(b for b in c.activity.active if b not in left))
                self.left = [list(r) for r in known.gaps(0, c.image.block_count - 1)]
                clean = c.holds(epoch)
        except (UkaiError, TimeoutError) as e:
            log.info("image %s: released without a flush: %s", c.name(), e)
        finally:
            self.lose("released")
            if clean:
                self._released = epoch
            c.frozen.set()
            c.frozen = None
        return clean

    def leased(self) -> bool:
        """Whether nobody else can have become the writer without this node's knowing.

        metad has answered within the lease; or for some block each in-sync replica is on a node that has confirmed
        within the lease that it knows no higher epoch: a takeover must fence one of those for every block (R3).
        """
        c = self._c
        now = c.now()
        if now < c.core.lease_until:
            return True
        since = now - c.core.config.lease
        for _, _, replicas in c.image.segments():
            if written(replicas) and all(
                n == c.own or c.core.peer(n).confirmed_at > since for n, r in replicas.items() if r.status == IN_SYNC
            ):
                return True
        return False
