"""What metad knows, and the door through which it changes.

Pure: no socket, clock, randomness or thread; ``Ports`` are the way out.  An operation checks and changes without
an await in between, so that the check and the change are one transaction (R9).  What it changed is seen at once
by the operations after it; nobody outside hears of it before the group commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ukai import messages
from ukai.config import Config
from ukai.errors import Behind, NotFound, NotReady, StaleSession, UkaiError, Unreachable, UsageError
from ukai.messages import Header
from ukai.metad.adoption import HandMade
from ukai.model import Change, Cluster, Image

if TYPE_CHECKING:
    from ukai.metad.registration import Report

BEATS_UNTIL_DOWN = 3
REPORT_LIMIT = 256
"""Nodes whose report is kept while they may not take part."""
CTL_TIMEOUT_S = 10.0
CTL_MARGIN = 0.85
"""Part of the asker's time that requests to the nodes may take, so that the answer is back in time."""

Entry = tuple[int, float, str, Change]
"""seq, time, cause, change: one row of the change table."""


class Ports(Protocol):
    """What the decisions need from outside."""

    def now(self) -> float:
        """Seconds of a clock that never goes back."""
        ...

    def wall(self) -> float:
        """Seconds since 1970."""
        ...

    def new_uuid(self) -> str: ...

    def changed(self, entries: list[Entry]) -> None:
        """Changes that were applied and wait for the group commit."""
        ...

    async def durable(self) -> None:
        """Return when all changes until now are committed.  Raises NotReady when they could not be."""
        ...

    async def call(self, node: str, op: str, fields: Header, timeout_s: float) -> Header:
        """One request to the blockd of a node.  Raises Unreachable, Timeout or what the node answers."""
        ...

    async def read_hand_made(self, name: str) -> HandMade:
        """Read ``metadata_root/<name>``.  Raises NotFound, UsageError."""
        ...

    def spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Let something go on beside."""
        ...

    def drop_state(self) -> None:
        """The cluster in memory can't be trusted: refuse what is under way and load it anew."""
        ...


@dataclass(slots=True)
class Session:
    """A registered blockd process and its last beat."""

    node: str
    inc: str
    serial: int
    """What registration offered; the node row takes it once the node shows that it has it."""
    last_beat: float
    since: float
    """Wall time at which it came up."""
    last_wall: float
    saved_seq: int = 0
    began_seq: int = 0
    """The metadata sequence once it was registered: no later process of the node has seen less."""
    number: int = 0
    """Of the last request that altered something: a late or repeated one is refused."""
    roles: dict[str, int] = field(default_factory=dict)
    opens: dict[str, int] = field(default_factory=dict)
    heard: bool = False
    """Whether a frontend has told this process what is open."""
    down: list[tuple[str, float, str]] = field(default_factory=list)
    progress: dict[str, dict[str, Any]] = field(default_factory=dict)
    space: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class Pending:
    """A writer role that is reserved and not yet committed (R3)."""

    epoch: int
    node: str
    inc: str
    until: float
    """When another node need not wait for this one any more."""
    settled: asyncio.Future[None]


class Core:
    """State of the running metad; the operations are functions on it (see ``ops``)."""

    def __init__(self, cluster: Cluster, ports: Ports, config: Config, node: str, inc: str) -> None:
        self.cluster = cluster
        self.ports = ports
        self.config = config
        self.node = node
        self.inc = inc
        self.started = ports.now()
        self.started_wall = ports.wall()
        self.sessions: dict[str, Session] = {}
        self.ended: dict[str, Session] = {}
        """Of nodes that were refused since: what else that process has sent comes late."""
        self.behind: dict[str, int] = {}
        """node → metadata sequence it has seen and we have not (R12)."""
        self.reports: dict[str, Report] = {}
        """What nodes that may not take part have said of themselves: an administrator decides by it."""
        self.refused: dict[str, str] = {}
        """node → why its registration is refused."""
        self.pending: dict[str, Pending] = {}
        self.vacated: set[str] = set()
        """Images whose last writer is known to hold the role no more (R3); empty after a start."""
        self.revoked: set[str] = set()
        """Images whose writer is being waited out: its beats no longer renew the role (R3)."""
        self.creating: set[str] = set()
        """Names of images being made."""
        self.reopen: dict[str, set[str]] = {}
        """node → images that it must let be opened again, once it answers."""
        self.acquiring: dict[str, str] = {}
        """image → node asked to coordinate its resync."""
        self.sync_reason: dict[str, str] = {}
        self.sync_tries: dict[str, int] = {}
        self.progress: dict[str, dict[str, Any]] = {}
        """Last figures of each resync."""
        self.counts: dict[tuple[str, str], tuple[int, int, int]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    # --- change

    def commit(self, changes: Iterable[Change], cause: str) -> int:
        """Apply changes and hand them to the group commit; returns the sequence of the first one."""
        first = self.cluster.seq + 1
        entries: list[Entry] = []
        now = self.ports.wall()
        try:
            for change in changes:
                self.cluster.apply(change)
                entries.append((self.cluster.seq, now, cause, change))
                self._noticed(change)
        except Exception:
            self.ports.drop_state()
            raise
        self.ports.changed(entries)
        return first

    def _noticed(self, change: Change) -> None:
        if change["t"] == "replicas":
            self.counts.pop((change["uuid"], change["node"]), None)
        elif change["t"] == "image-drop":
            uuid = change["uuid"]
            self.counts = {k: v for k, v in self.counts.items() if k[0] != uuid}
            for table in (self.pending, self.acquiring, self.sync_reason, self.sync_tries, self.progress, self._locks):
                table.pop(uuid, None)
            self.vacated.discard(uuid)
            for owed in self.reopen.values():
                owed.discard(uuid)

    def replace(self, cluster: Cluster) -> None:
        """Go on from what the database says, after a commit that failed."""
        self.cluster = cluster
        self.counts.clear()
        self.sessions = {n: s for n, s in self.sessions.items() if n in cluster.nodes and cluster.nodes[n].inc == s.inc}
        for pending in self.pending.values():
            if not pending.settled.done():
                pending.settled.set_result(None)
        self.pending.clear()
        self.begin_run()

    def begin_run(self, *, anew: bool = False) -> None:
        """What is changed from here on is made by this process, and by no other that has the same past (R12).

        ``anew``: of what was before nothing is known.
        """
        if anew or self.cluster.maker != self.inc:
            self.commit([{"t": "run", "inc": self.inc, "anew": anew}], "metad begins")

    # --- look up

    def image(self, uuid: str) -> Image:
        """Raises NotFound."""
        image = self.cluster.images.get(uuid)
        if image is None:
            raise NotFound(f"image {uuid:.64} is not known")
        return image

    def named(self, fields: Header) -> Image:
        """The image that a request from ukai-ctl names.  Raises NotFound, RemoteProtocolError."""
        name = fields.get("name")
        if type(name) is not str:
            raise UsageError("the name of an image is wanted")
        return self.cluster.by_name(name[:200])

    def known_node(self, address: str) -> str:
        """Raises NotFound, naming the nodes there are."""
        if address not in self.cluster.nodes:
            known = ", ".join(sorted(self.cluster.nodes)) or "none yet"
            raise NotFound(f"node {address:.64} has never registered; known nodes: {known}")
        return address

    def lock(self, uuid: str) -> asyncio.Lock:
        """Held while the writer role of an image is being moved."""
        return self._locks.setdefault(uuid, asyncio.Lock())

    def session(self, fields: Header) -> Session:
        """The session that a blockd's request belongs to.  Raises NotReady when it must register."""
        node, inc = fields.get("node"), fields.get("inc")
        session = self.sessions.get(node) if isinstance(node, str) else None
        if session is None or session.inc != inc:
            raise NotReady(f"node {node!r:.64} is not registered with this metad; register first")
        # one that was sent before the node stored its registration may come after it
        if fields.get("serial") == session.serial > self.cluster.nodes[session.node].serial:
            change: Change = {"t": "node", "address": session.node, "serial": session.serial}
            self.commit([change], "registration confirmed")
        return session

    def numbered(self, fields: Header) -> Session:
        """The session of a request that alters something, taken once and in order.  Raises NotReady, StaleSession."""
        session = self.session(fields)
        number = messages.integer(fields, "n", low=1)
        if number <= session.number:
            raise StaleSession(f"request {number} of node {session.node} came after {session.number}; send it anew")
        session.number = number
        return session

    def check_current(self) -> None:
        """Raises Behind while the metadata is older than what a node has seen (R12)."""
        if self.behind:
            node, seq = max(self.behind.items(), key=lambda item: item[1])
            if seq <= self.cluster.seq:
                raise Behind(
                    f"node {node} has seen another change {seq} than there is here: metadata_root is an older copy, or "
                    "a copy of which another metad has gone on; stop the wrong one, or say which copies to trust: "
                    "ukai-ctl metadata show"
                )
            raise Behind(
                f"the metadata is at change {self.cluster.seq}, node {node} has seen change {seq}: metadata_root was "
                "restored from an older copy; bring back the newest one and start metad again, or say which copies "
                "to trust: ukai-ctl metadata show"
            )

    def check_seen(self, seq: int, maker: str) -> None:
        """Raises Behind where an asker has seen another change ``seq`` than there is here (R12)."""
        if seq <= self.cluster.seq and not self.cluster.saw(seq, maker):
            raise Behind(f"change {seq} is another one here than the asker has seen: a copy of metadata_root goes on")

    def keep(self, report: Report) -> None:
        """Keep what a node that may not take part has reported."""
        if report.node in self.reports or len(self.reports) < REPORT_LIMIT:
            self.reports[report.node] = report

    def begin_above(self, seq: int) -> None:
        """Go on above a sequence that others have seen: the next change has the number after it (R12)."""
        self.cluster.seq = max(self.cluster.seq, seq)

    def current_again(self) -> None:
        """The metadata was made to be the newest: all nodes register anew."""
        self.behind.clear()
        self.reports.clear()
        self.end_sessions(self.sessions)
        self.counts.clear()
        self.acquiring.clear()
        self.pending.clear()

    # --- who lives

    def end_sessions(self, nodes: Iterable[str]) -> None:
        """These have to register anew."""
        for node in list(nodes):
            if (session := self.sessions.pop(node, None)) is not None:
                self.ended[node] = session

    def up(self, node: str) -> bool:
        session = self.sessions.get(node)
        limit = BEATS_UNTIL_DOWN * self.config.beat_interval
        return session is not None and self.ports.now() - session.last_beat < limit

    def lease_end(self, node: str) -> float:
        """When a silent writer on ``node`` has stopped for certain, on the clock of ``now()``."""
        session = self.sessions.get(node)
        return (self.started if session is None else session.last_beat) + self.config.lease

    def down_reason(self, node: str) -> tuple[float, str] | None:
        """Since when (wall time) and why a node is down; None: it is up, or metad has just begun."""
        if self.up(node):
            return None
        if node in self.refused:
            return self.started_wall, self.refused[node]
        session = self.sessions.get(node)
        if session is not None:
            return session.last_wall, "its blockd sends no beats"
        if self.ports.now() - self.started < BEATS_UNTIL_DOWN * self.config.beat_interval:
            return None
        return self.started_wall, "its blockd has not registered since metad was started"

    # --- requests to the nodes

    async def call(self, node: str, op: str, fields: Header, timeout_s: float) -> Header:
        """A request to a node, after what it rests on is committed.  Raises Unreachable or the node's error."""
        await self.ports.durable()
        if not self.up(node):
            raise Unreachable(f"node {node} can't be reached: its blockd is down")
        try:
            return await self.ports.call(node, op, fields, timeout_s)
        except Unreachable as e:
            raise type(e)(f"node {node} can't be reached: {e.message}") from e

    async def call_all(
        self, requests: Iterable[tuple[str, str, Header]], timeout_s: float
    ) -> dict[str, Header | UkaiError]:
        """Several requests (node, op, fields) at once; node → reply or error."""
        wanted = list(requests)

        async def one(node: str, op: str, fields: Header) -> Header | UkaiError:
            try:
                return await self.call(node, op, fields, timeout_s)
            except UkaiError as e:
                return e

        replies = await asyncio.gather(*(one(*request) for request in wanted))
        return {node: reply for (node, _, _), reply in zip(wanted, replies, strict=True)}


def patience(fields: Header) -> float:
    """Seconds that requests to nodes may take while ukai-ctl waits for its answer."""
    value = fields.get("timeout", CTL_TIMEOUT_S)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise UsageError(f"a timeout of {value!r:.50} is not possible; it is a number of seconds above 0")
    return CTL_MARGIN * float(value)


def wanted_blocks(image: Image, fields: Header) -> list[tuple[int, int]]:
    """The blocks a request names, or all.  Raises UsageError."""
    found = messages.ranges(fields, "ranges")
    for _, last in found:
        if last >= image.block_count:
            raise UsageError(
                f"block {last} does not exist; the last one of image {image.name} is {image.block_count - 1}"
            )
    return found or [(0, image.block_count - 1)]


async def settle(future: Awaitable[None], timeout_s: float) -> None:
    """Wait for a future, but not for ever."""
    try:
        await asyncio.wait_for(asyncio.shield(future), max(timeout_s, 0.0))
    except TimeoutError:
        pass  # whoever waits looks at the state again
