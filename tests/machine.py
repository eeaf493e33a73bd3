"""What tests ask of the machine: ports, mounts, loop devices, processes, and waiting for a condition."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import psutil

T = TypeVar("T")

PORT_STEP = 8
PORT_FIRST, PORT_LAST = 23000, 32000  # above UKAI's own, below those that the kernel hands out
POLL_S = 0.05
FUSE_CONNECTIONS = Path("/sys/fs/fuse/connections")
_LOCK_DIR = Path("/tmp/ukai-test-ports")


def compiled() -> bool:
    """Whether what is installed is."""
    return any(Path(sysconfig.get_path("purelib"), "ukai").glob("*.so"))


@functools.cache
def check_installed() -> None:
    """That UKAI as it is installed is what lies in the tree.  Raises AssertionError."""
    tree, installed = (
        {(str(file.relative_to(root)), file.read_bytes()) for file in Path(root, "ukai").rglob("*.py")}
        for root in (Path(__file__).resolve().parents[1], sysconfig.get_path("purelib"))
    )
    other = sorted({file for file, _ in tree ^ installed})
    assert not other, f"what is installed differs from the tree in {', '.join(other[:5])}; run make setup"


def wait_for(condition: Callable[[], T | None], what: str, timeout_s: float, detail: Callable[[], str] = str) -> T:
    """Ask ``condition`` until it is true; returns what it gave.

    Raises AssertionError that names ``what`` and adds ``detail()``, after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        if result := condition():
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:g} s for {what} in vain\n{detail()}")
        time.sleep(POLL_S)


class PortRange:
    """``count`` ports that are free on all ``addresses``, held against other test runs by a locked file."""

    def __init__(self, addresses: Sequence[str], count: int) -> None:
        assert count <= PORT_STEP, f"at most {PORT_STEP} ports"  # one grid for all: ranges must not overlap
        self.addresses, self.count = addresses, count
        _LOCK_DIR.mkdir(exist_ok=True)
        for first in range(PORT_FIRST, PORT_LAST, PORT_STEP):
            self._lock = os.open(_LOCK_DIR / str(first), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._lock)
                continue
            if not any(self._taken(address, port) for address in addresses for port in range(first, first + count)):
                self.first = first
                return
            os.close(self._lock)
        raise AssertionError(f"no {count} free ports between {PORT_FIRST} and {PORT_LAST}")

    @staticmethod
    def _taken(address: str, port: int) -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return True
        return False

    def bound(self) -> list[str]:
        """The ports of the range that somebody listens on."""
        ports = range(self.first, self.first + self.count)
        return [f"{a}:{p}" for a in self.addresses for p in ports if self._taken(a, p)]

    def close(self) -> None:
        os.close(self._lock)


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo."""

    device: str
    where: Path
    kind: str


def mounts() -> list[Mount]:
    """What is mounted now."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        where = fields[4].replace("\\040", " ")
        found.append(Mount(fields[2], Path(where), fields[fields.index("-") + 1]))
    return found


def mount_answers(where: Path) -> bool:
    """Whether a live FUSE mount is at ``where``; a dead one says no."""
    if not any(m.where == where and m.kind.startswith("fuse") for m in mounts()):
        return False
    try:
        os.listdir(where)
    except OSError:
        return False
    return True


def abort_fuse(where: Path) -> None:
    """Cut the kernel's connection to a FUSE process that hangs: whoever waits in it gets an error and can die."""
    if not any(FUSE_CONNECTIONS.iterdir()):
        subprocess.run(["mount", "-t", "fusectl", "none", FUSE_CONNECTIONS], check=False, capture_output=True)
    for mount in mounts():
        if mount.where == where and mount.kind.startswith("fuse"):
            (FUSE_CONNECTIONS / mount.device.partition(":")[2] / "abort").write_text("1")


def unmount(where: Path) -> None:
    """Take a mount away, now or when its last user is gone."""
    subprocess.run(["umount", "-l", where], check=False, capture_output=True)


def loop_devices() -> dict[str, str]:
    """Loop devices in use: device, backing file."""
    found = {}
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            found[f"/dev/{entry.parts[3]}"] = entry.read_text().strip()
        except OSError:  # let go between the two looks
            continue
    return found


def process_state(pid: int) -> str:
    """The letter of /proc/PID/stat: R, S, D, T …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class Ports(Protocol):
    """Ports of a test's own."""

    def bound(self) -> list[str]: ...


def left_behind(root: Path, run_root: Path, ports: Ports) -> Iterator[tuple[str, Callable[[], object]]]:
    """What a cluster should have taken with it: (a line that says what, how to end it)."""
    for mount in reversed(mounts()):
        if mount.where.is_relative_to(root):
            yield f"left mounted: {mount.where}", functools.partial(_end_mount, mount.where)
    for device, backing in loop_devices().items():
        if backing.startswith(str(root)):
            yield f"left attached: {device} to {backing}", functools.partial(_detach, device)
    marker = str(run_root)
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("UKAI_RUN_DIR", "").startswith(marker)
        except psutil.Error:
            continue
        if mine:
            yield f"left running: {' '.join(process.cmdline())} ({process.pid})", process.kill
    for port in ports.bound():
        yield f"left bound: {port}", str
    for line in Path("/proc/net/unix").read_text().splitlines():
        if str(run_root) in line:  # a socket file alone is left by libzmq, which makes it anew at the next bind
            yield f"left bound: {line.split()[-1]}", str


def _end_mount(where: Path) -> None:
    abort_fuse(where)
    unmount(where)


def _detach(device: str) -> None:
    subprocess.run(["losetup", "-d", device], check=False, capture_output=True)


def tool(name: str) -> str:
    """The path of a program that the set-up installs.  Raises AssertionError when it isn't there."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    assert found, f"{name} is not installed; run make setup"
    return found
