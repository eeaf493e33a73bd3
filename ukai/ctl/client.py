"""The way to metad: one REQ socket, and one deadline for the whole command.

The socket is relaxed and correlated: a late reply to an earlier request can't be taken for the reply to this one.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from types import TracebackType

import zmq

from ukai import messages
from ukai.errors import RemoteProtocolError, Timeout, Unreachable
from ukai.messages import Header

READ_ONLY = frozenset(("ping", "image.list", "image.show", "sync.status", "node.list", "errors", "status"))
"""These may be sent again after a lost connection; of the others nobody knows whether they were done."""

SHARE_OF_METAD = 0.9
"""What part of the time left metad may use, so that its own account of what went wrong still gets here."""


class Deadline:
    """A moment from now, on the monotonic clock."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._at = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds left, 0 when it has passed."""
        return max(0.0, self._at - time.monotonic())


class Client:
    """Requests to metad, one at a time.  A context manager; not for use from two threads."""

    def __init__(self, endpoint: str, deadline: Deadline, message_limit: int) -> None:
        self.endpoint = endpoint
        self.deadline = deadline
        self._ids = itertools.count(1)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.REQ)
        self._socket.linger = 0
        self._socket.set(zmq.REQ_RELAXED, 1)
        self._socket.set(zmq.REQ_CORRELATE, 1)
        self._socket.set(zmq.MAXMSGSIZE, message_limit)
        self._socket.set(zmq.RECONNECT_IVL, 50)
        self._socket.set(zmq.RECONNECT_IVL_MAX, 500)
        self._monitor = self._socket.get_monitor_socket(zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED)
        self._up = False
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._socket.connect(endpoint)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self._context.term()

    def call(self, op: str, fields: Header | None = None, deadline: Deadline | None = None) -> Header:
        """One request and its reply, within ``deadline`` or else the command's.

        Raises Unreachable (Timeout where metad was connected) when the time is over or the connection broke while
        a request was under way that must not be repeated, and whatever error the reply carries.
        """
        deadline = deadline or self.deadline
        number = self._send(op, fields, deadline)
        while True:
            left_s = deadline.left_s()
            ready = dict(self._poller.poll(math.ceil(left_s * 1000)))
            if self._socket in ready:
                reply = self._receive(number)
                if reply is not None:
                    messages.raise_error(reply)
                    return reply
            elif self._monitor in ready:
                if self._lost_connection():
                    if op not in READ_ONLY:
                        raise Unreachable(
                            f"the connection to metad at {self.endpoint} broke during {op}; "
                            "it may have been done or not: look with ukai-ctl status"
                        )
                    number = self._send(op, fields, deadline)
            elif not left_s:
                raise self._no_answer(op, deadline)

    def _send(self, op: str, fields: Header | None, deadline: Deadline) -> int:
        number = next(self._ids)
        timeout_s = deadline.left_s() * SHARE_OF_METAD
        header = {**(fields or {}), "op": op, "id": number, "timeout": timeout_s}
        try:
            self._socket.send(messages.pack(header), zmq.DONTWAIT)
        except zmq.Again:
            raise self._no_answer(op, deadline) from None
        return number

    def _receive(self, number: int) -> Header | None:
        frames = self._socket.recv_multipart(zmq.DONTWAIT)
        if not frames:
            return None
        reply = messages.unpack(frames[0])
        if reply.get("re") != number:
            if "re" in reply or "err" not in reply:
                raise RemoteProtocolError(f"what answers at {self.endpoint} is not metad: no reply to our request")
            messages.raise_error(reply)
        return reply

    def _lost_connection(self) -> bool:
        """Take one event of the monitor; whether a connection that stood is gone."""
        # pyzmq's function for this would import asyncio, a fifth of the time that a command needs to start
        event = int.from_bytes(self._monitor.recv_multipart(zmq.DONTWAIT)[0][:2], sys.byteorder)
        was_up, self._up = self._up, event == zmq.Event.HANDSHAKE_SUCCEEDED
        return was_up and not self._up

    def _no_answer(self, op: str, deadline: Deadline) -> Unreachable:
        within = f"within {deadline.timeout_s:g} s"
        if not self._up:
            return Unreachable(
                f"metad at {self.endpoint} can't be reached {within}; is it running, "
                "and are metad_address and control_port right?"
            )
        unknown = "" if op in READ_ONLY else "; it may still be done: look with ukai-ctl status"
        return Timeout(f"metad at {self.endpoint} did not answer {op} {within}{unknown}")
