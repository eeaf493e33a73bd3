"""What must be on each copy after a power cut: all that the writer had been told of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.durability.writer import RECORD_BYTES, passes_in, slots_of
from tests.machine import wait_for
from ukai.metad.store import Store
from ukai.model import IN_SYNC, Image


class Writer:
    """``writer.py`` as a process, and its log.  A context manager: the process is gone afterwards."""

    def __init__(self, image: Path, log: Path, seed: int, jobs: int = 8, count: int = 32, stride: int = 16) -> None:
        self.log = log
        self.slots = [s for job in range(jobs) for s in slots_of(job, jobs, count, stride)]
        numbers = map(str, (jobs, count, stride, seed))
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "tests.durability.writer", image, log, *numbers],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(30)

    def _lines(self) -> list[list[object]]:
        text = self.log.read_text() if self.log.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def _last(self, kind: str) -> dict[int, int]:
        """slot → the highest pass that a batch of this kind had."""
        out: dict[int, int] = {}
        for what, *rest in self._lines():
            if what == kind:
                out.update((slot, number) for slot, number in rest[0])  # type: ignore[attr-defined]
        return out

    def done(self) -> int:
        return sum(1 for line in self._lines() if line[0] == "done")

    def wait_done(self, more: int) -> None:
        """Until so many more batches are on the disk."""
        goal = self.done() + more

        def reached() -> bool:
            assert self.popen.poll() is None, f"the writer ended by itself: {self._lines()[-1:]}"
            return self.done() >= goal

        wait_for(reached, f"{goal} batches", 60)

    def ended(self) -> Manifest:
        """What it wrote, after what it wrote to has died under it.  Raises AssertionError if nothing was in flight."""
        self.popen.wait(30)
        wrong = [line for line in self._lines() if line[0] == "wrong"]
        assert not wrong, f"a job read back something else than it wrote: {wrong}"
        done, begun = self._last("done"), self._last("begun")
        flying = sum(number != done.get(slot, 0) for slot, number in begun.items())
        assert flying, "the run does not count: no write was in flight"
        return Manifest({slot: (done.get(slot, 0), begun.get(slot, 0)) for slot in self.slots}, flying)


class Manifest:
    """For each slot the pass that is on the disk for certain, and the last that was begun."""

    def __init__(self, slots: dict[int, tuple[int, int]], flying: int) -> None:
        self.slots, self.flying = slots, flying
        assert any(low for low, _ in slots.values()), "the run does not count: nothing was acknowledged"

    def check(self, read: Callable[[int], bytes | None], where: str) -> int:
        """Look at each slot with ``read(slot)``, which may have None to show; how many synced records were found.

        A record that was in flight may be there in part, sector by sector.
        """
        wrong, good = [], 0
        for slot, (low, high) in self.slots.items():
            if (data := read(slot)) is None:
                continue
            try:
                found = passes_in(data, slot)
            except ValueError as e:
                wrong.append(str(e))
                continue
            good += low > 0
            if not all(low <= number <= high for number in found):
                wrong.append(f"slot {slot}: pass {low} was synced, {high} begun, found {sorted(found)}")
        assert not wrong, f"{where} has lost data: {len(wrong)} slots, {wrong[:5]}"
        return good


def metadata(root: Path) -> dict[str, Image]:
    """The images as a metad that was killed has left them, by name.  Its files are left as they are."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(root, copy, dirs_exist_ok=True)
        store = Store(copy, 10_000)
        try:
            images = store.open(str).images
        finally:
            store.close()
    return {image.name: image for image in images.values()}


def in_block_files(image: Image, node: str, data_root: Path) -> Callable[[int], bytes | None]:
    """Reads a slot from the block files of one node; None where its replica is not in-sync."""

    def read(slot: int) -> bytes | None:
        block, offset = divmod(slot * RECORD_BYTES, image.block_size)
        replica = image.replica(node, block)
        if replica is None or replica.status != IN_SYNC:
            return None
        if not replica.generation:
            return bytes(RECORD_BYTES)
        with (data_root / image.name / f"{block:016d}").open("rb", buffering=0) as f:
            return os.pread(f.fileno(), RECORD_BYTES, offset)

    return read


def in_mount(path: Path) -> Callable[[int], bytes]:
    """Reads a slot through a frontend."""

    def read(slot: int) -> bytes:
        with path.open("rb", buffering=0) as f:
            return os.pread(f.fileno(), RECORD_BYTES, slot * RECORD_BYTES)

    return read
