"""Active blocks: announced before the first write, retired in the background (R5).

    cold ──activate at metad──▶ active ──generation stamped on every target──▶ warm ──idle, flushed──▶ retired

A block is written only while it is warm.  Blocks that a former coordinator left active are active from the
grant on, and are stamped before they are used.  How many may be active is bounded; whoever needs room retires
the idle ones first.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from ukai import faults
from ukai.blockd.ahead import Ahead
from ukai.errors import DiskError, NotFound, StaleEpoch, Timeout, UkaiError
from ukai.model import IN_SYNC
from ukai.ranges import RangeSet, join

if TYPE_CHECKING:
    from ukai.blockd.coordinator import Coordinator

log = logging.getLogger(__name__)


class Activity:
    """The active blocks of one image, in one epoch after the other."""

    def __init__(self, coordinator: Coordinator, limit: int, idle_s: float, age_s: float) -> None:
        self._c = coordinator
        self._limit, self._idle_s, self._age_s = limit, idle_s, age_s
        self.active: dict[int, float] = {}
        """block → when it was announced in this epoch."""
        self.warm: set[int] = set()
        self._doubtful: set[int] = set()
        """Active blocks whose retirement was asked for with an unknown outcome: to be announced anew before use."""
        self._idle_since: dict[int, float] = {}
        self._wanted: dict[int, asyncio.Future[None]] = {}
        self._due: set[int] = set()
        """Warmed for a request that has not come to write yet: not retired to make room for others."""
        self._ahead = Ahead(limit)
        self._reboots = 0
        """How often the machine of a replica was started anew: what was stamped there may be gone."""
        self._task: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    def begin(self, inherited: RangeSet, now: float) -> None:
        """A new epoch begins with the blocks that the former one left active."""
        self.end()
        self.active = dict.fromkeys(inherited.indexes(), now)

    def end(self) -> None:
        """The role is over."""
        self.active, self.warm, self._doubtful, self._idle_since = {}, set(), set(), {}
        self._due.clear()
        self._ahead.clear()

    def rebooted(self, node: str) -> None:
        """The machine of a replica was started anew: generations that were not flushed there are gone (R8).

        Its last copies are stamped again before they are used or retired, since only an active block may have the
        generation of before.
        """
        self._reboots += 1
        where = self._c.image.locations.get(node)
        for block in [b for b in self.warm if where is not None and where.get(b) is not None]:
            self._c.hot.pop(block, None)
            self.warm.discard(block)

    async def make_warm(self, blocks: list[int]) -> None:
        """Announce what is cold and stamp what is active.  Raises UkaiError."""
        loop = asyncio.get_running_loop()
        futures = []
        for block in blocks:
            if block in self.warm and not self._lock.locked():
                continue
            if block not in self._wanted:
                self._wanted[block] = loop.create_future()
            futures.append(self._wanted[block])
        if futures and self._task is None:
            self._task = loop.create_task(self._work(), name="activate")
        for future in futures:
            await asyncio.shield(future)

    async def _work(self) -> None:
        while self._wanted:
            batch = dict(list(self._wanted.items())[: max(1, self._limit // 2)])
            try:
                async with self._lock:
                    errors = await self._warm_up([b for b in batch if b not in self.warm])
            except UkaiError as e:
                errors = dict.fromkeys(batch, e)
            except Exception as e:  # a task that ends here would hold up all further blocks for good
                log.exception("defect while announcing")
                errors = dict.fromkeys(batch, UkaiError(f"defect: {type(e).__name__}"))
            for block, future in batch.items():
                del self._wanted[block]
                if future.done():
                    continue
                if (error := errors.get(block)) is None:
                    self._due.add(block)
                    future.set_result(None)
                else:
                    future.set_exception(error)
                    future.exception()  # the request may have run out of time
        self._task = None

    async def _warm_up(self, blocks: list[int]) -> dict[int, UkaiError]:
        """Announce and stamp; the blocks that could not be stamped.  Raises UkaiError when none could be."""
        cold = [b for b in blocks if b not in self.active or b in self._doubtful]
        if cold:
            new = sum(1 for b in cold if b not in self.active)
            if new and len(self.active) + new > self._limit:
                await self._make_room(new, set(blocks))
            epoch = self._c.epoch
            await faults.pause("activate.ask")
            await self._c.ask_metad("activate", {"ranges": [list(r) for r in join(cold)]})
            if epoch != self._c.epoch:
                return {}
            now = self._c.now()
            for block in cold:
                self.active[block] = now
            self._doubtful.difference_update(cold)
        await faults.pause("activate.announced")
        epoch, reboots = self._c.epoch, self._reboots
        refused = await self._stamp(blocks)
        await faults.pause("activate.stamped")
        if self._c.holds(epoch) and reboots == self._reboots:
            self.warm.update(b for b in blocks if b not in refused)
        return refused

    async def _stamp(self, blocks: list[int]) -> dict[int, UkaiError]:
        """Have every target of some active blocks store their generation (R5, R8); the blocks that no one stored.

        A replica that is older than it was before the block became active refuses.  Raises UkaiError.
        """
        c = self._c
        by: dict[tuple[str, int, int], list[int]] = {}
        for block in blocks:
            for node, replica in c.image.replicas(block).items():
                if replica.status == IN_SYNC:
                    key = (node, replica.generation, c.image.required(node, block))
                    by.setdefault(key, []).append(block)
        keys = list(by)
        done = await asyncio.gather(*(self._stamp_on(*key, by[key]) for key in keys))
        failed: dict[int, dict[str, UkaiError]] = {}
        for key, errors in zip(keys, done, strict=True):
            for block in by[key]:
                if block in errors:
                    failed.setdefault(block, {})[key[0]] = errors[block]
                else:  # before it is retired: a power cut may take the generation also where nothing is written
                    c.flusher.dirty(block, (key[0],))
        marks = []
        nowhere: dict[int, UkaiError] = {}
        for block, errors_of in failed.items():
            nodes = {n for n, r in c.image.replicas(block).items() if r.status == IN_SYNC}
            if nodes <= set(errors_of):
                nowhere[block] = await c.nowhere(block, errors_of)
            else:
                marks += [(block, n, e.message) for n, e in errors_of.items()]
        if marks:
            await c.mark(marks)
        return nowhere

    async def _stamp_on(self, node: str, generation: int, least: int, blocks: list[int]) -> dict[int, UkaiError]:
        """Stamp some blocks on one node, one by one where they don't go together; block → error."""
        error = await self._stamp_one(node, generation, least, blocks)
        if error is None:
            return {}
        if not isinstance(error, DiskError) or len(blocks) == 1:
            return dict.fromkeys(blocks, error)
        found = {b: await self._stamp_one(node, generation, least, [b]) for b in blocks}
        return {b: e for b, e in found.items() if e is not None}

    async def _stamp_one(self, node: str, generation: int, least: int, blocks: list[int]) -> UkaiError | None:
        c = self._c
        try:
            if node == c.own:
                image = c.core.store.image(c.uuid)
                for block in blocks:
                    image.ready(block, generation, least)
                    await asyncio.sleep(0)
                return None
            fields = {"i": c.uuid, "e": c.epoch, "g": generation, "least": least, "ranges": [[b, b] for b in blocks]}
            peer = c.core.peer(node)
            await peer.settled()
            await peer.ask("g", fields, numbered=True)
        except (StaleEpoch, NotFound) as e:
            if isinstance(e, StaleEpoch):
                c.role.lose(e.message)
            return e
        except UkaiError as e:
            return e
        return None

    # --- announcing ahead of sequential writers

    def entered(self, block: int) -> None:
        """A block begins to be written.  Those that are likely to be next are announced in the background."""
        self._due.discard(block)
        image = self._c.image
        wanted = self._ahead.entered(block, image.block_size)
        cold = [b for b in wanted if b not in self.active and b < image.block_count]
        if cold and cold[0] - block <= (len(wanted) + 1) // 2:  # half of what was announced is used up
            self._c.core.spawn(self._announce(cold))

    async def _announce(self, blocks: list[int]) -> None:
        """Announce as many of some blocks as there is room for.  Raises UkaiError."""
        async with self._lock:
            cold = [b for b in blocks if b not in self.active]
            if len(self.active) + len(cold) > self._limit:
                await self._make_room(len(cold), set(cold))
            cold = cold[: max(0, self._limit - len(self.active))]
            if cold and self._c.held:
                await self._warm_up(cold)

    # --- retiring

    async def _make_room(self, count: int, keep: set[int]) -> None:
        idle = sorted(
            (b for b in self.active if b not in keep and b not in self._due),
            key=lambda b: (self._ahead.expects(b), b in self._c.hot and self._c.hot[b].touched, self.active[b]),
        )
        await self._retire(idle[: max(count, self._limit // 4)])

    async def tick(self) -> None:
        """Retire what is idle or was announced long ago; called each second or so.  Raises UkaiError."""
        now = self._c.now()
        if now >= self._c.core.lease_until:
            return  # metad is away: what is active stays so, since it could not be announced anew
        for block in self.active:
            hot = self._c.hot.get(block)
            if hot is not None and hot.touched:
                hot.touched = False
                self._idle_since.pop(block, None)
            else:
                self._idle_since.setdefault(block, now)
        old = [b for b, at in self._idle_since.items() if now - at >= self._idle_s and b in self.active]
        aged = [b for b, at in self.active.items() if now - at >= self._age_s]
        if (old or aged) and not self._lock.locked():
            async with self._lock:
                self._ahead.missed({*old, *aged})
                await self._retire(sorted({*old, *aged}))

    async def retire_all(self) -> list[int]:
        """Retire what is active, of blocks without a write under way; what had to stay active.  Raises UkaiError."""
        async with self._lock:
            await self._retire(sorted(self.active))
        return sorted(self.active)

    async def _ask_to_retire(self, blocks: list[int]) -> None:
        """Raises UkaiError; after a Timeout nobody knows whether it was done."""
        try:
            await self._c.ask_metad("retire", {"ranges": [list(r) for r in join(blocks)]})
        except Timeout:
            raise
        except UkaiError:
            self._doubtful.difference_update(blocks)
            raise

    async def _retire(self, blocks: list[int]) -> None:
        """Retire what can be: stamped, without a write under way, flushed.  The lock is held."""
        c, reboots = self._c, self._reboots
        unstamped = [b for b in blocks if b not in self.warm]
        if unstamped:
            refused = await self._stamp(unstamped)
            self.warm.update(b for b in unstamped if b not in refused)
            blocks = [b for b in blocks if b not in refused]
        c.posts.refuse(blocks)  # what was posted is in a block that is active
        for block in blocks:
            c.hot.pop(block, None)
            self.warm.discard(block)  # from now on a write waits for the lock
        ready = [b for b in blocks if b not in c.inflight and b in self.active and not c.posts.touches(b)]
        asked: list[int] = []
        try:
            if c.flusher.needed(ready):
                await c.flusher.flush()  # what is acknowledged early is answered by then
            ready = [b for b in ready if b not in c.inflight and b not in c.behind.ops and b not in c.marker.pending]
            if ready and reboots == self._reboots:
                asked = ready
                self._doubtful.update(asked)
                await faults.pause("retire.flushed")
                await self._ask_to_retire(asked)
                await faults.pause("retire.done")
                for block in asked:
                    self.active.pop(block, None)
                self._doubtful.difference_update(asked)
        finally:
            if reboots == self._reboots:
                self.warm.update(b for b in blocks if b in self.active and b not in self._doubtful)
            self._due.difference_update(blocks)
            for block in blocks:
                self._idle_since.pop(block, None)
                c.readable.drop(block)
