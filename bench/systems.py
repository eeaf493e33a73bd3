"""What is measured: each system shows a file that fio uses, and says which processes serve it.

All have the same face, so that the rows know nothing of what is underneath.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import psutil

from bench.machines import Machine, Network, PeerError, run
from tests.cluster import DEFAULTS, Cluster
from tests.machine import wait_for
from ukai import __version__
from ukai.config import Config
from ukai.frontend import binding

FILE_BYTES = 2**29
"""All files of all systems with all their copies together must stay in the page cache of a machine of 24 GB."""
READY_S = 60.0


class System(Protocol):
    """One contender."""

    name: str
    about: str
    """Version, and what is on and off."""

    def setup(self, directory: Path) -> None:
        """Bring it up, its files below ``directory``.  Raises PeerError, CtlError or AssertionError."""
        ...

    def path(self) -> Path:
        """The file for fio, of FILE_BYTES."""
        ...

    def prefix(self) -> list[str]:
        """What fio's command line begins with, to be where the file is."""
        ...

    def processes(self) -> dict[str, psutil.Process]:
        """Who works for it, by what they are called in the results."""
        ...

    def close(self) -> None:
        """End everything; called also after a setup that failed."""
        ...


class Plain:
    """A file of the local filesystem."""

    name, about = "plain", "a file on the same local filesystem, no network, no copies"

    def setup(self, directory: Path) -> None:
        self._path = directory / "file"
        allocate(self._path)

    def path(self) -> Path:
        return self._path

    def prefix(self) -> list[str]:
        return []

    def processes(self) -> dict[str, psutil.Process]:
        return {}

    def close(self) -> None:
        pass


class Binding:
    """The frontend's FUSE binding over a plain file: what remains when all of UKAI behind it is free."""

    name = "binding"

    def __init__(self) -> None:
        self.about = f"{binding.load('auto')} as ukai-frontend uses it, over a plain file, no copies"
        self._machine: Machine | None = None

    def setup(self, directory: Path) -> None:
        self._path = directory / "mnt" / "file"
        self._path.parent.mkdir()
        allocate(directory / "file")
        self._machine = Machine()
        python = (sys.executable, "-P", "-m", "bench.passthrough")
        self._machine.spawn(directory / "log", *python, directory / "file", self._path.parent)
        look = self._machine.inside("stat", "--format=%s", self._path)
        wait_for(lambda: run(["sh", "-c", '"$@" 2>/dev/null || true', "sh", *look]).strip(), "the mount", READY_S)

    def path(self) -> Path:
        return self._path

    def prefix(self) -> list[str]:
        assert self._machine is not None
        return self._machine.inside()

    def processes(self) -> dict[str, psutil.Process]:
        return numbered(self._machine.processes()) if self._machine is not None else {}

    def close(self) -> None:
        if self._machine is not None:
            self._machine.close()


class Peer:
    """Two machines of namespaces, each with one copy; the file is used on the first, as on a hypervisor that stores."""

    packages: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.network: Network | None = None
        self._mount = Path()

    def setup(self, directory: Path) -> None:
        self.network = Network(2)
        self._mount = directory / "mnt"
        self._mount.mkdir()
        self.build(directory, *self.network.machines)
        wait_for(self._mounted, f"the mount of {type(self).__name__}", READY_S)
        # made in place: the peers' mounts are seen in their own machine only
        self.network.machines[0].run("truncate", f"--size={FILE_BYTES}", self.path())

    def build(self, directory: Path, first: Machine, second: Machine) -> None:
        """Start all and mount at ``directory``/mnt in the first machine."""
        raise NotImplementedError

    def _mounted(self) -> bool:
        assert self.network is not None
        table = self.network.machines[0].run("cat", "/proc/self/mountinfo")
        return any(line.split()[4] == str(self._mount) for line in table.splitlines())

    def path(self) -> Path:
        return self._mount / "file"

    def prefix(self) -> list[str]:
        assert self.network is not None
        return self.network.machines[0].inside()

    def processes(self) -> dict[str, psutil.Process]:
        machines = self.network.machines if self.network is not None else []
        return numbered([process for m in machines for process in m.processes()])

    def close(self) -> None:
        if self.network is not None:
            self.network.close()


class GlusterFS(Peer):
    """Replica 2, options of the group virt, the FUSE client."""

    name = "glusterfs"
    packages = ("glusterfs-server", "glusterfs-client")

    def __init__(self) -> None:
        super().__init__()
        self.about = f"GlusterFS {version('glusterfs-server')}, replica 2, group virt, FUSE client on the first node"

    def build(self, directory: Path, first: Machine, second: Machine) -> None:
        for number, node in enumerate((first, second), 1):
            home = directory / f"node{number}"
            for private in ("/var/lib/glusterd", "/var/log/glusterfs"):
                there = home / private.replace("/", "_")
                there.mkdir(parents=True)
                if private == "/var/lib/glusterd":
                    shutil.copytree("/var/lib/glusterd/groups", there / "groups")
                node.run("mount", "--bind", there, private)
            node.run("mount", "-t", "tmpfs", "none", "/run")
            (home / "brick").mkdir()
            node.run("glusterd")
        first.run("gluster", "peer", "probe", second.address)

        def together() -> bool:
            return "Peer in Cluster (Connected)" in first.run("gluster", "peer", "status")

        wait_for(together, "both nodes of GlusterFS", READY_S)
        bricks = [f"{node.address}:{directory}/node{n}/brick" for n, node in enumerate((first, second), 1)]
        first.run("gluster", "--mode=script", "volume", "create", "bench", "replica", "2", *bricks, "force")
        first.run("gluster", "--mode=script", "volume", "set", "bench", "group", "virt")
        first.run("gluster", "--mode=script", "volume", "start", "bench")
        first.run("mount", "-t", "glusterfs", f"{first.address}:/bench", self._mount)


class MooseFS(Peer):
    """Goal 2."""

    name = "moosefs"
    packages = ("moosefs-master", "moosefs-chunkserver", "moosefs-client")

    def __init__(self) -> None:
        super().__init__()
        self.about = (
            f"MooseFS {version('moosefs-master')}, goal 2, mfsmount on the first node with its defaults: it "
            "acknowledges writes from its memory"
        )

    def build(self, directory: Path, first: Machine, second: Machine) -> None:
        user = "WORKING_USER = root\nWORKING_GROUP = root\n"
        home = directory / "master"
        home.mkdir()
        shutil.copy("/var/lib/mfs/metadata.mfs.empty", home / "metadata.mfs")
        (home / "exports.cfg").write_text("* / rw,alldirs,admin,maproot=0:0\n")
        settings = f"DATA_PATH = {home}\nEXPORTS_FILENAME = {home}/exports.cfg\n"
        (home / "master.cfg").write_text(user + settings)
        first.run("mfsmaster", "-c", home / "master.cfg", "start")
        for number, node in enumerate((first, second), 1):
            home = directory / f"node{number}"
            (home / "chunks").mkdir(parents=True)
            (home / "hdd.cfg").write_text(f"{home}/chunks\n")
            settings = f"DATA_PATH = {home}\nHDD_CONF_FILENAME = {home}/hdd.cfg\nMASTER_HOST = {first.address}\n"
            (home / "chunkserver.cfg").write_text(user + settings)
            node.run("mfschunkserver", "-c", home / "chunkserver.cfg", "start")
        first.run("mfsmount", self._mount, "-H", first.address)
        first.run("mfssetgoal", "2", self._mount)
        wait_for(lambda: self._stores_twice(first), "both chunk servers of MooseFS", READY_S)

    def _stores_twice(self, first: Machine) -> bool:
        """Whether a new file gets two copies: both chunk servers are there."""
        probe = self._mount / "probe"
        try:
            first.run("dd", "if=/dev/zero", f"of={probe}", "bs=4k", "count=1", "conv=fsync", timeout_s=5)
        except PeerError:  # no chunk server yet
            return False
        listing = first.run("mfsfileinfo", probe)
        first.run("rm", probe)
        return "copy 2:" in listing


class Ukai:
    """Three nodes with the settings that a user has; its images are contenders of their own."""

    def __init__(self, settings: Mapping[str, object] | None = None) -> None:
        self._settings = settings or {}
        self.cluster: Cluster | None = None

    def start(self, directory: Path) -> Cluster:
        """The cluster, up; a new one where the former had to be abandoned."""
        if self.cluster is None or all(process.popen is None for process in self.cluster.processes.values()):
            defaults = {key: getattr(Config(), key) for key in DEFAULTS}
            directory.mkdir(exist_ok=True)
            root = Path(tempfile.mkdtemp(dir=directory))
            self.cluster = Cluster(root, settings={**defaults, **self._settings})
            self.cluster.start_all()
        return self.cluster

    def close(self) -> None:
        if self.cluster is not None:
            cluster, self.cluster = self.cluster, None
            if faults := cluster.close():
                print(f"left by UKAI: {'; '.join(faults)}", file=sys.stderr)


class Image:
    """An image of a cluster of UKAI, used on node 1."""

    def __init__(self, name: str, about: str, ukai: Ukai, locations: tuple[int, ...], *options: str) -> None:
        self.name = name
        self.about = f"UKAI {__version__}, defaults, {about}"
        self._ukai, self._locations, self._options = ukai, locations, options

    def setup(self, directory: Path) -> None:
        cluster = self._ukai.start(directory)
        create(cluster, self.name, FILE_BYTES, self._locations, *self._options)

    def path(self) -> Path:
        assert self._ukai.cluster is not None
        return self._ukai.cluster.path(self.name)

    def prefix(self) -> list[str]:
        return []

    def processes(self) -> dict[str, psutil.Process]:
        return processes(self._ukai.cluster) if self._ukai.cluster is not None else {}

    def close(self) -> None:
        self._ukai.close()


def create(cluster: Cluster, name: str, size_bytes: int, locations: tuple[int, ...], *options: str) -> None:
    """Create an image for the hypervisor of node 1, and wait until its mount shows it.  Raises CtlError."""
    places = [word for n in locations for word in ("--location", cluster.node(n))]
    words = ["--size", str(size_bytes), "--hypervisor", cluster.node(1), *places, *options]
    cluster.ctl("image", "create", name, *words)
    wait_for(lambda: cluster.path(name).exists(), f"{name} in the mount", READY_S)


def processes(cluster: Cluster) -> dict[str, psutil.Process]:
    """The processes of a cluster, as frontend1, blockd1, blockd2, metad …"""
    found = {}
    for process in cluster.processes.values():
        number = cluster.addresses.index(process.node) + 1
        label = process.name if process.name == "metad" else f"{process.name}{number}"
        if process.alive:
            found[label] = psutil.Process(process.pid)
    return found


def numbered(found: list[psutil.Process]) -> dict[str, psutil.Process]:
    """Processes by their names, told apart by a number where there are several."""
    named: dict[str, psutil.Process] = {}
    for process in found:
        try:
            name = process.name()
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
        except psutil.Error:
            continue
        named[name if name not in named else f"{name}.{process.pid}"] = process
    return named


def allocate(path: Path) -> None:
    """A sparse file of FILE_BYTES."""
    with path.open("wb") as file:
        os.truncate(file.fileno(), FILE_BYTES)


def version(package: str) -> str:
    """Debian's version of a package; empty where it isn't installed."""
    if shutil.which("dpkg-query") is None:
        return ""
    return run(["sh", "-c", 'dpkg-query -f "\\${Version}" -W "$1" 2>/dev/null || true', "sh", package])
