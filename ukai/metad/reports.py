"""What ukai-ctl is shown."""

from __future__ import annotations

from typing import Any

from ukai import __version__
from ukai.messages import Header
from ukai.metad import jobs, replicas
from ukai.metad.core import Core
from ukai.model import STATUS_NAMES, Image

PLACEMENT_LIMIT = 20_000
"""Ranges of one image that are shown; more are counted in ``placement_omitted``."""


def counts(core: Core, image: Image, node: str) -> tuple[int, int, int]:
    """replicas.count(), remembered until the next change."""
    key = (image.uuid, node)
    found = core.counts.get(key)
    if found is None:
        found = core.counts[key] = replicas.count(image, node)
    return found


def summary(core: Core, image: Image) -> dict[str, Any]:
    places = {n: counts(core, image, n) for n in sorted(image.locations)}
    health = "ok"
    if not image.online:
        health = "offline"
    elif any(c[1] for c in places.values()):
        health = "syncing"
    elif any(c[2] for c in places.values()):
        health = "degraded"
    return {
        "name": image.name,
        "uuid": image.uuid,
        "size": image.size,
        "block_size": image.block_size,
        "blocks": image.block_count,
        "online": image.online,
        "writer": image.writer,
        "epoch": image.epoch,
        "replication": image.replication,
        "checksum": image.checksum,
        "hypervisors": list(image.hypervisors),
        "locations": {n: {"in_sync": c[0], "syncing": c[1], "out_of_sync": c[2]} for n, c in places.items()},
        "open": {n: s.opens[image.uuid] for n, s in core.sessions.items() if s.opens.get(image.uuid) and core.up(n)},
        "health": health,
    }


def image_list(core: Core, fields: Header) -> Header:
    return {"images": _summaries(core)}


def _summaries(core: Core) -> list[dict[str, Any]]:
    return [summary(core, core.cluster.images[uuid]) for _, uuid in sorted(core.cluster.names.items())]


def image_show(core: Core, fields: Header) -> Header:
    image = core.named(fields)
    shown = summary(core, image)
    placement: list[dict[str, Any]] = []
    omitted = 0
    for first, last, state in image.segments():
        if len(placement) == PLACEMENT_LIMIT:
            omitted += 1
            continue
        held = {
            node: {
                "status": r.status,
                "status_name": STATUS_NAMES[r.status],
                "generation": r.generation,
                "reason": r.reason,
            }
            for node, r in sorted(state.items())
        }
        if placement and placement[-1]["replicas"] == held:
            placement[-1]["last"] = last
        else:
            placement.append({"first": first, "last": last, "replicas": held})
    job = core.cluster.jobs.get(image.uuid)
    shown |= {
        "placement": placement,
        "placement_omitted": omitted,
        "active": [list(r) for r in image.active],
        "job": jobs.describe(core, job) if job is not None else None,
    }
    return {"image": shown}


def node_list(core: Core, fields: Header) -> Header:
    return {"nodes": _nodes(core)}


def _nodes(core: Core) -> list[dict[str, Any]]:
    held: dict[str, int] = {}
    for image in core.cluster.images.values():
        for node in image.locations:
            held[node] = held.get(node, 0) + 1
    return [_node(core, n, held.get(n, 0)) for n in sorted({*core.cluster.nodes, *core.refused})]


def _node(core: Core, address: str, images: int) -> dict[str, Any]:
    session = core.sessions.get(address)
    known = core.cluster.nodes.get(address)
    if core.up(address) and session is not None:
        state, since, reason = "up", session.since, ""
    elif (down := core.down_reason(address)) is not None:
        state, (since, reason) = "down", down
    else:
        state, since, reason = "unknown", core.started_wall, "metad was just started"
    return {
        "address": address,
        "state": state,
        "since": since,
        "reason": reason,
        "store_id": known.store_id if known is not None else "",
        "space_free": session.space[0] if session is not None else 0,
        "space_total": session.space[1] if session is not None else 0,
        "images": images,
    }


def errors(core: Core, fields: Header) -> Header:
    return {"nodes": _errors(core)}


def _errors(core: Core) -> list[dict[str, Any]]:
    """Nodes that don't answer metad, and those that don't answer a coordinator."""
    found: dict[str, dict[str, Any]] = {}
    for address in sorted({*core.cluster.nodes, *core.refused}):
        if (down := core.down_reason(address)) is not None:
            found[address] = {"address": address, "since": down[0], "reason": down[1], "reported_by": [core.node]}
    for reporter, session in sorted(core.sessions.items()):
        for address, since, reason in session.down if core.up(reporter) else ():
            entry = found.setdefault(address, {"address": address, "since": since, "reason": reason, "reported_by": []})
            entry["since"] = min(entry["since"], since)
            entry["reported_by"].append(reporter)
    return [found[address] for address in sorted(found)]


def status(core: Core, fields: Header) -> Header:
    reply: Header = {
        "cluster_id": core.cluster.cluster_id,
        "seq": core.cluster.seq,
        "metad": {"address": core.node, "version": __version__, "since": core.started_wall},
        "nodes": _nodes(core),
        "images": _summaries(core),
        "jobs": [jobs.describe(core, job) for job in core.cluster.jobs.values()],
        "errors": _errors(core),
    }
    if core.behind:
        reply["behind"] = dict(core.behind)
    return reply


def ping(core: Core, fields: Header) -> Header:
    return {"version": __version__, "node": core.node, "seq": core.cluster.seq}
