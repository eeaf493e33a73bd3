"""The block server's sockets: frontends over ipc, peers over tcp, metad."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import queue
import secrets
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import zmq

from ukai import messages
from ukai.blockd.aio import Aio, Synced
from ukai.blockd.core import Core, Ports
from ukai.blockd.disk import Disk
from ukai.blockd.frontends import Reply
from ukai.blockd.lender import Lender
from ukai.blockd.peer import Payload
from ukai.blockd.store import Store
from ukai.config import Config
from ukai.daemon import supervise
from ukai.errors import RemoteProtocolError, UkaiError, VersionError
from ukai.messages import Header
from ukai.metalink import MetadLink
from ukai.mirror import Mirror
from ukai.model import STATUS_NAMES
from ukai.sockets import Dealer, Garbage, Router
from ukai.telemetry import Telemetry
from ukai.wire import Frames

log = logging.getLogger(__name__)

DISK_THREADS = 8
Work = Callable[[], None]
BOOT_ID = "/proc/sys/kernel/random/boot_id"


def _tell(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


class DiskThreads:
    """Threads that are handed work one by one, the last that ended first.

    With one queue for all, a piece of work wakes two of them, which then wait for each other at the interpreter: a
    tenth of a small fsync, as is what concurrent.futures does beside it.
    """

    def __init__(self, count: int) -> None:
        self._guard = threading.Lock()
        self._waiting: deque[Work | None] = deque()
        """While no thread is idle."""
        self._idle: list[queue.SimpleQueue[Work | None]] = []
        self._threads = [threading.Thread(target=self._run, name=f"disk {n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        handed: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        while (work := self._next(handed)) is not None:
            work()

    def _next(self, handed: queue.SimpleQueue[Work | None]) -> Work | None:
        with self._guard:
            if self._waiting:
                return self._waiting.popleft()
            self._idle.append(handed)
        return handed.get()

    def submit(self, work: Work | None) -> None:
        """``work`` raises nothing; None ends a thread."""
        with self._guard:
            if not self._idle:
                self._waiting.append(work)
                return
            handed = self._idle.pop()
        handed.put(work)

    def close(self) -> None:
        """What was submitted is done first."""
        for _ in self._threads:
            self.submit(None)
        for thread in self._threads:
            thread.join()


class PeerTransport:
    """A DEALER to the blockd of another node."""

    def __init__(
        self,
        endpoint: str,
        limit_bytes: int,
        received: Callable[[Header, Payload | None], None],
        lost: Callable[[], None],
        garbage: Garbage,
    ) -> None:
        self._received, self._garbage = received, garbage
        self._dealer = Dealer(endpoint, limit_bytes, self._frames, garbage, lost)

    def _frames(self, frames: Frames) -> None:
        try:
            header = messages.unpack(frames[0])
        except RemoteProtocolError as e:
            self._garbage(e)
            return
        self._received(header, frames[1] if len(frames) > 1 else None)

    def send(self, header: Header, payload: Payload | None) -> bool:
        packed = messages.pack(header)
        return self._dealer.send([packed] if payload is None else [packed, payload])

    def close(self) -> None:
        self._dealer.close()


class BlockServer:
    """See ``daemon.Server``."""

    def __init__(
        self,
        config: Config,
        node: str,
        context: zmq.Context[Any],
        telemetry: Telemetry,
        *,
        disk: Disk | None = None,
        boot_id_file: str = BOOT_ID,
    ) -> None:
        self._config, self._node, self._telemetry = config, node, telemetry
        self._pool = DiskThreads(DISK_THREADS)
        self._aio: Aio | None = None
        self.store = Store(config.data_root, config.blockname_format, disk or Disk(), config.open_files_limit)
        self.store.open(str(uuid.uuid4()))
        for line in self.store.strange:
            log.warning("%s", line)
        self._lender = Lender(config.run_dir, config.loans_socket, self._garbage)
        try:
            self._lender.begin()
        except OSError as e:
            raise UkaiError(f"run_dir {config.run_dir} can't be used: {e.strerror}") from e
        self.mirror = Mirror(self.store.highest_seq, self.store.cluster_id, self.store.maker)
        self._link = MetadLink(
            context, config, detail=True, mirror=self.mirror, on_request=self._from_metad, on_garbage=self._garbage
        )
        with open(boot_id_file, encoding="ascii") as f:
            boot_id = f.read().strip()
        ports = Ports(
            metad=self._link.call,
            connect=self._connect,
            run_disk=self._run_disk,
            sync=self._sync,
            wall=time.time,
            new_id=lambda: uuid.uuid4().hex[:16],
            new_token=lambda: secrets.randbits(48) << 12,
            new_page=self._lender.new_page,
            take_in=lambda: self._routers[0].take_in(),
            boot_id=boot_id,
        )
        self.core = Core(config, node, self.store, self.mirror, ports, telemetry.metrics)
        telemetry.metrics.gauges.append(self._gauges)
        self._routers: list[Router] = []
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        path = self._config.blockd_endpoint.removeprefix("ipc://")
        os.makedirs(self._config.run_dir, mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # the store's lock proves that nobody serves it
        limit = self._config.message_limit
        proxy = self._config.proxy_endpoint(self._node)
        for endpoint, handle in (
            (self._config.blockd_endpoint, self.core.frontends.answer),
            (proxy, self.core.from_peer),
        ):
            holder: list[Router] = []
            try:
                router = Router(endpoint, limit, functools.partial(self._receive, holder, handle), self._garbage)
            except OSError as e:
                raise UkaiError(f"cannot open {endpoint}: {e.strerror}; is another one running on this node?") from None
            holder.append(router)
            self._routers.append(router)
        if self._config.aio:
            try:
                self._aio = self.store.disk.aio()
            except OSError as e:
                log.info("fdatasync is done in threads: no AIO of the kernel's: %s", e.strerror)
        self._lender.start(self.core.frontends.lend)
        self._link.start()
        self._background = [
            supervise("registration", self.core.keep_registered()),
            supervise("housekeeping", self.core.keep_house()),
        ]

    async def stop(self) -> bool:
        for task in self._background[1:]:
            task.cancel()
        await self.core.stop()
        for task in self._background:
            task.cancel()
        self._link.close()
        self._lender.close()
        for router in self._routers:
            router.close()
        if self._aio is not None:
            self._aio.close()
        self._pool.close()
        self.store.close()
        return True

    def _connect(
        self, node: str, received: Callable[[Header, Payload | None], None], lost: Callable[[], None]
    ) -> PeerTransport:
        endpoint = self._config.proxy_endpoint(node)
        return PeerTransport(endpoint, self._config.message_limit, received, lost, self._garbage)

    def _run_disk(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """What is on its way to a thread runs to its end, whoever waits, and closes the descriptors it was lent.

        The loop hears of it by one call: the future of an executor, made one of the loop's and shielded, needs three.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        def work() -> None:
            result, error = None, None
            try:
                result = function(*args)
            except Exception as e:
                error = e
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_tell, done, result, error)

        self._pool.submit(work)
        return done

    def _sync(self, fds: Sequence[int], done: Synced) -> bool:
        return self._aio is not None and self._aio.fdatasync(fds, done)

    def _garbage(self, error: RemoteProtocolError) -> None:
        self._telemetry.metrics.count("ukai_protocol_errors_total")
        log.info("dropped: %s", error.message)

    def _receive(
        self, holder: list[Router], handle: Callable[[Header, Payload | None, Reply], None], frames: Frames
    ) -> None:
        """One message of a ROUTER: [identity, header, payload]."""
        try:
            if not 2 <= len(frames) <= 3:
                raise RemoteProtocolError(f"a message of {len(frames)} frames")
            try:
                header = messages.unpack(frames[1])
            except VersionError as e:
                self._garbage(e)
                holder[0].send([frames[0], messages.pack({"re": 0, **messages.error_reply(e)})])
                return
            number = header.get("id")
            if type(number) is not int:
                raise RemoteProtocolError("a request without an id")
        except RemoteProtocolError as e:
            self._garbage(e)
            return
        identity = frames[0]

        def reply(fields: Header, payload: Payload | None) -> None:
            if fields.get("err") == "protocol-remote":
                self._telemetry.metrics.count("ukai_protocol_errors_total")
            fields["re"] = number
            packed = messages.pack(fields)
            holder[0].send([identity, packed] if payload is None else [identity, packed, payload])

        handle(header, frames[2] if len(frames) == 3 else None, reply)

    def _from_metad(self, header: Header, _rest: Frames) -> None:
        async def answer() -> None:
            number = header.get("id")
            try:
                fields = await self.core.orders.answer(header)
            except UkaiError as e:
                fields = messages.error_reply(e)
            except OSError as e:
                fields = messages.error_reply(UkaiError(f"node {self._node}: {e}"))
            self._link.requester.send({**fields, "re": number})

        self.core.spawn(answer())

    def _gauges(self) -> Iterator[tuple[str, dict[str, str], float]]:
        core = self.core
        yield "ukai_metadata_seq", {}, core.mirror.seq
        yield "ukai_peers_up", {}, sum(p.up for p in core.peers.values())
        yield "ukai_inflight_bytes", {}, sum(p.inflight_bytes for p in core.peers.values())
        flat = itertools.chain.from_iterable(c.inflight.values() for c in core.coordinators.values())
        yield "ukai_inflight_requests", {}, sum(map(len, flat))
        for c in core.coordinators.values():
            image = core.mirror.cluster.images.get(c.uuid)
            if image is None:
                continue
            yield "ukai_active_blocks", {"image": image.name}, len(c.activity.active)
            if image.replication == "flush":
                yield "ukai_replication_lag_bytes", {"image": image.name}, c.behind.lag_bytes
                yield "ukai_replication_lag_requests", {"image": image.name}, c.behind.lag_requests
            for node, where in image.locations.items():
                counts = dict.fromkeys(STATUS_NAMES, 0)
                for first, last, replica in where:
                    counts[replica.status] += last - first + 1
                for status, count in counts.items():
                    labels = {"image": image.name, "node": node, "status": STATUS_NAMES[status]}
                    yield "ukai_replicas", labels, count
