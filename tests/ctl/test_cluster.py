"""ukai-ctl against real processes: transfers through a real mount, and refusals that leave no trace."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster import Cluster, program
from tests.machine import wait_for
from ukai.blockd.files import TEMPORARY

pytestmark = pytest.mark.cluster
MakeCluster = Callable[..., Cluster]

MIB = 2**20
BLOCK_0 = f"{0:016d}"


def disk_file(path: Path, size_bytes: int, data_bytes: int, image_format: str) -> Path:
    """A disk image of holes, and from 3 MiB on random data, which repeats every 8 MiB."""
    raw = path.with_suffix(".made")
    data = os.urandom(8 * MIB)
    with raw.open("wb") as file:
        file.truncate(size_bytes)
        file.seek(3 * MIB)
        for left_bytes in range(data_bytes, 0, -len(data)):
            file.write(data[:left_bytes])
    if image_format == "raw":
        return raw.rename(path)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", image_format, str(raw), str(path)], check=True)
    raw.unlink()
    return path


@pytest.mark.fuse
def test_a_disk_goes_in_and_comes_out(make_cluster: MakeCluster, binding: str, tmp_path: Path) -> None:
    """Sparse all the way, the same on both copies, over an older content too."""
    cluster = make_cluster(nodes=2, binding=binding)
    one, two = cluster.addresses
    source = disk_file(tmp_path / "source.qcow2", 100 * MIB, 5 * MIB, "qcow2")
    for target in (["--location", one, "--location", two, "--block-size", "7000000"], []):
        cluster.ctl("image", "import", "disk", str(source), *target)
        cluster.ctl("image", "export", "disk", str(tmp_path / "out.qcow2"), "--force")
        compare = ["qemu-img", "compare", str(source), str(tmp_path / "out.qcow2")]
        assert subprocess.run(compare, capture_output=True, check=False).returncode == 0
        held = sum(f.stat().st_blocks * 512 for f in (cluster.data_root(two) / "disk").iterdir())
        assert 5 * MIB <= held <= 8 * MIB
    assert cluster.compare_replicas("disk") >= 2
    smaller = disk_file(tmp_path / "smaller.raw", 50 * MIB, 2 * MIB, "raw")
    cluster.ctl("image", "import", "disk", str(smaller), "--format", "raw")
    with smaller.open("ab") as file:
        file.truncate(100 * MIB)
    compare = ["qemu-img", "compare", "-f", "raw", "-F", "raw", str(smaller), str(cluster.path("disk"))]
    assert subprocess.run(compare, capture_output=True, check=False).returncode == 0
    larger = cluster.ctl_run("image", "import", "disk", str(disk_file(tmp_path / "larger", 101 * MIB, 1, "raw")))
    assert larger.returncode == 1
    assert "has only" in larger.stderr


def writers(pid: int, path: Path) -> list[psutil.Process]:
    """The child processes that have the file open: the qemu-img that copies, not the one that looks at the source."""
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if str(path) in (file.path for file in child.open_files()):
                found.append(child)
    return found


@pytest.mark.fuse
def test_an_ended_import_leaves_no_image(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """Nor qemu-img, nor a block file."""
    cluster = make_cluster(nodes=2)
    one, two = cluster.addresses
    source = disk_file(tmp_path / "source.raw", 2048 * MIB, 1024 * MIB, "raw")
    command = [program("ukai-ctl"), "image", "import", "disk", str(source), "--location", one, "--location", two]
    with subprocess.Popen(command, env=cluster.environment(1), stderr=subprocess.PIPE, text=True) as ctl:
        copying = wait_for(lambda: writers(ctl.pid, cluster.path("disk")), "qemu-img copying", 20, cluster.tails)
        ctl.send_signal(signal.SIGTERM)
        _, stderr = ctl.communicate(timeout=30)
    assert ctl.returncode == 130
    assert "the import failed, disk was removed again" in stderr
    assert not any(child.is_running() for child in copying)
    assert cluster.images() == []
    assert not any((cluster.data_root(node) / "disk").exists() for node in (one, two))


def metadata(**changes: Any) -> str:
    """A metadata file of 4 blocks, with something wrong in it."""
    block = {"127.0.0.1": {"sync_status": 0}}
    image = {"name": "disk", "size": 16384, "block_size": 4096, "hypervisors": ["127.0.0.1"], "blocks": [block] * 4}
    return json.dumps(image | changes)


WRONG_METADATA = {
    "truncated": metadata()[:-20],
    "no JSON": "size: 16384",
    "a list": "[]",
    "one block too few": metadata(blocks=[{"127.0.0.1": {"sync_status": 0}}] * 3),
    "one block too many": metadata(blocks=[{"127.0.0.1": {"sync_status": 0}}] * 5),
    "no in-sync replica": metadata(blocks=[{"127.0.0.1": {"sync_status": 2}}] * 4),
    "an unknown node": metadata(blocks=[{"127.0.0.9": {"sync_status": 0}}] * 4),
    "an unknown hypervisor": metadata(hypervisors=["127.0.0.9"]),
    "a node twice": metadata().replace('{"127.0.0.1": {', '{"127.0.0.1": {"sync_status": 0}, "127.0.0.1": {', 1),
    "a hypervisor twice": metadata(hypervisors=["127.0.0.1", "127.0.0.1"]),
    "size 0": metadata(size=0, blocks=[]),
    "size 2^63": metadata(size=2**63),
    "block size 1": metadata(block_size=1),
    "block size larger than the image": metadata(block_size=32768),
    "another name": metadata(name="other"),
}


def everything(root: Path) -> list[str]:
    """All names; but for the file that replaces the store's own record now and then, there for a moment only."""
    names = (str(path.relative_to(root)) for path in root.rglob("*"))
    return sorted(name for name in names if name != f".ukai/{TEMPORARY}")


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says why; anything else fails."""
    assert done.returncode in (1, 2), done
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    return done.stderr


def test_what_is_refused_leaves_no_trace(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(nodes=2, frontends=())
    one, two = cluster.addresses
    hand_made = Path(str(cluster.settings["metadata_root"])) / "disk"
    before = everything(cluster.data_root(one)), everything(cluster.data_root(two))
    for what, content in WRONG_METADATA.items():
        hand_made.write_text(content)
        line = refused(cluster.ctl_run("add_image", "disk"))
        assert "disk" in line or "127.0.0.9" in line, what
    hand_made.unlink()
    assert "create_metadata" in refused(cluster.ctl_run("add_image", "disk"))
    create = ["image", "create", "disk", "--size", "1M", "--location", one]
    assert "127.0.0.9 has never registered" in refused(cluster.ctl_run(*create, "--location", "127.0.0.9"))
    assert "127.0.0.9 has never registered" in refused(cluster.ctl_run(*create, "--hypervisor", "127.0.0.9"))
    assert "is not known" in refused(cluster.ctl_run("image", "show", "disk"))
    assert (everything(cluster.data_root(one)), everything(cluster.data_root(two))) == before
    assert cluster.images() == []

    data = cluster.data_root(two) / "disk"
    data.mkdir()
    (data / BLOCK_0).write_bytes(b"precious")
    refused(cluster.ctl_run(*create, "--location", two))
    assert (data / BLOCK_0).read_bytes() == b"precious"
    assert everything(cluster.data_root(one)) == before[0], "nothing is left where it could have been made"


def test_of_two_creates_at_once_one_is_done(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=2, frontends=())
    one, two = cluster.addresses
    command = [program("ukai-ctl"), "image", "create", "disk", "--size", "1G", "--location"]
    running = [
        subprocess.Popen([*command, node], env=cluster.environment(1), stderr=subprocess.PIPE, text=True)
        for node in (one, two, one, two)
    ]
    ends = []
    for ctl in running:
        _, stderr = ctl.communicate(timeout=30)
        ends.append((ctl.returncode, stderr.count("\n")))
    assert sorted(ends) == [(0, 0), (1, 1), (1, 1), (1, 1)]
    assert cluster.images() == ["disk"]
    holders = [node for node in (one, two) if (cluster.data_root(node) / "disk").exists()]
    assert holders == list(cluster.image("disk")["locations"])
