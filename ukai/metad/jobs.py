"""Orders to bring replicas in sync (R11), and to compare those that are.

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
    "blocks_done", "blocks_differed", "rate_limit",
)  # fmt: skip
RATE_MAX = 2**40


def start(core: Core, fields: Header) -> Header:
    """A resync.  Raises NotFound, Busy when an order is under way, Refused."""
    image, order = _read(core, fields, "sync")
    job = core.cluster.jobs.get(image.uuid)
    running = job is not None and job.state == "running"
    if job is not None and running and (job.reason != roles.RECONCILE or job.after):
        raise _busy(image, job)
    left = replicas.unsynced(image, order["nodes"] or image.locations, wanted_blocks(image, fields))
    order["state"] = "running" if left else "done"
    order["reason"] = "" if left else "nothing was out-of-sync"
    if job is not None and running:
        order["number"] = job.number  # widened, not ended
    return _commit(core, image, order, "sync start")


def verify(core: Core, fields: Header) -> Header:
    """A comparison of in-sync replicas.  Raises NotFound, Busy when an order is under way, Refused."""
    image, order = _read(core, fields, "verify")
    job = core.cluster.jobs.get(image.uuid)
    if job is not None and job.state == "running":
        if job.reason != roles.RECONCILE or job.after:
            raise _busy(image, job)
        order = {"t": "job", "uuid": image.uuid, "after": {k: v for k, v in order.items() if k != "t"}}
    return _commit(core, image, order, "verify start")


def _read(core: Core, fields: Header, kind: str) -> tuple[Image, Change]:
    """The image of an order, and the order as it begins.  Raises NotFound, Refused, UsageError."""
    image = core.named(fields)
    if not image.online:
        raise Refused(f"image {image.name} is offline; bring it back with: ukai-ctl add_image {image.name}")
    nodes = messages.texts(fields, "nodes")
    for node in nodes:
        if node not in image.locations:
            raise NotFound(f"node {node:.64} is no location of image {image.name}")
    wanted_blocks(image, fields)
    order = Job(
        uuid=image.uuid,
        kind=kind,
        nodes=list(nodes),
        ranges=[list(r) for r in messages.ranges(fields, "ranges")],
        number=core.cluster.seq + 1,
        started=core.ports.wall(),
        rate=_rate(fields),
    )
    return image, {"t": "job", **order.row()}


def _busy(image: Image, job: Job) -> Busy:
    what = "verify" if job.after or job.kind == "verify" else "resync"
    return Busy(
        f"a {what} of image {image.name} is under way; see: ukai-ctl sync status {image.name}, "
        f"or stop it with: ukai-ctl sync stop {image.name}"
    )


def _commit(core: Core, image: Image, order: Change, cause: str) -> Header:
    core.progress.pop(image.uuid, None)
    core.sync_reason.pop(image.uuid, None)
    core.commit([order], cause)
    job = core.cluster.jobs[image.uuid]
    if job.state == "running":
        attend(core, image.uuid)
    return {"job": describe(core, job)}


def _rate(fields: Header) -> int:
    value = fields.get("rate", -1)
    if type(value) is not int or not -1 <= value <= RATE_MAX:
        raise UsageError(f"rate: bytes per second, 0 for no limit or -1 for the nodes' setting, not {value!r:.40}")
    return value


def _job(core: Core, image: Image) -> Job:
    job = core.cluster.jobs.get(image.uuid)
    if job is None:
        raise NotFound(
            f"there is no resync or verify of image {image.name}; begin one with: ukai-ctl sync start {image.name}"
        )
    return job


def stop(core: Core, fields: Header) -> Header:
    image = core.named(fields)
    job = _job(core, image)
    shown = describe(core, job)
    if job.state == "running":
        over = {"state": "stopped", "reason": "stopped by the administrator"}
        if job.after:  # what metad itself has ordered goes on
            core.commit([{"t": "job", "uuid": image.uuid, "after": {}}], "sync stop")
            return {"job": shown | over}
        core.commit([{"t": "job", "uuid": image.uuid, **over}], "sync stop")
    return {"job": describe(core, core.cluster.jobs[image.uuid])}


def rate(core: Core, fields: Header) -> Header:
    image = core.named(fields)
    job = _job(core, image)
    limit = {"rate": _rate(fields)}
    change: Change = {"t": "job", "uuid": image.uuid, **({"after": {**job.after, **limit}} if job.after else limit)}
    core.commit([change], "sync rate")
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
    job = _current(core, image, fields)
    if job is None:
        return {}
    figures = _figures(fields)
    change: Change = {"t": "job", "uuid": image.uuid, "state": state, "done": figures}
    change["reason"] = messages.text(fields, "reason", 1000, default="")
    core.progress[image.uuid] = figures
    if job.after:
        change = {"t": "job", **job.after}
        core.progress.pop(image.uuid, None)
    core.commit([change], f"{job.kind} end")
    return {}


def note(core: Core, fields: Header) -> Header:
    """Figures that the next coordinator of the order begins with."""
    _, image = roles.owned(core, fields)
    if _current(core, image, fields) is not None:
        figures = _figures(fields) | {"at": messages.integer(fields, "at")}
        core.commit([{"t": "job", "uuid": image.uuid, "done": figures}], "verify goes on")
    return {}


def _current(core: Core, image: Image, fields: Header) -> Job | None:
    """The running order that a coordinator speaks of."""
    job = core.cluster.jobs.get(image.uuid)
    running = job is not None and job.state == "running" and job.number == messages.integer(fields, "number")
    return job if running else None


def _figures(fields: Header) -> dict[str, Any]:
    value = fields.get("progress")
    return {str(k): v for k, v in value.items()} if type(value) is dict else {}


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
    figures = core.progress.get(job.uuid) or job.done
    state, reason = job.state, job.reason
    if job.after:
        job = Job(**job.after)
        figures, state = job.done, "waiting"
    elif state == "running":
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
        "kind": job.kind,
        "number": job.number,
        "state": state,
        "reason": reason,
        "nodes": list(job.nodes),
        "ranges": [list(r) for r in job.ranges],
        "started": job.started,
        "coordinator": writer if job.state == "running" else str(figures.get("coordinator", "")),
        **{key: figures.get(key, None if key == "eta" else 0) for key in FIGURES},
    }
