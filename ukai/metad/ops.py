"""All operations that metad answers, in one table.

An operation that waits for nothing is a plain function, so that a burst of them shares one commit; one that asks
other nodes is a coroutine.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from ukai import messages
from ukai.errors import RemoteProtocolError
from ukai.messages import Header
from ukai.metad import accept, blocks, images, jobs, placement, registration, reports, roles
from ukai.metad.core import Core

Reply = Header | Coroutine[Any, Any, Header]


class Op(NamedTuple):
    """An operation, and whether it is answered while the metadata is older than what a node has seen (R12)."""

    run: Callable[[Core, Header], Reply]
    when_behind: bool = False


def _snapshot(core: Core, fields: Header) -> Header:
    """The server adds the snapshot itself when the reply goes out."""
    return {"inc": core.inc}


def _catchup(core: Core, fields: Header) -> Header:
    return {}


OPS: dict[str, Op] = {
    # blockd
    "register": Op(registration.register, True),  # refuses by itself, with both numbers
    "beat": Op(registration.beat, True),  # as above
    "grant": Op(roles.grant),
    "grant.commit": Op(roles.grant_commit),
    "release": Op(roles.release),
    "activate": Op(blocks.activate),
    "retire": Op(blocks.retire),
    "mark": Op(blocks.mark),
    "sync.begin": Op(blocks.sync_begin),
    "sync.finish": Op(blocks.sync_finish),
    "job.note": Op(jobs.note),
    "job.end": Op(jobs.end),
    # blockd and frontend
    "snapshot": Op(_snapshot),
    "catchup": Op(_catchup),
    # ukai-ctl
    "ping": Op(reports.ping, True),
    "image.create": Op(images.create),
    "image.add": Op(images.add),
    "image.set": Op(images.alter),
    "image.offline": Op(images.offline),
    "image.remove": Op(images.remove),
    "image.list": Op(reports.image_list, True),
    "image.show": Op(reports.image_show, True),
    "image.accept": Op(accept.image_accept),
    "node.accept": Op(accept.node_accept),
    "metadata.show": Op(accept.metadata_show, True),
    "metadata.accept": Op(accept.metadata_accept, True),
    "location.add": Op(placement.location_add),
    "location.remove": Op(placement.location_remove),
    "hypervisor.add": Op(placement.hypervisor_add),
    "hypervisor.remove": Op(placement.hypervisor_remove),
    "migrate": Op(placement.migrate),
    "sync.start": Op(jobs.start),
    "verify.start": Op(jobs.verify),
    "sync.stop": Op(jobs.stop),
    "sync.rate": Op(jobs.rate),
    "sync.status": Op(jobs.status, True),
    "node.list": Op(reports.node_list, True),
    "errors": Op(reports.errors, True),
    "status": Op(reports.status, True),
}


def begin(core: Core, op: str, fields: Header) -> Reply:
    """Run an operation, or give the coroutine that does.  Raises UkaiError."""
    entry = OPS.get(op)
    if entry is None:
        raise RemoteProtocolError(f"operation {messages.show(op)} does not exist")
    if not entry.when_behind:
        core.check_current()
    return entry.run(core, fields)
