"""Requests of metad: release or take a role, make room for an image, delete what an administrator ordered to delete."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from ukai.errors import Busy, DiskError, Refused, RemoteProtocolError
from ukai.messages import Header, flag, integer, ranges, show, text
from ukai.ranges import RangeSet

if TYPE_CHECKING:
    from ukai.blockd.core import Core


class Orders:
    """What metad may ask of this node."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._calls: dict[str, Callable[[Header], Awaitable[Header]]] = {
            "release": self._release,
            "acquire": self._acquire,
            "prepare": self._prepare,
            "adopted": self._adopted,
            "drop": self._drop,
            "close": self._close,
            "inventory": self._inventory,
            "disown": self._disown,
            "sums": self._sums,
        }

    async def answer(self, header: Header) -> Header:
        """Answer a request of metad.  Raises UkaiError."""
        call = self._calls.get(text(header, "op"))
        if call is None:
            raise RemoteProtocolError(f"op {show(header.get('op'))} is not known here")
        return await call(header)

    async def _release(self, header: Header) -> Header:
        uuid = text(header, "image", 36)
        frontends = self._core.frontends
        handles = frontends.opens().get(uuid, 0 if frontends.heard else 1)
        c = self._core.coordinators.get(uuid)
        clean = c is not None and await c.role.release(
            integer(header, "epoch"), self._core.now() + self._core.config.io_timeout / 2
        )
        return {"handles": handles, "clean": clean, "left": c.role.left if c is not None else []}

    async def _acquire(self, header: Header) -> Header:
        uuid = text(header, "image", 36)
        purpose = text(header, "purpose", 10, "sync")
        c = self._core.coordinator(uuid)
        await c.role.acquire(-1, purpose, self._core.now() + self._core.config.io_timeout / 2)
        c.idle_since = self._core.now()
        return {"epoch": c.epoch}

    async def _prepare(self, header: Header) -> Header:
        mode = text(header, "mode", 10)
        if mode == "forget":
            self._core.store.forget(text(header, "uuid", 36))
            return {}
        image = self._core.store.prepare(
            text(header, "uuid", 36),
            text(header, "name", 100),
            integer(header, "size", 1),
            integer(header, "block_size", 1),
            mode,
            flag(header, "checksum"),
        )
        if mode != "adopt":
            return {}
        present, bad = await self._core.run_disk(image.adopt)
        return {"present": present, "bad": bad}

    async def _adopted(self, header: Header) -> Header:
        image = self._core.store.image(text(header, "uuid", 36))
        await self._core.run_disk(
            image.adopted, ranges(header, "ranges", image.block_count - 1), integer(header, "generation", 1)
        )
        return {}

    async def _inventory(self, header: Header) -> Header:
        image = self._core.store.image(text(header, "uuid", 36))
        found: Header = await self._core.run_disk(image.inventory)
        return found

    async def _disown(self, header: Header) -> Header:
        image = self._core.store.image(text(header, "uuid", 36))
        await self._core.run_disk(image.disowned, ranges(header, "ranges", image.block_count - 1))
        return {}

    async def _sums(self, header: Header) -> Header:
        image = self._core.store.image(text(header, "uuid", 36))
        blocks = [
            b for b in RangeSet(ranges(header, "ranges", image.block_count - 1)).indexes() if image.generations[b]
        ]
        if image.sums is not None:
            for block in blocks:
                await self._core.replica.renew_sums(image, block)
            failed = await self._core.replica.flush(image, blocks)
            if failed:
                raise DiskError(next(iter(failed.values())))
        return {}

    async def _drop(self, header: Header) -> Header:
        uuid, name = text(header, "uuid", 36), text(header, "name", 100)
        await self._core.catch_up()  # so that nothing here still writes there
        image = self._core.mirror.cluster.images.get(uuid)
        where = image.locations.get(self._core.node) if image is not None else None
        wanted = ranges(header, "ranges") if "ranges" in header else [(0, 2**62)]
        if where is not None and any(where.within(first, last) for first, last in wanted):
            raise Refused(f"node {self._core.node} is still a location of these blocks of image {name}")
        store = self._core.store
        whole = "ranges" not in header
        await self._core.run_disk(store.drop(uuid, name) if whole else store.image(uuid).drop(wanted))
        if whole:
            store.forget(uuid)
        return {}

    async def _close(self, header: Header) -> Header:
        uuid = text(header, "image", 36)
        if flag(header, "reopen"):
            self._core.frontends.closed.discard(uuid)
            return {}
        handles = sum(1 for h in self._core.frontends.handles.values() if h.coordinator.uuid == uuid)
        if handles:
            raise Busy(f"the image is open at node {self._core.node} ({handles} handles)")
        self._core.frontends.closed.add(uuid)
        return {}
