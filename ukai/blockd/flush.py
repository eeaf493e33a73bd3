"""fsync: done when every in-sync replica with unflushed writes has them on its disk (R7).

Writes that are acknowledged early are answered first: their failures are marked as those of any other (R4).

One that fails, or can't be asked, is out-of-sync before the caller hears of success.  A failed flush of the
last copy is an error, now and whenever it is asked again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ukai import faults
from ukai.errors import Busy, DiskError, NotCoordinator, UkaiError, Unreachable
from ukai.model import IN_SYNC, OUT_OF_SYNC
from ukai.ranges import RangeSet, join

if TYPE_CHECKING:
    from ukai.blockd.coordinator import Coordinator, Handle
    from ukai.blockd.writes import Op


log = logging.getLogger(__name__)


class Flusher:
    """What one image has written and not flushed."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self.unflushed: dict[str, set[int]] = {}
        """node → blocks written there since the last flush."""
        self._flushing: dict[str, set[int]] = {}
        """What the flush under way has taken."""
        self._through: list[Op] = []
        """Writes under way that flush their blocks themselves."""
        self.lost = ""
        """Why acknowledged writes are gone, until the last handle is closed: no flush succeeds meanwhile."""
        self._lock = asyncio.Lock()

    def dirty(self, block: int, nodes: tuple[str, ...]) -> None:
        for node in nodes:
            blocks = self.unflushed.get(node)
            if blocks is None:
                self.unflushed[node] = {block}
            else:
                blocks.add(block)

    def needed(self, blocks: Iterable[int]) -> bool:
        """Whether some of these blocks have writes that no completed flush has covered."""
        wanted = set(blocks)
        return any(not wanted.isdisjoint(dirty) for dirty in self._open())

    def _open(self) -> Iterator[set[int]]:
        yield from self.unflushed.values()
        yield from self._flushing.values()
        for op in self._through:
            yield {op.block}

    def clean(self) -> bool:
        """Whether an fsync has nothing to do: all that this epoch has acknowledged is on every disk that counts."""
        c = self._c
        return c.held and not self.lost and not c.behind.ops and not any(self._open())

    def last(self) -> Op | None:
        """The write after which an fsync would have nothing to do, if that is all that is under way.

        It was acknowledged before its fdatasyncs were done.  One whose end another fsync waits for is none.
        """
        c = self._c
        if len(self._through) != 1 or not c.held or self.lost:
            return None
        op = self._through[0]
        if not op.acknowledged or op.then is not None or c.behind.ops != {op.block: [op]}:
            return None
        return None if op.took or any(self.unflushed.values()) or any(self._flushing.values()) else op

    def covers(self, block: int) -> bool:
        """Whether a write to a block may go through: what else has to be flushed would be left (R7)."""
        return not (
            self.lost
            or self._c.behind.ops
            or any(self._flushing.values())
            or any(blocks and blocks != {block} for blocks in self.unflushed.values())
            or any(op.took and op.block != block for op in self._through)
        )

    def through_begins(self, op: Op) -> None:
        """A write with an fdatasync of its block in each replica: it covers what that block had to be flushed."""
        for node in op.hot.nodes:
            blocks = self.unflushed.get(node)
            if blocks and op.block in blocks:
                blocks.discard(op.block)
                op.took = True
        op.hot.clean = True
        self._through.append(op)

    def through_ended(self, op: Op) -> None:
        """It is answered by all; one that failed anywhere counts as not flushed at all."""
        self._through.remove(op)
        if op.failed:
            self.dirty(op.block, op.hot.nodes)

    def begin(self, active: RangeSet) -> None:
        """A new epoch: what the former coordinator left active may hold acknowledged writes that no disk has."""
        self.unflushed = {}
        for block in active.indexes():
            for node, replica in self._c.image.replicas(block).items():
                if replica.status == IN_SYNC:
                    self.dirty(block, (node,))

    def rebooted(self, node: str) -> None:
        """The machine of a replica was started anew: what was not flushed there is gone.

        Where other in-sync copies have it, metad has taken this one out-of-sync.  Where it was the last copy, the
        guest must hear of it: its next fsync fails (R7).
        """
        through = {op.block for op in self._through if node in op.hot.nodes}
        for block in sorted(self.unflushed.get(node, set()) | self._flushing.get(node, set()) | through):
            replica = self._c.image.replica(node, block)
            if replica is not None and replica.status == IN_SYNC:
                self.lost = f"node {node} was started anew before block {block}, whose last copy it has, was flushed"
                log.error("image %s: %s", self._c.image.name, self.lost)
                return

    async def fsync(self, handle: Handle, deadline: float) -> None:
        """A handle's fsync: also what a former process of this node acknowledged is flushed (R7).

        This process may hold no role, because nothing was written since it began, or because metad took it.  Blocks
        that are active then may be unflushed, and only a coordinator can flush them; where none are, all is flushed.
        Raises what Role.acquire() and flush() raise, StaleHandle.
        """
        c = self._c
        while not c.held:
            c.check_handle(handle)
            image = c.image
            if not len(image.active):
                break
            mine = c.own in (image.writer, image.former)
            if image.writer and not mine:
                break  # another node's writes: nothing of this handle is among them
            try:
                await c.role.acquire(handle.epoch, "io" if mine else "read", deadline)
            except Busy:
                await c.core.catch_up()
        await self.flush()

    async def flush(self) -> None:
        """Raises DiskError when the last copy of a block could not be flushed, UkaiError when metad can't be told."""
        async with self._lock:
            if self.lost:
                raise DiskError(self.lost)
            behind = [op for ops in self._c.behind.ops.values() for op in ops]
            for op in self._through:  # what they have taken is not on the disks yet, and may not come there
                if op.took:
                    self.dirty(op.block, op.hot.nodes)
            work, self.unflushed = self.unflushed, {}
            self._flushing = work
            try:
                await self._flush(work, behind)
            except BaseException:  # failed or given up: nothing of it counts as flushed
                for node, blocks in work.items():
                    self.unflushed.setdefault(node, set()).update(blocks)
                raise
            finally:
                self._flushing = {}

    async def _flush(self, work: dict[str, set[int]], behind: list[Op]) -> None:
        epoch = self._c.epoch
        for blocks in work.values():
            for block in blocks:
                hot = self._c.hot.get(block)
                if hot is not None:
                    hot.clean = True
        nodes = [n for n, blocks in work.items() if blocks]
        away: dict[str, str] = {}
        await faults.pause("flush.begin")
        done = await asyncio.gather(*(self._one(n, work[n], away) for n in nodes))
        await faults.pause("flush.answered")
        await self._c.behind.settled(behind)  # their answers came before those of the flush, on the same connections
        if behind and not self._c.holds(epoch):
            raise NotCoordinator("the role ended before all replicas had answered")
        marks = []
        for node, failed in zip(nodes, done, strict=True):
            for block, reason in failed.items():
                replica = self._c.image.replica(node, block)
                if replica is not None and replica.status != OUT_OF_SYNC:
                    marks.append((block, node, reason))
        kept = await self._c.mark(marks) if marks else []
        if self.lost:
            raise DiskError(self.lost)
        if kept:
            block, node = kept[0]
            if all(n in away for _, n in kept):
                raise Unreachable(f"node {node} has the last copy of block {block}, and can't be asked: {away[node]}")
            reason = next(r for b, n, r in marks if (b, n) == kept[0])
            raise DiskError(f"flush failed on the last copy at node {node}: {reason}")

    async def _one(self, node: str, blocks: set[int], away: dict[str, str]) -> dict[int, str]:
        """block → reason of those that failed; a node that could not be asked is noted in ``away``."""
        c = self._c
        try:
            if node == c.own:
                return await c.core.replica.flush(c.core.store.image(c.uuid), sorted(blocks))
            fields = {"i": c.uuid, "e": c.epoch, "ranges": [list(r) for r in join(blocks)]}
            reply, _ = await c.core.peer(node).ask("f", fields, numbered=True)
            return {int(b): str(reason) for b, reason in reply["failed"]}
        except UkaiError as e:
            if e.retry:
                away[node] = e.message
            return dict.fromkeys(blocks, e.message)
        except (KeyError, TypeError, ValueError) as e:
            return dict.fromkeys(blocks, f"its answer to a flush can't be read: {type(e).__name__}")
