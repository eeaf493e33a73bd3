"""log and metrics, against publishers of the real kind."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import zmq

from tests.ctl.conftest import Run
from tests.ctl.fake_metad import NODE, FakeMetad
from tests.ctl.test_processes import CTL
from tests.machine import PortRange
from ukai import messages
from ukai.ctl.follow import PROCESSES
from ukai.telemetry import Telemetry

EVENTS: dict[str, int] = {}
RECORD = {"time": 1_700_000_000.25, "level": "warning", "node": "127.0.0.1", "process": "blockd", "logger": "ukai"}


@pytest.fixture(autouse=True)
def ports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fills EVENTS."""
    free = PortRange(["127.0.0.1", "127.0.0.2"], len(PROCESSES))
    for port, process in enumerate(PROCESSES, free.first):
        EVENTS[process] = port
        monkeypatch.setenv(f"UKAI_{process.upper()}_EVENTS_PORT", str(port))
    yield
    free.close()


@contextmanager
def publisher(process: str, node: str = "127.0.0.1") -> Iterator[None]:
    """Metrics and one record of each level, over and over."""
    stop = threading.Event()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PUB)
    socket.bind(f"tcp://{node}:{EVENTS[process]}")

    def publish() -> None:
        while not stop.wait(0.02):
            for level in ("debug", "info", "warning", "error"):
                fields = {**RECORD, "node": node, "process": process, "level": level, "message": f"a {level}"}
                socket.send_multipart([f"log.{node}.{process}.{level}.".encode(), messages.pack(fields)])
            metrics = [["ukai_peers_up", {}, 2], ["ukai_requests_total", {"op": "r", "image": "a"}, 7]]
            metrics.append(["ukai_latency_seconds_bucket", {"le": "+Inf"}, 7])
            fields = {"time": 1.0, "node": node, "process": process, "metrics": metrics}
            socket.send_multipart([f"metric.{node}.{process}.".encode(), messages.pack(fields)])
            socket.send_multipart([f"metric.{node}.{process}.".encode(), b"\xc1"])
            socket.send_multipart([f"metric.{node}.{process}.".encode()])

    thread = threading.Thread(target=publish, name="publisher")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        socket.close(0)
        context.term()


def test_log_of_one_node_without_metad(run: Run) -> None:
    with publisher("blockd"):
        result = run("log", "--node", "127.0.0.1", "--process", "blockd", "--level", "warning", "--count", "4")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[4] for line in lines] in (["warning", "error"] * 2, ["error", "warning"] * 2)
    assert all("127.0.0.1 blockd" in line for line in lines)


def test_log_as_json_lines_with_stable_keys(run: Run) -> None:
    with publisher("blockd"):
        result = run("log", "--node", "127.0.0.1", "--process", "blockd", "--count", "3", "--json")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(records) == 3
    assert all(list(r) == ["time", "level", "node", "process", "logger", "message"] for r in records)
    assert {r["level"] for r in records} == {"info", "warning", "error"}


def test_log_of_all_nodes_names_those_not_heard(metad: FakeMetad, run: Run) -> None:
    metad.answers["node.list"] = {"nodes": [NODE, NODE | {"address": "127.0.0.2"}]}
    with publisher("blockd"), publisher("metad"), publisher("blockd", "127.0.0.2"):
        result = run("log", "--for", "4", "--timeout", "3")
    assert result.exit_code == 0
    assert {tuple(line.split()[2:4]) for line in result.stdout.splitlines()} == {
        ("127.0.0.1", "blockd"),
        ("127.0.0.1", "metad"),
        ("127.0.0.2", "blockd"),
    }
    assert result.stderr == "not heard within 3 s: frontend on 127.0.0.1, frontend on 127.0.0.2\n"


def test_log_without_metad_says_how_to_do_without(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UKAI_CONTROL_PORT", "1")
    result = run("log", "--timeout", "0.2")
    assert result.exit_code == 3
    assert "with --node a node is followed without metad" in result.stderr


def test_metrics_once(metad: FakeMetad, run: Run) -> None:
    metad.answers["node.list"] = {"nodes": [NODE]}
    with publisher("blockd"), publisher("metad"), publisher("frontend"):
        result = run("metrics", "--once")
        assert result.exit_code == 0
        assert result.stderr == ""
        assert sorted(result.stdout.splitlines()) == sorted(
            line
            for process in EVENTS
            for line in (
                f"127.0.0.1 {process} ukai_peers_up 2",
                f'127.0.0.1 {process} ukai_requests_total{{op="r",image="a"}} 7',
            )
        )
        result = run("metrics", "--once", "--process", "blockd", "--name", "*_bucket", "--json")
        record = json.loads(result.stdout)
        assert list(record) == ["time", "node", "process", "metrics"]
        assert record["metrics"] == [{"name": "ukai_latency_seconds_bucket", "labels": {"le": "+Inf"}, "value": 7}]


def test_metrics_of_nobody(run: Run) -> None:
    result = run("metrics", "--once", "--node", "127.0.0.3", "--timeout", "0.3")
    assert result.exit_code == 3
    assert "not heard within 0.3 s: blockd on 127.0.0.3, frontend on 127.0.0.3" in result.stderr


def test_a_reader_that_is_gone_ends_a_quiet_log() -> None:
    """Without waiting for the next record, which may never come."""
    shell = f"set -o pipefail; {CTL} log --node 127.0.0.3 | true"
    begun = time.monotonic()
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=30, check=False)
    assert time.monotonic() - begun < 8
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.expect_log("a warning of a test")
def test_what_telemetry_publishes_is_understood(run: Run) -> None:
    """The real publisher and the real consumer."""

    async def publish(stop: threading.Event) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        endpoint = f"tcp://127.0.0.1:{EVENTS['blockd']}"
        telemetry = Telemetry(context, endpoint, "127.0.0.1", "blockd", 0.05)
        telemetry.metrics.op("w", "image01").done(0.002, 4096)
        telemetry.start()
        while not stop.is_set():
            logging.getLogger("ukai.test").warning("a warning of a test")
            await asyncio.sleep(0.02)
        telemetry.close()
        context.term()

    stop = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(publish(stop)), name="telemetry")
    thread.start()
    try:
        log = run("log", "--node", "127.0.0.1", "--process", "blockd", "--count", "1", "--json", "--timeout", "5")
        metrics = run("metrics", "--node", "127.0.0.1", "--process", "blockd", "--once", "--json")
    finally:
        stop.set()
        thread.join()
    assert json.loads(log.stdout)["message"] == "a warning of a test"
    numbers = {(m["name"], m["labels"].get("op")): m["value"] for m in json.loads(metrics.stdout)["metrics"]}
    assert numbers["ukai_bytes_total", "w"] == 4096
