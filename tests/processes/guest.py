"""What stands for a virtual machine in these tests: images made and opened, writers whose writes are known, fio."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.cluster import Cluster, CtlError
from tests.machine import tool, wait_for
from tests.processes import recorder
from tests.processes.recorder import RECORD_BYTES

MakeCluster = Callable[..., Cluster]

QUICK: dict[str, object] = {
    "replica_timeout": 1.5,
    "lease": 1.5,
    "beat_interval": 0.3,
    "role_linger": 0.3,
    "io_timeout": 20,
}
"""Settings that let tests of failures wait no longer than they must."""

OUT_OF_SYNC = 2
MARKED = r"blocks \d+-\d+ at \S+ out-of-sync"
"""What a coordinator says when it goes on without a replica (R4)."""


def create(
    cluster: Cluster,
    name: str = "disk",
    size: str = "16M",
    block_size: str = "1M",
    locations: Sequence[int] = (1, 2),
    hypervisors: Sequence[int] = (1,),
    checksum: bool = False,
    options: Sequence[str] = (),
) -> Path:
    """Make an image and wait until the first hypervisor shows it; its path there."""
    args = ["image", "create", name, "--size", size, "--block-size", block_size, *options]
    if checksum:
        args.append("--checksum")
    for option, nodes in (("--location", locations), ("--hypervisor", hypervisors)):
        for node in nodes:
            args += [option, cluster.node(node)]
    cluster.ctl(*args)
    for node in hypervisors:
        wait_shown(cluster, name, node)
    return cluster.path(name, hypervisors[0])


def wait_shown(cluster: Cluster, name: str, node: int | str = 1) -> None:
    """Until a node's mount shows the image."""
    wait_for(cluster.path(name, node).exists, f"{name} in the mount of {node}", 10, cluster.tails)


def replicas(cluster: Cluster, name: str, node: int | str) -> dict[int, dict[str, Any]]:
    """block → replica of one location, as metad knows it."""
    address = cluster.node(node)
    return {
        block: part["replicas"][address]
        for part in cluster.image(name)["placement"]
        if address in part["replicas"]
        for block in range(part["first"], part["last"] + 1)
    }


def out_of_sync(cluster: Cluster, name: str, node: int | str) -> set[int]:
    """The blocks whose replica at a location is out-of-sync."""
    return {block for block, r in replicas(cluster, name, node).items() if r["status"] == OUT_OF_SYNC}


def unavailable(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """What ``get_error_state`` says: node → entry."""
    return {entry["address"]: entry for entry in cluster.ctl("get_error_state")["nodes"]}


def wait_unavailable(cluster: Cluster, *nodes: int | str) -> dict[str, dict[str, Any]]:
    """Until ``get_error_state`` lists exactly these nodes."""
    wanted = {cluster.node(n) for n in nodes}
    found: dict[str, dict[str, Any]] = {}

    def listed() -> bool:
        nonlocal found
        found = unavailable(cluster)
        return set(found) == wanted

    wait_for(listed, f"get_error_state with {sorted(wanted)}", 20, cluster.tails)
    return found


def sync(cluster: Cluster, name: str, *options: str) -> dict[str, Any]:
    """Bring an image back in sync; the order's figures."""
    job: dict[str, Any] = cluster.ctl("sync", "start", name, "--wait", "--timeout", "30", *options)["job"]
    assert job["state"] == "done", job
    return job


def in_sync(cluster: Cluster, name: str, timeout_s: float = 60.0) -> None:
    """Bring an image back in sync, also where another order is under way."""

    def whole() -> bool:
        if cluster.image(name)["health"] == "ok":
            return True
        with contextlib.suppress(CtlError):
            cluster.ctl("sync", "start", name)
        return False

    wait_for(whole, f"{name} all in-sync", timeout_s, lambda: f"{cluster.image(name)}\n{cluster.tails()}")


def read_all(path: Path) -> bytes:
    with path.open("rb", buffering=0) as disk:
        return b"".join(iter(lambda: disk.read(1 << 20), b""))


def read_at(path: Path, offset: int, length: int) -> bytes:
    """One open, one read."""
    with path.open("rb", buffering=0) as disk:
        return os.pread(disk.fileno(), length, offset)


def write_at(path: Path, offset: int, data: bytes, *, fsync: bool = True) -> None:
    """One open, one write, and an fsync."""
    with path.open("r+b", buffering=0) as disk:
        assert os.pwrite(disk.fileno(), data, offset) == len(data)
        if fsync:
            os.fsync(disk.fileno())


class Recorder:
    """``recorder.py`` as a process.  A context manager: whatever happens, the process is gone afterwards."""

    def __init__(self, image: Path, log: Path, first: int = 0, step: int = 1, count: int = 64, begin: int = 1) -> None:
        self.image, self.log = image, log
        self.slots = range(first, first + step * count, step)
        program: list[str | Path] = [sys.executable, recorder.__file__, image, log]
        self.popen = subprocess.Popen(
            [*program, str(first), str(step), str(count), str(begin)], stdin=subprocess.DEVNULL, start_new_session=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(30)

    def _lines(self, kind: str) -> Iterator[list[str]]:
        text = self.log.read_text() if self.log.exists() else ""
        for line in text[: text.rfind("\n") + 1].splitlines():
            fields = line.split()
            if fields[0] == kind:
                yield fields[1:]

    @property
    def written(self) -> int:
        """How many writes were acknowledged."""
        return sum(1 for _ in self._lines("W"))

    @property
    def acknowledged(self) -> dict[int, int]:
        """slot → the last acknowledged pass."""
        return {int(slot): int(number) for slot, number, _ in self._lines("W")}

    @property
    def errors(self) -> list[tuple[int, int]]:
        """(slot, errno) of writes that failed."""
        return [(int(slot), int(number)) for slot, number in self._lines("E")]

    @property
    def pauses_s(self) -> list[float]:
        """How long each acknowledged write took, the longest first."""
        return sorted((float(seconds) for _, _, seconds in self._lines("W")), reverse=True)

    def wait_written(self, more: int, timeout_s: float = 60.0) -> None:
        """Until so many more writes are acknowledged.  Raises AssertionError when the writer ends instead."""
        goal = self.written + more

        def reached() -> bool:
            assert self.popen.poll() is None, f"the writer ended with {self.popen.returncode}: {self.errors}"
            return self.written >= goal

        wait_for(reached, f"{goal} acknowledged writes (there are {self.written})", timeout_s)

    def wait_pass(self) -> None:
        """Until each slot has been written at least once from now on."""
        self.wait_written(len(self.slots) + 1)

    def end(self) -> None:
        """Stop between two writes.  Raises AssertionError when one had failed."""
        self.popen.send_signal(signal.SIGTERM)
        code = self.popen.wait(60)
        assert (code, self.errors) == (0, []), f"the writer ended with {code}: {self.errors}"

    def check(self, image: Path | None = None, exact: bool = True) -> int:
        """No acknowledged write is lost; how many slots were looked at.

        Where the writer was killed, one write may have been under way: not ``exact``.
        """
        known = self.acknowledged
        assert known, "the writer wrote nothing"
        ahead = 0
        with (image or self.image).open("rb", buffering=0) as disk:
            for slot in self.slots:
                number = recorder.number_in(os.pread(disk.fileno(), RECORD_BYTES, slot * RECORD_BYTES), slot)
                assert number >= known.get(slot, 0), f"slot {slot}: pass {known[slot]} was acknowledged, found {number}"
                ahead += number > known.get(slot, 0)
        assert ahead <= (0 if exact else 1), f"{ahead} slots hold writes that were never acknowledged"
        return len(self.slots)


FIO = ["--ioengine=libaio", "--direct=1", "--bs=4k", "--iodepth=8", "--verify=crc32c", "--verify_fatal=1",
       "--verify_backlog=64", "--verify_state_save=0", "--thread", "--output-format=terse"]  # fmt: skip


@contextlib.contextmanager
def fio(path: Path, size: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """``fio --verify`` on an image, as a process that is gone afterwards."""
    process = subprocess.Popen(
        [tool("fio"), "--name=guest", f"--filename={path}", f"--size={size}", "--rw=randwrite", *FIO, *options],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/tmp",
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


def fio_ends_well(process: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    """Wait for the end; raises AssertionError unless every block verified."""
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, f"fio ended with {process.returncode}: {output[-2000:]}"
