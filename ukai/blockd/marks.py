"""Out-of-sync marks on their way to metad (R4).

A mark is asked for once and then pursued until metad has committed it or the role is lost; while it is under
way the replica is neither read nor counted.  Marks that wait together travel together.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from ukai import faults
from ukai.errors import NotCoordinator, RemoteProtocolError, StaleEpoch, UkaiError
from ukai.messages import Header
from ukai.ranges import join

log = logging.getLogger(__name__)

RETRY_S = 0.1
INTERRUPTED = "resync interrupted"
"""The reason of a mark that is no event of its own: what stopped the resync says so itself."""

Send = Callable[[list[list[Any]]], Awaitable[Header]]


class Marker:
    """The marks of one image in one epoch."""

    def __init__(self, send: Send, on_begin: Callable[[int], None]) -> None:
        self._send, self._on_begin = send, on_begin
        self.pending: dict[int, dict[str, str]] = {}
        """block → node → reason."""
        self._waiting: dict[tuple[int, str], asyncio.Future[bool]] = {}
        self._task: asyncio.Task[None] | None = None

    def begin(self, block: int, node: str, reason: str) -> asyncio.Future[bool]:
        """Ask for one mark.  The result: true when committed, false when it is the last in-sync one (R9)."""
        key = (block, node)
        future = self._waiting.get(key)
        if future is None:
            future = self._waiting[key] = asyncio.get_running_loop().create_future()
            self._on_begin(block)  # what it takes in is written while nothing is pending
            self.pending.setdefault(block, {})[node] = reason
            if self._task is None:
                self._task = asyncio.get_running_loop().create_task(self._pursue(), name="marks")
        return future

    async def mark(self, marks: list[tuple[int, str, str]]) -> list[tuple[int, str]]:
        """Mark (block, node, reason); returns those that stay because they are the last.  Raises UkaiError."""
        futures = [self.begin(*m) for m in marks]
        stay = []
        for (block, node, _), future in zip(marks, futures, strict=True):
            if not await asyncio.shield(future):
                stay.append((block, node))
        return stay

    def suspects(self, block: int) -> dict[str, str]:
        """Nodes whose replica of the block is being marked."""
        return self.pending.get(block, {})

    async def settled(self, block: int) -> None:
        """Wait until no mark of the block is under way.  Raises UkaiError."""
        while block in self.pending:
            node = next(iter(self.pending[block]))
            await asyncio.shield(self._waiting[(block, node)])

    async def _pursue(self) -> None:
        while self._waiting:
            batch = dict(self._waiting)
            by: dict[tuple[str, str], list[int]] = {}
            for block, node in batch:
                by.setdefault((node, self.pending[block][node]), []).append(block)
            marks: list[list[Any]] = [
                [node, a, b, reason] for (node, reason), blocks in by.items() for a, b in join(blocks)
            ]
            try:
                await faults.pause("mark.ask")
                stays = kept(await self._send(marks))
                await faults.pause("mark.committed")
            except (StaleEpoch, NotCoordinator) as e:
                self.abandon(e)
                break
            except UkaiError:
                await asyncio.sleep(RETRY_S)
                continue
            except Exception:  # a mark that nobody pursues would hold up its block for good
                log.exception("defect while marking")
                await asyncio.sleep(RETRY_S)
                continue
            for (block, node), future in batch.items():
                self._forget(block, node)
                if not future.done():
                    future.set_result((node, block) not in stays)
        self._task = None

    def _forget(self, block: int, node: str) -> None:
        self._waiting.pop((block, node), None)
        nodes = self.pending.get(block)
        if nodes is not None:
            nodes.pop(node, None)
            if not nodes:
                del self.pending[block]

    def abandon(self, error: UkaiError) -> None:
        """The role is lost: whoever waits gets the error."""
        waiting, self._waiting, self.pending = self._waiting, {}, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # somebody may have stopped waiting
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            self._task = None


def kept(reply: Header) -> set[tuple[str, int]]:
    """node and block of the marks that metad refused (R9).  Raises RemoteProtocolError."""
    try:
        return {(node, i) for node, first, last in reply.get("kept", []) for i in range(first, last + 1)}
    except (TypeError, ValueError) as e:
        raise RemoteProtocolError(f"metad's answer to marks can't be read: {e}") from None
