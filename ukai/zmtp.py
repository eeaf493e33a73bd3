"""ZeroMQ's wire protocol, spoken by whoever needs the message: what carries requests and block data.

libzmq moves each message through a thread of its own, on both sides.  Those are two wake-ups more for each of the four
transfers of a write, and on an idle core a wake-up costs more than all that is computed for the write.  The sockets
here are a ROUTER and a DEALER to any ZeroMQ library (ZMTP 3.0 over TCP and UNIX sockets, mechanism NULL).

    accept or connect ──greeting and READY sent──▶ greeting ──READY received──▶ ready ──end, broken rule──▶ closed

A connection keeps the order of its messages, and each arrives whole or not at all (R6 builds on both).  What arrives
with one system call is handled together.  A ROUTER's answers to it go out with one call after that, other answers at
once; what a DEALER sends in one turn of the loop goes out with one call at the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import functools
import itertools
import logging
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

from ukai.errors import RemoteProtocolError
from ukai.wire import LARGE_BYTES, Frames

log = logging.getLogger(__name__)

Data = bytes | bytearray | memoryview
Garbage = Callable[[RemoteProtocolError], None]

RECEIVE_BYTES = 256 * 2**10
"""Room for what one system call brings; any frame below LARGE_BYTES fits."""
FRAMES_LIMIT = 8
"""Of a longer message some in the middle are left out.  No message of ours has half as many, so it is refused."""
SEND_BUFFER_BYTES = 2 * 2**20
"""Of a UNIX socket: a large message goes in one call, not in turns with its receiver."""
_SO_SNDBUFFORCE = 32
QUEUE_LIMIT_BYTES = 256 * 2**20
PARTS_AT_ONCE = 256
"""Buffers for one sendmsg; the system's limit is 1024."""
LEISURE_S, LEISURE_BYTES = 0.001, 128 * 2**10
"""So long, and until so much is there, waits what need not go at once."""
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

MORE, LONG, COMMAND = 1, 2, 4
GREETING_BYTES = 64
_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_LONG_HEAD = struct.Struct(">BQ")
_COMMAND_LIMIT_BYTES = 4096

_send = ctypes.PyDLL(None).send
_send.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
_send.restype = ctypes.c_ssize_t
_AT_ONCE = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_memory = ctypes.pythonapi.PyByteArray_FromStringAndSize
_memory.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t]
_memory.restype = ctypes.py_object
"""A bytearray whose bytes are not set to zero first: all of them are received into."""


def greeting(kind: str) -> bytes:
    """What a socket of ``kind`` says first: version and mechanism, and its READY."""
    name = kind.encode()
    ready = b"\x05READY\x0bSocket-Type" + len(name).to_bytes(4, "big") + name
    if kind == "DEALER":
        ready += b"\x08Identity" + bytes(4)
    return _SIGNATURE + bytes((3, 0)) + b"NULL".ljust(20, b"\0") + bytes(32) + bytes((COMMAND, len(ready))) + ready


def encode(frames: Sequence[Data]) -> list[Data]:
    """The buffers that are one message on the wire."""
    parts: list[Data] = []
    left = len(frames)
    for frame in frames:
        left -= 1
        size, more = len(frame), MORE if left else 0
        parts.append(bytes((more, size)) if size < 256 else _LONG_HEAD.pack(more | LONG, size))
        parts.append(frame)
    return parts


class Decoder:
    """Bytes in, messages out.  ``space`` is where the next bytes belong, ``received`` hears how many came."""

    def __init__(self, limit_bytes: int) -> None:
        """``limit_bytes``: of one frame."""
        self._limit_bytes = limit_bytes
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._large: memoryview | None = None
        """The memory of the large frame under way, and how much of it is there."""
        self._filled, self._large_more = 0, 0
        self._frames: Frames = []
        self._greeted = False
        self.ready = False
        """The peer's READY has come."""
        self.sink: memoryview | None = None
        """Where the next large frame belongs, if it has just this size."""
        self.pings: list[bytes] = []
        """Contexts of pings that wait for an answer."""

    def space(self) -> memoryview:
        if self._large is not None:
            return self._large[self._filled :]
        return self._view[self._end :]

    def received(self, count: int) -> list[Frames]:
        """The messages that are whole now.

        Raises RemoteProtocolError when the peer breaks the protocol or a limit; nothing can be decoded after that.
        """
        messages: list[Frames] = []
        large = self._large
        if large is not None:
            self._filled += count
            if self._filled == len(large):
                self._large = None
                self._take(large, self._large_more, messages)
            return messages
        self._end += count
        if not self._greeted and not self._greet():
            return messages
        buffer, view, start, end = self._buffer, self._view, self._start, self._end
        while end - start >= 2:
            flags = buffer[start]
            if flags & LONG:
                if end - start < 9:
                    break
                size, body = int.from_bytes(view[start + 1 : start + 9], "big"), start + 9
            else:
                size, body = buffer[start + 1], start + 2
            if flags > COMMAND | LONG or flags == COMMAND | MORE:  # a command is one frame
                raise RemoteProtocolError(f"a frame with flags {flags:#x}")
            if size > (_COMMAND_LIMIT_BYTES if flags & COMMAND else self._limit_bytes):
                raise RemoteProtocolError(f"a frame of {size} bytes is over the limit")
            if end - body < size:
                if size >= LARGE_BYTES:
                    sink, self.sink = self.sink, None
                    large = sink if sink is not None and len(sink) == size else memoryview(_memory(None, size))
                    self._filled = end - body
                    large[: self._filled] = view[body:end]
                    self._large, self._large_more, start = large, flags & MORE, end
                break
            start = body + size
            if flags & COMMAND:
                self._command(view[body:start].tobytes())
            else:
                frame = view[body:start].tobytes()
                self._take(frame if size < LARGE_BYTES else memoryview(frame), flags & MORE, messages)
        left = end - start
        if left and start:
            buffer[:left] = buffer[start:end]
        self._start, self._end = 0, left
        return messages

    def _take(self, frame: bytes | memoryview, more: int, messages: list[Frames]) -> None:
        if not self.ready:
            raise RemoteProtocolError("a message before READY")
        self._frames.append(frame)
        if not more:
            messages.append(self._frames)
            self._frames = []
        elif len(self._frames) == FRAMES_LIMIT:
            self._frames.pop()

    def _greet(self) -> bool:
        hello = bytes(self._view[: min(self._end, GREETING_BYTES)])
        if hello[:1] != b"\xff" or (len(hello) > 9 and hello[9] != 0x7F) or (len(hello) > 10 and hello[10] < 3):
            raise RemoteProtocolError("no ZeroMQ peer, or one older than ZMTP 3")
        if len(hello) < GREETING_BYTES:
            return False
        mechanism = hello[12:32].rstrip(b"\0")
        if mechanism != b"NULL":
            raise RemoteProtocolError(f"security mechanism {mechanism!r:.30} is not spoken here")
        self._greeted, self._start = True, GREETING_BYTES
        return True

    def _command(self, body: bytes) -> None:
        name = body[1 : 1 + body[0]] if body else b""
        if name == b"READY":
            self.ready = True
        elif name == b"PING":
            self.pings.append(body[7:23])
        elif name == b"ERROR":
            raise RemoteProtocolError(f"the peer refused the connection: {body[7:]!r:.60}")


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
        self._timer: asyncio.Handle | None = None
        self._unanswered = 0
        """Requests of a DEALER that have no answer yet, as far as each has one."""
        self._lonely = 0
        """How many in a row were sent when no other was under way."""
        self._handling = self._leisurely = self._blocked = self._closed = False
        sock.setblocking(False)
        _prepare(sock)
        self._fd = sock.fileno()
        self._greeted_by = self._loop.call_later(GREETING_TIMEOUT_S, self._not_greeted)
        self._loop.add_reader(self._fd, self._readable)
        self._put([greeting(kind)], False)

    @property
    def greeted(self) -> bool:
        """The peer has said READY, be it that the connection has ended since."""
        return self._decoder.ready

    def _not_greeted(self) -> None:
        if not self._decoder.ready:
            self._ended()

    def _readable(self) -> None:
        decoder = self._decoder
        try:
            count = self._sock.recv_into(decoder.space())
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        if not count:
            self._ended()
            return
        try:
            messages = decoder.received(count)
        except RemoteProtocolError as e:
            self._on_garbage(e)
            self._ended()
            return
        self._handling = True
        self._unanswered -= len(messages)
        for frames in messages:
            try:
                self._on_message(frames)
            except Exception:  # the messages behind it are not to be lost
                log.exception("defect while a message was handled")
            if self._closed:
                return
        while decoder.pings:
            pong = b"\x04PONG" + decoder.pings.pop(0)
            self._put([bytes((COMMAND, len(pong))), pong], False)
        self._handling = False
        if self._answers and self._queue and not self._blocked:
            self._push()

    def send(self, frames: Sequence[Data], may_wait: bool = False) -> bool:
        """Send without waiting; false when the connection is not ready or too much waits already.

        A frame of LARGE_BYTES or more is not copied: it must stay as it is until it is on its way.  With ``may_wait``
        it may stay here for LEISURE_S, for others to go with it.
        """
        if self._closed or not self._decoder.ready or self._queue_bytes >= QUEUE_LIMIT_BYTES:
            return False
        if self._unanswered <= 0:
            self._unanswered = 0
            self._lonely += 1
        else:
            self._lonely = 0
        self._unanswered += 1
        self._put(encode(frames), may_wait)
        return not self._closed

    def _put(self, parts: list[Data], may_wait: bool) -> None:
        for part in parts:
            size = len(part)
            self._queue.append(part if type(part) is bytes or size >= LARGE_BYTES else bytes(part))
            self._queue_bytes += size
        if self._blocked:
            return
        if self._answers:
            if not self._handling:
                self._push()
        elif self._lonely >= HABIT_MESSAGES and self._timer is None and not may_wait:
            self._push()
        elif may_wait and self._queue_bytes < LEISURE_BYTES:
            if self._timer is None:
                self._timer, self._leisurely = self._loop.call_later(LEISURE_S, self._push), True
        elif self._timer is None or self._leisurely:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._leisurely = self._loop.call_soon(self._push), False

    def _push(self) -> None:
        """Hand to the system what it takes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        queue = self._queue
        while queue and not self._closed:
            parts = list(itertools.islice(queue, PARTS_AT_ONCE))
            try:
                sent = self._sock.sendmsg(parts)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                self._ended()
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
        if self._timer is not None:
            self._timer.cancel()
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._sock.close()
        self._queue.clear()


def _prepare(sock: socket.socket) -> None:
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


def _address(endpoint: str) -> tuple[socket.AddressFamily, str | tuple[str, int]]:
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc":
        return socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    host = host.strip("[]")
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), (host, int(port))


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
        family, address = _address(endpoint)
        self._path = address if isinstance(address, str) else ""
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            if family != socket.AF_UNIX:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
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
        self, endpoint: str, limit_bytes: int, on_message: Callable[[Frames], None], on_garbage: Garbage
    ) -> None:
        self._endpoint, self._limit_bytes = endpoint, limit_bytes
        self._on_message, self._on_garbage = on_message, on_garbage
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
        family, address = _address(self._endpoint)
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                await loop.sock_connect(sock, address)
        except (OSError, TimeoutError):
            sock.close()
            return False
        except asyncio.CancelledError:
            sock.close()
            raise
        self._connection = Connection(sock, "DEALER", self._limit_bytes, self._on_message, ended.set, self._on_garbage)
        await ended.wait()
        return self._connection.greeted

    def send(self, frames: Sequence[Data], may_wait: bool = False) -> bool:
        """See Connection.send(); false also while there is no connection."""
        return self._connection is not None and self._connection.send(frames, may_wait)

    def close(self) -> None:
        self._task.cancel()
        if self._connection is not None:
            self._connection.close()


class Line:
    """A DEALER without a loop, for one thread at a time.  No call waits for longer than ``slice_s``."""

    __slots__ = ("_decoder", "_fd", "_messages", "_sock", "_unsent")

    def __init__(self, endpoint: str, slice_s: float, limit_bytes: int) -> None:
        """Raises OSError when no peer says READY within a slice, RemoteProtocolError when it is none of ours."""
        family, address = _address(endpoint)
        self._decoder = Decoder(limit_bytes)
        self._messages: list[Frames] = []
        self._unsent: list[Data] = [greeting("DEALER")]
        self._sock = sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._fd = sock.fileno()
        _prepare(sock)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(slice_s), int(slice_s % 1 * 1e6)))
        try:
            sock.connect(address)
            self.send_rest()
            while not self._decoder.ready:
                self._receive()
        except BaseException:
            sock.close()
            raise

    def send(self, frames: Sequence[Data]) -> None:
        """Raises TimeoutError, and send_rest() goes on; ConnectionError when the connection has ended."""
        parts = encode(frames)
        if not self._unsent and len(frames[-1]) < LARGE_BYTES:
            message = b"".join(parts)
            # The call keeps the interpreter: to give it away and to get it back would cost more than the call.
            sent = _send(self._fd, message, len(message), _AT_ONCE)
            if sent == len(message):
                return
            parts = [memoryview(message)[max(0, sent) :]]
        self._unsent += parts
        self.send_rest()

    def send_rest(self) -> None:
        """Raises as send() does."""
        unsent = self._unsent
        while unsent:
            try:
                sent = self._sock.sendmsg(unsent[:PARTS_AT_ONCE])
            except BlockingIOError:
                raise TimeoutError from None
            while unsent and sent >= len(unsent[0]):
                sent -= len(unsent.pop(0))
            if sent:
                unsent[0] = memoryview(unsent[0])[sent:]

    def receive(self, into: memoryview | None = None) -> Frames:
        """One message.  A frame of LARGE_BYTES or more that has just the size of ``into`` may be ``into`` itself.

        Raises TimeoutError, and the same call goes on; ConnectionError when the connection has ended;
        RemoteProtocolError.
        """
        if not self._messages:
            self._decoder.sink = into
        while not self._messages:
            self._receive()
        return self._messages.pop(0)

    def has_message(self) -> bool:
        """Whether a message is there, without waiting.  Raises ConnectionError, RemoteProtocolError."""
        with contextlib.suppress(TimeoutError):
            while not self._messages:
                self._receive(socket.MSG_DONTWAIT)
        return bool(self._messages)

    def _receive(self, flags: int = 0) -> None:
        try:
            count = self._sock.recv_into(self._decoder.space(), 0, flags)
        except BlockingIOError:
            raise TimeoutError from None
        if not count:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        self._messages = self._decoder.received(count)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()
