"""Writes of a flush image that are acknowledged before every replica has answered.

The local replica has them, and the others get them in order on the same numbered connection (R6).  What is under way
so is bounded; who finds no room waits, first come first served.  A replica that did not take one is marked as ever
(R4), only that the guest has its answer already; so is one that could not store one that is stored on the way.  An
fsync waits for all of it (R7).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ukai.errors import DiskError, UkaiError

if TYPE_CHECKING:
    from ukai.blockd.coordinator import Coordinator
    from ukai.blockd.writes import Op

log = logging.getLogger(__name__)

COST_MIN_BYTES = 4096
"""What a small write or a discard takes of the window: requests are bounded by it too."""


class Behind:
    """What the other replicas of one image have not answered yet."""

    def __init__(self, coordinator: Coordinator, window_bytes: int) -> None:
        self._c, self._window_bytes = coordinator, window_bytes
        self.ops: dict[int, list[Op]] = {}
        """block → acknowledged writes that are not settled: answered by all and, where that failed, marked."""
        self.lag_bytes = self.lag_requests = 0
        """Sent and not answered yet."""
        self._used_bytes = 0
        self._queue: deque[tuple[int, Callable[[], None]]] = deque()
        self._closing: set[int] = set()

    # --- room

    def full(self, length: int, waited: bool = False) -> bool:
        """Whether a write must wait; one that has ``waited`` is not held up by those behind it."""
        return (bool(self._queue) and not waited) or not self._fits(length)

    def half_full(self) -> bool:
        return self._used_bytes > self._window_bytes // 2

    def _fits(self, length: int) -> bool:
        return not self._used_bytes or self._used_bytes + length <= self._window_bytes

    def wait(self, length: int, go: Callable[[], None]) -> None:
        """Call ``go`` when there is room."""
        self._queue.append((length, go))

    async def room(self, length: int) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def go() -> None:
            if not future.done():
                future.set_result(None)

        self.wait(length, go)
        await future

    def _let_in(self) -> None:
        while self._queue and self._fits(self._queue[0][0]):
            self._queue.popleft()[1]()

    # --- the writes

    def early(self, block: int) -> bool:
        """Whether writes to a block may be acknowledged early: not while its local copy is about to be marked."""
        return block not in self._closing

    def take(self, op: Op, length: int) -> None:
        """A write that the local replica has, and that some peer has not answered, or some disk not stored."""
        op.acknowledged, op.done = True, lambda op: self._answered(op, length)
        ops = self.ops.get(op.block)
        if ops is None:
            self.ops[op.block] = [op]
        else:
            ops.append(op)
        self.lag_bytes += length
        self.lag_requests += 1
        self._used_bytes += max(length, COST_MIN_BYTES)

    def _answered(self, op: Op, length: int) -> None:
        self.lag_bytes -= length
        self.lag_requests -= 1
        self._used_bytes -= max(length, COST_MIN_BYTES)
        if op.through:
            self._c.flusher.through_ended(op)
        if op.failed:
            self._c.core.spawn(self._settle(op))
        else:
            self._settled(op)
        if self._queue:
            self._let_in()

    async def _settle(self, op: Op) -> None:
        c = self._c
        try:
            await c.writes.settle(op)
        except DiskError as e:  # the local copy was taken away meanwhile: whoever asks must hear of it (R7)
            c.flusher.lost = e.message
            log.error("image %s: %s", c.name(), e.message)
        except UkaiError:
            pass  # the role is over: metad has kept the local copy, or has made this node's handles stale (R2)
        finally:
            self._settled(op)

    def _settled(self, op: Op) -> None:
        ops = self.ops[op.block]
        ops.remove(op)
        if not ops:
            del self.ops[op.block]
        if op.ended is not None:
            op.ended.set_result(None)
        if op.then is not None:
            op.then()

    # --- waiting for them

    def touches(self, block: int, start: int, end: int) -> list[Op]:
        """Those on a part of a block."""
        return [op for op in self.ops.get(block, ()) if op.offset < end and start < op.end]

    async def passed(self, block: int, start: int, end: int) -> None:
        """Wait until none touches this part of a block."""
        while ops := self.touches(block, start, end):
            await ops[0].wait()

    async def settled(self, ops: Iterable[Op]) -> None:
        """Wait for some of them."""
        for op in ops:
            if op in self.ops.get(op.block, ()):
                await op.wait()

    async def closed(self, blocks: set[int]) -> None:
        """Wait until nothing is under way on some blocks, with later writes acknowledged late; see reopen().

        The local copy alone has what is acknowledged so: it is not given up before others have answered for it.
        A write that failed here, and that all have answered, may ask for this itself.
        """
        self._closing |= blocks
        for block in blocks:
            self._c.hot.pop(block, None)
        for block in blocks:
            while ops := [op for op in self.ops.get(block, ()) if op.waiting or self._c.own not in op.failed]:
                await ops[0].wait()

    def reopen(self, blocks: set[int]) -> None:
        self._closing -= blocks
