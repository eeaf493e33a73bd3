"""The coordinator of one image: the only one to send its writes to replicas, and in one order (R1, R6).

Here is what its parts share.  ``role.py`` gets and gives up the writer role, ``writes.py`` and ``reads.py`` serve the
guest, ``behind.py`` keeps what is acknowledged early, ``activity.py`` announces blocks, ``flush.py`` does fsyncs,
``marks.py`` tells metad of replicas that failed.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from ukai.blockd.activity import Activity
from ukai.blockd.behind import Behind
from ukai.blockd.flush import Flusher
from ukai.blockd.marks import INTERRUPTED, Marker, kept
from ukai.blockd.posted import Posts
from ukai.blockd.readable import Readable
from ukai.blockd.reads import Reads
from ukai.blockd.role import Role
from ukai.blockd.writes import Hot, Op, Writes
from ukai.errors import (
    Damaged,
    DiskError,
    NoSpace,
    NotCoordinator,
    NotFound,
    StaleEpoch,
    StaleHandle,
    StaleSession,
    Timeout,
    UkaiError,
)
from ukai.messages import Header
from ukai.model import Image
from ukai.ranges import join

if TYPE_CHECKING:
    from ukai.blockd.core import Core

log = logging.getLogger(__name__)


class Handle:
    """One open file of a frontend."""

    __slots__ = ("coordinator", "epoch", "frontend", "number", "opened_at")

    def __init__(self, number: int, frontend: str, coordinator: Coordinator, epoch: int, opened_at: float) -> None:
        self.number, self.frontend, self.coordinator, self.epoch = number, frontend, coordinator, epoch
        self.opened_at = opened_at


class Coordinator:
    """One image on this node: as its writer, or asking the writer."""

    def __init__(self, core: Core, uuid: str) -> None:
        self.core, self.uuid, self.own = core, uuid, core.node
        self.now = core.now
        self.epoch = 0
        self.held = False
        self.hindrance = ""
        """What stood in the way of a request last."""
        self.frozen: asyncio.Event | None = None
        """While the role is being given up: requests wait for it."""
        self.hot: dict[int, Hot] = {}
        self.readable = Readable(lambda: core.ports.new_page(uuid, self.image.block_count))
        self.inflight: dict[int, list[Op]] = {}
        """block → writes that are not acknowledged yet."""
        self.locks: dict[int, list[tuple[int, int, asyncio.Future[None]]]] = {}
        """block → parts that a resync compares and copies (R11)."""
        config = core.config
        self.role = Role(self)
        self.writes = Writes(self)
        self.behind = Behind(self, config.flush_window)
        self.posts = Posts(self)
        self.reads = Reads(self)
        self.activity = Activity(self, config.active_limit, config.active_idle, config.active_age)
        self.flusher = Flusher(self)
        self.marker = self.new_marker()
        self.idle_since = self.now()

    @property
    def image(self) -> Image:
        """Raises NotFound when the image is gone."""
        image = self.core.mirror.cluster.images.get(self.uuid)
        if image is None:
            raise NotFound("this image was removed")
        return image

    async def ask_metad(self, op: str, fields: Header) -> Header:
        """A request of the coordinator.  Raises UkaiError; the loss of the role is noted."""
        epoch = self.epoch
        try:
            return await self.core.metad(op, {"image": self.uuid, "epoch": epoch, **fields})
        except (StaleEpoch, NotCoordinator) as e:
            if epoch == self.epoch:
                self.role.lose(e.message)
            raise

    def new_marker(self) -> Marker:
        """For a new epoch."""
        return Marker(self._send_marks, self._suspect)

    async def mark(self, marks: list[tuple[int, str, str]]) -> list[tuple[int, str]]:
        """Mark (block, node, reason) (R4); returns those that stay because they are the last.  Raises UkaiError."""
        mine = {block for block, node, _ in marks if node == self.own and block in self.behind.ops}
        if not mine:
            return await self.marker.mark(marks)
        try:
            await self.behind.closed(mine)
            return await self.marker.mark(marks)
        finally:
            self.behind.reopen(mine)

    async def _send_marks(self, marks: list[list[Any]]) -> Header:
        reply = await self.ask_metad("mark", {"marks": marks})
        stays = kept(reply)
        image = self.core.mirror.cluster.images.get(self.uuid)
        for node, first, last, reason in marks:
            blocks = range(first, last + 1)
            for a, b in join([i for i in blocks if (node, i) in stays]):
                log.error("image %s: last copy, blocks %s-%s at node %s: %s", self.name(), a, b, node, reason)
            if image is None or node not in image.locations:
                continue  # it was removed meanwhile
            level = logging.INFO if reason == INTERRUPTED else logging.WARNING
            for a, b in join([i for i in blocks if (node, i) not in stays]):
                log.log(level, "image %s: blocks %s-%s at %s out-of-sync: %s", image.name, a, b, node, reason)
        return reply

    async def nowhere(self, block: int, errors: dict[str, UkaiError]) -> UkaiError:
        """What to say where each in-sync replica of a block failed; a last one keeps its error as reason (R9)."""
        error = next((e for e in errors.values() if e.retry), next(iter(errors.values())))
        node = next(iter(errors))
        replica = self.image.replica(node, block)
        if len(errors) > 1 or not isinstance(error, DiskError) or replica is None:
            return error
        if replica.reason != error.message:
            await self.mark([(block, node, error.message)])
        if not isinstance(error, Damaged) or "at" in error.details:  # of a chunk that was altered there is no file
            return error
        return Damaged(
            f"{error.message}; node {node} has the last copy: bring the right file back and restart its blockd, "
            "or see: ukai-ctl image accept --help"
        )

    def _suspect(self, block: int) -> None:
        self.posts.refuse([block])  # the local copy has what was posted, though metad may not be reached for long
        self.hot.pop(block, None)
        self.readable.drop(block)

    def name(self) -> str:
        image = self.core.mirror.cluster.images.get(self.uuid)
        return image.name if image is not None else self.uuid

    def changed(self, ranges: list[tuple[int, int]] | None) -> None:
        """The metadata of some blocks (None: of the whole image) have changed."""
        known = len(self.hot) + len(self.readable.stores) + len(self.readable.remote)
        if ranges is None or sum(b - a + 1 for a, b in ranges) > known:
            self.hot.clear()
            self.readable.drop_all()
            return
        for first, last in ranges:
            for block in range(first, last + 1):
                self.hot.pop(block, None)
                self.readable.drop(block)

    def holds(self, epoch: int) -> bool:
        return self.held and self.epoch == epoch

    def check_handle(self, handle: Handle) -> None:
        """Raises StaleHandle when the node lost the role after the handle was opened (R2), StaleSession once closed.

        What a closed handle had under way may not take the role again: the image may be in use elsewhere by now.
        """
        if self.core.frontends.handles.get(handle.number) is not handle:
            raise StaleSession("this handle was closed meanwhile; open the image anew")
        if handle.epoch < self.image.lost.get(self.own, 0):
            raise StaleHandle(
                f"image {self.name()} was taken over by another hypervisor; stop this machine, or open the image anew"
            )

    def stale_handles(self) -> bool:
        """Whether a handle that is open here must not be served."""
        lost = self.image.lost.get(self.own, 0)
        return lost > 0 and any(h.epoch < lost for h in self.core.frontends.handles.values() if h.coordinator is self)

    def late(self, what: str) -> Timeout:
        """The error of a request that ran out of time; it says what stood in its way last."""
        why = f": {self.hindrance}" if self.hindrance else ""
        return Timeout(f"image {self.name()}: the {what} could not be completed within io_timeout{why}")

    def pieces(self, offset: int, length: int) -> list[tuple[int, int, int, int]]:
        """(block, offset in it, length, position in the request) of each block that a request touches."""
        image = self.image
        if length <= 0 or offset + length > image.size:
            raise NoSpace(f"image {image.name} ends at {image.size} bytes")
        out, at = [], 0
        while at < length:
            block, within = divmod(offset + at, image.block_size)
            size = min(length - at, image.block_size - within)
            out.append((block, within, size, at))
            at += size
        return out
