"""Checksums: what a disk alters silently is found, what a process that dies leaves is right."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.blockd.conftest import OpenStore
from tests.blockd.files import FORMAT, STORE_ID, UUID, block_path, flush_these, pattern
from ukai.blockd.disk import Disk
from ukai.blockd.files import HASH_BYTES, HOLE, SUMS
from ukai.blockd.image_store import ImageStore
from ukai.blockd.store import Store
from ukai.blockd.sums import CHUNK_BYTES, sum_of, sums_of
from ukai.errors import Damaged

SIZE, BLOCK = 50000, 20000
"""Three blocks; the last chunk of each is short."""


def new_image(store: Store) -> ImageStore:
    return store.prepare(UUID, "image01", SIZE, BLOCK, "create", checksum=True)


def put(image: ImageStore, block: int, offset: int, data: bytes, generation: int = 1) -> None:
    image.ready(block, generation, 0)
    image.write(block, offset, data, generation)


def spoil(store: Store, block: int, offset: int, data: bytes = b"?") -> None:
    with block_path(store, block).open("r+b", buffering=0) as f:
        os.pwrite(f.fileno(), data, offset)


def every_way(image: ImageStore, block: int, offset: int, length: int) -> list[Callable[[], object]]:
    """All that reads a part of a block."""
    return [
        lambda: image.read(block, offset, length),
        lambda: image.read_cached(block, offset, length),
        lambda: image.read_beside(image.borrow(block), block, offset, length),
        lambda: image.hash_beside(image.borrow(block), block, offset, length, 8192),
    ]


def test_zeros_have_the_sum_of_a_hole() -> None:
    assert list(sums_of(bytes(CHUNK_BYTES + 100))) == [0, 0]
    assert sum_of(b"\1" + bytes(4095)) != 0
    assert sum_of(bytes(100)) == 0


@pytest.mark.parametrize("place", [0, 4095, 4096, 9000, BLOCK - 1])
def test_one_altered_byte_is_found_wherever_it_is_read(store: Store, place: int) -> None:
    image = new_image(store)
    data = pattern(BLOCK, 3)
    put(image, 1, 0, data)
    spoil(store, 1, place, bytes([data[place] ^ 1]))
    chunk = place // CHUNK_BYTES
    for look in every_way(image, 1, place, 1):
        with pytest.raises(Damaged, match=f"checksum of chunk {chunk} of block 1 does not match"):
            look()
    for other in range(0, BLOCK, CHUNK_BYTES):
        if other // CHUNK_BYTES != chunk:
            assert image.read(1, other, 1) == data[other : other + 1]


def test_garbage_in_a_hole_and_lost_data_are_found(store: Store) -> None:
    image = new_image(store)
    put(image, 0, 0, b"x")
    spoil(store, 0, 8192)
    with pytest.raises(Damaged):
        image.read(0, 8192, 10)
    for seed in (1, 2):  # what a chunk held before its last write is good as well
        put(image, 1, 4096, pattern(4096, seed))
    with block_path(store, 1).open("r+b") as f:
        Disk().punch(f.fileno(), 0, BLOCK)
    read, _, beside, hashes = every_way(image, 1, 4096, 4096)  # of a hole nothing is cached
    for look in (read, beside, hashes):
        with pytest.raises(Damaged):
            look()
    assert image.hash_beside(image.borrow(1), 1, 8192, 8192, 4096) == HOLE * 2


def test_a_part_of_a_chunk_does_not_make_damage_look_good(store: Store) -> None:
    image = new_image(store)
    put(image, 0, 0, pattern(8192, 1))
    spoil(store, 0, 5000, b"\0")
    with pytest.raises(Damaged):
        image.write(0, 4096, b"new", 1)
    with pytest.raises(Damaged):
        image.punch(0, 4000, 200, 1)
    image.write(0, 4096, pattern(4096, 9), 1)
    assert image.read(0, 0, 8192) == pattern(4096, 1) + pattern(4096, 9)


def test_a_process_that_dies_between_sums_and_data(reopen: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The former content counts, and stays right under later writes that die as well."""

    class Dead(BaseException):
        pass

    def die(*_args: Any) -> int:
        raise Dead

    image = new_image(reopen())
    old = pattern(BLOCK, 1)
    put(image, 0, 0, old)
    for number in range(3):
        for offset, length in ((0, 4096), (5000, 100), (4000, 9000)):
            with monkeypatch.context() as patch:
                real = image.sums._store  # type: ignore[union-attr]
                patch.setattr(image.sums, "_store", lambda *a, real=real: (real(*a), die()))
                with pytest.raises(Dead):
                    image.write(0, offset, pattern(length, 50 + number), 1)
            image = reopen().image(UUID)
            assert image.read(0, 0, BLOCK) == old
    image.write(0, 5000, b"done", 1)
    assert image.read(0, 0, BLOCK) == old[:5000] + b"done" + old[5004:]


def test_a_deleted_or_renewed_block_begins_with_zeros(store: Store) -> None:
    image = new_image(store)
    put(image, 0, 0, pattern(BLOCK, 1))
    image.drop([(0, 0)])()
    put(image, 0, 100, b"x", 2)
    assert image.read(0, 0, 200) == bytes(100) + b"x" + bytes(99)
    image.poisoned[0] = "its flush failed"
    image.renew(0)
    image.write(0, 100, b"y", 2)
    assert image.read(0, 0, 200) == bytes(100) + b"y" + bytes(99)


def test_what_is_found_at_a_resync_is_taken_as_it_is(store: Store) -> None:
    image = new_image(store)
    put(image, 0, 0, pattern(BLOCK, 1))
    spoil(store, 0, 4096, pattern(4096, 7))
    assert image.matches_beside(image.borrow(0), 0, 0, 4096)
    assert not image.matches_beside(image.borrow(0), 0, 0, BLOCK)
    image.accept(0, 0, BLOCK)
    assert image.matches_beside(image.borrow(0), 0, 0, BLOCK)
    assert image.read(0, 4096, 4096) == pattern(4096, 7)


def test_checksums_are_flushed_with_the_data_and_a_failure_poisons(reopen: OpenStore) -> None:
    synced: list[int] = []

    class Watched(Disk):
        bad = False

        def fdatasync(self, fd: int) -> None:
            name = os.readlink(f"/proc/self/fd/{fd}")
            synced.append(name.endswith(SUMS))
            if self.bad and name.endswith(SUMS):
                raise OSError(5, "no")

    disk = Watched()
    image = new_image(reopen(disk))
    put(image, 0, 0, b"a")
    put(image, 1, 0, b"b")
    put(image, 2, 0, b"c")
    image.unflushed.discard(2)
    assert flush_one(image, 0) == {}
    assert any(synced)
    disk.bad = True
    assert list(flush_one(image, 0)) == [0]
    disk.bad = False
    assert list(flush_one(image, 1)) == [1], "its sums may have been among those that were lost"
    assert flush_one(image, 2) == {}


def flush_one(image: ImageStore, block: int) -> dict[int, str]:
    """As ``Replica.flush``: other blocks stay unflushed."""
    image.unflushed.discard(block)
    return flush_these(image, [block])


def test_a_lost_file_of_sums_is_noticed(reopen: OpenStore, root: Path) -> None:
    image = new_image(reopen())
    assert image.sums is not None
    assert not image.sums.lost
    put(image, 0, 0, b"a")
    reopen()
    (root / "image01" / SUMS).unlink()
    image = reopen().image(UUID)
    assert image.sums is not None
    assert image.sums.lost


@given(
    writes=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 19999), st.integers(1, 13000), st.integers(0, 3)), max_size=12
    )
)
@settings(max_examples=60, deadline=None)
def test_any_writes_and_punches_are_read_as_written(
    writes: list[tuple[int, int, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against plain bytes; the store is opened anew now and then, and equal data have equal hashes."""
    root = tmp_path_factory.mktemp("sums")
    store = Store(str(root), FORMAT, Disk(), 2)
    store.open(STORE_ID)
    image = new_image(store)
    model = [bytearray(image.block_bytes(b)) for b in range(3)]
    for b in range(3):
        image.ready(b, 1, 0)
    for number, (block, offset, length, kind) in enumerate(writes):
        offset %= image.block_bytes(block)
        length = min(length, image.block_bytes(block) - offset)
        if kind == 0:
            image.punch(block, offset, length, 1)
            model[block][offset : offset + length] = bytes(length)
        else:
            image.write(block, offset, pattern(length, number), 1)
            model[block][offset : offset + length] = pattern(length, number)
        if kind == 3:
            store.close()
            store = Store(str(root), FORMAT, Disk(), 2)
            store.open(STORE_ID)
            image = store.image(UUID)
        assert image.read(block, offset, length) == model[block][offset : offset + length]
    for b in range(3):
        assert image.read(b, 0, len(model[b])) == model[b]
        found = image.hash_beside(image.borrow(b), b, 0, len(model[b]), 4096)
        assert len(found) == HASH_BYTES * -(-len(model[b]) // 4096)
    store.close()
