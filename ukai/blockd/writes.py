"""Writes of one image: to every replica, in one order, answered late (R4, R6, R10).

The healthy path is short on purpose: look up the block, write the local file, send to the peers, answer when
all have answered.  Whatever is not as expected (cold block, lost role, peer away, chunk locked by a resync)
goes to the slow path, which is written for reading.
"""

from __future__ import annotations

import asyncio
import enum
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from ukai import faults
from ukai.blockd.image_store import ImageStore
from ukai.blockd.peer import LEISURE_BYTES, Payload, Peer
from ukai.blockd.role import RETRY_S
from ukai.errors import Damaged, DiskError, NoSpace, StaleEpoch, Timeout, UkaiError, Unreachable
from ukai.messages import Header
from ukai.model import IN_SYNC, OUT_OF_SYNC, written

if TYPE_CHECKING:
    from ukai.blockd.coordinator import Coordinator, Handle

PIECES_AT_ONCE = 32

Done = Callable[[UkaiError | None], None]


class Hot:
    """Where the writes of a warm block go, in this epoch and generation."""

    __slots__ = ("clean", "early", "generation", "local", "nodes", "peers", "touched", "trusted")

    def __init__(
        self, generation: int, local: ImageStore | None, peers: list[Peer], own: str, trusted: set[str]
    ) -> None:
        self.generation, self.local, self.peers = generation, local, peers
        self.nodes = tuple(p.node for p in peers) + ((own,) if local is not None else ())
        self.trusted = trusted
        """Nodes whose replica is in-sync; the others are syncing."""
        self.early = False
        """Whether a write is acknowledged when the local replica has it (flush images)."""
        self.clean = True
        self.touched = True


class When(enum.IntEnum):
    """When what is written has to be on the disks."""

    LATER = 0
    """When an fsync asks for it."""
    SOON = 1
    """An fsync is likely to follow."""
    NOW = 2
    """Before it is answered (R7)."""


class Op:
    """One write, or discard, of a part of one block, on its way to the replicas."""

    __slots__ = (
        "acknowledged",
        "block",
        "done",
        "end",
        "ended",
        "epoch",
        "failed",
        "hot",
        "offset",
        "then",
        "through",
        "took",
        "waiting",
    )

    def __init__(
        self, block: int, offset: int, end: int, hot: Hot, epoch: int, done: Callable[[Op], None], through: bool
    ) -> None:
        self.block, self.offset, self.end, self.hot, self.epoch, self.done = block, offset, end, hot, epoch, done
        self.through = through
        """Each replica answers when its fdatasync of the block is done (R7)."""
        self.took = False
        """Earlier writes to the block are flushed with it."""
        self.waiting = 0
        self.acknowledged = False
        """Early: the caller has its answer, and replicas may still fail."""
        self.failed: dict[str, UkaiError] = {}
        self.ended: asyncio.Future[None] | None = None
        """Made by whoever must wait until the write is settled."""
        self.then: Callable[[], None] | None = None
        """Called once an acknowledged write is settled: an fsync waits for nothing else."""

    def answered(self, node: str, error: UkaiError | None) -> None:
        if error is not None:
            self.failed[node] = error
        self.waiting -= 1
        if self.waiting == 0:
            faults.point("write.answered")
            self.done(self)

    async def wait(self) -> None:
        """Wait until the write is settled."""
        if self.ended is None:
            self.ended = asyncio.get_running_loop().create_future()
        await asyncio.shield(self.ended)


class Writes:
    """The way of an image's writes to its replicas."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self._quiet: asyncio.Event | None = None

    def write(
        self,
        handle: Handle,
        offset: int,
        data: Payload | None,
        length: int,
        stored: When,
        done: Done,
        deadline: float = 0.0,
    ) -> None:
        """Write ``data`` at ``offset`` of the image, or make ``length`` bytes read as zeros where it is None."""
        c = self._c
        image = c.core.mirror.cluster.images.get(c.uuid)
        if image is not None:
            block, within = divmod(offset, image.block_size)
            hot = c.hot.get(block)
            through = stored is not When.LATER and data is not None and c.flusher.covers(block)
            if (
                hot is not None
                and (through or stored is not When.NOW)
                and block not in c.locks
                and c.frozen is None
                and within + length <= image.block_size
                and handle.epoch >= image.lost.get(c.own, 0)
                and block not in c.marker.pending
            ):
                cost = 0 if data is None else length
                early = hot.early and not (through and stored is When.NOW)
                if early and c.behind.full(cost, waited=deadline > 0):
                    deadline = deadline or c.now() + c.core.config.io_timeout
                    c.behind.wait(cost, lambda: self.write(handle, offset, data, length, stored, done, deadline))
                    return
                finish = functools.partial(self._finish_fast, handle, data, length, done)
                self._apply(block, within, data, length, hot, finish, early, through)
                return
        deadline = deadline or c.now() + c.core.config.io_timeout
        c.core.spawn(self._write_slow(handle, offset, data, length, stored, done, deadline))

    def _apply(
        self,
        block: int,
        offset: int,
        data: Payload | None,
        length: int,
        hot: Hot,
        done: Callable[[Op], None],
        early: bool,
        through: bool = False,
    ) -> None:
        """Hand one write to the local file and to every peer, no wait between: one order everywhere (R6).

        ``early``: it may be acknowledged when the local file has it.  ``through``: with an fdatasync of its block in
        each, all at the same time, which an early acknowledgement does not wait for.
        """
        c = self._c
        op = Op(block, offset, offset + length, hot, c.epoch, done, through)
        hot.touched = True
        if through:
            c.flusher.through_begins(op)
        elif hot.clean:
            hot.clean = False
            c.flusher.dirty(block, hot.nodes)
        op.waiting = 1
        leisurely = early and not through and length < LEISURE_BYTES // 2
        for peer in hot.peers:
            answered = functools.partial(_answered, op, peer.node)
            op.waiting += 1
            if leisurely and data is not None:
                sent = peer.write_at_leisure(c.uuid, op.epoch, block, offset, hot.generation, data, answered)
            else:
                sent = peer.numbered(self._header(op, data, length), data, answered)
            if not sent:
                op.waiting -= 1
                op.failed[peer.node] = Unreachable(f"node {peer.node}: {peer.reason}")
        error: UkaiError | None = None
        if hot.local is not None:
            try:
                faults.point("write.sent")
                if data is None:
                    hot.local.punch(block, offset, length, hot.generation)
                else:
                    hot.local.write(block, offset, data, hot.generation)
                faults.point("write.local")
            except UkaiError as e:
                error = e
        if (
            early
            and hot.local is not None
            and error is None
            and op.waiting > 1
            and not op.failed
            and c.now() < c.core.lease_until  # else another may be the writer: then only the replicas know
            and not any(peer.busy for peer in hot.peers)
        ):
            c.behind.take(op, 0 if data is None else length)
            if through:
                self._flush_here(op, hot.local)
            else:
                op.answered(c.own, None)
            done(op)
            return
        ops = c.inflight.get(block)
        if ops is None:
            c.inflight[block] = [op]
        else:
            ops.append(op)
        if through and error is None and hot.local is not None:
            self._flush_here(op, hot.local)
        else:
            op.answered(c.own, error)

    def _header(self, op: Op, data: Payload | None, length: int) -> Header:
        header: Header = {"i": self._c.uuid, "e": op.epoch, "b": op.block, "o": op.offset, "g": op.hot.generation}
        if data is None:
            header["op"], header["l"] = "z", length
        else:
            header["op"] = "ws" if op.through else "w"
        return header

    def _flush_here(self, op: Op, image: ImageStore) -> None:
        """Once the peers have been sent what they wait for."""
        done = functools.partial(_flushed_here, op, self._c.own)
        self._c.core.replica.flush_soon(image, (op.block,), done)

    def _untrack(self, op: Op) -> None:
        c = self._c
        ops = c.inflight[op.block]
        ops.remove(op)
        if op.ended is not None:
            op.ended.set_result(None)
        if not ops:
            del c.inflight[op.block]
            if not c.inflight and self._quiet is not None:
                self._quiet.set()

    def _finish_fast(self, handle: Handle, data: Payload | None, length: int, done: Done, op: Op) -> None:
        c = self._c
        if op.acknowledged:
            done(None)
            return
        if op.through:
            c.flusher.through_ended(op)
        if not op.failed:
            self._untrack(op)
            done(None)
            return

        async def settle() -> None:
            deadline = c.now() + c.core.config.io_timeout
            try:
                async with asyncio.timeout_at(deadline):
                    if await self._settled(op):
                        await self._piece(handle, op.block, op.offset, data, length, deadline)
                    if op.through:
                        await c.flusher.flush()
            except TimeoutError:
                c.readable.drop(op.block)
                done(Timeout("the write could not be completed in time"))
            except UkaiError as e:
                c.readable.drop(op.block)
                done(e)
            else:
                done(None)

        c.core.spawn(settle())

    async def _write_slow(
        self,
        handle: Handle,
        offset: int,
        data: Payload | None,
        length: int,
        stored: When,
        done: Done,
        deadline: float,
    ) -> None:
        c = self._c
        try:
            async with asyncio.timeout_at(deadline):
                pieces = c.pieces(offset, length)
                for at in range(0, len(pieces), PIECES_AT_ONCE):
                    group = pieces[at : at + PIECES_AT_ONCE]
                    ended = await asyncio.gather(
                        *(
                            self._piece(
                                handle, b, o, None if data is None else memoryview(data)[p : p + n], n, deadline
                            )
                            for b, o, n, p in group
                        ),
                        return_exceptions=True,  # no piece may still be at work when the caller hears of an error
                    )
                    for error in ended:
                        if isinstance(error, BaseException):
                            raise error
                if stored is When.NOW:
                    await c.flusher.flush()
        except TimeoutError:
            self._astray(offset, length)
            done(c.late("write"))
        except UkaiError as e:
            self._astray(offset, length)
            done(e)
        else:
            done(None)

    def _astray(self, offset: int, length: int) -> None:
        """The caller hears of an error while parts may still be under way: reads must come here, to wait for them."""
        c = self._c
        image = c.core.mirror.cluster.images.get(c.uuid)
        if image is not None:
            last = min((offset + length - 1) // image.block_size, image.block_count - 1)
            for block in range(offset // image.block_size, last + 1):
                c.readable.drop(block)

    async def _piece(
        self, handle: Handle, block: int, offset: int, data: Payload | None, length: int, deadline: float
    ) -> None:
        """Write one part of one block, whatever it takes.  Raises UkaiError."""
        c = self._c
        loop = asyncio.get_running_loop()
        cost, waited = 0 if data is None else length, False
        while True:
            c.check_handle(handle)
            try:
                await c.role.acquire(handle.epoch, "io", deadline)
                c.check_handle(handle)
                if data is None and not written(c.image.replicas(block)):
                    return
                hot = await self._heat(block, offset, offset + length)
            except UkaiError as e:
                if not e.retry or c.now() >= deadline:
                    raise
                c.hindrance = e.message
                await asyncio.sleep(RETRY_S)
                continue
            if hot is None:
                continue
            if hot.early and c.behind.full(cost, waited):
                await c.behind.room(cost)
                waited = True
                continue
            future: asyncio.Future[Op] = loop.create_future()
            self._apply(block, offset, data, length, hot, lambda op, f=future: f.done() or f.set_result(op), hot.early)  # type: ignore[misc]
            try:
                if not await asyncio.shield(c.core.spawn(self._watch(future))):
                    c.hindrance = ""
                    return
            except UkaiError as e:
                if not e.retry or c.now() >= deadline:
                    raise
                c.hindrance = e.message

    async def _watch(self, future: asyncio.Future[Op]) -> bool:
        """Wait for one write and settle it, also when the request itself has run out of time."""
        op = await future
        if op.acknowledged:
            return False
        if not op.failed:
            self._untrack(op)
            return False
        return await self._settled(op)

    async def _heat(self, block: int, offset: int, end: int) -> Hot | None:
        """The targets of a block, warm and reachable; None: look again.  Raises UkaiError."""
        c = self._c
        if c.frozen is not None:
            await c.frozen.wait()
            return None
        for start, stop, lock in c.locks.get(block, ()):
            if start < end and offset < stop:
                await asyncio.shield(lock)
                return None
        await c.marker.settled(block)
        if block not in c.activity.warm:
            await c.activity.make_warm([block])
            return None
        if (hot := c.hot.get(block)) is not None:
            return hot
        replicas = {n: r for n, r in c.image.replicas(block).items() if r.status != OUT_OF_SYNC}
        away = await self._away(set(replicas))
        if not c.held or block not in c.activity.warm:
            return None
        trusted = {n for n, r in replicas.items() if r.status == IN_SYNC}
        if not trusted - set(away):
            raise Unreachable(f"no in-sync copy of block {block} can be reached: {next(iter(away.values()), 'none')}")
        if away:
            await c.mark([(block, n, reason) for n, reason in away.items()])
            return None
        local = c.core.store.images.get(c.uuid) if c.own in replicas else None
        peers = [c.core.peer(n) for n in replicas if n != c.own]
        generation = max(r.generation for r in replicas.values())
        hot = c.hot[block] = Hot(generation, local, peers, c.own, trusted)
        hot.early = c.image.replication == "flush" and c.own in trusted and c.behind.early(block)
        c.activity.entered(block)
        return hot

    async def _away(self, nodes: set[str]) -> dict[str, str]:
        """Those of some nodes that can't be written to, with the reason."""
        c = self._c
        away = {}
        for node in sorted(nodes):
            if node == c.own:
                if c.uuid not in c.core.store.images:
                    away[node] = "no data of this image on the node"
            elif not (peer := c.core.peer(node)).up and not await peer.settled():
                away[node] = peer.reason
        return away

    async def _settled(self, op: Op) -> bool:
        """settle() of a write whose caller waits."""
        try:
            return await self.settle(op)
        finally:
            self._untrack(op)

    async def settle(self, op: Op) -> bool:
        """Deal with a write that failed somewhere (R4, R10); whether it must be sent again.

        Raises UkaiError for what the caller must hear of.
        """
        c = self._c
        try:
            if any(isinstance(e, StaleEpoch) for e in op.failed.values()):
                if c.epoch == op.epoch:
                    c.role.lose(next(e.message for e in op.failed.values() if isinstance(e, StaleEpoch)))
                return True
            if not c.held or c.epoch != op.epoch:
                return True
            trusted = op.hot.trusted
            if trusted - op.failed.keys():
                kept = await c.mark([(op.block, n, e.message) for n, e in op.failed.items()])
                if any(n in trusted for _, n in kept):
                    raise DiskError(f"image {c.name()}: block {op.block} was written to no replica that counts")
                return False
            return await self._nowhere(op)
        finally:
            c.hot.pop(op.block, None)

    async def _nowhere(self, op: Op) -> bool:
        """No in-sync replica took the write: never success (R4)."""
        c = self._c
        trusted = op.hot.trusted
        untouched = [n for n in trusted if not _touched(op.failed[n])]
        keep = c.own if c.own in (untouched or trusted) else sorted(untouched or trusted)[0]
        astray = {n for n in op.hot.nodes if n not in op.failed or _touched(op.failed[n])} - {keep}
        if _touched(op.failed[keep]) or astray:
            astray = set(op.hot.nodes) - {keep}
        if astray:
            reasons = {n: op.failed[n].message if n in op.failed else "may differ after a failed write" for n in astray}
            await c.mark([(op.block, n, reasons[n]) for n in sorted(astray)])
        error = op.failed[keep]
        if isinstance(error, Unreachable):
            return True
        raise error

    async def passed(self, block: int, start: int, end: int) -> None:
        """Wait until no write that touches this part of a block is under way."""
        await self.acknowledged(block, start, end)
        await self._c.behind.passed(block, start, end)

    async def acknowledged(self, block: int, start: int, end: int) -> None:
        """Wait until no write that touches this part of a block waits for its acknowledgement."""
        while ops := [op for op in self._c.inflight.get(block, ()) if op.offset < end and start < op.end]:
            await ops[0].wait()

    async def drained(self) -> None:
        """Wait until no write is under way, acknowledged or not."""
        while self._c.inflight:
            self._quiet = asyncio.Event()
            await self._quiet.wait()
        await self._c.behind.settled([op for ops in self._c.behind.ops.values() for op in ops])


def _flushed_here(op: Op, own: str, failed: dict[int, str]) -> None:
    op.answered(own, DiskError(failed[op.block]) if failed else None)


def _answered(op: Op, node: str, error: UkaiError | None, header: Header, _payload: Payload | None) -> None:
    """A peer's answer to a write; one with an fdatasync says what came of that."""
    if op.through and error is None and header.get("failed") != []:
        error = _failed(header)
    op.answered(node, error)


def _failed(header: Header) -> DiskError:
    try:
        return DiskError(str(header["failed"][0][1]))
    except (TypeError, LookupError):
        return DiskError("its answer to a write with a flush can't be read")


def _touched(error: UkaiError) -> bool:
    """Whether a replica that failed with this error may have altered its file."""
    if isinstance(error, NoSpace):
        return error.details.get("touched") is not False
    return not isinstance(error, Damaged)
