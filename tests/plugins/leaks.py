"""A thread, process, socket, mount or loop device that outlives its test fails the test.

What fixtures of a wider scope hold was there before the test and is looked at when the session ends.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from zmq.utils.garbage import GarbageCollectorThread

from tests import cluster, machine, proxy
from tests.sim import ahead

GRACE_S = 3.0


def _held(paths: pytest.TempPathFactory) -> set[str]:
    ours = str(paths.getbasetemp())  # others on this machine may mount meanwhile
    # pyzmq's own stays from the first message that was sent without a copy to the end of the process
    threads = (thread for thread in threading.enumerate() if not isinstance(thread, GarbageCollectorThread))
    held = {f"thread {thread.name}" for thread in threads}
    held |= {f"process {child.pid}" for child in psutil.Process().children(recursive=True)}
    held -= _of_clusters() | {f"process {pid}" for pid in ahead.pids()}
    for fd in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(fd)
        except OSError:
            continue
        if target.startswith("socket:") and not proxy.LIVE:  # those of a proxy come and go with its connections
            held.add(target)
    held |= {f"mount {mount.where}" for mount in machine.mounts() if mount.where.is_relative_to(ours)}
    held |= {f"loop device {device} on {file}" for device, file in machine.loop_devices().items() if ours in file}
    return held


def _of_clusters() -> set[str]:
    """Processes of clusters of a wider scope, which may have been started anew: a cluster looks for them at its end."""
    processes = (process for one in cluster.LIVE for process in one.processes.values())
    return {f"process {process.pid}" for process in processes if process.popen is not None}


def _check(before: set[str], paths: pytest.TempPathFactory) -> None:
    try:
        machine.wait_for(lambda: not _held(paths) - before, "the end of what a test began", GRACE_S)
    except AssertionError:
        left = sorted(_held(paths) - before)
    else:
        return
    pytest.fail("left behind: " + ", ".join(map(_described, left)), pytrace=False)


def _described(what: str) -> str:
    kind, _, pid = what.partition(" ")
    if kind != "process":
        return what
    try:
        return f"{what} {' '.join(psutil.Process(int(pid)).cmdline())}"
    except psutil.Error:
        return what


@pytest.fixture(autouse=True)
def _no_leaks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = _held(tmp_path_factory)
    yield
    _check(before, tmp_path_factory)


@pytest.fixture(autouse=True, scope="session")
def _no_leaks_at_the_end(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = _held(tmp_path_factory)
    yield
    _check(before, tmp_path_factory)
