"""What the frontend publishes about its work."""

from __future__ import annotations

import os
import time

import pytest
import zmq

from tests.frontend.harness import Stand, errno_of
from tests.frontend.test_fuse import PUNCH, fallocate, in_thread, opened
from tests.machine import wait_for
from ukai import messages
from ukai.errors import DiskError

pytestmark = pytest.mark.fuse

Samples = dict[tuple[str, str, str], float]


def samples(sub: zmq.Socket[bytes]) -> Samples:
    """The newest metrics: (name, op, image) → value."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not sub.poll(100):
            continue
        topic, frame = sub.recv_multipart()
        assert topic == b"metric.127.0.0.1.frontend."
        return {
            (n, labels.get("op", ""), labels.get("image", "")): v for n, labels, v in messages.unpack(frame)["metrics"]
        }
    raise AssertionError("no metrics")


def test_requests_bytes_errors_and_what_is_under_way(stand: Stand) -> None:
    stand.expect_log("write of disk failed")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sub = context.socket(zmq.SUB)
    try:
        sub.set(zmq.CONFLATE, 0)
        sub.set(zmq.SUBSCRIBE, b"metric.")
        sub.connect(f"tcp://127.0.0.1:{stand.ports.first + 5}")
        with opened(stand.disk) as fd:
            os.pwrite(fd, bytes(1000), 0)
            os.pwrite(fd, bytes(2000), 0)
            os.pread(fd, 500, 0)
            os.fsync(fd)
            fallocate(fd, PUNCH, 0, 4096)
            stand.node.faults["w"] = [DiskError("broken")]
            errno_of(os.pwrite, fd, b"x", 0)
            stand.node.faults["w"] = ["late"]
            end = in_thread(lambda: os.pwrite(fd, bytes(3000), 0))

            def seen() -> Samples | None:
                found = samples(sub)
                return found if found.get(("ukai_inflight_bytes", "", "")) == 3000 else None

            found = wait_for(seen, "the write under way", 10)
            stand.node.release()
            end()
        want = {
            ("ukai_requests_total", "write", "disk"): 3,
            ("ukai_bytes_total", "write", "disk"): 3000,
            ("ukai_errors_total", "write", "disk"): 1,
            ("ukai_requests_total", "read", "disk"): 1,
            ("ukai_bytes_total", "read", "disk"): 500,
            ("ukai_requests_total", "flush", "disk"): 1,
            ("ukai_requests_total", "discard", "disk"): 1,
            ("ukai_requests_total", "open", "disk"): 1,
            ("ukai_latency_seconds_count", "write", "disk"): 3,
            ("ukai_inflight_requests", "", ""): 1,
            ("ukai_open_handles", "", ""): 1,
            ("ukai_peers_up", "", ""): 1,
            ("ukai_protocol_errors_total", "", ""): 0,
        }
        assert {key: found.get(key) for key in want} == want
    finally:
        context.destroy(linger=0)
