"""Disks that are not what they were: each kind of damage, for images of two copies and of one, on real processes.

Never wrong bytes, never a stale source, the reason shown per replica, nothing deleted (R8, R9, R12).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.machine import wait_for
from tests.processes.guest import QUICK, create, out_of_sync, read_at, replicas, sync, write_at

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.fuse,
    pytest.mark.expect_log(
        r"last copy|out-of-sync|older copy|is that of node|metadata|metad|is missing|has \d+ bytes|no data of|blockd|"
        r"registered|lease|flushed|generation|resync|Input/output|reach|read of|in-sync"
    ),
]

BLOCK = 1 << 16
ONE, TWO = "127.0.0.1", "127.0.0.2"
DAMAGED = 2
"""The node whose disk is damaged; its frontend, if any, does not matter: the machine runs on node 1."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes for all of this module; each case leaves them well."""
    settings = {**QUICK, "io_timeout": 5}
    with Cluster(tmp_path_factory.mktemp("matrix"), nodes=3, settings=settings) as one:
        yield one
        assert one.images() == []


def pattern(number: int, block: int) -> bytes:
    return bytes([16 * number + block]) * BLOCK


class Case:
    """Two images that were written yesterday and today: ``two`` has copies on nodes 1 and 2, ``one`` on node 2 only.

    Block 0 was written on both days, block 1 yesterday, block 2 today, block 3 never.
    """

    def __init__(self, cluster: Cluster, root: Path) -> None:
        self.cluster, self.root = cluster, root
        self.yesterday = root / "yesterday"
        self.now: dict[int, bytes] = {}
        self.names = {"two": f"two-{root.name}"[:60], "one": f"one-{root.name}"[:60]}

    def begin(self) -> None:
        create(self.cluster, self.names["two"], str(4 * BLOCK), str(BLOCK), locations=(1, 2))
        create(self.cluster, self.names["one"], str(4 * BLOCK), str(BLOCK), locations=(2,))
        self.write(1, (0, 1))
        with self.away("metad"):
            shutil.copytree(self.cluster.data_root(DAMAGED), self.yesterday / "data")
            shutil.copytree(str(self.cluster.settings["metadata_root"]), self.yesterday / "metadata")
        self.restart()  # it registers anew: a copy made before is an older one
        self.write(2, (0, 2))
        sync(self.cluster, self.names["two"])  # a write may have come before the nodes were connected again
        self.wait_idle(self.names["two"])

    def write(self, number: int, blocks: tuple[int, ...]) -> None:
        for name in self.names.values():
            for block in blocks:
                self.now[block] = pattern(number, block)
                write_at(self.cluster.path(name), block * BLOCK, self.now[block])
            self.wait_idle(name)

    def wait_idle(self, name: str, active: list[list[int]] | None = None) -> None:
        """Until nobody holds the role and nothing, or no more than that, is active."""

        def idle() -> bool:
            image = self.cluster.image(name)
            return not image["writer"] and image["active"] == (active or [])

        wait_for(idle, f"{name} idle", 20, self.cluster.tails)

    @contextlib.contextmanager
    def away(self, name: str, *nodes: int) -> Iterator[None]:
        """Processes are stopped for a while."""
        for node in nodes or (1,):
            self.cluster.kill(node, name, 15)
        yield
        started = time.time()
        for node in nodes or (1,):
            self.cluster.start(node, name, ready=False)
        self.cluster.wait_ready()
        if name == "blockd":  # metad may not have missed the former process yet
            self.wait_registered(started, *nodes)

    def wait_registered(self, since: float, *nodes: int) -> None:
        """Until blockd processes that were started later than that have registered."""

        def registered() -> bool:
            found = {n["address"]: n["since"] for n in self.cluster.ask("node.list")["nodes"] if n["state"] == "up"}
            return all(found.get(self.cluster.node(n), 0) > since for n in nodes)

        wait_for(registered, f"blockd of {nodes} registered", 20, self.cluster.tails)

    def restart(self) -> None:
        """The damaged node's blockd, once more."""
        with self.away("blockd", DAMAGED):
            pass

    def directory(self, name: str, node: int = DAMAGED) -> Path:
        return self.cluster.data_root(node) / self.names[name]

    def files(self) -> set[str]:
        """All block files of the damaged node."""
        root = self.cluster.data_root(DAMAGED)
        return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")}

    def reasons(self, name: str, node: int = DAMAGED) -> dict[int, tuple[int, str]]:
        """block → status and reason."""
        found = replicas(self.cluster, self.names[name], node)
        return {block: (r["status"], r["reason"]) for block, r in found.items()}

    def read(self, name: str, block: int) -> bytes | None:
        """What the machine reads, once; None: an error."""
        try:
            return read_at(self.cluster.path(self.names[name]), block * BLOCK, BLOCK)
        except OSError as e:
            if e.errno not in (errno.EIO, errno.ENOENT):
                raise
            return None

    def check(self, name: str, *unreadable: int) -> None:
        """Each block reads as it was written last; the ``unreadable`` ones end with an error."""
        for block in range(4):
            wanted = None if block in unreadable else self.now.get(block, bytes(BLOCK))
            found = self.read(name, block)
            assert found == wanted, (name, block, found and found[:1], wanted and wanted[:1])

    def refuses_writes(self, name: str, block: int) -> None:
        with pytest.raises(OSError, match="Input/output"):
            write_at(self.cluster.path(self.names[name]), block * BLOCK, pattern(9, block))

    def sync_fails(self, name: str, *blocks: int) -> None:
        """A copy of these blocks can be made nowhere: what the node has is no source."""
        self.cluster.ctl("location", "add", self.names[name], ONE)
        self.cluster.ctl_run("sync", "start", self.names[name], "--wait", "--timeout", "4")
        assert set(blocks) <= out_of_sync(self.cluster, self.names[name], 1)
        self.cluster.ctl_run("sync", "stop", self.names[name])
        self.cluster.ctl("location", "remove", self.names[name], ONE)

    def heal(self, name: str) -> None:
        """The two copies are made equal, and are."""
        sync(self.cluster, self.names[name])
        self.cluster.wait_image(self.names[name], "ok")
        self.wait_idle(self.names[name])
        assert self.cluster.compare_replicas(self.names[name]) > 0
        self.check(name)

    def end(self) -> None:
        for name in self.names.values():
            self.cluster.ctl("image", "remove", name, "--delete-data", "--force")
        assert self.cluster.ctl("get_error_state")["nodes"] == []


@pytest.fixture
def case(cluster: Cluster, tmp_path: Path) -> Iterator[Case]:
    one = Case(cluster, tmp_path)
    one.begin()
    yield one
    one.end()


# --- a block file is damaged


def removed(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    os.truncate(path, 1000)


def grown(path: Path) -> None:
    os.truncate(path, BLOCK + 512)


FILES: list[Any] = [
    (removed, "block file is missing though it was written"),
    (truncated, f"block file has 1000 bytes instead of {BLOCK}"),
    pytest.param(grown, f"block file has {BLOCK + 512} bytes instead of {BLOCK}", marks=pytest.mark.campaign),
]


@pytest.mark.parametrize(("harm", "reason"), FILES, ids=lambda v: getattr(v, "__name__", ""))
def test_a_block_file(case: Case, harm: Callable[[Path], None], reason: str) -> None:
    with case.away("blockd", DAMAGED):
        for name in case.names:
            harm(case.directory(name) / f"{0:016d}")
    left = case.files()
    for _ in range(2):  # and after one more restart
        assert case.reasons("two")[0] == (2, reason)
        status, kept = case.reasons("one")[0]
        assert (status, reason in kept) == (0, True), kept
        case.check("two")
        case.check("one", 0)
        case.restart()
    write_at(case.cluster.path(case.names["two"]), 0, pattern(3, 0))
    case.now[0] = pattern(3, 0)
    case.refuses_writes("one", 0)
    case.wait_idle(case.names["one"], [[0, 0]])  # it stays active: nothing was written to it
    assert reason.rpartition("file ")[2] in case.reasons("one")[0][1]
    case.sync_fails("one", 0)
    case.heal("two")
    assert left <= case.files()
    accepted_as_zeros(case)


def accepted_as_zeros(case: Case) -> None:
    """What has no usable file is zeros only where an administrator says so."""
    args = ["image", "accept", case.names["one"], TWO, "--yes"]
    done = case.cluster.ctl_run(*args)
    assert (done.returncode, "--zeros" in done.stderr) == (1, True), done.stderr
    done = case.cluster.ctl_run(*args[:-1])
    assert (done.returncode, "add --yes" in done.stderr) == (1, True), done.stderr
    case.cluster.ctl(*args, "--zeros")
    case.now[0] = bytes(BLOCK)
    case.check("one")
    write_at(case.cluster.path(case.names["one"]), 100, b"goes on")
    assert read_at(case.cluster.path(case.names["one"]), 98, 10) == b"\0\0goes on\0"
    case.wait_idle(case.names["one"])


@pytest.mark.campaign
def test_a_block_file_full_of_zeros(case: Case) -> None:
    """Nothing but a comparison finds that: the other copy is read, `verify` marks this one."""
    with case.away("blockd", DAMAGED):
        (case.directory("two") / f"{0:016d}").write_bytes(bytes(BLOCK))
    case.check("two")
    assert case.cluster.ctl_run("verify", case.names["two"], "--wait", "--timeout", "30").returncode == 1
    status, reason = case.reasons("two")[0]
    assert (status, f"differs from node {ONE}" in reason) == (2, True), reason
    case.heal("two")


# --- the directory of a node


@pytest.mark.campaign
def test_the_directory_is_wiped(case: Case) -> None:
    with case.away("blockd", DAMAGED):
        case.cluster.data_root(DAMAGED).rename(case.root / "lost")
    for _ in range(2):
        for block, written in ((0, True), (1, True), (2, True), (3, False)):
            status, reason = case.reasons("two")[block]
            assert (status == 2 and "replaced by another" in reason) is written
            status, reason = case.reasons("one")[block]
            assert (status, ("replaced by another" in reason or "no data of" in reason)) == (0, written), reason
        case.check("two")
        case.check("one", 0, 1, 2, 3)  # without its directory the node can't be fenced for this image
        case.restart()
    write_at(case.cluster.path(case.names["two"]), 0, pattern(3, 0))
    case.now[0] = pattern(3, 0)
    case.refuses_writes("one", 0)
    case.cluster.ctl("location", "remove", case.names["two"], TWO)
    case.cluster.ctl("location", "add", case.names["two"], TWO)
    case.heal("two")


@pytest.mark.campaign
def test_the_directory_of_yesterday(case: Case) -> None:
    """It has last copies, of which some are as they should be and some are not: nobody but a person can tell."""
    today = case.root / "today"
    case.cluster.kill(DAMAGED, "blockd", 15)
    case.cluster.data_root(DAMAGED).rename(today)
    shutil.copytree(case.yesterday / "data", case.cluster.data_root(DAMAGED))
    left = case.files()
    case.cluster.start(DAMAGED, "blockd", ready=False)
    wait_refused(case.cluster, TWO, r"older copy")
    case.check("two")
    assert case.read("one", 0) is None
    reason = next(n["reason"] for n in case.cluster.ctl("node", "list")["nodes"] if n["address"] == TWO)
    assert "last in-sync copy of blocks" in reason
    assert f"ukai-ctl node accept {TWO}" in reason
    assert left == case.files()

    # the right one comes back
    case.cluster.kill(DAMAGED, "blockd", 15)
    case.cluster.data_root(DAMAGED).rename(case.root / "put aside")
    today.rename(case.cluster.data_root(DAMAGED))
    case.cluster.start(DAMAGED, "blockd")
    case.check("one")
    case.heal("two")

    # there is no other: what it has counts by order
    case.cluster.kill(DAMAGED, "blockd", 15)
    case.cluster.data_root(DAMAGED).rename(today)
    shutil.copytree(case.yesterday / "data", case.cluster.data_root(DAMAGED))
    case.cluster.start(DAMAGED, "blockd", ready=False)
    wait_refused(case.cluster, TWO, r"older copy")
    case.cluster.ctl("node", "accept", TWO, "--yes")
    case.cluster.wait_ready()
    assert all("older copy" in reason for status, reason in case.reasons("two").values() if status == 2)
    assert {b for b, (status, _) in case.reasons("two").items() if status == 2} >= {0, 1, 2}
    case.check("two")
    assert case.read("one", 0) == pattern(1, 0)
    assert case.read("one", 1) == pattern(1, 1)
    # written since: it is not there, or was announced yesterday together with the one before it
    assert case.read("one", 2) in (None, bytes(BLOCK))
    case.heal("two")


def wait_refused(cluster: Cluster, node: str, reason: str) -> None:
    """Until a node is down for this reason."""

    def refused() -> bool:
        found = {n["address"]: n for n in cluster.ask("node.list")["nodes"]}
        return node in found and found[node]["state"] == "down" and reason in found[node]["reason"]

    wait_for(refused, f"{node} refused: {reason}", 20, cluster.tails)


def test_two_directories_are_swapped(case: Case) -> None:
    cluster = case.cluster

    def swap() -> None:
        a, b, between = cluster.data_root(1), cluster.data_root(2), case.root / "between"
        for source, target in ((a, between), (b, a), (between, b)):
            source.rename(target)

    for node in (1, 2):
        cluster.kill(node, "blockd", 15)
    left = case.files()
    swap()
    for node in (1, 2):
        cluster.start(node, "blockd", ready=False)
    for address in (ONE, TWO):
        wait_refused(cluster, address, "is that of node")
    assert case.read("two", 0) is None
    assert case.read("one", 0) is None
    for node in (1, 2):
        cluster.kill(node, "blockd", 15)
    swap()
    assert left <= case.files()
    for node in (1, 2):
        cluster.start(node, "blockd", ready=False)
    cluster.wait_ready()
    assert out_of_sync(cluster, case.names["two"], 1) == out_of_sync(cluster, case.names["two"], 2) == set()
    case.check("two")
    case.check("one")
    case.heal("two")


def test_a_directory_is_copied_to_a_second_node(case: Case) -> None:
    cluster = case.cluster
    cluster.kill(3, "blockd", 15)
    own = case.root / "own"
    cluster.data_root(3).rename(own)
    shutil.copytree(cluster.data_root(DAMAGED), cluster.data_root(3))
    cluster.start(3, "blockd", ready=False)
    wait_refused(cluster, "127.0.0.3", f"is that of node {TWO}")
    case.check("two")
    case.check("one")
    cluster.kill(3, "blockd", 15)
    shutil.rmtree(cluster.data_root(3))
    own.rename(cluster.data_root(3))
    cluster.start(3, "blockd")
    case.heal("two")


# --- the metadata


def put_back(case: Case) -> Path:
    """metad's database is yesterday's; today's is put aside."""
    root, today = Path(str(case.cluster.settings["metadata_root"])), case.root / "metadata of today"
    case.cluster.kill(1, "metad", 15)
    root.rename(today)
    shutil.copytree(case.yesterday / "metadata", root)
    case.cluster.start(1, "metad", ready=False)
    return today


def wait_behind(cluster: Cluster) -> dict[str, Any]:
    """Until all nodes have said what they have; `metadata show`."""
    shown: dict[str, Any] = {}

    def reported() -> bool:
        nonlocal shown
        shown = cluster.try_ask("metadata.show") or {}
        return bool(shown.get("behind")) and all(n["reported"] for n in shown["nodes"])

    wait_for(reported, "all nodes have reported", 20, cluster.tails)
    return shown


def test_the_metadata_of_yesterday(case: Case) -> None:
    today = put_back(case)
    cluster = case.cluster
    wait_behind(cluster)
    done = cluster.ctl_run("sync", "start", case.names["two"])
    assert (done.returncode, "ukai-ctl metadata show" in done.stderr) == (1, True), done.stderr
    assert case.read("two", 0) is None or case.read("two", 0) == case.now[0]

    # the newest one comes back
    cluster.kill(1, "metad", 15)
    root = Path(str(cluster.settings["metadata_root"]))
    root.rename(case.root / "put aside")
    today.rename(root)
    cluster.start(1, "metad")
    case.check("two")
    case.check("one")
    case.heal("two")


@pytest.mark.parametrize("trusted", [1, pytest.param(2, marks=pytest.mark.campaign)])
def test_the_metadata_of_yesterday_is_accepted(case: Case, trusted: int) -> None:
    cluster = case.cluster
    case.cluster.ctl("image", "create", "made-today", "--size", "1M", "--location", TWO)
    put_back(case)
    shown = wait_behind(cluster)
    assert [image["name"] for image in shown["unknown"]] == ["made-today"]
    text = cluster.ctl_run("metadata", "show").stdout
    assert "newer than the metadata" in text
    left = case.files()
    args = ["metadata", "accept", "--trust", f"{case.names['one']}={TWO}", "--trust", cluster.node(trusted)]
    done = cluster.ctl_run(*args)
    assert (done.returncode, "add --yes" in done.stderr) == (1, True), done.stderr
    reply = cluster.ctl(*args, "--yes")
    assert reply["seq"] > reply["seen"]
    assert any("made-today" in note for note in reply["notes"])
    cluster.wait_ready()
    other = 3 - trusted
    assert {s for s, _ in case.reasons("two", trusted).values()} == {0}
    for block in (0, 1, 2):
        assert case.reasons("two", other)[block] == (2, "not trusted when older metadata was accepted")
    case.check("two")
    case.check("one")
    case.heal("two")
    for name in ("metad", "blockd"):
        cluster.restart(1, name)
    case.check("two")
    case.check("one")
    assert left <= case.files()
    shutil.rmtree(cluster.data_root(DAMAGED) / "made-today")
    case.restart()
