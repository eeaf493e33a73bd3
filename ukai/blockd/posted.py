"""Posted writes of one image: the frontend of this node has told its callers that they are done, and they may be in its
socket still; ``frontend/posted.py`` says when it does so.

They are the image's writes as any others.  But what another node may see comes after them: before the role is given
up, an epoch of another writer begins here, a block is retired, or another machine reads, they are taken in.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ukai.blockd.coordinator import Coordinator


class Posts:
    """The posted writes that have arrived, and whether more are welcome."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self.refusals = 0
        """While it is not 0 no block is lent, so nothing is posted after ``refuse``."""
        self._asked_for = False
        """Whether any was ever welcome: else none can be in a socket."""
        self._under_way: dict[int, int] = {}
        """number → block of those that are not done."""
        self._waiting: dict[int, asyncio.Future[None]] = {}
        """number → who waits until it is."""
        self._numbers = itertools.count()

    def __bool__(self) -> bool:
        """Whether any has arrived and is not done."""
        return bool(self._under_way)

    def welcome(self, offset: int) -> bool:
        """Whether a small write there would be answered at once."""
        c = self._c
        image = c.core.mirror.cluster.images.get(c.uuid)
        hot = c.hot.get(offset // image.block_size) if image is not None else None
        welcome = (
            hot is not None
            and hot.early
            and not c.behind.half_full()  # it must not wait for room where others need not see it
            and c.frozen is None
            and not self.refusals
            and c.core.config.posted_writes
            and c.core.config.short_circuit
        )
        self._asked_for = self._asked_for or welcome
        return welcome

    def begins(self, offset: int, done: Callable[..., None]) -> Callable[..., None]:
        """One has arrived; what is to be called, instead of ``done``, when it is done."""
        number, image = next(self._numbers), self._c.core.mirror.cluster.images.get(self._c.uuid)
        self._under_way[number] = offset // image.block_size if image is not None else -1

        def ended(*result: object) -> None:
            del self._under_way[number]
            if (future := self._waiting.pop(number, None)) is not None:
                future.set_result(None)
            done(*result)

        return ended

    def touches(self, block: int) -> bool:
        """Whether one to this block has."""
        return block in self._under_way.values()

    def refuse(self, blocks: Iterable[int] | None = None) -> bool:
        """Take the loans of some blocks back, or all, and in what was posted there: none is posted any more after that.

        Whether all that was posted is done.
        """
        readable = self._c.readable
        if blocks is None:
            readable.drop_all()
        else:
            for block in blocks:
                readable.drop(block)
        self._take_in()
        return not self

    async def passed(self) -> None:
        """Take in what was posted before this call, and wait until it is done."""
        self._take_in()
        for number in list(self._under_way):
            if number in self._under_way:
                if number not in self._waiting:
                    self._waiting[number] = asyncio.get_running_loop().create_future()
                await asyncio.shield(self._waiting[number])

    def _take_in(self) -> None:
        if self._asked_for:
            self._c.core.ports.take_in()
