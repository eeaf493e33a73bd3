"""ZeroMQ's wire protocol (ZMTP 3.0, mechanism NULL): bytes and messages, without a socket.

    ──greeting and READY sent──▶ greeting ──READY received──▶ ready ──end, broken rule──▶ over

libzmq moves each message through a thread of its own, on both sides.  Those are two wake-ups more for each of the four
transfers of a write, and on an idle core a wake-up costs more than all that is computed for the write.  So whoever
needs the message speaks the protocol: the loops (``sockets.py``) and the frontend's threads (``frontend/line.py``).
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

from ukai.errors import RemoteProtocolError
from ukai.wire import LARGE_BYTES, Frames

Data = bytes | bytearray | memoryview

RECEIVE_BYTES = 256 * 2**10
"""Room for what one system call brings; any frame below LARGE_BYTES fits."""
FRAMES_LIMIT = 8
"""Of a longer message some in the middle are left out.  No message of ours has half as many, so it is refused."""
PARTS_AT_ONCE = 256
"""Buffers for one sendmsg; the system's limit is 1024."""

MORE, LONG, COMMAND = 1, 2, 4
GREETING_BYTES = 64
_SIGNATURE = b"\xff" + bytes(8) + b"\x7f"
_LONG_HEAD = struct.Struct(">BQ")
_COMMAND_LIMIT_BYTES = 4096

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
    """The buffers that are one message on the wire: one; and a last frame of LARGE_BYTES or more, as it is."""
    parts: list[Data] = []
    size, left = 0, len(frames)
    for frame in frames:
        left -= 1
        size, more = len(frame), MORE if left else 0
        parts.append(bytes((more, size)) if size < 256 else _LONG_HEAD.pack(more | LONG, size))
        parts.append(frame)
    if size < LARGE_BYTES:
        return [b"".join(parts)]
    return [b"".join(parts[:-1]), parts[-1]]


class Decoder:
    """Bytes in, messages out.  ``space`` is where the next bytes belong, ``received`` hears how many came."""

    def __init__(self, limit_bytes: int) -> None:
        """``limit_bytes``: of one frame."""
        self._limit_bytes = limit_bytes
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._end = 0
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
        buffer, view, start, end = self._buffer, self._view, 0, self._end
        if not self._greeted:
            if not self._greet():
                return messages
            start = GREETING_BYTES
        while end - start >= 2:
            flags = buffer[start]
            if flags & LONG:
                if end - start < 9:
                    break
                size, body = int.from_bytes(buffer[start + 1 : start + 9], "big"), start + 9
            else:
                size, body = buffer[start + 1], start + 2
            if flags >= COMMAND:
                self._check_command(flags, size)
            elif size > self._limit_bytes:
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
        self._end = left
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

    def _check_command(self, flags: int, size: int) -> None:
        if flags & ~(COMMAND | LONG):  # a command is one frame
            raise RemoteProtocolError(f"a frame with flags {flags:#x}")
        if size > _COMMAND_LIMIT_BYTES:
            raise RemoteProtocolError(f"a command of {size} bytes is over the limit")

    def _greet(self) -> bool:
        """Whether the greeting is whole."""
        hello = bytes(self._view[: min(self._end, GREETING_BYTES)])
        if hello[:1] != b"\xff" or (len(hello) > 9 and hello[9] != 0x7F) or (len(hello) > 10 and hello[10] < 3):
            raise RemoteProtocolError("no ZeroMQ peer, or one older than ZMTP 3")
        if len(hello) < GREETING_BYTES:
            return False
        mechanism = hello[12:32].rstrip(b"\0")
        if mechanism != b"NULL":
            raise RemoteProtocolError(f"security mechanism {mechanism!r:.30} is not spoken here")
        self._greeted = True
        return True

    def _command(self, body: bytes) -> None:
        name = body[1 : 1 + body[0]] if body else b""
        if name == b"READY":
            self.ready = True
        elif name == b"PING":
            self.pings.append(body[7:23])
        elif name == b"ERROR":
            raise RemoteProtocolError(f"the peer refused the connection: {body[7:]!r:.60}")
