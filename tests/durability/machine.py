"""A real guest: Debian's cloud kernel under QEMU, a busybox around it, an ext4 and an SQLite on its disk.

The parts come with ``deploy/setup.sh``.  What the guest has been told is on the disk it says on its console, a file
that outlives it: ``ACK n`` for the n-th committed transaction, ``FILE n`` for the n-th file, written and synced.
"""

from __future__ import annotations

import gzip
import os
import platform
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.machine import tool, wait_for

PARTS = Path(sys.prefix) / "guest"
SUPPORTED = platform.machine() == "x86_64"
MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
BODY_BYTES = 200
FILES = 20
"""So many names the files take turns in."""

INIT = """#!/bin/sh
export PATH=/bin
mount -t devtmpfs none /dev
mount -t proc none /proc
for module in MODULES; do insmod /$module.ko; done
mount -t ext4 -o discard /dev/vda /mnt || echo "GUEST could not mount"
echo "GUEST up"
echo 5 >/proc/sys/vm/dirty_expire_centisecs
echo 3 >/proc/sys/vm/dirty_writeback_centisecs
mode=$(sed 's/.*mode=//; s/ .*//' /proc/cmdline)
( n=$(sed 's/.*files=//; s/ .*//' /proc/cmdline)
  while :; do
      n=$((n + 1)); name=/mnt/f$((n % FILES))
      seq $n $((n + 800)) | dd of=$name.new conv=fsync 2>/dev/null && mv $name.new $name && sync \
          && echo "FILE $n" || echo "GUEST failed at file $n"
  done ) &
( n=0
  while :; do n=$((n + 1)); seq $n $((n + 9000)) >/mnt/unsynced$((n % 7)); done ) &
( echo "PRAGMA journal_mode = $mode; PRAGMA synchronous = FULL;"
  cat /schema.sql
  while cat /work.sql; do :; done ) | sqlite3 -batch -bail /mnt/db
echo "GUEST failed at the database"
"""
SCHEMA = """
CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, body TEXT);
CREATE TABLE IF NOT EXISTS c (n INTEGER);
INSERT INTO c SELECT 0 WHERE NOT EXISTS (SELECT * FROM c);
"""
TRANSACTION = f"""
BEGIN IMMEDIATE;
UPDATE c SET n = n + 1;
INSERT INTO t SELECT n, replace(hex(zeroblob({BODY_BYTES})), '00', printf('%08d', n)) FROM c;
DELETE FROM t WHERE id < (SELECT n FROM c) - 300;
COMMIT;
SELECT 'ACK ' || n FROM c;
"""


def build(where: Path) -> tuple[Path, Path]:
    """The kernel and an initial filesystem made of the parts."""
    assert (PARTS / "boot").is_dir(), "the parts of a guest are missing; run make setup"
    kernel = next((PARTS / "boot").glob("vmlinuz-*"))
    files: dict[str, tuple[int, bytes]] = {}
    for directory in ("bin", "dev", "proc", "mnt", "lib", "lib64", "lib/x86_64-linux-gnu"):
        files[directory] = (stat.S_IFDIR | 0o755, b"")
    files["bin/busybox"] = (stat.S_IFREG | 0o755, (PARTS / "bin" / "busybox").read_bytes())
    for name in ("sh", "mount", "insmod", "echo", "sed", "cat", "seq", "mv", "dd", "sync"):
        files[f"bin/{name}"] = (stat.S_IFLNK | 0o777, b"busybox")
    for name in MODULES:
        files[f"{name}.ko"] = (stat.S_IFREG | 0o644, next(PARTS.rglob(f"{name}.ko")).read_bytes())
    for path in [tool("sqlite3"), *_libraries(tool("sqlite3"))]:
        place = f"bin/{Path(path).name}" if path.endswith("sqlite3") else path.lstrip("/")
        for parent in reversed(Path(place).parents[:-1]):
            files.setdefault(str(parent), (stat.S_IFDIR | 0o755, b""))
        files[place] = (stat.S_IFREG | 0o755, Path(path).read_bytes())
    script = INIT.replace("MODULES", " ".join(MODULES)).replace("FILES", str(FILES))
    files["init"] = (stat.S_IFREG | 0o755, script.encode())
    files["schema.sql"] = (stat.S_IFREG | 0o644, SCHEMA.encode())
    files["work.sql"] = (stat.S_IFREG | 0o644, (TRANSACTION * 50).encode())
    initrd = where / "initrd"
    initrd.write_bytes(gzip.compress(_cpio(files), 1))
    return kernel, initrd


def _libraries(program: str) -> list[str]:
    text = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return re.findall(r"(/\S+) \(0x", text)


def _cpio(files: dict[str, tuple[int, bytes]]) -> bytes:
    """An archive as the kernel unpacks it ("newc")."""
    out = bytearray()
    for number, (name, (mode, data)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))]):
        encoded = name.encode() + b"\0"
        fields = (number + 1, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        out += b"070701" + b"".join(b"%08X" % f for f in fields) + encoded
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


class Guest:
    """A machine that runs; it has made ``files`` files before.  A context manager: the process is gone afterwards."""

    def __init__(self, kernel: Path, initrd: Path, disk: Path, console: Path, mode: str, files: int) -> None:
        self.console = console
        console.unlink(missing_ok=True)
        self.popen = subprocess.Popen(
            [
                tool("qemu-system-x86_64"), "-accel", "tcg", "-cpu", "max", "-m", "192",
                "-nodefaults", "-no-user-config", "-display", "none",
                "-serial", f"file:{console}", "-kernel", kernel, "-initrd", initrd,
                "-append", f"console=ttyS0 loglevel=4 mitigations=off panic=-1 mode={mode} files={files} ",
                "-drive", f"file={disk},format=raw,if=virtio,cache=none,aio=native,discard=unmap",
            ],
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(30)

    def said(self) -> str:
        """All complete lines of the console."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        return text[: text.rfind("\n") + 1]

    def told(self, what: str) -> int:
        """The highest number it was told of, of its transactions (``ACK``) or files (``FILE``); 0: none."""
        return max((int(n) for n in re.findall(rf"{what} (\d+)\s", self.said())), default=0)

    def wait_told(self, what: str, more: int, timeout_s: float = 120.0) -> None:
        """Until it was told of so many more."""

        def count() -> int:
            return len(re.findall(rf"{what} \d+\s", self.said()))

        goal = count() + more

        def reached() -> bool:
            assert self.popen.poll() is None, f"the guest ended with {self.popen.returncode}: {self.said()[-1000:]}"
            self.check()
            return count() >= goal

        wait_for(reached, f"{goal} times {what}", timeout_s, lambda: self.said()[-1000:])

    def check(self) -> None:
        """Raises AssertionError where the guest has met an error."""
        said = self.said()
        bad = [
            line for line in said.splitlines() if re.search(r"GUEST (could|failed)|EXT4-fs err|I/O error|Error:", line)
        ]
        assert not bad, f"the guest has met errors: {bad[:5]}"


def make_filesystem(disk: Path) -> None:
    subprocess.run([tool("mkfs.ext4"), "-q", "-F", disk], check=True, stdin=subprocess.DEVNULL)


def check_image(image: Path, acked: int, filed: int, work: Path) -> tuple[int, int]:
    """What a machine finds that starts from this copy of the disk, which is altered by it.

    The filesystem has no fault after its journal was replayed, the database none either, and all that the guest was
    told of is there.  Returns the numbers of the last transaction and of the last file.
    """
    replay = subprocess.run([tool("fsck.ext4"), "-p", image], capture_output=True, text=True, check=False)
    assert replay.returncode in (0, 1), f"fsck -p: {replay.returncode} {replay.stdout}{replay.stderr}"
    full = subprocess.run([tool("fsck.ext4"), "-fn", image], capture_output=True, text=True, check=False)
    assert full.returncode == 0, f"the filesystem has faults: {full.stdout}{full.stderr}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    subprocess.run([tool("debugfs"), "-R", f"rdump / {work}", image], capture_output=True, check=True)
    count = _check_files(work, filed)
    if not (work / "db").exists():
        assert not acked, "the database is gone"
        return 0, count
    return _check_database(work / "db", acked), count


def _check_database(path: Path, acked: int) -> int:
    db = sqlite3.connect(path)
    try:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        if "c" not in tables or not (rows := db.execute("SELECT n FROM c").fetchall()):
            assert not acked, f"transaction {acked} was committed, and the table is gone"
            return 0
        last = int(rows[0][0])
        assert last >= acked, f"transaction {acked} was committed, {last} is the last one there"
        found = db.execute("SELECT id, body FROM t ORDER BY id").fetchall()
        assert [i for i, _ in found] == list(range(max(1, last - 300), last + 1))
        assert all(body == f"{i:08d}" * BODY_BYTES for i, body in found)
        return last
    finally:
        db.close()


def _check_files(root: Path, filed: int) -> int:
    """Each name holds a whole file, of the last that was told or a later one."""
    last = 0
    for number in range(max(1, filed - FILES + 1), filed + 1):
        path = root / f"f{number % FILES}"
        assert path.exists(), f"file {number} was synced and is gone"
        lines = path.read_text().split()
        found = int(lines[0])
        assert found >= number, f"file {number} was synced, {found} is there"
        assert (found - number) % FILES == 0
        assert lines == [str(n) for n in range(found, found + 801)], f"file {found} is not whole"
        last = max(last, found)
    return last


def assemble(to: Path, parts: list[Path | None], block_size: int, size: int) -> None:
    """The disk from block files; None: a block that was never written."""
    with to.open("wb") as out:
        out.truncate(size)
        for index, part in enumerate(parts):
            if part is not None:
                out.seek(index * block_size)
                data = part.read_bytes()
                if any(data):
                    out.write(data)
    assert os.stat(to).st_size == size
