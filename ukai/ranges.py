"""Sets of blocks and maps from blocks, kept as ranges.

An image has up to millions of blocks, and nearly always a handful of distinct states.  Both classes keep
sorted, non-overlapping ranges with both ends included, and neighbours of equal value joined.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

V = TypeVar("V")


class RangeMap(Generic[V]):
    """block index → value, for the blocks that have one."""

    __slots__ = ("_first", "_last", "_value")

    def __init__(self, items: Iterable[tuple[int, int, V]] = ()) -> None:
        self._first: list[int] = []
        self._last: list[int] = []
        self._value: list[V] = []
        for first, last, value in items:
            self.set(first, last, value)

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self._first)

    def __iter__(self) -> Iterator[tuple[int, int, V]]:
        return zip(self._first, self._last, self._value, strict=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeMap) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"RangeMap({list(self)!r})"

    def get(self, index: int) -> V | None:
        i = bisect_right(self._first, index) - 1
        return self._value[i] if i >= 0 and self._last[i] >= index else None

    def within(self, first: int, last: int) -> list[tuple[int, int, V]]:
        """The ranges that touch first..last, cut to it."""
        out = []
        i = max(bisect_right(self._first, first) - 1, 0)
        while i < len(self._first) and self._first[i] <= last:
            if self._last[i] >= first:
                out.append((max(first, self._first[i]), min(last, self._last[i]), self._value[i]))
            i += 1
        return out

    def touching(self, first: int, last: int) -> list[tuple[int, int, V]]:
        """The ranges that touch first..last, whole."""
        lo, hi = bisect_left(self._last, first), bisect_right(self._first, last)
        return list(zip(self._first[lo:hi], self._last[lo:hi], self._value[lo:hi], strict=True))

    def gaps(self, first: int, last: int) -> list[tuple[int, int]]:
        """The parts of first..last that have no value."""
        out = []
        for a, b, _ in self.within(first, last):
            if first < a:
                out.append((first, a - 1))
            first = b + 1
        if first <= last:
            out.append((first, last))
        return out

    def remove(self, first: int, last: int) -> None:
        self._splice(first, last, None)

    def set(self, first: int, last: int, value: V) -> None:
        self._splice(first, last, (value,))

    def _splice(self, first: int, last: int, value: tuple[V] | None) -> None:
        """Replace what lies in first..last; a one-element tuple holds the new value, so that any V will do."""
        if first > last:
            raise ValueError(f"range {first}-{last} is out of order")
        lo = bisect_left(self._last, first)
        hi = bisect_right(self._first, last)
        new: list[tuple[int, int, V]] = []
        if lo < hi and self._first[lo] < first:
            new.append((self._first[lo], first - 1, self._value[lo]))
        if value is not None:
            new.append((first, last, value[0]))
        if lo < hi and self._last[hi - 1] > last:
            new.append((last + 1, self._last[hi - 1], self._value[hi - 1]))
        if lo > 0 and new and self._last[lo - 1] == new[0][0] - 1:
            lo -= 1
            new.insert(0, (self._first[lo], self._last[lo], self._value[lo]))
        if hi < len(self._first) and new and self._first[hi] == new[-1][1] + 1:
            new.append((self._first[hi], self._last[hi], self._value[hi]))
            hi += 1
        joined: list[tuple[int, int, V]] = []
        for a, b, v in new:
            if joined and joined[-1][1] == a - 1 and joined[-1][2] == v:
                joined[-1] = (joined[-1][0], b, v)
            else:
                joined.append((a, b, v))
        self._first[lo:hi] = [x[0] for x in joined]
        self._last[lo:hi] = [x[1] for x in joined]
        self._value[lo:hi] = [x[2] for x in joined]

    def extend(self, items: Iterable[tuple[int, int, V]]) -> None:
        """Append ranges that are sorted, apart and behind all there are, as another map gave them."""
        for first, last, value in items:
            if first > last or (self._last and first <= self._last[-1]):
                raise ValueError(f"range {first}-{last} is out of order")
            self._first.append(first)
            self._last.append(last)
            self._value.append(value)

    def total(self) -> int:
        """How many blocks have a value."""
        return sum(self._last) - sum(self._first) + len(self._first)


class RangeSet:
    """A set of block indexes."""

    __slots__ = ("_map",)

    def __init__(self, items: Iterable[tuple[int, int]] = ()) -> None:
        self._map: RangeMap[bool] = RangeMap()
        for first, last in items:
            self._map.set(first, last, True)

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self._map)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((a, b) for a, b, _ in self._map)

    def __contains__(self, index: int) -> bool:
        return self._map.get(index) is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and self._map == other._map

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return f"RangeSet({list(self)!r})"

    def add(self, first: int, last: int) -> None:
        self._map.set(first, last, True)

    def discard(self, first: int, last: int) -> None:
        self._map.remove(first, last)

    def within(self, first: int, last: int) -> list[tuple[int, int]]:
        return [(a, b) for a, b, _ in self._map.within(first, last)]

    def gaps(self, first: int, last: int) -> list[tuple[int, int]]:
        """The parts of first..last that are not in the set."""
        return self._map.gaps(first, last)

    def total(self) -> int:
        """How many indexes are in the set."""
        return self._map.total()

    def indexes(self) -> Iterator[int]:
        for a, b in self:
            yield from range(a, b + 1)


def join(indexes: Iterable[int]) -> list[tuple[int, int]]:
    """Ranges of some indexes, in any order."""
    out: list[tuple[int, int]] = []
    for i in sorted(set(indexes)):
        if out and out[-1][1] == i - 1:
            out[-1] = (out[-1][0], i)
        else:
            out.append((i, i))
    return out


def show(items: Iterable[tuple[int, int]]) -> str:
    """``0-3,7`` for people."""
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in items)


def parse(text: str, block_count: int) -> list[tuple[int, int]]:
    """Read ``0-3,7``.  Raises ValueError with what is wrong."""
    out = RangeSet()
    for part in text.split(","):
        a, dash, b = part.strip().partition("-")
        if not a.isdecimal() or (dash and not b.isdecimal()):
            raise ValueError(f"{part!r} is no block range; write 7 or 0-3 or 0-3,7")
        first, last = int(a), int(b) if dash else int(a)
        if first > last:
            raise ValueError(f"{part!r} is out of order")
        if last >= block_count:
            raise ValueError(f"block {last} does not exist; the last one is {block_count - 1}")
        out.add(first, last)
    return list(out)
