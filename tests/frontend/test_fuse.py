"""A real mount, with both bindings, over a made-up blockd."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests import machine
from tests.frontend.harness import BLOCK_SIZE, IO_TIMEOUT_S, SIZE, Stand, errno_of
from tests.machine import tool, wait_for
from ukai.errors import DiskError, NoSpace, NotReady, StaleHandle, Timeout
from ukai.frontend.spare import THREADS

pytestmark = pytest.mark.fuse
either = pytest.mark.parametrize("binding", ["mfusepy"], indirect=True)
"""For what takes seconds and is decided where no binding is seen."""

PUNCH, ZERO = 0x03, 0x10
_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def in_thread(work: Callable[[], object]) -> Callable[[], object]:
    """Start ``work``; the function returned waits for its end and gives its result, or raises its OSError."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(work())
        except OSError as e:
            result.append(e)

    thread = threading.Thread(target=run)
    thread.start()

    def end() -> object:
        thread.join(20)
        assert result, "still waiting"
        if isinstance(result[0], OSError):
            raise result[0]
        return result[0]

    return end


# -- what the directory shows


def test_only_online_images_of_this_node_are_shown(stand: Stand) -> None:
    stand.node.add("second", 4096, 4096)
    stand.node.add("elsewhere", 4096, 4096, hypervisors=("127.0.0.9",))
    wait_for(lambda: sorted(os.listdir(stand.mount)) == ["disk", "second"], "the second image", 5)
    assert not (stand.mount / "elsewhere").exists()
    stand.node.offline("second")
    wait_for(lambda: os.listdir(stand.mount) == ["disk"], "the end of the second image", 5)
    wait_for(lambda: not (stand.mount / "second").exists(), "the end of its name", 5)


def test_attributes(stand: Stand) -> None:
    about = stand.disk.stat()
    assert stat.S_ISREG(about.st_mode)
    assert (about.st_size, about.st_blksize, about.st_uid, about.st_nlink) == (SIZE, 131072, 0, 1)
    assert stat.S_IMODE(about.st_mode) == 0o660
    assert about.st_blocks == 0
    with opened(stand.disk) as fd:
        os.pwrite(fd, bytes(8192), 0)
        assert os.lseek(fd, 0, os.SEEK_END) == SIZE
    wait_for(lambda: stand.disk.stat().st_blocks == 16, "the space taken", 5)
    assert abs(stand.disk.stat().st_mtime - time.time()) < 30
    space = os.statvfs(stand.mount)
    assert (space.f_frsize * space.f_blocks, space.f_frsize * space.f_bavail) == (8 * 2**30, 3 * 2**30)


def test_attributes_that_are_accepted(stand: Stand) -> None:
    os.chmod(stand.disk, 0o600)
    os.chown(stand.disk, 64055, -1)
    os.utime(stand.disk, ns=(1, 1234567890123456789))
    about = stand.disk.stat()
    assert (stat.S_IMODE(about.st_mode), about.st_uid, about.st_gid) == (0o600, 64055, 0)
    assert about.st_mtime_ns == 1234567890123456789
    with opened(stand.disk) as fd:
        os.fchmod(fd, 0o640)
        os.fchown(fd, -1, 107)
    about = stand.disk.stat()
    assert (stat.S_IMODE(about.st_mode), about.st_uid, about.st_gid) == (0o640, 64055, 107)


def test_errno_table(stand: Stand) -> None:
    new, disk = stand.mount / "new", stand.disk
    other = stand.mount / "other"
    table: dict[str, tuple[int, object, tuple[object, ...]]] = {
        "create": (errno.EPERM, os.open, (new, os.O_CREAT | os.O_WRONLY)),
        "mkdir": (errno.EPERM, os.mkdir, (new,)),
        "mknod": (errno.EPERM, os.mknod, (new, 0o600 | stat.S_IFREG)),
        "symlink": (errno.EPERM, os.symlink, ("disk", new)),
        "link": (errno.EPERM, os.link, (disk, new)),
        "unlink": (errno.EPERM, os.unlink, (disk,)),
        "rename": (errno.EPERM, os.rename, (disk, new)),
        "rename over itself": (errno.ENOENT, os.rename, (new, other)),
        "rmdir": (errno.ENOTDIR, os.rmdir, (disk,)),
        "readlink": (errno.EINVAL, os.readlink, (disk,)),
        "stat": (errno.ENOENT, os.stat, (new,)),
        "open": (errno.ENOENT, os.open, (new, os.O_RDWR)),
        "write the directory": (errno.EISDIR, os.open, (stand.mount, os.O_WRONLY)),
        "grow": (errno.EPERM, os.truncate, (disk, SIZE + 1)),
        "shrink": (errno.EPERM, os.truncate, (disk, 0)),
        "same size": (0, os.truncate, (disk, SIZE)),
        "open with O_TRUNC": (errno.EPERM, os.open, (disk, os.O_WRONLY | os.O_TRUNC)),
        "setxattr": (errno.EOPNOTSUPP, os.setxattr, (disk, "user.a", b"b")),
        "getxattr": (errno.EOPNOTSUPP, os.getxattr, (disk, "user.a")),
        "listxattr": (errno.EOPNOTSUPP, os.listxattr, (disk,)),
        "removexattr": (errno.EOPNOTSUPP, os.removexattr, (disk, "user.a")),
        "access": (0, os.access, (disk, os.R_OK)),
    }
    found = {name: errno_of(work, *args) for name, (_, work, args) in table.items()}
    assert found == {name: expected for name, (expected, _, _) in table.items()}
    with opened(disk) as fd:
        assert errno_of(os.ftruncate, fd, SIZE + 1) == errno.EPERM
        assert errno_of(os.ftruncate, fd, SIZE) == 0
    with opened(disk, os.O_RDONLY) as fd:
        assert errno_of(os.pwrite, fd, b"x", 0) == errno.EBADF


# -- data


def test_any_offset_and_length(stand: Stand) -> None:
    rng = random.Random(7)
    expected = bytearray(SIZE)
    edges = [0, 1, 511, 512, 4095, 4096, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 131071, 131072, SIZE - 1, SIZE]
    with opened(stand.disk) as fd:
        for _ in range(300):
            offset = rng.choice([*edges, rng.randrange(SIZE)])
            length = rng.choice([0, 1, 2, 511, 512, 513, 4096, 65536, 200_000, 300_001])
            fits = max(0, min(length, SIZE - offset))
            if rng.random() < 0.5:
                data = rng.randbytes(length)
                if length and not fits:
                    assert errno_of(os.pwrite, fd, data, offset) == errno.ENOSPC
                    continue
                assert os.pwrite(fd, data, offset) == fits
                expected[offset : offset + fits] = data[:fits]
            else:
                assert os.pread(fd, length, offset) == expected[offset : offset + length]
        assert os.pread(fd, 2 * SIZE, 0) == expected
    assert stand.node.data["disk"] == expected


def test_the_end(stand: Stand) -> None:
    with opened(stand.disk) as fd:
        assert os.pread(fd, 4096, SIZE - 100) == bytes(100)
        assert os.pread(fd, 4096, SIZE) == b""
        assert os.pread(fd, 4096, SIZE + 10**9) == b""
        assert os.pwrite(fd, b"x" * 4096, SIZE - 100) == 100
        assert errno_of(os.pwrite, fd, b"x", SIZE) == errno.ENOSPC
        assert errno_of(os.pwrite, fd, b"x", SIZE + 10**9) == errno.ENOSPC
        assert os.pread(fd, 200, SIZE - 200) == bytes(100) + b"x" * 100


def test_zeroes_and_holes(stand: Stand) -> None:
    with opened(stand.disk) as fd:
        os.pwrite(fd, b"x" * 20000, 0)
        fallocate(fd, PUNCH, 1000, 2000)
        fallocate(fd, ZERO, 10000, 500)
        assert os.pread(fd, 20000, 0) == (b"x" * 1000 + bytes(2000) + b"x" * 7000 + bytes(500) + b"x" * 9500)
        fallocate(fd, PUNCH, SIZE - 10, 4096)
        fallocate(fd, PUNCH, 2 * SIZE, 4096)
        assert errno_of(fallocate, fd, ZERO, SIZE - 10, 11) == errno.ENOSPC
        assert errno_of(fallocate, fd, 0, 0, 4096) == errno.EOPNOTSUPP
        assert errno_of(fallocate, fd, 0x08, 0, 4096) == errno.EOPNOTSUPP
    assert [(h["o"], h["l"], h["s"]) for h in stand.node.seen if h["op"] == "z"] == [
        (1000, 2000, False),
        (10000, 500, False),
        (SIZE - 10, 10, False),
    ]


@pytest.mark.parametrize(
    ("flags", "synchronous"), [(0, False), (os.O_DIRECT, False), (os.O_DSYNC, True), (os.O_SYNC, True)]
)
def test_a_synchronous_handle_says_so_in_each_write(stand: Stand, flags: int, synchronous: bool) -> None:
    import mmap

    with opened(stand.disk, os.O_RDWR | flags) as fd, mmap.mmap(-1, 4096) as page:
        assert os.pwritev(fd, [page], 4096) == 4096
        fallocate(fd, PUNCH, 0, 4096)
        os.fsync(fd)
        os.fdatasync(fd)
    assert {h["s"] for h in stand.node.seen if h["op"] in "wz"} == {synchronous}
    assert stand.node.count("f") == 2


def test_an_fsync_asks_nobody_when_the_last_write_left_nothing_to_flush(stand: Stand) -> None:
    stand.node.clean = True
    with opened(stand.disk, os.O_RDWR | os.O_DSYNC) as synchronous, opened(stand.disk) as plain:
        os.pwrite(synchronous, b"a", 0)
        os.fsync(plain)
        assert stand.node.count("f") == 0
        os.pwrite(plain, b"b", 0)
        os.fsync(synchronous)
        assert stand.node.count("f") == 1, "what another handle has written is to be flushed"


def test_handles_are_closed_at_blockd(stand: Stand) -> None:
    with opened(stand.disk), opened(stand.disk, os.O_RDONLY):
        assert len(stand.node.handles) == 2
    wait_for(lambda: not stand.node.handles, "the handles closed", 5)


def test_many_threads_at_once(stand: Stand) -> None:
    def hammer(number: int) -> None:
        rng = random.Random(number)
        low = number * 60000
        mine = bytearray(60000)
        with opened(stand.disk) as fd:
            for _ in range(100):
                offset, length = rng.randrange(50000), rng.randrange(1, 10000)
                data = rng.randbytes(length)
                assert os.pwrite(fd, data, low + offset) == length
                mine[offset : offset + length] = data
                assert os.pread(fd, 60000, low) == mine

    ends = [in_thread(lambda n=n: hammer(n)) for n in range(12)]  # type: ignore[misc]
    for end in ends:
        end()


# -- errors of blockd


@pytest.mark.parametrize(("op", "name"), [("r", "read"), ("w", "write"), ("f", "fsync"), ("z", "fallocate")])
def test_errors_reach_the_caller(stand: Stand, op: str, name: str) -> None:
    stand.expect_log(f"{name} of disk failed")
    with opened(stand.disk) as fd:
        work: dict[str, Callable[[], object]] = {
            "r": lambda: os.pread(fd, 4096, 0),
            "w": lambda: os.pwrite(fd, b"x" * 4096, 0),
            "f": lambda: os.fsync(fd),
            "z": lambda: fallocate(fd, PUNCH, 0, 4096),
        }
        for error, expected in ((DiskError("broken"), errno.EIO), (NoSpace("full"), errno.ENOSPC)):
            stand.node.faults[op] = [error]
            assert errno_of(work[op]) == expected
            assert errno_of(work[op]) == 0


@either
def test_a_write_that_got_lost_on_the_way_holds_back_others_for_a_while_only(stand: Stand) -> None:
    stand.expect_log("of disk failed")
    with opened(stand.disk) as fd:
        stand.node.faults["w"] = ["drop"]
        assert errno_of(os.pwrite, fd, b"lost", 0) == errno.EIO
        wait_for(lambda: errno_of(os.pwrite, fd, b"abc", 0) == 0, "writes to go on", 5 * IO_TIMEOUT_S)


def test_errors_that_pass_are_not_seen(stand: Stand) -> None:
    with opened(stand.disk) as fd:
        stand.node.faults["w"] = [NotReady("soon"), Timeout("soon"), NotReady("soon")]
        assert os.pwrite(fd, b"abc", 0) == 3
    assert stand.node.data["disk"][:3] == b"abc"
    assert stand.node.count("w") == 4


def test_an_open_that_blockd_refuses(stand: Stand) -> None:
    stand.expect_log("open of disk failed")
    stand.node.faults["open"] = [DiskError("broken")]
    assert errno_of(os.open, stand.disk, os.O_RDWR) == errno.EIO
    with opened(stand.disk):
        pass


def test_a_stale_handle_stays_stale_until_opened_anew(stand: Stand) -> None:
    stand.expect_log("of disk failed")
    with opened(stand.disk) as fd:
        os.pwrite(fd, b"abc", 0)
        stand.node.faults["w"] = [StaleHandle("another node has written")]
        assert errno_of(os.pwrite, fd, b"x", 0) == errno.EIO
        sent = len([h for h in stand.node.seen if h["op"] in ("w", "f")])
        assert errno_of(os.pwrite, fd, b"x", 0) == errno.EIO
        assert errno_of(os.fsync, fd) == errno.EIO
        assert len([h for h in stand.node.seen if h["op"] in ("w", "f")]) == sent
        assert os.pread(fd, 3, 0) == b"abc"
        with opened(stand.disk) as other:
            assert os.pwrite(other, b"xyz", 0) == 3
        assert errno_of(os.pwrite, fd, b"x", 0) == errno.EIO


@either
def test_no_answer_is_eio_within_the_time(stand: Stand) -> None:
    stand.expect_log("did not answer")
    with opened(stand.disk) as fd:
        for op, work in (("r", lambda: os.pread(fd, 10, 0)), ("f", lambda: os.fsync(fd))):
            stand.node.faults[op] = ["drop"]
            begin = time.monotonic()
            assert errno_of(work) == errno.EIO
            assert IO_TIMEOUT_S * 0.9 < time.monotonic() - begin < IO_TIMEOUT_S + 1.5
            assert errno_of(work) == 0


@either
def test_a_write_that_may_still_be_done_holds_back_later_ones(stand: Stand) -> None:
    stand.expect_log("of disk failed")
    with opened(stand.disk) as fd:
        stand.node.faults["w"] = ["hold"]
        assert errno_of(os.pwrite, fd, b"old", 0) == errno.EIO
        assert os.pread(fd, 3, 0) == bytes(3)
        assert errno_of(os.pwrite, fd, b"nil", 0) == errno.EIO
        assert stand.node.count("w") == 1, "the second one was sent"
        end = in_thread(lambda: os.pwrite(fd, b"new", 0))
        stand.node.release()
        assert end() == 3
        assert os.pread(fd, 3, 0) == b"new"


OK = {"re": "ID"}
GARBAGE: dict[str, list[object]] = {
    "nothing": [b""],
    "random bytes": [bytes(range(256))],
    "no map": [b"\x93\x01\x02\x03"],
    "another version": [b"\x81\xa1v\x63"],
    "another request": [{"re": 10**9}],
    "no number": [{"x": 1}],
    "a number of another kind": [{"re": "x"}],
    "no payload": [OK],
    "a short payload": [OK, b"x"],
    "a long payload": [OK, bytes(4097)],
    "a huge payload": [OK, bytes(2**22)],
    "two payloads": [OK, bytes(4096), bytes(4096)],
    "an error of another kind": [{"re": "ID", "err": 7, "msg": [1]}],
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_from_blockd_is_eio_and_no_more(stand: Stand, what: str) -> None:
    stand.expect_log("read of disk failed")
    with opened(stand.disk) as fd:
        os.pwrite(fd, b"abc", 0)
        stand.node.faults["r"] = [list(GARBAGE[what])]
        assert errno_of(os.pread, fd, 4096, 0) == errno.EIO
        assert os.pread(fd, 3, 0) == b"abc"
        assert os.pwrite(fd, b"abc", 0) == 3


def test_garbage_instead_of_the_answer_to_a_write(stand: Stand) -> None:
    stand.expect_log("write of disk failed")
    with opened(stand.disk) as fd:
        stand.node.faults["w"] = [[b"garbage"]]
        assert errno_of(os.pwrite, fd, b"abc", 0) == errno.EIO
        assert os.pwrite(fd, b"abc", 0) == 3


@either
def test_garbage_for_the_beat(stand: Stand) -> None:
    for answer in (
        [b"garbage"],
        [{"re": "ID", "inc": 5}],
        [{"re": "ID", "inc": ""}],
        [{"re": "ID", "known": 3}],
        [b""],
    ):
        stand.node.faults["beat"].append(answer)
    wait_for(lambda: not stand.node.faults["beat"], "the beats", 10)
    with opened(stand.disk) as fd:
        assert os.pwrite(fd, b"abc", 0) == 3


# -- blockd goes and comes


def test_blockd_killed_and_started_while_a_write_waits(stand: Stand) -> None:
    with opened(stand.disk) as fd:
        os.pwrite(fd, b"first", 0)
        stand.node.faults["w"] = ["lose"]
        end = in_thread(lambda: os.pwrite(fd, b"second", 100))
        wait_for(lambda: stand.node.count("w") == 2, "the write at blockd", 5)
        stand.node.kill_blockd()
        stand.node.start_blockd()
        assert end() == 6
        assert os.pread(fd, 6, 100) == b"second"
        os.fsync(fd)
    opens = [h for h in stand.node.seen if h["op"] == "open"]
    assert [h["epoch"] for h in opens] == [-1, 1]
    assert opens[0]["h"] == opens[1]["h"]
    assert opens[0]["inc"] != opens[1]["inc"]


def test_blockd_away_for_a_while(stand: Stand) -> None:
    with opened(stand.disk) as fd:
        stand.node.kill_blockd()
        ends = [in_thread(lambda n=n: os.pwrite(fd, b"abc", n * 10)) for n in range(8)]  # type: ignore[misc]
        wait_for(lambda: stand.logged("does not answer"), "the frontend to notice", 5)
        stand.node.start_blockd()
        assert [end() for end in ends] == [3] * 8
        assert os.pread(fd, 73, 0) == (b"abc" + bytes(7)) * 7 + b"abc"
    opens = [h for h in stand.node.seen if h["op"] == "open" and h["inc"] == stand.node.inc]
    assert len(opens) == 1, "opened again once, not by each thread"


@either
def test_blockd_away_for_too_long(stand: Stand) -> None:
    stand.expect_log("of disk failed")
    with opened(stand.disk) as fd:
        stand.node.kill_blockd()
        begin = time.monotonic()
        assert errno_of(os.pread, fd, 10, 0) == errno.EIO
        assert time.monotonic() - begin < IO_TIMEOUT_S + 1.5
        stand.node.start_blockd()
        assert os.pread(fd, 10, 0) == bytes(10)


def test_blockd_that_lost_the_role_meanwhile(stand: Stand) -> None:
    stand.expect_log("of disk failed")
    with opened(stand.disk) as fd:
        stand.node.kill_blockd()
        stand.node.lost_epoch["disk"] = 2
        stand.node.start_blockd()
        assert errno_of(os.pwrite, fd, b"abc", 0) == errno.EIO
        stand.node.epoch = 3
        with opened(stand.disk) as other:
            assert os.pwrite(other, b"abc", 0) == 3


def test_blockd_that_has_forgotten_a_handle(stand: Stand) -> None:
    with opened(stand.disk) as fd:
        stand.node.do(stand.node.handles.clear)
        assert os.pwrite(fd, b"abc", 0) == 3
        stand.node.do(stand.node.handles.clear)
        wait_for(lambda: stand.node.seen[-1]["op"] == "beat", "a beat", 5)
        assert os.pread(fd, 3, 0) == b"abc"


def test_any_start_order(stand: Stand) -> None:
    code = stand.process
    code.signal(signal.SIGTERM)
    assert code.wait() == 0
    stand.node.kill_blockd()
    stand.start()
    end = in_thread(lambda: stand.disk.read_bytes())
    wait_for(lambda: stand.logged("does not answer"), "the frontend to notice", 5)
    stand.node.start_blockd()
    assert end() == bytes(SIZE)


# -- the way out


def test_sigterm_waits_for_open_images(stand: Stand) -> None:
    stand.expect_log("not unmounting .* under open images: disk")
    with opened(stand.disk) as fd:
        stand.process.signal(signal.SIGTERM)
        wait_for(lambda: stand.logged("not unmounting"), "the refusal", 5)
        assert os.pwrite(fd, b"abc", 0) == 3
        assert stand.is_mounted()
    assert stand.process.wait() == 0
    assert not machine.mount_answers(stand.mount)


def test_a_second_sigterm_forces(stand: Stand) -> None:
    stand.expect_log("unmounting .* under open images: disk")
    fd = os.open(stand.disk, os.O_RDWR)
    stand.process.signal(signal.SIGTERM)
    wait_for(lambda: stand.logged("not unmounting"), "the refusal", 5)
    stand.process.signal(signal.SIGTERM)
    assert stand.process.wait() == 0
    assert errno_of(os.pwrite, fd, b"abc", 0) in (errno.ENOTCONN, errno.ECONNABORTED)
    assert errno_of(os.close, fd) in (0, errno.ENOTCONN, errno.ECONNABORTED)
    assert not stand.node.handles


def test_a_shell_in_the_mount_puts_the_end_off(stand: Stand) -> None:
    stand.expect_log("while it is in use")
    with subprocess.Popen(["sleep", "60"], cwd=stand.mount) as shell:
        stand.process.signal(signal.SIGTERM)
        wait_for(lambda: stand.logged("while it is in use"), "the refusal", 5)
        shell.kill()
    assert stand.process.wait() == 0


def test_sighup_does_nothing(stand: Stand) -> None:
    stand.process.signal(signal.SIGHUP)
    with opened(stand.disk) as fd:
        assert os.pread(fd, 1, 0) == b"\0"
    assert stand.is_mounted()


def test_a_dead_mount_is_cleaned_at_start(stand: Stand) -> None:
    stand.process.signal(signal.SIGKILL)
    assert stand.process.wait() == -signal.SIGKILL
    assert machine.mounts()[-1].kind == "fuse.ukai"
    stand.start()  # at once: the kernel still answers some questions for the dead one
    with opened(stand.disk) as fd:
        assert os.pread(fd, 1, 0) == b"\0"


def test_an_unmount_by_somebody_else_ends_the_process(stand: Stand) -> None:
    stand.expect_log("unmounted by somebody else")
    stand.expect_log("Traceback")
    subprocess.run([tool("umount"), stand.mount], check=True)
    assert stand.process.wait() == 70
    stand.start()


# -- tools


def test_dd_and_qemu_img(stand: Stand, tmp_path: Path) -> None:
    size = 2**20
    stand.node.add("raw", size, 2**18)
    raw, source = stand.mount / "raw", tmp_path / "source"
    wait_for(raw.exists, "the image", 5)
    source.write_bytes(random.Random(1).randbytes(size // 2) + bytes(size // 2))

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(tool("dd"), f"if={source}", f"of={raw}", "bs=64k", "conv=notrunc,fsync")
    run(tool("qemu-img"), "compare", "-f", "raw", "-F", "raw", source, raw)
    stand.node.do(lambda: stand.node.data["raw"].__setitem__(slice(None), bytes(size)))
    run(tool("qemu-img"), "convert", "-n", "-f", "raw", "-O", "raw", "-t", "none", "-T", "none", source, raw)
    assert stand.node.data["raw"] == source.read_bytes()
    for aio in ("threads", "native", "io_uring"):
        commands = ("-c", "write -P 7 4k 64k", "-c", "discard 8k 8k", "-c", "write -z 32k 4k", "-c", "flush")
        run(tool("qemu-io"), "-f", "raw", "-t", "none", "-i", aio, "-d", "unmap", *commands, raw)
        expected = b"\7" * 4096 + bytes(8192) + b"\7" * 16384 + bytes(4096) + b"\7" * 32768
        assert stand.node.data["raw"][4096 : 4096 + 65536] == expected
    assert "virtual size: 1 MiB" in run(tool("qemu-img"), "info", raw)


# -- threads


def test_a_disk_that_stands_still_does_not_hold_up_the_others(stand: Stand) -> None:
    stand.node.add("second", 65536, 65536)
    wait_for((stand.mount / "second").exists, "the second image", 5)
    process = psutil.Process(stand.process.pid)
    count = 64
    with opened(stand.disk) as fd, opened(stand.mount / "second") as other:
        assert os.pread(other, 4, 0) == bytes(4)
        before = process.num_threads()
        stand.node.faults["r"] = ["hold"] * count
        ends = [in_thread(lambda n=n: os.pread(fd, 4096, n * 4096)) for n in range(count)]  # type: ignore[misc]
        wait_for(lambda: len(stand.node.held) == count, "all of them at blockd", IO_TIMEOUT_S / 2)
        assert os.pread(other, 4, 0) == bytes(4)
        stand.node.release()
        assert [end() for end in ends] == [bytes(4096)] * count

        def gone() -> bool:
            os.pread(other, 4, 0)
            return bool(process.num_threads() <= before + THREADS)  # libfuse begins its own when it needs them

        wait_for(gone, "the end of the spare threads", 10)
