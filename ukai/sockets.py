"""The sockets of the data path: a ROUTER and a DEALER on an asyncio loop, as any ZeroMQ library sees them.

A connection keeps the order of its messages, and each arrives whole or not at all (R6 builds on both).  What arrives
with one system call is handled together.  A ROUTER's answers to it go out with one call after that, other answers at
once; what a DEALER sends in one turn of the loop goes out with one call at the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import itertools
import logging
import os
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable, Sequence

from ukai.errors import RemoteProtocolError
from ukai.wire import Frames
from ukai.zmtp import COMMAND, PARTS_AT_ONCE, Data, Decoder, encode, greeting

log = logging.getLogger(__name__)

Garbage = Callable[[RemoteProtocolError], None]

SEND_BUFFER_BYTES = 2 * 2**20
"""Of a UNIX socket: a large message goes in one call, not in turns with its receiver."""
_SO_SNDBUFFORCE = 32
QUEUE_LIMIT_BYTES = 256 * 2**20
HABIT_MESSAGES = 8
"""After so many requests of which each was alone under way, the next is not held back for others."""
RECONNECT_S, RECONNECT_LIMIT_S = 0.05, 1.0
GREETING_TIMEOUT_S = 3.0
ACCEPT_PAUSE_S = 1.0
BACKLOG = 128
KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 2),
    (socket.TCP_KEEPINTVL, 1),
    (socket.TCP_KEEPCNT, 3),
    (socket.TCP_USER_TIMEOUT, 30_000),
)
"""A connection to a machine that is gone ends, be it that nothing or something was to be sent."""


def prepare(sock: socket.socket) -> None:
    """Set the options of a new socket."""
    if sock.family == socket.AF_UNIX:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER_BYTES)
        except PermissionError:  # as much as the system allows to all
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def address(endpoint: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    """What ``tcp://host:port`` or ``ipc://path`` is to the system."""
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc":
        return socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    host = host.strip("[]")
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))


class Connection:
    """One connection on the loop; ``on_message`` gets each message, ``on_end`` hears once that it has ended."""

    def __init__(
        self,
        sock: socket.socket,
        kind: str,
        limit_bytes: int,
        on_message: Callable[[Frames], None],
        on_end: Callable[[], object],
        on_garbage: Garbage,
    ) -> None:
        self._sock, self._answers = sock, kind == "ROUTER"
        self._on_message, self._on_end, self._on_garbage = on_message, on_end, on_garbage
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(limit_bytes)
        self._queue: deque[Data] = deque()
        self._queue_bytes = 0
        self._pushing: asyncio.Handle | None = None
        """Set while the queue waits for the next turn of the loop."""
        self._unanswered = 0
        """Requests of a DEALER that have no answer yet, as far as each has one."""
        self._lonely = 0
        """How many in a row were sent when no other was under way."""
        self._handling = self._blocked = self._closed = False
        self._deaf = False
        """Nothing can be sent any more."""
        sock.setblocking(False)
        prepare(sock)
        self._fd = sock.fileno()
        self._greeted_by = self._loop.call_later(GREETING_TIMEOUT_S, self._not_greeted)
        self._loop.add_reader(self._fd, self._readable)
        self._put([greeting(kind)])

    @property
    def greeted(self) -> bool:
        """The peer has said READY, be it that the connection has ended since."""
        return self._decoder.ready

    def _not_greeted(self) -> None:
        if not self._decoder.ready:
            self._ended()

    def take_in(self) -> None:
        """Handle all that the peer has sent by now."""
        (left,) = struct.unpack("i", fcntl.ioctl(self._fd, termios.FIONREAD, bytes(4)))
        while left > 0 and (count := self._readable()):
            left -= count

    def _readable(self) -> int:
        """Handle what there is; the number of bytes."""
        decoder = self._decoder
        try:
            count = self._sock.recv_into(decoder.space())
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            count = 0
        if not count:
            self._ended()
            return 0
        try:
            messages = decoder.received(count)
        except RemoteProtocolError as e:
            self._on_garbage(e)
            self._ended()
            return count
        self._handling = True
        self._unanswered -= len(messages)
        for frames in messages:
            try:
                self._on_message(frames)
            except Exception:  # the messages behind it are not to be lost
                log.exception("defect while a message was handled")
            if self._closed:
                return count
        while decoder.pings:
            pong = b"\x04PONG" + decoder.pings.pop(0)
            self._put([bytes((COMMAND, len(pong))) + pong])
        self._handling = False
        if self._answers and self._queue and not self._blocked:
            self._push()
        return count

    def send(self, frames: Sequence[Data]) -> bool:
        """Send without waiting; false when the connection is not ready or too much waits already.

        A frame of LARGE_BYTES or more is not copied: it must stay as it is until it is on its way.
        """
        if not self._takes() or self._queue_bytes >= QUEUE_LIMIT_BYTES:
            return False
        if self._unanswered <= 0:
            self._unanswered = 0
            self._lonely += 1
        else:
            self._lonely = 0
        self._unanswered += 1
        self._put(encode(frames))
        return self._takes()

    def _takes(self) -> bool:
        return self._decoder.ready and not self._closed and not self._deaf

    def _put(self, parts: list[Data]) -> None:
        if self._deaf:
            return
        for part in parts:
            self._queue.append(part)
            self._queue_bytes += len(part)
        if self._blocked:
            return
        if self._answers:
            if not self._handling:
                self._push()
        elif self._pushing is None:
            if self._lonely >= HABIT_MESSAGES:
                self._push()
            else:
                self._pushing = self._loop.call_soon(self._push)

    def _push(self) -> None:
        """Hand to the system what it takes."""
        if self._pushing is not None:
            self._pushing.cancel()
            self._pushing = None
        queue = self._queue
        while queue and not self._closed:
            parts = list(itertools.islice(queue, PARTS_AT_ONCE))
            try:
                sent = self._sock.sendmsg(parts)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self._unheard()
                return
            self._queue_bytes -= sent
            for part in parts:
                if sent < len(part):
                    queue[0] = memoryview(part)[sent:]
                    break
                sent -= len(part)
                queue.popleft()
        if not self._closed and bool(queue) is not self._blocked:
            self._blocked = bool(queue)
            if self._blocked:
                self._loop.add_writer(self._fd, self._push)
            else:
                self._loop.remove_writer(self._fd)

    def _unheard(self) -> None:
        """The peer takes nothing any more.  What it sent before that is still to be handled: it may count on it."""
        if not self._answers:
            self._ended()
            return
        self._deaf = True
        self._queue.clear()
        self._queue_bytes = 0
        if self._blocked:
            self._blocked = False
            self._loop.remove_writer(self._fd)

    def _ended(self) -> None:
        if not self._closed:
            self.close()
            self._loop.call_soon(self._on_end)

    def close(self) -> None:
        """``on_end`` is not called; what waits to be sent is dropped."""
        if self._closed:
            return
        self._closed = True
        self._greeted_by.cancel()
        if self._pushing is not None:
            self._pushing.cancel()
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._sock.close()
        self._queue.clear()


class Router:
    """A ROUTER that others connect to: a message comes, and goes, with the name of its connection as first frame."""

    def __init__(
        self, endpoint: str, limit_bytes: int, on_message: Callable[[Frames], None], on_garbage: Garbage
    ) -> None:
        """Raises OSError when the address can't be used."""
        self._limit_bytes, self._on_message, self._on_garbage = limit_bytes, on_message, on_garbage
        self._connections: dict[bytes, Connection] = {}
        self._names = itertools.count(1)
        self._loop = asyncio.get_running_loop()
        family, where = address(endpoint)
        self._path = where if isinstance(where, str) else ""
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            if family != socket.AF_UNIX:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(where)
            self._socket.listen(BACKLOG)
        except OSError:
            self._socket.close()
            raise
        self._pause: asyncio.TimerHandle | None = None
        self._resume()

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._socket.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                log.warning("no connection can be taken for %g s: %s", ACCEPT_PAUSE_S, e.strerror)
                self._loop.remove_reader(self._socket.fileno())
                self._pause = self._loop.call_later(ACCEPT_PAUSE_S, self._resume)
            return
        name = next(self._names).to_bytes(5, "big")
        self._connections[name] = Connection(
            sock,
            "ROUTER",
            self._limit_bytes,
            lambda frames: self._on_message([name, *frames]),
            functools.partial(self._connections.pop, name, None),
            self._on_garbage,
        )

    def take_in(self) -> None:
        """Handle all that peers have sent by now.

        From within the handling of a message this is what came later: only where their order has no meaning.
        """
        for connection in list(self._connections.values()):
            connection.take_in()

    def send(self, frames: Sequence[Data]) -> bool:
        """See Connection.send(); false also when the connection that the first frame names has ended."""
        connection = self._connections.get(bytes(frames[0]))
        return connection is not None and connection.send(frames[1:])

    def close(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._socket.fileno())
        if self._path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        self._socket.close()
        for connection in self._connections.values():
            connection.close()


class Dealer:
    """A DEALER to one peer, connected anew when the connection ends.  Nothing is queued for a peer that isn't there."""

    def __init__(
        self,
        endpoint: str,
        limit_bytes: int,
        on_message: Callable[[Frames], None],
        on_garbage: Garbage,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_end`` hears each time that a connection has ended: what had no answer gets none any more."""
        self._endpoint, self._limit_bytes = endpoint, limit_bytes
        self._on_message, self._on_garbage, self._on_end = on_message, on_garbage, on_end
        self._connection: Connection | None = None
        self._task = asyncio.get_running_loop().create_task(self._keep(), name=f"connection to {endpoint}")

    async def _keep(self) -> None:
        pause_s = RECONNECT_S
        while True:
            if await self._once():
                pause_s = RECONNECT_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RECONNECT_LIMIT_S)

    async def _once(self) -> bool:
        """One connection, until it ends; whether there was a peer."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        family, where = address(self._endpoint)
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                await loop.sock_connect(sock, where)
        except (OSError, TimeoutError):
            sock.close()
            return False
        except asyncio.CancelledError:
            sock.close()
            raise
        self._connection = Connection(sock, "DEALER", self._limit_bytes, self._on_message, ended.set, self._on_garbage)
        await ended.wait()
        self._on_end()
        return self._connection.greeted

    def send(self, frames: Sequence[Data]) -> bool:
        """See Connection.send(); false also while there is no connection."""
        return self._connection is not None and self._connection.send(frames)

    def close(self) -> None:
        self._task.cancel()
        if self._connection is not None:
            self._connection.close()
