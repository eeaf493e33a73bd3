"""Reads of one image: from an in-sync replica, the local one first, or from the writer where that is another node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ukai.blockd.files import zeros
from ukai.blockd.peer import Payload
from ukai.blockd.role import RETRY_S
from ukai.errors import Busy, DiskError, NotCoordinator, NotReady, UkaiError, Unreachable
from ukai.loans import Page
from ukai.messages import Header
from ukai.model import IN_SYNC, written

if TYPE_CHECKING:
    from ukai.blockd.coordinator import Coordinator, Handle

ReadDone = Callable[[UkaiError | None, "Payload | None", bool], None]
"""Error or data, and whether the block may be lent (``Reads.lend``)."""


@dataclass(slots=True)
class Lent:
    """One block lent to the frontend of this node."""

    page: Page
    number: int
    descriptor: int
    """Of the block file; whoever passes it on closes it.  −1: the block reads as zeros."""


class Reads:
    """Where an image's reads are answered from."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator

    def read(self, handle: Handle, offset: int, length: int, done: ReadDone) -> None:
        """Read part of the image: from the local replica if it is in-sync, else from a remote one."""
        c = self._c
        image = c.core.mirror.cluster.images.get(c.uuid)
        if (
            image is not None
            and c.held
            and c.now() < c.core.lease_until
            and (image.replication == "sync" or handle.epoch >= image.lost.get(c.own, 0))
        ):
            block, within = divmod(offset, image.block_size)
            if within + length <= image.block_size and block not in c.inflight:
                local = c.readable.stores.get(block)
                if local is None:
                    if block in c.readable.stores:
                        done(None, zeros(length), self._lendable(block))
                        return
                    if self._ask(handle, block, within, offset, length, done):
                        return
                else:
                    try:
                        data = local.read_cached(block, within, length)
                    except UkaiError:
                        data = None
                    if data is not None:
                        done(None, data, self._lendable(block))
                        return
        c.core.spawn(self._read_slow(handle, offset, length, done, c.now() + c.core.config.io_timeout))

    def _ask(self, handle: Handle, block: int, within: int, offset: int, length: int, done: ReadDone) -> bool:
        """Ask the remote replica that may be read; false: there is none.  Where that fails, the slow path decides."""
        c = self._c
        peer, generation = c.readable.remote.get(block, (None, 0))
        if peer is None or c.behind.touches(block, within, within + length):
            return False
        deadline = c.now() + c.core.config.io_timeout

        def answered(error: UkaiError | None, _header: Header, data: Payload | None) -> None:
            if error is None and data is not None and len(data) == length:
                done(None, data, False)
            else:
                c.core.spawn(self._read_slow(handle, offset, length, done, deadline))

        return peer.request("r", {"i": c.uuid, "b": block, "o": within, "l": length, "g": generation}, answered)

    async def _read_slow(self, handle: Handle, offset: int, length: int, done: ReadDone, deadline: float) -> None:
        c = self._c
        try:
            async with asyncio.timeout_at(deadline):
                data = await self._read_anyhow(handle, offset, length, deadline)
        except TimeoutError:
            done(c.late("read"), None, False)
        except UkaiError as e:
            done(e, None, False)
        else:
            image = c.core.mirror.cluster.images.get(c.uuid)
            done(None, data, image is not None and self._lendable(offset // image.block_size))

    # --- loans

    def _lendable(self, block: int) -> bool:
        """Whether reads of the block need no other look than at what is in ``readable``, until it is dropped there.

        A write under way may have lost its caller, and then only this process knows of it; while metad commits a mark
        what was written may still vanish.  A block with checksums is read through here, to be checked.
        """
        c = self._c
        image = c.core.mirror.cluster.images.get(c.uuid)
        return (
            block in c.readable.stores
            and c.held
            and c.frozen is None
            and not c.posts.refusals
            and c.now() < c.core.lease_until
            and block not in c.inflight
            and block not in c.marker.pending
            and image is not None
            and not image.checksum
            and not (image.replication == "flush" and c.stale_handles())
            and c.core.config.short_circuit
        )

    def lend(self, block: int) -> Lent:
        """Lend a block to the frontend.  Raises NotReady where it can't be lent now, DiskError."""
        c = self._c
        hot = c.hot.get(block)
        if hot is not None and hot.local is not None and self._readable_at(c.own, block, hot.generation):
            hot.local.check(block, hot.generation)
            c.readable.stores.setdefault(block, hot.local)  # it is written, and need not have been read before
        if not self._lendable(block):
            raise NotReady(f"block {block} can't be lent now")
        store = c.readable.stores[block]
        descriptor = -1 if store is None else store.borrow(block)
        try:
            page, number = c.readable.lend(block, c.core.lease_until)
        except OSError as e:
            if store is not None:
                store.disk.close(descriptor)
            raise DiskError(f"no page for loans of image {c.name()}: {e.strerror}") from e
        return Lent(page, number, descriptor)

    # --- whatever it takes

    async def _read_anyhow(self, handle: Handle, offset: int, length: int, deadline: float) -> Payload:
        """A read by a node that may or may not be the writer.  Raises UkaiError."""
        c = self._c
        while True:
            if c.image.replication == "flush":
                c.check_handle(handle)  # what it has written, or read, may be gone (R2)
            try:
                if c.held:
                    data = await self.read_held(offset, length)
                    c.hindrance = ""
                    return data
                writer = c.image.writer
                if writer and writer != c.own:
                    peer = c.core.peer(writer)
                    await peer.settled()
                    try:
                        reply = await peer.ask("cr", {"i": c.uuid, "o": offset, "l": length})
                        return reply[1] or b""
                    except (NotCoordinator, Unreachable) as e:
                        await c.core.catch_up()
                        if c.image.writer == writer and isinstance(e, Unreachable):
                            await c.role.acquire(-1, "read", deadline)
                else:
                    await c.role.acquire(-1, "read", deadline)
            except Busy:
                await c.core.catch_up()  # somebody else is the writer: ask there
            except UkaiError as e:
                if not e.retry or c.now() >= deadline:
                    raise
                c.hindrance = e.message
            await asyncio.sleep(RETRY_S)

    async def read_held(self, offset: int, length: int, *, elsewhere: bool = False) -> Payload:
        """Raises NotCoordinator when the role is not held, UkaiError.

        ``elsewhere``: for another machine, which may outlive this one; it sees nothing that could be lost with it.
        """
        pieces = self._c.pieces(offset, length)
        parts = await asyncio.gather(*(self._read_piece(b, o, n, elsewhere) for b, o, n, _ in pieces))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read_piece(self, block: int, offset: int, length: int, elsewhere: bool) -> Payload:
        c = self._c
        while True:
            if not c.held or not c.role.leased():
                raise NotReady("it can't be told whether this node is still the writer")
            if block in c.inflight:  # what is read must not go away again when this node dies
                epoch = c.epoch
                await c.writes.acknowledged(block, offset, offset + length)
                if not c.holds(epoch):
                    continue
            if block in c.image.active and block not in c.activity.warm:  # announced, perhaps not stamped yet
                await c.activity.make_warm([block])
                continue
            replicas = c.image.replicas(block)
            if not written(replicas):
                c.readable.stores[block] = None
                return zeros(length)
            suspects = c.marker.suspects(block)
            good = {n: r.generation for n, r in replicas.items() if r.status == IN_SYNC and n not in suspects}
            if not good:
                raise Unreachable(f"no in-sync copy of block {block} can be read")
            if (elsewhere or c.own not in good) and c.behind.touches(block, offset, offset + length):
                await c.behind.passed(block, offset, offset + length)
                continue
            data = await self._read_from(block, offset, length, good)
            if data is not None:
                return data

    async def _read_from(self, block: int, offset: int, length: int, good: dict[str, int]) -> Payload | None:
        """Try replicas in turn; a bad one is marked (R4).  None: look again.  Raises UkaiError."""
        c = self._c
        errors: dict[str, UkaiError] = {}
        order = sorted(good, key=lambda n: (n != c.own, not (n == c.own or c.core.peer(n).up), n))
        for node in order:
            try:
                if node == c.own:
                    store = c.core.store.image(c.uuid)
                    store.check(block, good[node])
                    data: Payload | None = store.read_cached(block, offset, length)
                    if data is None:
                        data = await c.core.replica.read(store, block, offset, length)
                    if self._readable_at(node, block, good[node]):
                        c.readable.stores[block] = store
                elif c.behind.touches(block, offset, offset + length):
                    await c.behind.passed(block, offset, offset + length)  # only the local copy has it for certain
                    return None
                else:
                    fields = {"i": c.uuid, "b": block, "o": offset, "l": length, "g": good[node]}
                    peer = c.core.peer(node)
                    await peer.settled()
                    _, data = await peer.ask("r", fields)
                    if self._readable_at(node, block, good[node]):
                        c.readable.remote[block] = peer, good[node]
            except DiskError as e:
                errors[node] = e
                continue
            except UkaiError as e:
                errors[node] = e
                continue
            bad = [(block, n, e.message) for n, e in errors.items() if isinstance(e, DiskError)]
            if bad:
                await c.mark(bad)
            return data
        suspects = c.marker.suspects(block)  # as the caller left them out: else this would never come to an end
        replicas = c.image.replicas(block).items()
        current = {n: r.generation for n, r in replicas if r.status == IN_SYNC and n not in suspects}
        if current != good:
            return None
        raise await c.nowhere(block, errors)

    def _readable_at(self, node: str, block: int, generation: int) -> bool:
        """Whether this replica is in-sync now, and will be read until something about the block changes."""
        c = self._c
        replica = c.image.replica(node, block)
        return (
            replica is not None
            and replica.status == IN_SYNC
            and replica.generation == generation
            and node not in c.marker.suspects(block)
            and (block not in c.image.active or block in c.activity.warm)
        )
