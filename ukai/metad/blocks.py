"""What a coordinator tells of the blocks it writes: announced, written, degraded, brought in sync (R4, R5, R9, R11)."""

from __future__ import annotations

from typing import Any

from ukai import faults, messages
from ukai.errors import Refused, RemoteProtocolError
from ukai.messages import Header
from ukai.metad import replicas
from ukai.metad.core import Core
from ukai.metad.roles import lose_former, owned
from ukai.model import Change, Image

ACTIVE_FACTOR = 16
"""Active blocks metad takes, in terms of the nodes' own limit."""


def _ranges(image: Image, fields: Header) -> messages.Ranges:
    return messages.ranges(fields, "ranges", high=image.block_count - 1)


def activate(core: Core, fields: Header) -> Header:
    """Blocks are about to be written (R5); ``generation`` is what their replicas have from now on."""
    node, image = owned(core, fields)
    ranges = _ranges(image, fields)
    if not ranges:
        return {"generation": 0}
    faults.point("metad.activate")
    limit = ACTIVE_FACTOR * core.config.active_limit
    if image.active.total() + sum(b - a + 1 for a, b in ranges) > limit:
        raise Refused(f"more than {limit} active blocks of image {image.name}; retire some first")
    if image.former not in ("", node):
        lose_former(core, image, node, image.epoch)  # the role was taken to read or to sync, and now it writes
    generation = core.cluster.seq + 1
    changes: list[Change] = [{"t": "active", "uuid": image.uuid, "add": [list(r) for r in ranges]}]
    changes += replicas.changes(image, replicas.activated(image, ranges, generation))
    core.commit(changes, f"activate by {node}")
    return {"generation": generation}


def retire(core: Core, fields: Header) -> Header:
    node, image = owned(core, fields)
    faults.point("metad.retire")
    gone = [list(r) for first, last in _ranges(image, fields) for r in image.active.within(first, last)]
    if gone:
        core.commit([{"t": "active", "uuid": image.uuid, "del": gone}], f"retire by {node}")
    return {}


def mark(core: Core, fields: Header) -> Header:
    """Replicas that did not take a write (R4); the last in-sync ones stay (R9)."""
    node, image = owned(core, fields)
    faults.point("metad.mark")
    kept: list[list[Any]] = []
    for target, marks in _marks(image, fields).items():
        rows, stay = replicas.out_of_sync(image, target, marks)
        kept += [[target, *r] for r in stay]
        if rows:
            core.commit(replicas.changes(image, {target: rows}), f"mark by {node}")
    return {"kept": kept}


def _marks(image: Image, fields: Header) -> dict[str, list[replicas.Mark]]:
    value = fields.get("marks", [])
    out: dict[str, list[replicas.Mark]] = {}
    if type(value) is not list:
        raise RemoteProtocolError("field marks: a list is wanted")
    for item in value:
        if type(item) is not list or len(item) != 4 or type(item[0]) is not str or type(item[3]) is not str:
            raise RemoteProtocolError("field marks: [node, first, last, reason] is wanted")
        _, first, last, reason = item
        if type(first) is not int or type(last) is not int or not 0 <= first <= last < image.block_count:
            raise RemoteProtocolError(f"field marks: blocks {first!r:.20}-{last!r:.20} do not exist")
        out.setdefault(item[0], []).append((first, last, reason[:500]))
    return out


def sync_begin(core: Core, fields: Header) -> Header:
    node, image = owned(core, fields)
    target = messages.text(fields, "target", 64)
    faults.point("metad.sync-begin")
    rows, begun, instant = replicas.syncing(image, target, _ranges(image, fields))
    if rows:
        core.commit(replicas.changes(image, {target: rows}), f"resync by {node}")
    return {"syncing": begun, "in_sync": instant}


def sync_finish(core: Core, fields: Header) -> Header:
    node, image = owned(core, fields)
    target = messages.text(fields, "target", 64)
    faults.point("metad.sync-finish")
    done = messages.range_map(fields, "done", int, high=image.block_count - 1)
    rows, failed = replicas.synced(image, target, done)
    if rows:
        core.commit(replicas.changes(image, {target: rows}), f"resynced by {node}")
    return {"failed": failed}
