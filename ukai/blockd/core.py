"""The block server's decisions: registration, beats, the images' coordinators, requests of peers.

``frontends.py`` answers the frontends of this node, ``orders.py`` metad.  No socket, clock, randomness or thread in
here: ``Ports`` are handed in.  Requests are answered through the function that comes with them.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ukai import faults
from ukai.blockd.coordinator import Coordinator
from ukai.blockd.frontends import TRANSFER_LIMIT_BYTES, Frontends, Reply
from ukai.blockd.jobs import Run
from ukai.blockd.orders import Orders
from ukai.blockd.peer import Connect, Payload, Peer
from ukai.blockd.replica import Later, Replica, Sync
from ukai.blockd.resync import Resync
from ukai.blockd.store import Store
from ukai.blockd.verify import Verify
from ukai.config import Config
from ukai.errors import (
    Behind,
    NotCoordinator,
    NotReady,
    Refused,
    StaleSession,
    UkaiError,
)
from ukai.loans import Page
from ukai.messages import Header, error_reply, integer, text
from ukai.mirror import Mirror
from ukai.model import Change
from ukai.telemetry import Metrics

log = logging.getLogger(__name__)

SAVE_BEATS = 5
OVERTAKEN_TIMES = 10

NUMBERED = frozenset(
    {
        "register",
        "grant",
        "grant.commit",
        "release",
        "activate",
        "retire",
        "mark",
        "sync.begin",
        "sync.finish",
        "job.note",
        "job.end",
    }
)
"""What alters metadata: metad takes each number once and in order, so that a late request can't undo a newer one."""


@dataclass(slots=True)
class Ports:
    """What the core needs from the world."""

    metad: Callable[[str, Header, float], Awaitable[Header]]
    """A request to metad whose reply the mirror has taken."""
    connect: Connect
    run_disk: Callable[..., Awaitable[Any]]
    """Run a blocking function in a thread beside the loop."""
    sync: Sync
    wall: Callable[[], float]
    new_id: Callable[[], str]
    new_token: Callable[[], int]
    new_page: Callable[[str, int], Page]
    """For the loans of an image of so many blocks.  Raises OSError."""
    take_in: Callable[[], None]
    """Hear all that frontends have sent by now."""
    boot_id: str


class Core:
    """One node's block server."""

    def __init__(self, config: Config, node: str, store: Store, mirror: Mirror, ports: Ports, metrics: Metrics) -> None:
        self.config, self.node, self.store, self.mirror, self.ports = config, node, store, mirror, ports
        self.metrics = metrics
        self.now = asyncio.get_running_loop().time
        """The loop's clock, in seconds; each request looks at it several times."""
        self.inc = ports.new_id()
        self.run_disk = ports.run_disk
        self.replica = Replica(store, self.inc, ports.new_token(), ports.run_disk, ports.sync, self.now)
        self.replica.before_epoch, self.replica.on_epoch = self._epoch_comes, self._epoch_seen
        self.replica.boot_id = ports.boot_id
        self.lease_until = float("-inf")
        self.registered = False
        self.problem = ""
        self.coordinators: dict[str, Coordinator] = {}
        self.frontends = Frontends(self)
        self.orders = Orders(self)
        self.resyncs: dict[str, Run] = {}
        self.peers: dict[str, Peer] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._beats = 0
        self._numbers = itertools.count(1)
        self.stopping = False
        store.on_forget = self._files_forgotten
        mirror.on_change.append(self._changed)
        mirror.on_reset.append(self._reset)

    # --- the ground

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
        peer = self.peers.get(node)
        if peer is None:
            peer = self.peers[node] = Peer(
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

    def _epoch_comes(self, uuid: str, epoch: int) -> None:
        """Of another writer: what was posted here belongs to the time before (R1)."""
        c = self.coordinators.get(uuid)
        if c is not None and c.held and epoch > c.epoch:
            c.posts.refuse()

    def _epoch_seen(self, uuid: str, epoch: int) -> None:
        c = self.coordinators.get(uuid)
        if c is not None and c.held and epoch > c.epoch:
            c.role.lose(f"epoch {epoch} has begun")

    def _files_forgotten(self, uuid: str, block: int | None) -> None:
        """The store has let go of block files, since they are removed or made anew."""
        c = self.coordinators.get(uuid)
        if c is not None:
            c.changed(None if block is None else [(block, block)])

    def _rebooted(self, node: str) -> None:
        for c in self.coordinators.values():
            if c.held:
                c.flusher.rebooted(node)
                c.activity.rebooted(node)

    def role_lost(self, uuid: str) -> None:
        self.resyncs.pop(uuid, None)

    async def metad(self, op: str, fields: Header) -> Header:
        """A request of this node.  Raises UkaiError."""
        if not self.registered and op != "register":
            raise NotReady("this node is not registered at metad yet")
        fields = {"node": self.node, "inc": self.inc, "serial": self.store.serial, **fields}
        if op not in NUMBERED:
            return await self.ports.metad(op, fields, self.config.io_timeout)
        for _ in range(OVERTAKEN_TIMES):
            try:
                return await self.ports.metad(op, {**fields, "n": next(self._numbers)}, self.config.io_timeout)
            except StaleSession:  # another one overtook it while there was no connection; metad has done nothing
                await self.ports.metad("catchup", {}, self.config.io_timeout)
        raise NotReady("requests to metad overtake each other; ask again")

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
                c.role.lose(f"node {change['writer']} is the writer now")
            if c is not None and "replication" in change:
                c.changed(None)
            if change.get("online"):
                self.frontends.closed.discard(change["uuid"])
        elif kind == "image-drop":
            c = self.coordinators.pop(change["uuid"], None)
            if c is not None:
                c.role.lose("the image was removed")
                c.readable.discard()
            self.frontends.closed.discard(change["uuid"])

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
                if isinstance(e, (NotReady, Behind)):
                    self.registered = False  # a metad that lacks what this node has seen wants to hear what it holds
                delay_s = min(0.5, self.config.beat_interval)
            await asyncio.sleep(delay_s)

    async def _register(self) -> None:
        fields = {
            "store_id": self.store.store_id,
            "boot_id": self.ports.boot_id,
            "serial": self.store.serial,
            "highest_seq": self.mirror.floor,
            "maker": self.mirror.floor_maker,
            "cluster_id": self.store.cluster_id,
            "images": [image.inventory() for image in list(self.store.images.values())],
        }
        await faults.pause("register.ask")
        reply = await self.metad("register", fields)
        await faults.pause("register.answered")
        await self._renew_sums()
        before = self.store.serial, self.store.cluster_id
        self.store.serial, self.store.cluster_id = integer(reply, "serial"), text(reply, "cluster_id")
        if not self._save_store():  # what it sends carries the serial that is stored
            self.store.serial, self.store.cluster_id = before
            raise NotReady(f"{self.store.root}/.ukai/store.json can't be written")
        for image in self.store.images.values():
            image.failed_before.clear()  # metad knows
        await faults.pause("register.stored")
        self.replica.registered_seq = self.mirror.seq
        self.registered = True
        log.info("registered at metad, change %d", self.mirror.seq)

    async def _renew_sums(self) -> None:
        """After a start of the machine, data and checksums of what was not flushed need not belong together.

        That is in active blocks only (R5).  Their checksums are made anew before anybody reads them; what other
        replicas have of the lost writes, metad knows better.
        """
        rebooted = self.store.boot_id != self.ports.boot_id
        for image in [i for i in self.store.images.values() if i.sums is not None]:
            known = self.mirror.cluster.images.get(image.uuid)
            blocks = list(known.active.indexes()) if known is not None and rebooted else []
            if image.sums is not None and image.sums.lost:
                blocks = [b for b, generation in enumerate(image.generations) if generation]
                if blocks:
                    log.warning("%s was missing: checksums are those of the data as they are", image.sums.path)
            for block in blocks:
                try:
                    await self.replica.renew_sums(image, block)
                except UkaiError as e:
                    log.info("checksums of block %d of image %s stay as they are: %s", block, image.name, e.message)
            if image.sums is not None:
                image.sums.lost = False
        self.store.boot_id = self.ports.boot_id

    def _save_store(self) -> bool:
        """Whether it is stored: metad is told of nothing else, or it would take this store for an older copy later."""
        before = self.store.highest_seq, self.store.maker
        self.store.highest_seq, self.store.maker = self.mirror.floor, self.mirror.floor_maker
        try:
            self.store.save()
        except OSError as e:
            self.store.highest_seq, self.store.maker = before
            log.warning("%s/.ukai/store.json can't be written: %s", self.store.root, e)
            return False
        return True

    async def _beat(self) -> None:
        sent_at = self.now()
        down = [[p.node, p.down_since, p.reason] for p in self.peers.values() if not p.up]
        fields = {
            "saved_seq": self.store.highest_seq,
            "roles": self.roles(),
            "opens": self.frontends.opens(),
            "heard": self.frontends.heard,
            "down": down,
            "progress": {uuid: r.progress() for uuid, r in self.resyncs.items()},
            "space": list(self.store.disk.space(self.store.root)),
        }
        reply = await self.metad("beat", fields)
        self.lease_until = sent_at + self.config.lease
        for uuid in reply.get("lost", []):
            if uuid in self.coordinators:
                self.coordinators[uuid].role.lose("metad knows another writer")
        for c in self.coordinators.values():
            if c.held:
                c.readable.renew(self.lease_until)
        self._beats += 1
        if self._beats % SAVE_BEATS == 0 and self.store.highest_seq < self.mirror.seq:
            self._save_store()

    async def keep_house(self) -> None:
        """Background work of the coordinators and of the handles; for as long as the process runs."""
        while True:
            await asyncio.sleep(self.config.beat_interval)
            self.frontends.drop_silent()
            used = {h.coordinator.uuid for h in self.frontends.handles.values()}
            for uuid, c in list(self.coordinators.items()):
                if c.held:
                    self.spawn(self._look_after(c, uuid in used))
                elif (image := self.mirror.cluster.images.get(uuid)) is not None and image.writer == self.node:
                    self.spawn(self._hand_back(c, image.epoch))

    async def _look_after(self, c: Coordinator, used: bool) -> None:
        job = self.mirror.cluster.jobs.get(c.uuid)
        running = job is not None and job.state == "running"
        current = self.resyncs.get(c.uuid)
        over = current is None or (
            current.task.done() and (job is None or current.number != job.number or current.over)
        )
        if job is not None and running and c.held and over:
            self.resyncs[c.uuid] = Verify(c, job) if job.kind == "verify" else Resync(c, job)
        elif current is not None and current.task.done() and not running:
            del self.resyncs[c.uuid]
        try:
            if used or running or c.uuid in self.resyncs:
                c.idle_since = self.now()
            elif not c.inflight and not c.behind.ops and self.now() - c.idle_since >= self.config.role_linger:
                await self._give_up(c)
                return
            await c.activity.tick()
        except UkaiError as e:
            log.info("image %s: %s", c.uuid, e.message)

    async def _give_up(self, c: Coordinator) -> None:
        """Return the role to metad, flushed."""
        epoch = c.epoch
        if await c.role.release(epoch, self.now() + self.config.io_timeout):
            await self.metad("release", {"image": c.uuid, "epoch": epoch, "left": c.role.left})

    async def _hand_back(self, c: Coordinator, epoch: int) -> None:
        """Tell metad again of a role that was given up while metad was away, or without a flush.

        Or of one that was granted, and this node was never told.  What was not flushed stays active, and is compared
        at the next grant as after a crash (R5).
        """
        try:
            if c.held or c.role.wanted or epoch < c.epoch:
                return
            clean = await c.role.release(epoch, self.now() + self.config.io_timeout)
            left = c.role.left if clean else [[0, c.image.block_count - 1]]
            await self.metad("release", {"image": c.uuid, "epoch": epoch, "left": left})
        except UkaiError as e:
            log.info("image %s: %s", c.uuid, e.message)

    async def stop(self) -> None:
        """Drain: give all roles up, flushed, so that the next process has nothing to reconcile."""
        for c in self.coordinators.values():
            c.posts.refuse()
        self.stopping = True
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
        for peer in self.peers.values():
            peer.close()
        for task in list(self._tasks):
            task.cancel()

    # --- requests of peers

    def from_peer(self, header: Header, payload: Payload | None, reply: Reply) -> None:
        """Answer a message of another node's blockd, now or later."""
        try:
            if header.get("op") == "cr":
                self.spawn(self.later(self._read_for_peer(header), reply))
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
        elif isinstance(answer, Later):
            answer.then(reply)
        else:
            self.spawn(self.later(answer, reply))

    async def later(self, answer: Awaitable[tuple[Header, Payload | None]], reply: Reply) -> None:
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
            length = integer(header, "l", 1, TRANSFER_LIMIT_BYTES)
            await c.posts.passed()
            data = await c.reads.read_held(integer(header, "o"), length, elsewhere=True)
        return {}, data
