"""Making, adding, taking offline and forgetting images, as ukai-ctl orders it."""

from __future__ import annotations

from typing import Any

from ukai import messages
from ukai.errors import Busy, Exists, NotFound, RemoteProtocolError, UkaiError, Unreachable, UsageError
from ukai.messages import Header
from ukai.metad import adoption, reports, roles
from ukai.metad.core import Core, patience
from ukai.model import IN_SYNC, Change, Image, check_name, check_sizes, round_up
from ukai.ranges import RangeMap, RangeSet

DEFAULT_BLOCK_SIZE_BYTES = 64 * 2**20
REPLICATIONS = ("sync", "flush")


async def create(core: Core, fields: Header) -> Header:
    """Make an image: the nodes first, then one commit.

    Raises UsageError, Exists, NotFound, Unreachable or a node's error; then nothing of the image is left.
    """
    name = check_name(messages.text(fields, "name", 200))
    asked, block_size = _number(fields, "size"), _number(fields, "block_size", 0)
    size = round_up(asked)
    notes = [] if size == asked else [f"the size was rounded up from {asked} to {size} bytes, a multiple of 4096"]
    block_size = block_size or min(DEFAULT_BLOCK_SIZE_BYTES, max(size, 1))
    check_sizes(size, block_size)
    locations = _nodes(core, fields, "locations")
    if not locations:
        raise UsageError("at least one location is wanted: a node that holds the blocks")
    hypervisors = _nodes(core, fields, "hypervisors") or list(locations)
    replication = _replication(fields)
    checksum = messages.flag(fields, "checksum")
    _check_free(core, name)
    uuid = core.ports.new_uuid()
    core.creating.add(name)
    try:
        shape: Header = {"uuid": uuid, "name": name, "size": size, "block_size": block_size, "checksum": checksum}
        last = -(-size // block_size) - 1
        await _prepare(core, locations, {**shape, "mode": "create", "ranges": [[0, last]]}, patience(fields))
        row: Change = {**shape, "hypervisors": hypervisors, "online": True, "replication": replication}
        row["t"] = "image"
        held = [[0, last, IN_SYNC, 0, ""]]
        places = [{"t": "replicas", "uuid": uuid, "node": n, "ranges": held} for n in locations]
        core.commit([row, *places], "image create")
    finally:
        core.creating.discard(name)
    return {"image": reports.summary(core, core.image(uuid)), "notes": notes}


def _replication(fields: Header) -> str:
    replication = messages.text(fields, "replication", 20, default="sync") or "sync"
    if replication not in REPLICATIONS:
        raise UsageError(f"replication {replication!r} does not exist; choose {' or '.join(REPLICATIONS)}")
    return replication


async def alter(core: Core, fields: Header) -> Header:
    """Change how an image is replicated.  Raises UsageError, Busy, Unreachable; then nothing has changed."""
    image = core.named(fields)
    uuid, replication = image.uuid, _replication(fields)
    async with core.lock(uuid):
        image = core.image(uuid)
        if image.replication == replication:
            return {"image": reports.summary(core, image), "notes": [f"replication is {replication} already"]}
        change: Change = {"t": "image", "uuid": uuid, "replication": replication}
        changes = [change]
        if replication == "sync":  # what was acknowledged early must be everywhere when no rule looks after it any more
            if image.writer:
                changes += await roles.drained(core, image, patience(fields) * 0.8)
            elif len(image.active):
                raise Busy(
                    f"blocks of image {image.name} were being written when its last writer stopped; they are compared "
                    f"when it is opened, or with: ukai-ctl sync start {image.name} --wait"
                )
        core.commit(changes, f"image set replication {replication}")
    return {"image": reports.summary(core, core.image(uuid)), "notes": []}


def _check_free(core: Core, name: str) -> None:
    if name in core.cluster.names:
        raise Exists(f"image {name} exists; choose another name, or remove it with: ukai-ctl image remove {name}")
    if name in core.creating:
        raise Exists(f"image {name} is just being made by another command")


def _number(fields: Header, name: str, default: int | None = None) -> int:
    value = fields.get(name, default)
    if type(value) is not int:
        raise UsageError(f"{name}: a number of bytes is wanted, not {value!r:.50}")
    if value < 0:
        raise UsageError(f"{name}: {value} bytes are not possible")
    return value


def _nodes(core: Core, fields: Header, name: str) -> list[str]:
    """Known nodes, each once.  Raises UsageError, NotFound."""
    found = messages.texts(fields, name)
    for node in found:
        core.known_node(node)
        if found.count(node) > 1:
            raise UsageError(f"node {node} is named twice among the {name}")
    return list(found)


async def _prepare(core: Core, nodes: list[str], fields: Header, timeout_s: float) -> dict[str, Header]:
    """Prepare all nodes, or none: a failure is undone everywhere and raised."""
    replies = await core.call_all([(n, "prepare", fields) for n in nodes], timeout_s * 0.7)
    good = {n: r for n, r in replies.items() if not isinstance(r, UkaiError)}
    for reply in replies.values():
        if isinstance(reply, UkaiError):
            # one that did not answer may have done it all the same; drop touches nothing but this uuid
            undone = [n for n in nodes if n in good or isinstance(replies[n], Unreachable)]
            await _undo(core, undone, fields, timeout_s * 0.25)
            raise reply
    return good


async def _undo(core: Core, nodes: list[str], fields: Header, timeout_s: float) -> None:
    op = "drop" if fields["mode"] == "create" else "prepare"
    shape = {k: v for k, v in fields.items() if k not in ("mode", "ranges")}
    await core.call_all([(n, op, shape if op == "drop" else {**fields, "mode": "forget"}) for n in nodes], timeout_s)


async def add(core: Core, fields: Header) -> Header:
    """Bring an image online: a known one that is offline, or the one described in ``metadata_root``.

    Raises NotFound, UsageError, Exists, Unreachable or a node's error; then nothing has changed.
    """
    name = check_name(messages.text(fields, "name", 200))
    timeout_s = patience(fields)
    if name in core.cluster.names:
        return await _bring_back(core, core.cluster.by_name(name), timeout_s)
    _check_free(core, name)
    core.creating.add(name)
    try:
        return await _adopt(core, name, timeout_s)
    finally:
        core.creating.discard(name)


async def _bring_back(core: Core, image: Image, timeout_s: float) -> Header:
    if image.online:
        raise Exists(f"image {image.name} is online already")
    uuid = image.uuid
    core.commit([{"t": "image", "uuid": uuid, "online": True}], "image add")
    notes = await reopen(core, uuid, timeout_s)
    return {"image": reports.summary(core, core.image(uuid)), "notes": notes}


async def _adopt(core: Core, name: str, timeout_s: float) -> Header:
    hand_made = await core.ports.read_hand_made(name)
    nodes = sorted(hand_made.status)
    for node in (*nodes, *hand_made.hypervisors):
        core.known_node(node)
    notes = (
        []
        if hand_made.size == round_up(hand_made.size)
        else [f"{hand_made.size} bytes are no multiple of 4096: QEMU refuses such an image with cache=none"]
    )
    uuid = core.ports.new_uuid()
    last = hand_made.block_count - 1
    shape: Header = {"uuid": uuid, "name": name, "size": hand_made.size, "block_size": hand_made.block_size}
    request: Header = {**shape, "mode": "adopt", "ranges": [[0, last]]}
    replies = await _prepare(core, nodes, request, timeout_s)
    try:
        present = {n: RangeSet(messages.ranges(r, "present", high=last)) for n, r in replies.items()}
        bad = {n: _bad(r, last) for n, r in replies.items()}
        generation = core.cluster.seq + 1
        rows = adoption.combine(hand_made, present, bad, generation)
        # the nodes note the generation first: a crash before the commit then leaves nothing that counts
        asked = [
            (n, "adopted", {"uuid": uuid, "ranges": r, "generation": generation})
            for n, r in adoption.usable(rows).items()
            if r
        ]
        for reply in (await core.call_all(asked, timeout_s * 0.25)).values():
            if isinstance(reply, UkaiError):
                raise reply
        row: Change = {"t": "image", **shape, "hypervisors": hand_made.hypervisors, "online": True}
        places = [{"t": "replicas", "uuid": uuid, "node": n, "ranges": r} for n, r in rows.items()]
        core.commit([row, *places], "image add")
    except UkaiError:
        await _undo(core, nodes, request, timeout_s * 0.1)
        raise
    notes += adoption.summary(rows)
    notes += [f"hypervisor {n} is down" for n in hand_made.hypervisors if not core.up(n)]
    return {"image": reports.summary(core, core.image(uuid)), "notes": notes}


def _bad(reply: Header, last: int) -> RangeMap[str]:
    out: RangeMap[str] = RangeMap()
    value = reply.get("bad", [])
    for row in value if type(value) is list else [None]:
        if type(row) is not list or len(row) != 3 or type(row[2]) is not str:
            raise RemoteProtocolError("field bad: [first, last, reason] is wanted")
        if type(row[0]) is not int or type(row[1]) is not int or not 0 <= row[0] <= row[1] <= last:
            raise RemoteProtocolError(f"field bad: {row!r:.50} is out of bounds")
        out.set(row[0], row[1], row[2])
    return out


async def offline(core: Core, fields: Header) -> Header:
    """Take an image offline; nothing is deleted.  Raises Busy while it is open somewhere."""
    image = core.named(fields)
    if not image.online:
        return {"image": reports.summary(core, image), "notes": [f"image {image.name} was offline already"]}
    notes = await take_offline(core, image.uuid, messages.flag(fields, "force"), patience(fields))
    return {"image": reports.summary(core, core.image(image.uuid)), "notes": notes}


async def take_offline(core: Core, uuid: str, force: bool, timeout_s: float) -> list[str]:
    """No handle, no writer, then offline.  Raises Busy, Unreachable."""
    async with core.lock(uuid):
        image = core.image(uuid)
        notes = [f"hypervisor {n} is down and was not asked" for n in image.hypervisors if not core.up(n)]
        asked = [(n, "close", {"image": uuid}) for n in image.hypervisors if core.up(n)]
        replies = await core.call_all(asked, timeout_s * 0.4)
        try:
            for node, reply in replies.items():
                if isinstance(reply, NotFound):
                    continue  # it has never heard of it, so nothing is open there
                if isinstance(reply, Busy):
                    raise Busy(f"image {image.name} is open on {node}; stop the machine that uses it first")
                if isinstance(reply, UkaiError):
                    if not force:
                        raise reply
                    notes.append(reply.message)
            image = core.image(uuid)
            if image.writer:
                await _stop_writer(core, image, force, timeout_s * 0.4, notes)
            image = core.image(uuid)
            row: Change = {"t": "image", "uuid": uuid, "online": False, "writer": "", "epoch": image.epoch + 1}
            row["former"] = image.former or image.writer
            changes = [row]
            job = core.cluster.jobs.get(uuid)
            if job is not None and job.state == "running":
                changes.append(
                    {"t": "job", "uuid": uuid, "state": "stopped", "reason": "image taken offline", "after": {}}
                )
            core.commit(changes, "image offline")
        except UkaiError:
            await core.call_all([(n, "close", {"image": uuid, "reopen": True}) for n, _, _ in asked], timeout_s * 0.15)
            raise
    return notes


async def _stop_writer(core: Core, image: Image, force: bool, timeout_s: float, notes: list[str]) -> None:
    """Let the writer release.  Raises Unreachable unless forced."""
    writer, uuid, epoch = image.writer, image.uuid, image.epoch
    try:
        reply = await core.call(writer, "release", {"image": uuid, "epoch": epoch}, timeout_s)
    except UkaiError as e:
        if not force:
            raise Unreachable(
                f"the writer {writer} of image {image.name} did not release it ({e.message}); --force takes the image "
                "offline all the same, its last blocks are then compared at the next start"
            ) from e
        notes.append(f"the writer {writer} did not release it: {e.message}")
        return
    image = core.image(uuid)
    if reply.get("clean") is True and image.epoch == epoch and (changes := roles.released(image, reply)):
        core.commit(changes, f"{writer} releases")


async def reopen(core: Core, uuid: str, timeout_s: float) -> list[str]:
    """Let the hypervisors open an image again; those out of reach hear it when they are back."""
    image = core.image(uuid)
    asked: list[tuple[str, str, Header]] = [(n, "close", {"image": uuid, "reopen": True}) for n in image.hypervisors]
    notes = []
    for node, reply in (await core.call_all(asked, timeout_s * 0.8)).items():
        if isinstance(reply, Unreachable):
            core.reopen.setdefault(node, set()).add(uuid)
            notes.append(reply.message)
    return notes


async def remove(core: Core, fields: Header) -> Header:
    """Offline; with ``delete_data`` forgotten, and its block files deleted wherever they can be reached."""
    image = core.named(fields)
    uuid, name = image.uuid, image.name
    timeout_s = patience(fields)
    notes: list[str] = []
    if image.online:
        notes += await take_offline(core, uuid, messages.flag(fields, "force"), timeout_s * 0.6)
    if not messages.flag(fields, "delete_data"):
        return {"notes": notes}
    image = core.image(uuid)
    nodes = sorted(image.locations)
    changes: list[dict[str, Any]] = [{"t": "job-drop", "uuid": uuid}] if uuid in core.cluster.jobs else []
    core.commit([*changes, {"t": "image-drop", "uuid": uuid}], "image remove")
    replies = await core.call_all([(n, "drop", {"uuid": uuid, "name": name}) for n in nodes], timeout_s * 0.35)
    for node, reply in replies.items():
        if isinstance(reply, UkaiError) and not isinstance(reply, NotFound):
            notes.append(f"its data on {node} could not be deleted: {reply.message}")
    return {"notes": notes}
