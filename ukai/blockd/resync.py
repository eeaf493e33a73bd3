"""Bringing out-of-sync replicas back (R11); only the coordinator does it.

For each block: the target's file is made ready, the replica becomes syncing (so that new writes reach it too),
source and target are hashed chunk by chunk, chunks that differ are read and sent under a lock against writes,
the target stores the generation and flushes, and a compare-and-set makes it in-sync.

Hashing needs no lock: writes arrive at source and target in one order, and applying writes twice in their order
gives what applying them once gives; so two equal hashes, even of different moments, mean equal chunks once all
writes under way have arrived.  Copying does need it, between the read of the source and the sending.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

from ukai import faults
from ukai.blockd.files import HASH_BYTES, HOLE, is_zeros
from ukai.blockd.jobs import BLOCKS_AT_ONCE, GROUP_BLOCKS, GROUP_BYTES, HASH_SPAN_BYTES, PASSING, Run
from ukai.blockd.marks import INTERRUPTED
from ukai.blockd.peer import Payload
from ukai.errors import DiskError, NotCoordinator, NotReady, StaleEpoch, UkaiError, Unreachable
from ukai.messages import ranges
from ukai.model import IN_SYNC, OUT_OF_SYNC, SYNCING, Job
from ukai.ranges import RangeMap, RangeSet, join

if TYPE_CHECKING:
    from ukai.blockd.coordinator import Coordinator

log = logging.getLogger(__name__)

Data = TypeVar("Data")

FINISH_S = 0.5
"""How long whole blocks wait for others to be made in-sync with them: all that an interruption can cost."""


class Resync(Run):
    """One run of a resync order by the coordinator of the image."""

    what = "resync"

    def __init__(self, coordinator: Coordinator, job: Job) -> None:
        self._chunks = asyncio.Semaphore(coordinator.core.config.sync_window)
        self._begun: set[tuple[str, int]] = set()
        """(target, block) that this run has made syncing."""
        super().__init__(coordinator, job)

    def _work(self) -> dict[str, list[int]]:
        """target → out-of-sync blocks that the order names."""
        job, image = self.job, self._c.image
        if job is None:
            return {}
        out: dict[str, list[int]] = {}
        for node, where in image.locations.items():
            if job.nodes and node not in job.nodes:
                continue
            blocks: list[int] = []
            for first, last in job.ranges or [[0, image.block_count - 1]]:
                for a, b, replica in where.within(first, last):
                    if replica.status == OUT_OF_SYNC:
                        blocks.extend(range(a, b + 1))
            if blocks:
                out[node] = blocks
        return out

    async def _run(self) -> None:
        c = self._c
        try:
            while self._goes_on:
                work = self._work()
                left = [b for blocks in work.values() for b in blocks]
                self.blocks_total = self.blocks_done + len(left)
                self.bytes_total = self.bytes_done + sum(map(c.image.block_bytes, left))
                if not work:
                    await self._end("done", self._sum())
                    return
                reachable = {n: blocks for n, blocks in work.items() if n == c.own or c.core.peer(n).up}
                if not reachable:
                    self.reason = "; ".join(f"node {n} can't be reached: {c.core.peer(n).reason}" for n in work)
                    await asyncio.sleep(c.core.config.beat_interval / 2)
                    continue
                self.reason = ""
                for target, blocks in reachable.items():
                    await self._target(target, blocks)
                if self.reason:  # a connection may be lost before its end is noticed: leave the loop to others
                    await asyncio.sleep(c.core.config.beat_interval / 2)
        except (StaleEpoch, NotCoordinator):
            pass  # the next coordinator takes the order up
        except UkaiError as e:
            await self._end("failed", e.message)
        finally:
            await self._abandon()

    def _sum(self) -> str:
        """How it ended, in a line."""
        compared = self.bytes_equal + self.bytes_copied + self.bytes_hole
        return f"{self.blocks_done} blocks, {compared} bytes compared: {self.bytes_copied} copied"

    async def _abandon(self) -> None:
        """What is still syncing by this run is out-of-sync again: never syncing for ever."""
        c = self._c
        if not c.holds(self._epoch) or not self._begun:
            return
        marks = [
            (block, target, INTERRUPTED)
            for target, block in self._begun
            if (r := c.image.replica(target, block)) is not None and r.status == SYNCING
        ]
        self._begun.clear()
        try:
            await asyncio.shield(c.core.spawn(c.marker.mark(marks)))
        except UkaiError as e:
            log.info("image %s: syncing replicas stay until the next grant: %s", c.uuid, e.message)

    async def _target(self, target: str, blocks: list[int]) -> None:
        """One pass over the blocks of one target.  Raises UkaiError when going on makes no sense."""
        size = max(1, min(GROUP_BLOCKS, GROUP_BYTES // self._c.image.block_size))
        for at in range(0, len(blocks), size):
            if not self._goes_on:
                return
            try:
                await self._group(target, blocks[at : at + size])
            except PASSING as e:
                self.reason = e.message
                log.info("resync of image %s stands still: %s", self._c.image.name, e.message)
                return

    async def _group(self, target: str, blocks: list[int]) -> None:
        c = self._c
        ranges = [list(r) for r in join(blocks)]
        fresh = [b for b in blocks if not any(r.generation for r in c.image.replicas(b).values())]
        stale = sorted(set(blocks) - set(fresh))
        for part, empty in ((stale, False), (fresh, True)):
            if part:
                await self._renew(target, part, empty)
        await faults.pause("sync.renewed")
        self._begun.update((target, b) for b in stale)
        await self._ask_metad("sync.begin", {"target": target, "ranges": ranges})
        await faults.pause("sync.begun")
        for block in fresh:
            replica = c.image.replica(target, block)
            if replica is not None and replica.status == SYNCING:
                self._begun.add((target, block))  # its first write came in between: left to the next pass
            else:
                self._count(block, hole=c.image.block_bytes(block))
        done: dict[int, int] = {}
        limit = asyncio.Semaphore(BLOCKS_AT_ONCE)
        finished_at = c.now()

        async def one(block: int) -> None:
            nonlocal finished_at
            async with limit:
                generation = await self._block(target, block) if self._goes_on else 0
                if generation:
                    done[block] = generation
                    if c.now() - finished_at >= FINISH_S:
                        finished_at = c.now()
                        await self._finish(target, done)

        results = await asyncio.gather(*(one(b) for b in stale), return_exceptions=True)
        await self._finish(target, done)
        errors = [r for r in results if isinstance(r, BaseException)]
        await self._abandon()
        for error in errors:
            raise error

    async def _finish(self, target: str, done: dict[int, int]) -> None:
        """Whole blocks become in-sync where they are still syncing, and of the generation that the target has.

        ``done``, block → generation, is emptied.  What became active meanwhile is left to the next pass, which finds it
        equal.  Raises UkaiError.
        """
        if done:
            found = RangeMap((b, b, generation) for b, generation in sorted(done.items()))
            blocks = list(done)
            done.clear()
            fields = {"target": target, "done": [list(r) for r in found]}
            await faults.pause("sync.finish")
            reply = await self._ask_metad("sync.finish", fields)
            await faults.pause("sync.finished")
            failed = RangeSet(ranges(reply, "failed"))
            self._begun.difference_update((target, b) for b in blocks if b not in failed)

    def _count(self, block: int, *, hole: int = 0) -> None:
        self.blocks_done += 1
        self.bytes_hole += hole
        self.bytes_done += hole

    async def _renew(self, target: str, blocks: list[int], empty: bool) -> None:
        c = self._c
        if target == c.own:
            image = c.core.store.image(c.uuid)
            image.admit(c.epoch)
            await c.core.replica.renew(image, c.epoch, blocks, empty)
        else:
            fields = {"i": c.uuid, "e": c.epoch, "ranges": [list(r) for r in join(blocks)], "empty": empty}
            await c.core.peer(target).ask("k", fields, numbered=True)

    async def _block(self, target: str, block: int) -> int:
        """Compare and copy one block; its generation if it is whole now, else 0.  Raises UkaiError."""
        c = self._c
        replica = c.image.replica(target, block)
        if replica is None or replica.status != SYNCING:
            return 0
        length = c.image.block_bytes(block)
        hashes = await self._hashes(target, block, 0)
        for at in range(0, length, HASH_SPAN_BYTES):
            # while one span is copied the next one is compared
            _, hashes = await asyncio.gather(
                self._span(target, block, at, *hashes), self._hashes(target, block, at + HASH_SPAN_BYTES)
            )
            replica = c.image.replica(target, block)
            if not self._goes_on or replica is None or replica.status != SYNCING:
                return 0
        generation = replica.generation
        await faults.pause("sync.complete")
        if target == c.own:
            await c.core.replica.complete(c.core.store.image(c.uuid), block, generation)
        else:
            fields = {"i": c.uuid, "e": c.epoch, "b": block, "g": generation}
            await c.core.peer(target).ask("d", fields, numbered=True)
        self._count(block)
        return generation

    async def _hashes(self, target: str, block: int, offset: int) -> tuple[bytes, bytes]:
        """Hashes of a span's chunks at the target and at the source; none behind the end of the block."""
        length = min(HASH_SPAN_BYTES, self._c.image.block_bytes(block) - offset)
        if length <= 0:
            return b"", b""
        chunk, source = self._c.core.config.sync_chunk, self._source(block)
        return await asyncio.gather(
            self._hash(target, block, offset, length, chunk),
            self._of_source(block, source, self._hash(source, block, offset, length, chunk)),
        )

    async def _span(self, target: str, block: int, offset: int, theirs: bytes, ours: bytes) -> None:
        """Copy the chunks of a span whose hashes differ."""
        chunk = self._c.core.config.sync_chunk
        length = min(HASH_SPAN_BYTES, self._c.image.block_bytes(block) - offset)
        copies = []
        for index in range(-(-length // chunk)):
            at = offset + index * chunk
            size = min(chunk, offset + length - at)
            here = ours[index * HASH_BYTES : (index + 1) * HASH_BYTES]
            if theirs[index * HASH_BYTES : (index + 1) * HASH_BYTES] == here:
                if here == HOLE:
                    self.bytes_hole += size
                else:
                    self.bytes_equal += size
                self.bytes_done += size
            else:
                copies.append(self._copy(target, block, at, size))
        await faults.pause("sync.compared")
        await asyncio.gather(*copies)

    async def _copy(self, target: str, block: int, offset: int, length: int) -> None:
        """Copy one chunk; writes to it wait from the read of the source until it is sent (R11)."""
        async with self._chunks:
            await self._take(length)
            async with self._locked(block, offset, length):
                source = self._source(block)
                data = await self._of_source(block, source, self._read(source, block, offset, length))
                await faults.pause("sync.read")
                sending = self._send(target, block, offset, data)
            await faults.pause("sync.sent")
            await sending
        self.bytes_copied += length
        self.bytes_done += length

    async def _of_source(self, block: int, source: str, work: Awaitable[Data]) -> Data:
        """What a source answers; one that fails is marked, and the block left to the next pass, with another (R4)."""
        try:
            return await work
        except DiskError as e:
            if await self._c.mark([(block, source, e.message)]):
                raise  # the last one stays
            raise NotReady(f"block {block} at node {source}: {e.message}") from None

    async def _read(self, node: str, block: int, offset: int, length: int) -> Payload:
        c = self._c
        replica = c.image.replica(node, block)
        if replica is None or replica.status != IN_SYNC:
            raise Unreachable(f"the source of block {block} is no longer in-sync")
        if node == c.own:
            store = c.core.store.image(c.uuid)
            store.check_least(block, c.image.required(node, block))
            return await c.core.replica.read(store, block, offset, length)
        # a block may have been announced anew a moment ago, and the source not have heard of it: that is no fault of it
        fields = {"i": c.uuid, "b": block, "o": offset, "l": length, "least": c.image.required(node, block)}
        _, payload = await c.core.peer(node).ask("r", fields)
        if payload is None or len(payload) != length:
            raise Unreachable(f"node {node} answered a read of block {block} without its data")
        return payload

    def _send(self, target: str, block: int, offset: int, data: Payload) -> asyncio.Future[None]:
        """Put one chunk on its way, in order with the guest's writes; the future tells when it has arrived."""
        c = self._c
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        replica = c.image.replica(target, block)
        if replica is None or replica.status != SYNCING:
            future.set_exception(Unreachable(f"block {block} at node {target} is no longer syncing"))
            return future
        hole = is_zeros(data)
        if target == c.own:
            store = c.core.store.image(c.uuid)
            try:
                if hole:
                    store.punch(block, offset, len(data), replica.generation)
                else:
                    store.write(block, offset, data, replica.generation)
                future.set_result(None)
            except UkaiError as e:
                future.set_exception(e)
            return future

        def done(error: UkaiError | None, _header: object, _payload: object) -> None:
            if not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

        header = {"i": c.uuid, "e": c.epoch, "b": block, "o": offset, "g": replica.generation}
        header |= {"op": "z", "l": len(data)} if hole else {"op": "w"}
        if not c.core.peer(target).numbered(header, None if hole else data, done):
            future.set_exception(Unreachable(f"node {target} can't be reached: {c.core.peer(target).reason}"))
        return future
