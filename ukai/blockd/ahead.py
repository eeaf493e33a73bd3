"""Which blocks will be written next: as read-ahead guesses it, for announcements (R5).

A writer that enters a block right behind one that was entered before is taken for sequential, and the blocks in
front of it are announced in the background, twice as many each time.  Pure.
"""

from __future__ import annotations

RUNS = 16
"""Sequential writers that are told apart."""
WINDOW_BYTES = 64 * 2**20
WINDOW_BLOCKS = 8


class Ahead:
    """The sequential writers of one image."""

    def __init__(self, active_limit: int) -> None:
        self._most = active_limit // 4
        self._runs: dict[int, int] = {}
        """block that is entered next → how many from there on are announced ahead; the oldest first."""

    def clear(self) -> None:
        self._runs.clear()

    def window(self, block_size: int) -> int:
        """How many blocks ahead at most: small ones are written fast."""
        return min(self._most, max(WINDOW_BLOCKS, WINDOW_BYTES // block_size))

    def entered(self, block: int, block_size: int) -> range:
        """The first write to a block: the blocks that should be active by now, none where it isn't sequential."""
        if block + 1 in self._runs:  # known already: its targets have changed
            return range(0)
        count = self._runs.pop(block, None)
        count = 0 if count is None else min(max(1, 2 * count), self.window(block_size))
        self._runs[block + 1] = count
        if len(self._runs) > RUNS:
            del self._runs[next(iter(self._runs))]
        return range(block + 1, block + 1 + count)

    def expects(self, block: int) -> bool:
        """Whether a sequential writer is about to come to a block."""
        return any(first <= block < first + count for first, count in self._runs.items())

    def missed(self, blocks: set[int]) -> None:
        """Blocks were retired before their writer came: it is too slow to be worth more than one ahead."""
        for first in self._runs:
            if first in blocks:
                self._runs[first] = 0
