"""Hosts in network namespaces of their own, with a cable (a veth pair) between each two.

Made with iproute2, as root.  A cable is cut as a cable is: the link goes down, packets are lost, and nobody is told.
Files and mounts are those of the machine, so that a FUSE mount made by a host is seen from outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import secrets
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.machine import tool

NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000
PORT_FIRST = 22220


class MeshPorts:
    """Ports in namespaces of our own: all are free, and what listens there ends with them."""

    first = PORT_FIRST

    def bound(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


class Mesh:
    """``hosts`` hosts, 1 is the first.  A context manager: the namespaces are gone afterwards."""

    def __init__(self, hosts: int) -> None:
        self.numbers = range(1, hosts + 1)
        self.addresses = [f"10.93.0.{n}" for n in self.numbers]
        self._name = f"ukai-{secrets.token_hex(3)}"
        self._down: set[tuple[int, int]] = set()
        try:
            for host in self.numbers:
                self._ip("netns", "add", self.namespace(host))
                self._in(host, ["link set lo up", f"address add {self.address(host)}/32 dev lo"])
            for a, b in self.cables():
                pair = f"{_port(b)} type veth peer name {_port(a)} netns {self.namespace(b)}"
                self._in(a, [f"link add {pair}"])
                self._plug(a, b)
                self._plug(b, a)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Mesh:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def address(self, host: int) -> str:
        return f"10.93.0.{host}"

    def namespace(self, host: int) -> str:
        return f"{self._name}-{host}"

    def cables(self) -> list[tuple[int, int]]:
        """Each pair of hosts once, the lower number first."""
        return list(itertools.combinations(self.numbers, 2))

    @property
    def cut_cables(self) -> set[tuple[int, int]]:
        return set(self._down)

    def cut(self, a: int, b: int) -> None:
        """Between two hosts nothing goes through any more, either way."""
        a, b = min(a, b), max(a, b)
        self._in(a, [f"link set {_port(b)} down"])
        self._down.add((a, b))

    def join(self, a: int, b: int) -> None:
        """Heal one cable."""
        a, b = min(a, b), max(a, b)
        self._plug(a, b)
        self._down.discard((a, b))

    def join_all(self) -> None:
        for a, b in list(self._down):
            self.join(a, b)

    def command(self, host: int) -> list[str]:
        """What is put before a command that is to run on a host."""
        return [tool("nsenter"), f"--net={NAMESPACES / self.namespace(host)}"]

    @contextlib.contextmanager
    def inside(self, host: int) -> Iterator[None]:
        """Sockets that this thread opens in here, and threads that it starts, are the host's."""
        libc = ctypes.CDLL(None, use_errno=True)
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(NAMESPACES / self.namespace(host), os.O_RDONLY | os.O_CLOEXEC)
            try:
                _enter(libc, there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _enter(libc, own)
        finally:
            os.close(own)

    def close(self) -> None:
        for host in self.numbers:
            if (NAMESPACES / self.namespace(host)).exists():
                self._ip("netns", "delete", self.namespace(host))

    def _plug(self, host: int, other: int) -> None:
        port = _port(other)
        route = f"route replace {self.address(other)}/32 dev {port} src {self.address(host)}"
        self._in(host, [f"link set {port} up", route])

    def _in(self, host: int, lines: Sequence[str]) -> None:
        self._ip("-netns", self.namespace(host), "-batch", "-", text="\n".join(lines) + "\n")

    def _ip(self, *args: str, text: str = "") -> None:
        subprocess.run([tool("ip"), *args], input=text, text=True, check=True, stdout=subprocess.DEVNULL)


def _port(other: int) -> str:
    """The name of a host's end of the cable to another one."""
    return f"to{other}"


def _enter(libc: ctypes.CDLL, fd: int) -> None:
    if libc.setns(fd, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")
