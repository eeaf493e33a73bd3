"""The block server's decisions: registration, beats, open handles, and who answers what.

No socket, clock, randomness or thread in here: ``Ports`` are handed in.  Requests of the frontend and of peers
are answered through the function that comes with them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ukai.blockd.coordinator import Coordinator, Handle
from ukai.blockd.peer import Connect, Payload, Peer
from ukai.blockd.replica import Replica
from ukai.blockd.resync import Resync
from ukai.blockd.store import Store
from ukai.config import Config
from ukai.errors import (
    Behind,
    Busy,
    NotCoordinator,
    NotFound,
    NotReady,
    Refused,
    RemoteProtocolError,
    StaleSession,
    UkaiError,
)
from ukai.messages import Header, error_reply, flag, integer, ranges, show, text
from ukai.mirror import Mirror
from ukai.model import Change
from ukai.telemetry import Metrics

log = logging.getLogger(__name__)

FRONTEND_BEATS = 10
TRANSFER_LIMIT_BYTES = 4 * 2**20
SAVE_BEATS = 5

NUMBERED = frozenset(
    {"grant", "grant.commit", "release", "activate", "retire", "mark", "sync.begin", "sync.finish", "job.end"}
)
"""What alters metadata: metad takes each number once and in order, so that a late request can't undo a newer one."""

Reply = Callable[[Header, "Payload | None"], None]


@dataclass(slots=True)
class Ports:
    """What the core needs from the world."""

    metad: Callable[[str, Header, float], Awaitable[Header]]
    """A request to metad whose reply the mirror has taken."""
    connect: Connect
    run_disk: Callable[..., Awaitable[Any]]
    """Run a blocking function in a thread beside the loop."""
    wall: Callable[[], float]
    new_id: Callable[[], str]
    new_token: Callable[[], int]
    boot_id: str


class Core:
    """One node's block server."""

    def __init__(self, config: Config, node: str, store: Store, mirror: Mirror, ports: Ports, metrics: Metrics) -> None:
        self.config, self.node, self.store, self.mirror, self.ports = config, node, store, mirror, ports
        self.metrics = metrics
        self.inc = ports.new_id()
        self.run_disk = ports.run_disk
        self.replica = Replica(store, self.inc, ports.new_token(), ports.run_disk)
        self.replica.on_epoch = self._epoch_seen
        self.replica.boot_id = ports.boot_id
        self.lease_until = float("-inf")
        self.registered = False
        self.problem = ""
        self.coordinators: dict[str, Coordinator] = {}
        self.handles: dict[int, Handle] = {}
        self.frontends: dict[str, float] = {}
        self.closed: set[str] = set()
        """Images that metad is about to take offline."""
        self.resyncs: dict[str, Resync] = {}
        self._peers: dict[str, Peer] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._beats = 0
        self._numbers = itertools.count(1)
        self._stopping = False
        mirror.on_change.append(self._changed)
        mirror.on_reset.append(self._reset)
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
        self._calls: dict[str, Callable[[Header], Awaitable[Header]]] = {
            "release": self._call_release,
            "acquire": self._call_acquire,
            "prepare": self._call_prepare,
            "adopted": self._call_adopted,
            "drop": self._call_drop,
            "close": self._call_close,
        }

    # --- the ground

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._spawned_ended)
        return task

    def _spawned_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (e := task.exception()) is not None and not isinstance(e, UkaiError):
            log.error("defect: %s", task.get_coro(), exc_info=e)

    def peer(self, node: str) -> Peer:
        peer = self._peers.get(node)
        if peer is None:
            peer = self._peers[node] = Peer(
                node,
                self.node,
                self.inc,
                self.ports.connect,
                replica_timeout_s=self.config.replica_timeout,
                io_timeout_s=self.config.io_timeout,
                beat_interval_s=self.config.beat_interval,
                catch_up=self._catch_up_to,
                roles=self.roles,
                on_stale=self._epoch_seen,
                on_reboot=self._rebooted,
                wall=self.ports.wall,
            )
        return peer

    def coordinator(self, uuid: str) -> Coordinator:
        coordinator = self.coordinators.get(uuid)
        if coordinator is None:
            coordinator = self.coordinators[uuid] = Coordinator(self, uuid)
        return coordinator

    def roles(self) -> dict[str, int]:
        return {uuid: c.epoch for uuid, c in self.coordinators.items() if c.held}

    def _epoch_seen(self, uuid: str, epoch: int) -> None:
        c = self.coordinators.get(uuid)
        if c is not None and c.held and epoch > c.epoch:
            c.lose(f"epoch {epoch} has begun")

    def _rebooted(self, node: str) -> None:
        for c in self.coordinators.values():
            if c.held:
                c.flusher.rebooted(node)

    def role_lost(self, uuid: str) -> None:
        self.resyncs.pop(uuid, None)

    async def metad(self, op: str, fields: Header) -> Header:
        """A request of this node.  Raises UkaiError."""
        if not self.registered and op != "register":
            raise NotReady("this node is not registered at metad yet")
        if op in NUMBERED:
            fields = {**fields, "n": next(self._numbers)}
        return await self.ports.metad(op, {"node": self.node, "inc": self.inc, **fields}, self.config.io_timeout)

    async def catch_up(self) -> None:
        await self.metad("catchup", {})

    async def _catch_up_to(self, seq: int) -> None:
        if self.mirror.seq < seq:
            await self.catch_up()

    def _changed(self, change: Change) -> None:
        kind = change["t"]
        if kind == "replicas":
            c = self.coordinators.get(change["uuid"])
            if c is not None:
                c.changed([(r[0], r[1]) for r in change["ranges"]])
        elif kind == "image":
            c = self.coordinators.get(change["uuid"])
            if c is not None and c.held and "writer" in change and change["writer"] not in ("", self.node):
                c.lose(f"node {change['writer']} is the writer now")
            if change.get("online"):
                self.closed.discard(change["uuid"])
        elif kind == "image-drop":
            c = self.coordinators.pop(change["uuid"], None)
            if c is not None:
                c.lose("the image was removed")
            self.closed.discard(change["uuid"])

    def _reset(self) -> None:
        for c in self.coordinators.values():
            c.changed(None)

    # --- metad

    async def keep_registered(self) -> None:
        """Register, then say each beat that this node lives; for as long as the process runs."""
        while True:
            try:
                if not self.registered:
                    await self._register()
                await self._beat()
                delay_s = self.config.beat_interval
                self.problem = ""
            except UkaiError as e:
                if e.message != self.problem:
                    self.problem = e.message
                    log.log(logging.ERROR if isinstance(e, (Behind, Refused)) else logging.INFO, "metad: %s", e.message)
                if isinstance(e, NotReady):
                    self.registered = False
                delay_s = min(0.5, self.config.beat_interval)
            await asyncio.sleep(delay_s)

    async def _register(self) -> None:
        fields = {
            "store_id": self.store.store_id,
            "boot_id": self.ports.boot_id,
            "serial": self.store.serial,
            "highest_seq": max(self.store.highest_seq, self.mirror.floor),
            "cluster_id": self.store.cluster_id,
            "images": [image.inventory() for image in list(self.store.images.values())],
        }
        reply = await self.metad("register", fields)
        self.store.serial = integer(reply, "serial")
        self.store.cluster_id = text(reply, "cluster_id")
        self._save_store()
        self.replica.registered_seq = self.mirror.seq
        self.registered = True
        log.info("registered at metad, change %d", self.mirror.seq)

    def _save_store(self) -> None:
        self.store.highest_seq = max(self.store.highest_seq, self.mirror.seq)
        try:
            self.store.save()
        except OSError as e:
            log.warning("%s/.ukai/store.json can't be written: %s", self.store.root, e)

    async def _beat(self) -> None:
        sent_at = self.now()
        opens: dict[str, int] = {}
        for handle in self.handles.values():
            opens[handle.coordinator.uuid] = opens.get(handle.coordinator.uuid, 0) + 1
        down = [[p.node, p.down_since, p.reason] for p in self._peers.values() if not p.up]
        fields = {
            "saved_seq": self.store.highest_seq,
            "roles": self.roles(),
            "opens": opens,
            "down": down,
            "progress": {uuid: r.progress() for uuid, r in self.resyncs.items()},
            "space": list(self.store.disk.space(self.store.root)),
        }
        reply = await self.metad("beat", fields)
        self.lease_until = sent_at + self.config.lease
        for uuid in reply.get("lost", []):
            if uuid in self.coordinators:
                self.coordinators[uuid].lose("metad knows another writer")
        self._beats += 1
        if self._beats % SAVE_BEATS == 0 and self.store.highest_seq < self.mirror.seq:
            self._save_store()

    async def keep_house(self) -> None:
        """Background work of the coordinators and of the handles; for as long as the process runs."""
        while True:
            await asyncio.sleep(self.config.beat_interval)
            self._drop_silent_frontends()
            used = {h.coordinator.uuid for h in self.handles.values()}
            for uuid, c in list(self.coordinators.items()):
                if c.held:
                    self.spawn(self._look_after(c, uuid in used))
                elif (image := self.mirror.cluster.images.get(uuid)) is not None and image.writer == self.node:
                    self.spawn(self._hand_back(c, image.epoch))

    def _drop_silent_frontends(self) -> None:
        limit = self.now() - FRONTEND_BEATS * self.config.beat_interval
        for frontend in [f for f, at in self.frontends.items() if at < limit]:
            del self.frontends[frontend]
            self._close_frontend(frontend, "is silent")

    def _close_frontend(self, frontend: str, why: str) -> None:
        mine = [h for h in self.handles.values() if h.frontend == frontend]
        for handle in mine:
            del self.handles[handle.number]
            self._handle_gone(handle.coordinator)
        if mine:
            log.warning("the frontend %s; its %d open handles are closed", why, len(mine))

    def _handle_gone(self, c: Coordinator) -> None:
        c.idle_since = self.now()
        if not any(h.coordinator is c for h in self.handles.values()):
            c.flusher.lost = ""  # whoever opens the image next sees what there is

    async def _look_after(self, c: Coordinator, used: bool) -> None:
        job = self.mirror.cluster.jobs.get(c.uuid)
        running = job is not None and job.state == "running"
        current = self.resyncs.get(c.uuid)
        if job is not None and running and (current is None or (current.task.done() and current.number != job.number)):
            self.resyncs[c.uuid] = Resync(c, job)
        elif current is not None and current.task.done() and not running:
            del self.resyncs[c.uuid]
        try:
            if used or running or c.uuid in self.resyncs:
                c.idle_since = self.now()
            elif not c.inflight and self.now() - c.idle_since >= self.config.role_linger:
                await self._give_up(c)
                return
            await c.activity.tick()
        except UkaiError as e:
            log.info("image %s: %s", c.uuid, e.message)

    async def _give_up(self, c: Coordinator) -> None:
        """Return the role to metad, flushed."""
        epoch = c.epoch
        if await c.release(epoch, self.now() + self.config.io_timeout):
            await self.metad("release", {"image": c.uuid, "epoch": epoch})

    async def _hand_back(self, c: Coordinator, epoch: int) -> None:
        """Tell metad again of a role that was given up while metad was away."""
        try:
            if epoch == c.epoch:
                await self._give_up(c)
        except UkaiError as e:
            log.info("image %s: %s", c.uuid, e.message)

    async def stop(self) -> None:
        """Drain: give all roles up, flushed, so that the next process has nothing to reconcile."""
        self._stopping = True
        held = [c for c in self.coordinators.values() if c.held]
        for done in await asyncio.gather(*(self._give_up(c) for c in held), return_exceptions=True):
            if isinstance(done, BaseException):
                log.info("a role was not released: %s", done)
        # a writer elsewhere that stops as well wants to flush what it wrote here
        try:
            async with asyncio.timeout(self.config.replica_timeout):
                while any(image.unflushed for image in self.store.images.values()):
                    self.replica.flushed.clear()
                    await self.replica.flushed.wait()
        except TimeoutError:
            log.info("stopping with writes that no coordinator has flushed")
        self._save_store()
        for peer in self._peers.values():
            peer.close()
        for task in list(self._tasks):
            task.cancel()

    # --- requests of metad

    async def called(self, header: Header) -> Header:
        """Answer a request of metad.  Raises UkaiError."""
        call = self._calls.get(text(header, "op"))
        if call is None:
            raise RemoteProtocolError(f"op {show(header.get('op'))} is not known here")
        return await call(header)

    async def _call_release(self, header: Header) -> Header:
        uuid = text(header, "image", 36)
        handles = sum(1 for h in self.handles.values() if h.coordinator.uuid == uuid)
        c = self.coordinators.get(uuid)
        clean = c is not None and await c.release(integer(header, "epoch"), self.now() + self.config.io_timeout / 2)
        return {"handles": handles, "clean": clean}

    async def _call_acquire(self, header: Header) -> Header:
        uuid = text(header, "image", 36)
        purpose = text(header, "purpose", 10, "sync")
        c = self.coordinator(uuid)
        await c.acquire(-1, purpose, self.now() + self.config.io_timeout / 2)
        c.idle_since = self.now()
        return {"epoch": c.epoch}

    async def _call_prepare(self, header: Header) -> Header:
        mode = text(header, "mode", 10)
        if mode == "forget":
            self.store.forget(text(header, "uuid", 36))
            return {}
        image = self.store.prepare(
            text(header, "uuid", 36),
            text(header, "name", 100),
            integer(header, "size", 1),
            integer(header, "block_size", 1),
            mode,
        )
        if mode != "adopt":
            return {}
        present, bad = await self.run_disk(image.adopt)
        return {"present": present, "bad": bad}

    async def _call_adopted(self, header: Header) -> Header:
        image = self.store.image(text(header, "uuid", 36))
        await self.run_disk(
            image.adopted, ranges(header, "ranges", image.block_count - 1), integer(header, "generation", 1)
        )
        return {}

    async def _call_drop(self, header: Header) -> Header:
        uuid, name = text(header, "uuid", 36), text(header, "name", 100)
        await self.catch_up()  # so that nothing here still writes there
        image = self.mirror.cluster.images.get(uuid)
        where = image.locations.get(self.node) if image is not None else None
        wanted = ranges(header, "ranges") if "ranges" in header else [(0, 2**62)]
        if where is not None and any(where.within(first, last) for first, last in wanted):
            raise Refused(f"node {self.node} is still a location of these blocks of image {name}")
        if "ranges" in header:
            self.store.image(uuid).drop(wanted)
        else:
            self.store.drop(uuid, name)
        return {}

    async def _call_close(self, header: Header) -> Header:
        uuid = text(header, "image", 36)
        if flag(header, "reopen"):
            self.closed.discard(uuid)
            return {}
        handles = sum(1 for h in self.handles.values() if h.coordinator.uuid == uuid)
        if handles:
            raise Busy(f"the image is open at node {self.node} ({handles} handles)")
        self.closed.add(uuid)
        return {}

    # --- requests of peers

    def from_peer(self, header: Header, payload: Payload | None, reply: Reply) -> None:
        """Answer a message of another node's blockd, now or later."""
        try:
            if header.get("op") == "cr":
                self.spawn(self._later(self._read_for_peer(header), reply))
                return
            answer = self.replica.handle(header, payload)
        except UkaiError as e:
            reply(error_reply(e), None)
            return
        except Exception as e:
            log.exception("defect while answering a peer")
            reply(error_reply(e), None)
            return
        if isinstance(answer, tuple):
            reply(*answer)
        else:
            self.spawn(self._later(answer, reply))

    async def _later(self, answer: Awaitable[tuple[Header, Payload | None]], reply: Reply) -> None:
        try:
            reply(*await answer)
        except UkaiError as e:
            reply(error_reply(e), None)
        except Exception as e:
            log.exception("defect while answering")
            reply(error_reply(e), None)

    async def _read_for_peer(self, header: Header) -> tuple[Header, Payload | None]:
        c = self.coordinators.get(text(header, "i", 36))
        if c is None or not c.held:
            raise NotCoordinator("this node is not the writer")
        async with asyncio.timeout(self.config.io_timeout):
            data = await c.read_held(integer(header, "o"), integer(header, "l", 1, TRANSFER_LIMIT_BYTES))
        return {}, data

    # --- requests of the frontend

    def from_frontend(self, header: Header, payload: Payload | None, reply: Reply) -> None:
        """Answer a message of a frontend of this node, now or later."""
        try:
            op = header.get("op")
            if op == "hello":
                self.frontends[text(header, "frontend")] = self.now()
                reply({"inc": self.inc, "node": self.node, "io_timeout": self.config.io_timeout}, None)
                return
            if op == "beat":
                reply(self._frontend_beat(header), None)
                return
            if header.get("inc") != self.inc:
                raise StaleSession("this is another blockd process; open the image anew")
            if self._stopping:
                raise NotReady("blockd is stopping")
            do = self._ops.get(op) if type(op) is str else None
            if do is None:
                raise RemoteProtocolError(f"op {show(op)} is not known here")
            do(header, payload, reply)
        except UkaiError as e:
            reply(error_reply(e), None)

    def _frontend_beat(self, header: Header) -> Header:
        frontend = text(header, "frontend")
        for old in [f for f in self.frontends if f != frontend]:
            if not any(h.frontend == frontend for h in self.handles.values()):
                continue
            self._close_frontend(old, "was started anew")
            del self.frontends[old]
        self.frontends[frontend] = self.now()
        numbers = header.get("handles", [])
        if type(numbers) is not list:
            raise RemoteProtocolError("field handles: a list is wanted")
        return {"inc": self.inc, "known": [n for n in numbers if type(n) is int and n in self.handles]}

    def _handle(self, header: Header) -> Handle:
        handle = self.handles.get(header.get("h", -1)) if type(header.get("h")) is int else None
        if handle is None:
            raise StaleSession("this handle is not open here; open the image anew")
        return handle

    def _answer(self, reply: Reply, c: Coordinator, op: str, size: int) -> Callable[..., None]:
        """Reply and count."""
        began = self.now()
        stats = self.metrics.op(op, c.name())

        def done(error: UkaiError | None, data: Payload | None = None) -> None:
            stats.done(self.now() - began, size, error is not None)
            if error is None:
                reply({}, data)
            else:
                reply(error_reply(error), None)

        return done

    def _read(self, header: Header, _payload: Payload | None, reply: Reply) -> None:
        handle = self._handle(header)
        length = integer(header, "l", 1, TRANSFER_LIMIT_BYTES)
        handle.coordinator.read(integer(header, "o"), length, self._answer(reply, handle.coordinator, "read", length))

    def _write(self, header: Header, payload: Payload | None, reply: Reply) -> None:
        handle = self._handle(header)
        sync = header.get("s") is True
        c = handle.coordinator
        if header["op"] == "z":
            length = integer(header, "l", 1)
            c.write(handle, integer(header, "o"), None, length, sync, self._answer(reply, c, "discard", length))
            return
        if not payload or len(payload) > TRANSFER_LIMIT_BYTES:
            raise RemoteProtocolError(f"a write carries 1 to {TRANSFER_LIMIT_BYTES} bytes")
        length = len(payload)
        c.write(handle, integer(header, "o"), payload, length, sync, self._answer(reply, c, "write", length))

    def _flush(self, header: Header, _payload: Payload | None, reply: Reply) -> None:
        handle = self._handle(header)
        c = handle.coordinator
        done = self._answer(reply, c, "flush", 0)

        async def flush() -> None:
            try:
                async with asyncio.timeout(self.config.io_timeout):
                    await c.flusher.fsync(handle, self.now() + self.config.io_timeout)
            except UkaiError as e:
                done(e)
            except TimeoutError:
                done(NotReady("the flush could not be completed within io_timeout"))
            else:
                done(None)

        self.spawn(flush())

    def _open(self, header: Header, _payload: Payload | None, reply: Reply) -> None:
        self.spawn(self._later(self._opened(header), reply))

    async def _opened(self, header: Header) -> tuple[Header, Payload | None]:
        name, number = text(header, "image", 100), integer(header, "h")
        frontend, epoch = text(header, "frontend"), integer(header, "epoch", -1, default=-1)
        known = self.mirror.cluster.images.get(self.mirror.cluster.names.get(name, ""))
        if known is None or known.uuid not in self.coordinators or not self.coordinators[known.uuid].held:
            await self.catch_up()  # the epoch decides later whether the handle is stale, so it must be the present one
        image = self.mirror.cluster.by_name(name)
        if not image.online or self.node not in image.hypervisors or image.uuid in self.closed:
            raise NotFound(f"image {name} is not online at this hypervisor")
        if epoch < 0:
            epoch = image.epoch
        if number not in self.handles:
            self.handles[number] = Handle(number, frontend, self.coordinator(image.uuid), epoch)
        self.frontends[frontend] = self.now()
        return {"uuid": image.uuid, "size": image.size, "block_size": image.block_size, "epoch": epoch}, None

    def _close(self, header: Header, _payload: Payload | None, reply: Reply) -> None:
        handle = self.handles.pop(integer(header, "h"), None)
        if handle is not None:
            self._handle_gone(handle.coordinator)
        reply({}, None)

    def _stat(self, header: Header, _payload: Payload | None, reply: Reply) -> None:
        self.spawn(self._later(self._allocated(text(header, "image", 100)), reply))

    async def _allocated(self, name: str) -> tuple[Header, Payload | None]:
        """Bytes that one copy of the image takes on disks: each block counted at its nearest in-sync replica."""
        image = self.mirror.cluster.by_name(name)
        by: dict[str, list[tuple[int, int]]] = {}
        for first, last, replicas in image.segments():
            good = [n for n, r in replicas.items() if r.status == 0 and r.generation]
            good.sort(key=lambda n: (n != self.node, not (n == self.node or self.peer(n).up), n))
            if good:
                by.setdefault(good[0], []).append((first, last))
        total = 0
        for node, where in by.items():
            try:
                if node == self.node:
                    total += await self.run_disk(self.store.image(image.uuid).allocated, where)
                else:
                    reply, _ = await self.peer(node).ask("usage", {"i": image.uuid, "ranges": [list(r) for r in where]})
                    total += integer(reply, "allocated")
            except UkaiError as e:
                log.info("image %s: its space at node %s is not known: %s", name, node, e.message)
        return {"allocated": total}, None

    def _statfs(self, _header: Header, _payload: Payload | None, reply: Reply) -> None:
        free, total = self.store.disk.space(self.store.root)
        reply({"free": free, "total": total}, None)
