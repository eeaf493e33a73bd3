"""ZeroMQ sockets on an asyncio loop, and requests over them.

A socket belongs to the loop's thread.  libzmq signals through one edge-triggered descriptor, so after every
read and every send the socket's state is looked at once more.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from ukai import messages
from ukai.errors import LocalProtocolError, RemoteProtocolError, Timeout, Unreachable
from ukai.messages import Header

Frames = list[bytes | memoryview]
"""A frame of LARGE_BYTES or more is a view of the memory that it was received into."""

LARGE_BYTES = 64 * 2**10
"""From here on copying costs more than counting who uses the memory; pyzmq copies smaller ones anyway."""
DRAIN_LIMIT = 64
SEND_QUEUE_MESSAGES = 10_000
CUT_S = 0.1
_DONTWAIT, _DONTWAIT_MORE = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE)
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
"""Plain numbers: pyzmq's enumerations cost as much as the call."""


class Port:
    """One socket; every message that arrives goes to ``on_message`` as its frames."""

    def __init__(self, context: zmq.Context[Any], kind: int, on_message: Callable[[Frames], None] | None) -> None:
        self.socket = context.socket(kind)
        self.socket.linger = 0
        self.on_message = on_message
        self.on_idle: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.Handle | None = None
        self._fd = int(self.socket.getsockopt(zmq.FD))
        self._closed = False
        self._draining = False
        """Whoever drains looks again after each message: whoever sends meanwhile need not."""
        self._loop.add_reader(self._fd, self._drain)

    def _drain(self) -> None:
        self._again = None
        if self._closed or self.on_message is None:
            return
        more = self._draining = True
        try:
            more = self._drain_some(self.on_message)
        finally:
            self._draining = False
            if more and not self._closed:
                self.kick()
        if self.on_idle is not None and not self._closed:
            self.on_idle()

    def _drain_some(self, on_message: Callable[[Frames], None]) -> bool:
        """Whether there may be more.

        To look whether there is another message costs a third of finding that there is none.  Where there is one,
        more are likely, and it is not done again.
        """
        for number in range(DRAIN_LIMIT):
            try:
                frames = self._receive()
            except zmq.Again:
                return False
            on_message(frames)
            if self._closed or (not number and not self.socket.getsockopt(_EVENTS) & _POLLIN):
                return False
        return True

    def _receive(self) -> Frames:
        """One message.  Raises zmq.Again when there is none."""
        frames: Frames = []
        more = True
        while more:
            frame = self.socket.recv(_DONTWAIT, copy=False)
            frames.append(frame.bytes if len(frame) < LARGE_BYTES else frame.buffer)
            more = frame.more
        return frames

    def send(self, frames: Sequence[bytes | bytearray | memoryview]) -> bool:
        """Send without waiting; false when the peer can't be reached or its queue is full.

        A last frame of LARGE_BYTES or more is not copied: it must stay as it is until it is on its way.
        """
        last = frames[-1]
        large = len(last) >= LARGE_BYTES
        sent = True
        try:
            if large:
                self.socket.send_multipart(frames, _DONTWAIT, copy=False)
            else:
                send = self.socket.send
                for frame in frames[:-1]:
                    send(frame, _DONTWAIT_MORE)
                send(last, _DONTWAIT)
        except zmq.ZMQError as e:
            if e.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            sent = False  # in vain, and yet it may have taken the signal of a message that came
        if not self._draining and self._again is None and self.socket.getsockopt(_EVENTS) & _POLLIN:
            self.kick()
        return sent

    def kick(self) -> None:
        """Look for messages once: needed after bind or connect."""
        if self._again is None:
            self._again = self._loop.call_soon(self._drain)

    def close(self, linger_ms: int = 0) -> None:
        """Close; what is queued to be sent has ``linger_ms`` to go out."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            if self._again is not None:
                self._again.cancel()
            self.socket.close(linger_ms)


def bound(context: zmq.Context[Any], endpoint: str, limit: int, on_message: Callable[[Frames], None]) -> Port:
    """A ROUTER that others connect to.  Raises OSError-like zmq.ZMQError when the address is taken."""
    port = Port(context, zmq.ROUTER, on_message)
    s = port.socket
    s.set(zmq.ROUTER_MANDATORY, 1)
    s.set(zmq.MAXMSGSIZE, limit)
    s.set(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
    s.set(zmq.RCVHWM, SEND_QUEUE_MESSAGES)
    if endpoint.startswith("tcp:"):
        s.set(zmq.HEARTBEAT_IVL, 1000)
        s.set(zmq.HEARTBEAT_TIMEOUT, 3000)
    try:
        s.bind(endpoint)
    except zmq.ZMQError:
        port.close()
        raise
    port.kick()
    return port


def connected(context: zmq.Context[Any], endpoint: str, on_message: Callable[[Frames], None]) -> Port:
    """A DEALER to one peer.  Nothing is queued for a peer that is not connected."""
    port = Port(context, zmq.DEALER, on_message)
    s = port.socket
    s.set(zmq.IMMEDIATE, 1)
    s.set(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
    s.set(zmq.RCVHWM, SEND_QUEUE_MESSAGES)
    s.set(zmq.RECONNECT_IVL, 50)
    s.set(zmq.RECONNECT_IVL_MAX, 1000)
    if endpoint.startswith("tcp:"):
        s.set(zmq.HEARTBEAT_IVL, 1000)
        s.set(zmq.HEARTBEAT_TIMEOUT, 3000)
    s.connect(endpoint)
    port.kick()
    return port


class Requester:
    """Requests and replies over one DEALER; what is no reply goes to ``on_request``.

    ``prefix`` is put before each message (an empty frame on the control port).
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        *,
        prefix: Sequence[bytes] = (),
        on_request: Callable[[Header, Frames], None] | None = None,
        on_garbage: Callable[[RemoteProtocolError], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._prefix = list(prefix)
        self._on_request = on_request
        self._on_garbage = on_garbage
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[Header, Frames]]] = {}
        self.port = connected(context, endpoint, self._received)
        watched = f"inproc://cut-{id(self)}"
        self.port.socket.monitor(watched, zmq.EVENT_DISCONNECTED)
        self._cuts = Port(context, zmq.PAIR, self._cut)
        self._cuts.socket.connect(watched)
        self._cuts.kick()

    def _cut(self, _event: Frames) -> None:
        """The connection has ended.  libzmq tells so a moment before it stops taking messages for it: they go too."""
        asyncio.get_running_loop().call_later(CUT_S, self._lost)

    def _lost(self) -> None:
        """Nobody will answer what was under way."""
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(Timeout(f"the connection to {self.endpoint} was lost before it answered"))

    def _received(self, frames: Frames) -> None:
        try:
            body = frames[len(self._prefix) :]
            if not body:
                raise RemoteProtocolError("a message without a header")
            header = messages.unpack(body[0], messages.REPLY_LIMIT_BYTES)
            number = header.get("re")
            if number is None:
                if self._on_request is None:
                    raise RemoteProtocolError("a request where only replies are expected")
                self._on_request(header, body[1:])
                return
        except RemoteProtocolError as e:
            if self._on_garbage is not None:
                self._on_garbage(e)
            return
        future = self._waiting.pop(number, None) if isinstance(number, int) else None
        if future is not None and not future.done():
            future.set_result((header, body[1:]))

    def send(self, header: Header, payload: bytes | memoryview | None = None) -> bool:
        """Send a header that needs no reply, or is one."""
        frames = [*self._prefix, messages.pack(header)]
        return self.port.send(frames if payload is None else [*frames, payload])

    async def call(
        self, op: str, fields: Header, timeout_s: float, payload: bytes | memoryview | None = None
    ) -> tuple[Header, Frames]:
        """One request and its reply.

        Raises Unreachable when the peer is not connected within the time, Timeout when no reply came, be it that the
        connection was lost meanwhile (whether the request was done is not known), and whatever the reply carries.
        """
        if "op" in fields or "id" in fields:
            raise LocalProtocolError("op and id are set by call()")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        number = next(self._ids)
        header = {**fields, "op": op, "id": number}
        while not self.send(header, payload):
            if loop.time() >= deadline:
                raise Unreachable(f"{self.endpoint} can't be reached")
            await asyncio.sleep(0.02)  # the socket tells when it can be read, not when a peer has connected
        future: asyncio.Future[tuple[Header, Frames]] = loop.create_future()
        self._waiting[number] = future
        try:
            async with asyncio.timeout_at(deadline):
                reply, rest = await future
        except TimeoutError:
            raise Timeout(f"{self.endpoint} did not answer {op} within {timeout_s:g} s") from None
        finally:
            self._waiting.pop(number, None)
        messages.raise_error(reply)
        return reply, rest

    def close(self) -> None:
        if not self.port.socket.closed:
            self.port.socket.disable_monitor()
        self._cuts.close()
        self.port.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Unreachable(f"connection to {self.endpoint} was closed"))
        self._waiting.clear()
