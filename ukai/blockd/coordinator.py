"""The coordinator of one image: the only one to send its writes to replicas, and in one order (R1, R6).

The healthy path is short on purpose: look up the block, write the local file, send to the peers, answer when
all have answered.  Whatever is not as expected (cold block, lost role, peer away, chunk locked by a resync)
goes to the slow path, which is written for reading.

Role: metad grants it with a new epoch, in two steps with fencing between (R3); here it ends when metad asks for
it, when a replica knows a higher epoch, or some time after the last handle was closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from ukai.blockd.activity import Activity
from ukai.blockd.files import zeros
from ukai.blockd.flush import Flusher
from ukai.blockd.image_store import ImageStore
from ukai.blockd.marks import Marker
from ukai.blockd.peer import Payload, Peer
from ukai.errors import (
    Busy,
    Damaged,
    DiskError,
    NoSpace,
    NotCoordinator,
    NotFound,
    NotReady,
    StaleEpoch,
    StaleHandle,
    Timeout,
    UkaiError,
    Unreachable,
)
from ukai.messages import Header
from ukai.model import IN_SYNC, OUT_OF_SYNC, Image, written

if TYPE_CHECKING:
    from ukai.blockd.core import Core

log = logging.getLogger(__name__)

RETRY_S = 0.05
PIECES_AT_ONCE = 32

Done = Callable[[UkaiError | None], None]
ReadDone = Callable[[UkaiError | None, "Payload | None"], None]


class Handle:
    """One open file of a frontend."""

    __slots__ = ("coordinator", "epoch", "frontend", "number")

    def __init__(self, number: int, frontend: str, coordinator: Coordinator, epoch: int) -> None:
        self.number, self.frontend, self.coordinator, self.epoch = number, frontend, coordinator, epoch


class Hot:
    """Where the writes of a warm block go, in this epoch and generation."""

    __slots__ = ("clean", "generation", "local", "nodes", "peers", "touched", "trusted")

    def __init__(
        self, generation: int, local: ImageStore | None, peers: list[Peer], own: str, trusted: set[str]
    ) -> None:
        self.generation, self.local, self.peers = generation, local, peers
        self.nodes = tuple(p.node for p in peers) + ((own,) if local is not None else ())
        self.trusted = trusted
        """Nodes whose replica is in-sync; the others are syncing."""
        self.clean = True
        self.touched = True


class Op:
    """One write, or discard, of a part of one block, on its way to the replicas."""

    __slots__ = ("block", "done", "end", "ended", "epoch", "failed", "hot", "offset", "waiting")

    def __init__(self, block: int, offset: int, end: int, hot: Hot, epoch: int, done: Callable[[Op], None]) -> None:
        self.block, self.offset, self.end, self.hot, self.epoch, self.done = block, offset, end, hot, epoch, done
        self.waiting = 0
        self.failed: dict[str, UkaiError] = {}
        self.ended: asyncio.Future[None] | None = None
        """Made by whoever must wait until the write is settled."""

    def answered(self, node: str, error: UkaiError | None) -> None:
        if error is not None:
            self.failed[node] = error
        self.waiting -= 1
        if self.waiting == 0:
            self.done(self)


class Coordinator:
    """One image on this node: as its writer, or asking the writer."""

    def __init__(self, core: Core, uuid: str) -> None:
        self.core, self.uuid, self.own = core, uuid, core.node
        self.epoch = 0
        self.held = False
        self._purpose = self._hindrance = ""
        self.frozen: asyncio.Event | None = None
        """While the role is being given up: requests wait for it."""
        self.hot: dict[int, Hot] = {}
        self.reads: dict[int, ImageStore | None] = {}
        """block → local replica that may be read; None: never written, reads as zeros."""
        self.inflight: dict[int, list[Op]] = {}
        self.locks: dict[int, list[tuple[int, int, asyncio.Future[None]]]] = {}
        """block → parts that a resync compares and copies (R11)."""
        config = core.config
        self.activity = Activity(self, config.active_limit, config.active_idle, config.active_age)
        self.flusher = Flusher(self)
        self.marker = Marker(self._send_marks, self._suspect)
        self.idle_since = self.now()
        self._role_lock = asyncio.Lock()
        self._released = 0
        """The last epoch that ended here with nothing left unflushed."""
        self._quiet: asyncio.Event | None = None

    # --- what it knows

    @property
    def image(self) -> Image:
        """Raises NotFound when the image is gone."""
        image = self.core.mirror.cluster.images.get(self.uuid)
        if image is None:
            raise NotFound("this image was removed")
        return image

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def ask_metad(self, op: str, fields: Header) -> Header:
        """A request of the coordinator.  Raises UkaiError; the loss of the role is noted."""
        epoch = self.epoch
        try:
            return await self.core.metad(op, {"image": self.uuid, "epoch": epoch, **fields})
        except (StaleEpoch, NotCoordinator) as e:
            if epoch == self.epoch:
                self.lose(e.message)
            raise

    async def _send_marks(self, marks: list[list[object]]) -> Header:
        reply = await self.ask_metad("mark", {"marks": marks})
        kept = [k[:3] for k in reply.get("kept", [])]
        for node, first, last, reason in marks:
            if [node, first, last] in kept:
                log.error("image %s: last copy, blocks %s-%s at node %s: %s", self.name(), first, last, node, reason)
            else:
                log.warning("image %s: blocks %s-%s at %s out-of-sync: %s", self.name(), first, last, node, reason)
        return reply

    def _suspect(self, block: int) -> None:
        self.hot.pop(block, None)
        self.reads.pop(block, None)

    def name(self) -> str:
        image = self.core.mirror.cluster.images.get(self.uuid)
        return image.name if image is not None else self.uuid

    def changed(self, ranges: list[tuple[int, int]] | None) -> None:
        """The metadata of some blocks (None: of the whole image) have changed."""
        if ranges is None or sum(b - a + 1 for a, b in ranges) > len(self.hot) + len(self.reads):
            self.hot.clear()
            self.reads.clear()
            return
        for first, last in ranges:
            for block in range(first, last + 1):
                self.hot.pop(block, None)
                self.reads.pop(block, None)

    # --- the role

    async def acquire(self, opened_epoch: int, purpose: str, deadline: float) -> None:
        """Hold the writer role (R1–R3).  Raises StaleHandle, Timeout, or what forbids it."""
        while not self._suffices(purpose):
            if self.frozen is not None:
                await self.frozen.wait()
                continue
            try:
                async with self._role_lock:
                    if not self._suffices(purpose):
                        self.lose("it was taken for reading only, and writing begins")
                        await self._grant(opened_epoch, purpose)
                    return
            except UkaiError as e:
                if not e.retry or self.now() >= deadline:
                    raise
                self._hindrance = e.message
            await asyncio.sleep(RETRY_S)

    def _late(self, what: str) -> Timeout:
        """The error of a request that ran out of time; it says what stood in its way last."""
        why = f": {self._hindrance}" if self._hindrance else ""
        return Timeout(f"image {self.name()}: the {what} could not be completed within io_timeout{why}")

    def _suffices(self, purpose: str) -> bool:
        """Whether the role is held for this purpose: one taken to read or to resync stops no other machine (R2)."""
        return self.held and (self._purpose == "io" or purpose != "io")

    async def _grant(self, opened_epoch: int, purpose: str) -> None:
        core = self.core
        reply = await core.metad("grant", {"image": self.uuid, "opened_epoch": opened_epoch, "purpose": purpose})
        epoch, holders = int(reply["epoch"]), [str(n) for n in reply["holders"]]
        fenced = [n for n in await asyncio.gather(*(self._fence(n, epoch) for n in holders)) if n]
        await core.metad("grant.commit", {"image": self.uuid, "epoch": epoch, "fenced": fenced})
        self.epoch, self.held, self._purpose, self._hindrance = epoch, True, purpose, ""
        self.idle_since = self.now()
        self.changed(None)
        self.marker = Marker(self._send_marks, self._suspect)
        self.activity.begin(self.image.active, self.now())
        self.flusher.begin(self.image.active)
        log.info("image %s: this node is the writer, epoch %d", self.name(), epoch)

    async def _fence(self, node: str, epoch: int) -> str:
        """Have a replica persist the epoch (R3); the node, or nothing when it can't be reached."""
        try:
            if node == self.own:
                self.core.store.image(self.uuid).admit(epoch)
                return node
            peer = self.core.peer(node)
            if not await peer.settled():
                return ""
            await peer.ask("fence", {"i": self.uuid, "e": epoch})
            return node
        except StaleEpoch:
            raise
        except UkaiError as e:
            log.info("image %s: node %s is not fenced: %s", self.name(), node, e.message)
            return ""

    def holds(self, epoch: int) -> bool:
        return self.held and self.epoch == epoch

    def lose(self, reason: str) -> None:
        """The role went to another node, or can't be told to be ours any more."""
        if not self.held:
            return
        log.info("image %s: this node is no longer the writer (epoch %d): %s", self.name(), self.epoch, reason)
        self.held = False
        self.changed(None)
        self.activity.end()
        self.marker.abandon(NotCoordinator(reason))
        self.core.role_lost(self.uuid)

    async def release(self, epoch: int, deadline: float) -> bool:
        """Drain, flush and give the role up; whether nothing is left active.  Requests wait meanwhile."""
        if not self.holds(epoch):
            return self._released == epoch
        self.frozen = asyncio.Event()
        clean = False
        try:
            async with asyncio.timeout_at(deadline):
                await self._drained()
                cold = [b for b in self.activity.active if b not in self.activity.warm]
                if cold:
                    await self.activity.make_warm(cold)
                await self.flusher.flush()
                for block in list(self.marker.pending):
                    await self.marker.settled(block)
                clean = self.holds(epoch)
        except (UkaiError, TimeoutError) as e:
            log.info("image %s: released without a flush: %s", self.name(), e)
        finally:
            self.lose("released")
            if clean:
                self._released = epoch
            self.frozen.set()
            self.frozen = None
        return clean

    async def passed(self, block: int, start: int, end: int) -> None:
        """Wait until no write that touches this part of a block is under way."""
        while ops := [op for op in self.inflight.get(block, ()) if op.offset < end and start < op.end]:
            if ops[0].ended is None:
                ops[0].ended = asyncio.get_running_loop().create_future()
            await asyncio.shield(ops[0].ended)

    async def _drained(self) -> None:
        while self.inflight:
            self._quiet = asyncio.Event()
            await self._quiet.wait()

    def leased(self) -> bool:
        """Whether nobody else can have become the writer without this node's knowing.

        metad has answered within the lease; or for some block each in-sync replica is on a node that has confirmed
        within the lease that it knows no higher epoch: a takeover must fence one of those for every block (R3).
        """
        now = self.now()
        if now < self.core.lease_until:
            return True
        since = now - self.core.config.lease
        for _, _, replicas in self.image.segments():
            if written(replicas) and all(
                n == self.own or self.core.peer(n).confirmed_at > since
                for n, r in replicas.items()
                if r.status == IN_SYNC
            ):
                return True
        return False

    # --- writes

    def write(self, handle: Handle, offset: int, data: Payload | None, length: int, sync: bool, done: Done) -> None:
        """Write ``data`` at ``offset`` of the image, or make ``length`` bytes read as zeros where it is None."""
        image = self.core.mirror.cluster.images.get(self.uuid)
        if image is not None:
            block, within = divmod(offset, image.block_size)
            hot = self.hot.get(block)
            if (
                hot is not None
                and not sync
                and block not in self.locks
                and self.frozen is None
                and within + length <= image.block_size
                and handle.epoch >= image.lost.get(self.own, 0)
                and block not in self.marker.pending
            ):
                self._apply(
                    block, within, data, length, hot, lambda op: self._finish_fast(op, handle, data, length, done)
                )
                return
        self.core.spawn(self._write_slow(handle, offset, data, length, sync, done))

    def _apply(
        self, block: int, offset: int, data: Payload | None, length: int, hot: Hot, done: Callable[[Op], None]
    ) -> None:
        """Hand one write to the local file and to every peer, no wait between: one order everywhere (R6)."""
        op = Op(block, offset, offset + length, hot, self.epoch, done)
        hot.touched = True
        if hot.clean:
            hot.clean = False
            self.flusher.dirty(block, hot.nodes)
        ops = self.inflight.get(block)
        if ops is None:
            self.inflight[block] = [op]
        else:
            ops.append(op)
        op.waiting = 1
        for peer in hot.peers:
            header: Header = {"i": self.uuid, "e": op.epoch, "b": block, "o": offset, "g": hot.generation}
            if data is None:
                header["op"], header["l"] = "z", length
            else:
                header["op"] = "w"
            op.waiting += 1
            node = peer.node
            if not peer.numbered(header, data, lambda error, _h, _p, node=node: op.answered(node, error)):  # type: ignore[misc]
                op.waiting -= 1
                op.failed[node] = Unreachable(f"node {node}: {peer.reason}")
        error: UkaiError | None = None
        if hot.local is not None:
            try:
                if data is None:
                    hot.local.punch(block, offset, length, hot.generation)
                else:
                    hot.local.write(block, offset, data, hot.generation)
            except UkaiError as e:
                error = e
        op.answered(self.own, error)

    def _untrack(self, op: Op) -> None:
        ops = self.inflight[op.block]
        ops.remove(op)
        if op.ended is not None:
            op.ended.set_result(None)
        if not ops:
            del self.inflight[op.block]
            if not self.inflight and self._quiet is not None:
                self._quiet.set()

    def _finish_fast(self, op: Op, handle: Handle, data: Payload | None, length: int, done: Done) -> None:
        if not op.failed:
            self._untrack(op)
            done(None)
            return

        async def settle() -> None:
            deadline = self.now() + self.core.config.io_timeout
            try:
                async with asyncio.timeout_at(deadline):
                    if await self._settle(op):
                        await self._piece(handle, op.block, op.offset, data, length, deadline)
            except TimeoutError:
                done(Timeout("the write could not be completed in time"))
            except UkaiError as e:
                done(e)
            else:
                done(None)

        self.core.spawn(settle())

    async def _write_slow(
        self, handle: Handle, offset: int, data: Payload | None, length: int, sync: bool, done: Done
    ) -> None:
        deadline = self.now() + self.core.config.io_timeout
        try:
            async with asyncio.timeout_at(deadline):
                pieces = self._pieces(offset, length)
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
                if sync:
                    await self.flusher.flush()
        except TimeoutError:
            done(self._late("write"))
        except UkaiError as e:
            done(e)
        else:
            done(None)

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int, int, int]]:
        """(block, offset in it, length, position in the request) of each block that a request touches."""
        image = self.image
        if length <= 0 or offset + length > image.size:
            raise NoSpace(f"image {image.name} ends at {image.size} bytes")
        out, at = [], 0
        while at < length:
            block, within = divmod(offset + at, image.block_size)
            size = min(length - at, image.block_size - within)
            out.append((block, within, size, at))
            at += size
        return out

    async def _piece(
        self, handle: Handle, block: int, offset: int, data: Payload | None, length: int, deadline: float
    ) -> None:
        """Write one part of one block, whatever it takes.  Raises UkaiError."""
        loop = asyncio.get_running_loop()
        while True:
            self.check_handle(handle)
            try:
                await self.acquire(handle.epoch, "io", deadline)
                if data is None and not written(self.image.replicas(block)):
                    return
                hot = await self._heat(block, offset, offset + length)
            except UkaiError as e:
                if not e.retry or self.now() >= deadline:
                    raise
                self._hindrance = e.message
                await asyncio.sleep(RETRY_S)
                continue
            if hot is None:
                continue
            future: asyncio.Future[Op] = loop.create_future()
            self._apply(block, offset, data, length, hot, lambda op, f=future: f.done() or f.set_result(op))  # type: ignore[misc]
            try:
                if not await asyncio.shield(self.core.spawn(self._watch(future))):
                    self._hindrance = ""
                    return
            except UkaiError as e:
                if not e.retry or self.now() >= deadline:
                    raise
                self._hindrance = e.message

    async def _watch(self, future: asyncio.Future[Op]) -> bool:
        """Wait for one write and settle it, also when the request itself has run out of time."""
        op = await future
        if not op.failed:
            self._untrack(op)
            return False
        return await self._settle(op)

    def check_handle(self, handle: Handle) -> None:
        """Raises StaleHandle when the node lost the role after the handle was opened (R2)."""
        if handle.epoch < self.image.lost.get(self.own, 0):
            raise StaleHandle(
                f"image {self.name()} was taken over by another hypervisor; stop this machine, or open the image anew"
            )

    async def _heat(self, block: int, offset: int, end: int) -> Hot | None:
        """The targets of a block, warm and reachable; None: look again.  Raises UkaiError."""
        if self.frozen is not None:
            await self.frozen.wait()
            return None
        for start, stop, lock in self.locks.get(block, ()):
            if start < end and offset < stop:
                await asyncio.shield(lock)
                return None
        await self.marker.settled(block)
        if block not in self.activity.warm:
            await self.activity.make_warm([block])
            return None
        if (hot := self.hot.get(block)) is not None:
            return hot
        replicas = {n: r for n, r in self.image.replicas(block).items() if r.status != OUT_OF_SYNC}
        away = await self._away(set(replicas))
        if not self.held or block not in self.activity.warm:
            return None
        trusted = {n for n, r in replicas.items() if r.status == IN_SYNC}
        if not trusted - set(away):
            raise Unreachable(f"no in-sync copy of block {block} can be reached: {next(iter(away.values()), 'none')}")
        if away:
            await self.marker.mark([(block, n, reason) for n, reason in away.items()])
            return None
        local = self.core.store.images.get(self.uuid) if self.own in replicas else None
        peers = [self.core.peer(n) for n in replicas if n != self.own]
        generation = max(r.generation for r in replicas.values())
        hot = self.hot[block] = Hot(generation, local, peers, self.own, trusted)
        return hot

    async def _away(self, nodes: set[str]) -> dict[str, str]:
        """Those of some nodes that can't be written to, with the reason."""
        away = {}
        for node in sorted(nodes):
            if node == self.own:
                if self.uuid not in self.core.store.images:
                    away[node] = "no data of this image on the node"
            elif not (peer := self.core.peer(node)).up and not await peer.settled():
                away[node] = peer.reason
        return away

    async def stamp(self, blocks: list[int]) -> None:
        """Have every target of some active blocks store their generation (R5, R8).  Raises UkaiError."""
        by: dict[tuple[str, int], list[int]] = {}
        for block in blocks:
            for node, replica in self.image.replicas(block).items():
                if replica.status == IN_SYNC:
                    by.setdefault((node, replica.generation), []).append(block)
        keys = list(by)
        done = await asyncio.gather(*(self._stamp_one(n, g, by[(n, g)]) for n, g in keys))
        failed: dict[int, dict[str, UkaiError]] = {}
        for (node, generation), error in zip(keys, done, strict=True):
            if error is not None:
                for block in by[(node, generation)]:
                    failed.setdefault(block, {})[node] = error
        marks = []
        for block, errors in failed.items():
            nodes = {n for n, r in self.image.replicas(block).items() if r.status == IN_SYNC}
            if nodes <= set(errors):
                raise next(iter(errors.values()))
            marks += [(block, n, e.message) for n, e in errors.items()]
        if marks:
            await self.marker.mark(marks)

    async def _stamp_one(self, node: str, generation: int, blocks: list[int]) -> UkaiError | None:
        try:
            if node == self.own:
                image = self.core.store.image(self.uuid)
                for block in blocks:
                    image.ready(block, generation)
                    await asyncio.sleep(0)
                return None
            ranges = [[b, b] for b in blocks]
            peer = self.core.peer(node)
            await peer.settled()
            await peer.ask("g", {"i": self.uuid, "e": self.epoch, "g": generation, "ranges": ranges}, numbered=True)
        except (StaleEpoch, NotFound) as e:
            if isinstance(e, StaleEpoch):
                self.lose(e.message)
            return e
        except UkaiError as e:
            return e
        return None

    async def _settle(self, op: Op) -> bool:
        """Deal with a write that failed somewhere (R4, R10); whether it must be sent again.

        Raises UkaiError for what the caller must hear of.
        """
        try:
            if any(isinstance(e, StaleEpoch) for e in op.failed.values()):
                if self.epoch == op.epoch:
                    self.lose(next(e.message for e in op.failed.values() if isinstance(e, StaleEpoch)))
                return True
            if not self.held or self.epoch != op.epoch:
                return True
            trusted = op.hot.trusted
            if trusted - op.failed.keys():
                kept = await self.marker.mark([(op.block, n, e.message) for n, e in op.failed.items()])
                if any(n in trusted for _, n in kept):
                    raise DiskError(f"image {self.name()}: block {op.block} was written to no replica that counts")
                return False
            return await self._nowhere(op)
        finally:
            self._untrack(op)
            self.hot.pop(op.block, None)

    async def _nowhere(self, op: Op) -> bool:
        """No in-sync replica took the write: never success (R4)."""
        trusted = op.hot.trusted
        untouched = [n for n in trusted if not _touched(op.failed[n])]
        keep = self.own if self.own in (untouched or trusted) else sorted(untouched or trusted)[0]
        astray = {n for n in op.hot.nodes if n not in op.failed or _touched(op.failed[n])} - {keep}
        if _touched(op.failed[keep]) or astray:
            astray = set(op.hot.nodes) - {keep}
        if astray:
            reasons = {n: op.failed[n].message if n in op.failed else "may differ after a failed write" for n in astray}
            await self.marker.mark([(op.block, n, reasons[n]) for n in sorted(astray)])
        error = op.failed[keep]
        if isinstance(error, Unreachable):
            return True
        raise error

    # --- reads

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read part of the image: from the local replica if it is in-sync, else from a remote one."""
        image = self.core.mirror.cluster.images.get(self.uuid)
        if image is not None and self.held and self.now() < self.core.lease_until:
            block, within = divmod(offset, image.block_size)
            if within + length <= image.block_size and block not in self.inflight:
                local = self.reads.get(block)
                if local is None:
                    if block in self.reads:
                        done(None, zeros(length))
                        return
                else:
                    try:
                        data = local.read_cached(block, within, length)
                    except UkaiError:
                        data = None
                    if data is not None:
                        done(None, data)
                        return
        self.core.spawn(self._read_slow(offset, length, done))

    async def _read_slow(self, offset: int, length: int, done: ReadDone) -> None:
        deadline = self.now() + self.core.config.io_timeout
        try:
            async with asyncio.timeout_at(deadline):
                data = await self.read_anyhow(offset, length, deadline)
        except TimeoutError:
            done(self._late("read"), None)
        except UkaiError as e:
            done(e, None)
        else:
            done(None, data)

    async def read_anyhow(self, offset: int, length: int, deadline: float) -> Payload:
        """A read by a node that may or may not be the writer.  Raises UkaiError."""
        while True:
            try:
                if self.held:
                    data = await self.read_held(offset, length)
                    self._hindrance = ""
                    return data
                writer = self.image.writer
                if writer and writer != self.own:
                    peer = self.core.peer(writer)
                    await peer.settled()
                    try:
                        reply = await peer.ask("cr", {"i": self.uuid, "o": offset, "l": length})
                        return reply[1] or b""
                    except (NotCoordinator, Unreachable) as e:
                        await self.core.catch_up()
                        if self.image.writer == writer and isinstance(e, Unreachable):
                            await self.acquire(-1, "read", deadline)
                else:
                    await self.acquire(-1, "read", deadline)
            except Busy:
                await self.core.catch_up()  # somebody else is the writer: ask there
            except UkaiError as e:
                if not e.retry or self.now() >= deadline:
                    raise
                self._hindrance = e.message
            await asyncio.sleep(RETRY_S)

    async def read_held(self, offset: int, length: int) -> Payload:
        """Raises NotCoordinator when the role is not held, UkaiError."""
        pieces = self._pieces(offset, length)
        parts = await asyncio.gather(*(self._read_piece(b, o, n) for b, o, n, _ in pieces))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read_piece(self, block: int, offset: int, length: int) -> Payload:
        while True:
            if not self.held or not self.leased():
                raise NotReady("it can't be told whether this node is still the writer")
            if block in self.inflight:  # what is read must not go away again when this node dies
                epoch = self.epoch
                await self.passed(block, offset, offset + length)
                if not self.holds(epoch):
                    continue
            if block in self.image.active and block not in self.activity.warm:  # announced, perhaps not stamped yet
                await self.activity.make_warm([block])
                continue
            replicas = self.image.replicas(block)
            if not written(replicas):
                self.reads[block] = None
                return zeros(length)
            suspects = self.marker.suspects(block)
            good = {n: r.generation for n, r in replicas.items() if r.status == IN_SYNC and n not in suspects}
            if not good:
                raise Unreachable(f"no in-sync copy of block {block} can be read")
            data = await self._read_from(block, offset, length, good)
            if data is not None:
                return data

    async def _read_from(self, block: int, offset: int, length: int, good: dict[str, int]) -> Payload | None:
        """Try replicas in turn; a bad one is marked (R4).  None: look again.  Raises UkaiError."""
        errors: dict[str, UkaiError] = {}
        order = sorted(good, key=lambda n: (n != self.own, not (n == self.own or self.core.peer(n).up), n))
        for node in order:
            try:
                if node == self.own:
                    store = self.core.store.image(self.uuid)
                    store.check(block, good[node])
                    data: Payload | None = store.read_cached(block, offset, length)
                    if data is None:
                        data = await self.core.run_disk(store.read_beside, store.borrow(block), block, offset, length)
                    if self._readable_here(block, good[node]):
                        self.reads[block] = store
                else:
                    fields = {"i": self.uuid, "b": block, "o": offset, "l": length, "g": good[node]}
                    peer = self.core.peer(node)
                    await peer.settled()
                    _, data = await peer.ask("r", fields)
            except DiskError as e:
                errors[node] = e
                continue
            except UkaiError as e:
                errors[node] = e
                continue
            bad = [(block, n, e.message) for n, e in errors.items() if isinstance(e, DiskError)]
            if bad:
                await self.marker.mark(bad)
            return data
        suspects = self.marker.suspects(block)  # as the caller left them out: else this would never come to an end
        replicas = self.image.replicas(block).items()
        current = {n: r.generation for n, r in replicas if r.status == IN_SYNC and n not in suspects}
        if current != good:
            return None
        raise next((e for e in errors.values() if e.retry), next(iter(errors.values())))

    def _readable_here(self, block: int, generation: int) -> bool:
        """Whether the local replica is in-sync now, and will be read until something about the block changes."""
        replica = self.image.replica(self.own, block)
        return (
            replica is not None
            and replica.status == IN_SYNC
            and replica.generation == generation
            and self.own not in self.marker.suspects(block)
            and (block not in self.image.active or block in self.activity.warm)
        )


def _touched(error: UkaiError) -> bool:
    """Whether a replica that failed with this error may have altered its file."""
    if isinstance(error, NoSpace):
        return error.details.get("touched") is not False
    return not isinstance(error, Damaged)
