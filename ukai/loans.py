"""Loans: block files that blockd lets the frontend of its node read directly.

For each image there is a page of memory that both processes see: until when reads are allowed, and for each block
the number of its loan.  blockd takes a loan back by one store there, or all of them at once; a blockd that is frozen
takes back all by not renewing the lease; one that starts anew ends the pages of the former process first.

So a direct read looks at the page, reads, and looks again.  If both looks find the loan good, blockd would have
answered the same at some moment between the two.  Else what was read is thrown away, and blockd is asked.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import Protocol

NOT_LENT = 0
ZEROS = 2**32 - 1
"""Instead of a loan's number: the block was never written and reads as zeros; no file is lent."""


class Page(Protocol):
    """The page of one image, as blockd made it or as the frontend sees it."""

    lease: MutableSequence[float]
    """One number: the moment of the monotonic clock after which no read is allowed."""
    numbers: MutableSequence[int]
    """block → number of its loan, ``NOT_LENT`` or ``ZEROS``."""

    def clear(self) -> None:
        """Take all loans back."""
        ...

    def end(self) -> None:
        """It will not be used again."""
        ...
