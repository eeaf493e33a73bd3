"""A repeated copy of the metadata, in step by sequence number.

Subscribe, ask for a snapshot, drop changes at or below its sequence, apply the rest; on a gap, a new metad
process or silence ask again.  Published changes are a hint: a reply to our own request carries all changes up
to what the reply relies on, so a decision never waits for a PUB message.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import zmq

from ukai import messages
from ukai.config import Config
from ukai.errors import Behind, RemoteProtocolError, UkaiError
from ukai.messages import Header
from ukai.model import Change, Cluster
from ukai.wire import Frames, Port, Requester

log = logging.getLogger(__name__)

TOPIC = b"meta."
SILENT_BEATS = 3


class Mirror:
    """The copy and the rules by which it moves on.  Pure.

    ``floor`` is the highest sequence this node ever saw: a metad below it is refused (R12).
    """

    def __init__(self, floor: int = 0, cluster_id: str = "") -> None:
        self.cluster = Cluster()
        self.inc = ""
        self.floor = floor
        self.cluster_id = cluster_id
        self.loaded = False
        self.on_change: list[Callable[[Change], None]] = []
        self.on_reset: list[Callable[[], None]] = []

    @property
    def seq(self) -> int:
        return self.cluster.seq if self.loaded else -1

    def take_reply(self, reply: Header) -> None:
        """Take the catch-up part of a reply, if it has one.  Raises Behind (R12) and RemoteProtocolError."""
        if (snapshot := reply.get("snapshot")) is not None:
            self._reset(snapshot, reply)
        elif (changes := reply.get("changes")) is not None:
            self._check(reply)
            self._take(changes)

    def take_published(self, message: Header) -> bool:
        """Take one message of the PUB socket; false: something is missing, ask metad to catch up."""
        if not self.loaded or message.get("cluster_id") != self.cluster.cluster_id:
            return False
        if message.get("inc") != self.inc:
            return False
        if message.get("op") == "beat":
            return bool(message.get("seq") == self.seq)
        changes = message.get("changes")
        return isinstance(changes, list) and self._take(changes)

    def _check(self, reply: Header) -> None:
        seq, cluster_id = reply.get("seq"), reply.get("cluster_id")
        if not isinstance(seq, int) or not isinstance(cluster_id, str):
            raise RemoteProtocolError("a reply of metad without its sequence")
        if self.cluster_id and cluster_id != self.cluster_id:
            raise Behind(
                f"metad serves cluster {cluster_id}, this node belongs to cluster {self.cluster_id}; "
                "check metad_address and metadata_root"
            )
        if seq < self.floor:
            raise Behind(
                f"the metadata is at change {seq}, this node has seen {self.floor}: it was restored from an older "
                "copy; bring back the newest metadata_root"
            )
        self.inc = str(reply.get("inc", ""))
        self.cluster_id = cluster_id

    def _take(self, changes: list[Any]) -> bool:
        for seq, _time, _cause, change in changes:
            if seq <= self.cluster.seq:
                continue
            if seq != self.cluster.seq + 1:
                return False
            self.cluster.apply(change)
            self.floor = max(self.floor, seq)
            for call in self.on_change:
                call(change)
        return True

    def _reset(self, snapshot: dict[str, Any], reply: Header) -> None:
        self._check({"seq": snapshot.get("seq"), "cluster_id": snapshot.get("cluster_id"), "inc": reply.get("inc")})
        if self.loaded and snapshot["seq"] < self.cluster.seq:
            return  # a reply that was overtaken
        self.cluster = Cluster.from_snapshot(snapshot)
        self.loaded = True
        self.floor = max(self.floor, self.cluster.seq)
        for call in self.on_reset:
            call()


class MetadLink:
    """The connection of a process to metad: requests, published changes, catching up."""

    def __init__(
        self,
        context: zmq.Context[Any],
        config: Config,
        *,
        detail: bool,
        mirror: Mirror | None = None,
        on_request: Callable[[Header, Frames], None] | None = None,
        on_garbage: Callable[[RemoteProtocolError], None] | None = None,
    ) -> None:
        self.mirror = mirror or Mirror()
        self.ready = asyncio.Event()
        self.problem = ""
        """Why there is no snapshot yet, in one line."""
        self._config, self._detail = config, detail
        self._on_garbage = on_garbage
        self.requester = Requester(
            context, config.control_endpoint, prefix=[b""], on_request=on_request, on_garbage=on_garbage
        )
        self._sub = Port(context, zmq.SUB, self._published)
        self._sub.socket.set(zmq.RCVHWM, 10_000)
        self._sub.socket.set(zmq.MAXMSGSIZE, config.message_limit)
        self._sub.socket.set(zmq.RECONNECT_IVL, 50)
        self._sub.socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        self._sub.socket.set(zmq.SUBSCRIBE, TOPIC)
        self._sub.socket.connect(config.publish_endpoint)
        self._sub.kick()
        self._behind = asyncio.Event()
        self._heard = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to follow metad; ``ready`` is set at the first snapshot."""
        self._behind.set()
        self._task = asyncio.get_running_loop().create_task(self._follow(), name="mirror")

    async def call(self, op: str, fields: Header, timeout_s: float) -> Header:
        """A request to metad; the mirror has taken what the reply relies on.  Raises UkaiError."""
        reply, _ = await self.requester.call(op, {**fields, "since": self.mirror.seq}, timeout_s)
        self.mirror.take_reply(reply)
        return reply

    def _published(self, frames: Frames) -> None:
        self._heard = asyncio.get_running_loop().time()
        try:
            message = messages.unpack(frames[-1])
            if not self.mirror.take_published(message):
                self._behind.set()
        except (RemoteProtocolError, KeyError, TypeError, ValueError) as e:
            if self._on_garbage is not None:
                self._on_garbage(RemoteProtocolError(f"published message: {e}"))
            self._behind.set()

    async def _follow(self) -> None:
        silence_s = SILENT_BEATS * self._config.beat_interval
        while True:
            try:
                async with asyncio.timeout(silence_s):
                    await self._behind.wait()
            except TimeoutError:
                if asyncio.get_running_loop().time() - self._heard < silence_s:
                    continue
            self._behind.clear()
            try:
                if self.mirror.loaded and self._detail:
                    await self.call("catchup", {}, self._config.io_timeout)
                else:
                    reply, _ = await self.requester.call("snapshot", {"detail": self._detail}, self._config.io_timeout)
                    self.mirror.take_reply(reply)
                self.problem = ""
                self.ready.set()
            except UkaiError as e:
                if e.message != self.problem:
                    self.problem = e.message
                    log.info("metad: %s", e.message)
                await asyncio.sleep(min(0.5, self._config.beat_interval))
                self._behind.set()

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._sub.close()
        self.requester.close()
