"""The N-th operation of the disk fails, N = 1, 2, 3 … until none does: right data or an error of ours.

A write that failed may have been done in part unless it says ``touched: false``; a block whose flush failed says
so until it is made anew.  After the fault everything goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.blockd.faults import FAULTS, FaultyDisk
from tests.blockd.files import FORMAT, STORE_ID, UUID, descriptors, drop, flush, open_store, pattern, write
from ukai.blockd.image_store import ImageStore
from ukai.blockd.store import Store
from ukai.errors import Damaged, StaleEpoch, UkaiError

SIZE, BLOCK = 13000, 5000
LIMIT = 2_000


def failure(do: Callable[[], object]) -> UkaiError | None:
    """The error of ours with which it ends."""
    try:
        do()
    except UkaiError as e:
        return e
    return None


class Story:
    """One life of a store on a disk with one fault, and what its blocks may hold."""

    def __init__(self, root: Path, disk: FaultyDisk, checksum: bool = False) -> None:
        self.root, self.disk, self.checksum = root, disk, checksum
        self.store = Store(str(root), FORMAT, disk, 2)
        self.blocks = [bytearray(min(BLOCK, SIZE - i * BLOCK)) for i in range(3)]
        self.unsure: list[set[int]] = [set(), set(), set()]
        """Bytes of each block that a failed write may have altered."""
        self.generation = 1
        self.errors: list[UkaiError] = []

    def trial(self, do: Callable[[], object]) -> bool:
        """Do it, and once more when the fault struck: it strikes once, so the second time must go well."""
        for _ in range(2):
            fired = self.disk.fired
            error = failure(do)
            if error is None:
                return True
            assert self.disk.fired != fired, f"an error without a fault: {error}"
            assert "\n" not in error.message
            self.errors.append(error)
        return False

    @property
    def image(self) -> ImageStore:
        return self.store.image(UUID)

    def begin(self) -> None:
        assert self.trial(lambda: self.store.open(STORE_ID))
        if UUID not in self.store.images:
            assert self.trial(lambda: self.store.prepare(UUID, "image01", SIZE, BLOCK, "create", self.checksum))

    def alter(self, block: int, offset: int, data: bytes) -> None:
        """A write, or where all are zero a punch."""
        place = range(offset, offset + len(data))
        image = self.image

        def do() -> None:
            try:
                if any(data):
                    write(image, block, offset, data, self.generation)
                else:
                    image.ready(block, self.generation, image.generations[block])
                    image.punch(block, offset, len(data), self.generation)
            except UkaiError as e:
                if e.details.get("touched", False):
                    self.unsure[block].update(place)
                raise

        if self.trial(do):
            self.blocks[block][offset : offset + len(data)] = data
            self.unsure[block].difference_update(place)

    def expect(self, block: int, found: bytes | bytearray) -> None:
        whole = self.blocks[block]
        assert len(found) == len(whole)
        wrong = [i for i, (a, b) in enumerate(zip(found, whole, strict=True)) if a != b and i not in self.unsure[block]]
        assert not wrong, f"block {block} is wrong from byte {wrong[0]}"

    def look(self, block: int) -> None:
        length = len(self.blocks[block])
        image = self.image
        image.check(block, self.generation)
        self.trial(lambda: self.expect(block, image.read(block, 0, length)))
        self.trial(lambda: self.expect(block, image.read_beside(image.borrow(block), block, 0, length)))

        def cached() -> None:
            data = image.read_cached(block, 0, length)
            if data is not None:
                self.expect(block, data)

        self.trial(cached)
        self.trial(lambda: image.hash_beside(image.borrow(block), block, 0, length, 512))

    def flush(self, blocks: list[int]) -> None:
        """Flush until it goes well; only the fault, or a block that failed before, may be in the way."""
        for _ in range(3):
            fired, poisoned = self.disk.fired, set(self.image.poisoned)
            failed = set(flush(self.image, blocks))
            if self.disk.fired == fired:
                assert failed == poisoned, "neither a failure without a cause nor a success after one that failed"
            if not failed:
                return
            for block in list(self.image.poisoned):
                assert list(flush(self.image, [block])) == [block], "a failed fsync that succeeds later is a lie"
                self.renew(block)
        raise AssertionError("one fault made three flushes fail")

    def renew(self, block: int) -> None:
        """As a resync does: the block anew, all of it written, its generation stored."""
        image = self.image
        assert self.trial(lambda: image.renew(block))
        image.write(block, 0, bytes(self.blocks[block]), self.generation)
        image.set_generation(block, self.generation)

    def tell(self) -> None:
        """The inventory names every written block; only a fault makes one bad."""
        fired = self.disk.fired
        found = self.image.inventory()
        gens = {b: g for first, last, g in found["gens"] for b in range(first, last + 1)}
        assert gens == {b: g for b, g in enumerate(self.image.generations) if g}
        assert not found["bad"] or self.disk.fired != fired
        self.trial(lambda: self.image.allocated([(0, 2)]))
        self.trial(self.image.adopt)

    def run(self) -> None:
        self.begin()
        for block in range(3):
            self.alter(block, 100, pattern(700, block))
        self.flush([0, 1, 2])
        self.trial(lambda: self.image.admit(5))
        with contextlib.suppress(StaleEpoch):
            self.image.admit(4)
            raise AssertionError("an epoch that is over was taken")
        self.generation = 9
        for block in range(3):
            self.alter(block, 600, bytes(150))
            self.alter(block, 0, pattern(300, block + 5))
            self.look(block)
        self.tell()
        self.flush([0, 1, 2])
        for block in range(3):
            self.look(block)

    def end(self) -> None:
        self.store.close()


def _faults(kind: str, root: Path, beyond: Callable[[Path, FaultyDisk], None]) -> Iterator[int]:
    for nth in range(1, LIMIT):
        disk = FaultyDisk(kind, nth)
        before = descriptors()
        beyond(root / str(nth), disk)
        assert descriptors() == before, f"fault {nth}: {disk.fired} leaks a descriptor"
        if not disk.fired:
            return
        yield nth
    raise AssertionError("the loop did not come to its end")


@pytest.mark.parametrize("checksum", [False, True], ids=["plain", "checksum"])
@pytest.mark.parametrize("kind", FAULTS)
def test_right_data_or_an_error_of_ours_whichever_operation_fails(tmp_path: Path, kind: str, checksum: bool) -> None:
    quiet = 0

    def story(root: Path, disk: FaultyDisk) -> None:
        nonlocal quiet
        one = Story(root, disk, checksum)
        try:
            one.run()
        except Exception as e:
            e.add_note(f"fault {kind} at operation {disk.nth}: {disk.fired}; before: {one.errors}")
            raise
        finally:
            one.end()
        quiet += disk.fired != "" and not one.errors
        store = open_store(root)
        try:
            image = store.image(UUID)
            assert image.epoch == 5
            assert image.inventory()["bad"] == []
            for block in range(3):
                image.check(block, 9)
                one.expect(block, image.read(block, 0, len(one.blocks[block])))
                write(image, block, 0, b"after", 10)
            assert flush(image, [0, 1, 2]) == {}
        finally:
            store.close()

    fired = list(_faults(kind, tmp_path, story))
    assert len(fired) > 5
    if kind == "short":
        assert quiet == len(fired), "a short read or write is no error"


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "EMFILE", "sync"])
def test_opening_again_survives_any_fault(tmp_path: Path, kind: str) -> None:
    source = Story(tmp_path / "source", FaultyDisk(kind, 0))
    source.run()
    source.end()

    def story(root: Path, disk: FaultyDisk) -> None:
        store = Store(source.store.root, FORMAT, disk, 8)
        error = failure(lambda: store.open(STORE_ID))
        assert error is None or disk.fired
        if UUID not in store.images:
            assert disk.fired
            with pytest.raises(Damaged):
                store.image(UUID)
        store.close()
        again = open_store(tmp_path / "source")
        assert again.store_id == STORE_ID
        assert set(again.image(UUID).generations) == {9}
        again.close()

    for _ in _faults(kind, tmp_path, story):
        pass


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "EMFILE", "sync"])
def test_a_failed_create_leaves_no_trace_and_a_failed_drop_can_be_finished(tmp_path: Path, kind: str) -> None:
    def story(root: Path, disk: FaultyDisk) -> None:
        store = open_store(root)
        store.disk = disk
        try:
            if failure(lambda: store.prepare(UUID, "image01", SIZE, BLOCK, "create")):
                assert disk.fired
                assert store.images == {}
                assert sorted(p.name for p in root.iterdir() if p.name != "image01") == [".ukai"]
                assert not (root / "image01").exists() or "unlink" in disk.fired or "rmdir" in disk.fired
                store.prepare(UUID, "image01", SIZE, BLOCK, "create")
            for block in range(3):
                with contextlib.suppress(UkaiError):
                    write(store.image(UUID), block, 0, b"x", 1)
            fired = disk.fired
            if failure(lambda: drop(store)):
                assert disk.fired != fired
                if UUID in store.images:
                    drop(store)
            assert not [p for p in root.glob("image01/*") if not p.name.startswith(".")]
        finally:
            store.close()

    for _ in _faults(kind, tmp_path, story):
        pass
