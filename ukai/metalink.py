"""The connection of a process to metad: requests, published changes, catching up.

Subscribe, ask for a snapshot, and ask again on a gap, a new metad process or silence; ``mirror.py`` has the rules.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import zmq

from ukai import messages
from ukai.config import Config
from ukai.errors import RemoteProtocolError, UkaiError
from ukai.messages import Header
from ukai.mirror import Mirror
from ukai.wire import Frames, Port, Requester

log = logging.getLogger(__name__)

TOPIC = b"meta."
SILENT_BEATS = 3


class MetadLink:
    """Follows metad; ``mirror`` is the copy."""

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
        """A request to metad; the mirror has taken what the reply relies on.  Raises UkaiError.

        A registration names the maker of the highest change that the node has ever seen instead (R12).
        """
        reply, _ = await self.requester.call(
            op, {"maker": self.mirror.cluster.maker, **fields, "since": self.mirror.seq}, timeout_s
        )
        self.mirror.take_reply(reply)
        return reply

    def _published(self, frames: Frames) -> None:
        self._heard = asyncio.get_running_loop().time()
        try:
            message = messages.unpack(frames[-1])
            if not self.mirror.take_published(message):
                self._behind.set()
        except RemoteProtocolError as e:
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
