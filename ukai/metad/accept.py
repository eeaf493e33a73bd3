"""An administrator's word on which copies to believe, as ukai-ctl brings it; ``acceptance`` has the decisions."""

from __future__ import annotations

from typing import Any

from ukai import messages
from ukai.errors import (
    Busy,
    Damaged,
    NotFound,
    Refused,
    UkaiError,
    Unreachable,
    UsageError,
)
from ukai.messages import Header
from ukai.metad import acceptance, images, registration, replicas, reports
from ukai.metad.core import Core, patience, wanted_blocks
from ukai.metad.registration import Holding
from ukai.model import IN_SYNC, Change, Image
from ukai.ranges import show

WORST_SHOWN = 20
"""Bad files of a copy that are shown; more are counted."""


# --- older metadata (R12)


def metadata_show(core: Core, fields: Header) -> Header:
    """What the metadata knows and what the nodes have reported, image by image."""
    known = core.cluster.images
    found: dict[str, Any] = {}
    for node, report in core.reports.items():
        for uuid, holding in report.images.items():
            if uuid not in known:
                entry = found.setdefault(uuid, {"uuid": uuid, "name": holding.name, "nodes": []})
                entry["nodes"].append(node)
    return {
        "behind": bool(core.behind),
        "seq": core.cluster.seq,
        "nodes": [_seen(core, n) for n in sorted({*core.cluster.nodes, *core.reports, *core.refused})],
        "images": [_held(core, known[uuid]) for _, uuid in sorted(core.cluster.names.items())],
        "unknown": sorted(found.values(), key=lambda entry: (entry["name"], entry["uuid"])),
    }


def _seen(core: Core, node: str) -> dict[str, Any]:
    report = core.reports.get(node)
    reason = core.refused.get(node, "")
    return {"address": node, "reported": report is not None, "seq": report.highest_seq if report else 0,
            "reason": reason}  # fmt: skip


def _held(core: Core, image: Image) -> dict[str, Any]:
    """One image: what the metadata says, and what each node has that is or could be a location."""
    copies = {}
    for node in sorted({*image.locations, *(n for n, r in core.reports.items() if image.uuid in r.images)}):
        report = core.reports.get(node)
        holding = report.images.get(image.uuid) if report is not None else None
        bad = list(holding.bad) if holding is not None else []
        copies[node] = {
            "location": node in image.locations,
            "reported": report is not None,
            "held": holding is not None,
            "epoch": holding.epoch if holding is not None else 0,
            "written": holding.gens.total() if holding is not None else 0,
            "newest": max((g for _, _, g in holding.gens), default=0) if holding is not None else 0,
            "bad": [[a, b, reason] for a, b, reason in bad[:WORST_SHOWN]],
            "bad_blocks": holding.bad.total() if holding is not None else 0,
        }
    newest = max((r.generation for where in image.locations.values() for _, _, r in where), default=0)
    return {"name": image.name, "uuid": image.uuid, "blocks": image.block_count, "epoch": image.epoch,
            "newest": newest, "copies": copies}  # fmt: skip


def metadata_accept(core: Core, fields: Header) -> Header:
    """Go on from older metadata: the copies of the trusted nodes count, in the order given, and no others.

    One transaction; the sequence goes on above all that any node has seen.  Raises Refused, UsageError, NotFound.
    """
    if not core.behind:
        raise Refused("no node has seen newer metadata than this: there is nothing to accept")
    trust = _trust(core, messages.texts(fields, "trust"))
    changes: list[Change] = []
    notes: list[str] = []
    for node, report in sorted(core.reports.items()):
        row: Change = {"store_id": report.store_id, "boot_id": report.boot_id, "serial": report.serial, "inc": ""}
        changes.append({"t": "node", "address": node, **row})
    for image in core.cluster.images.values():
        order = [n for name, n in trust if name == image.name] + [n for name, n in trust if not name]
        rows, found = acceptance.trusted(image, list(dict.fromkeys(order)), core.reports)
        notes += found
        changes += acceptance.begin_anew(image, acceptance.epoch_above(image, core.reports.values()), core.reports)
        changes += replicas.changes(image, rows)
        if any("is offline" in note for note in found):
            changes.append({"t": "image", "uuid": image.uuid, "online": False})
        if image.uuid in core.cluster.jobs:
            changes.append({"t": "job-drop", "uuid": image.uuid})
    seen = max([core.cluster.seq, *core.behind.values(), *(r.highest_seq for r in core.reports.values())])
    shown = metadata_show(core, {})
    for entry in shown["unknown"]:
        notes.append(
            f"image {entry['name']} ({entry['uuid']}) on {', '.join(entry['nodes'])} is not in this metadata; its "
            "files stay: add it with create_metadata and add_image, or delete them by hand"
        )
    core.begin_above(seen + acceptance.SKIP_CHANGES)
    core.begin_run(anew=True)
    core.commit(changes, "older metadata accepted, trusting " + ", ".join(f"{n}={a}" if n else a for n, a in trust))
    core.current_again()
    return {"seq": core.cluster.seq, "seen": seen, "notes": notes}


def _trust(core: Core, items: list[str]) -> list[tuple[str, str]]:
    """(image or nothing, node) of each ``[IMAGE=]NODE``.  Raises UsageError, NotFound."""
    if not items:
        raise UsageError("name at least one node to trust: --trust NODE, or --trust IMAGE=NODE")
    out = []
    for item in items:
        name, _, node = item.rpartition("=")
        if name:
            core.cluster.by_name(name)
        if node not in core.reports:
            reported = ", ".join(sorted(core.reports)) or "none yet"
            raise NotFound(f"node {node:.64} has not reported what it has; those that have: {reported}")
        out.append((name, node))
    return out


# --- a last copy that is refused (R9)


async def image_accept(core: Core, fields: Header) -> Header:
    """Take what a node has of blocks whose last in-sync copy is refused or, with ``force``, out of reach.

    Raises Refused, NotFound, Busy, Unreachable or a node's error; then nothing has changed.
    """
    image = core.named(fields)
    core.check_current()
    uuid, timeout_s = image.uuid, patience(fields)
    node, zeros, force = (
        messages.text(fields, "node", 64),
        messages.flag(fields, "zeros"),
        messages.flag(fields, "force"),
    )
    wanted = wanted_blocks(image, fields)
    if node not in image.locations:
        raise NotFound(f"node {node} is no location of image {image.name}; see: ukai-ctl image show {image.name}")
    holdings = await _inventories(core, image, node, force, timeout_s * 0.3)
    acceptance.taken(image, node, wanted, holdings, zeros)
    online = image.online
    notes = await images.take_offline(core, uuid, False, timeout_s * 0.3) if online else []
    try:
        image = core.image(uuid)
        rows, blank = acceptance.taken(image, node, wanted, holdings, zeros)
        if len(blank):
            await core.call(node, "disown", {"uuid": uuid, "ranges": [list(r) for r in blank]}, timeout_s * 0.2)
            image = core.image(uuid)
        settled = [[r[0], r[1]] for r in rows[node]]
        if image.checksum:
            await core.call(node, "sums", {"uuid": uuid, "ranges": settled}, timeout_s * 0.2)
            image = core.image(uuid)
        changes = [
            {"t": "active", "uuid": uuid, "del": [list(r) for a, b in settled for r in image.active.within(a, b)]},
            *replicas.changes(image, rows),
        ]
        core.commit(changes, f"the copy of {node} is accepted")
    finally:
        if online:
            core.commit([{"t": "image", "uuid": uuid, "online": True}], "image accept")
            notes += await images.reopen(core, uuid, timeout_s * 0.2)
    shown = reports.summary(core, core.image(uuid))
    return {"image": shown, "accepted": settled, "zeros": [list(r) for r in blank], "notes": notes}


async def _inventories(core: Core, image: Image, node: str, force: bool, timeout_s: float) -> dict[str, Holding | None]:
    """What ``node`` and those with in-sync copies have now.  Raises Unreachable for one that can't be asked."""
    asked = {n for n, where in image.locations.items() if any(r.status == IN_SYNC for _, _, r in where)} | {node}
    replies = await core.call_all([(n, "inventory", {"uuid": image.uuid}) for n in sorted(asked)], timeout_s)
    found: dict[str, Holding | None] = {}
    for address, reply in replies.items():
        if not isinstance(reply, UkaiError):
            found[address] = registration.holding(reply)
        elif isinstance(reply, Damaged):
            found[address] = None
        elif address == node or not isinstance(reply, Unreachable):
            raise reply
        elif force:
            found[address] = None
        else:
            raise Unreachable(f"{reply.message}; it has in-sync copies: bring it back, or give them up with --force")
    return found


# --- a data directory that is an older copy (R8)


def node_accept(core: Core, fields: Header) -> Header:
    """Take the data directory of a node that is held back as it is: its last copies count, all else is out-of-sync.

    Raises Refused, Busy.
    """
    core.check_current()
    node = messages.text(fields, "node", 64)
    report = core.reports.get(node)
    known = core.cluster.nodes.get(node)
    if report is None or known is None:
        raise Refused(f"node {node:.64} is not held back: there is nothing to accept")
    distrusted = registration.distrust(known, _saved(core, node), report)
    changes: list[Change] = []
    accepted: dict[str, str] = {}
    for image in core.cluster.images.values():
        found, mine = acceptance.kept(image, report, distrusted)
        changes += found
        if not len(mine):
            continue
        accepted[image.name] = show(mine)
        users = [n for n, s in core.sessions.items() if core.up(n) and s.opens.get(image.uuid)]
        if users:
            raise Busy(f"image {image.name} is open on {', '.join(users)}; stop the machine that uses it first")
        changes += acceptance.begin_anew(image, image.epoch + 1)
    row: Change = {"store_id": report.store_id, "boot_id": report.boot_id, "serial": report.serial, "inc": ""}
    core.commit([*changes, {"t": "node", "address": node, **row}], f"the data directory of {node} is accepted")
    core.end_sessions([node])
    core.reports.pop(node, None)
    core.refused.pop(node, None)
    return {"accepted": accepted}


def _saved(core: Core, node: str) -> int:
    session = core.sessions.get(node)
    return session.saved_seq if session is not None else 0
