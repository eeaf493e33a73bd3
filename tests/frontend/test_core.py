"""The frontend's decisions, as tables."""

from __future__ import annotations

import ast
import errno
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ukai import errors
from ukai.frontend import core
from ukai.frontend.core import Verdict
from ukai.model import Image

SIZE = 1000


@pytest.mark.parametrize(
    ("offset", "length", "inside"),
    [(0, 10, 10), (0, 1000, 1000), (990, 10, 10), (990, 11, 10), (999, 1, 1), (1000, 1, 0), (5000, 10, 0), (10, 0, 0)],
)
def test_part_to_read(offset: int, length: int, inside: int) -> None:
    assert core.part_to_read(SIZE, offset, length) == inside


@pytest.mark.parametrize(
    ("offset", "length", "inside"), [(0, 10, 10), (990, 10, 10), (990, 50, 10), (999, 2, 1), (1000, 0, 0), (2000, 0, 0)]
)
def test_part_to_write(offset: int, length: int, inside: int) -> None:
    assert core.part_to_write(SIZE, offset, length) == inside


@pytest.mark.parametrize("offset", [1000, 1001, 2**40])
def test_a_write_past_the_end_finds_no_space(offset: int) -> None:
    with pytest.raises(OSError, match="ends at 1000") as caught:
        core.part_to_write(SIZE, offset, 1)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("mode", "offset", "length", "result"),
    [
        (0x03, 0, 1000, [(0, 1000)]),
        (0x03, 500, 9000, [(500, 500)]),
        (0x03, 1000, 10, []),
        (0x10, 0, 1000, [(0, 1000)]),
        (0x10, 10, 20, [(10, 20)]),
        (0x10, 990, 11, errno.ENOSPC),
        (0x11, 990, 11, [(990, 10)]),
        (0x00, 0, 10, errno.EOPNOTSUPP),
        (0x01, 0, 10, errno.EOPNOTSUPP),
        (0x02, 0, 10, errno.EOPNOTSUPP),
        (0x08, 0, 10, errno.EOPNOTSUPP),
        (0x20, 0, 10, errno.EOPNOTSUPP),
        (0x40, 0, 10, errno.EOPNOTSUPP),
    ],
)
def test_parts_to_zero(mode: int, offset: int, length: int, result: list[tuple[int, int]] | int) -> None:
    try:
        parts: list[tuple[int, int]] | int = list(core.parts_to_zero(mode, SIZE, 100, offset, length))
    except OSError as e:
        parts = e.errno or 0
    assert parts == result


@given(
    size=st.integers(1, 2**45),
    block=st.integers(4096, 2**40),
    offset=st.integers(0, 2**45),
    length=st.integers(1, 2**36),
)
def test_a_long_zeroing_is_cut_at_block_boundaries(size: int, block: int, offset: int, length: int) -> None:
    end = min(offset + length, size)
    parts = list(core.parts_to_zero(0x03, size, block, offset, length))
    assert sum(n for _, n in parts) == max(0, end - offset)
    assert all(a + n == b and b % block == 0 for (a, n), (b, _) in pairwise(parts))
    assert all(0 < n <= max(block, core.ZERO_PIECE_BYTES) for _, n in parts)
    assert not parts or (parts[0][0] == offset and sum(parts[-1]) == end)


AFTER = {
    errors.NotReady: Verdict.AGAIN,
    errors.NotCoordinator: Verdict.AGAIN,
    errors.Unreachable: Verdict.AGAIN,
    errors.Timeout: Verdict.AGAIN,
    errors.StaleSession: Verdict.REOPEN,
    errors.StaleHandle: Verdict.STALE,
}


@pytest.mark.parametrize("kind", list(errors.BY_CODE.values()), ids=lambda k: str(k.code))
def test_what_follows_an_error(kind: type[errors.UkaiError]) -> None:
    assert core.after_error(kind("x")) is AFTER.get(kind, Verdict.FAIL)


@pytest.mark.parametrize("kind", list(errors.BY_CODE.values()), ids=lambda k: str(k.code))
def test_data_errors_are_enospc_or_eio(kind: type[errors.UkaiError]) -> None:
    assert core.data_errno(kind("x")) == (errno.ENOSPC if kind is errors.NoSpace else errno.EIO)


def test_pauses_grow_to_a_limit() -> None:
    pauses = [core.pause_s(n) for n in range(2000)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (core.PAUSE_FIRST_S, core.PAUSE_LAST_S)


def test_shown_are_online_images_of_this_node_with_what_was_known_of_them() -> None:
    images = [
        Image("u1", "a", 10, 5, ["n1"], True),
        Image("u2", "b", 10, 5, ["n2"], True),
        Image("u3", "c", 10, 5, ["n1"], False),
        Image("u4", "d", 10, 5, ["n2", "n1"], True),
    ]
    first = core.shown(images, "n1", {}, 7)
    assert list(first) == ["a", "d"]
    first["a"].mode = 0o600
    images[0].size = 20
    images[3].uuid = "u5"
    second = core.shown(images, "n1", first, 8)
    assert second["a"] is first["a"]
    assert (second["a"].size, second["a"].mode, second["a"].mtime_ns) == (20, 0o600, 7)
    assert second["d"] is not first["d"]


def test_core_is_pure() -> None:
    tree = ast.parse(Path(core.__file__).read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert imported <= {
        *("__future__", "collections.abc", "dataclasses", "enum", "errno", "typing"),
        *("ukai.errors", "ukai.frontend.shortcut", "ukai.model"),
    }


def test_an_overdue_write_holds_back_its_image_until_it_is_answered_or_lost() -> None:
    overdue: core.Overdue[str] = core.Overdue(10.0)
    answered: set[str] = set()
    overdue.hold("one", "a", 0.0)
    overdue.hold("one", "b", 1.0)
    overdue.hold("two", "c", 1.0)
    assert overdue.let_go(29.0, False, answered.__contains__) == []
    answered.add("b")
    assert overdue.let_go(29.0, False, answered.__contains__) == ["b"]
    assert overdue.by_image.keys() == {"one", "two"}
    assert overdue.let_go(30.0, False, answered.__contains__) == ["a"], "not answered for so long, it never got there"
    assert overdue.by_image.keys() == {"two"}
    assert overdue.let_go(31.0, True, answered.__contains__) == [], "whoever answers nothing may be frozen"
    assert overdue.let_go(60.9, False, answered.__contains__) == []
    assert overdue.let_go(61.0, False, answered.__contains__) == ["c"]
    overdue.hold("one", "d", 70.0)
    assert overdue.clear() == ["d"]
    assert not overdue.by_image


def test_a_single_write_before_each_fsync_is_a_habit_until_it_is_not() -> None:
    """What is sent as synchronous, of "w" writes and "f" fsyncs in their order."""
    habit = core.Habit()

    def played(story: str) -> list[bool]:
        said = []
        for step in story:
            if step == "w":
                said.append(habit.write_begins())
            else:
                habit.fsync_begins()
        return said

    assert played("wwffwfwf") == [False] * 4
    assert played("wffwf") == [True] * 2
    assert played("ww") == [True, False]
    assert played("fwfw") == [False] * 2
    assert played("fw") == [True]
