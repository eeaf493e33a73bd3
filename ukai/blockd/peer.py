"""The connection to the blockd of another node, as its coordinators see it.

    down ──hello sent──▶ greeting ──token, metadata new enough──▶ up ──no answer in time, refused, cut──▶ down

One ordered connection per pair, numbered from 0 in each session (R6).  When a session ends, all that was under
way has failed and the connection is thrown away with it: what was sent and not answered may or may not have
been done, and can't be done later, because the replica takes numbers only with the token of the new session.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from ukai.errors import DiskError, NotReady, StaleEpoch, Timeout, UkaiError, Unreachable
from ukai.messages import Header, reported

log = logging.getLogger(__name__)

Payload = bytes | bytearray | memoryview
Done = Callable[[UkaiError | None, Header, Payload | None], None]

DOWN, GREETING, UP = "down", "greeting", "up"

LOST = "the connection was lost"

SLOW_OPS = frozenset({"f", "ws", "d", "g", "h", "k", "cr", "usage"})
"""What may take long on a busy disk while the process lives; the ping between tells that it does."""

BUSY_REQUESTS = 4000
"""Well below what the connection queues: a peer that is so far behind is not loaded with more in advance."""

LEISURE_S, LEISURE_BYTES, LEISURE_WRITES = 0.002, 128 * 2**10, 128
"""So long, and until so much is there, a write that nobody waits for waits for others to go with it."""

GREET_AGAIN_S = 0.02
"""What is written while a node is not greeted yet goes on without it."""

TIMER_SLACK_S = 0.001
"""A loop may wake this much before the time asked for."""


class Transport(Protocol):
    """An ordered connection that may drop everything at any time."""

    def send(self, header: Header, payload: Payload | None) -> bool: ...

    def close(self) -> None: ...


Connect = Callable[[str, Callable[[Header, Payload | None], None], Callable[[], None]], Transport]
"""To a node; the first function hears each answer, the second that the connection has ended, where that is noticed."""


class Together:
    """Writes of one image and epoch that go as one message."""

    __slots__ = ("data", "done", "epoch", "places", "size", "uuid")

    def __init__(self, uuid: str, epoch: int) -> None:
        self.uuid, self.epoch = uuid, epoch
        self.places: list[list[int]] = []
        """Block, offset, generation, length of each."""
        self.data: list[Payload] = []
        self.done: list[Done] = []
        self.size = 0

    def ended(self, error: UkaiError | None, header: Header, _payload: Payload | None) -> None:
        """All are answered; of those that failed the answer tells."""
        failed = {} if error is not None or "failed" not in header else self._failed(header["failed"])
        for at, done in enumerate(self.done):
            try:
                done(failed.get(at, error), header, None)
            except Exception:  # the others must hear of theirs all the same
                log.exception("defect after a write")

    def _failed(self, told: object) -> dict[int, UkaiError]:
        """Place of each that failed → why.  What can't be read is no success of any."""
        places = range(len(self.done))
        try:
            if type(told) is list and all(type(at) is int and at in places for at, _ in told):
                return {at: reported(fields) for at, fields in told}
        except (TypeError, ValueError, AttributeError, KeyError):
            pass
        return dict.fromkeys(places, DiskError("its answer to several writes can't be read"))


class Peer:
    """One other node."""

    def __init__(
        self,
        node: str,
        own: str,
        inc: str,
        connect: Connect,
        *,
        replica_timeout_s: float,
        io_timeout_s: float,
        beat_interval_s: float,
        catch_up: Callable[[int], Awaitable[None]],
        roles: Callable[[], dict[str, int]],
        on_stale: Callable[[str, int], None],
        on_reboot: Callable[[str], None],
        wall: Callable[[], float],
    ) -> None:
        self.node, self.state = node, DOWN
        self.reason, self.down_since = "not contacted yet", wall()
        self.confirmed_at = float("-inf")
        """When the last ping that was answered was sent: until then no higher epoch was known there (lease)."""
        self.inflight_bytes = 0
        self._own, self._inc, self._connect = own, inc, connect
        self._timeout_s, self._beat_s = replica_timeout_s, beat_interval_s
        self._patience_s = max(replica_timeout_s, io_timeout_s / 2)
        self._catch_up, self._roles, self._on_stale, self._wall = catch_up, roles, on_stale, wall
        self._on_reboot, self._boot = on_reboot, ""
        self._attempts = itertools.count(1)
        self._ids = itertools.count(1)
        self._waiting: dict[int, tuple[float, int, Done]] = {}
        self._together: Together | None = None
        """What waits to be sent, before anything else is."""
        self._leisure: asyncio.TimerHandle | None = None
        self._token = self._number = 0
        self._transport: Transport | None = None
        self._settled = asyncio.Event()
        self._failed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._keep(), name=f"peer {node}")

    @property
    def up(self) -> bool:
        return self.state == UP

    @property
    def busy(self) -> bool:
        return len(self._waiting) >= BUSY_REQUESTS

    async def settled(self) -> bool:
        """Wait for the first attempt to end; whether the peer is up."""
        await self._settled.wait()
        return self.up

    # --- requests

    def numbered(self, header: Header, payload: Payload | None, done: Done) -> bool:
        """Send what alters data, in order (R6); false, and ``done`` is not called, when the session is not up."""
        if self._together is not None:
            self._send_together()
        if self.state != UP:
            return False
        header["t"], header["n"] = self._token, self._number
        self._number += 1
        if self._send(header, payload, done):
            return True
        self.fail(LOST)
        return False

    def write_at_leisure(
        self, uuid: str, epoch: int, block: int, offset: int, generation: int, data: Payload, done: Done
    ) -> bool:
        """Send a write that nobody waits for, in its order (R6), with those that come within LEISURE_S.

        False, and ``done`` is not called, when the session is not up.  ``data`` must stay as it is.
        """
        if self.state != UP:
            return False
        together = self._together
        if together is None or together.uuid != uuid or together.epoch != epoch:
            if together is not None:
                self._send_together()
                if self.state != UP:
                    return False
            together = self._together = Together(uuid, epoch)
            self._leisure = self._loop.call_later(LEISURE_S, self._send_together)
        size = len(data)
        together.places.append([block, offset, generation, size])
        together.data.append(data)
        together.done.append(done)
        together.size += size
        if together.size >= LEISURE_BYTES or len(together.done) >= LEISURE_WRITES:
            self._send_together()
        return True

    def _send_together(self) -> None:
        together = self._take_together()
        if together is not None:
            header: Header = {"op": "wt", "i": together.uuid, "e": together.epoch, "w": together.places}
            if not self.numbered(header, b"".join(together.data), together.ended):
                together.ended(Unreachable(f"node {self.node}: {self.reason}"), {}, None)

    def _take_together(self) -> Together | None:
        together, self._together = self._together, None
        if self._leisure is not None:
            self._leisure.cancel()
            self._leisure = None
        return together

    def _send(self, header: Header, payload: Payload | None, done: Done) -> bool:
        if self._together is not None:
            self._send_together()
        number = header["id"] = next(self._ids)
        if self._transport is None or not self._transport.send(header, payload):
            return False
        size = len(payload) if payload is not None else 0
        self.inflight_bytes += size
        patience_s = self._patience_s if header["op"] in SLOW_OPS else self._timeout_s
        self._waiting[number] = (self._loop.time() + patience_s, size, done)
        return True

    async def ask(self, op: str, fields: Header, payload: Payload | None = None, *, numbered: bool = False) -> Answer:
        """One request of the session and its reply.  Raises Unreachable, or what the reply carries.

        It carries the token, so that no other process, nor this one before it knows where it stands, answers (R8).
        """
        if self.state != UP:
            raise Unreachable(f"node {self.node} can't be reached: {self.reason}")
        return await self._ask({"op": op, "t": self._token, **fields}, payload, numbered)

    def request(self, op: str, fields: Header, done: Done) -> bool:
        """ask() without a task; false, and ``done`` is not called, when the session is not up.  Alters nothing."""
        return self.state == UP and self._send({"op": op, "t": self._token, **fields}, None, done)

    async def _ask(self, header: Header, payload: Payload | None, numbered: bool) -> Answer:
        future: asyncio.Future[Answer] = self._loop.create_future()

        def done(error: UkaiError | None, header: Header, data: Payload | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result((header, data))

        sent = self.numbered(header, payload, done) if numbered else self._send(header, payload, done)
        if not sent:
            raise Unreachable(f"node {self.node} can't be reached: {self.reason}")
        return await future

    def _received(self, header: Header, payload: Payload | None) -> None:
        number = header.get("re")
        entry = self._waiting.pop(number, None) if type(number) is int else None
        if entry is None:
            return
        self.inflight_bytes -= entry[1]
        if "err" not in header:
            entry[2](None, header, payload)
            return
        error = reported(header)
        if error.code == "stale-session" and self.state == UP:
            entry[2](error, header, None)
            self.fail(f"session refused: {error.message}")
            return
        if isinstance(error, StaleEpoch):
            log.info("node %s: %s", self.node, error.message)
        entry[2](error, header, None)

    # --- the life of the session

    async def _keep(self) -> None:
        """Open sessions as long as there are none; ping while there is one."""
        pause_s = min(0.5, self._beat_s)
        while True:
            try:
                await self._greet()
            except UkaiError as e:
                self._end(e.message)
            except Exception as e:  # whoever waits for this node must hear that it is away
                log.exception("defect while greeting node %s", self.node)
                self._end(f"defect: {type(e).__name__}")
            self._settled.set()
            greeted_at = self._loop.time()
            while self.state == UP:
                self._failed.clear()
                self._ping()
                next_look = self._loop.time() + min(self._beat_s, self._timeout_s / 4)
                try:
                    async with asyncio.timeout_at(min([next_look, *(at for at, _, _ in self._waiting.values())])):
                        await self._failed.wait()
                except TimeoutError:
                    self._look()
            if self._loop.time() - greeted_at < pause_s:
                await asyncio.sleep(pause_s)

    def _open(self) -> None:
        """A connection whose late messages can't be taken for those of the next one."""
        transport: Transport | None = None

        def received(header: Header, payload: Payload | None) -> None:
            if self._transport is transport:
                self._received(header, payload)

        def lost() -> None:
            if self._transport is transport:
                self.fail(LOST)
                self._unanswered(LOST)  # a hello

        self._transport = transport = self._connect(self.node, received, lost)

    async def _greet(self) -> None:
        self._open()
        self.state = GREETING
        hello = {"op": "hello", "node": self._own, "inc": self._inc, "try": next(self._attempts)}
        deadline = self._loop.time() + self._timeout_s
        late: UkaiError = Timeout(f"no answer within {self._timeout_s:g} s")
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    reply, _ = await self._ask(hello, None, False)
                break
            except TimeoutError:
                raise late from None
            except Unreachable as e:
                if self._loop.time() >= deadline or isinstance(e, Timeout):
                    raise Unreachable("no connection") from None
            except NotReady as e:  # it has just been started
                late = e
            await asyncio.sleep(GREET_AGAIN_S)  # neither tells when it is so far
        token, seq = reply.get("token"), reply.get("registered_seq")
        if type(token) is not int or type(seq) is not int:
            raise NotReady("answered hello without a token")
        await self._catch_up(seq)
        boot = str(reply.get("boot", ""))
        if self._boot not in ("", boot):
            self._on_reboot(self.node)
        self._boot = boot
        self._token, self._number = token, 0
        self.state = UP
        self.confirmed_at = float("-inf")
        log.info("node %s is connected", self.node)

    def _ping(self) -> None:
        sent_at = self._loop.time()

        def done(error: UkaiError | None, header: Header, _payload: Payload | None) -> None:
            stale = header.get("stale")
            if error is None and isinstance(stale, dict):
                self.confirmed_at = sent_at
                for uuid, epoch in stale.items():
                    if type(epoch) is int:
                        self._on_stale(uuid, epoch)

        if not self._send({"op": "ping", "t": self._token, "roles": self._roles()}, None, done):
            self.fail(LOST)

    def _look(self) -> None:
        """End the session when a request waits for too long."""
        now = self._loop.time() + TIMER_SLACK_S
        if any(now >= deadline for deadline, _, _ in self._waiting.values()):
            self.fail(f"no answer within {self._timeout_s:g} s")

    def fail(self, reason: str) -> None:
        """End the session; everything under way fails now."""
        if self.state == UP:
            log.info("node %s is not reachable: %s", self.node, reason)
            self._end(reason)
            self._failed.set()

    def _end(self, reason: str) -> None:
        if self.state == UP or not self._settled.is_set():
            self.down_since = self._wall()
        self.state, self.reason = DOWN, reason
        self.confirmed_at = float("-inf")
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        self._unanswered(reason)

    def _unanswered(self, reason: str) -> None:
        """All that waits for an answer hears that none will come."""
        waiting, self._waiting = self._waiting, {}
        self.inflight_bytes = 0
        all_done = [done for _, _, done in waiting.values()]
        if (together := self._take_together()) is not None:
            all_done.append(together.ended)
        for done in all_done:
            try:
                done(Unreachable(f"node {self.node}: {reason}"), {}, None)
            except Exception:  # the others must hear of it all the same
                log.exception("defect while the session with node %s ended", self.node)

    def close(self) -> None:
        self._task.cancel()
        self._end("closed")
        self._settled.set()


Answer = tuple[Header, Payload | None]
