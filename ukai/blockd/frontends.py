"""Requests of the frontends of this node: open handles, reads, writes, flushes.

A request names the blockd process that it was meant for; another one refuses it, and has done nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from ukai.blockd.coordinator import Coordinator, Handle
from ukai.blockd.peer import Payload
from ukai.blockd.reads import Lent
from ukai.blockd.writes import When
from ukai.errors import NotFound, NotReady, RemoteProtocolError, StaleSession, UkaiError
from ukai.messages import Header, error_reply, integer, show, text

if TYPE_CHECKING:
    from ukai.blockd.core import Core

log = logging.getLogger(__name__)

FRONTEND_BEATS = 10
TRANSFER_LIMIT_BYTES = 4 * 2**20

Reply = Callable[[Header, "Payload | None"], None]


class Frontends:
    """Who has what open on this node."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.handles: dict[int, Handle] = {}
        self.beats: dict[str, float] = {}
        """frontend → when it last said that it lives."""
        self._silent: dict[str, Counter[str]] = {}
        """frontend → image → handles closed because it is silent: it may live, and its machines with it (R2)."""
        self.heard = False
        """Whether this process has heard of a frontend: until then it can't tell what is open."""
        self.closed: set[str] = set()
        """Images that metad is about to take offline."""
        self._ops: dict[str, Callable[[Header, Payload | None, Reply], None]] = {
            "r": self._read,
            "w": self._write,
            "z": self._write,
            "f": self._flush,
            "open": self._open,
            "close": self._close,
            "stat": self._stat,
            "statfs": self._statfs,
        }

    def drop_silent(self) -> None:
        limit = self._core.now() - FRONTEND_BEATS * self._core.config.beat_interval
        silent = [f for f, at in self.beats.items() if at < limit]
        for frontend in [f for f in silent if self._has_done_all(f) and self.beats[f] < limit]:
            del self.beats[frontend]
            self._silent.setdefault(frontend, Counter()).update(self._held_by(frontend))
            self._close_frontend(frontend, "is silent")

    def opens(self) -> dict[str, int]:
        """image → handles that are open, or were when their frontend fell silent."""
        return dict(sum(self._silent.values(), self._held_by()))

    def _held_by(self, frontend: str = "") -> Counter[str]:
        """image → handles, of one frontend or of all."""
        return Counter(h.coordinator.uuid for h in self.handles.values() if frontend in ("", h.frontend))

    def _has_done_all(self, frontend: str) -> bool:
        """Hear it out, as after a freeze of this process; whether all that it has posted is done."""
        self._core.ports.take_in()
        return not any(h.coordinator.posts for h in self.handles.values() if h.frontend == frontend)

    def _close_frontend(self, frontend: str, why: str) -> None:
        mine = [h for h in self.handles.values() if h.frontend == frontend]
        for handle in mine:
            del self.handles[handle.number]
            self._gone(handle.coordinator)
        if mine:
            log.warning("the frontend %s; its %d open handles are closed", why, len(mine))

    def _gone(self, c: Coordinator) -> None:
        c.idle_since = self._core.now()
        silent = any(c.uuid in counts for counts in self._silent.values())
        if not silent and not any(h.coordinator is c for h in self.handles.values()):
            c.flusher.lost = ""  # whoever opens the image next sees what there is

    def answer(self, header: Header, payload: Payload | None, reply: Reply) -> None:
        """Answer a message of a frontend of this node, now or later."""
        try:
            op = header.get("op")
            if op == "hello":
                self.beats[text(header, "frontend")] = self._core.now()
                self.heard = True
                reply(
                    {"inc": self._core.inc, "node": self._core.node, "io_timeout": self._core.config.io_timeout}, None
                )
                return
            if op == "beat":
                reply(self._frontend_beat(header), None)
                return
            self._check_meant(header)
            do = self._ops.get(op) if type(op) is str else None
            if do is None:
                raise RemoteProtocolError(f"op {show(op)} is not known here")
            do(header, payload, reply)
        except UkaiError as e:
            reply(error_reply(e), None)

    def _frontend_beat(self, header: Header) -> Header:
        frontend = text(header, "frontend")
        for old in [f for f in self.beats if f != frontend]:
            if not any(h.frontend == frontend for h in self.handles.values()) or not self._has_done_all(old):
                continue
            self._close_frontend(old, "was started anew")
            del self.beats[old]
        self.beats[frontend] = self._core.now()
        self.heard = True
        self._silent.clear()  # it lives, or another one has its place: there is one per node
        numbers = header.get("handles", [])
        if type(numbers) is not list:
            raise RemoteProtocolError("field handles: a list is wanted")
        self._close_unlisted(frontend, {n for n in numbers if type(n) is int})
        return {"inc": self._core.inc, "known": [n for n in numbers if type(n) is int and n in self.handles]}

    def _close_unlisted(self, frontend: str, listed: set[int]) -> None:
        """Close what was opened when nobody waited for it any more, as after a freeze: it would be open for ever."""
        limit = self._core.now() - FRONTEND_BEATS * self._core.config.beat_interval
        for handle in list(self.handles.values()):
            if handle.frontend == frontend and handle.number not in listed and handle.opened_at < limit:
                del self.handles[handle.number]
                self._gone(handle.coordinator)
                log.info("a handle of %s that its frontend has given up is closed", handle.coordinator.name())

    def _handle(self, header: Header) -> Handle:
        handle = self.handles.get(header.get("h", -1)) if type(header.get("h")) is int else None
        if handle is None:
            raise StaleSession("this handle is not open here; open the image anew")
        return handle

    def _answer(
        self, reply: Reply, c: Coordinator, op: str, size: int, fsync: bool = False, post_at: int = -1
    ) -> Callable[..., None]:
        """Reply and count; with ``fsync`` also say whether one would have nothing to do, with ``post_at`` whether a
        write there may be posted.
        """
        began = self._core.now()
        stats = self._core.metrics.op(op, c.name())

        def done(error: UkaiError | None, data: Payload | None = None, lendable: bool = False) -> None:
            stats.done(self._core.now() - began, size, error is not None)
            if error is not None:
                reply(error_reply(error), None)
            elif lendable:
                reply({"lend": True}, data)
            elif fsync and c.flusher.clean():
                reply({"clean": True}, data)
            elif post_at >= 0 and c.posts.welcome(post_at):
                reply({"post": True}, data)
            else:
                reply({}, data)

        return done

    def _read(self, header: Header, _payload: Payload | None, reply: Reply) -> None:
        handle = self._handle(header)
        length = integer(header, "l", 1, TRANSFER_LIMIT_BYTES)
        c = handle.coordinator
        c.reads.read(handle, integer(header, "o"), length, self._answer(reply, c, "read", length))

    def lend(self, header: Header) -> Lent:
        """Lend a block that a read has offered.  Raises UkaiError.

        Not while another frontend has the image open: it may have died with writes on their way here, which the new
        one knows nothing of.
        """
        self._check_meant(header)
        handle = self._handle(header)
        c = handle.coordinator
        if any(h.frontend != handle.frontend for h in self.handles.values() if h.coordinator is c):
            raise NotReady("another frontend has this image open")
        return c.reads.lend(integer(header, "b", 0, c.image.block_count - 1))

    def _check_meant(self, header: Header) -> None:
        """Raises StaleSession, NotReady."""
        if header.get("inc") != self._core.inc:
            raise StaleSession("this is another blockd process; open the image anew")
        if self._core.stopping:
            raise NotReady("blockd is stopping")

    def _write(self, header: Header, payload: Payload | None, reply: Reply) -> None:
        handle = self._handle(header)
        stored = When.NOW if header.get("s") is True else When.SOON if header.get("f") is True else When.LATER
        c = handle.coordinator
        if header["op"] == "z":
            op, payload, length = "discard", None, integer(header, "l", 1)
        elif payload and len(payload) <= TRANSFER_LIMIT_BYTES:
            op, length = "write", len(payload)
        else:
            raise RemoteProtocolError(f"a write carries 1 to {TRANSFER_LIMIT_BYTES} bytes")
        offset = integer(header, "o")
        later = stored is When.LATER
        done = self._answer(reply, c, op, length, not later, offset if later and op == "write" else -1)
        if header.get("p") is True:
            done = c.posts.begins(offset, done)
        c.writes.write(handle, offset, payload, length, stored, done)

    def _flush(self, header: Header, _payload: Payload | None, reply: Reply) -> None:
        handle = self._handle(header)
        c = handle.coordinator
        done = self._answer(reply, c, "flush", 0)

        def attempt() -> None:
            try:
                if c.image.replication == "flush":
                    c.check_handle(handle)  # what it has written may be gone (R2)
            except UkaiError as e:
                done(e)
                return
            if c.flusher.clean():
                done(None)
            elif (op := c.flusher.last()) is not None:
                op.then = attempt
            else:
                self._core.spawn(flush())

        async def flush() -> None:
            try:
                async with asyncio.timeout(self._core.config.io_timeout):
                    await c.flusher.fsync(handle, self._core.now() + self._core.config.io_timeout)
            except UkaiError as e:
                done(e)
            except TimeoutError:
                done(NotReady("the flush could not be completed within io_timeout"))
            else:
                done(None)

        attempt()

    def _open(self, header: Header, _payload: Payload | None, reply: Reply) -> None:
        self._core.spawn(self._core.later(self._opened(header), reply))

    async def _opened(self, header: Header) -> tuple[Header, Payload | None]:
        name, number = text(header, "image", 100), integer(header, "h")
        frontend, epoch = text(header, "frontend"), integer(header, "epoch", -1, default=-1)
        known = self._core.mirror.cluster.images.get(self._core.mirror.cluster.names.get(name, ""))
        if known is None or known.uuid not in self._core.coordinators or not self._core.coordinators[known.uuid].held:
            await (
                self._core.catch_up()
            )  # the epoch decides later whether the handle is stale, so it must be the present one
        image = self._core.mirror.cluster.by_name(name)
        if not image.online or self._core.node not in image.hypervisors or image.uuid in self.closed:
            raise NotFound(f"image {name} is not online at this hypervisor")
        if epoch < 0:
            epoch = image.epoch
        if number not in self.handles:
            self.handles[number] = Handle(number, frontend, self._core.coordinator(image.uuid), epoch, self._core.now())
        self.beats[frontend] = self._core.now()
        return {"uuid": image.uuid, "size": image.size, "block_size": image.block_size, "epoch": epoch}, None

    def _close(self, header: Header, _payload: Payload | None, reply: Reply) -> None:
        handle = self.handles.pop(integer(header, "h"), None)
        if handle is not None:
            self._gone(handle.coordinator)
        reply({}, None)

    def _stat(self, header: Header, _payload: Payload | None, reply: Reply) -> None:
        self._core.spawn(self._core.later(self._allocated(text(header, "image", 100)), reply))

    async def _allocated(self, name: str) -> tuple[Header, Payload | None]:
        """Bytes that one copy of the image takes on disks: each block counted at its nearest in-sync replica."""
        image = self._core.mirror.cluster.by_name(name)
        by: dict[str, list[tuple[int, int]]] = {}
        for first, last, replicas in image.segments():
            good = [n for n, r in replicas.items() if r.status == 0 and r.generation]
            good.sort(key=lambda n: (n != self._core.node, not (n == self._core.node or self._core.peer(n).up), n))
            if good:
                by.setdefault(good[0], []).append((first, last))
        total = 0
        for node, where in by.items():
            try:
                if node == self._core.node:
                    total += await self._core.run_disk(self._core.store.image(image.uuid).allocated, where)
                else:
                    reply, _ = await self._core.peer(node).ask(
                        "usage", {"i": image.uuid, "ranges": [list(r) for r in where]}
                    )
                    total += integer(reply, "allocated")
            except UkaiError as e:
                log.info("image %s: its space at node %s is not known: %s", name, node, e.message)
        return {"allocated": total}, None

    def _statfs(self, _header: Header, _payload: Payload | None, reply: Reply) -> None:
        free, total = self._core.store.disk.space(self._core.store.root)
        reply({"free": free, "total": total}, None)
