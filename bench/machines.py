"""Machines made of namespaces: each has its own network, mounts and process numbers, and leaves nothing behind.

All of a machine's processes, mounts and links end with its first process, however the benchmark ends.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tests.machine import wait_for

START_S = 10.0
END_S = 10.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class PeerError(Exception):
    """A system could not be set up; the message says what failed."""


def run(command: Sequence[str | Path], timeout_s: float = 60.0) -> str:
    """What a command prints.  Raises PeerError with its last words."""
    try:
        done = subprocess.run(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"{' '.join(map(str, command))}: no end within {timeout_s:g} s") from None
    except OSError as e:
        raise PeerError(f"{command[0]}: {e.strerror}") from None
    if done.returncode != 0:
        raise PeerError(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def _end_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Machine:
    """One machine.  ``address`` is set by ``join``."""

    def __init__(self) -> None:
        self.address, self.pid = "", 0
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sleep", "infinity"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,  # nothing but a system call is made in it
            start_new_session=True,
        )

        def first() -> psutil.Process | None:
            return next((p for p in psutil.Process(self._holder.pid).children() if p.name() == "sleep"), None)

        try:
            self.pid = wait_for(first, "the first process of a machine", START_S).pid
        except (AssertionError, psutil.Error) as e:
            self.close()
            raise PeerError(f"no namespaces: {e}") from None
        self.run("ip", "link", "set", "lo", "up")

    def inside(self, *command: str | Path) -> list[str]:
        """The command line that runs ``command`` in this machine's network and mounts."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--", *map(str, command)]

    def run(self, *command: str | Path, timeout_s: float = 60.0) -> str:
        """Run to its end; what it leaves in the background ends with the machine.  Raises PeerError."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--", *map(str, command)]
        return run(enter, timeout_s)

    def spawn(self, log: Path, *command: str | Path) -> None:
        """Start what stays in the foreground."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--", *map(str, command)]
        with log.open("ab") as out:
            subprocess.Popen(enter, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=_end_with_parent)

    def processes(self) -> list[psutil.Process]:
        """All that run in it."""
        space = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for process in psutil.process_iter():
            try:
                if Path(f"/proc/{process.pid}/ns/pid").readlink() == space and process.pid != self.pid:
                    found.append(process)
            except OSError:
                continue
        return found

    def close(self) -> None:
        """End all that runs in it, and wait until it is gone: nothing writes to its files any more."""
        self._holder.kill()
        self._holder.wait()
        try:
            if self.pid:
                psutil.Process(self.pid).wait(END_S)
        except psutil.NoSuchProcess:
            pass  # as it should be
        except psutil.TimeoutExpired:
            print(f"a namespace of the benchmark does not end: process {self.pid}", flush=True)


class Network:
    """A few machines on one switch; the first carries the switch.  A context manager."""

    def __init__(self, count: int) -> None:
        self.machines: list[Machine] = []
        try:
            for _ in range(count):
                self.machines.append(Machine())
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        first = self.machines[0]
        first.run("ip", "link", "add", "switch", "type", "bridge")
        first.run("ip", "link", "set", "switch", "up")
        for number, machine in enumerate(self.machines, 1):
            machine.address = f"10.77.0.{number}"
            where = "switch"
            if machine is not first:
                where, port = "eth0", f"port{number}"
                add = ("ip", "link", "add", port, "type", "veth", "peer", "name", where, "netns", str(machine.pid))
                run(first.inside(*add))  # the number is that of the outer process space
                first.run("ip", "link", "set", port, "master", "switch", "up")
            machine.run("ip", "address", "add", f"{machine.address}/24", "dev", where)
            machine.run("ip", "link", "set", where, "up")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        for machine in reversed(self.machines):
            machine.close()
