"""When a read may go around blockd, to a block file that it has lent; ``ukai/loans.py`` says what a loan is.

Pure: no socket, file, thread or clock.  What was read must not vanish when this node dies, so a write that is not
answered yet must not be seen: reads that overlap one go through blockd, which makes them wait.  All writes of this
node pass through this process, and are noted here before they are sent.  A write that is never answered stays noted
as long as it might still be done.

And when an fsync needs no round to blockd: a write that was alone from its beginning to its answer, with the answer
that nothing is left to be flushed, has seen all that the image's handles here have written (R7).

And when a write to a flush image needs no answer before its caller has one; ``posted.py`` says why it may.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from ukai.frontend.posted import POST_LIMIT_BYTES, Posted
from ukai.loans import ZEROS, Page


@dataclass(slots=True)
class Loan:
    """One block that was lent."""

    page: Page
    number: int
    file: Any
    """Closed when the last reader lets go of it; None: the block reads as zeros."""
    fd: int = -1
    """Of ``file``."""
    used: bool = True
    posts: bool = False
    """blockd answers a write to it when its own file has it: it may be posted."""


class Shortcut:
    """The loans of one image and its writes under way; shared by all handles of it."""

    __slots__ = ("_alone", "_keys", "flushed", "loans", "page", "posted", "writes")

    def __init__(self) -> None:
        self.page: Page | None = None
        self.loans: dict[int, Loan] = {}
        self.writes: dict[int, tuple[int, int]] = {}
        """key → first byte and end of a write or discard that has no answer."""
        self.posted = Posted()
        self.flushed = False
        """All that was written here is on the disks; an fsync has nothing to do."""
        self._alone = -1
        """Key of the last write, if no other was under way when it began."""
        self._keys = itertools.count()

    def write_begins(self, offset: int, length: int) -> int:
        """To be called before a write is sent; the result is for ``write_ends``.

        The caller sees to it that neither this nor an end that is ``clean`` runs beside another of them.
        """
        key = next(self._keys)
        self.flushed = False
        self._alone = -1 if self.writes else key
        self.writes[key] = (offset, offset + length)
        return key

    def write_ends(self, key: int, clean: bool = False) -> None:
        """It was answered, or can't be done any more.  ``clean``: with nothing left to be flushed at blockd."""
        self.writes.pop(key, None)
        if clean and key == self._alone:
            self.flushed = True

    def loan(self, block: int, offset: int, length: int, now: float) -> Loan | None:
        """What a read may be served from, if ``good`` says so again afterwards; None: ask blockd."""
        page = self.page
        if page is None:
            return None
        loan = Loan(page, ZEROS, None) if page.numbers[block] == ZEROS else self.loans.get(block)
        return loan if loan is not None and self.good(loan, block, offset, length, now) else None

    def good(self, loan: Loan, block: int, offset: int, length: int, now: float) -> bool:
        """Whether a read is allowed now.  Asked before and after: what lies between may be any length of time."""
        return self.stands(loan, block, now) and not (self.writes and self._written(offset, offset + length))

    def stands(self, loan: Loan, block: int, now: float) -> bool:
        """Whether blockd has not taken the loan back."""
        page = loan.page
        return now < page.lease[0] and page.numbers[block] == loan.number

    def _written(self, offset: int, end: int) -> bool:
        """Whether a write of this part is under way."""
        return any(offset < last and first < end for first, last in list(self.writes.values()))

    def may_post(self, loan: Loan, block: int, offset: int, length: int, now: float) -> bool:
        """Whether a write may be sent as a posted one; ``stands`` has to say so again once it is sent."""
        return (
            loan.posts
            and length <= POST_LIMIT_BYTES
            and self.posted.room(length)
            and self.good(loan, block, offset, length, now)
        )

    def told(self, block: int, posts: bool) -> bool:
        """A write was answered, and may be posted the next time; whether a loan has to be asked for first."""
        loan = self.loans.get(block)
        if loan is not None:
            loan.posts = posts
        return posts and loan is None

    def take(self, block: int, loan: Loan) -> None:
        """blockd has lent a block."""
        if loan.page is not self.page:
            self.drop()
            self.page = loan.page
        if loan.file is not None:
            self.loans[block] = loan

    def drop(self) -> None:
        """Let go of all loans."""
        self.page = None
        self.loans.clear()
