"""When a read may go around blockd, and what the two processes see of one page."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ukai import page
from ukai.frontend import borrower
from ukai.frontend.borrower import Borrower, LentFile
from ukai.frontend.shortcut import Loan, Shortcut
from ukai.loans import NOT_LENT, ZEROS
from ukai.page import MappedPage

BLOCKS = 4
NOW = 100.0


@pytest.fixture
def lent(tmp_path: Path) -> MappedPage:
    """A page as blockd makes it, with block 1 lent and block 2 known to be zeros."""
    made = page.make(tmp_path, "uuid", BLOCKS)
    made.lease[0] = NOW + 1
    made.numbers[1], made.numbers[2] = 7, ZEROS
    return made


@pytest.fixture
def shortcut(lent: MappedPage) -> Shortcut:
    found = Shortcut()
    found.take(1, Loan(lent, 7, "file"))
    return found


def test_a_lent_block_is_read(shortcut: Shortcut) -> None:
    loan = shortcut.loan(1, 50, 10, NOW)
    assert loan is not None
    assert loan.file == "file"
    assert shortcut.good(loan, 1, 50, 10, NOW)
    zeros = shortcut.loan(2, 100, 10, NOW)
    assert zeros is not None
    assert zeros.file is None
    assert shortcut.loan(0, 0, 10, NOW) is None
    assert Shortcut().loan(1, 50, 10, NOW) is None


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_read_that_has_to_wait_for_a_disk_is_told(
    in_memory: bool, tmp_path: Path, lent: MappedPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others take requests meanwhile."""
    (tmp_path / "block").write_bytes(b"x" * 100)
    fd = os.open(tmp_path / "block", os.O_RDONLY)
    lent.lease[0] = time.monotonic() + 60
    shortcut, told, into = Shortcut(), list[str](), bytearray(10)
    shortcut.take(1, Loan(lent, 7, LentFile(fd), fd))
    if not in_memory:
        monkeypatch.setattr(borrower, "_at_once", lambda *_: False)

    @contextlib.contextmanager
    def waits() -> Iterator[None]:
        told.append("begin")
        yield
        told.append("end")

    assert Borrower("nowhere", 10).read(shortcut, 1, 20, 84, memoryview(into), waits)
    assert into == b"x" * 10
    assert told == ([] if in_memory else ["begin", "end"])


def test_what_ends_a_loan_between_the_two_looks(shortcut: Shortcut, lent: MappedPage) -> None:
    def good(now: float = NOW) -> bool:
        return shortcut.good(loan, 1, 50, 10, now)

    loan = shortcut.loans[1]
    assert good()
    assert not good(NOW + 1), "the lease is over"
    lent.numbers[1] = 8
    assert not good(), "lent anew: perhaps another file"
    lent.numbers[1] = 7
    assert good()
    lent.clear()
    assert list(lent.numbers) == [NOT_LENT] * BLOCKS
    assert not good(), "all loans were taken back"
    lent.numbers[1] = 7
    lent.end()
    assert not good(), "blockd is gone"


def test_the_page_of_a_new_blockd_ends_the_loans_of_the_old_one(shortcut: Shortcut, tmp_path: Path) -> None:
    old = shortcut.loan(1, 50, 10, NOW)
    assert old is not None
    page.end_all(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not shortcut.good(old, 1, 50, 10, NOW)
    new = page.make(tmp_path, "uuid", BLOCKS)
    new.lease[0], new.numbers[1] = NOW + 1, 7
    shortcut.take(0, Loan(new, 9, "other"))
    assert shortcut.loan(1, 50, 10, NOW) is None, "it was lent by the one before"
    assert not shortcut.good(old, 1, 50, 10, NOW), "the same number on another page"


@pytest.mark.parametrize(
    ("offset", "length", "seen"), [(50, 10, False), (45, 6, False), (59, 1, False), (60, 5, True), (45, 5, True)]
)
def test_a_write_under_way_is_not_read(shortcut: Shortcut, offset: int, length: int, seen: bool) -> None:
    before = shortcut.loan(1, offset, length, NOW)
    assert before is not None
    key = shortcut.write_begins(50, 10)
    other = shortcut.write_begins(0, 1)
    assert (shortcut.loan(1, offset, length, NOW) is not None) is seen
    assert shortcut.good(before, 1, offset, length, NOW) is seen
    shortcut.write_ends(key)
    assert shortcut.good(before, 1, offset, length, NOW)
    shortcut.write_ends(other)
    assert not shortcut.writes


def test_a_write_alone_that_left_nothing_to_flush_has_flushed_all(shortcut: Shortcut) -> None:
    said = [shortcut.flushed]
    for clean in (True, False):
        key = shortcut.write_begins(0, 1)
        said.append(shortcut.flushed)
        shortcut.write_ends(key, clean)
        said.append(shortcut.flushed)
    assert said == [False, False, True, False, False], "nothing is known of what was written before"


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_writes_beside_each_other_say_nothing_of_each_other(shortcut: Shortcut, first_ends_first: bool) -> None:
    """Which of them blockd had seen when it said that it was clean is not known."""
    first, second = shortcut.write_begins(0, 1), shortcut.write_begins(5, 1)
    for key in (first, second) if first_ends_first else (second, first):
        shortcut.write_ends(key, clean=True)
        assert not shortcut.flushed
    key = shortcut.write_begins(0, 1)
    shortcut.write_ends(key, clean=True)
    assert shortcut.flushed


def test_the_other_process_sees_the_page_and_can_not_write_it(lent: MappedPage) -> None:
    there = MappedPage(os.dup(lent.fd))
    lent.numbers[3], lent.lease[0] = 12, 5.5
    assert (there.numbers[3], there.lease[0]) == (12, 5.5)
    with pytest.raises(TypeError, match="read-only"):
        there.numbers[3] = 1
