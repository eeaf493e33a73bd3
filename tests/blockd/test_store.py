"""The block store: what is written is read, and a file alone proves nothing (R8)."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.blockd.conftest import OpenStore
from tests.blockd.faults import fails_once
from tests.blockd.files import (
    FORMAT,
    OTHER_UUID,
    STORE_ID,
    UUID,
    block_path,
    descriptors,
    drop,
    flush,
    flush_these,
    new_image,
    open_store,
    pattern,
    write,
)
from tests.durability.cut import power_cut
from tests.durability.journal import JournaledDisk
from ukai.blockd.disk import PIECE_BYTES, Disk
from ukai.blockd.files import GENERATIONS, HASH_BYTES, HOLE, META, TEMPORARY, write_all
from ukai.blockd.image_store import Borrowed, ImageStore
from ukai.blockd.store import Store
from ukai.errors import Busy, Damaged, DiskError, Exists, NoSpace, NotFound, NotReady, StaleEpoch, UkaiError, UsageError

SIZES = [(40960, 8192), (8192, 8192), (20000, 5000), (20480, 5000), (100_000_000, 50_000_000), (12288, 12288)]


# --- data


@pytest.mark.parametrize(("size", "block_size"), SIZES)
def test_every_block_is_written_and_read_up_to_its_last_byte(store: Store, size: int, block_size: int) -> None:
    image = new_image(store, size, block_size)
    assert sum(image.block_bytes(b) for b in range(image.block_count)) == size
    for block in range(image.block_count):
        length = image.block_bytes(block)
        head, tail = pattern(min(700, length), block), pattern(1, block + 9)
        write(image, block, 0, head, 7)
        write(image, block, length - 1, tail, 7)
        assert image.read(block, 0, len(head))[:-1] == head[:-1]
        assert image.read(block, length - 1, 1) == tail
        assert block_path(store, block).stat().st_size == length


def test_a_large_write_goes_to_the_kernel_in_aligned_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    real = os.pwrite
    stop_after = [100]

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        calls.append((offset, len(data)))
        if len(calls) > stop_after[0]:
            raise OSError(errno.ENOSPC, "full")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    disk, data = Disk(), random.Random(1).randbytes(3 * PIECE_BYTES)
    fd = disk.open(str(tmp_path / "f"), create=True)
    write_all(disk, fd, data, 1000)
    assert calls == [
        (1000, PIECE_BYTES - 1000),
        (PIECE_BYTES, PIECE_BYTES),
        (2 * PIECE_BYTES, PIECE_BYTES),
        (3 * PIECE_BYTES, 1000),
    ]
    assert disk.pread(fd, len(data), 1000) == data
    calls.clear()
    stop_after[0] = 2
    with pytest.raises(OSError, match="full"):
        write_all(disk, fd, data, 0)
    assert calls == [(0, PIECE_BYTES), (PIECE_BYTES, PIECE_BYTES), (2 * PIECE_BYTES, PIECE_BYTES)]
    assert disk.pread(fd, 2 * PIECE_BYTES, 0) == data[: 2 * PIECE_BYTES], "what was written counts"
    calls.clear()
    stop_after[0] = 0
    with pytest.raises(OSError, match="full"):
        disk.pwrite(fd, data, 0)
    disk.close(fd)


def test_a_new_image_takes_no_space_and_has_no_block_files(store: Store, root: Path) -> None:
    image = new_image(store, 100 * 2**30, 64 * 2**20)
    assert image.allocated([(0, image.block_count - 1)]) == 0
    assert sorted(os.listdir(root / "image01")) == [GENERATIONS, META]


def test_a_block_that_was_written_in_one_place_reads_as_zeros_elsewhere(image: ImageStore) -> None:
    write(image, 1, 4000, b"x" * 200, 3)
    assert image.read(1, 0, 8192) == bytes(4000) + b"x" * 200 + bytes(3992)


def test_data_and_generations_are_there_after_a_restart(reopen: OpenStore) -> None:
    image = new_image(reopen())
    write(image, 0, 0, b"a" * 8192, 5)
    write(image, 4, 100, b"b" * 10, 9)
    again = reopen().image(UUID)
    assert again.read(0, 0, 8192) == b"a" * 8192
    assert again.read(4, 98, 14) == bytes(2) + b"b" * 10 + bytes(2)
    assert list(again.generations) == [5, 0, 0, 0, 9]


def test_punch_reads_as_zeros_and_frees_the_space(store: Store) -> None:
    image = new_image(store, 4 * 2**20, 2**20)
    write(image, 2, 0, pattern(2**20, 1), 4)
    assert image.allocated([(2, 2)]) == 2**20
    image.punch(2, 0, 2**20, 4)
    assert image.allocated([(2, 2)]) == 0
    assert image.read(2, 0, 2**20) == bytes(2**20)
    assert block_path(store, 2).stat().st_size == 2**20
    assert 2 in image.unflushed


def test_punch_of_an_odd_part_leaves_its_neighbours(image: ImageStore) -> None:
    data = pattern(8192, 3)
    write(image, 1, 0, data, 4)
    image.punch(1, 1000, 5001, 4)
    assert image.read(1, 0, 8192) == data[:1000] + bytes(5001) + data[6001:]


def test_punch_writes_zeros_where_the_filesystem_has_no_holes(reopen: OpenStore) -> None:
    class Solid(Disk):
        def punch(self, fd: int, offset: int, length: int) -> None:
            raise OSError(errno.EOPNOTSUPP, "no holes")

    image = new_image(reopen(Solid()))
    write(image, 1, 0, b"z" * 8192, 4)
    image.punch(1, 10, 20, 4)
    assert image.read(1, 0, 8192) == b"z" * 10 + bytes(20) + b"z" * 8162


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 4999), st.integers(1, 5000), st.booleans()), min_size=1, max_size=12
    )
)
def test_any_writes_and_punches_leave_what_a_bytearray_would_hold(
    tmp_path_factory: pytest.TempPathFactory, data: list[tuple[int, int, int, bool]]
) -> None:
    store = open_store(tmp_path_factory.mktemp("data"))
    try:
        image = new_image(store, 18000, 5000)
        model = {b: bytearray(image.block_bytes(b)) for b in range(image.block_count)}
        for n, (block, offset, length, punched) in enumerate(data):
            length = min(length, len(model[block]) - offset)
            if length <= 0:
                continue
            new = bytes(length) if punched else pattern(length, n)
            if punched:
                image.ready(block, 1, 0)
                image.punch(block, offset, length, 1)
            else:
                write(image, block, offset, new, 1)
            model[block][offset : offset + length] = new
        for block, whole in model.items():
            if image.generations[block]:
                assert image.read(block, 0, len(whole)) == whole
                cached = image.read_cached(block, 0, len(whole))
                assert cached is None or cached == whole
    finally:
        store.close()


def test_hashes_tell_equal_from_different_and_holes_from_data(image: ImageStore) -> None:
    write(image, 0, 4096, pattern(4096, 1), 2)
    write(image, 1, 4096, pattern(4096, 1), 2)
    write(image, 1, 8191, b"!", 2)
    write(image, 2, 0, bytes(8192), 2)
    first, second, third = (image.hash_beside(image.borrow(b), b, 0, 8192, 4096) for b in (0, 1, 2))
    assert first[:HASH_BYTES] == second[:HASH_BYTES] == HOLE
    assert first[HASH_BYTES:] != second[HASH_BYTES:]
    assert third == HOLE * 2
    assert len(image.hash_beside(image.borrow(0), 0, 100, 5000, 4096)) == 2 * HASH_BYTES


# --- generations and epochs


def test_a_write_of_an_older_generation_is_refused(image: ImageStore) -> None:
    write(image, 0, 0, b"new", 9)
    with pytest.raises(StaleEpoch):
        write(image, 0, 0, b"old", 8)
    assert image.read(0, 0, 3) == b"new"
    image.check(0, 9)
    for other in (0, 8, 10):
        with pytest.raises(Damaged):
            image.check(0, other)


def test_a_higher_epoch_is_on_disk_before_it_counts_and_a_lower_one_is_refused(reopen: OpenStore) -> None:
    image = new_image(reopen())
    image.admit(7)
    image.admit(7)
    with pytest.raises(StaleEpoch) as caught:
        image.admit(6)
    assert caught.value.details == {"epoch": 7}
    assert reopen().image(UUID).epoch == 7


# --- files prove nothing (R8)


def _remove(path: Path) -> None:
    path.unlink()


def _truncate(path: Path) -> None:
    os.truncate(path, 4096)


def _grow(path: Path) -> None:
    os.truncate(path, 8193)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("harm", [_remove, _truncate, _grow, _directory, _dangling])
def test_a_harmed_block_file_is_bad_and_is_left_as_it_is(reopen: OpenStore, harm: Callable[[Path], None]) -> None:
    image = new_image(reopen())
    for block in range(3):
        write(image, block, 0, pattern(8192, block), 5)
    path = block_path(image.store, 1)
    image.close()
    harm(path)
    before = os.path.lexists(path) and os.lstat(path)
    store = reopen()
    image = store.image(UUID)
    assert [bad[:2] for bad in image.inventory()["bad"]] == [[1, 1]]
    for attempt in (
        lambda: image.read(1, 0, 10),
        lambda: image.read_cached(1, 0, 10),
        lambda: write(image, 1, 0, b"x", 5),
        lambda: write(image, 1, 0, b"x", 6),
        lambda: image.punch(1, 0, 10, 5),
        lambda: image.borrow(1),
    ):
        with pytest.raises(DiskError):
            attempt()
    assert list(flush(image, [0, 1, 2])) == [1]
    after = os.path.lexists(path) and os.lstat(path)
    assert (before and (before.st_ino, before.st_size)) == (after and (after.st_ino, after.st_size))
    assert image.read(2, 0, 8192) == pattern(8192, 2)


def test_a_file_cut_while_it_is_open_is_found_by_read_hash_and_flush(image: ImageStore) -> None:
    write(image, 1, 0, pattern(8192, 1), 5)
    os.truncate(block_path(image.store, 1), 4096)
    with pytest.raises(Damaged):
        image.read(1, 4000, 200)
    assert image.read_cached(1, 4000, 200) is None
    with pytest.raises(Damaged):
        image.hash_beside(image.borrow(1), 1, 0, 8192, 4096)
    assert list(flush(image, [1])) == [1]


def test_a_file_removed_while_it_is_open_fails_the_flush(image: ImageStore) -> None:
    write(image, 1, 0, b"x", 5)
    block_path(image.store, 1).unlink()
    assert list(flush(image, [1])) == [1]


def test_a_block_that_was_announced_and_never_written_has_nothing_to_flush(image: ImageStore) -> None:
    """Its writer died before it was stamped; the next one flushes all that was active."""
    assert flush(image, [0]) == {}
    write(image, 0, 0, b"data", 5)
    assert flush(image, [0]) == {}, "and is not taken for one whose flush failed"


def test_a_file_whose_last_block_has_the_full_size_is_good(store: Store, root: Path) -> None:
    (root / "image01").mkdir()
    (root / "image01" / (FORMAT % 1)).write_bytes(pattern(5000, 1))
    image = new_image(store, 8000, 5000, mode="adopt")
    assert image.adopt() == ([(1, 1)], [])
    image.adopted([(1, 1)], 3)
    assert image.read(1, 0, 3000) == pattern(5000, 1)[:3000]
    assert image.inventory()["bad"] == []


def test_a_short_generation_file_says_never_written(reopen: OpenStore, root: Path) -> None:
    image = new_image(reopen())
    for block in range(5):
        write(image, block, 0, b"x", 4)
    image.close()
    os.truncate(root / "image01" / GENERATIONS, 20)
    assert list(reopen().image(UUID).generations) == [4, 4, 0, 0, 0]


def test_a_directory_without_our_file_or_with_a_damaged_one_holds_no_image(reopen: OpenStore, root: Path) -> None:
    new_image(reopen())
    reopen().close()
    good = json.loads((root / "image01" / META).read_text())
    damaged: list[object] = [
        [],
        {},
        None,
        7,
        {**good, "uuid": "x"},
        {**good, "uuid": 5},
        {**good, "size": "big"},
        {**good, "size": -1},
        {**good, "size": 2**70},
        {**good, "size": float("inf")},
        {**good, "block_size": 0},
        {**good, "block_size": 1},
        {**good, "block_size": True},
        {**good, "epoch": -1},
        {**good, "epoch": None},
        {k: v for k, v in good.items() if k != "epoch"},
    ]
    for fields in damaged:
        (root / "image01" / META).write_text(json.dumps(fields))
        store = reopen()
        assert store.images == {}, fields
        assert len(store.strange) == 1
        with pytest.raises(Damaged):
            store.image(UUID)
    for raw in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        (root / "image01" / META).write_bytes(raw)
        assert reopen().images == {}
    (root / "image01" / META).unlink()
    assert reopen().images == {}
    assert reopen().strange == []


def test_an_image_copied_twice_counts_once(reopen: OpenStore, root: Path) -> None:
    new_image(reopen())
    (root / "zcopy").mkdir()
    (root / "zcopy" / META).write_bytes((root / "image01" / META).read_bytes())
    store = reopen()
    assert store.image(UUID).name == "image01"
    assert "zcopy" in store.strange[0]


def test_the_inventory_tells_generations_as_ranges_and_what_is_bad(image: ImageStore) -> None:
    for block, generation in enumerate((4, 4, 0, 4, 6)):
        if generation:
            write(image, block, 0, b"x", generation)
    block_path(image.store, 0).unlink()
    block_path(image.store, 1).unlink()
    os.truncate(block_path(image.store, 4), 1)
    found = image.inventory()
    assert {k: found[k] for k in ("uuid", "name", "epoch")} == {"uuid": UUID, "name": "image01", "epoch": 0}
    assert found["gens"] == [[0, 1, 4], [3, 3, 4], [4, 4, 6]]
    assert [b[:2] for b in found["bad"]] == [[0, 1], [4, 4]]
    assert "missing" in found["bad"][0][2]
    assert "1 bytes" in found["bad"][1][2]


def test_blocks_whose_files_cannot_be_looked_at_are_bad_not_an_end_of_the_registration(reopen: OpenStore) -> None:
    class Blind(Disk):
        def stat(self, path: str) -> tuple[int, int] | None:
            if path.endswith("1"):
                raise OSError(errno.EIO, "I/O error")
            return super().stat(path)

    image = new_image(reopen())
    write(image, 0, 0, b"x", 4)
    write(image, 1, 0, b"x", 4)
    assert [b[:2] for b in reopen(Blind()).image(UUID).inventory()["bad"]] == [[1, 1]]

    class Blinder(Disk):
        def names(self, path: str) -> list[str]:
            if path.endswith("image01"):
                raise OSError(errno.EIO, "I/O error")
            return super().names(path)

    assert [b[:2] for b in reopen(Blinder()).image(UUID).inventory()["bad"]] == [[0, 1]]


# --- flush (R7)


def test_flush_covers_blocks_and_generations_and_forgets_nothing_written_meanwhile(image: ImageStore) -> None:
    write(image, 0, 0, b"x", 2)
    assert image.unflushed == {0}
    blocks = image.take_unflushed()
    write(image, 1, 0, b"y", 2)
    assert flush_these(image, blocks) == {}
    assert image.unflushed == {1}


def test_generations_are_flushed_when_one_was_written(reopen: OpenStore) -> None:
    class Counting(Disk):
        synced: ClassVar[list[str]] = []

        def fdatasync(self, fd: int) -> None:
            self.synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
            super().fdatasync(fd)

    def names() -> list[str]:
        found, Counting.synced = Counting.synced, []
        return found

    block = FORMAT % 0
    image = new_image(reopen(Counting()))
    write(image, 0, 0, b"x", 2)
    assert flush(image, [0]) == {}
    assert names() == [GENERATIONS, block]
    write(image, 0, 0, b"y", 2)
    assert flush(image, [0]) == {}
    assert names() == [block], "no generation was written since"
    write(image, 0, 0, b"z", 3)
    work = image.flush_begin([0])
    write(image, 1, 0, b"z", 3)
    assert image.flush_end(work, image.flush_beside(work)) == {}
    assert names() == [GENERATIONS, block]
    assert flush(image, [1]) == {}
    assert names() in ([FORMAT % 1], [GENERATIONS, FORMAT % 1])
    again = reopen(Counting()).image(UUID)
    write(again, 0, 0, b"z", 3)
    assert flush(again, [0]) == {}
    assert names() == [GENERATIONS, block], "what the process before has left is not known"


class FailingSync(Disk):
    """fdatasync of files whose name ends so fails while ``broken`` is set."""

    def __init__(self, ending: str) -> None:
        self.ending, self.broken = ending, False

    def fdatasync(self, fd: int) -> None:
        if self.broken and os.readlink(f"/proc/self/fd/{fd}").endswith(self.ending):
            raise OSError(errno.EIO, "I/O error")
        super().fdatasync(fd)


def test_a_block_whose_flush_failed_keeps_failing_until_it_is_made_anew(reopen: OpenStore) -> None:
    disk = FailingSync(FORMAT % 1)
    image = new_image(reopen(disk))
    write(image, 0, 0, b"x", 2)
    write(image, 1, 0, b"x", 2)
    disk.broken = True
    assert list(flush(image, [0, 1])) == [1]
    disk.broken = False
    assert list(flush(image, [1])) == [1], "a failed fsync that succeeds later is a lie"
    write(image, 1, 0, b"y", 2)
    assert list(flush(image, [0, 1])) == [1]
    with block_path(image.store, 1).open("rb") as before:
        image.renew(1)
        assert os.fstat(before.fileno()).st_nlink == 0, "the file is a new one"
    write(image, 1, 0, b"z", 2)
    assert flush(image, [1]) == {}
    assert image.read(1, 0, 2) == b"z\0"


def test_generations_that_could_not_be_flushed_are_written_anew(reopen: OpenStore, root: Path) -> None:
    disk = FailingSync(GENERATIONS)
    image = new_image(reopen(disk))
    write(image, 0, 0, b"x", 2)
    disk.broken = True
    assert list(flush(image, [0])) == [0], "without its generation a block is not on disk"
    disk.broken = False
    write(image, 3, 0, b"x", 6)
    with (root / "image01" / GENERATIONS).open("rb") as before:
        assert flush(image, [0, 3]) == {}
        assert os.fstat(before.fileno()).st_nlink == 0, "the file is a new one"
    assert list(reopen().image(UUID).generations) == [2, 0, 0, 6, 0]


def test_no_descriptor_left_is_an_error_and_no_lie_later(reopen: OpenStore) -> None:
    class Poor(Disk):
        poor = False

        def dup(self, fd: int) -> int:
            if self.poor:
                raise OSError(errno.EMFILE, "too many open files")
            return super().dup(fd)

    disk = Poor()
    image = new_image(reopen(disk))
    write(image, 0, 0, b"x", 2)
    disk.poor = True
    assert list(flush(image, [0])) == [0]
    with pytest.raises(DiskError):
        image.borrow(0)
    disk.poor = False


# --- older copies (R8)


def test_a_stamp_raises_only_what_is_no_older_copy(image: ImageStore) -> None:
    image.ready(0, 5, 0)
    image.write(0, 0, b"data", 5)
    with pytest.raises(Damaged, match="block 0 of image image01: generation 5 is below 7: an older copy"):
        image.ready(0, 9, 7)
    assert image.generations[0] == 5
    for generation, least in ((7, 5), (9, 5), (9, 9)):  # announced twice, and asked twice
        image.ready(0, generation, least)
    assert image.read(0, 0, 4) == b"data"


def test_a_write_needs_a_stamp(image: ImageStore) -> None:
    image.ready(0, 5, 0)
    for block in (0, 1):
        with pytest.raises(Damaged, match="is below 7"):
            image.write(block, 0, b"x", 7)
        with pytest.raises(Damaged, match="is below 7"):
            image.punch(block, 0, 1, 7)
    assert list(image.generations) == [5, 0, 0, 0, 0]
    assert not block_path(image.store, 1).exists()


def test_a_lost_generation_makes_no_block_anew(image: ImageStore) -> None:
    write(image, 1, 0, b"data", 5)
    image.set_generation(1, 0)
    with pytest.raises(Damaged, match="generation 0 is below 5"):
        image.ready(1, 7, 5)
    assert block_path(image.store, 1).read_bytes()[:4] == b"data"


def test_what_lies_under_a_block_never_written_is_no_data(image: ImageStore) -> None:
    block_path(image.store, 1).write_bytes(b"x" * 8192)
    image.ready(1, 5, 0)
    assert image.read(1, 0, 8192) == bytes(8192)


def test_a_block_that_begins_anew_can_be_flushed_again(image: ImageStore) -> None:
    write(image, 1, 0, b"data", 5)
    block_path(image.store, 1).unlink()
    assert list(flush(image, [1])) == [1]
    image.disowned([(1, 1)])
    write(image, 1, 0, b"new", 7)
    assert flush(image, [1]) == {}


def test_what_a_failed_fdatasync_of_generations_has_lost_is_written_again(
    image: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes after it succeeds and stores nothing (R7)."""
    path = Path(image.directory) / GENERATIONS
    for block in (1, 2):
        write(image, block, 0, b"data", 5)
    before = path.stat().st_ino
    fails_once(monkeypatch, image.disk, "fdatasync")
    with pytest.raises(DiskError):
        image.disowned([(1, 1)])
    written: list[int] = []
    pwrite = image.disk.pwrite

    def noted(fd: int, data: bytes, offset: int) -> int:
        written.append(offset)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(image.disk, "pwrite", noted)
    image.disowned([(1, 1)])
    assert written == [8], "the order is carried out anew, not only said to be done"
    with pytest.raises(DiskError, match="fdatasync of"):
        image.check_generations()
    assert flush(image, [2]) == {}
    image.check_generations()
    assert path.stat().st_ino != before, "those of the other blocks may have been lost as well"


# --- resync (R11)


@pytest.mark.parametrize("harm", [None, _remove, _truncate, _grow, _dangling])
def test_renew_makes_a_block_writable_whatever_its_file_is_like(
    image: ImageStore, harm: Callable[[Path], None] | None
) -> None:
    data = pattern(8192, 1)
    write(image, 1, 0, data, 5)
    if harm is not None:
        harm(block_path(image.store, 1))
    image.renew(1)
    assert block_path(image.store, 1).stat().st_size == 8192
    image.write(1, 0, b"new", 7)
    assert image.generations[1] == 0, "it is of no generation until it is whole"
    assert image.read(1, 0, 3) == b"new"
    assert flush(image, [1]) == {}
    if harm is None:
        assert image.read(1, 3, 8189) == data[3:]


def test_a_renewed_block_is_of_no_generation_until_it_is_whole(image: ImageStore) -> None:
    for block, harm in ((0, _remove), (1, _truncate), (2, None)):
        write(image, block, 0, pattern(8192, 1), 5)
        if harm is not None:
            harm(block_path(image.store, block))
        image.renew(block)
        image.write(block, 0, b"half", 7)
    assert list(image.generations[:3]) == [0, 0, 0], "what is half copied must not pass for data"
    image.set_generation(1, 7)
    image.write(1, 0, b"next", 9)
    assert list(image.generations[:3]) == [0, 9, 0]


def test_renew_of_a_file_exchanged_under_us_uses_the_new_one(image: ImageStore) -> None:
    write(image, 1, 0, b"old", 5)
    path = block_path(image.store, 1)
    path.rename(path.with_name("kept-by-admin"))
    path.write_bytes(bytes(8192))
    image.renew(1)
    image.write(1, 0, b"new", 7)
    assert path.read_bytes()[:3] == b"new"
    assert path.with_name("kept-by-admin").read_bytes()[:3] == b"old"


# --- adoption


def test_hand_made_block_files_are_adopted_as_they_are(store: Store, root: Path) -> None:
    directory = root / "image01"
    directory.mkdir()
    for block in (0, 1, 3):
        (directory / (FORMAT % block)).write_bytes(pattern(8192, block))
    (directory / (FORMAT % 4)).write_bytes(b"short")
    (directory / "notes.txt").write_bytes(b"mine")
    image = new_image(store, mode="adopt")
    present, bad = image.adopt()
    assert present == [(0, 1), (3, 3)]
    assert [b[:2] for b in bad] == [[4, 4]]
    assert new_image(store, mode="adopt") is image
    image.adopted(present, 12)
    assert image.read(3, 0, 8192) == pattern(8192, 3)
    image.check(3, 12)
    assert (directory / "notes.txt").read_bytes() == b"mine"
    assert (directory / (FORMAT % 4)).read_bytes() == b"short"


def test_forget_takes_back_an_adoption_and_leaves_the_block_files(store: Store, root: Path) -> None:
    directory = root / "image01"
    directory.mkdir()
    (directory / (FORMAT % 0)).write_bytes(pattern(8192, 0))
    new_image(store, mode="adopt").adopted([(0, 0)], 5)
    store.forget(UUID)
    store.forget(UUID)
    assert os.listdir(directory) == [FORMAT % 0]
    assert store.images == {}
    assert new_image(store, mode="adopt").adopt()[0] == [(0, 0)]


def test_block_files_of_another_size_are_refused_without_a_trace(store: Store, root: Path) -> None:
    directory = root / "image01"
    directory.mkdir()
    (directory / (FORMAT % 0)).write_bytes(bytes(4096))
    with pytest.raises(Exists, match="8192"):
        new_image(store, mode="adopt")
    assert os.listdir(directory) == [FORMAT % 0]
    assert store.images == {}


# --- prepare and drop


@pytest.mark.parametrize("mode", ["create", "join"])
def test_data_in_the_way_are_refused_and_left(store: Store, root: Path, mode: str) -> None:
    directory = root / "image01"
    directory.mkdir()
    (directory / "precious").write_bytes(b"data")
    with pytest.raises(Exists):
        new_image(store, mode=mode)
    assert os.listdir(directory) == ["precious"]


@pytest.mark.parametrize("mode", ["create", "join", "adopt"])
def test_the_directory_of_another_image_is_refused(store: Store, mode: str) -> None:
    new_image(store)
    with pytest.raises(Exists):
        store.prepare(OTHER_UUID, "image01", 40960, 8192, mode)
    assert list(store.images) == [UUID]


def test_create_twice_is_refused_and_join_twice_is_not(store: Store) -> None:
    image = new_image(store, mode="join")
    assert new_image(store, mode="join") is image
    with pytest.raises(Exists):
        new_image(store)


def test_what_a_crash_in_prepare_leaves_is_no_data(store: Store, root: Path) -> None:
    (root / "image01").mkdir()
    (root / "image01" / TEMPORARY).write_bytes(b"half")
    (root / "image01" / GENERATIONS).write_bytes(b"\x09" * 40)
    image = new_image(store)
    assert set(image.generations) == {0}
    write(image, 0, 0, b"x", 1)


@pytest.mark.parametrize(
    ("uuid", "name", "size", "block_size", "mode"),
    [
        (UUID, "../outside", 40960, 8192, "create"),
        (UUID, ".ukai", 40960, 8192, "create"),
        (UUID, "", 40960, 8192, "create"),
        (UUID, "a/b", 40960, 8192, "create"),
        ("no-uuid", "image01", 40960, 8192, "create"),
        ("", "image01", 40960, 8192, "create"),
        (UUID, "image01", 0, 8192, "create"),
        (UUID, "image01", 40960, 1, "create"),
        (UUID, "image01", 2**62, 8192, "create"),
        (UUID, "image01", 40960, 8192, "steal"),
    ],
)
def test_what_cannot_be_an_image_is_refused_before_anything_is_made(
    store: Store, root: Path, uuid: str, name: str, size: int, block_size: int, mode: str
) -> None:
    before = sorted(p.relative_to(root) for p in root.rglob("*"))
    with pytest.raises(UkaiError):
        store.prepare(uuid, name, size, block_size, mode)
    assert sorted(p.relative_to(root) for p in root.rglob("*")) == before
    assert store.images == {}


def test_a_file_where_the_directory_should_be_is_refused(store: Store, root: Path) -> None:
    (root / "image01").write_bytes(b"a file")
    with pytest.raises(UkaiError):
        new_image(store)
    assert (root / "image01").read_bytes() == b"a file"


def test_an_image_known_with_other_sizes_is_refused(store: Store) -> None:
    new_image(store, mode="join")
    with pytest.raises(Exists):
        new_image(store, 81920, 8192, mode="join")


def test_drop_deletes_the_image_and_leaves_foreign_files(store: Store, root: Path) -> None:
    image = new_image(store)
    for block in range(5):
        write(image, block, 0, b"x", 2)
    (root / "image01" / "notes.txt").write_bytes(b"mine")
    drop(store)
    assert os.listdir(root / "image01") == ["notes.txt"]
    assert store.images == {}
    with pytest.raises(NotFound):
        drop(store)


def test_drop_of_an_image_of_our_own_leaves_nothing(store: Store, root: Path) -> None:
    write(new_image(store), 0, 0, b"x", 2)
    drop(store)
    assert os.listdir(root) == [".ukai"]


def test_drop_of_another_uuid_under_the_same_name_touches_nothing(store: Store) -> None:
    image = new_image(store)
    write(image, 0, 0, b"x", 2)
    with pytest.raises(NotFound):
        store.drop(OTHER_UUID, "image01")
    assert image.read(0, 0, 1) == b"x"


@pytest.mark.parametrize("checksum", [False, True])
def test_what_was_dropped_during_a_flush_is_not_noted_as_failed(store: Store, checksum: bool) -> None:
    """A location may be removed while a flush is under way, which may fail: nobody asks for these blocks again."""

    def fails(work: Borrowed) -> list[int]:
        return list(image.flush_end(work, [errno.EIO for _, fd, _ in work if fd >= 0]))

    image = store.prepare(UUID, "image01", 40960, 8192, "create", checksum)
    write(image, 0, 0, b"x", 2)
    write(image, 1, 0, b"y", 2)
    work = image.flush_begin([0, 1])
    image.drop([(1, 1)])()
    assert fails(work) == [0, 1], "who waits for it hears of it"
    assert list(image.poisoned) == [0]
    write(image, 2, 0, b"z", 2)
    work = image.flush_begin([2])
    drop(store)
    assert fails(work) == [2]
    assert image.poisoned == {}


def test_while_a_thread_deletes_block_files_none_are_made_there(store: Store) -> None:
    """It would delete these too: an administrator may take a location back in before the old files are gone."""
    image = new_image(store)
    for block in range(3):
        write(image, block, 0, b"x", 2)
    delete = image.drop([(0, 1)])
    assert [block_path(store, b).exists() for b in range(3)] == [True] * 3
    for make in (lambda: image.ready(1, 3, 0), lambda: image.renew(1)):
        with pytest.raises(NotReady, match="is being deleted"):
            make()
    image.ready(2, 3, 2)
    delete()
    assert [block_path(store, b).exists() for b in range(3)] == [False, False, True]
    image.ready(1, 3, 0)
    image.renew(0)
    assert image.read(1, 0, 1) == b"\0"


def test_drop_of_blocks_forgets_exactly_those(reopen: OpenStore) -> None:
    image = new_image(reopen())
    for block in range(5):
        write(image, block, 0, b"x", 2)
    image.drop([(1, 2), (4, 4000)])()
    assert [block_path(image.store, b).exists() for b in range(5)] == [True, False, False, True, False]
    assert image.unflushed == {0, 3}
    assert reopen().image(UUID).inventory()["gens"] == [[0, 0, 2], [3, 3, 2]]


# --- descriptors


def test_the_file_unused_for_longest_is_closed_and_those_not_flushed_stay(reopen: OpenStore) -> None:
    store = reopen(limit=2)
    image = new_image(store)
    for block in range(5):
        write(image, block, 0, b"x", 2)
    assert [b for _, b in store.files] == [0, 1, 2, 3, 4], "an error of the disk must find the descriptor open"
    assert flush(image, [0, 1, 2, 3, 4]) == {}
    image.read(0, 0, 1)
    store.forget_files(UUID, 4)
    image.read(4, 0, 1)
    assert [b for _, b in store.files] == [0, 4]
    image.read(1, 0, 1)
    assert [b for _, b in store.files] == [4, 1]
    held = [d for d in descriptors() if d.endswith(tuple(FORMAT % b for b in range(5)))]
    assert len(held) == 2


def test_a_borrowed_descriptor_outlives_the_one_it_came_from(image: ImageStore) -> None:
    write(image, 0, 0, b"x", 2)
    fd = image.borrow(0)
    image.store.forget_files(UUID)
    assert image.read_beside(fd, 0, 0, 1) == b"x"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


# --- the store itself


def test_a_new_store_takes_its_identity_and_keeps_it(reopen: OpenStore) -> None:
    store = reopen()
    assert (store.store_id, store.serial, store.highest_seq) == (STORE_ID, 0, 0)
    store.serial, store.highest_seq, store.cluster_id = 3, 77, "c"
    store.save()
    store.close()
    again = Store(store.root, "%016d", Disk(), 64)
    again.open("another-id")
    assert (again.store_id, again.serial, again.highest_seq, again.cluster_id) == (STORE_ID, 3, 77, "c")
    again.close()


def test_a_second_blockd_is_refused(reopen: OpenStore, root: Path) -> None:
    store = reopen()
    before = descriptors()
    with pytest.raises(Busy, match="another blockd"):
        open_store(root)
    assert descriptors() == before
    store.close()
    reopen().save()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xff",
        b'{"store_id": "x"}',
        b'{"store_id": 1, "cluster_id": "", "serial": 0, "highest_seq": 0}',
        b'{"store_id": "x", "cluster_id": "", "serial": "many", "highest_seq": 0}',
        b'{"store_id": "x", "cluster_id": "", "serial": 0, "highest_seq": -1}',
    ],
)
def test_a_damaged_identity_is_named_and_kept(reopen: OpenStore, root: Path, content: bytes) -> None:
    reopen().close()
    (root / ".ukai" / "store.json").write_bytes(content)
    before = descriptors()
    with pytest.raises(UsageError, match=r"store\.json is damaged"):
        open_store(root)
    assert descriptors() == before
    assert (root / ".ukai" / "store.json").read_bytes() == content


def test_a_data_root_that_cannot_be_used_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"data_root .*file") as caught:
        open_store(tmp_path / "file")
    assert "\n" not in caught.value.message
    assert "None" not in caught.value.message


def test_no_space_is_told_apart(reopen: OpenStore) -> None:
    class Full(Disk):
        full = 0

        def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
            if self.full:
                raise OSError(self.full, "full")
            return super().pwrite(fd, data, offset)

    disk = Full()
    image = new_image(reopen(disk))
    write(image, 0, 0, b"x", 2)
    for number in (errno.ENOSPC, errno.EDQUOT):
        disk.full = number
        with pytest.raises(NoSpace) as caught:
            write(image, 0, 0, b"y", 2)
        assert caught.value.details == {"touched": False}
    disk.full = errno.EIO
    with pytest.raises(DiskError) as failed:
        write(image, 0, 0, b"y", 2)
    assert failed.value.details == {"touched": True}
    assert 0 in image.unflushed
    disk.full = 0
    assert image.read(0, 0, 1) == b"x"
    write(image, 0, 0, b"z", 2)


def test_a_new_store_is_there_after_a_power_cut(tmp_path: Path) -> None:
    """Also the directories above it, whoever made them."""
    for seed in range(10):
        journal = tmp_path / f"{seed}.journal"
        root = tmp_path / str(seed) / "ukai" / "data"
        disk = JournaledDisk(str(journal))
        open_store(root, disk).close()
        os.close(disk._log)
        power_cut(journal, random.Random(seed))
        assert (root / ".ukai" / "store.json").exists()


class OneBadSync(Disk):
    """The next fdatasync fails; then the pages count as clean, as with Linux."""

    fail = True

    def fdatasync(self, fd: int) -> None:
        if self.fail and os.readlink(f"/proc/self/fd/{fd}").endswith("1"):
            self.fail = False
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().fdatasync(fd)


@pytest.mark.expect_log("an fdatasync of .* had failed before blockd was started")
def test_a_failed_fdatasync_is_not_forgotten_by_a_restart(reopen: OpenStore) -> None:
    """What is read is made durable before an fsync succeeds, and metad hears of it once: others may have more (R7)."""
    image = new_image(reopen(OneBadSync()))
    for block in (0, 1):
        image.ready(block, 7, 0)
        image.write(block, 100, pattern(500, block), 7)
    assert list(flush(image, [0, 1])) == [1]
    inode = block_path(image.store, 1).stat().st_ino
    image = reopen().image(UUID)
    assert [bad[:2] for bad in image.inventory()["bad"]] == [[1, 1]]
    assert list(image.generations[:2]) == [7, 7]
    assert image.read(1, 100, 500) == pattern(500, 1)
    assert block_path(image.store, 1).stat().st_ino != inode, "the file is to be another one"
    assert flush(image, [0, 1]) == {}
    image = reopen().image(UUID)
    assert image.inventory()["bad"] == []
    assert image.read(1, 100, 500) == pattern(500, 1)


@pytest.mark.expect_log("an fdatasync of .* had failed before blockd was started")
def test_a_block_that_can_not_be_made_anew_keeps_failing(reopen: OpenStore) -> None:
    image = new_image(reopen(OneBadSync()))
    image.ready(1, 7, 0)
    image.write(1, 100, pattern(500, 1), 7)
    assert list(flush(image, [1])) == [1]
    block_path(image.store, 1).unlink()
    for _ in range(2):
        image = reopen().image(UUID)
        assert list(flush(image, [1])) == [1]
    image.renew(1)
    image = reopen().image(UUID)
    assert (image.poisoned, image.generations[1]) == ({}, 0)
