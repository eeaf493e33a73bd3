"""The fio of a soak, which verifies what it writes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.machine import tool

FIO = ["--ioengine=libaio", "--direct=1", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--thread",
       "--output-format=json", "--end_fsync=1", "--allrandrepeat=1"]  # fmt: skip


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
    complaints = output.partition("{")[0].strip()[-1500:]
    assert guest.returncode == 0, f"fio ended with {guest.returncode}: {complaints}"
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    assert job["error"] == 0, f"fio reports error {job['error']}: {complaints}"
    return int(job["write"]["io_bytes"]), int(job["read"]["io_bytes"])
