"""A cable of the tests' own network is cut and joined, and nothing of it stays."""

from __future__ import annotations

import socket

import pytest

from tests.mesh import NAMESPACES, Mesh

pytestmark = pytest.mark.fuse  # wants root as mounts do

PORT = 4000


def _reached(mesh: Mesh, host: int) -> bool:
    with mesh.inside(1), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        try:
            out.sendto(b"x", (mesh.address(host), PORT))
        except OSError:  # the route went with the link
            return False
    return True


def _listener(mesh: Mesh, host: int) -> socket.socket:
    with mesh.inside(host):
        there = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    there.bind(("", PORT))
    there.settimeout(2)
    return there


def test_a_cut_is_between_two_hosts_only() -> None:
    with Mesh(3) as mesh, _listener(mesh, 2) as two, _listener(mesh, 3) as three:
        mesh.cut(2, 1)
        assert not _reached(mesh, 2)
        assert _reached(mesh, 3)
        assert three.recv(10) == b"x"
        mesh.join(1, 2)
        assert _reached(mesh, 2)
        assert two.recv(10) == b"x"
        assert mesh.cut_cables == set()
        names = [mesh.namespace(n) for n in mesh.numbers]
    assert not any((NAMESPACES / name).exists() for name in names)
