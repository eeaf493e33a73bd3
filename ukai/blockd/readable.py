"""Which replicas of an image may be read without another look, and which are lent to the frontend.

Whatever may make a replica unfit to be read takes its block out of here, and its loan with it.
"""

from __future__ import annotations

from collections.abc import Callable

from ukai.blockd.image_store import ImageStore
from ukai.blockd.peer import Peer
from ukai.loans import NOT_LENT, ZEROS, Page


class Readable:
    """The blocks of one image that its coordinator has read."""

    def __init__(self, new_page: Callable[[], Page]) -> None:
        self.stores: dict[int, ImageStore | None] = {}
        """block → local replica that may be read; None: never written, reads as zeros."""
        self.remote: dict[int, tuple[Peer, int]] = {}
        """block → where else it may be read, if no local replica may, and the generation there."""
        self.page: Page | None = None
        """Made at the first loan."""
        self._new_page = new_page
        self._last = NOT_LENT

    def drop(self, block: int) -> None:
        self.stores.pop(block, None)
        self.remote.pop(block, None)
        if self.page is not None:
            self.page.numbers[block] = NOT_LENT

    def drop_all(self) -> None:
        self.stores.clear()
        self.remote.clear()
        if self.page is not None:
            self.page.clear()

    def renew(self, until: float) -> None:
        """The lease of the role, while it is held."""
        if self.page is not None:
            self.page.lease[0] = until

    def end(self) -> None:
        """The role is over."""
        self.renew(0.0)
        self.drop_all()

    def discard(self) -> None:
        """The image is gone."""
        if self.page is not None:
            self.page.end()
            self.page = None

    def lend(self, block: int, until: float) -> tuple[Page, int]:
        """Lend a block that is in here; the page, and the number of the loan.  Raises OSError."""
        if self.page is None:
            self.page = self._new_page()
        page = self.page
        page.lease[0] = until
        if page.numbers[block] == NOT_LENT:
            if self.stores[block] is None:
                page.numbers[block] = ZEROS
            else:
                self._last = self._last % (ZEROS - 1) + 1
                page.numbers[block] = self._last
        return page, page.numbers[block]
