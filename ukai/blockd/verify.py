"""Comparing the in-sync replicas of an image while guests write; only the coordinator does it.

For each block that was ever written, all its in-sync replicas are hashed chunk by chunk.  That needs no lock, as for
a resync: two equal hashes are equal.  Where they differ, the chunk is hashed again under a lock against writes, once
the writes under way have arrived everywhere: what differs then is no matter of moments.

Which one is wrong?  One that can't be read, or doesn't match its own checksum; else whoever is in the minority; of two
the one that the guest does not read.  It is marked, with the reason (R4); the last one stays (R9).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ukai.blockd.files import HASH_BYTES, HOLE
from ukai.blockd.jobs import BLOCKS_AT_ONCE, GROUP_BLOCKS, GROUP_BYTES, HASH_SPAN_BYTES, PASSING, Run
from ukai.errors import DiskError, NotCoordinator, StaleEpoch, UkaiError, Unreachable
from ukai.model import IN_SYNC, Job, written
from ukai.ranges import RangeSet

if TYPE_CHECKING:
    from ukai.blockd.coordinator import Coordinator

KEPT = ("bytes_done", "bytes_equal", "bytes_hole", "blocks_done", "blocks_differed")
"""Figures with which the next coordinator begins."""
NOTE_S = 5.0
"""How often metad is told how far it is: what the next coordinator compares a second time at most."""
SPANS_PER_S = 4
"""With a limit on the rate, a part of a second's bytes at a time: so a new limit is soon obeyed."""


class Verify(Run):
    """One run of a verify order by the coordinator of the image."""

    what = "verify"

    def __init__(self, coordinator: Coordinator, job: Job) -> None:
        super().__init__(coordinator, job)
        for figure in KEPT:
            setattr(self, figure, int(job.done.get(figure, 0)))
        self._began_bytes = self.bytes_done
        self._at = int(job.done.get("at", 0))
        """All blocks before it are compared."""
        self._part: dict[int, int] = {}
        """block at or after it → up to where it is compared."""
        self._found: set[int] = set()
        """Blocks at or after it that differed."""
        self._told_at = self._began
        self._kept: dict[str, int] = {}
        """The figures of all blocks before ``_at``."""
        self._keep(self._at)

    async def _run(self) -> None:
        c = self._c
        try:
            image, left = c.image, self._left()
            self.blocks_total = self.blocks_done + left.total()
            self.bytes_total = self.bytes_done + sum(self._bytes(a, b) for a, b in left)
            while self._goes_on:
                first = next((a for a, _ in self._left()), None)
                if first is None:
                    await self._end("done", self._sum())
                    return
                try:
                    for a, b, replicas in image.segments(*self._group(first)):
                        if written(replicas):
                            await self._blocks(range(a, b + 1))
                        else:
                            self._skip(a, b)
                    self.reason = ""
                except PASSING as e:
                    self.reason = e.message
                    await asyncio.sleep(c.core.config.beat_interval / 2)
        except (StaleEpoch, NotCoordinator):
            pass  # the next coordinator takes the order up
        except UkaiError as e:
            await self._end("failed", e.message)

    def _left(self) -> RangeSet:
        """Blocks that the order names and that are still to be compared."""
        job, last = self.job, self._c.image.block_count - 1
        wanted = RangeSet((a, b) for a, b in (job.ranges if job is not None else ())) or RangeSet([(0, last)])
        return RangeSet(wanted.within(self._at, last))

    def _group(self, first: int) -> tuple[int, int]:
        """As many blocks of those left, beginning with ``first``, as are compared in one go: (first, last)."""
        size = max(1, min(GROUP_BLOCKS, GROUP_BYTES // self._c.image.block_size))
        return self._left().within(first, first + size - 1)[0]

    def _bytes(self, first: int, last: int) -> int:
        image = self._c.image
        return (last - first) * image.block_size + image.block_bytes(last)

    def _skip(self, first: int, last: int) -> None:
        """Blocks that were never written."""
        self.blocks_done += last - first + 1
        self.bytes_hole += self._bytes(first, last)
        self.bytes_done += self._bytes(first, last)
        self._keep(last + 1)

    def _keep(self, at: int) -> None:
        """All blocks before ``at`` are compared."""
        self._at = at
        self._kept = {figure: getattr(self, figure) for figure in KEPT}

    async def _tell(self) -> None:
        """Have metad keep how far it is, for the next coordinator.  Raises UkaiError."""
        self._told_at = self._c.now()
        figures = {**self.progress(), **self._kept, "blocks_differed": self.blocks_differed}
        await self._ask_metad("job.note", {"number": self.number, "at": self._at, "progress": figures})

    def _sum(self) -> str:
        """How it ended, in a line."""
        mb_per_s = self.progress()["rate"] / 1e6
        differed = f"{self.blocks_differed} differed" if self.blocks_differed else "no difference"
        return f"{self.blocks_done} blocks, {self.bytes_done} bytes compared at {mb_per_s:.0f} MB/s: {differed}"

    async def _blocks(self, blocks: range) -> None:
        """Compare some blocks.  Raises UkaiError; what is done is done when it is called again."""
        limit = asyncio.Semaphore(BLOCKS_AT_ONCE)

        async def one(block: int) -> None:
            async with limit:
                await self._block(block)

        results = await asyncio.gather(*(one(b) for b in blocks), return_exceptions=True)
        for error in results:
            if isinstance(error, BaseException):
                raise error
        if not self._goes_on:
            raise NotCoordinator("the order or the role is over")
        for block in blocks:
            self._part.pop(block, None)
        self.blocks_done += len(blocks)
        self._found.clear()
        self._keep(blocks[-1] + 1)
        if self._c.now() - self._told_at >= NOTE_S:
            await self._tell()

    async def _block(self, block: int) -> None:
        """Compare one block.  Raises UkaiError."""
        length = self._c.image.block_bytes(block)
        while (at := self._part.get(block, 0)) < length and self._goes_on:
            span = min(self._span_bytes(), length - at)
            holes = await self._span(block, at, span)
            self._part[block] = at + span
            self.bytes_hole += holes
            self.bytes_done += span
            await self._take(span - holes)

    def _span_bytes(self) -> int:
        """How much is hashed at a time: whole chunks."""
        chunk, limit = self._c.core.config.sync_chunk, self.rate.limit
        span = min(HASH_SPAN_BYTES, limit // SPANS_PER_S) if limit > 0 else HASH_SPAN_BYTES
        return max(1, span // chunk) * chunk

    async def _span(self, block: int, offset: int, length: int) -> int:
        """Compare a part of a block; how much of it is holes everywhere.  Raises UkaiError."""
        chunk = self._c.core.config.sync_chunk
        hashes = await self._hashes(block, offset, length)
        holes = 0
        for index in range(-(-length // chunk)):
            size = min(chunk, length - index * chunk)
            found = {h[index * HASH_BYTES : (index + 1) * HASH_BYTES] for h in hashes.values()}
            if found == {HOLE}:
                holes += size
            elif len(found) > 1:
                await self._decide(block, offset + index * chunk, size)
            elif len(hashes) > 1:
                self.bytes_equal += size
        return holes

    async def _decide(self, block: int, offset: int, length: int) -> None:
        """Compare a chunk that seemed to differ while nothing writes to it, and mark what is wrong."""
        c = self._c
        async with self._locked(block, offset, length):
            hashes = await self._hashes(block, offset, length)
            alike: dict[bytes, list[str]] = {}
            for node in self._order(hashes):
                alike.setdefault(hashes[node], []).append(node)
            if len(alike) < 2:
                return
            good = max(alike.values(), key=len)  # of several as large, that which the guest reads comes first
            reason = f"differs from node {good[0]} in the {length} bytes at {offset}, found by verify"
            await self._differs(block)
            await c.mark([(block, node, reason) for node in hashes if node not in good])

    def _order(self, nodes: Iterable[str]) -> list[str]:
        """The nearest first, as for the guest's reads."""
        return sorted(nodes, key=lambda n: (n != self._c.own, n))

    async def _differs(self, block: int) -> None:
        """Count a block, once, and have it known before it is marked: then nobody finds it any more."""
        if block not in self._found:
            self._found.add(block)
            self.blocks_differed += 1
            await self._tell()

    async def _hashes(self, block: int, offset: int, length: int) -> dict[str, bytes]:
        """node → hashes of a part of its replica; those that can't be read are marked.  Raises UkaiError."""
        c, chunk = self._c, self._c.core.config.sync_chunk
        bad: set[str] = set()
        while True:
            replicas = {n: g for n, g in (await self._compared(block)).items() if n not in bad}
            work = (self._hash(n, block, offset, length, chunk, g) for n, g in replicas.items())
            results = dict(zip(replicas, await asyncio.gather(*work, return_exceptions=True), strict=True))
            marks = []
            for node, result in results.items():
                if isinstance(result, DiskError):
                    replica = c.image.replica(node, block)
                    if replica is not None and replica.status == IN_SYNC and replica.generation == replicas[node]:
                        marks.append((block, node, result.message))
                elif isinstance(result, BaseException):
                    raise result
            if not any(isinstance(r, BaseException) for r in results.values()):
                return {n: h for n, h in results.items() if isinstance(h, bytes)}
            if marks:
                await self._differs(block)
                bad.update(node for _, node in await c.mark(marks))  # the last one stays, and stays bad

    async def _compared(self, block: int) -> dict[str, int]:
        """node → generation of the replicas to compare, all of them stamped.  Raises UkaiError."""
        c, job = self._c, self.job
        while block in c.image.active and block not in c.activity.warm:
            await c.activity.make_warm([block])
        suspects = c.marker.suspects(block)
        good = {n: r for n, r in c.image.replicas(block).items() if r.status == IN_SYNC and n not in suspects}
        if not good:
            raise Unreachable(f"no in-sync copy of block {block} can be compared")
        wanted = job.nodes if job is not None and job.nodes else list(good)
        nodes = {self._order(good)[0], *wanted} & good.keys()
        return {n: good[n].generation for n in self._order(nodes)}
