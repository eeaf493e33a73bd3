"""metad's sockets, clock and group commit around the decisions.

Requests that arrive together are answered together: they change the state in memory one after the other, one
transaction stores what they changed, then the replies go out and the changes are published.  A reply, be it of a
read, never tells of something that is not stored.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zmq

from ukai import faults, messages
from ukai.config import Config
from ukai.daemon import supervise
from ukai.errors import (
    DiskError,
    NoSpace,
    NotFound,
    NotReady,
    RemoteProtocolError,
    Timeout,
    UkaiError,
    Unreachable,
    UsageError,
    VersionError,
)
from ukai.messages import Header
from ukai.metad import adoption, history, jobs, ops, reports
from ukai.metad.core import Core, Entry
from ukai.metad.store import Store
from ukai.model import STATUS_NAMES
from ukai.telemetry import Telemetry
from ukai.wire import Frames, bound

log = logging.getLogger(__name__)

TOPIC = b"meta."
TASK_LIMIT = 5000
"""Requests that wait for nodes at a time; more are asked to come again."""
DRAIN_S = 5.0
"""How long requests under way may take to end at a stop."""
CONTROL_FACTOR = 8
"""Largest message, in terms of message_limit: a registration names every range of blocks that a node holds."""
LINGER_MS = 500
PUBLISH_QUEUE_MESSAGES = 20_000


class Asked(NamedTuple):
    """A request whose answer is due."""

    envelope: Frames
    id: int | None
    op: str
    image: str
    since: int | None
    detail: bool | None
    at: float


class Server:
    """The process; also the ``Ports`` of the decisions."""

    def __init__(self, config: Config, node: str, context: zmq.Context[Any], telemetry: Telemetry) -> None:
        self._config, self._node, self._context = config, node, context
        self._metrics = telemetry.metrics
        self._store = Store(config.metadata_root, config.change_keep)
        self._loop = asyncio.get_running_loop()
        self._queue: list[Entry] = []
        self._outbox: list[tuple[Asked, Header]] = []
        self._durable: asyncio.Future[None] | None = None
        self._flush: asyncio.Handle | None = None
        self._spoiled = False
        self._stopped_by = ""
        """Why nothing can be stored; empty: all is well."""
        self._retry_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._beat: asyncio.Task[None] | None = None
        self._peers: dict[str, Frames] = {}
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Header]] = {}
        self._closing = False

    # --- life

    async def start(self) -> None:
        """Raises DiskError, Refused or zmq.ZMQError before anything is answered."""
        cluster = self._store.open(self.new_uuid)
        try:
            self.core = Core(cluster, self, self._config, self._node, self.new_uuid())
            self._history = history.History(cluster.seq)
            self._history.snapshot(cluster, True)  # packed now, so that no subscriber waits for it
            self._publisher = self._context.socket(zmq.PUB)
            self._publisher.linger = 0
            self._publisher.set(zmq.SNDHWM, PUBLISH_QUEUE_MESSAGES)
            self._publisher.bind(f"tcp://{self._node}:{self._config.publish_port}")
            self._port = bound(
                self._context,
                f"tcp://{self._node}:{self._config.control_port}",
                CONTROL_FACTOR * self._config.message_limit,
                self._received,
            )
        except BaseException:
            self._store.close()
            raise
        self._port.on_idle = self.flush
        self.core.begin_run()
        self._metrics.gauges.append(self._gauges)
        self._beat = supervise("beat", self._beats())
        log.info("cluster %s, change %d, %d images", cluster.cluster_id, cluster.seq, len(cluster.images))

    async def stop(self) -> bool:
        """Let what is under way end, then close."""
        self._closing = True
        if self._beat is not None:
            self._beat.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=DRAIN_S)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.flush()
        self._port.close(LINGER_MS)
        self._publisher.close(0)
        self._store.close()
        return True

    async def _beats(self) -> None:
        while True:
            fields = {"op": "beat", "cluster_id": self.core.cluster.cluster_id, "inc": self.core.inc}
            self._retry_at = 0.0
            self.flush()
            if not self._spoiled:
                self._publish([messages.pack({**fields, "seq": self.core.cluster.seq})])
                jobs.tick(self.core)
            await asyncio.sleep(self._config.beat_interval)

    # --- Ports

    def now(self) -> float:
        return self._loop.time()

    def wall(self) -> float:
        return time.time()

    def new_uuid(self) -> str:
        return str(uuid.uuid4())

    def changed(self, entries: list[Entry]) -> None:
        self._queue += entries
        self._flush_soon()

    async def durable(self) -> None:
        if self._spoiled:
            raise NotReady(self._problem())
        if self._queue:
            if self._durable is None:
                self._durable = self._loop.create_future()
            await asyncio.shield(self._durable)

    def drop_state(self) -> None:
        self._spoiled = True
        self._flush_soon()

    async def read_hand_made(self, name: str) -> adoption.HandMade:
        return await asyncio.to_thread(_read_hand_made, Path(self._config.metadata_root), name)

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._spawned)

    def _spawned(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: %s", task.get_name(), error, exc_info=error)

    async def call(self, node: str, op: str, fields: Header, timeout_s: float) -> Header:
        envelope = self._peers.get(node)
        if envelope is None:
            raise Unreachable("it has not registered")
        number = next(self._numbers)
        if not self._port.send([*envelope, messages.pack({**fields, "op": op, "id": number})]):
            raise Unreachable("the connection to it is gone")
        future: asyncio.Future[Header] = self._loop.create_future()
        self._waiting[number] = future
        try:
            async with asyncio.timeout(timeout_s):
                reply = await future
        except TimeoutError:
            raise Timeout(f"no answer to {op} within {timeout_s:.3g} s") from None
        finally:
            self._waiting.pop(number, None)
        messages.raise_error(reply)
        return reply

    # --- requests

    def _received(self, frames: Frames) -> None:
        try:
            cut = frames.index(b"") + 1
        except ValueError:
            self._metrics.count("ukai_protocol_errors_total")
            return
        envelope = frames[:cut]
        number: int | None = None
        try:
            if len(frames) == cut:
                raise RemoteProtocolError("a message without a header")
            header = messages.unpack(frames[cut], CONTROL_FACTOR * self._config.message_limit)
            if (answered := header.get("re")) is not None:
                self._answered(answered, header)
                return
            found = header.get("id")
            number = found if type(found) is int else None
            op = messages.text(header, "op", 60)
            since = messages.integer(header, "since", low=-1) if "since" in header else None
        except UkaiError as e:
            self._metrics.count("ukai_protocol_errors_total")
            self._refuse(envelope, number, e)
            return
        except Exception as e:
            # whatever a peer sends, the loop goes on
            self._metrics.count("ukai_protocol_errors_total")
            log.info("message of %d bytes could not be read: %r", sum(map(len, frames)), e)
            return
        detail = header.get("detail") is not False if op == "snapshot" else None
        asked = Asked(envelope, number, op, self._label(header), since, detail, self._loop.time())
        self._run(asked, header)

    def _refuse(self, envelope: Frames, number: int | None, error: UkaiError) -> None:
        """Answer with an error, where there is a request to answer; another release is told so in any case."""
        if number is not None or isinstance(error, VersionError):
            self._port.send([*envelope, messages.pack({**messages.error_reply(error), "re": number or 0})])

    def _label(self, header: Header) -> str:
        """The image of a request, for the metrics: only names that exist, so that their number is bounded."""
        cluster = self.core.cluster
        wanted = header.get("image")
        image = cluster.images.get(wanted) if type(wanted) is str else None
        if image is not None:
            return image.name
        name = header.get("name")
        return name if type(name) is str and name in cluster.names else ""

    def _run(self, asked: Asked, header: Header) -> None:
        if self._closing or len(self._tasks) >= TASK_LIMIT:
            self._done(asked, messages.error_reply(NotReady("metad is stopping or has too much to do; ask again")))
            return
        if self._spoiled:
            self.flush()
        if self._spoiled:
            self._refuse(asked.envelope, asked.id, NotReady(self._problem()))
            return
        try:
            if asked.since is not None and asked.op != "register":  # that one says what is the matter by itself
                self.core.check_seen(asked.since, messages.text(header, "maker", 64, default=""))
            reply = ops.begin(self.core, asked.op, header)
        except Exception as e:
            self._failed(asked, e)
            return
        if isinstance(reply, dict):
            self._remember_peer(asked, header)
            self._done(asked, reply)
            return
        task = self._loop.create_task(self._finish(asked, header, reply), name=asked.op)
        self._tasks.add(task)
        task.add_done_callback(self._spawned)

    async def _finish(self, asked: Asked, header: Header, work: Coroutine[Any, Any, Header]) -> None:
        self._remember_peer(asked, header)
        try:
            reply = await work
        except Exception as e:
            self._failed(asked, e)
        else:
            self._done(asked, reply)

    def _remember_peer(self, asked: Asked, header: Header) -> None:
        """The connection over which the node is called back: the one of its last request."""
        node = header.get("node")
        session = self.core.sessions.get(node) if type(node) is str else None
        if session is not None and session.inc == header.get("inc"):
            self._peers[session.node] = asked.envelope

    def _failed(self, asked: Asked, error: Exception) -> None:
        if isinstance(error, RemoteProtocolError):
            self._metrics.count("ukai_protocol_errors_total")
        elif not isinstance(error, UkaiError):
            log.error("%s: %r", asked.op, error, exc_info=error)
        self._done(asked, messages.error_reply(error))

    def _answered(self, number: object, reply: Header) -> None:
        future = self._waiting.get(number) if type(number) is int else None
        if future is None:
            return  # too late
        if not future.done():
            future.set_result(reply)

    def _done(self, asked: Asked, reply: Header) -> None:
        self._outbox.append((asked, reply))
        self._flush_soon()

    # --- group commit

    def _flush_soon(self) -> None:
        if self._flush is None:
            self._flush = self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Commit what is queued, then answer and publish."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None
        batch, self._queue = self._queue, []
        outbox, self._outbox = self._outbox, []
        waiting, self._durable = self._durable, None
        failure: UkaiError | None = None
        if self._spoiled:
            failure = NotReady(self._problem())
            self._recover()
        elif batch:
            failure = self._commit(batch)
        if failure is not None and waiting is not None and not waiting.done():
            waiting.set_exception(failure)
            waiting.exception()  # seen, even if nobody waits any more
        elif waiting is not None and not waiting.done():
            waiting.set_result(None)
        for asked, reply in outbox:
            self._answer(asked, reply if failure is None else messages.error_reply(failure), failure is not None)

    def _commit(self, batch: list[Entry]) -> UkaiError | None:
        try:
            faults.point("metad.store")
            self._store.commit(batch, self.core.cluster)
            faults.point("metad.stored")
        except Exception as e:
            log.error("%s", e, exc_info=None if isinstance(e, UkaiError) else e)
            self._stopped_by = e.message if isinstance(e, UkaiError) else repr(e)
            self._spoiled = True
            failure = NotReady(self._problem())
            self._recover()
            return failure
        if any(change["t"] == "image-drop" for _, _, _, change in batch):
            for name in {image for _, image in self._metrics.ops} - self.core.cluster.names.keys() - {""}:
                self._metrics.forget(name)
        packed = self._history.extend(batch)
        fields = {"op": "changes", "cluster_id": self.core.cluster.cluster_id, "inc": self.core.inc}
        for part in history.chunks(packed):
            self._publish([history.raw_map(fields, {"changes": history.raw_array(part)})])
        return None

    def _problem(self) -> str:
        return f"metad can't store changes: {self._stopped_by or 'the state is loaded anew'}; ask again"

    def _recover(self) -> None:
        """Load what the database says; where that is not possible, it is tried again with each beat."""
        if self.now() < self._retry_at:
            return
        try:
            cluster = self._store.reopen()
        except (DiskError, NoSpace) as e:
            if e.message != self._stopped_by:
                log.error("%s", e)
            self._stopped_by = e.message
            self._retry_at = self.now() + self._config.beat_interval
            return
        self._queue.clear()
        self._spoiled = False
        self._stopped_by = ""
        self.core.replace(cluster)
        self._history.reset(cluster.seq)
        log.info("metadata loaded anew, change %d", cluster.seq)

    def _answer(self, asked: Asked, reply: Header, failed: bool) -> None:
        failed = failed or "err" in reply
        self._metrics.op(asked.op if asked.op in ops.OPS else "unknown", asked.image).done(
            self._loop.time() - asked.at, failed=failed
        )
        if asked.id is None:
            return
        fields = {**reply, "re": asked.id}
        if failed or (asked.since is None and asked.detail is None):
            self._send(asked, messages.pack(fields))
            return
        cluster = self.core.cluster
        fields |= {"seq": cluster.seq, "inc": self.core.inc, "cluster_id": cluster.cluster_id}
        changes = self._history.since(asked.since) if asked.since is not None and asked.detail is None else None
        if changes is not None:
            raw = {"changes": history.raw_array(changes)}
        else:
            raw = {"snapshot": self._history.snapshot(cluster, asked.detail is not False)}
        self._send(asked, history.raw_map(fields, raw))

    def _send(self, asked: Asked, header: bytes) -> None:
        if not self._port.send([*asked.envelope, header]):
            log.debug("the asker of %s is gone", asked.op)

    def _publish(self, frames: list[bytes]) -> None:
        try:
            self._publisher.send_multipart([TOPIC, *frames], zmq.DONTWAIT)
        except zmq.Again:
            pass  # a hint; the next beat tells of the gap

    # --- metrics

    def _gauges(self) -> Iterator[tuple[str, dict[str, str], float]]:
        core = self.core
        yield "ukai_metadata_seq", {}, core.cluster.seq
        yield "ukai_peers_up", {}, sum(core.up(n) for n in core.sessions)
        yield "ukai_inflight_requests", {}, len(self._tasks)
        for image in core.cluster.images.values():
            for node in image.locations:
                for status, found in enumerate(reports.counts(core, image, node)):
                    yield (
                        "ukai_replicas",
                        {"image": image.name, "node": node, "status": STATUS_NAMES[status]},
                        found,
                    )


def _read_hand_made(root: Path, name: str) -> adoption.HandMade:
    """In a thread: the file may be large."""
    path = root / name
    try:
        with path.open("rb") as file:
            data = file.read(adoption.FILE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(
            f"image {name} is not known and {path} does not exist; put the output of create_metadata there"
        ) from None
    except OSError as e:
        raise UsageError(f"{path} can't be read: {e.strerror}") from e
    return adoption.read(data, name)
