"""The guests of a soak: fio, which verifies what it writes, and a recorder, whose acknowledged writes are known."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.machine import tool
from tests.processes import recorder
from tests.processes.guest import Recorder
from tests.processes.recorder import RECORD_BYTES

FIO = ["--ioengine=libaio", "--direct=1", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--thread",
       "--output-format=json", "--end_fsync=1", "--allrandrepeat=1"]  # fmt: skip
SLOTS = 61
STEP = 53
"""Slots of the recorder and how far they are apart: over many blocks, and in many parts of them."""


class Load:
    """One run of fio over an image: every byte is written once, and verified in between and at the end.

    ``verify_again`` reads it all with the same options later: nothing of it may be older or newer.
    """

    def __init__(self, options: list[str]) -> None:
        self.options = options

    def start(self, disk: Path, backlog: int) -> subprocess.Popen[str]:
        return self._fio(disk, f"--verify_backlog={backlog}")

    def verify_again(self, disk: Path) -> subprocess.Popen[str]:
        return self._fio(disk, "--verify_only=1", "--rate=0")

    def _fio(self, disk: Path, *more: str) -> subprocess.Popen[str]:
        command = [tool("fio"), "--name=guest", f"--filename={disk}", *FIO, *self.options, *more]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/tmp"
        )


def figures(guest: subprocess.Popen[str], timeout_s: float) -> tuple[int, int]:
    """Wait for fio's end; bytes (written, verified).  Raises AssertionError unless all is well."""
    output, _ = guest.communicate(timeout=timeout_s)
    assert guest.returncode == 0, f"fio ended with {guest.returncode}: {output[-1500:]}"
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    assert job["error"] == 0, f"fio reports error {job['error']}: {output[-1500:]}"
    return int(job["write"]["io_bytes"]), int(job["read"]["io_bytes"])


class Ledger:
    """What recorders of one image were told, one after the other, whichever hypervisor they ran on."""

    def __init__(self, root: Path) -> None:
        self.slots = range(0, SLOTS * STEP, STEP)
        self.verified = 0
        self._root = root
        self._logs: list[Path] = []

    def start(self, disk: Path) -> Recorder:
        numbers = self._known().values()
        return Recorder(disk, self._next_log(), step=STEP, count=SLOTS, begin=max(numbers, default=0) + 1)

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
