"""Ranges against plain dicts and sets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ukai.ranges import RangeMap, RangeSet, join, parse, show

TOP = 30

spans = st.tuples(st.integers(0, TOP), st.integers(0, TOP)).map(sorted)
steps = st.lists(st.tuples(spans, st.one_of(st.none(), st.integers(0, 2))), max_size=25)


def build(changes: list[tuple[list[int], int | None]]) -> tuple[RangeMap[int], dict[int, int]]:
    """The same changes on a RangeMap and on a dict."""
    ranges: RangeMap[int] = RangeMap()
    plain: dict[int, int] = {}
    for (first, last), value in changes:
        if value is None:
            ranges.remove(first, last)
            for i in range(first, last + 1):
                plain.pop(i, None)
        else:
            ranges.set(first, last, value)
            plain.update(dict.fromkeys(range(first, last + 1), value))
    return ranges, plain


@given(steps)
def test_a_map_is_what_a_dict_would_be(changes: list[tuple[list[int], int | None]]) -> None:
    ranges, plain = build(changes)
    assert {i: v for a, b, v in ranges for i in range(a, b + 1)} == plain
    assert [ranges.get(i) for i in range(-1, TOP + 2)] == [plain.get(i) for i in range(-1, TOP + 2)]
    assert ranges.total() == len(plain)


@given(steps)
def test_ranges_are_sorted_apart_and_as_long_as_they_can_be(changes: list[tuple[list[int], int | None]]) -> None:
    ranges, plain = build(changes)
    items = list(ranges)
    assert len(ranges) == len(items)
    for first, last, _ in items:
        assert first <= last
    for (_, b, v), (c, _, w) in zip(items, items[1:], strict=False):
        assert b < c
        assert b + 1 < c or v != w, "neighbours of equal value are one range"
    assert ranges == RangeMap((i, i, v) for i, v in plain.items()), "the way that led there does not show"
    again: RangeMap[int] = RangeMap()
    again.extend(items)
    assert again == ranges


@given(steps, spans)
def test_parts_of_a_map(changes: list[tuple[list[int], int | None]], span: list[int]) -> None:
    ranges, plain = build(changes)
    first, last = span
    inside = {i: v for a, b, v in ranges.within(first, last) for i in range(a, b + 1)}
    assert inside == {i: v for i, v in plain.items() if first <= i <= last}
    free = [i for a, b in ranges.gaps(first, last) for i in range(a, b + 1)]
    assert free == [i for i in range(first, last + 1) if i not in plain]
    assert ranges.touching(first, last) == [(a, b, v) for a, b, v in ranges if a <= last and b >= first]


@given(st.lists(st.tuples(spans, st.booleans()), max_size=25), spans)
def test_a_set_is_what_a_set_would_be(changes: list[tuple[list[int], bool]], span: list[int]) -> None:
    ranges, plain = RangeSet(), set[int]()
    for (first, last), there in changes:
        if there:
            ranges.add(first, last)
            plain |= set(range(first, last + 1))
        else:
            ranges.discard(first, last)
            plain -= set(range(first, last + 1))
    assert list(ranges.indexes()) == sorted(plain)
    assert ranges.total() == len(plain)
    assert [i in ranges for i in range(TOP + 2)] == [i in plain for i in range(TOP + 2)]
    assert list(ranges) == join(plain)
    inside = {i for a, b in ranges.within(*span) for i in range(a, b + 1)}
    assert inside == {i for i in plain if span[0] <= i <= span[1]}
    assert {i for a, b in ranges.gaps(*span) for i in range(a, b + 1)} == set(range(span[0], span[1] + 1)) - plain
    if plain:
        assert RangeSet(parse(show(ranges), TOP + 1)) == ranges


@pytest.mark.parametrize("item", [(4, 5, 1), (7, 6, 1)])
def test_what_is_out_of_order_is_refused(item: tuple[int, int, int]) -> None:
    ranges: RangeMap[int] = RangeMap([(2, 4, 1)])
    with pytest.raises(ValueError, match="out of order"):
        ranges.extend([item])
    with pytest.raises(ValueError, match="out of order"):
        ranges.set(3, 2, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no block range"), ("a", "no block range"), ("3-", "no block"), ("3-1", "out of order"), ("9", "not exist")],
)
def test_texts_that_are_no_ranges(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text, 9)
