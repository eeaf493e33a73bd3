"""What the frontend finds wrong before it mounts: one line, exit code 1, nothing left."""

from __future__ import annotations

import errno
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import program
from tests.frontend.harness import Stand
from tests.machine import process_state, tool, wait_for
from ukai.errors import UkaiError
from ukai.frontend import mount

pytestmark = pytest.mark.fuse


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[Stand]:
    """A stand whose frontend was not started."""
    stand = Stand(tmp_path, "auto")
    stand.node.start_blockd()
    try:
        yield stand
    finally:
        faults = stand.close()
    assert not faults, "\n".join(faults)


def refusal(stand: Stand) -> str:
    """The one line with which the frontend ends."""
    stand.expect_log("ukai-frontend:")
    stand.process.start()
    assert stand.process.wait() == 1
    lines = [line.message for line in stand.process.log.news()]
    assert len(lines) == 1, lines
    return lines[0]


def test_files_in_the_mount_point(idle: Stand) -> None:
    idle.mount.mkdir()
    (idle.mount / "precious").touch()
    assert "is not empty" in refusal(idle)
    assert (idle.mount / "precious").exists()


def test_another_filesystem_there(idle: Stand) -> None:
    idle.mount.mkdir()
    subprocess.run([tool("mount"), "-t", "tmpfs", "none", idle.mount], check=True)
    try:
        assert "filesystem of type tmpfs" in refusal(idle)
    finally:
        subprocess.run([tool("umount"), idle.mount], check=True)


def test_a_mount_point_that_is_a_file(idle: Stand) -> None:
    idle.mount.touch()
    assert "can't be used" in refusal(idle)


def test_two_frontends_of_one_node(stand: Stand, tmp_path: Path) -> None:
    other = dict(stand.process.env)
    for env, says in (
        (other, "another ukai-frontend of this node runs already"),
        ({**other, "UKAI_RUN_DIR": str(tmp_path)}, "is served by another ukai-frontend"),
    ):
        done = subprocess.run([program("ukai-frontend")], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert says in done.stderr
    assert stand.is_mounted()


def test_a_mount_that_hangs_is_left_alone(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount, "ANSWER_WAIT_S", 0.5)
    stand.process.signal(signal.SIGSTOP)
    wait_for(lambda: process_state(stand.process.pid) == "T", "the frontend frozen", 5)
    try:
        with pytest.raises(UkaiError, match="does not answer"):
            mount.prepare(str(stand.mount))
    finally:
        stand.process.signal(signal.SIGCONT)
    wait_for(stand.is_mounted, "the mount", 5)


def test_find_asks_no_filesystem(stand: Stand) -> None:
    found = mount.find(str(stand.mount) + "/")
    assert found is not None
    assert (found.kind, found.where) == ("fuse.ukai", str(stand.mount))
    assert mount.find(str(stand.root)) is None


def test_unmounting_what_is_not_mounted(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Invalid argument") as caught:
        mount.unmount(str(tmp_path))
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("", False), ("#user_allow_other\n", False), ("mount_max = 9\n user_allow_other \n", True), (None, False)],
)
def test_others_are_let_in_by_root_or_by_fuse_conf(
    text: str | None, allowed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert mount.allows_other()
    conf = tmp_path / "fuse.conf"
    if text is not None:
        conf.write_text(text)
    monkeypatch.setattr(mount, "FUSE_CONF", conf)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert mount.allows_other() is allowed
