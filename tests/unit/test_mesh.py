"""A cable of the tests' own network is cut and joined, and nothing of it stays."""

from __future__ import annotations

import socket

import pytest

from tests.mesh import NAMESPACES, Mesh

pytestmark = pytest.mark.fuse  # wants root as mounts do


def _reached(mesh: Mesh, host: int, port: int) -> bool:
    with mesh.inside(1), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        try:
            out.sendto(b"x", (mesh.address(host), port))
        except OSError:  # the route went with the link
            return False
    return True


def test_a_cut_is_between_two_hosts_only() -> None:
    with Mesh(3) as mesh:
        with mesh.inside(2), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two:
            with mesh.inside(3), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as three:
                for there in (two, three):
                    there.bind(("", 4000))
                    there.settimeout(2)
                mesh.cut(2, 1)
                assert not _reached(mesh, 2, 4000)
                assert _reached(mesh, 3, 4000)
                assert three.recv(10) == b"x"
                mesh.join(1, 2)
                assert _reached(mesh, 2, 4000)
                assert two.recv(10) == b"x"
        assert mesh.cut_cables == set()
        names = [mesh.namespace(n) for n in mesh.numbers]
    assert not any((NAMESPACES / name).exists() for name in names)
