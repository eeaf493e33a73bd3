"""A cluster in one virtual loop: the decision code of frontend, blockd and metad, unchanged, on simulated
clocks, connections and disks.  Everything that happens follows from one seed.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, MutableSequence
from typing import Any

from msgpack import unpackb

from tests.sim.disk import SimDisk, stored
from tests.sim.early import Early
from tests.sim.loop import CURRENT, NOBODY, Process, kill, thaw, within
from ukai import messages
from ukai.blockd.core import Core as BlockCore
from ukai.blockd.core import Ports as BlockPorts
from ukai.blockd.store import Store
from ukai.config import Config
from ukai.errors import NotFound, NotReady, StaleHandle, Timeout, UkaiError, Unreachable
from ukai.frontend.client import CLOSE_WAIT_S
from ukai.frontend.core import Habit, Overdue, Verdict, after_error, pause_s
from ukai.frontend.posted import Post, cover
from ukai.frontend.shortcut import Loan, Shortcut
from ukai.frontend.watch import SILENT_QUESTIONS
from ukai.loans import NOT_LENT
from ukai.messages import Header
from ukai.metad import ops
from ukai.metad.acceptance import SKIP_CHANGES
from ukai.metad.core import Core as MetaCore
from ukai.mirror import Mirror
from ukai.model import IN_SYNC, Cluster, Image, written
from ukai.telemetry import Metrics

METAD = "metad"
NODES = ("127.0.0.1", "127.0.0.2", "127.0.0.3")

CONFIG = Config(
    metad_address=NODES[0],
    replica_timeout=0.5,
    io_timeout=6.0,
    lease=1.0,
    beat_interval=0.2,
    role_linger=1.0,
    active_limit=3,
    active_idle=0.6,
    active_age=2.0,
    flush_window=16384,
    sync_chunk=4096,
    sync_rate=0,
)

DEATH_SEEN_S = 0.03
"""How long a frontend takes to notice that its blockd is gone."""


class Connection:
    """One TCP connection: ordered both ways; a cut loses what is under way, and the next connection starts empty."""

    def __init__(self, net: Network, client: Process, client_host: str, server: str) -> None:
        self.net, self.client, self.client_host, self.server = net, client, client_host, server
        self.open = True
        self.from_client = self.from_server = 0.0
        self.number = 0


class Network:
    """Messages between processes, by name of the host."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cuts: set[tuple[str, str]] = set()
        """(from, to): nothing goes that way."""
        self.slow = 0.0005
        self.repeat = 0.0
        """Chance that a data message of a peer is delivered twice, late."""

    def blocked(self, a: str, b: str) -> bool:
        return (a, b) in self.cuts

    def delay(self) -> float:
        chance = self.world.chance
        return chance.expovariate(1 / self.slow) if chance.random() < 0.98 else chance.uniform(0, 60 * self.slow)

    def pass_on(
        self,
        connection: Connection,
        to_server: bool,
        target: Process | None,
        deliver: Callable[..., None],
        frame: bytes,
        payload: bytes | None,
    ) -> None:
        """One message, in order with the others of its connection and direction."""
        a, b = connection.client_host, connection.server
        if not to_server:
            a, b = b, a
        if self.blocked(a, b):
            connection.open = False  # bytes are lost: TCP gives up sooner or later, here at once
            return
        loop = asyncio.get_running_loop()
        at = loop.time() + self.delay()
        if to_server:
            at = connection.from_client = max(at, connection.from_client + 1e-7)
        else:
            at = connection.from_server = max(at, connection.from_server + 1e-7)
        number = connection.number

        def arrive(late: bool = False) -> None:
            if target is None or not target.alive:
                return
            if not late and (not connection.open or connection.number != number or self.blocked(a, b)):
                connection.open = False
                return
            loop.call_soon(deliver, frame, payload, context=target.context)

        loop.call_at(at, arrive, context=NOBODY)
        if to_server and self.repeat and self.world.chance.random() < self.repeat:
            loop.call_at(at + self.world.chance.uniform(0.01, 3.0), arrive, True, context=NOBODY)


class Transport:
    """What blockd's ``connect`` gives: a connection to the blockd of another node."""

    def __init__(
        self,
        world: World,
        own: str,
        node: str,
        client: Process,
        received: Callable[[Header, Any], None],
        lost: Callable[[], None],
    ) -> None:
        self.world, self.own, self.node, self.client, self.received = world, own, node, client, received
        self.lost = lost
        self.connection = Connection(world.net, client, own, node)
        self.closed = False
        world.transports.append(self)

    def send(self, header: Header, payload: Any) -> bool:
        if self.closed:
            return False
        net, server = self.world.net, self.world.blockds.get(self.node)
        if net.blocked(self.own, self.node) or net.blocked(self.node, self.own) or server is None or not server.alive:
            self.connection.open = False
            return False
        if not self.connection.open:  # ZeroMQ connects anew by itself, and tells nobody
            self.connection.open = True
            self.connection.number += 1
        frame = messages.pack(header)
        data = None if payload is None else bytes(payload)
        net.pass_on(self.connection, True, server.process, self._serve, frame, data)
        return True

    def _serve(self, frame: bytes, payload: bytes | None) -> None:
        """In the server's process."""
        header = unpackb(frame)
        server = self.world.blockds[self.node]
        if server.process is not CURRENT.get():
            return
        number = header["id"]

        def reply(fields: Header, data: Any) -> None:
            packed = messages.pack({**fields, "re": number})
            kept = None if data is None else bytes(data)
            self.world.net.pass_on(self.connection, False, self.client, self._answered, packed, kept)

        self.world.check_epoch(self.node, header, reply, payload)

    def _answered(self, frame: bytes, payload: bytes | None) -> None:
        if not self.closed:
            self.received(unpackb(frame), payload)

    def server_died(self) -> None:
        """Its system ends the connection, after what it had sent; nobody hears of it where the network is cut."""
        if self.connection.open:
            self.world.net.pass_on(self.connection, False, self.client, self._ended, b"", None)

    def _ended(self, _frame: bytes, _payload: bytes | None) -> None:
        if not self.closed:
            self.connection.open = False
            self.lost()

    def close(self) -> None:
        self.closed = True
        self.connection.open = False


class SimPage:
    """A page of loans; outlives the process that made it, as long as a frontend has it."""

    def __init__(self, block_count: int) -> None:
        self.lease: MutableSequence[float] = [0.0]
        self.numbers: MutableSequence[int] = [NOT_LENT] * block_count

    def clear(self) -> None:
        self.numbers[:] = [NOT_LENT] * len(self.numbers)

    def end(self) -> None:
        self.lease[0] = 0.0


class Blockd:
    """One blockd process on a node; its disk outlives it."""

    def __init__(self, world: World, node: str) -> None:
        self.world, self.node = world, node
        self.process = Process(f"blockd {node} #{next(world.numbers)}")
        self.disk = world.disks[node]
        self.asked: dict[asyncio.Future[Any], None] = {}
        """Requests of frontends that are not answered."""
        self._inbox: list[Callable[[], None]] = []
        """Those that came while it was frozen."""
        self._posted: deque[Callable[[], None]] = deque()
        """Posted writes in its sockets."""
        within(self.process, self._start)

    @property
    def alive(self) -> bool:
        return self.process.alive

    def arrives(self, serve: Callable[[], None]) -> None:
        """A request of a frontend."""
        if self.process.frozen:
            self._inbox.append(serve)
        else:
            asyncio.get_running_loop().call_soon(serve, context=self.process.context)

    def posted(self, serve: Callable[[], None]) -> None:
        """A posted write is in its socket, and handled a while later."""
        self._posted.append(serve)
        chance = self.world.chance
        delay_s = chance.uniform(0, 0.0003) if chance.random() < 0.7 else chance.uniform(0, 0.2)
        asyncio.get_running_loop().call_later(delay_s, self._take_in, 1, context=self.process.context)

    def _take_in(self, count: int = 0) -> None:
        for _ in range(min(count or len(self._posted), len(self._posted))):
            self._posted.popleft()()

    def thaw(self) -> None:
        """SIGCONT.  Each request of a frontend has a connection of its own, so those that wait have no order."""
        inbox, self._inbox = self._inbox, []
        chance = self.world.chance
        chance.shuffle(inbox)
        if timers_first := chance.random() < 0.5:
            thaw(self.process)
        for serve in inbox:
            asyncio.get_running_loop().call_soon(serve, context=self.process.context)
        if not timers_first:
            thaw(self.process)

    def _start(self) -> None:
        world = self.world
        world.end_loans(self.node)
        self.store = Store("/data", "%016d", self.disk, 64)
        self.store.open(f"store-{self.node}")
        world.check_kept_epochs(self.node, self.store)
        self.mirror = Mirror(self.store.highest_seq, self.store.cluster_id, self.store.maker)
        ports = BlockPorts(
            metad=self._metad,
            connect=lambda node, *hear: Transport(world, self.node, node, self.process, *hear),
            run_disk=self._run_disk,
            sync=lambda _fds, _done: False,
            wall=lambda: 1e9 + asyncio.get_running_loop().time(),
            new_id=lambda: f"inc{next(world.numbers)}",
            new_token=lambda: next(world.numbers) << 20,
            new_page=self._new_page,
            take_in=self._take_in,
            boot_id=world.boots[self.node],
        )
        self.core = BlockCore(world.config, self.node, self.store, self.mirror, ports, Metrics())
        loop = asyncio.get_running_loop()
        self.background = [loop.create_task(self.core.keep_registered()), loop.create_task(self.core.keep_house())]

    def _new_page(self, _uuid: str, block_count: int) -> SimPage:
        page = SimPage(block_count)
        self.world.pages[self.node].append(page)
        return page

    async def _run_disk(self, function: Callable[..., Any], *args: Any) -> Any:
        delay_s = self.world.chance.uniform(0.0001, 0.003 + self.disk.slow_s)
        await asyncio.sleep(delay_s / 2)
        result = function(*args)
        await asyncio.sleep(delay_s / 2)  # the loop hears of it later than it happened
        return result

    async def _metad(self, op: str, fields: Header, timeout_s: float) -> Header:
        reply = await self.world.ask_metad(
            self.node,
            self.process,
            {"maker": self.mirror.cluster.maker, **fields, "op": op, "since": self.mirror.seq},
            timeout_s,
        )
        self.mirror.take_reply(reply)
        return reply


class Database:
    """What is durable of the metadata: the list of committed changes."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, float, str, Any]] = []
        self.committed = Cluster(cluster_id="cluster")
        """What the entries amount to, for the oracles."""
        self.fail = 0
        """How many of the next commits fail."""

    def commit(self, batch: list[tuple[int, float, str, Any]]) -> None:
        self.entries.extend(batch)
        for seq, _, _, change in batch:
            self.committed.seq = seq - 1  # a jump, where older metadata was accepted
            self.committed.apply(unpackb(messages.pack(dict(change))))

    def older(self, count: int) -> Database:
        """A copy as it was after so many changes."""
        copy = Database()
        copy.commit(self.entries[:count])
        return copy

    def load(self) -> Cluster:
        cluster = Cluster(cluster_id="cluster")
        for seq, _, _, change in self.entries:
            cluster.seq = seq - 1
            cluster.apply(change)
        return cluster

    def since(self, seq: int) -> list[list[Any]] | None:
        """The changes above ``seq``; None where a snapshot is needed."""
        wanted = self.committed.seq - seq
        found = self.entries[len(self.entries) - wanted :] if 0 <= wanted <= len(self.entries) else []
        return [list(e) for e in found] if not wanted or (found and found[0][0] == seq + 1) else None


class Metad:
    """One metad process: core, group commit, publishing."""

    def __init__(self, world: World, database: Database) -> None:
        self.world, self.database = world, database
        self.process = Process(f"metad #{next(world.numbers)}")
        self.inc = f"meta{next(world.numbers)}"
        self.waiting: list[tuple[int, float, str, Any]] = []
        self._barriers: list[asyncio.Future[None]] = []
        self._committing = False
        within(self.process, self._start)

    @property
    def alive(self) -> bool:
        return self.process.alive

    def _start(self) -> None:
        self.core = MetaCore(self.database.load(), self, CONFIG, NODES[0], self.inc)
        self.core.begin_run()
        asyncio.get_running_loop().create_task(self._beat())

    # the ports of the core

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        return 1e9 + self.now()

    def new_uuid(self) -> str:
        return f"00000000-0000-4000-8000-{next(self.world.numbers):012d}"

    def changed(self, entries: list[tuple[int, float, str, Any]]) -> None:
        self.waiting.extend(entries)

    async def durable(self) -> None:
        if not self.waiting and not self._committing:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._barriers.append(future)
        if not self._committing:
            self._committing = True
            asyncio.get_running_loop().create_task(self._commit())
        await future

    async def _commit(self) -> None:
        while self._barriers:
            await asyncio.sleep(0)
            barriers, self._barriers = self._barriers, []
            batch, self.waiting = self.waiting, []
            await asyncio.sleep(self.world.chance.uniform(0.0001, 0.001) if batch else 0)
            if batch and self.database.fail:
                self.database.fail -= 1
                self.drop_state()
                for barrier in [*barriers, *self._barriers]:
                    barrier.set_exception(NotReady("the metadata could not be written"))
                    barrier.exception()
                self._barriers = []
                break
            self.database.commit(batch)
            for seq, _, cause, change in batch:
                self.world.note(f"change {seq} {cause}: {change}")
            self.world.check_commit(self.database, batch)
            if batch:
                self._publish({"op": "changes", "changes": [list(e) for e in batch]})
            for barrier in barriers:
                if not barrier.done():
                    barrier.set_result(None)
        self._committing = False

    def drop_state(self) -> None:
        self.waiting = []
        self.core.replace(self.database.load())

    async def read_hand_made(self, name: str) -> Any:
        raise NotFound(f"no metadata of {name}")

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        asyncio.get_running_loop().create_task(work, name=name)

    async def call(self, node: str, op: str, fields: Header, timeout_s: float) -> Header:
        """A request to the blockd that is registered."""
        world = self.world

        async def serve(header: Header) -> Header:
            return await world.blockds[node].core.orders.answer(header)

        return await world.ask(
            METAD, node, self.process, lambda: world.blockds.get(node), serve, {**fields, "op": op}, timeout_s
        )

    # publishing

    def _publish(self, message: Header) -> None:
        world = self.world
        frame = messages.pack({**message, "cluster_id": self.core.cluster.cluster_id, "inc": self.inc})
        loop = asyncio.get_running_loop()
        for node, server in world.blockds.items():
            if world.net.blocked(METAD, node) or world.chance.random() < world.lossy_publish:
                continue
            loop.call_later(world.net.delay(), self._deliver, server, frame, context=NOBODY)

    def _deliver(self, server: Blockd, frame: bytes) -> None:
        if server.alive:

            def take() -> None:
                if not server.mirror.take_published(unpackb(frame)):
                    server.core.spawn(self._caught_up(server))

            asyncio.get_running_loop().call_soon(take, context=server.process.context)

    @staticmethod
    async def _caught_up(server: Blockd) -> None:
        try:
            await server.core.catch_up()
        except UkaiError:
            pass  # the next beat of metad asks again

    async def _beat(self) -> None:
        from ukai.metad import jobs

        while True:
            await asyncio.sleep(CONFIG.beat_interval)
            jobs.tick(self.core)
            await self.durable()
            self._publish({"op": "beat", "seq": self.core.cluster.seq})

    async def answer(self, header: Header) -> Header:
        """One request, as metad's server does it: the reply goes out after the commit."""
        since = header.get("since")
        try:
            if isinstance(since, int) and header["op"] != "register":
                self.core.check_seen(since, header.get("maker", ""))
            reply = ops.begin(self.core, header["op"], header)
            if not isinstance(reply, dict):
                reply = await reply
        except UkaiError as e:
            reply = messages.error_reply(e)
        await self.durable()
        out: Header = {
            **reply,
            "seq": self.core.cluster.seq,
            "inc": self.inc,
            "cluster_id": self.core.cluster.cluster_id,
        }
        if isinstance(since, int):
            changes = self.database.since(since)
            if since >= 0 and self.world.chance.random() < 0.9 and changes is not None:
                out["changes"] = changes
                out["seq"] = self.database.committed.seq
            else:
                out["snapshot"] = self.database.committed.snapshot()
        return out


class World:
    """The cluster, its faults, and its guests."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.config = CONFIG
        """The settings of the blockds."""
        self.chance = random.Random(seed)
        self.numbers = itertools.count(1)
        self.net = Network(self)
        self.lossy_publish = 0.0
        self.database = Database()
        self.disks = {n: SimDisk(random.Random(f"{seed} {n}")) for n in NODES}
        self.boots = {n: f"boot {n} 0" for n in NODES}
        self.blockds: dict[str, Blockd] = {}
        self._frontends: dict[str, FrontendProcess] = {}
        self.pages: dict[str, list[SimPage]] = {n: [] for n in NODES}
        self.direct = False
        """Whether frontends read lent block files."""
        self.metad: Metad | None = None
        self.dead: list[Process] = []
        self.transports: list[Transport] = []
        self.trace: list[str] = []
        self.violations: list[str] = []
        self.on_violation: Callable[[], None] = lambda: None
        self.on_power: Callable[[Image], None] = lambda _: None
        """Called when a node has lost power, and when it has registered again and nothing else was asked of it."""
        self.on_posts_lost: Callable[[list[Post]], None] = lambda _: None
        """What was posted on a node may be lost."""
        self.powerless: set[str] = set()
        """Nodes that lost power and whose blockd has not registered since."""
        self.tampered: set[str] = set()
        """Nodes whose files somebody altered while blockd was down, and whose blockd has not registered since."""
        self.rotten: set[tuple[str, int]] = set()
        """Node and block of what a disk has altered silently and no verify has found yet."""
        self.epochs: dict[tuple[str, str], int] = {}
        """node and image → highest epoch in which the node did something for a coordinator."""
        self.counts: dict[str, int] = {}
        self.jumps = False
        """Only older metadata is left, until an administrator accepts it: then the sequence leaves numbers out."""
        self.early: Early | None = None
        """For a flush image."""

    def note(self, text: str) -> None:
        self.trace.append(f"{asyncio.get_running_loop().time():.6f} {text}")

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def violation(self, text: str) -> None:
        self.note(f"VIOLATION {text}")
        self.violations.append(text)
        self.on_violation()

    # --- processes

    def start_metad(self, database: Database | None = None) -> None:
        self.note("start metad")
        self.metad = Metad(self, database or self.database)

    def start_blockd(self, node: str) -> None:
        self.note(f"start blockd {node}")
        self.blockds[node] = Blockd(self, node)

    def kill_metad(self) -> None:
        if self.metad is not None and self.metad.alive:
            self.note("kill metad")
            kill(self.metad.process)
            self.dead.append(self.metad.process)

    def end_loans(self, node: str) -> None:
        """As blockd does it for the pages of the process before it."""
        for page in self.pages[node]:
            page.end()
        self.pages[node].clear()

    def frontend(self, node: str) -> FrontendProcess:
        """The frontend of a node; one that was lost is started anew."""
        if node not in self._frontends:
            self._frontends[node] = FrontendProcess(self, node)
        return self._frontends[node]

    def lose_frontend(self, node: str) -> None:
        """It says nothing any more."""
        lost = self._frontends.pop(node, None)
        if lost is not None:
            self.on_posts_lost(lost.not_sent())
            lost.end()

    def kill_blockd(self, node: str, power: bool = False) -> None:
        server = self.blockds.get(node)
        if server is not None and server.alive:
            self.note(f"{'power off' if power else 'kill'} {node}")
            kill(server.process)
            self.dead.append(server.process)
            if (frontend := self._frontends.get(node)) is not None:
                frontend.lost_with.update(frontend.posts())
            self.transports = [t for t in self.transports if t.client.alive and not t.closed]
            for transport in self.transports:
                if transport.node == node and not power:
                    transport.server_died()
            for future in server.asked:
                asyncio.get_running_loop().call_later(DEATH_SEEN_S, _broken, future, context=NOBODY)
            if power:
                self.powerless.add(node)
                self.lose_frontend(node)
                for page in self.pages[node]:
                    page.end()  # whoever reads there has lost power too
                self.disks[node].power_cut()
                self.boots[node] = f"boot {node} {next(self.numbers)}"
                self._power_lost()
            else:
                self.disks[node].process_died()

    def _power_lost(self) -> None:
        for image in self.database.committed.images.values():
            self.on_power(image)

    def freeze(self, node: str) -> None:
        self.note(f"freeze {node}")
        self.blockds[node].process.frozen = True

    def thaw(self, node: str) -> None:
        if self.blockds[node].process.frozen:
            self.note(f"thaw {node}")
            self.blockds[node].thaw()

    # --- requests

    async def ask(
        self,
        source: str,
        target: str,
        process: Process | None,
        server: Callable[[], Blockd | Metad | None],
        serve: Callable[[Header], Awaitable[Header]],
        fields: Header,
        timeout_s: float,
    ) -> Header:
        """One request and its reply over the network.  Raises Unreachable, Timeout, or what the reply carries."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        future: asyncio.Future[bytes] = loop.create_future()
        connection = Connection(self.net, process or Process("outside"), source, target)
        running = server()
        while (
            self.net.blocked(source, target) or self.net.blocked(target, source) or running is None or not running.alive
        ):
            if loop.time() >= deadline:
                raise Unreachable(f"{target} can't be reached")
            await asyncio.sleep(0.05)
            running = server()
        host = running

        def arrived(frame: bytes, _payload: bytes | None) -> None:
            async def work() -> None:
                header = unpackb(frame)
                try:
                    reply = await serve(header)
                except UkaiError as e:
                    reply = messages.error_reply(e)
                if host is server():
                    self.net.pass_on(connection, False, process or OUTSIDE, answered, messages.pack(dict(reply)), None)

            if host is server():
                loop.create_task(work())  # noqa: RUF006  # kept with all tasks of its process

        def answered(frame: bytes, _payload: bytes | None) -> None:
            if not future.done():
                future.set_result(frame)

        self.net.pass_on(connection, True, host.process, arrived, messages.pack(dict(fields)), None)
        try:
            async with asyncio.timeout_at(deadline):
                reply: Header = unpackb(await future)
        except TimeoutError:
            raise Timeout(f"{target} did not answer {fields['op']}") from None
        messages.raise_error(reply)
        return reply

    async def ask_metad(self, source: str, process: Process | None, fields: Header, timeout_s: float) -> Header:
        async def serve(header: Header) -> Header:
            assert self.metad is not None
            return await self.metad.answer(header)

        return await self.ask(source, METAD, process, lambda: self.metad, serve, fields, timeout_s)

    async def ctl(self, op: str, **fields: Any) -> Header:
        return await self.ask_metad("ctl", None, {"op": op, "timeout": 4.0, **fields}, 5.0)

    # --- oracles about metadata and epochs

    def copies(self, block: int, flushed: bool) -> dict[str, bytes | bytearray]:
        """One block in every in-sync replica that was written, as it is on each disk; ``flushed``: for certain.

        Empty: the block was announced a moment ago, has no file yet, and reads as zeros until it is stamped.
        """
        out: dict[str, bytes | bytearray] = {}
        for image in self.database.committed.images.values():
            path = f"/data/{image.name}/{block:016d}"
            for node, replica in image.replicas(block).items():
                trusted = replica.status == IN_SYNC and (node, block) not in self.rotten
                if trusted and replica.generation and self.steady(node):
                    disk = self.disks[node]
                    inode = (disk.names_stable if flushed else disk.names_now).get(path)
                    out[node] = b"" if inode is None else inode.stable if flushed else inode.cache
        return out

    def registered(self, node: str) -> bool:
        server = self.blockds[node]
        return server.alive and server.core.registered

    def altered(self, node: str) -> bool:
        """Whether somebody has altered the files of a node and nobody can know yet."""
        if self.registered(node):
            self.tampered.discard(node)
        return node in self.tampered

    def steady(self, node: str) -> bool:
        """Whether the files of a node are what its blockd made them, so far as the cluster can know."""
        return not self.altered(node) and node not in self.powerless

    def check_commit(self, database: Database, batch: list[tuple[int, float, str, Any]]) -> None:
        """The sequence never repeats, leaves out or goes back, and no older database gets changes (R12)."""
        entries = database.entries
        last = entries[len(entries) - len(batch) - 1][0] if len(entries) > len(batch) else 0
        for seq, _, _, _ in batch:
            if seq != last + 1 and not (self.jumps and seq > last):
                self.violation(f"metadata sequence {seq} after {last}")
            last = seq
        if database is not self.database:
            batch = [entry for entry in batch if entry[3]["t"] != "run"]  # it says no more than that it began
            if batch:
                self.violation(f"a metad with an older database committed change {batch[0][0]}: {batch[0][2]}")
            return
        if self.jumps and entries[-1][0] < SKIP_CHANGES and any(entry[3]["t"] != "run" for entry in batch):
            self.violation(f"a metad with an older database committed change {batch[-1][0]}: {batch[-1][2]}")
        if self.early is not None:
            self.early.committed(batch)
        for node in sorted(self.powerless):
            if any(cause == f"register {node}" for _, _, cause, _ in batch):
                self._power_lost()
                self.powerless.discard(node)
        for _, _, _, change in batch:
            if change["t"] == "replicas" and change["node"] not in database.committed.images[change["uuid"]].locations:
                self.epochs.pop((change["node"], change["uuid"]), None)  # an administrator took the image away there
            if change["t"] == "image" and change.get("writer"):
                self._check_fenced(change["uuid"])
                for node, frontend in self._frontends.items():
                    if node != change["writer"]:
                        self.on_posts_lost(frontend.not_sent())

    def _check_fenced(self, uuid: str) -> None:
        """A new writer: of each written block a fenced copy; of the active ones all in-sync copies are (R3)."""
        image = self.database.committed.images[uuid]
        kept = {n: self._epoch_on_disk(n, image.name) for n in image.locations}
        fenced = {n for n, epoch in kept.items() if epoch >= image.epoch or self.altered(n)}
        for block in range(image.block_count):
            replicas = image.replicas(block)
            good = {n for n, r in replicas.items() if r.status == IN_SYNC}
            if written(replicas) and not good & fenced:
                self.violation(f"writer of epoch {image.epoch} without a fenced copy of block {block}: {kept}")
            if block in image.active and good - fenced:
                self.violation(f"block {block} is active and in-sync at {sorted(good - fenced)}, which is not fenced")

    def saved_seq(self, node: str) -> int:
        """The highest metadata sequence that a node will still know after a power cut."""
        data = stored(self.disks[node], "/data/.ukai/store.json")
        return int(json.loads(data)["highest_seq"]) if data else -1

    def _epoch_on_disk(self, node: str, name: str) -> int:
        data = stored(self.disks[node], f"/data/{name}/.ukai.json")
        return int(json.loads(data)["epoch"]) if data else -1

    def check_epoch(self, node: str, header: Header, reply: Callable[[Header, Any], None], payload: Any) -> None:
        """Hand a message of a coordinator to a replica: no epoch below one that it has taken is taken (R1)."""

        def looked_at(fields: Header, data: Any) -> None:
            epoch = header.get("e")
            if (
                "err" not in fields
                and isinstance(epoch, int)
                and header["op"] in ("w", "wt", "ws", "z", "g", "k", "fence")
            ):
                key = (node, header["i"])
                if epoch < self.epochs.get(key, 0):
                    self.violation(f"{node} took {header['op']} of epoch {epoch} after epoch {self.epochs[key]}")
                self.epochs[key] = max(epoch, self.epochs.get(key, 0))
            reply(fields, data)

        self.blockds[node].core.from_peer(header, payload, looked_at)

    def check_kept_epochs(self, node: str, store: Store) -> None:
        """An epoch is on the disk before anything is done in it (R1)."""
        for uuid, image in store.images.items():
            if image.epoch < self.epochs.get((node, uuid), 0) and node not in self.tampered:
                self.violation(f"{node} has forgotten epoch {self.epochs[(node, uuid)]}, it knows {image.epoch}")


OUTSIDE = Process("outside")


def _broken(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(Unreachable("blockd has died"))


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


class Sent:
    """A write that blockd has not answered in time."""

    def __init__(self, shortcut: Shortcut, offset: int, length: int) -> None:
        self.answered = False
        self._shortcut, self._key = shortcut, shortcut.write_begins(offset, length)

    def drop(self) -> None:
        self._shortcut.write_ends(self._key)


class FrontendProcess:
    """What the handles of one node share: loans, overdue writes, and who tells blockd what is open."""

    def __init__(self, world: World, node: str) -> None:
        self.world, self.node = world, node
        self.name = f"frontend{next(world.numbers)}"
        self.inc = ""
        """The blockd process that runs, as far as it knows."""
        self.overdue: Overdue[Sent] = Overdue(CONFIG.io_timeout)
        self.open: dict[int, Frontend] = {}
        self._shortcuts: dict[str, Shortcut] = {}
        self._closing: set[int] = set()
        self._unanswered = 0
        self._watching = self._lost = False
        self.sending_again: dict[str, asyncio.Lock] = {}
        """By image: held by whoever sees to what was posted."""
        self.post_answered = asyncio.Event()
        self._seen_to: set[str] = set()
        self.lost_with: set[Post] = set()
        """What was posted to a blockd that has died since."""

    def shortcut(self, image: str) -> Shortcut:
        return self._shortcuts.setdefault(image, Shortcut())

    async def watch(self) -> None:
        """Say each beat what is open and what is not any more, while there is anything to say."""
        if self._watching:
            return
        self._watching = True
        while self.open or self._closing:
            self.look_around()
            for image, shortcut in self._shortcuts.items():
                if shortcut.posted.to_send() is not None and image not in self._seen_to:
                    self._seen_to.add(image)
                    asyncio.get_running_loop().create_task(self._see_to(image))
            await asyncio.sleep(CONFIG.beat_interval)
            if self._lost:
                return
            numbers = [f.number for f in self.open.values() if f.at == self.inc]
            try:
                beat = {"op": "beat", "frontend": self.name, "inc": self.inc, "handles": numbers}
                reply, _ = await self.exchange(beat, None, 1.0)
                self._unanswered = 0
                self.arrived(reply["inc"])
                for number in list(self._closing):
                    await self.exchange({"op": "close", "h": number, "inc": self.inc}, None, 1.0)
                    self._closing.discard(number)
            except UkaiError:
                self._unanswered += 1
        self._watching = False

    async def _see_to(self, image: str) -> None:
        """What failed is sent again though nobody asks for it."""
        try:
            await self.settle(image, asyncio.get_running_loop().time() + CONFIG.io_timeout)
        except UkaiError as e:
            self.world.note(f"posted writes are not done yet: {e.message}")
        finally:
            self._seen_to.discard(image)

    async def await_own(self, frontend: Frontend, number: int, post: Post) -> None:
        """Have one done whose caller waits.  Raises UkaiError."""
        shortcut, deadline = frontend.shortcut, asyncio.get_running_loop().time() + CONFIG.io_timeout
        try:
            lock = await self._locked(frontend.image, deadline)
        except Timeout:
            post.withdrawn = True
            raise
        try:
            while number in shortcut.posted.posts:
                if post.failed:
                    await self._send_again(shortcut, number, post, deadline)
                else:
                    await self._await_post(deadline)
            if frontend.stale:
                raise StaleHandle(frontend.stale)
        except UkaiError:
            post.withdrawn = True
            if post.failed:
                self.post_done(shortcut, number)
            raise
        finally:
            lock.release()

    async def _locked(self, image: str, deadline: float) -> asyncio.Lock:
        lock = self.sending_again.setdefault(image, asyncio.Lock())
        try:
            async with asyncio.timeout_at(deadline):
                await lock.acquire()
        except TimeoutError:
            raise Timeout("earlier writes have not been answered") from None
        return lock

    async def _await_post(self, deadline: float) -> None:
        self.post_answered.clear()
        try:
            async with asyncio.timeout_at(deadline):
                await self.post_answered.wait()
        except TimeoutError:
            raise Timeout("a posted write has not been answered") from None

    async def settle(self, image: str, deadline: float) -> None:
        """Have all posted writes done.  Raises UkaiError."""
        shortcut = self.shortcut(image)
        lock = await self._locked(image, deadline)
        try:
            while shortcut.posted.posts:
                if shortcut.posted.unanswered():
                    await self._await_post(deadline)
                elif (again := shortcut.posted.to_send()) is not None:
                    await self._send_again(shortcut, *again, deadline)
        finally:
            lock.release()

    async def _send_again(self, shortcut: Shortcut, number: int, post: Post, deadline: float) -> None:
        frontend: Frontend = post.handle
        if post.withdrawn:
            self.post_done(shortcut, number)
            return
        if frontend.number not in self.open:
            self.give_up(shortcut, number)
            return
        header = {"op": "w", "o": post.offset, "s": False, "p": True}
        self.world.count("posted writes sent again")
        try:
            await frontend._request(header, post.data, True, deadline)
        except StaleHandle:
            self.give_up(shortcut, number)
        else:
            self.post_done(shortcut, number)

    def post_done(self, shortcut: Shortcut, number: int) -> None:
        if (post := shortcut.posted.done(number)) is not None:
            shortcut.write_ends(post.key)

    def give_up(self, shortcut: Shortcut, number: int) -> None:
        post = shortcut.posted.posts[number]
        if post.told:
            self.world.on_posts_lost([post])
        self.post_done(shortcut, number)

    def posts(self) -> list[Post]:
        return [post for s in self._shortcuts.values() for post in s.posted.posts.values()]

    def not_sent(self) -> list[Post]:
        """Posted writes that no blockd has."""
        return [post for post in self.posts() if post.failed or post in self.lost_with]

    async def close_posts(self, frontend: Frontend) -> None:
        """Before its handle is closed."""
        shortcut = frontend.shortcut
        if not shortcut.posted.posts:
            return
        try:
            await self.settle(frontend.image, asyncio.get_running_loop().time() + CONFIG.io_timeout)
        except UkaiError as e:
            self.world.note(f"posted writes are not done at the close: {e.message}")
            for number, post in list(shortcut.posted.posts.items()):
                if post.handle is frontend and post.failed:
                    self.give_up(shortcut, number)

    def post(self, frontend: Frontend, number: int, header: Header, post: Post) -> bool:
        """Put a write into blockd's socket; whether it is there."""
        loop = asyncio.get_running_loop()
        server = self.world.blockds.get(self.node)
        if server is None or not server.alive or server.core.inc != header["inc"]:
            post.failed = True
            return False
        shortcut, block = frontend.shortcut, post.offset // frontend.block_size
        future: asyncio.Future[Header] = loop.create_future()

        def reply(fields: Header, _data: Any) -> None:
            loop.call_later(0.00005, _resolve, future, dict(fields), context=NOBODY)

        def answered(ended: asyncio.Future[Header]) -> None:
            server.asked.pop(ended, None)
            if ended.exception() is not None or "err" in ended.result():
                shortcut.posted.failed(number)
                if post.withdrawn:
                    self.post_done(shortcut, number)
            else:
                shortcut.told(block, ended.result().get("post") is True)
                self.post_done(shortcut, number)
            self.post_answered.set()

        server.asked[future] = None
        future.add_done_callback(answered, context=NOBODY)
        asked = unpackb(messages.pack(header))
        server.posted(functools.partial(server.core.frontends.answer, asked, post.data, reply))
        return True

    def end(self) -> None:
        self._lost = True
        self.open.clear()
        self._closing.clear()

    def arrived(self, inc: str) -> None:
        """What was sent to another blockd process than this is lost with it."""
        if inc != self.inc:
            self.inc = inc
            self._closing.clear()
            for sent in self.overdue.clear():
                sent.drop()

    def look_around(self) -> None:
        now, silent = asyncio.get_running_loop().time(), self._unanswered >= SILENT_QUESTIONS
        for sent in self.overdue.let_go(now, silent, lambda sent: sent.answered):
            sent.drop()

    async def close(self, number: int) -> None:
        self.open.pop(number, None)
        self._closing.add(number)
        try:
            await self.exchange({"op": "close", "h": number, "inc": self.inc}, None, CLOSE_WAIT_S)
        except UkaiError as e:
            self.world.note(f"close waits: {e.message}")
            return
        self._closing.discard(number)

    async def exchange(
        self, header: Header, payload: bytes | None, timeout_s: float, writes: str = ""
    ) -> tuple[Header, Any]:
        """Over ipc: nothing is lost but by the death of a process; ``writes``: the image that a write alters.

        Raises Unreachable when blockd is gone, Timeout; errors of the reply.
        """
        loop = asyncio.get_running_loop()
        server = self.world.blockds.get(self.node)
        if server is None or not server.alive:
            raise Unreachable("blockd is away")
        future: asyncio.Future[tuple[Header, Any]] = loop.create_future()
        late: list[Sent] = []

        def reply(fields: Header, data: Any) -> None:
            for sent in late:
                sent.answered = True
            copy = unpackb(messages.pack(dict(fields)))
            kept = None if data is None else bytes(data)
            loop.call_later(0.00005, _resolve, future, (copy, kept), context=NOBODY)

        asked = unpackb(messages.pack(dict(header)))

        server.arrives(functools.partial(server.core.frontends.answer, asked, payload, reply))
        server.asked[future] = None
        try:
            async with asyncio.timeout(timeout_s):
                fields, data = await future
        except TimeoutError:
            if writes and header["inc"] == self.inc:
                length = header.get("l", len(payload or b""))
                late.append(Sent(self.shortcut(writes), header["o"], length))
                self.overdue.hold(writes, late[0], loop.time())
            raise Timeout("no answer from blockd") from None
        finally:
            server.asked.pop(future, None)
        messages.raise_error(fields)
        return fields, data


class Frontend:
    """The frontend's decisions about one handle on one node."""

    def __init__(self, world: World, node: str, image: str = "disk") -> None:
        self.world, self.node, self.image = world, node, image
        self.process = world.frontend(node)
        self.number = next(world.numbers)
        self.epoch = -1
        self.block_size = 1
        self.at = ""
        self.stale = ""
        self.shortcut = self.process.shortcut(image)
        self.habit = Habit()
        self.process.open[self.number] = self

    async def keep(self) -> None:
        """Have its process say each beat what is open."""
        await self.process.watch()

    async def request(self, header: Header, payload: bytes | None, op_changes: bool) -> Any:
        """One request, as often as it takes, within io_timeout.  Raises UkaiError for what the guest sees as EIO."""
        deadline = asyncio.get_running_loop().time() + CONFIG.io_timeout
        posted = self.shortcut.posted
        if header["op"] == "r":
            posts = posted.seen(header["o"], header["o"] + header["l"])
            data = await self._direct(header["o"], header["l"]) if self.world.direct and not posts else None
            if data is None:
                data = (await self._request(header, None, op_changes))[1]
            if not posts:
                return data
            self.world.count("reads of what is posted")
            whole = bytearray(data)
            cover(posts, header["o"], whole)
            return whole
        if header["op"] == "f":
            self.habit.fsync_begins()
            if posted.posts:
                self.world.count("flushes that wait for posted writes")
                await self.process.settle(self.image, deadline)
            if self.shortcut.flushed:
                self.world.count("flushes that ask nobody")
                return None
            return (await self._request(header, None, op_changes))[1]
        if self.habit.write_begins() and header["op"] == "w":
            header = {**header, "f": True}
            self.world.count("flushed on the way")
        elif header["op"] == "w" and not header["s"] and payload and await self._post(header, payload):
            return None
        length = header.get("l", len(payload or b""))
        if header["s"] or posted.touching(header["o"], header["o"] + length):
            await self.process.settle(self.image, deadline)
        key = self.shortcut.write_begins(header["o"], header.get("l", len(payload or b"")))
        clean = False
        try:
            reply, data = await self._request(header, payload, op_changes)
            clean = bool(reply.get("clean"))
            block = header["o"] // self.block_size
            if self.shortcut.told(block, reply.get("post") is True) and self.world.direct:
                await self._borrow(block)
            return data
        finally:
            self.shortcut.write_ends(key, clean)

    async def _post(self, header: Header, payload: bytes) -> bool:
        """Send a write that nobody waits for; any time may pass before it is sent, and before the second look."""
        loop = asyncio.get_running_loop()
        block, within_block = divmod(header["o"], self.block_size)
        loan, length = self.shortcut.loans.get(block), len(payload)
        lock = self.process.sending_again.setdefault(self.image, asyncio.Lock())
        if loan is None or not self.at or self.stale or within_block + length > self.block_size or lock.locked():
            return False
        if self.image in self.process.overdue.by_image:
            return False
        if not self.shortcut.may_post(loan, block, header["o"], length, loop.time()):
            return False
        key, number = self.shortcut.write_begins(header["o"], length), next(self.world.numbers)
        post = Post(key, self, header["o"], payload)
        self.shortcut.posted.begins(number, post)
        fields = {**header, "h": self.number, "inc": self.at, "p": True}
        await asyncio.sleep(self._pause_s())
        sent = self.process.post(self, number, fields, post)
        await asyncio.sleep(self._pause_s())
        if not sent or not self.shortcut.stands(loan, block, loop.time()):
            self.world.count("posted writes that wait after all")
            await self.process.await_own(self, number, post)
        post.told = True
        self.world.count("posted")
        return True

    async def _direct(self, offset: int, length: int) -> bytes | None:
        """Read a lent block file; any time may pass between the looks at the page."""
        loop = asyncio.get_running_loop()
        block, within_block = divmod(offset, self.block_size)
        if within_block + length > self.block_size:
            return None
        loan = self.shortcut.loan(block, offset, length, loop.time())
        if loan is None:
            return None
        await asyncio.sleep(self._pause_s())
        data = bytes(length) if loan.file is None else bytes(loan.file.cache[within_block : within_block + length])
        await asyncio.sleep(self._pause_s())
        if len(data) != length or not self.shortcut.good(loan, block, offset, length, loop.time()):
            return None
        self.world.count("direct reads")
        return data

    def _pause_s(self) -> float:
        chance = self.world.chance
        return chance.uniform(0, 0.0002) if chance.random() < 0.98 else chance.uniform(0, 0.8)

    async def _borrow(self, block: int) -> None:
        loop = asyncio.get_running_loop()
        server = self.world.blockds[self.node]
        future: asyncio.Future[Loan | None] = loop.create_future()
        header = {"inc": self.at, "h": self.number, "b": block}

        def serve() -> None:
            loan = None
            try:
                lent = server.core.frontends.lend(header)
                file = None
                if lent.descriptor >= 0:
                    file = server.disk.inode(lent.descriptor)
                    server.disk.close(lent.descriptor)
                loan = Loan(lent.page, lent.number, file)
            except UkaiError as e:
                self.world.note(f"no loan of block {block}: {e.message}")
            loop.call_later(self.world.chance.uniform(0, 0.001), _resolve, future, loan, context=NOBODY)

        loop.call_soon(serve, context=server.process.context)
        done, _ = await asyncio.wait({future}, timeout=0.1)
        if done and (loan := future.result()) is not None:
            self.shortcut.take(block, loan)

    async def _request(
        self, header: Header, payload: bytes | None, op_changes: bool, deadline: float = 0.0
    ) -> tuple[Header, Any]:
        loop = asyncio.get_running_loop()
        deadline = deadline or loop.time() + CONFIG.io_timeout
        writes = self.image if header["op"] in ("w", "z") else ""
        for attempt in itertools.count():
            if self.stale and op_changes:
                raise StaleHandle(self.stale)
            try:
                if not self.at:
                    await self._open(deadline)
                if writes:
                    await self._await_overdue(deadline)
                fields = {**header, "h": self.number, "inc": self.at}
                reply, data = await self.process.exchange(fields, payload, deadline - loop.time(), writes)
                if reply.get("lend") and self.world.direct:
                    await self._borrow(header["o"] // self.block_size)
                return reply, data
            except Timeout:
                raise
            except UkaiError as e:
                verdict = after_error(e)
                if isinstance(e, Unreachable):
                    self.at = ""
                elif verdict is Verdict.STALE:
                    self.stale = e.message
                    raise
                elif verdict is Verdict.FAIL:
                    raise
                elif verdict is Verdict.REOPEN:
                    self.at = ""
                if loop.time() >= deadline:
                    raise Timeout(e.message) from None
                await asyncio.sleep(pause_s(attempt))
        raise AssertionError

    async def _await_overdue(self, deadline: float) -> None:
        while self.image in self.process.overdue.by_image:
            self.world.count("writes held back")
            self.process.look_around()
            if asyncio.get_running_loop().time() >= deadline:
                raise Timeout("an earlier write has not been answered yet")
            await asyncio.sleep(0.05)

    async def _open(self, deadline: float) -> None:
        left = deadline - asyncio.get_running_loop().time()
        hello, _ = await self.process.exchange({"op": "hello", "frontend": self.process.name}, None, left)
        self.process.arrived(hello["inc"])
        header = {"op": "open", "frontend": self.process.name, "h": self.number, "image": self.image}
        fields = {**header, "epoch": self.epoch, "inc": hello["inc"]}
        reply, _ = await self.process.exchange(fields, None, left)
        self.epoch, self.block_size = reply["epoch"], reply["block_size"]
        self.at = hello["inc"]

    async def close(self) -> None:
        """As the kernel does when the guest is gone: what it was not answered in time may be under way still."""
        await self.process.close_posts(self)
        await self.process.close(self.number)
