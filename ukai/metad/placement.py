"""Where the blocks are and which hypervisors may open an image, as ukai-ctl orders it."""

from __future__ import annotations

import asyncio

from ukai import messages
from ukai.errors import Busy, Exists, LastCopy, NotFound, Refused, UkaiError, Unreachable
from ukai.messages import Header
from ukai.metad import replicas, reports, roles
from ukai.metad.core import Core, patience, wanted_blocks
from ukai.model import OUT_OF_SYNC, REMOVED, Change, Image
from ukai.ranges import show

NEW_LOCATION = "new location"


def _node(core: Core, fields: Header) -> str:
    return core.known_node(messages.text(fields, "node", 64))


async def location_add(core: Core, fields: Header) -> Header:
    """New replicas, out-of-sync until a resync fills them.  Raises NotFound, Exists, Unreachable, a node's error."""
    image, node = core.named(fields), _node(core, fields)
    wanted = wanted_blocks(image, fields)
    shape: Header = {"uuid": image.uuid, "name": image.name, "size": image.size, "block_size": image.block_size}
    new = _missing(image, node, wanted)
    request: Header = {**shape, "checksum": image.checksum, "mode": "join", "ranges": [list(r) for r in new]}
    await core.call(node, "prepare", request, patience(fields))
    image = core.image(image.uuid)
    new = _missing(image, node, wanted)
    rows = [[a, b, OUT_OF_SYNC, 0, NEW_LOCATION] for a, b in new]
    core.commit([{"t": "replicas", "uuid": image.uuid, "node": node, "ranges": rows}], f"location add {node}")
    notes = [f"bring it in sync with: ukai-ctl sync start {image.name} --node {node}"]
    return {"image": reports.summary(core, core.image(image.uuid)), "notes": notes}


def _missing(image: Image, node: str, wanted: list[tuple[int, int]]) -> list[tuple[int, int]]:
    where = image.locations.get(node)
    new = wanted if where is None else [gap for a, b in wanted for gap in where.gaps(a, b)]
    if not new:
        raise Exists(f"node {node} holds these blocks of image {image.name} already")
    return new


async def location_remove(core: Core, fields: Header) -> Header:
    """Take replicas away, never the last in-sync one (R9), and delete their files unless told otherwise.

    Raises NotFound, LastCopy (``details.ranges``).
    """
    image = core.named(fields)
    node = messages.text(fields, "node", 64)
    if image.replication == "flush" and image.writer == node and core.up(node):
        async with core.lock(image.uuid):  # what it has acknowledged early must be elsewhere too
            image = core.named(fields)
            if image.writer == node:
                core.commit(await roles.drained(core, image, patience(fields) * 0.5), f"role drained for {node}")
    image = core.named(fields)
    where = image.locations.get(node)
    wanted = wanted_blocks(image, fields)
    held = [(a, b) for first, last in wanted for a, b, _ in where.within(first, last)] if where is not None else []
    if not held:
        raise NotFound(f"node {node:.64} holds none of these blocks of image {image.name}")
    if last := replicas.last_copies(image, node, held):
        text = show((a, b) for a, b in last[:10]) + (" and more" if len(last) > 10 else "")
        raise LastCopy(
            f"node {node} holds the last in-sync copy of blocks {text} of image {image.name}; bring another location "
            f"in sync first: ukai-ctl sync start {image.name}",
            ranges=last[:10_000],
        )
    uuid, name = image.uuid, image.name
    rows = [[a, b, REMOVED, 0, ""] for a, b in held]
    changes = roles.lost_with(image, node, held)
    core.commit([*changes, {"t": "replicas", "uuid": uuid, "node": node, "ranges": rows}], f"location remove {node}")
    notes: list[str] = []
    if messages.flag(fields, "keep_data"):
        notes.append(f"the block files on {node} were kept")
    else:
        order: Header = {"uuid": uuid, "name": name}
        if node in core.image(uuid).locations:
            order["ranges"] = [list(r) for r in held]
        try:
            await core.call(node, "drop", order, patience(fields))
        except UkaiError as e:
            notes.append(f"the block files on {node} were not deleted: {e.message}")
    return {"image": reports.summary(core, core.image(uuid)), "notes": notes}


async def hypervisor_add(core: Core, fields: Header) -> Header:
    image, node = core.named(fields), _node(core, fields)
    if node in image.hypervisors:
        raise Exists(f"node {node} is a hypervisor of image {image.name} already")
    change: Change = {"t": "image", "uuid": image.uuid, "hypervisors": [*image.hypervisors, node]}
    core.commit([change], f"hypervisor add {node}")
    notes: list[str] = []
    try:
        await core.call(node, "close", {"image": image.uuid, "reopen": True}, patience(fields))
    except NotFound:
        pass  # it never held the image closed
    except Unreachable as e:
        core.reopen.setdefault(node, set()).add(image.uuid)
        notes.append(e.message)
    return {"image": reports.summary(core, core.image(image.uuid)), "notes": notes}


async def hypervisor_remove(core: Core, fields: Header) -> Header:
    """Raises NotFound, Busy while the image is open there, Unreachable unless forced."""
    image = core.named(fields)
    node = messages.text(fields, "node", 64)
    uuid, force, timeout_s = image.uuid, messages.flag(fields, "force"), patience(fields)
    if node not in image.hypervisors:
        raise NotFound(f"node {node:.64} is no hypervisor of image {image.name}")
    if len(image.hypervisors) == 1:
        raise Refused(f"node {node} is the only hypervisor of image {image.name}; add another one first")
    notes: list[str] = []
    async with core.lock(uuid):
        try:
            await core.call(node, "close", {"image": uuid}, timeout_s * 0.3)
        except NotFound:
            pass  # never opened there
        except UkaiError as e:
            if not force:
                if isinstance(e, Busy):
                    raise Busy(f"image {image.name} is open on {node}; stop the machine that uses it first") from e
                raise
            notes.append(e.message)
        if core.image(uuid).writer == node:
            await _displace_within(core, uuid, "", timeout_s * 0.6)
        image = core.image(uuid)
        left = [h for h in image.hypervisors if h != node]
        core.commit([{"t": "image", "uuid": uuid, "hypervisors": left}], f"hypervisor remove {node}")
    return {"image": reports.summary(core, core.image(uuid)), "notes": notes}


async def _displace_within(core: Core, uuid: str, node: str, timeout_s: float) -> None:
    """Take the role from the present writer.  Raises Unreachable when that takes longer than the asker waits."""
    image = core.image(uuid)
    try:
        await asyncio.wait_for(roles.displace(core, uuid, node, io=True), timeout_s)
    except TimeoutError:
        raise Unreachable(
            f"the writer {image.writer} of image {image.name} did not release it in time; try again with a longer "
            "--timeout"
        ) from None


async def migrate(core: Core, fields: Header) -> Header:
    """Move the writer role (R2); from a writer that is silent only with ``force``.

    Raises Refused, Unreachable, or what the target answers.
    """
    image, node = core.named(fields), _node(core, fields)
    uuid, timeout_s = image.uuid, patience(fields)
    if not image.online:
        raise Refused(f"image {image.name} is offline")
    if node not in image.hypervisors:
        raise Refused(
            f"node {node} is no hypervisor of image {image.name}; add it with: "
            f"ukai-ctl hypervisor add {image.name} {node}"
        )
    if image.writer == node:
        return {"image": reports.summary(core, image), "notes": [f"{node} is the writer already"]}
    if not core.up(node):
        raise Unreachable(f"node {node} can't be reached: its blockd is down")
    if image.writer and not core.up(image.writer) and not messages.flag(fields, "force"):
        raise Refused(
            f"the writer {image.writer} of image {image.name} can't be asked to finish; be sure that no machine runs "
            "there, then add --force"
        )
    async with core.lock(uuid):
        if core.image(uuid).writer not in ("", node):
            await _displace_within(core, uuid, node, timeout_s * 0.6)
    await core.call(node, "acquire", {"image": uuid, "purpose": "io"}, timeout_s * 0.4)
    return {"image": reports.summary(core, core.image(uuid)), "notes": []}
