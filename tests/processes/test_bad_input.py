"""What an administrator may get wrong: a one-line error that says what to do, its exit code, and no trace left."""

from __future__ import annotations

import concurrent.futures
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster
from tests.processes.guest import QUICK, create, read_at, wait_unavailable, write_at

pytestmark = pytest.mark.cluster

REFUSED, USAGE, UNREACHABLE = 1, 2, 3
ONE, TWO, THREE = "127.0.0.1", "127.0.0.2", "127.0.0.3"
UNKNOWN = "192.0.2.77"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes without a mount, for all of this module: what is refused leaves nothing behind."""
    with Cluster(tmp_path_factory.mktemp("bad"), nodes=3, frontends=(), settings=QUICK) as one:
        yield one
        assert one.images() == []
        one.compare_replicas()


def traces(cluster: Cluster) -> dict[str, Any]:
    """All that a command could leave: files of every node (our own store files apart), images, jobs."""
    files = {}
    for address in cluster.addresses:
        for where, _, names in os.walk(cluster.data_root(address)):
            if Path(where).name != ".ukai":
                files[where] = sorted(names)
    root = Path(str(cluster.settings["metadata_root"]))
    metadata = sorted(p.name for p in root.iterdir() if p.name != ".ukai")
    return {"files": files, "metadata": metadata, "images": cluster.images(), "jobs": cluster.ask("status")["jobs"]}


def refused(cluster: Cluster, codes: set[int], says: str, *args: str) -> str:
    """The command ends with one of ``codes`` and a line that holds ``says``, and leaves no trace."""
    before = traces(cluster)
    done = cluster.ctl_run(*args)
    lines = done.stderr.strip().splitlines()
    assert done.returncode in codes, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    if lines[:1] and lines[0].startswith("Usage: "):  # the line comes after how the command is used
        lines = lines[-1:]
    assert len(lines) == 1, done.stderr
    assert says in lines[0], done.stderr
    assert traces(cluster) == before
    return lines[0]


def create_args(name: str = "image01", size: str = "1G", block_size: str = "64M", *locations: str) -> list[str]:
    args = ["image", "create", name, "--size", size, "--block-size", block_size]
    return args + [arg for node in locations or (ONE, TWO) for arg in ("--location", node)]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (create_args("image01", "0"), USAGE, "0"),
        (create_args("image01", str(2**63)), USAGE, ""),
        (create_args("image01", "-1"), USAGE, ""),
        (create_args("image01", "8X"), USAGE, "8X"),
        (create_args("image01", "nan"), USAGE, "nan"),
        (create_args("image01", "1G", "1"), USAGE, "block"),
        (create_args("image01", "1G", "0"), USAGE, "block"),
        (create_args("image01", "1M", "2M"), USAGE, "block"),
        (create_args("image01", "1G", "64M", UNKNOWN), REFUSED, UNKNOWN),
        (create_args("image01", "1G", "64M", ONE, UNKNOWN), REFUSED, UNKNOWN),
        (create_args("image01", "1G", "64M", "node1"), USAGE, "node1"),
        (create_args("image01", "1G", "64M", ONE, ONE), USAGE, "twice"),
        ([*create_args(), "--hypervisor", THREE, "--hypervisor", THREE], USAGE, "twice"),
        ([*create_args(), "--hypervisor", UNKNOWN], REFUSED, UNKNOWN),
        (["image", "create", "image01", "--size", "1G"], USAGE, "--location"),
        (create_args(".hidden"), USAGE, ".hidden"),
        (create_args("a/b"), USAGE, "a/b"),
        (create_args(".."), USAGE, ".."),
        (create_args(""), USAGE, ""),
        (create_args("x" * 101), USAGE, "100"),
        (create_args("ümlaut"), USAGE, "mlaut"),
        (create_args("new\nline"), USAGE, ""),
        (["image", "show", "nowhere"], REFUSED, "nowhere"),
        (["image", "remove", "nowhere"], REFUSED, "nowhere"),
        (["image", "remove", "nowhere", "--delete-data"], REFUSED, "nowhere"),
        (["add_image", "nowhere"], REFUSED, "nowhere"),
        (["remove_image", "nowhere"], REFUSED, "nowhere"),
        (["get_diskinfo", "nowhere"], REFUSED, "nowhere"),
        (["add_location", "nowhere", ONE], REFUSED, "nowhere"),
        (["remove_location", "nowhere", ONE], REFUSED, "nowhere"),
        (["add_hypervisor", "nowhere", ONE], REFUSED, "nowhere"),
        (["remove_hypervisor", "nowhere", ONE], REFUSED, "nowhere"),
        (["sync", "start", "nowhere"], REFUSED, "nowhere"),
        (["sync", "start", "nowhere", "--blocks", "3-1"], USAGE, "3-1"),
        (["sync", "stop", "nowhere"], REFUSED, "nowhere"),
        (["migrate", "nowhere", ONE], REFUSED, "nowhere"),
        (["image", "create", "image01", "--size", "1G", "--location", ONE, "--timeout", "nan"], USAGE, "timeout"),
    ],
    ids=lambda value: "-".join(value)[:60].replace("\n", "?") if isinstance(value, list) else "",
)
def test_arguments(cluster: Cluster, args: list[str], code: int, says: str) -> None:
    refused(cluster, {code}, says, *args)


def test_nobody_answers(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cluster.settings, "control_port", int(str(cluster.settings["control_port"])) + 7)
    done = cluster.ctl_run("image", "list", "--timeout", "0.5")
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1


def test_size_is_rounded_and_said(cluster: Cluster) -> None:
    done = cluster.ctl_run(*create_args("round", "1000001", "4096"))
    assert done.returncode == 0, done.stderr
    assert "1003520" in done.stdout + done.stderr
    assert cluster.image("round")["size"] == 1003520
    cluster.ctl("image", "remove", "round", "--delete-data")


def test_two_creates_at_once(cluster: Cluster) -> None:
    """One of them makes the image, the others are refused and leave nothing."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: cluster.ctl_run(*create_args("race", "64M", "1M")), range(4)))
    codes = sorted(d.returncode for d in done)
    assert codes == [0, 1, 1, 1], [d.stderr for d in done]
    for one in done:
        if one.returncode:
            assert len(one.stderr.splitlines()) == 1
            assert "race" in one.stderr
    image = cluster.image("race")
    assert image["locations"] == {n: {"in_sync": 64, "syncing": 0, "out_of_sync": 0} for n in (ONE, TWO)}
    refused(cluster, {REFUSED}, "exists", *create_args("race", "1G"))
    cluster.ctl("image", "remove", "race", "--delete-data")
    assert not any((cluster.data_root(n) / "race").exists() for n in (1, 2, 3))


def test_create_over_existing_data(cluster: Cluster) -> None:
    """A directory of block files that is no image of ours: neither taken nor touched."""
    directory = cluster.data_root(2) / "precious"
    directory.mkdir()
    (directory / f"{0:016d}").write_bytes(b"do not touch")
    line = refused(cluster, {REFUSED}, "precious", *create_args("precious"))
    assert TWO in line
    assert not (cluster.data_root(1) / "precious").exists()
    assert (directory / f"{0:016d}").read_bytes() == b"do not touch"
    (directory / f"{0:016d}").unlink()
    directory.rmdir()


def test_location_that_is_down(tmp_path: Path) -> None:
    """A node that can't be reached now: nothing is made on the others."""
    with Cluster(tmp_path / "cluster", nodes=2, frontends=(), settings=QUICK) as one:
        one.kill(2, "blockd")
        for _ in range(2):  # before metad has missed it, and after
            line = refused(one, {REFUSED, UNREACHABLE}, TWO, *create_args(), "--timeout", "5")
            assert "Traceback" not in line
            wait_unavailable(one, 2)


# --- hand-made metadata

BLOCKS = [{ONE: {"sync_status": 0}, TWO: {"sync_status": 0}}] * 4
GOOD: dict[str, Any] = {"name": "hand", "size": 4 << 20, "block_size": 1 << 20, "hypervisors": [ONE], "blocks": BLOCKS}


def text(**changed: object) -> str:
    return json.dumps({key: value for key, value in (GOOD | changed).items() if value is not None})


def stale(status: int) -> list[dict[str, dict[str, int]]]:
    return [*BLOCKS[:3], {ONE: {"sync_status": status}}]


MALFORMED: dict[str, Callable[[], str]] = {
    "empty": lambda: "",
    "truncated": lambda: text()[:-20],
    "no map": lambda: "[1, 2]",
    "not json": lambda: "name = image01",
    "nul": lambda: "\0" * 100,
    "deep": lambda: "[" * 100_000,
    "no name": lambda: text(name=None),
    "other name": lambda: text(name="other"),
    "no size": lambda: text(size=None),
    "size a text": lambda: text(size="4M"),
    "size true": lambda: text(size=True),
    "size a fraction": lambda: text(size=4194304.5),
    "size 0": lambda: text(size=0, blocks=[]),
    "size 2^63": lambda: text(size=2**63),
    "block size 1": lambda: text(block_size=1),
    "block size too large": lambda: text(block_size=8 << 20, blocks=BLOCKS[:1]),
    "one block short": lambda: text(blocks=BLOCKS[:3]),
    "one block more": lambda: text(blocks=[*BLOCKS, BLOCKS[0]]),
    "no blocks": lambda: text(blocks=None),
    "blocks a map": lambda: text(blocks={}),
    "a block a list": lambda: text(blocks=[*BLOCKS[:3], [ONE]]),
    "a block without a copy": lambda: text(blocks=[*BLOCKS[:3], {}]),
    "no in-sync replica": lambda: text(blocks=stale(2)),
    "syncing alone": lambda: text(blocks=stale(1)),
    "an unknown status": lambda: text(blocks=stale(7)),
    "an unknown location": lambda: text(blocks=[*BLOCKS[:3], {UNKNOWN: {"sync_status": 0}}]),
    "a location that is no address": lambda: text(blocks=[*BLOCKS[:3], {"node1": {"sync_status": 0}}]),
    "a node twice": lambda: text(blocks="@").replace(
        '"@"', "[" + ", ".join(['{"127.0.0.1": {"sync_status": 0}, "127.0.0.1": {"sync_status": 2}}'] * 4) + "]"
    ),
    "no hypervisors": lambda: text(hypervisors=None),
    "a hypervisor twice": lambda: text(hypervisors=[ONE, ONE]),
    "an unknown hypervisor": lambda: text(hypervisors=[UNKNOWN]),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_hand_made_metadata(cluster: Cluster, what: str) -> None:
    """Each is refused with one line, on no node anything is left, and the file itself stays as it was."""
    path = Path(str(cluster.settings["metadata_root"])) / "hand"
    path.write_text(MALFORMED[what]())
    before = path.read_bytes()
    line = refused(cluster, {REFUSED, USAGE}, "", "add_image", "hand")
    assert "hand" in line or ONE in line
    assert path.read_bytes() == before
    path.unlink()


def test_hand_made_metadata_without_block_files(cluster: Cluster) -> None:
    """What no node has a file of was never written: zeros, and the answer says so."""
    path = Path(str(cluster.settings["metadata_root"])) / "hand"
    path.write_text(text())
    added = cluster.ctl("add_image", "hand")
    assert "no location has a file of blocks 0-3" in added["notes"][0]
    cluster.ctl("image", "remove", "hand", "--delete-data")
    path.unlink()


def test_hand_made_metadata_over_a_known_image(cluster: Cluster) -> None:
    cluster.ctl(*create_args("hand", "4M", "1M"))
    path = Path(str(cluster.settings["metadata_root"])) / "hand"
    path.write_text(text())
    uuid = cluster.image("hand")["uuid"]
    refused(cluster, {REFUSED}, "online already", "add_image", "hand")
    assert cluster.image("hand")["uuid"] == uuid
    path.unlink()
    cluster.ctl("image", "remove", "hand", "--delete-data")


@pytest.mark.fuse
def test_refused_while_in_use(tmp_path: Path) -> None:
    """What an order must not do to an image that is open."""
    with Cluster(tmp_path / "cluster", nodes=2, settings=QUICK) as one:
        disk = create(one)
        write_at(disk, 0, b"in use")
        with disk.open("rb", buffering=0):
            for args in (
                ["remove_image", "disk"],
                ["image", "remove", "disk"],
                ["image", "remove", "disk", "--delete-data"],
                ["remove_hypervisor", "disk", ONE],
                ["hypervisor", "add", "disk", ONE],
                ["location", "add", "disk", TWO],
                ["location", "add", "disk", TWO, "--blocks", "16"],
                ["location", "remove", "disk", TWO, "--blocks", "3-99"],
                ["sync", "start", "disk", "--node", THREE],
            ):
                done = one.ctl_run(*args)
                assert done.returncode in (REFUSED, USAGE), (args, done.stdout, done.stderr)
                assert "Traceback" not in done.stderr
                assert read_at(disk, 0, 6) == b"in use"
        assert one.image("disk")["health"] == "ok"
        assert one.compare_replicas() == 32
