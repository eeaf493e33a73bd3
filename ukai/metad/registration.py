"""A blockd comes: compare what it holds with what it should hold (R8, R12), and give it its place.

The decisions are ``refusal`` and ``compare``; ``register`` and ``beat`` are the operations.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

from ukai import faults, messages
from ukai.errors import Behind, NotReady, Refused, RemoteProtocolError, StaleSession, UkaiError
from ukai.messages import Header
from ukai.metad import replicas, roles
from ukai.metad.core import Core, Session
from ukai.model import IN_SYNC, OUT_OF_SYNC, SYNCING, Change, Cluster, Image, Node, Replica
from ukai.ranges import RangeMap, RangeSet, show

NO_DATA = "no data of this image on the node"
RESTARTED = "node restarted while the block was active"
INTERRUPTED = "resync interrupted: the node's blockd was restarted"
REPLACED = "the node's data directory was replaced by another"
OLDER_STORE = "the node's data directory is an older copy"


@dataclass(slots=True)
class Holding:
    """What a node has of one image."""

    name: str = ""
    epoch: int = 0
    """The highest it has seen."""
    gens: RangeMap[int] = field(default_factory=RangeMap)
    bad: RangeMap[str] = field(default_factory=RangeMap)


@dataclass(slots=True)
class Report:
    """What a node says of itself when it registers."""

    node: str
    inc: str
    store_id: str
    boot_id: str
    serial: int
    highest_seq: int
    cluster_id: str
    maker: str
    """The metad process that made change ``highest_seq``."""
    images: dict[str, Holding]


def read(fields: Header) -> Report:
    """Raises RemoteProtocolError."""
    node = messages.text(fields, "node", 64)
    try:
        ipaddress.IPv4Address(node)
    except ValueError:
        raise RemoteProtocolError(f"field node: an IPv4 address is wanted, not {node!r}") from None
    images = fields.get("images", [])
    if type(images) is not list:
        raise RemoteProtocolError("field images: a list is wanted")
    held: dict[str, Holding] = {}
    for item in images:
        if type(item) is not dict:
            raise RemoteProtocolError("field images: a list of maps is wanted")
        held[messages.text(item, "uuid", 64)] = holding(item)
    return Report(
        node=node,
        inc=messages.text(fields, "inc", 64),
        store_id=messages.text(fields, "store_id", 64),
        boot_id=messages.text(fields, "boot_id", 64),
        serial=messages.integer(fields, "serial"),
        highest_seq=messages.integer(fields, "highest_seq"),
        cluster_id=messages.text(fields, "cluster_id", 64, default=""),
        maker=messages.text(fields, "maker", 64, default=""),
        images=held,
    )


def holding(item: Header) -> Holding:
    """One image of a report.  Raises RemoteProtocolError."""
    return Holding(
        name=messages.text(item, "name", 200, default=""),
        epoch=messages.integer(item, "epoch", default=0),
        gens=messages.range_map(item, "gens", int),
        bad=messages.range_map(item, "bad", str),
    )


def refusal(cluster: Cluster, report: Report) -> str:
    """Why the node can't take part at all, in one line; empty: it can."""
    if report.cluster_id and report.cluster_id != cluster.cluster_id:
        return (
            f"node {report.node} belongs to cluster {report.cluster_id}, this is cluster {cluster.cluster_id}: check "
            "metad_address on the node and metadata_root here"
        )
    for other in cluster.nodes.values():
        if other.address != report.node and report.store_id and other.store_id == report.store_id:
            return (
                f"the data directory of node {report.node} is that of node {other.address} (store "
                f"{report.store_id}): put each node's data_root back in its place"
            )
    return ""


def distrust(known: Node | None, saved_seq: int, report: Report) -> str:
    """Why nothing that was written on the node is taken for what it was; empty: it is (R8).

    The serial grows at each registration, ``saved_seq`` is the metadata sequence that the node's last beat
    said it had stored: a store that has less is an older copy.
    """
    if known is None or not known.store_id:
        return ""
    if known.store_id != report.store_id:
        return REPLACED
    if report.serial < known.serial:
        return f"{OLDER_STORE} (registration {report.serial}, {known.serial} is known)"
    if report.highest_seq < saved_seq:
        return f"{OLDER_STORE} (it has seen change {report.highest_seq}, it had seen {saved_seq})"
    return ""


def compare(image: Image, report: Report, *, same_process: bool, rebooted: bool, distrusted: str) -> list[Change]:
    """Changes that put the node's replicas of one image right (R8), the last in-sync ones excepted (R9)."""
    where = image.locations.get(report.node)
    if where is None:
        return []
    holding = report.images.get(image.uuid)
    marks: list[replicas.Mark] = []
    for first, last, replica in where:
        if replica.status == OUT_OF_SYNC:
            continue
        if replica.status == SYNCING and not same_process:
            marks.append((first, last, INTERRUPTED))
            continue
        if holding is None or distrusted:
            if replica.generation:
                marks.append((first, last, distrusted or NO_DATA))
            continue
        if same_process or replica.status == SYNCING:
            marks.extend(holding.bad.within(first, last) if replica.generation else ())
            continue
        marks.extend(flaws(image, report.node, first, last, replica, holding))
        if rebooted and replica.generation:
            for a, b in image.active.within(first, last):
                marks.append((a, b, RESTARTED))
    rows, _ = replicas.out_of_sync(image, report.node, _once(marks))
    return replicas.changes(image, {report.node: rows})


def flaws(image: Image, node: str, first: int, last: int, replica: Replica, holding: Holding) -> list[replicas.Mark]:
    """What is wrong with a node's in-sync replica of some blocks, as far as files and generations tell (R8)."""
    if not replica.generation:
        return []
    return [*holding.bad.within(first, last), *_older(image, node, first, last, replica.generation, holding.gens)]


def unsettled(image: Image, report: Report) -> RangeSet:
    """The last copies in a distrusted directory that neither files nor generations tell from good ones."""
    out = RangeSet()
    holding = report.images.get(image.uuid)
    if holding is None:
        return out
    for first, last, replica in image.locations.get(report.node, ()):
        if replica.status != IN_SYNC or not replica.generation:
            continue
        wrong = RangeSet((a, b) for a, b, _ in flaws(image, report.node, first, last, replica, holding))
        for a, b in wrong.gaps(first, last):
            for c, d, state in image.segments(a, b):
                if not any(r.status == IN_SYNC for n, r in state.items() if n != report.node):
                    out.add(c, d)
    return out


def _held_back(core: Core, report: Report, distrusted: str) -> str:
    """Why a node with an older copy of its directory is not taken in: nobody else can say what is right (R9)."""
    found = {i.name: blocks for i in core.cluster.images.values() if len(blocks := unsettled(i, report))}
    if not found:
        return ""
    what = ", ".join(f"{show(list(blocks)[:5])} of image {name}" for name, blocks in sorted(found.items())[:5])
    return (
        f"{distrusted}, and node {report.node} has the last in-sync copy of blocks {what}: bring the right data_root "
        f"back, or take what it holds: ukai-ctl node accept {report.node}"
    )


def _older(image: Image, node: str, first: int, last: int, generation: int, gens: RangeMap[int]) -> list[replicas.Mark]:
    """Where the node's generations are below what is required of it."""
    earlier = image.before.get(node)
    found: list[replicas.Mark] = []
    parts: list[tuple[int, int, int]] = list(earlier.within(first, last)) if earlier is not None else []
    for a, b in earlier.gaps(first, last) if earlier is not None else [(first, last)]:
        parts.append((a, b, generation))
    for a, b, needed in parts:
        for c, d, have in gens.within(a, b):
            if have < needed:
                found.append((c, d, f"generation {have} is below {needed}: an older copy"))
        if needed:
            for c, d in gens.gaps(a, b):
                found.append((c, d, f"generation 0 is below {needed}: an older copy"))
    return found


def _once(marks: list[replicas.Mark]) -> list[replicas.Mark]:
    """Each block once, with the first reason given for it."""
    taken: RangeMap[str] = RangeMap()
    for first, last, reason in marks:
        for a, b in taken.gaps(first, last):
            taken.set(a, b, reason)
    return list(taken)


def register(core: Core, fields: Header) -> Header:
    """Compare, commit, and take the node in.  Raises Behind, Refused, StaleSession, RemoteProtocolError."""
    report = read(fields)
    since = messages.integer(fields, "since", low=-1, default=core.cluster.seq)
    faults.point("metad.register")
    cluster, node = core.cluster, report.node
    number, former = messages.integer(fields, "n", low=1), core.sessions.get(node)
    latest = former or core.ended.get(node)
    if latest is not None and latest.inc == report.inc and number <= latest.number:
        raise StaleSession(f"registration {number} of node {node} came after request {latest.number}; send it anew")
    if reason := refusal(cluster, report):
        core.refused[node] = reason
        core.end_sessions([node])
        raise (Behind if report.cluster_id not in ("", cluster.cluster_id) else Refused)(reason)
    if not cluster.saw(report.highest_seq, report.maker):
        core.behind[node] = report.highest_seq
    elif latest is not None and latest.inc != report.inc and since < latest.began_seq:
        raise StaleSession(
            f"node {node} has registered at change {latest.began_seq}, this process of it has seen {since}: it ended "
            "before, or has to catch up first"
        )
    if core.behind:
        core.keep(report)
    core.check_current()
    known = cluster.nodes.get(node)
    same = known is not None and known.inc == report.inc
    rebooted = known is not None and known.boot_id not in ("", report.boot_id)
    distrusted = distrust(known, former.saved_seq if former is not None else 0, report)
    if distrusted and (reason := _held_back(core, report, distrusted)):
        core.refused[node] = reason
        core.keep(report)
        raise Refused(reason)
    core.refused.pop(node, None)
    core.reports.pop(node, None)
    serial = max(report.serial, known.serial if known is not None else 0)
    changes: list[Change] = []
    row: Change = {"store_id": report.store_id, "boot_id": report.boot_id, "inc": report.inc}
    if distrusted:
        row["serial"] = serial = serial + 1
    if known is None or any(getattr(known, k) != v for k, v in row.items()):
        changes.append({"t": "node", "address": node, **row})
    for image in cluster.images.values():
        put_right = compare(image, report, same_process=same, rebooted=rebooted, distrusted=distrusted)
        changes += put_right
        if image.writer == node and not same:
            core.vacated.add(image.uuid)
            changes.append({"t": "image", "uuid": image.uuid, "writer": "", "former": image.former or node})
        if not same:
            changes += roles.lost_with(image, node, [(r[0], r[1]) for c in put_right for r in c["ranges"]])
    core.commit(changes, f"register {node}")
    core.sessions[node] = Session(
        node=node,
        inc=report.inc,
        serial=serial + 1,
        last_beat=core.ports.now(),
        since=core.ports.wall() if former is None or former.inc != report.inc else former.since,
        last_wall=core.ports.wall(),
        saved_seq=(former.saved_seq if former is not None else 0) if same else report.highest_seq,
        number=number,
        began_seq=cluster.seq,
    )
    return {"serial": serial + 1, "cluster_id": cluster.cluster_id}


def beat(core: Core, fields: Header) -> Header:
    """A node lives; its lease goes on, but not for roles that are being taken from it (R3)."""
    if core.behind and fields.get("node") not in core.reports:
        raise NotReady("older metadata was restored: register anew, so that it is known what each node has")
    core.check_current()
    session = core.session(fields)
    node = session.node
    came_back = not core.up(node)
    roles = _counts(fields, "roles")
    session.opens = _counts(fields, "opens")
    session.heard = messages.flag(fields, "heard")
    session.saved_seq = max(session.saved_seq, messages.integer(fields, "saved_seq", default=0))
    session.down = _down(fields)
    session.progress = _progress(core, fields)
    session.space = _space(fields)
    session.roles = roles
    session.last_beat = core.ports.now()
    session.last_wall = core.ports.wall()
    if came_back:
        session.since = session.last_wall
    lost = []
    for uuid, epoch in roles.items():
        image = core.cluster.images.get(uuid)
        if image is None or image.writer != node or image.epoch != epoch or uuid in core.revoked:
            lost.append(uuid)
    if core.reopen.get(node):
        core.ports.spawn("reopen", _reopen(core, node))
    return {"lost": lost}


async def _reopen(core: Core, node: str) -> None:
    """Tell a node that was out of reach that images may be opened again."""
    for uuid in list(core.reopen.get(node, ())):
        image = core.cluster.images.get(uuid)
        if image is not None and image.online and node in image.hypervisors:
            try:
                await core.call(node, "close", {"image": uuid, "reopen": True}, core.config.replica_timeout)
            except UkaiError:
                return  # tried again at the next beat
        core.reopen[node].discard(uuid)


def _counts(fields: Header, name: str) -> dict[str, int]:
    value = fields.get(name, {})
    if type(value) is not dict or any(type(k) is not str or type(v) is not int for k, v in value.items()):
        raise RemoteProtocolError(f"field {name}: a map of whole numbers is wanted")
    return value


def _down(fields: Header) -> list[tuple[str, float, str]]:
    value = fields.get("down", [])
    out: list[tuple[str, float, str]] = []
    if type(value) is not list:
        raise RemoteProtocolError("field down: a list is wanted")
    for item in value:
        if type(item) is not list or len(item) != 3 or type(item[0]) is not str or type(item[2]) is not str:
            raise RemoteProtocolError("field down: [node, since, reason] is wanted")
        if type(item[1]) not in (int, float):
            raise RemoteProtocolError("field down: since is a number")
        out.append((item[0], float(item[1]), item[2]))
    return out


def _progress(core: Core, fields: Header) -> dict[str, dict[str, Any]]:
    value = fields.get("progress", {})
    if type(value) is not dict or any(type(v) is not dict for v in value.values()):
        raise RemoteProtocolError("field progress: a map of maps is wanted")
    out = {uuid: {str(k): v for k, v in figures.items()} for uuid, figures in value.items()}
    core.progress.update({uuid: figures for uuid, figures in out.items() if uuid in core.cluster.images})
    return out


def _space(fields: Header) -> tuple[int, int]:
    value = fields.get("space", [0, 0])
    if type(value) is not list or len(value) != 2 or any(type(v) is not int for v in value):
        raise RemoteProtocolError("field space: [free, total] is wanted")
    return value[0], value[1]
