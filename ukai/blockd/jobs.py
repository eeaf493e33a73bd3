"""What all orders to a coordinator have in common: the run of one, its rate, its end, hashes, locks (R11)."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from ukai.blockd.files import HASH_BYTES
from ukai.errors import NotCoordinator, NotReady, StaleSession, UkaiError, Unreachable
from ukai.messages import Header
from ukai.model import IN_SYNC, Job

if TYPE_CHECKING:
    from ukai.blockd.coordinator import Coordinator

log = logging.getLogger(__name__)

GROUP_BYTES = 256 * 2**20
GROUP_BLOCKS = 256
HASH_SPAN_BYTES = 16 * 2**20
BLOCKS_AT_ONCE = 2
RATE_SLICE_S = 0.02
PASSING = (Unreachable, NotReady, StaleSession)
"""An order waits for the end of these, and goes on where it was: a node is away, or its connection was made anew."""


class Rate:
    """At most so many bytes per second, in slices short enough not to starve the guest; 0: no limit."""

    def __init__(self) -> None:
        self.limit = 0
        self._free_at = 0.0

    async def take(self, size: int) -> None:
        if self.limit <= 0:
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now - RATE_SLICE_S) + size / self.limit
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


class Run(ABC):
    """One run of an order by the coordinator of the image."""

    what = ""
    """What is done, for the log."""

    def __init__(self, coordinator: Coordinator, job: Job) -> None:
        self._c, self.number = coordinator, job.number
        self._epoch = coordinator.epoch
        self.rate = Rate()
        self.bytes_total = self.bytes_done = self.bytes_equal = self.bytes_copied = self.bytes_hole = 0
        self.blocks_total = self.blocks_done = self.blocks_differed = 0
        self.reason = ""
        self._began, self._began_bytes = self._c.now(), 0
        self.task = coordinator.core.spawn(self._run())

    @abstractmethod
    async def _run(self) -> None:
        """Until the order is carried out, or the role over."""

    @property
    def job(self) -> Job | None:
        job = self._c.core.mirror.cluster.jobs.get(self._c.uuid)
        return job if job is not None and job.number == self.number and job.state == "running" else None

    @property
    def over(self) -> bool:
        """Whether the role that this run began with is over: the next grant has a run of its own."""
        return not self._c.holds(self._epoch)

    @property
    def _goes_on(self) -> bool:
        """Whether the order stands and this run is the one to carry it out: a new grant has a run of its own."""
        return self.job is not None and self._c.holds(self._epoch)

    async def _ask_metad(self, op: str, fields: dict[str, Any]) -> Header:
        """Raises NotCoordinator when the role that this run began with is over; UkaiError."""
        if not self._c.holds(self._epoch):
            raise NotCoordinator("the role was given up")
        return await self._c.ask_metad(op, fields)

    def progress(self) -> dict[str, Any]:
        """What `sync status` shows, in bytes, seconds and blocks."""
        seconds = max(self._c.now() - self._began, 1e-6)
        rate = (self.bytes_done - self._began_bytes) / seconds
        left = max(self.bytes_total - self.bytes_done, 0)
        return {
            "number": self.number,
            "coordinator": self._c.own,
            "bytes_total": self.bytes_total,
            "bytes_done": self.bytes_done,
            "bytes_equal": self.bytes_equal,
            "bytes_copied": self.bytes_copied,
            "bytes_hole": self.bytes_hole,
            "blocks_total": self.blocks_total,
            "blocks_done": self.blocks_done,
            "blocks_differed": self.blocks_differed,
            "rate": int(rate),
            "rate_limit": self.rate.limit,
            "eta": round(left / rate, 1) if rate > 0 and not self.reason else None,
            "reason": self.reason,
        }

    async def _end(self, state: str, reason: str) -> None:
        """Tell metad how the order ended, as often as it takes."""
        level = logging.INFO if state == "done" else logging.WARNING
        log.log(level, "%s of image %s: %s%s", self.what, self._c.image.name, state, f": {reason}" if reason else "")
        while self._goes_on:
            try:
                fields = {"number": self.number, "state": state, "reason": reason, "progress": self.progress()}
                await self._ask_metad("job.end", fields)
                return
            except UkaiError as e:
                if not e.retry:
                    log.info("%s of image %s: its end can't be told: %s", self.what, self._c.uuid, e.message)
                    return
                await asyncio.sleep(self._c.core.config.beat_interval)

    async def _take(self, length: int) -> None:
        """Wait as long as the limit that is in force now wants it."""
        job = self.job
        if job is not None:
            self.rate.limit = self._c.core.config.sync_rate if job.rate < 0 else job.rate
        await self.rate.take(length)

    @asynccontextmanager
    async def _locked(self, block: int, offset: int, length: int) -> AsyncIterator[None]:
        """Writes to a part of a block wait, and those under way have arrived everywhere."""
        c = self._c
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (offset, offset + length, future)
        c.locks.setdefault(block, []).append(entry)
        try:
            await c.writes.passed(block, offset, offset + length)
            yield
        finally:
            c.locks[block].remove(entry)
            if not c.locks[block]:
                del c.locks[block]
            future.set_result(None)

    def _source(self, block: int) -> str:
        """An in-sync replica to copy from, the nearest first.  Raises Unreachable."""
        c = self._c
        suspects = c.marker.suspects(block)
        good = [n for n, r in c.image.replicas(block).items() if r.status == IN_SYNC and n not in suspects]
        for node in sorted(good, key=lambda n: (n != c.own, n)):
            if node == c.own or c.core.peer(node).up:
                return node
        raise Unreachable(f"no in-sync copy of block {block} can be reached")

    async def _hash(
        self, node: str, block: int, offset: int, length: int, chunk: int, generation: int | None = None
    ) -> bytes:
        """16 bytes for each chunk of a part of a block, which must be of ``generation``.

        One that is in-sync is no older copy at least (R8).  Raises UkaiError.
        """
        c = self._c
        replica = c.image.replica(node, block)
        least = c.image.required(node, block) if replica is not None and replica.status == IN_SYNC else 0
        if node == c.own:
            image = c.core.store.image(c.uuid)
            image.check_least(block, least)
            if generation is not None:
                image.check(block, generation)
            return await c.core.replica.hash(image, block, offset, length, chunk)
        fields = {"i": c.uuid, "b": block, "o": offset, "l": length, "c": chunk, "least": least}
        if generation is not None:
            fields["g"] = generation
        _, payload = await c.core.peer(node).ask("h", fields)
        data = bytes(payload or b"")
        if len(data) != HASH_BYTES * -(-length // chunk):
            raise Unreachable(f"node {node} answered with {len(data)} bytes of hashes")
        return data
