"""A connection to blockd for one thread of libfuse at a time: it sends, and waits for the answer, itself."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import select
import socket
import struct
from collections.abc import Sequence
from time import monotonic

from ukai import sockets
from ukai.polling import Patience
from ukai.wire import Frames
from ukai.zmtp import PARTS_AT_ONCE, Data, Decoder, encode, greeting

_send = ctypes.PyDLL(None).send
_send.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
_send.restype = ctypes.c_ssize_t
_AT_ONCE = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Line:
    """A DEALER without a loop, for one thread at a time.  No call waits for longer than ``slice_s``."""

    __slots__ = ("_decoder", "_fd", "_messages", "_poll", "_slice_ms", "_sock", "_unsent")

    def __init__(self, endpoint: str, slice_s: float, limit_bytes: int) -> None:
        """Raises OSError when no peer says READY within a slice, RemoteProtocolError when it is none of ours."""
        family, where = sockets.address(endpoint)
        self._decoder = Decoder(limit_bytes)
        self._messages: list[Frames] = []
        self._unsent: list[Data] = [greeting("DEALER")]
        self._sock = sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._fd = sock.fileno()
        sockets.prepare(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(slice_s), int(slice_s % 1 * 1e6)))
        self._slice_ms = round(slice_s * 1000)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        try:
            sock.connect(where)
            self.send_rest()
            while not self._decoder.ready:
                self._wait()
                self._receive()
        except BaseException:
            sock.close()
            raise

    def send(self, frames: Sequence[Data]) -> None:
        """Raises TimeoutError, and send_rest() goes on; ConnectionError when the connection has ended."""
        parts = encode(frames)
        if not self._unsent and len(parts) == 1:
            (message,) = parts
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

    def receive(self, into: memoryview | None = None, patience: Patience | None = None) -> Frames:
        """One message.  A frame of LARGE_BYTES or more that has just the size of ``into`` may be ``into`` itself.

        Before the thread sleeps it looks for the message as long as ``patience`` says.
        Raises TimeoutError, and the same call goes on; ConnectionError when the connection has ended;
        RemoteProtocolError.
        """
        if not self._messages:
            self._decoder.sink = into
            began = monotonic()
            found = None
            if looked := patience is not None and patience.pays:
                found = patience.look(functools.partial(self._poll.poll, 0), patience.limit_s)
            while not self._messages:
                if not found:
                    self._wait()
                found = None
                self._receive()
            if patience is not None:
                patience.waited(monotonic() - began, looked)
        return self._messages.pop(0)

    def has_message(self) -> bool:
        """Whether a message is there, without waiting.  Raises ConnectionError, RemoteProtocolError."""
        with contextlib.suppress(TimeoutError):
            while not self._messages:
                self._receive()
        return bool(self._messages)

    def _wait(self) -> None:
        """Until something can be received.

        A recv that waits is woken a second time, for nothing, when the peer has taken what was sent: the kernel tells
        all who wait at a UNIX socket that there is room again.  It costs the peer and this thread some microseconds.
        """
        if not self._poll.poll(self._slice_ms):
            raise TimeoutError

    def _receive(self) -> None:
        try:
            count = self._sock.recv_into(self._decoder.space(), 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise TimeoutError from None
        if not count:
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        self._messages = self._decoder.received(count)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.close()
