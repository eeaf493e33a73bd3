"""Orders to bring replicas in sync (R11).

metad keeps the order and sees to it that somebody coordinates the image; the coordinator does the work and ends the
order.  An order survives restarts of everything.
"""

from __future__ import annotations

from typing import Any

from ukai import messages
from ukai.errors import Busy, NotFound, Refused, RemoteProtocolError, UkaiError, UsageError
from ukai.messages import Header
from ukai.metad import replicas, roles
from ukai.metad.core import Core, wanted_blocks
from ukai.model import IN_SYNC, Change, Image, Job

FIGURES = (
    "bytes_total", "bytes_done", "bytes_equal", "bytes_copied", "bytes_hole", "rate", "eta", "blocks_total",
    "blocks_done", "rate_limit",
)  # fmt: skip
RATE_MAX = 2**40


def start(core: Core, fields: Header) -> Header:
    """Raises NotFound, Busy when an order is under way, Refused."""
    image = core.named(fields)
    if not image.online:
        raise Refused(f"image {image.name} is offline; bring it back with: ukai-ctl add_image {image.name}")
    nodes = messages.texts(fields, "nodes")
    for node in nodes:
        if node not in image.locations:
            raise NotFound(f"node {node:.64} is no location of image {image.name}")
    ranges = wanted_blocks(image, fields)
    rate = _rate(fields)
    job = core.cluster.jobs.get(image.uuid)
    if job is not None and job.state == "running" and job.reason != roles.RECONCILE:
        raise Busy(
            f"a resync of image {image.name} is under way; see: ukai-ctl sync status {image.name}, "
            f"or stop it with: ukai-ctl sync stop {image.name}"
        )
    left = replicas.unsynced(image, nodes or image.locations, ranges)
    change: Change = {
        "t": "job",
        "uuid": image.uuid,
        "nodes": list(nodes),
        "ranges": [list(r) for r in messages.ranges(fields, "ranges")],
        "state": "running" if left else "done",
        "reason": "" if left else "nothing was out-of-sync",
        "number": core.cluster.seq + 1 if job is None or job.state != "running" else job.number,  # widened, not ended
        "started": core.ports.wall(),
        "rate": rate,
    }
    core.progress.pop(image.uuid, None)
    core.sync_reason.pop(image.uuid, None)
    core.commit([change], "sync start")
    if left:
        attend(core, image.uuid)
    return {"job": describe(core, core.cluster.jobs[image.uuid])}


def _rate(fields: Header) -> int:
    value = fields.get("rate", -1)
    if type(value) is not int or not -1 <= value <= RATE_MAX:
        raise UsageError(f"rate: bytes per second, 0 for no limit or -1 for the nodes' setting, not {value!r:.40}")
    return value


def _job(core: Core, image: Image) -> Job:
    job = core.cluster.jobs.get(image.uuid)
    if job is None:
        raise NotFound(f"there is no resync of image {image.name}; begin one with: ukai-ctl sync start {image.name}")
    return job


def stop(core: Core, fields: Header) -> Header:
    image = core.named(fields)
    job = _job(core, image)
    if job.state == "running":
        change: Change = {"t": "job", "uuid": image.uuid, "state": "stopped", "reason": "stopped by the administrator"}
        core.commit([change], "sync stop")
    return {"job": describe(core, core.cluster.jobs[image.uuid])}


def rate(core: Core, fields: Header) -> Header:
    image = core.named(fields)
    _job(core, image)
    core.commit([{"t": "job", "uuid": image.uuid, "rate": _rate(fields)}], "sync rate")
    return {"job": describe(core, core.cluster.jobs[image.uuid])}


def status(core: Core, fields: Header) -> Header:
    every = fields.get("name", "") == ""
    found = list(core.cluster.jobs.values()) if every else [_job(core, core.named(fields))]
    return {"jobs": [describe(core, job) for job in found]}


def end(core: Core, fields: Header) -> Header:
    """The coordinator says how its work ended; a word about an older order is no news."""
    _, image = roles.owned(core, fields)
    state = messages.text(fields, "state", 20)
    if state not in ("done", "failed", "stopped"):
        raise RemoteProtocolError(f"field state: {state!r} is none of done, failed, stopped")
    job = core.cluster.jobs.get(image.uuid)
    figures = fields.get("progress")
    if type(figures) is dict:
        core.progress[image.uuid] = {str(k): v for k, v in figures.items()}
    if job is not None and job.state == "running" and job.number == messages.integer(fields, "number"):
        reason = messages.text(fields, "reason", 1000, default="")
        core.commit([{"t": "job", "uuid": image.uuid, "state": state, "reason": reason}], "sync end")
    return {}


# --- who does it


def tick(core: Core) -> None:
    """Once a second: every order has a coordinator, or one is looked for."""
    for uuid, job in core.cluster.jobs.items():
        if job.state == "running":
            attend(core, uuid)


def attend(core: Core, uuid: str) -> None:
    """Give the role to a node with in-sync replicas where nobody has it."""
    image = core.cluster.images.get(uuid)
    if image is None or image.writer or uuid in core.acquiring or uuid in core.revoked:
        return
    pending = core.pending.get(uuid)
    if pending is not None and roles.undecided(core, pending):
        return  # somebody is about to have it
    candidates = [n for n in coordinators(image) if core.up(n)]
    if image.former in candidates:
        candidates = [image.former]  # its guest is likely to go on
    if not candidates:
        holders = ", ".join(coordinators(image)) or "nobody"
        core.sync_reason[uuid] = f"no node with in-sync blocks can be reached (needed: {holders})"
        return
    tries = core.sync_tries.get(uuid, 0)
    core.sync_tries[uuid] = tries + 1
    core.acquiring[uuid] = node = candidates[tries % len(candidates)]
    core.ports.spawn("acquire", _acquire(core, uuid, node))


def coordinators(image: Image) -> list[str]:
    """Nodes with in-sync replicas, the one with the most first."""
    held = {n: sum(b - a + 1 for a, b, r in where if r.status == IN_SYNC) for n, where in image.locations.items()}
    return sorted((n for n, blocks in held.items() if blocks), key=lambda n: (-held[n], n))


async def _acquire(core: Core, uuid: str, node: str) -> None:
    try:
        await core.call(node, "acquire", {"image": uuid}, core.config.io_timeout)
        core.sync_reason.pop(uuid, None)
        core.sync_tries.pop(uuid, None)
    except UkaiError as e:
        core.sync_reason[uuid] = f"{node} could not take the coordinator's role: {e.message}"
    finally:
        core.acquiring.pop(uuid, None)


def describe(core: Core, job: Job) -> dict[str, Any]:
    """A job as ukai-ctl sees it: the order, and the figures of its coordinator's last beat."""
    image = core.cluster.images.get(job.uuid)
    writer = image.writer if image is not None else ""
    figures = core.progress.get(job.uuid, {})
    state, reason = job.state, job.reason
    if state == "running":
        session = core.sessions.get(writer)
        live = session.progress.get(job.uuid) if session is not None else None
        if not writer:
            state = "waiting"
            reason = core.sync_reason.get(job.uuid) or "a coordinator is being looked for"
        elif not core.up(writer):
            state, reason = "waiting", f"the coordinator {writer} can't be reached"
        elif live is not None:
            reason = str(live.get("reason") or "")
            state = "waiting" if reason or live.get("state") == "waiting" else "running"
    return {
        "image": image.name if image is not None else job.uuid,
        "number": job.number,
        "state": state,
        "reason": reason,
        "nodes": list(job.nodes),
        "ranges": [list(r) for r in job.ranges],
        "started": job.started,
        "coordinator": writer if job.state == "running" else str(figures.get("coordinator", "")),
        **{key: figures.get(key, None if key == "eta" else 0) for key in FIGURES},
    }
