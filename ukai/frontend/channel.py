"""One connection to the blockd of this node, for one request at a time."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

from ukai import stream
from ukai.errors import RemoteProtocolError
from ukai.frontend.watch import SLICE_MS

_FIRST_BYTES = 512
_SLICE = struct.pack("@ll", 0, SLICE_MS * 1000)


class Channel:
    """Belongs to one thread at a time.  What it raises beside RemoteProtocolError is OSError: blockd is gone.

    ``patient`` is called after each slice of waiting, and raises what ends it.
    """

    __slots__ = ("_first", "_socket", "busy_bytes", "held_until", "number", "on_drop")

    def __init__(self, path: str) -> None:
        self.number = 0
        self.busy_bytes = -1
        """Bytes of the request under way; −1: none."""
        self.held_until = 0.0
        self.on_drop: Callable[[], None] | None = None
        self._first = memoryview(bytearray(_FIRST_BYTES))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # not settimeout(), which asks the kernel twice each time
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SLICE)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SLICE)
            self._socket.connect(path)
        except BaseException:
            self._socket.close()
            raise

    def send(self, header: bytes, payload: memoryview | None, patient: Callable[[], None]) -> None:
        sending = stream.parts(header, payload)
        while sending:
            try:
                sending = stream.rest(sending, self._socket.sendmsg(sending))
            except BlockingIOError:
                patient()

    def receive(self, into: memoryview | None, patient: Callable[[], None]) -> tuple[bytes, int]:
        """One message: its header, and the length of its payload, which is in ``into``."""
        first = self._first
        have = self._some(first, patient)
        while have < stream.LENGTHS.size:
            have += self._some(first[have:], patient)
        header, payload = stream.lengths(first, len(into) if into is not None else 0)
        begin = stream.LENGTHS.size + header
        if begin > len(first):
            first = memoryview(bytearray(begin))
            first[:have] = self._first[:have]
        while have < begin:
            have += self._some(first[have:begin], patient)
        count = have - begin
        if count > payload:
            raise RemoteProtocolError("blockd answered more than was asked")
        if into is not None and payload:
            into[:count] = first[begin:have]
            while count < payload:
                count += self._some(into[count:payload], patient)
        return bytes(first[stream.LENGTHS.size : begin]), payload

    def _some(self, into: memoryview, patient: Callable[[], None]) -> int:
        while True:
            try:
                count = self._socket.recv_into(into)
            except BlockingIOError:
                patient()
                continue
            if not count:
                raise ConnectionResetError("blockd has closed the connection")
            return count

    def answered(self) -> bool:
        """Whether something has arrived.  A connection that was closed says nothing."""
        try:
            return self._socket.recv_into(self._first, 0, socket.MSG_DONTWAIT) > 0
        except OSError:
            return False

    def close(self) -> None:
        self._socket.close()
