"""The thread that says to blockd that we live, and learns which blockd process is running."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from typing import Any, Protocol

import zmq

from ukai import messages
from ukai.errors import RemoteProtocolError, VersionError
from ukai.frontend.core import Handle
from ukai.messages import Header

log = logging.getLogger(__name__)

SLICE_MS = 100
"""Nothing waits longer than this without a look around."""
HELLO_INTERVAL_S = 0.2
SILENT_QUESTIONS = 5
QUESTIONS_LIMIT = 100
SENT_MESSAGES = 1000

_DONTWAIT = int(zmq.DONTWAIT)


def dealer(context: zmq.Context[Any], endpoint: str) -> zmq.Socket[bytes]:
    """A socket to blockd.  Sending and receiving wait for at most a slice."""
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.set(zmq.IMMEDIATE, 1)  # nothing is queued for a blockd that isn't there
    socket.set(zmq.SNDHWM, SENT_MESSAGES)
    socket.set(zmq.RECONNECT_IVL, 20)
    socket.set(zmq.RECONNECT_IVL_MAX, 200)
    socket.set(zmq.RCVTIMEO, SLICE_MS)
    socket.set(zmq.SNDTIMEO, SLICE_MS)
    socket.connect(endpoint)
    return socket


class Owner(Protocol):
    """Whom Watch tells."""

    name: str
    protocol_errors: int

    def handles(self) -> list[Handle]: ...

    def closing(self) -> list[int]:
        """Handles whose close blockd has not confirmed."""
        ...

    def was_closed(self, number: int) -> None: ...

    def arrived(self, inc: str) -> None:
        """The blockd process ``inc`` is the running one."""
        ...

    def look_around(self) -> None:
        """Called at least every slice."""
        ...


class Watch:
    """Asks every beat interval; every ``HELLO_INTERVAL_S`` while there is no answer or somebody is in doubt."""

    def __init__(self, context: zmq.Context[Any], endpoint: str, beat_interval_s: float, owner: Owner) -> None:
        self._context, self._endpoint = context, endpoint
        self._beat_interval_s, self._owner = beat_interval_s, owner
        self._inc = ""
        self._doubt = self._stop = False
        self._unanswered = 0
        self.silent = False
        """blockd has not answered for a while."""
        self._numbers = itertools.count(1)
        self._questions: dict[int, tuple[Header, list[Handle]]] = {}
        self._complaint = ""
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop = True
        if self._thread.ident is not None:
            self._thread.join()

    def doubt(self) -> None:
        """Somebody waits for blockd: ask soon.  From any thread."""
        self._doubt = True

    def _run(self) -> None:
        socket = dealer(self._context, self._endpoint)
        answered, asked_at = True, time.monotonic() - self._beat_interval_s
        try:
            while not self._stop:
                self._owner.look_around()
                quick = not answered or self._doubt or not self._inc
                wait_s = asked_at + (HELLO_INTERVAL_S if quick else self._beat_interval_s) - time.monotonic()
                if wait_s <= 0:
                    self._notice(0 if answered else self._unanswered + 1)
                    asked_at, self._doubt = time.monotonic(), False
                    self._ask(socket, answered)
                    answered = False
                    continue
                socket.set(zmq.RCVTIMEO, min(SLICE_MS, int(wait_s * 1000) + 1))
                try:
                    frames = socket.recv_multipart()
                except zmq.Again:
                    continue
                if self._take(frames):
                    answered = True
                    self._notice(0)
        except BaseException:
            log.critical("the thread that watches blockd failed; the process ends to be started anew", exc_info=True)
            os._exit(70)
        finally:
            socket.close(0)

    def _notice(self, unanswered: int) -> None:
        self._unanswered = unanswered
        silent = unanswered >= SILENT_QUESTIONS
        if silent != self.silent:
            self.silent = silent
            log.info("blockd does not answer; requests wait for it" if silent else "blockd answers again")

    def _ask(self, socket: zmq.Socket[bytes], answered: bool) -> None:
        handles: list[Handle] = []
        headers: list[Header] = []
        if self._inc and answered:
            handles = [h for h in self._owner.handles() if h.at == self._inc]
            numbers = [h.number for h in handles]
            headers = [{"op": "beat", "frontend": self._owner.name, "inc": self._inc, "handles": numbers}]
            headers += [{"op": "close", "inc": self._inc, "h": n} for n in self._owner.closing()]
        else:
            headers = [{"op": "hello", "frontend": self._owner.name}]
        if len(self._questions) > QUESTIONS_LIMIT:
            self._questions.clear()
        for header in headers:
            header["id"] = number = next(self._numbers)
            self._questions[number] = (header, handles)
            try:
                socket.send(messages.pack(header), _DONTWAIT)
            except zmq.Again:
                self._questions.clear()
                return

    def _take(self, frames: list[bytes]) -> bool:
        """Take one reply; true when blockd has said which process it is."""
        try:
            reply = messages.unpack(frames[0])
            number = reply.get("re")
            header, handles = self._questions.pop(number) if isinstance(number, int) else ({}, [])
            if header.get("op") == "close":
                self._owner.was_closed(header["h"])
                return False
            if "err" in reply:
                self._say(f"blockd: {reply.get('msg')}")
                return False
            inc = messages.text(reply, "inc", 200)
            if not inc:
                raise RemoteProtocolError("blockd has no name for itself")
            known = reply.get("known", [])
            if type(known) is not list or any(type(n) is not int for n in known):
                raise RemoteProtocolError("field known: a list of numbers is wanted")
        except KeyError:
            return False
        except RemoteProtocolError as e:
            self._owner.protocol_errors += 1
            self._say(f"blockd: {e.message}", isinstance(e, VersionError))
            return False
        self._complaint = ""
        if inc != self._inc:
            self._inc = inc
            self._questions.clear()
            self._owner.arrived(inc)
        elif header["op"] == "beat":
            open_there = set(known)
            for handle in handles:
                if handle.number not in open_there and handle.at == inc:
                    handle.at = ""
        return True

    def _say(self, complaint: str, serious: bool = False) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            log.log(logging.ERROR if serious else logging.INFO, "%s", complaint)
