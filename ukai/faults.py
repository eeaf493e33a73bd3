"""Named fault points: where tests kill, stop, delay or fail a process, step by step.

``point`` and ``pause`` do nothing until something that acts is handed in (``arm``), which the setting ``fault_dir``
does at the start of a process.  This module itself can do nothing: decisions stay decisions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

POINTS: dict[str, str] = {
    # the writer's blockd: grant and release
    "grant.ask": "the role is wanted, metad not asked yet",
    "grant.reserved": "metad has reserved an epoch, no replica knows it",
    "grant.fenced": "replicas have stored the epoch, metad does not know that",
    "grant.held": "metad has made this node the writer, nothing was written",
    "release.begin": "metad has asked for the role, writes are under way",
    "release.drained": "no write is under way, nothing is flushed",
    "release.flushed": "all is flushed, metad does not know that",
    # the writer's blockd: a write
    "activate.ask": "a cold block is to be written, not announced yet",
    "activate.announced": "metad has committed that it is active, no replica has its generation",
    "activate.stamped": "replicas have stored the generation, nothing was written",
    "write.sent": "sent to the other replicas, the own copy not written",
    "write.local": "the own copy is written, no answer is looked at",
    "write.answered": "every replica has answered, the guest has not",
    "mark.ask": "a replica failed, metad does not know that",
    "mark.committed": "metad has committed the marks, the guest has no answer",
    "flush.begin": "an fsync has taken the set of unflushed blocks",
    "flush.answered": "every replica has flushed or failed, the guest has no answer",
    "retire.flushed": "blocks to be retired are flushed, metad has not been asked",
    "retire.done": "metad has retired them, this node does not know that",
    # the coordinator's blockd: a resync
    "sync.renewed": "files at the target are ready, nothing is syncing",
    "sync.begun": "blocks are syncing, nothing was compared",
    "sync.compared": "hashes are compared, nothing was copied",
    "sync.read": "a chunk was read from the source, its part of the block is locked",
    "sync.sent": "a chunk is on its way, the lock is gone",
    "sync.complete": "a block is whole, the target has not flushed it",
    "sync.finish": "the target has flushed blocks, metad does not know that",
    "sync.finished": "metad has made blocks in-sync",
    # a replica's blockd
    "replica.fence": "a higher epoch is to be stored",
    "replica.fenced": "it is stored, not answered",
    "replica.stamp": "a generation is to be stored",
    "replica.write": "a write has come, its file is untouched",
    "replica.written": "its file is written, not answered",
    "replica.flush": "an fdatasync is asked for",
    "replica.flushed": "it is done, not answered",
    "replica.renew": "files for a resync are asked for",
    "replica.complete": "a block of a resync is to be completed",
    # every blockd: registration
    "register.ask": "what the node holds is read, metad has not been told",
    "register.answered": "metad has compared, the node has not stored its serial",
    "register.stored": "the serial is stored, no session is accepted yet",
    # metad
    "metad.grant": "an epoch is asked for",
    "metad.displace": "the present writer is to be asked to release",
    "metad.displaced": "it has answered or was waited out, nothing is committed",
    "metad.commit": "replicas are fenced, the writer is not committed",
    "metad.release": "a writer gives the role back",
    "metad.activate": "blocks are to become active",
    "metad.retire": "blocks are to be retired",
    "metad.mark": "replicas are to go out-of-sync",
    "metad.sync-begin": "replicas are to be syncing",
    "metad.sync-finish": "replicas are to be in-sync",
    "metad.register": "a blockd is to be compared",
    "metad.store": "changes are decided, not stored",
    "metad.stored": "changes are stored, nobody knows that",
}
"""Each is used once, in the module that takes the step."""

FAILING = frozenset({"write.sent", "write.local", "replica.fence", "replica.write", "replica.written", "replica.stamp",
                     "replica.renew", "replica.complete", "metad.store"})  # fmt: skip
"""Steps that may fail by themselves, with DiskError: only there an error can be wanted."""

Act = Callable[[str], float]
"""Does what is wanted at a point and returns seconds to wait, mostly 0.  Raises UkaiError where a failure is wanted."""

_act: Act | None = None


def arm(act: Act) -> None:
    """From now on the points of this process act."""
    global _act
    _act = act


def point(name: str) -> None:
    """A step that can't wait: a delay has no effect here.  Raises UkaiError."""
    if _act is not None:
        _act(name)


async def pause(name: str) -> None:
    """A step that may be delayed, while the rest of the process goes on.  Raises UkaiError."""
    if _act is not None and (delay_s := _act(name)) > 0:
        await asyncio.sleep(delay_s)
