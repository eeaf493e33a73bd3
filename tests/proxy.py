"""A proxy of ours between the sockets of processes: holds, repeats, delays, drops and cuts by kind of message.

One link for each pair of a client and a server; a connection of the client has one of its own to the server, so that
sessions stay apart.  Connections that the client has given up stay open here: what was held can still arrive on them,
as it can in a network.  What comes for a server that does not run waits for the next one: later than in any network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from tests.machine import wait_for
from ukai import messages
from ukai.errors import UkaiError
from ukai.messages import Header

POLL_MS = 10
PUBLISHED = "published"
"""The kind of what a publisher sends."""

Socket = zmq.Socket[bytes]

LIVE: list[Proxy] = []
"""Proxies that are at work."""


@dataclass(slots=True)
class Message:
    """One message under way."""

    client: str
    server: str
    to_server: bool
    op: str
    """Of the request, also for its reply; empty where that can't be told."""
    header: Header
    send: Callable[[], None]


@dataclass(eq=False, slots=True)
class Rule:
    """What is done with messages that ``match``, up to ``count`` of them (−1: with all)."""

    match: Callable[[Message], bool]
    action: str
    """drop, hold, repeat (now and once more), delay."""
    count: int
    delay_s: float = 0.0
    met: list[Message] = field(default_factory=list)

    def wait_met(self, count: int = 1, timeout_s: float = 20.0) -> Message:
        """Until so many messages were met; the last of them."""
        wait_for(lambda: len(self.met) >= count, f"{count} messages to {self.action}", timeout_s)
        return self.met[count - 1]


@dataclass(slots=True)
class _Link:
    client: str
    server: str
    target: str
    front: Socket
    backs: dict[bytes, Socket] = field(default_factory=dict)
    """A connection of the client → its connection to the server."""
    ops: dict[tuple[bytes, bool, object], str] = field(default_factory=dict)
    """connection, who asked (the client?), id → op, so that replies have one too."""


class Proxy:
    """All links of a cluster, in a thread.  A context manager."""

    def __init__(self) -> None:
        self._context: zmq.Context[Socket] = zmq.Context()
        self._lock = threading.Lock()
        self._links: dict[tuple[str, str], tuple[_Link, str]] = {}
        self._published: dict[tuple[str, str], tuple[Socket, Socket, str]] = {}
        self._rules: list[Rule] = []
        self._due: list[tuple[float, Message]] = []
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()
        LIVE.append(self)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._thread.join()
        self._context.destroy(linger=0)
        LIVE.remove(self)

    # --- links

    def link(self, client: str, server: str, endpoint: str) -> str:
        """Where a client finds a server's ROUTER from now on."""
        with self._lock:
            known = self._links.get((client, endpoint))
            if known is None:
                front = self._context.socket(zmq.ROUTER)
                port = front.bind_to_random_port("tcp://127.0.0.1")
                known = _Link(client, server, endpoint, front), f"tcp://127.0.0.1:{port}"
                self._links[client, endpoint] = known
            return known[1]

    def publisher(self, client: str, server: str, endpoint: str) -> str:
        """Where a client finds a server's PUB from now on."""
        with self._lock:
            if (client, server) not in self._published:
                sub, pub = self._context.socket(zmq.SUB), self._context.socket(zmq.PUB)
                sub.set(zmq.SUBSCRIBE, b"")
                sub.connect(endpoint)
                port = pub.bind_to_random_port("tcp://127.0.0.1")
                self._published[client, server] = sub, pub, f"tcp://127.0.0.1:{port}"
            return self._published[client, server][2]

    # --- what is done

    def rule(
        self,
        action: str,
        op: str = "",
        *,
        client: str = "",
        server: str = "",
        to_server: bool | None = None,
        count: int = 1,
        delay_s: float = 0.0,
    ) -> Rule:
        """Do something with messages of a kind (empty, None: any)."""

        def match(m: Message) -> bool:
            return (
                op in ("", m.op)
                and client in ("", m.client)
                and server in ("", m.server)
                and to_server in (None, m.to_server)
            )

        rule = Rule(match, action, count, delay_s)
        with self._lock:
            self._rules.append(rule)
        return rule

    def cut(self, a: str, b: str, *, one_way: bool = False) -> list[Rule]:
        """Nothing goes from ``a`` to ``b`` any more, nor back unless ``one_way``."""
        ways = [(a, b, True), (b, a, False)]  # as a client of b, and as its server
        if not one_way:
            ways += [(b, a, True), (a, b, False)]
        return [self.rule("drop", client=c, server=s, to_server=to, count=-1) for c, s, to in ways]

    def end(self, *rules: Rule) -> None:
        with self._lock:
            self._rules = [r for r in self._rules if r not in rules]

    def release(self, rule: Rule) -> None:
        """Let go what is held, as it came."""
        self.end(rule)
        with self._lock:
            self._due += [(0.0, message) for message in rule.met]

    # --- the thread

    def _run(self) -> None:
        while not self._ended:
            with self._lock:
                links = [link for link, _ in self._links.values()]
                published = list(self._published.items())
            poller = zmq.Poller()
            for link in links:
                for socket in (link.front, *link.backs.values()):
                    poller.register(socket, zmq.POLLIN)
            for _, (sub, _, _) in published:
                poller.register(sub, zmq.POLLIN)
            ready = dict(poller.poll(POLL_MS))
            for link in links:
                if link.front in ready:
                    self._from_client(link)
                for identity, back in list(link.backs.items()):
                    if back in ready:
                        self._pass(link, identity, back.recv_multipart(), to_server=False)
            for (client, server), (sub, pub, _) in published:
                if sub in ready:
                    frames = sub.recv_multipart()
                    send = _sender(pub, frames)
                    self._meet(Message(client, server, False, PUBLISHED, {}, send))
            self._send_due()

    def _from_client(self, link: _Link) -> None:
        identity, *frames = link.front.recv_multipart()
        if identity not in link.backs:
            back = link.backs[identity] = self._context.socket(zmq.DEALER)
            back.set(zmq.RECONNECT_IVL, 50)
            back.connect(link.target)
        self._pass(link, identity, frames, to_server=True)

    def _pass(self, link: _Link, identity: bytes, frames: list[bytes], *, to_server: bool) -> None:
        header: Header = {}
        for frame in frames:
            if frame:  # the first that isn't empty is the header
                try:
                    header = messages.unpack(frame, messages.REPLY_LIMIT_BYTES)
                except UkaiError:
                    pass  # it is not for us to judge
                break
        if "op" in header:
            op = str(header["op"])
            link.ops[identity, to_server, header.get("id")] = op
        else:
            op = link.ops.pop((identity, not to_server, header.get("re")), "")
        socket = link.backs[identity] if to_server else link.front
        send = _sender(socket, frames if to_server else [identity, *frames])
        self._meet(Message(link.client, link.server, to_server, op, header, send))

    def _meet(self, message: Message) -> None:
        with self._lock:
            for rule in self._rules:
                if (rule.count < 0 or len(rule.met) < rule.count) and rule.match(message):
                    rule.met.append(message)
                    if rule.action == "repeat":
                        message.send()
                        message.send()
                    elif rule.action == "delay":
                        self._due.append((time.monotonic() + rule.delay_s, message))
                    return
        message.send()

    def _send_due(self) -> None:
        now = time.monotonic()
        with self._lock:
            due = [message for at, message in self._due if at <= now]
            self._due = [(at, message) for at, message in self._due if at > now]
        for message in due:
            message.send()


def _sender(socket: Socket, frames: list[bytes]) -> Callable[[], None]:
    def send() -> None:
        try:
            socket.send_multipart(frames, zmq.DONTWAIT)
        except zmq.Again:
            pass  # too much is under way already

    return send
