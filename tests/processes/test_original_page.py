"""The walk of the original page: create_metadata, block files made by hand, add_image, and what becomes of them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.machine import wait_for
from tests.processes.guest import QUICK, MakeCluster, read_all, read_at, sync, wait_shown, write_at

pytestmark = [pytest.mark.cluster, pytest.mark.fuse]

BLOCK_SIZE = 50_000_000
MIB = 1 << 20


def metadata_root(cluster: Cluster) -> Path:
    return Path(str(cluster.settings["metadata_root"]))


def create_metadata(cluster: Cluster, size: int, *nodes: int, hypervisors: tuple[int, ...] = (1,)) -> Path:
    """``create_metadata`` in metadata_root, as the page says; the file."""
    args = ["create_metadata", "-s", str(size), "-b", str(BLOCK_SIZE)]
    args += [arg for node in hypervisors for arg in ("-h", cluster.node(node))]
    args += [arg for option, node in zip(("-l", "-n"), nodes, strict=False) for arg in (option, cluster.node(node))]
    done = cluster.ctl_run(*args, "image01", cwd=metadata_root(cluster))
    assert done.returncode == 0, done.stderr
    return metadata_root(cluster) / "image01"


def by_hand(cluster: Cluster, node: int, blocks: dict[int, bytes], count: int, last_size: int) -> Path:
    """Block files as an administrator makes them: ``blocks`` holds what they begin with, the rest are zeros."""
    directory = cluster.data_root(node) / "image01"
    directory.mkdir()
    for index in range(count):
        with (directory / f"{index:016d}").open("wb") as file:
            file.write(blocks.get(index, b""))
            file.truncate(last_size if index == count - 1 else BLOCK_SIZE)
    return directory


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of the block files, by name, and their times."""
    found = {}
    for path in sorted(directory.iterdir()):
        if not path.name.startswith("."):
            found[path.name] = f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
    return found


def test_the_pages_own_example(make_cluster: MakeCluster) -> None:
    """8 GB in 160 blocks of 50,000,000 bytes on one node."""
    cluster = make_cluster(nodes=1, settings=QUICK)
    path = create_metadata(cluster, 8_000_000_000, 1)
    here = cluster.node(1)
    written = json.loads(path.read_text())
    assert written["name"] == "image01"
    assert written["size"] == 8_000_000_000 // 4096 * 4096 == 8_000_000_000
    assert written["block_size"] == BLOCK_SIZE
    assert written["hypervisors"] == [here]
    assert written["blocks"] == [{here: {"sync_status": 0}}] * 160
    known = {index: os.urandom(70_000) for index in (0, 1, 77, 159)}
    by_hand(cluster, 1, known, 160, BLOCK_SIZE)
    cluster.ctl("add_image", "image01")
    wait_shown(cluster, "image01")
    disk = cluster.path("image01")
    assert disk.stat().st_size == 8_000_000_000
    for index, data in known.items():
        assert read_at(disk, index * BLOCK_SIZE, len(data) + 10) == data + bytes(10)
    assert read_at(disk, BLOCK_SIZE - 5, 10) == bytes(5) + known[1][:5]
    assert cluster.ctl("get_diskinfo", "image01") == written
    write_at(disk, 3 * BLOCK_SIZE - 1000, b"x" * 2000)  # across a border that is no multiple of 4096
    assert read_at(disk, 3 * BLOCK_SIZE - 1001, 2002) == b"\0" + b"x" * 2000 + b"\0"
    files = cluster.data_root(1) / "image01"
    assert (files / f"{2:016d}").read_bytes()[-1000:] == b"x" * 1000
    assert (files / f"{3:016d}").read_bytes()[:1000] == b"x" * 1000
    assert cluster.compare_replicas("image01") == 160


def test_two_copies_whole_contents(make_cluster: MakeCluster) -> None:
    """What the files held reads back, byte for byte; remove_image deletes nothing and add_image brings it back."""
    cluster = make_cluster(nodes=2, frontends=(1, 2), settings=QUICK)
    size = 3 * BLOCK_SIZE + 4096 * 5
    create_metadata(cluster, size, 1, 2, hypervisors=(1, 2))
    adjusted = json.loads((metadata_root(cluster) / "image01").read_text())["size"]
    assert adjusted == -(-size // 4096) * 4096
    last = adjusted - 3 * BLOCK_SIZE
    blocks = {0: os.urandom(9 * MIB + 1), 2: os.urandom(BLOCK_SIZE), 3: os.urandom(last)}
    directories = [by_hand(cluster, node, blocks, 4, last) for node in (1, 2)]
    content = b"".join(blocks.get(i, b"").ljust(last if i == 3 else BLOCK_SIZE, b"\0") for i in range(4))
    before = [digests(directory) for directory in directories]
    cluster.ctl("add_image", "image01")
    disk = cluster.path("image01")
    for node in (1, 2):
        wait_shown(cluster, "image01", node)
        assert read_all(cluster.path("image01", node)) == content
    assert [digests(directory) for directory in directories] == before, "reading alters no file"

    with disk.open("r+b", buffering=0) as guest:
        os.pwrite(guest.fileno(), b"open", 0)
        done = cluster.ctl_run("remove_image", "image01")
        assert done.returncode == 1
        assert "is open on 127.0.0.1" in done.stderr
        assert disk.exists()
        os.pwrite(guest.fileno(), b"Open", 0)
    content = b"Open" + content[4:]
    cluster.ctl("remove_image", "image01")
    wait_for(lambda: not disk.exists(), "image01 gone from the mount", 10, cluster.tails)
    with pytest.raises(FileNotFoundError):
        disk.open("rb")
    kept = [digests(directory) for directory in directories]
    assert [list(k) for k in kept] == [list(b) for b in before]
    cluster.ctl("add_image", "image01")
    wait_shown(cluster, "image01")
    assert read_all(disk) == content
    assert [digests(directory) for directory in directories] == kept
    assert cluster.image("image01")["health"] == "ok"
    assert cluster.compare_replicas("image01") == 8


def test_copies_that_differ_or_are_missing(make_cluster: MakeCluster) -> None:
    """A file of the wrong size or none at all is no copy (R8): shown with its reason, never read, not deleted."""
    cluster = make_cluster(nodes=2, settings=QUICK)
    size = 3 * BLOCK_SIZE // 4096 * 4096
    create_metadata(cluster, size, 1, 2)
    last = json.loads((metadata_root(cluster) / "image01").read_text())["size"] - 2 * BLOCK_SIZE
    data = os.urandom(MIB)
    by_hand(cluster, 1, {1: data}, 3, last)
    second = by_hand(cluster, 2, {1: data}, 3, last)
    os.truncate(second / f"{1:016d}", 12345)
    (second / f"{2:016d}").unlink()
    short = (second / f"{1:016d}").read_bytes()
    cluster.ctl("add_image", "image01")
    wait_shown(cluster, "image01")
    shown = {
        part["first"]: part["replicas"][cluster.node(2)]
        for part in cluster.image("image01")["placement"]
        if part["replicas"][cluster.node(2)]["status"]
    }
    assert "size" in shown[1]["reason"] or "12345" in shown[1]["reason"]
    assert 2 in shown
    assert shown[2]["reason"]
    assert read_at(cluster.path("image01"), BLOCK_SIZE, MIB) == data
    assert (second / f"{1:016d}").read_bytes() == short
    sync(cluster, "image01")
    cluster.wait_image("image01", "ok")
    assert cluster.compare_replicas("image01") == 6


def test_never_overwrites(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1, settings=QUICK)
    path = create_metadata(cluster, 10 * BLOCK_SIZE, 1)
    before = path.read_bytes()
    done = cluster.ctl_run(
        "create_metadata", "-s", "1G", "-b", "1M", "-l", cluster.node(1), "image01", cwd=metadata_root(cluster)
    )
    assert done.returncode == 1
    assert path.read_bytes() == before
