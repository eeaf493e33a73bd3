"""The demo: three nodes on this machine, and a disk that moves from one to another while it is in use.

``make demo`` runs it.  It ends with ``demo: ok``, or non-zero with the last lines of the logs.  It leaves nothing
running, mounted or on disk, also when it is interrupted.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, Self

from demo_nodes import ADDRESSES, DemoError, Node, Nodes, until

IMAGE = "demo"
FILES = 40
FILE_BYTES = 512 * 1024
IN_SYNC = 0
FIO = (
    "fio --name=verify --thread --size=128M --bs=64k --rw=randwrite --direct=1 --ioengine=libaio --iodepth=4 "
    "--verify=crc32c --verify_fatal=1 --rate=,16m --fsync=64 --minimal"
)


class Interrupted(Exception):
    """A signal asked the demo to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def say(text: str) -> None:
    print(f"\n== {time.monotonic() - STARTED:3.0f} s  {text}", flush=True)


def run(*command: str | Path) -> str:
    """Run a command and return its output.  Raises DemoError with its last words when it fails."""
    print(f"$ {' '.join(map(str, command))}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=PATHS)
    if done.returncode != 0:
        raise DemoError(f"{command[0]} ended with exit code {done.returncode}: {done.stdout.strip()[-2000:]}")
    return done.stdout


class Writer(threading.Thread):
    """The guest that never stops: appends numbered records, each followed by fsync, until it is told to end."""

    def __init__(self, path: Path) -> None:
        super().__init__(name="writer", daemon=True)
        self.path, self.records = path, 0
        self.longest_s = 0.0
        self._error: OSError | None = None
        self._end = threading.Event()

    def run(self) -> None:
        try:
            with self.path.open("wb", buffering=0) as file:
                while not self._end.wait(0.01):
                    began = time.monotonic()
                    file.write(b"record %010d\n" % self.records)
                    os.fsync(file.fileno())
                    self.records += 1
                    self.longest_s = max(self.longest_s, time.monotonic() - began)
        except OSError as e:
            self._error = e

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()

    def check(self) -> None:
        """Raise DemoError when it met an error or a record is missing."""
        if self._error is not None:
            raise DemoError(f"the writer met an error after {self.records} records: {self._error}")
        check_records(self.path, self.records)


def check_records(path: Path, count: int) -> None:
    lines = path.read_bytes().splitlines()
    if lines[:count] != [b"record %010d" % n for n in range(count)]:
        raise DemoError(f"of {count} records that were acknowledged, {path} does not hold all")


def write_files(directory: Path) -> dict[str, str]:
    """Files with random contents; returns their SHA-256."""
    directory.mkdir()
    sums = {}
    for number in range(FILES):
        data = os.urandom(FILE_BYTES)
        with (directory / f"file{number}").open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        sums[f"file{number}"] = hashlib.sha256(data).hexdigest()
    return sums


def check_files(directory: Path, sums: dict[str, str]) -> None:
    for name, wanted in sums.items():
        if hashlib.sha256((directory / name).read_bytes()).hexdigest() != wanted:
            raise DemoError(f"{directory / name} is not what was written")
    print(f"{len(sums)} files: SHA-256 as written")


def mount_disk(node: Node) -> Path:
    """Mount the filesystem on the image, as a node's guest would."""
    where = node.directory / "guest"
    where.mkdir(exist_ok=True)
    run("mount", "-o", "loop", node.mount / IMAGE, where)
    return where


def disk_sum(node: Node) -> str:
    """SHA-256 of the whole disk, as a node's hypervisor sees it."""
    with (node.mount / IMAGE).open("rb", buffering=0) as disk:
        digest = hashlib.sha256()
        while data := disk.read(1 << 20):
            digest.update(data)
    print(f"SHA-256 of the disk on {node.address}: {digest.hexdigest()}", flush=True)
    return digest.hexdigest()


def out_of_sync(image: dict[str, Any], address: str) -> int:
    return int(image["locations"].get(address, {}).get("out_of_sync", 0))


def compare_copies(nodes: Nodes) -> None:
    """SHA-256 of all in-sync copies of every block, straight from the block files."""
    image = nodes.image(IMAGE)
    data = {node.address: node.data for node in nodes.nodes}
    copies = blocks = 0
    for part in image["placement"]:
        holders = [node for node, replica in part["replicas"].items() if replica["status"] == IN_SYNC]
        for index in range(part["first"], part["last"] + 1):
            length = min(image["block_size"], image["size"] - index * image["block_size"])
            sums = {node: block_sum(data[node] / IMAGE / f"{index:016d}", length) for node in holders}
            if len(set(sums.values())) != 1:
                raise DemoError(f"block {index}: the in-sync copies differ or there is none: {sums}")
            blocks, copies = blocks + 1, copies + len(sums)
    print(f"{blocks} blocks, {copies} in-sync copies: equal by SHA-256")


def block_sum(path: Path, length_bytes: int) -> str:
    """A block that was never written has no file, or a short one, and reads as zeros."""
    data = path.read_bytes() if path.exists() else b""
    return hashlib.sha256(data.ljust(length_bytes, b"\0")).hexdigest()


def story(nodes: Nodes) -> None:
    one, two, three = nodes.nodes

    say("Three nodes start: each a supervisord with metad (on the first), blockd and frontend")
    nodes.start()
    nodes.wait_ready()
    nodes.ctl("node", "list")

    say("A disk of 1 GiB, its blocks on nodes 1 and 2; node 1 is its hypervisor")
    nodes.ctl("image", "create", IMAGE, "--size", "1G", "--block-size", "16M",
              "--location", one.address, "--location", two.address, "--hypervisor", one.address)  # fmt: skip
    until((one.mount / IMAGE).exists, f"{IMAGE} in the mount of node 1", 10)

    say("A filesystem and files on it, through the mount of node 1")
    run("mkfs.ext4", "-q", "-F", one.mount / IMAGE)
    guest = mount_disk(one)
    sums = write_files(guest / "files")

    say("The blockd of node 2 is killed while fio writes and verifies")
    fio = subprocess.Popen(
        [*FIO.split(), f"--directory={guest}", f"--aux-path={nodes.root}"],
        env=PATHS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        work = guest / "verify.0.0"
        until(lambda: work.exists() and work.stat().st_size and fio.poll() is None, "fio writing", 15)
        print(f"killed: blockd of {two.address}, process {two.kill('blockd')}; fio goes on", flush=True)
        until(lambda: out_of_sync(nodes.image(IMAGE), two.address), "blocks of node 2 out-of-sync", 15)
        until(lambda: two.address in nodes.unavailable(), "node 2 in the list of errors", 15)
        if fio.poll() is not None:
            raise DemoError("fio had ended before the node was missed")
        nodes.ctl("get_error_state")
        nodes.ctl("status")
        report = fio.communicate(timeout=60)[0]
        if fio.returncode != 0:
            raise DemoError(f"fio ended with {fio.returncode}: {report[-2000:]}")
        print("fio: written and verified, not one error")
    finally:
        if fio.poll() is None:
            fio.kill()
            fio.wait()

    say("It is started again; what was written meanwhile is out-of-sync there, and nothing else")
    two.supervisorctl("start", "blockd")
    nodes.wait_ready()
    until(lambda: not nodes.unavailable(), "no node in the list of errors", 15)
    nodes.ctl("get_error_state")
    nodes.ctl("image", "show", IMAGE)

    say("A guest starts to append records, each with fsync; node 2 is brought up to date under it")
    with Writer(guest / "records") as writer:
        nodes.ctl("sync", "start", IMAGE, "--wait")

        say("The disk moves while it is in use: a copy for node 3, then the one of node 1 goes")
        nodes.ctl("location", "add", IMAGE, three.address)
        nodes.ctl("sync", "start", IMAGE, "--wait")
        nodes.ctl("location", "remove", IMAGE, one.address)
        before = writer.records
        until(lambda: writer.records > before + 20 or not writer.is_alive(), "the guest writing on", 20)
    writer.check()
    print(f"the guest wrote {writer.records} records, each acknowledged; the longest took {writer.longest_s:.2f} s")
    nodes.ctl("image", "show", IMAGE)

    say("Checksums on node 1, which holds no block any more")
    check_files(guest / "files", sums)
    run("umount", guest)
    first = disk_sum(one)

    say("The same disk on node 3")
    nodes.ctl("hypervisor", "add", IMAGE, three.address)
    until((three.mount / IMAGE).exists, f"{IMAGE} in the mount of node 3", 10)
    if disk_sum(three) != first:
        raise DemoError("node 3 reads other bytes than node 1")
    run("fsck.ext4", "-f", "-n", three.mount / IMAGE)
    guest = mount_disk(three)
    check_files(guest / "files", sums)
    check_records(guest / "records", writer.records)
    (guest / "written-on-node-3").write_text("moved\n")
    run("umount", guest)
    run("fsck.ext4", "-f", "-n", three.mount / IMAGE)

    say("All in-sync copies of every block")
    compare_copies(nodes)


def interrupt(number: int, _frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # what follows is the way out, and is finished
    raise Interrupted(number)


def main() -> int:
    if os.geteuid() != 0:
        if shutil.which("sudo") is None:
            print("demo: it mounts filesystems: run it as root, or install sudo", file=sys.stderr)
            return 1
        os.execvp("sudo", ["sudo", "env", "PYTHONDONTWRITEBYTECODE=1", sys.executable, *sys.argv])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    nodes: Nodes | None = None
    code = 1
    try:
        nodes = Nodes()
        story(nodes)
        code = 0
    except Interrupted as e:
        print(f"\ndemo: {e}: cleaning up", file=sys.stderr)
        code = 128 + e.number
    except Exception as e:
        if nodes is not None:
            print(nodes.log_tails(), file=sys.stderr)
        if not isinstance(e, DemoError | OSError | subprocess.SubprocessError):
            traceback.print_exc()
        print(f"demo: failed: {e}", file=sys.stderr)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if nodes is not None:
            if code == 0:
                say("Everything stops")
            tails = nodes.log_tails()
            if left := nodes.stop():
                print(
                    tails if code == 0 else "",
                    f"demo: cleaned up by force: {'; '.join(left)}",
                    file=sys.stderr,
                    sep="\n",
                )
                code = code or 1
    if code == 0:
        print(f"\n{time.monotonic() - STARTED:.0f} s for all of it on {', '.join(ADDRESSES)}; nothing is left behind")
        print("demo: ok", flush=True)
    return code


STARTED = time.monotonic()
PATHS = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}

if __name__ == "__main__":
    sys.exit(main())
