"""The recent changes in memory, and what an asker needs to catch up.

Pure.  Each change is packed once: for the subscribers, for those who ask, and cut to what one message may hold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgpack

from ukai.messages import VERSION, Header
from ukai.metad.core import Entry
from ukai.model import Cluster

RING_BYTES = 32 * 2**20
CATCH_UP_BYTES = 2 * 2**20
"""More than this, and a snapshot is sent instead of the changes."""
PUBLISH_BYTES = 2**20
"""Largest published message; what is larger is left to the subscribers to ask for."""

_pack = msgpack.Packer(autoreset=True).pack


def raw_map(fields: Header, raw: dict[str, bytes], *, version: bool = True) -> bytes:
    """A map, with some values that are packed already; a header with the ``version``."""
    packer = msgpack.Packer(autoreset=False)
    packer.pack_map_header(len(fields) + len(raw) + version)
    if version:
        packer.pack("v")
        packer.pack(VERSION)
    for key, value in fields.items():
        packer.pack(key)
        packer.pack(value)
    parts = [packer.bytes()]
    for key, packed in raw.items():
        parts += [_pack(key), packed]
    return b"".join(parts)


def raw_array(items: list[bytes]) -> bytes:
    packer = msgpack.Packer(autoreset=False)
    packer.pack_array_header(len(items))
    return b"".join([packer.bytes(), *items])


class History:
    """A bounded ring of packed changes, and the snapshot of one sequence."""

    def __init__(self, seq: int) -> None:
        self.seq = seq
        self._ring: deque[bytes] = deque()
        self._bytes = 0
        self._snapshots: dict[bool, tuple[int, bytes]] = {}
        self._places: dict[str, dict[str, bytes]] = {}
        """image → location → packed replicas: most of a snapshot, and most of it unchanged since the last one."""

    def extend(self, batch: Sequence[Entry]) -> list[bytes]:
        """Take committed changes; returns them packed.  Changes before a jump of the sequence are forgotten."""
        packed = [_pack(entry) for entry in batch]
        for _, _, _, change in batch:
            if change["t"] == "replicas":
                self._places.get(change["uuid"], {}).pop(change["node"], None)
            elif change["t"] == "image-drop":
                self._places.pop(change["uuid"], None)
        for (seq, _, _, _), item in zip(batch, packed, strict=True):
            if seq != self.seq + 1:
                self.reset(seq - 1)
            self._ring.append(item)
            self._bytes += len(item)
            self.seq = seq
        while self._bytes > RING_BYTES:
            self._bytes -= len(self._ring.popleft())
        return packed

    def reset(self, seq: int) -> None:
        """After the state was loaded anew."""
        self.seq = seq
        self._ring.clear()
        self._bytes = 0
        self._snapshots.clear()
        self._places.clear()

    def since(self, seq: int) -> list[bytes] | None:
        """The changes above ``seq``; None where a snapshot is needed."""
        wanted = self.seq - seq
        if seq < 0 or wanted < 0 or wanted > len(self._ring):
            return None
        size = 0
        out: list[bytes] = []
        for i in range(len(self._ring) - wanted, len(self._ring)):
            size += len(self._ring[i])
            if size > CATCH_UP_BYTES:
                return None
            out.append(self._ring[i])
        return out

    def snapshot(self, cluster: Cluster, detail: bool) -> bytes:
        """The packed snapshot, made once per sequence."""
        have = self._snapshots.get(detail)
        if have is None or have[0] != cluster.seq:
            have = self._snapshots[detail] = (cluster.seq, self._packed(cluster, detail))
        return have[1]

    def _packed(self, cluster: Cluster, detail: bool) -> bytes:
        """What Cluster.snapshot() says, packed."""
        if not detail:
            packed: bytes = _pack(cluster.snapshot(False))
            return packed
        images = []
        for image in cluster.images.values():
            known = self._places.setdefault(image.uuid, {})
            for node, where in image.locations.items():
                if node not in known:
                    known[node] = _pack([(a, b, *r) for a, b, r in where])
            places = raw_map({}, {node: known[node] for node in image.locations}, version=False)
            images.append(raw_map(image.row() | image.activity(), {"locations": places}, version=False))
        return raw_map(cluster.surroundings(), {"images": raw_array(images)}, version=False)


def chunks(packed: list[bytes]) -> list[list[bytes]]:
    """Changes cut into messages; those too large for one are left out, with what follows in their message."""
    out: list[list[bytes]] = []
    size = PUBLISH_BYTES
    for item in packed:
        if len(item) > PUBLISH_BYTES:
            size = PUBLISH_BYTES
            continue
        if size + len(item) > PUBLISH_BYTES:
            out.append([])
            size = 0
        out[-1].append(item)
        size += len(item)
    return out
