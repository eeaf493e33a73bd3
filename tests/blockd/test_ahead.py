"""What is announced ahead of sequential writers (R5)."""

from __future__ import annotations

from ukai.blockd.ahead import RUNS, WINDOW_BYTES, Ahead

MIB = 2**20


def test_a_sequential_writer_has_more_and_more_announced_for_it() -> None:
    ahead = Ahead(128)
    found = [ahead.entered(block, 64 * MIB) for block in range(7)]
    assert [len(r) for r in found] == [0, 1, 2, 4, 8, 8, 8]
    assert found[4] == range(5, 13)


def test_small_blocks_are_announced_further_ahead_but_never_fill_the_limit() -> None:
    ahead = Ahead(1000)
    for block in range(20):
        found = ahead.entered(block, MIB)
    assert len(found) == WINDOW_BYTES // MIB
    ahead = Ahead(16)
    for block in range(20):
        found = ahead.entered(block, MIB)
    assert len(found) == 4
    ahead = Ahead(3)
    assert not any(ahead.entered(block, MIB) for block in range(20))


def test_random_writes_have_nothing_announced() -> None:
    ahead = Ahead(128)
    assert not any(ahead.entered(block, MIB) for block in range(0, 1000, 7))


def test_several_writers_are_told_apart() -> None:
    ahead = Ahead(128)
    for step in range(5):
        found = [ahead.entered(1000 * writer + step, 64 * MIB) for writer in range(RUNS)]
    assert [len(r) for r in found] == [8] * RUNS


def test_a_block_whose_targets_change_is_no_new_writer() -> None:
    ahead = Ahead(128)
    for block in range(5):
        ahead.entered(block, 64 * MIB)
    assert not ahead.entered(4, 64 * MIB)
    assert len(ahead.entered(5, 64 * MIB)) == 8


def test_what_is_expected_is_kept_until_it_turns_out_too_early() -> None:
    ahead = Ahead(128)
    for block in range(5):
        ahead.entered(block, 64 * MIB)
    assert [b for b in range(20) if ahead.expects(b)] == list(range(5, 13))
    ahead.missed({5, 6})
    assert not any(map(ahead.expects, range(20)))
    assert len(ahead.entered(5, 64 * MIB)) == 1
