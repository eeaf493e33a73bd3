"""What recorders of one image were told, one after the other, whichever hypervisor they ran on."""

from __future__ import annotations

import os
from pathlib import Path

from tests.processes import recorder
from tests.processes.guest import Recorder
from tests.processes.recorder import RECORD_BYTES

SLOTS = 61
STEP = 53
"""Slots of the recorder and how far they are apart: over many blocks, and in many parts of them."""


class Ledger:
    """The acknowledged writes to ``slots`` of an image; ``root`` is where the recorders' logs are kept."""

    def __init__(self, root: Path, slots: int = SLOTS, step: int = STEP) -> None:
        self.slots = range(0, slots * step, step)
        self.verified = 0
        self._root = root
        self._logs: list[Path] = []

    def start(self, disk: Path, ahead: int = 1) -> Recorder:
        """A recorder that goes on after the former ones; well ``ahead`` where a former one still writes."""
        begin = max(self._known().values(), default=0) + ahead
        return Recorder(disk, self._next_log(), step=self.slots.step, count=len(self.slots), begin=begin)

    def _next_log(self) -> Path:
        self._logs.append(self._root / f"records{len(self._logs)}")
        return self._logs[-1]

    def check(self, disk: Path, crashes: int) -> None:
        """No acknowledged write is lost, and at most one per crash is there without having been acknowledged.

        What was seen here once counts as acknowledged from now on: it must not go again.
        """
        known, ahead = self._known(), []
        with disk.open("rb", buffering=0) as file:
            for slot in self.slots:
                data = os.pread(file.fileno(), RECORD_BYTES, slot * RECORD_BYTES)
                number = recorder.number_in(data, slot)
                told = known.get(slot, 0)
                assert number >= told, f"slot {slot}: pass {told} was acknowledged, found {number} on {disk}"
                if number > told:
                    ahead.append((slot, number))
        assert len(ahead) <= crashes, f"writes that were never acknowledged: {ahead}"
        if ahead:
            self._next_log().write_text("".join(f"S {slot} {number}\n" for slot, number in ahead))
        self.verified += len(self.slots)

    @property
    def written(self) -> int:
        """Acknowledged writes so far."""
        return sum(line.startswith("W") for line in self._lines())

    def _lines(self) -> list[str]:
        found: list[str] = []
        for log in self._logs:
            text = log.read_text() if log.exists() else ""
            found += text[: text.rfind("\n") + 1].splitlines()
        return found

    def _known(self) -> dict[int, int]:
        """slot → the last pass that was acknowledged or seen."""
        known: dict[int, int] = {}
        for line in self._lines():
            kind, slot, number, *_ = line.split()
            if kind in "WS":
                known[int(slot)] = int(number)
        return known
