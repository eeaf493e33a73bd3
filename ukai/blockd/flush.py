"""fsync: done when every in-sync replica with unflushed writes has them on its disk (R7).

One that fails, or can't be asked, is out-of-sync before the caller hears of success.  A failed flush of the
last copy is an error, now and whenever it is asked again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ukai.errors import DiskError, UkaiError
from ukai.model import IN_SYNC, OUT_OF_SYNC
from ukai.ranges import RangeSet, join

if TYPE_CHECKING:
    from ukai.blockd.coordinator import Coordinator


class Flusher:
    """What one image has written and not flushed."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self.unflushed: dict[str, set[int]] = {}
        """node → blocks written there since the last flush."""
        self._lock = asyncio.Lock()

    def dirty(self, block: int, nodes: tuple[str, ...]) -> None:
        for node in nodes:
            blocks = self.unflushed.get(node)
            if blocks is None:
                self.unflushed[node] = {block}
            else:
                blocks.add(block)

    def begin(self, active: RangeSet) -> None:
        """A new epoch: what the former coordinator left active may hold acknowledged writes that no disk has."""
        self.unflushed = {}
        for block in active.indexes():
            for node, replica in self._c.image.replicas(block).items():
                if replica.status == IN_SYNC:
                    self.dirty(block, (node,))

    async def flush(self) -> None:
        """Raises DiskError when the last copy of a block could not be flushed, UkaiError when metad can't be told."""
        async with self._lock:
            work, self.unflushed = self.unflushed, {}
            try:
                await self._flush(work)
            except BaseException:  # failed or given up: nothing of it counts as flushed
                for node, blocks in work.items():
                    self.unflushed.setdefault(node, set()).update(blocks)
                raise

    async def _flush(self, work: dict[str, set[int]]) -> None:
        for blocks in work.values():
            for block in blocks:
                hot = self._c.hot.get(block)
                if hot is not None:
                    hot.clean = True
        nodes = [n for n, blocks in work.items() if blocks]
        done = await asyncio.gather(*(self._one(n, work[n]) for n in nodes))
        marks = []
        for node, failed in zip(nodes, done, strict=True):
            for block, reason in failed.items():
                replica = self._c.image.replica(node, block)
                if replica is not None and replica.status != OUT_OF_SYNC:
                    marks.append((block, node, reason))
        kept = await self._c.marker.mark(marks) if marks else []
        if kept:
            reasons = {(b, n): r for b, n, r in marks}
            raise DiskError(f"flush failed on the last copy at node {kept[0][1]}: {reasons[kept[0]]}")

    async def _one(self, node: str, blocks: set[int]) -> dict[int, str]:
        c = self._c
        try:
            if node == c.own:
                return await c.core.replica.flush(c.core.store.image(c.uuid), sorted(blocks))
            fields = {"i": c.uuid, "e": c.epoch, "ranges": [list(r) for r in join(blocks)]}
            reply, _ = await c.core.peer(node).ask("f", fields, numbered=True)
            return {int(b): str(reason) for b, reason in reply["failed"]}
        except UkaiError as e:
            return dict.fromkeys(blocks, e.message)
        except (KeyError, TypeError, ValueError) as e:
            return dict.fromkeys(blocks, f"its answer to a flush can't be read: {type(e).__name__}")
