"""The writer role of an image: who may write it, and how it moves (R1, R2, R3, R5).

Phase one (``grant``) makes sure that the present writer has stopped and reserves an epoch; the new coordinator then
has the replicas persist it; phase two (``grant_commit``) makes it the writer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

from ukai import faults, messages
from ukai.errors import (
    Busy,
    NotCoordinator,
    NotFound,
    Refused,
    StaleEpoch,
    StaleHandle,
    UkaiError,
    Unreachable,
)
from ukai.messages import Header
from ukai.metad import replicas
from ukai.metad.core import Core, Pending, Session, settle
from ukai.model import IN_SYNC, Change, Image
from ukai.ranges import RangeSet, show

RECONCILE = "compares the blocks that were being written when the writer stopped"
"""Reason of an order that metad itself gave: an administrator's order takes its place."""

PENDING_S = 1.0
"""How much longer than it takes to fence replicas a reserved role is left to the node that reserved it."""


def grant(core: Core, fields: Header) -> Coroutine[Any, Any, Header]:
    """Phase one: the epoch is reserved when no other node can write any more.

    Its number is taken as it arrives, the rest may wait.  Raises NotFound, Refused, Busy, StaleHandle, Unreachable.
    """
    return _grant(core, fields, core.numbered(fields))


async def _grant(core: Core, fields: Header, session: Session) -> Header:
    node = session.node
    uuid = messages.text(fields, "image", 64)
    opened_epoch = messages.integer(fields, "opened_epoch", low=-1)
    purpose = messages.text(fields, "purpose", 16)
    io = purpose == "io"
    if purpose not in ("io", "read", "sync"):
        raise Refused(f"a purpose of {purpose!r} does not exist")
    async with core.lock(uuid):
        await faults.pause("metad.grant")
        await _wait_for_pending(core, uuid, node)
        core.session(fields)
        _check_eligible(core.image(uuid), node, io, opened_epoch)
        image = core.image(uuid)
        if image.writer == node or not image.epoch:
            core.vacated.add(uuid)  # whoever asks for a role does not hold it
        if image.writer not in ("", node):
            if not io and (purpose == "sync" or core.up(image.writer)):  # to read is no reason to stop a writer (R2)
                raise Busy(f"image {image.name} is being written by {image.writer}")
            await displace(core, uuid, node, io=io)
            core.session(fields)
            _check_eligible(core.image(uuid), node, io, opened_epoch)
        elif io and image.former not in ("", node):
            lose_former(core, image, node, image.epoch + 1)
        image = core.image(uuid)
        if image.writer not in ("", node):
            raise Busy(f"image {image.name} is being written by {image.writer}")
        epoch = image.epoch + 1
        former = image.former or image.writer  # should this node go no further, its handles may be open all the same
        change: Change = {"t": "image", "uuid": uuid, "epoch": epoch, "writer": "", "former": former}
        core.commit([change], f"grant to {node}")
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        vacated = uuid in core.vacated
        fencing_s = core.config.replica_timeout + (0 if vacated else core.config.lease) + PENDING_S
        core.pending[uuid] = Pending(epoch, node, session.inc, core.ports.now() + fencing_s, settled)
        image = core.image(uuid)
        holders = sorted(n for n, where in image.locations.items() if any(r.status == IN_SYNC for _, _, r in where))
        return {"epoch": epoch, "holders": holders, "vacated": vacated}


def undecided(core: Core, pending: Pending) -> bool:
    """Whether the node that has reserved a role may still come to take it."""
    return core.ports.now() < pending.until and not pending.settled.done() and core.up(pending.node)


async def _wait_for_pending(core: Core, uuid: str, node: str) -> None:
    """Let another node that has reserved the role come to its end, so that two don't take it from each other."""
    while (pending := core.pending.get(uuid)) is not None and pending.node != node and undecided(core, pending):
        await settle(pending.settled, pending.until - core.ports.now())


def _check_eligible(image: Image, node: str, io: bool, opened_epoch: int) -> None:
    if not image.online:
        raise NotFound(f"image {image.name} is offline; bring it back with: ukai-ctl add_image {image.name}")
    if node not in image.hypervisors and (io or not _has_in_sync(image, node)):
        raise Refused(
            f"node {node} is no hypervisor of image {image.name}; add it with: "
            f"ukai-ctl hypervisor add {image.name} {node}"
        )
    if 0 <= opened_epoch < image.lost.get(node, -1):
        raise StaleHandle(
            f"image {image.name} was written on another hypervisor since it was opened on {node}; open it anew"
        )


def _has_in_sync(image: Image, node: str) -> bool:
    return any(r.status == IN_SYNC for _, _, r in image.locations.get(node, ()))


def lose_former(core: Core, image: Image, node: str, epoch: int) -> None:
    """From ``epoch`` on, handles of the last writer that may be open are stale (R2).

    ``node`` begins to write; or, of a flush image, what the last one acknowledged may be gone.
    """
    session = core.sessions.get(image.former)
    lost = dict(image.lost)
    if (
        session is None
        or not core.up(image.former)
        or not session.heard  # a process that has just begun may not have heard of its handles yet
        or core.ports.wall() - session.since < core.config.io_timeout  # nor one whose frontend is frozen
        or session.opens.get(image.uuid, 0) > 0
    ):
        lost[image.former] = epoch
    change: Change = {"t": "image", "uuid": image.uuid, "lost": lost, "former": ""}
    core.commit([change], f"{node} follows {image.former}")


def lost_with(image: Image, node: str, gone: Iterable[tuple[int, int]]) -> list[Change]:
    """A flush image's last writer loses its copy of some blocks: handles there are stale if one was active (R2).

    What it had acknowledged and not flushed may have been only there.
    """
    if image.replication != "flush" or node not in (image.writer, image.former):
        return []
    if not any(image.active.within(first, last) for first, last in gone):
        return []
    # those opened in the present epoch too, unless it is another node's by now
    epoch = image.epoch + (image.writer in ("", node))
    return [{"t": "image", "uuid": image.uuid, "epoch": epoch, "lost": {**image.lost, node: epoch}, "former": ""}]


async def drained(core: Core, image: Image, timeout_s: float) -> list[Change]:
    """Have the writer flush everything and give the role up, which it may take again at once.  Raises Unreachable.

    The changes are to be committed without another wait.
    """
    uuid, writer, epoch = image.uuid, image.writer, image.epoch
    reply = await core.call(writer, "release", {"image": uuid, "epoch": epoch}, timeout_s)
    image = core.image(uuid)
    _vacate(core, image, epoch)
    if reply.get("clean") is not True or (image.writer, image.epoch) != (writer, epoch):
        raise Unreachable(f"the writer {writer} of image {image.name} could not flush what it has written")
    changes: list[Change] = [{"t": "image", "uuid": uuid, "writer": "", "former": image.former or writer}]
    changes += released(image, reply)
    return changes + replicas.changes(image, replicas.interrupted(image, "resync interrupted"))


async def displace(core: Core, uuid: str, node: str, *, io: bool) -> None:
    """Make the present writer stop: it is asked to drain and release, or waited out (R2, R3).

    On return the image has no writer.  Its active blocks are gone after a clean release, else they stay.
    ``io``: ``node`` is going to write, so handles of the one displaced, or of the last one that wrote, become stale.
    """
    image = core.image(uuid)
    writer, epoch = image.writer, image.epoch
    await faults.pause("metad.displace")
    reply = await _ask_to_release(core, uuid, writer, epoch)
    if reply is None:
        core.revoked.add(uuid)
        try:
            end = core.lease_end(writer)
            if (left := end - core.ports.now()) > 0:
                await asyncio.sleep(left)  # the passing of a lease is the condition itself
        finally:
            core.revoked.discard(uuid)
    await faults.pause("metad.displaced")
    image = core.image(uuid)
    if reply is not None:
        _vacate(core, image, epoch)
    handles = reply.get("handles", 1) if reply is not None else 1
    clean = reply is not None and reply.get("clean") is True
    lost = dict(image.lost)
    # who took the role only to read or to sync has left the mark of the last one that wrote in its place
    wrote = image.former in ("", writer)
    last = (writer if handles else "") if wrote else image.former
    if io and last not in ("", node):
        lost[last] = image.epoch + 1
    former = "" if io else last
    changes: list[Change] = [{"t": "image", "uuid": uuid, "writer": "", "lost": lost, "former": former}]
    changes += replicas.changes(image, replicas.interrupted(image, "resync interrupted"))
    if clean and image.writer == writer and image.epoch == epoch:
        changes += released(image, reply or {})
    core.commit(changes, f"role taken from {writer} for {node}" + ("" if reply is not None else ", which is silent"))


def _vacate(core: Core, image: Image, epoch: int) -> None:
    """The writer of an epoch has said that it does not hold the role, and nobody had it since."""
    if image.epoch == epoch:
        core.vacated.add(image.uuid)


async def _ask_to_release(core: Core, uuid: str, writer: str, epoch: int) -> Header | None:
    """The writer's answer; None when it gave none and has to be waited out."""
    request = asyncio.ensure_future(
        core.call(writer, "release", {"image": uuid, "epoch": epoch}, core.config.io_timeout / 2)
    )
    try:
        while not request.done():
            left = core.lease_end(writer) - core.ports.now()
            if left <= 0:
                return None  # no beat for a whole lease: it has stopped by itself
            await asyncio.wait({request}, timeout=left)
        return request.result()
    except (NotCoordinator, StaleEpoch):
        return {"handles": 1, "clean": False}  # it lives and does not hold the role
    except UkaiError:
        return None
    finally:
        request.cancel()


def grant_commit(core: Core, fields: Header) -> Header:
    """Phase two: the replicas that could be reached have the new epoch.

    Raises StaleEpoch when the role was reserved anew meanwhile, Unreachable when a written block has no in-sync
    replica among them: the message names the nodes that are needed (R3).
    """
    session = core.numbered(fields)
    core.check_current()
    node = session.node
    image = core.image(messages.text(fields, "image", 64))
    epoch = messages.integer(fields, "epoch")
    fenced = set(messages.texts(fields, "fenced"))
    if epoch != image.epoch:
        raise StaleEpoch(f"epoch {epoch} of image {image.name} is over; {image.epoch} has begun", epoch=image.epoch)
    if image.writer == node:
        return {}  # asked twice
    pending = core.pending.get(image.uuid)
    if image.writer or (pending is not None and (pending.node != node or pending.settled.done())):
        raise StaleEpoch(f"epoch {epoch} of image {image.name} was not reserved for {node}")
    if missing := replicas.missing_sources(image, fenced):
        needed = sorted({n for _, _, nodes in missing for n in nodes})
        blocks = show((a, b) for a, b, _ in missing[:5]) + (" and more" if len(missing) > 5 else "")
        raise Unreachable(
            f"image {image.name} needs node {' or '.join(needed) or 'none'}: the only in-sync copies of blocks "
            f"{blocks} are there, and it can't be reached"
        )
    faults.point("metad.commit")
    last = image.former if image.replication == "flush" else ""
    astray = replicas.reconciled(image, node, fenced, last)
    if last in astray:
        lose_former(core, image, node, epoch)  # only there was what it had acknowledged and not flushed
        image = core.image(image.uuid)
    changes: list[Change] = [{"t": "image", "uuid": image.uuid, "writer": node}]
    changes += replicas.changes(image, astray)
    changes += replicas.changes(image, replicas.interrupted(image, "resync interrupted"))
    changes += _reconcile(core, image, astray, core.cluster.seq + len(changes) + 1)
    core.vacated.discard(image.uuid)
    core.commit(changes, f"{node} is the writer of {image.name}")
    _settle(core, image.uuid)
    return {}


def _reconcile(core: Core, image: Image, astray: dict[str, replicas.Rows], number: int) -> list[Change]:
    """The order to compare what may differ after the writer's end, where no resync is under way (R5).

    A verify waits until it is done.
    """
    job = core.cluster.jobs.get(image.uuid)
    running = job is not None and job.state == "running"
    if not astray or (job is not None and running and job.kind == "sync"):
        return []
    waiting = job.row() if job is not None and running else {}
    order: Change = {"t": "job", "uuid": image.uuid, "state": "running", "reason": RECONCILE, "number": number}
    ranges = [list(r) for r in image.active]
    order |= {"kind": "sync", "rate": -1, "done": {}, "after": waiting}
    return [order | {"nodes": sorted(astray), "ranges": ranges, "started": core.ports.wall()}]


def _settle(core: Core, uuid: str) -> None:
    pending = core.pending.get(uuid)
    if pending is not None and not pending.settled.done():
        pending.settled.set_result(None)


def owned(core: Core, fields: Header) -> tuple[str, Image]:
    """The node and the image of a coordinator's request.  Raises StaleEpoch, NotCoordinator (R1)."""
    session = core.numbered(fields)
    core.check_current()
    image = core.image(messages.text(fields, "image", 64))
    epoch = messages.integer(fields, "epoch")
    if epoch != image.epoch:
        raise StaleEpoch(f"epoch {epoch} of image {image.name} is over; {image.epoch} has begun", epoch=image.epoch)
    if image.writer != session.node:
        raise NotCoordinator(f"node {session.node} does not hold the writer role of image {image.name}")
    return session.node, image


def released(image: Image, fields: Header) -> list[Change]:
    """What is no longer active after a clean release: all but what was ``left``.  Raises RemoteProtocolError."""
    left = RangeSet(messages.ranges(fields, "left", high=image.block_count - 1))
    gone = [[a, b] for first, last in image.active for a, b in left.gaps(first, last)]
    return [{"t": "active", "uuid": image.uuid, "del": gone}] if gone else []


def release(core: Core, fields: Header) -> Header:
    """The coordinator has flushed everything and gives the role back; its handles may be open all the same."""
    node, image = owned(core, fields)
    faults.point("metad.release")
    changes: list[Change] = [{"t": "image", "uuid": image.uuid, "writer": "", "former": image.former or node}]
    changes += released(image, fields)
    changes += replicas.changes(image, replicas.interrupted(image, "resync interrupted"))
    core.vacated.add(image.uuid)
    core.commit(changes, f"{node} releases {image.name}")
    _settle(core, image.uuid)
    return {}
