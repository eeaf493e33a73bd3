"""The metadata: what metad owns and every mirror repeats.

Pure.  State changes only by ``Cluster.apply(change)``: metad applies a change, stores it and publishes it;
a mirror applies the same change in the same order.  A change is a map with a kind ``t``:

| t          | fields                                                   | effect                                     |
|------------|----------------------------------------------------------|--------------------------------------------|
| image      | uuid and any fields of ``Image.row()``                   | image made or altered                      |
| image-drop | uuid                                                     | image forgotten                            |
| replicas   | uuid, node, ranges [[first, last, status, gen, reason]]  | replicas set (status -1: location removed) |
| active     | uuid, add [[first, last]], del [[first, last]]           | active blocks                              |
| node       | address and any fields of ``Node.row()``                 | node made or altered                       |
| node-drop  | address                                                  | node forgotten                             |
| job        | uuid and any fields of ``Job.row()``                     | order to sync or verify made or altered    |
| job-drop   | uuid                                                     | that order forgotten                       |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ukai.errors import LocalProtocolError, NotFound, UsageError
from ukai.ranges import RangeMap, RangeSet

IN_SYNC, SYNCING, OUT_OF_SYNC = 0, 1, 2
REMOVED = -1
STATUS_NAMES = {IN_SYNC: "in-sync", SYNCING: "syncing", OUT_OF_SYNC: "out-of-sync"}

ALIGNMENT_BYTES = 4096
BLOCK_SIZE_MIN_BYTES = 4096
BLOCK_COUNT_MAX = 16_000_000
SIZE_MAX_BYTES = 2**60
RUNS_KEPT = 1000
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")

Change = dict[str, Any]


class Replica(NamedTuple):
    """State of one block on one location.

    ``generation`` is the metadata sequence at which the block was last made active while this replica was in
    sync or syncing; 0: never written, reads as zeros (R8).
    """

    status: int
    generation: int
    reason: str


@dataclass(slots=True)
class Image:
    """One image: sizes in bytes, who may write it, and where its blocks are."""

    uuid: str
    name: str = ""
    size: int = 0
    block_size: int = 0
    hypervisors: list[str] = field(default_factory=list)
    online: bool = False
    writer: str = ""
    epoch: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    """node → the epoch at which it lost the writer role to another: its handles opened below are stale (R2)."""
    former: str = ""
    """The last one that wrote, where no other has written since: its handles may still be open (R2)."""
    replication: str = "sync"
    checksum: bool = False
    locations: dict[str, RangeMap[Replica]] = field(default_factory=dict)
    active: RangeSet = field(default_factory=RangeSet)
    before: dict[str, RangeMap[int]] = field(default_factory=dict)
    """location → generation that its replicas of the active blocks had before these were made active: a crash
    between announcing a block and its first write leaves no more than that on the node."""

    @property
    def block_count(self) -> int:
        return -(-self.size // self.block_size)

    def block_bytes(self, index: int) -> int:
        """Size of block ``index``: the last one may be shorter."""
        return min(self.block_size, self.size - index * self.block_size)

    def row(self) -> dict[str, Any]:
        """The scalar fields, as they travel and are stored."""
        return {
            "uuid": self.uuid,
            "name": self.name,
            "size": self.size,
            "block_size": self.block_size,
            "hypervisors": list(self.hypervisors),
            "online": self.online,
            "writer": self.writer,
            "epoch": self.epoch,
            "lost": dict(self.lost),
            "former": self.former,
            "replication": self.replication,
            "checksum": self.checksum,
        }

    def activity(self) -> dict[str, Any]:
        """The active blocks, as they travel."""
        before = {n: [list(r) for r in earlier] for n, earlier in self.before.items()}
        return {"active": [list(r) for r in self.active], "before": before}

    def replica(self, node: str, index: int) -> Replica | None:
        where = self.locations.get(node)
        return where.get(index) if where is not None else None

    def replicas(self, index: int) -> dict[str, Replica]:
        """location → replica of block ``index``."""
        return {n: r for n, where in self.locations.items() if (r := where.get(index)) is not None}

    def required(self, node: str, index: int) -> int:
        """The generation below which ``node``'s replica of a block is an older copy (R8)."""
        replica = self.replica(node, index)
        if replica is None:
            return 0
        earlier = self.before[node].get(index) if node in self.before else None
        return replica.generation if earlier is None else min(earlier, replica.generation)

    def activate(self, first: int, last: int) -> None:
        """Make blocks active; the generation they have until then is remembered."""
        self.active.add(first, last)
        for node, where in self.locations.items():
            earlier = self.before.setdefault(node, RangeMap())
            for a, b, replica in where.within(first, last):
                for c, d in earlier.gaps(a, b):
                    earlier.set(c, d, replica.generation)
            if not len(earlier):
                del self.before[node]

    def retire(self, first: int, last: int) -> None:
        self.active.discard(first, last)
        for node in list(self.before):
            self._forget_before(node, first, last)

    def set_replicas(self, node: str, items: Iterable[Sequence[Any]]) -> None:
        """Set ``[first, last, status, generation, reason]``; status ``REMOVED`` takes the replica away."""
        mine = self.locations.setdefault(node, RangeMap())
        for first, last, status, generation, reason in items:
            if status == REMOVED:
                mine.remove(first, last)
                self._forget_before(node, first, last)
            else:
                mine.set(first, last, Replica(status, generation, reason))
        if not len(mine):
            del self.locations[node]

    def _forget_before(self, node: str, first: int, last: int) -> None:
        earlier = self.before.get(node)
        if earlier is not None:
            earlier.remove(first, last)
            if not len(earlier):
                del self.before[node]

    def segments(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int, dict[str, Replica]]]:
        """Cut first..last into the longest ranges in which every location has one state."""
        last = self.block_count - 1 if last is None else last
        cuts = {first, last + 1}
        parts = {n: where.within(first, last) for n, where in self.locations.items()}
        for items in parts.values():
            for a, b, _ in items:
                cuts.add(a)
                cuts.add(b + 1)
        edges = sorted(cuts)
        at = dict.fromkeys(parts, 0)
        for a, b in zip(edges, edges[1:], strict=False):
            state: dict[str, Replica] = {}
            for node, items in parts.items():
                while at[node] < len(items) and items[at[node]][1] < a:
                    at[node] += 1
                if at[node] < len(items) and items[at[node]][0] <= a:
                    state[node] = items[at[node]][2]
            yield a, b - 1, state


def written(replicas: dict[str, Replica]) -> bool:
    """Whether a block was ever written: any replica, in sync or not, has a generation."""
    return any(r.generation for r in replicas.values())


@dataclass(slots=True)
class Node:
    """One node, as it last registered."""

    address: str
    store_id: str = ""
    boot_id: str = ""
    serial: int = 0
    """Grows at each registration; kept on both sides, so that an older copy of a store is found out (R8)."""
    inc: str = ""
    """Names the blockd process that registered last."""

    def row(self) -> dict[str, Any]:
        return {
            "address": self.address,
            "store_id": self.store_id,
            "boot_id": self.boot_id,
            "serial": self.serial,
            "inc": self.inc,
        }


@dataclass(slots=True)
class Job:
    """An order to bring replicas of an image in sync, or to compare them; at most one per image."""

    uuid: str
    kind: str = "sync"
    """sync or verify."""
    nodes: list[str] = field(default_factory=list)
    """Targets of a sync, locations that a verify compares; empty: all."""
    ranges: list[list[int]] = field(default_factory=list)
    """Blocks; empty: all."""
    state: str = "running"
    """running, stopped, done or failed."""
    reason: str = ""
    number: int = 0
    started: float = 0.0
    rate: int = -1
    """Limit in bytes per second; −1: the node's setting, 0: none."""
    done: dict[str, Any] = field(default_factory=dict)
    """Its figures when its coordinator last told them to be kept, and ``at``: the block at which a verify goes on."""
    after: dict[str, Any] = field(default_factory=dict)
    """The row of the verify whose place this order of metad's has taken, to be taken up after it."""

    def row(self) -> dict[str, Any]:
        return {
            "uuid": self.uuid,
            "kind": self.kind,
            "nodes": list(self.nodes),
            "ranges": [list(r) for r in self.ranges],
            "state": self.state,
            "reason": self.reason,
            "number": self.number,
            "started": self.started,
            "rate": self.rate,
            "done": dict(self.done),
            "after": dict(self.after),
        }


@dataclass(slots=True)
class Cluster:
    """All metadata at one sequence number."""

    cluster_id: str = ""
    seq: int = 0
    """Number of the last change applied; the first is 1, without gaps."""
    images: dict[str, Image] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    runs: list[tuple[int, str]] = field(default_factory=list)
    """Each metad process that made changes: the number of its first one, and its name (R12)."""

    @property
    def maker(self) -> str:
        """The metad process that made the last change."""
        return self.runs[-1][1] if self.runs else ""

    def saw(self, seq: int, maker: str) -> bool:
        """Whether change ``seq``, as somebody saw it, made by ``maker``, is one of this metadata (R12).

        Else this is an older copy, or a copy of which another one has gone on.
        """
        if seq > self.seq:
            return False
        made_by = ""
        for first, inc in self.runs:
            if first <= seq:
                made_by = inc
        return not made_by or not maker or made_by == maker

    def by_name(self, name: str) -> Image:
        """Raises NotFound."""
        uuid = self.names.get(name)
        if uuid is None:
            raise NotFound(f"image {name} is not known; see: ukai-ctl image list")
        return self.images[uuid]

    def apply(self, change: Change) -> None:
        """Make one change.  Raises LocalProtocolError for a kind that does not exist."""
        kind = change["t"]
        if kind == "image":
            self._image(change)
        elif kind == "image-drop":
            image = self.images.pop(change["uuid"])
            del self.names[image.name]
        elif kind == "replicas":
            self.images[change["uuid"]].set_replicas(change["node"], change["ranges"])
        elif kind == "active":
            image = self.images[change["uuid"]]
            for first, last in change.get("add", ()):
                image.activate(first, last)
            for first, last in change.get("del", ()):
                image.retire(first, last)
        elif kind == "node":
            _update(self.nodes.setdefault(change["address"], Node(change["address"])), change)
        elif kind == "node-drop":
            self.nodes.pop(change["address"], None)
        elif kind == "job":
            _update(self.jobs.setdefault(change["uuid"], Job(change["uuid"])), change)
        elif kind == "job-drop":
            self.jobs.pop(change["uuid"], None)
        elif kind == "run":
            self.runs = [*([] if change.get("anew") else self.runs), (self.seq + 1, change["inc"])][-RUNS_KEPT:]
        else:
            raise LocalProtocolError(f"change of kind {kind!r} does not exist")
        self.seq += 1

    def _image(self, change: Change) -> None:
        image = self.images.get(change["uuid"])
        if image is None:
            image = self.images[change["uuid"]] = Image(change["uuid"])
        elif "name" in change:
            self.names.pop(image.name, None)
        _update(image, change)
        self.names[image.name] = image.uuid

    def snapshot(self, detail: bool = True) -> dict[str, Any]:
        """Everything, ready to be packed; without ``detail`` no locations, active blocks and jobs."""
        images = []
        for image in self.images.values():
            row = image.row()
            if detail:
                row["locations"] = {n: [[a, b, *r] for a, b, r in where] for n, where in image.locations.items()}
                row |= image.activity()
            images.append(row)
        return {**self.surroundings(detail), "images": images}

    def surroundings(self, detail: bool = True) -> dict[str, Any]:
        """The snapshot without the images."""
        return {
            "cluster_id": self.cluster_id,
            "seq": self.seq,
            "nodes": [n.row() for n in self.nodes.values()],
            "jobs": [j.row() for j in self.jobs.values()] if detail else [],
            "runs": [list(r) for r in self.runs],
        }

    @classmethod
    def from_snapshot(cls, data: dict[str, Any]) -> Cluster:
        self = cls(cluster_id=data["cluster_id"])
        for row in data["images"]:
            image = Image(row["uuid"])
            _update(image, {k: v for k, v in row.items() if k not in ("locations", "active", "before")})
            for node, items in row.get("locations", {}).items():
                where: RangeMap[Replica] = RangeMap()
                where.extend((a, b, Replica(s, g, r)) for a, b, s, g, r in items)
                image.locations[node] = where
            image.active = RangeSet((a, b) for a, b in row.get("active", ()))
            image.before = {n: RangeMap((a, b, g) for a, b, g in items) for n, items in row.get("before", {}).items()}
            self.images[image.uuid] = image
            self.names[image.name] = image.uuid
        for row in data["nodes"]:
            _update(self.nodes.setdefault(row["address"], Node(row["address"])), row)
        for row in data["jobs"]:
            _update(self.jobs.setdefault(row["uuid"], Job(row["uuid"])), row)
        self.runs = [(first, inc) for first, inc in data["runs"]]
        self.seq = data["seq"]
        return self


def _update(target: Any, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if name not in ("t", "uuid", "address") and name in target.__slots__:
            setattr(target, name, value)


def check_name(name: str) -> str:
    """Raises UsageError unless ``name`` may name an image."""
    if not NAME.match(name):
        raise UsageError(
            f"{name!r:.120} is no image name: 1 to 100 letters, digits, dots, dashes or underscores, "
            "the first one a letter or digit"
        )
    return name


_UNITS = {"": 1, "B": 1} | {
    prefix + suffix: (1024 if suffix in ("", "IB") else 1000) ** power
    for power, prefix in enumerate("KMGTP", 1)
    for suffix in ("", "IB", "B")
}


def parse_size(text: str) -> int:
    """Bytes of ``8G`` (powers of 1024, as QEMU reads it), ``8GiB`` (1024) or ``8GB`` (1000).  Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,30})(?:\.(\d{1,9}))?\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[3].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(f"{text!r:.60} is no size; write 8G, 512M, 8GiB or a number of bytes")
    scale = int("1" + "0" * len(match[2] or ""))
    return int(int(match[1] + (match[2] or "")) * unit // scale)


def check_sizes(size: int, block_size: int) -> None:
    """Raises UsageError unless an image may have these sizes in bytes."""
    if not 0 < size <= SIZE_MAX_BYTES:
        raise UsageError(f"an image size of {size} bytes is not possible; it must be from 1 byte to {SIZE_MAX_BYTES}")
    if not BLOCK_SIZE_MIN_BYTES <= block_size <= size:
        raise UsageError(
            f"a block size of {block_size} bytes is not possible; "
            f"it must be from {BLOCK_SIZE_MIN_BYTES} bytes to the image's size of {size}"
        )
    if -(-size // block_size) > BLOCK_COUNT_MAX:
        raise UsageError(f"more than {BLOCK_COUNT_MAX} blocks are not possible; choose a larger block size")


def round_up(size: int) -> int:
    """``size`` rounded up to the alignment that QEMU wants with cache=none."""
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
