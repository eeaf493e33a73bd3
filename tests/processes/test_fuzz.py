"""Nothing that arrives at a socket ends a process or alters anything: an error reply, or a drop that is counted."""

from __future__ import annotations

import hashlib
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from tests.cluster import Cluster
from tests.machine import wait_for
from tests.processes.guest import QUICK, MakeCluster, create, read_all, write_at
from ukai import messages
from ukai.config import Config
from ukai.metad.server import CONTROL_FACTOR

pytestmark = [pytest.mark.cluster, pytest.mark.fuse]

ANSWER_S = 10.0
STRANGER = "192.0.2.77"
NOWHERE = "00000000-0000-4000-8000-000000000000"
JUNK: list[Any] = [None, -1, 2**64 - 1, 1.5, float("nan"), True, "", "x\0\n\x7f", "x" * 5000, b"\xff\xfe",
                   [[]], [None], [[2, 1]], [[0, None]], {"a": {}}, {"": ""}]  # fmt: skip
"""No value for any field of any request; where one is (an empty text, a map), the rest of the request is wrong."""


class Door:
    """A socket of a process, and how a stranger knocks."""

    def __init__(self, name: str, endpoint: str, empty_frame: bool, node: int, process: str) -> None:
        self.name, self.endpoint, self.empty_frame, self.node, self.process = name, endpoint, empty_frame, node, process


def doors(cluster: Cluster) -> dict[str, Door]:
    node = cluster.node(1)
    control, proxy = (cluster.settings[key] for key in ("control_port", "proxy_port"))
    return {
        "control": Door("control", f"tcp://{node}:{control}", True, 1, "metad"),
        "proxy": Door("proxy", f"tcp://{node}:{proxy}", False, 1, "blockd"),
        "ipc": Door("ipc", f"ipc://{cluster.run_root}/{node}/blockd.sock", False, 1, "blockd"),
    }


def errors_counted(cluster: Cluster, door: Door) -> float:
    """``ukai_protocol_errors_total`` of the process behind a door, as it publishes it next."""
    port = cluster.settings[f"{door.process}_events_port"]
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.linger = 0
        subscriber.connect(f"tcp://{cluster.node(door.node)}:{port}")
        subscriber.subscribe(f"metric.{cluster.node(door.node)}.{door.process}.")
        for _ in range(2):  # the first may be older than what was sent last
            assert subscriber.poll(int(ANSWER_S * 1000)), f"no metrics of {door.process}"
            frames = subscriber.recv_multipart()
    (value,) = (v for name, _, v in messages.unpack(frames[1])["metrics"] if name == "ukai_protocol_errors_total")
    return float(value)


class Stranger:
    """A DEALER that sends what it likes."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(door.endpoint)

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.context.term()

    def send(self, *frames: bytes) -> None:
        assert self.socket.poll(int(ANSWER_S * 1000), zmq.POLLOUT), f"{self.door.name} takes nothing more"
        self.socket.send_multipart([b"", *frames] if self.door.empty_frame else list(frames))

    def send_too_much(self, limit_bytes: int) -> None:
        """A frame above the limit; it costs the connection."""
        monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self.send(b"x" * (limit_bytes + 1))
            assert monitor.poll(int(ANSWER_S * 1000)), f"{self.door.name} took a frame of {limit_bytes + 1} bytes"
        finally:
            self.socket.disable_monitor()
            monitor.close(linger=0)

    def ask(self, header: dict[str, Any], *payload: bytes) -> dict[str, Any]:
        """Send a request and wait for its reply, whatever else arrives."""
        self.send(msgpack.packb({"v": messages.VERSION, **header}), *payload)
        return self.reply(header["id"])

    def reply(self, number: object) -> dict[str, Any]:
        """The reply to a request; others are passed over."""
        while True:
            assert self.socket.poll(int(ANSWER_S * 1000)), f"{self.door.name} did not answer request {number}"
            reply = messages.unpack(self.socket.recv_multipart()[-1 if self.door.empty_frame else 0])
            if reply.get("re") == number:
                return reply


def undecodable(chance: random.Random) -> Iterator[list[bytes]]:
    """Messages whose header can't be used, each for another reason."""
    version = messages.VERSION
    for length in (0, 1, 2, 7, 64, 1000, 70_000):
        yield [b"\xc1" + chance.randbytes(length)]
    for value in (None, 7, "text", [1, 2], [], {}, {"op": "ping", "id": 1}, {1: 2, "v": version}, {"v": "1", "id": 1}):
        yield [msgpack.packb(value)]
    for other in (0, version + 1, -1, 2**63, "1", None, [version], 1.0, True):
        yield [msgpack.packb({"v": other, "op": "ping", "id": 5})]
    yield [b"\x91" * 20_000]  # deep
    yield [b"\xdd\xff\xff\xff\xff"]  # a list of 2^32 - 1, they say
    yield [b"\xdf\xff\xff\xff\xff\xa1v\x01"]
    yield [msgpack.packb({"v": version, "op": "ping", "id": 1})[:-1]]
    yield [msgpack.packb({"v": version, "op": "ping", "id": 1}) + b"\x00"]
    yield [msgpack.packb({"v": version, "x": msgpack.ExtType(5, b"abc")})]
    yield [b"\xc1" * (5 * 2**20)]  # below the limit of a message, above that of a header
    good = msgpack.packb({"v": version, "op": "ping", "id": 1, "timeout": 1.0})
    for _ in range(100):
        at = chance.randrange(len(good))
        mutated = good[:at] + bytes([0xC1]) + good[at + 1 :]
        try:
            messages.unpack(mutated)
        except Exception:
            yield [mutated]


def broken(request: dict[str, Any], fixed: set[str]) -> Iterator[dict[str, Any]]:
    """The request with each field in turn of another shape, or away."""
    for field in request:
        if field in fixed:
            continue
        for junk in JUNK:
            yield request | {field: junk}
        yield {key: value for key, value in request.items() if key != field}


def control_requests() -> Iterator[dict[str, Any]]:
    """Orders about what does not exist, and requests of a node that is none, in all wrong shapes."""
    node, gone = {"node": STRANGER, "inc": "x", "n": 1, "since": 0}, {"image": NOWHERE, "epoch": 1}
    where = {"name": "nowhere", "timeout": 1.0}
    orders: list[dict[str, Any]] = [
        {"op": "image.create", "name": "new", "size": 1 << 20, "block_size": 4096, "locations": [STRANGER],
         "hypervisors": [STRANGER], "timeout": 1.0},
        *({"op": op, **where} for op in ("image.add", "image.offline", "image.show", "sync.stop", "sync.status")),
        {"op": "image.remove", **where, "delete_data": True, "force": True},
        *({"op": op, **where, "node": STRANGER, "ranges": [[0, 1]]} for op in ("location.add", "location.remove")),
        *({"op": op, **where, "node": STRANGER} for op in ("hypervisor.add", "hypervisor.remove", "migrate")),
        {"op": "sync.start", **where, "nodes": [STRANGER], "ranges": [[0, 1]], "rate": -1},
        {"op": "sync.rate", **where, "rate": 5},
        {"op": "catchup", "since": 10**9},
        {"op": "nothing of the kind"},
        {"op": "beat", **node, "saved_seq": 0, "roles": {NOWHERE: 1}, "opens": {NOWHERE: 1}, "down": [], "progress": {},
         "space": [1, 1]},
        {"op": "grant", **node, "image": NOWHERE, "opened_epoch": -1, "purpose": "io"},
        {"op": "grant.commit", **node, **gone, "fenced": [STRANGER]},
        *({"op": op, **node, **gone, "ranges": [[0, 1]]} for op in ("release", "activate", "retire")),
        {"op": "mark", **node, **gone, "marks": [[STRANGER, 0, 1, "because"]]},
        {"op": "sync.begin", **node, **gone, "target": STRANGER, "ranges": [[0, 1]]},
        {"op": "sync.finish", **node, **gone, "target": STRANGER, "done": [[0, 1, 5]]},
        {"op": "job.end", **node, **gone, "number": 1, "state": "done", "reason": ""},
    ]  # fmt: skip
    for order in orders:
        yield order
        yield from broken(order, set())
    register = {"op": "register", "node": STRANGER, "inc": "x", "store_id": 5, "boot_id": 5, "serial": "x",
                "highest_seq": "x", "cluster_id": 5, "images": 5}  # fmt: skip
    yield from broken(register, {"store_id", "images"})


def proxy_requests(uuid: str, token: int) -> Iterator[dict[str, Any]]:
    """What a coordinator sends, each with one field wrong."""
    place = {"i": uuid, "b": 0, "o": 0}
    data: list[dict[str, Any]] = [
        {"op": "fence", "i": uuid, "e": "x"},
        {"op": "w", **place, "e": None, "g": 1},
        {"op": "wt", "i": uuid, "e": None, "w": [[0, 0, 1, 4096]]},
        {"op": "ws", **place, "e": None, "g": 1},
        {"op": "z", **place, "e": None, "l": 4096, "g": 1},
        {"op": "g", "i": uuid, "e": None, "g": 1, "ranges": [[0, 0]]},
        {"op": "f", "i": uuid, "e": None, "ranges": [[0, 0]]},
        {"op": "d", "i": uuid, "e": None, "b": 0, "g": 1},
        {"op": "k", "i": uuid, "e": None, "ranges": [[0, 0]]},
        {"op": "r", **place, "l": 0, "g": 0},
        {"op": "h", **place, "l": 0, "c": 512},
        {"op": "cr", "i": uuid, "o": -1, "l": 1},
        {"op": "usage", "i": uuid, "ranges": [[0, 10**9]]},
        {"op": "nothing of the kind"},
    ]
    for request in data:
        for header in (request, *broken(request, {"e", "l"} & set(request) if "e" in request else set())):
            for number in (0, 1, -1, None, "0", 2**64 - 1):
                yield {"t": token, "n": number, **header}
            yield {"t": token + 1, "n": 0, **header}
            yield {"n": 0, **header}
    yield from broken({"op": "hello", "node": STRANGER, "inc": "y", "try": "x"}, {"try"})
    yield {"op": "ping", "t": "x", "roles": [1]}
    yield {"op": "ping", "roles": {1: 2, uuid: "x"}}


def ipc_requests(inc: str) -> Iterator[dict[str, Any]]:
    """What a frontend sends, about handles that it has not."""
    requests: list[dict[str, Any]] = [
        {"op": "beat", "frontend": "fuzz", "handles": [1, 2]},
        {"op": "open", "frontend": "fuzz", "h": 7, "image": "nowhere", "epoch": -1},
        {"op": "r", "h": 7, "o": 0, "l": 4096},
        {"op": "w", "h": 7, "o": 0, "s": True},
        {"op": "w", "h": 7, "o": 0, "f": True},
        {"op": "f", "h": 7},
        {"op": "z", "h": 7, "o": 0, "l": 4096, "s": True},
        {"op": "close", "h": 7},
        {"op": "stat", "image": "nowhere"},
        {"op": "nothing of the kind"},
    ]
    for request in requests:
        for header in (request, *broken(request, set())):
            yield {"inc": inc, **header}
            yield {"inc": "another", **header}
            yield header


def state(cluster: Cluster) -> dict[str, Any]:
    """All that must not change: the metadata but for what lives, and each byte of each block file and sidecar."""
    files = {}
    for address in cluster.addresses:
        for path in sorted((cluster.data_root(address) / "disk").iterdir()):
            files[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    status = cluster.ask("status")
    nodes = {node["address"]: (node["state"], node["store_id"], node["images"]) for node in status["nodes"]}
    return {
        "files": files,
        "seq": status["seq"],
        "nodes": nodes,
        "image": cluster.image("disk"),
        "errors": status["errors"],
    }


def settled(cluster: Cluster) -> dict[str, Any]:
    """The state once no writer is left."""
    wait_for(lambda: not cluster.image("disk")["writer"], "the role given back", 10, cluster.tails)
    return state(cluster)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["control", "proxy", "ipc"])
def test_requests(make_cluster: MakeCluster, name: str, seed: int) -> None:
    cluster = make_cluster(nodes=2, settings=QUICK)
    disk = create(cluster, size="4M")
    content = os.urandom(4 << 20)
    write_at(disk, 0, content)
    before = settled(cluster)
    door = doors(cluster)[name]
    pids = [process.pid for process in cluster.processes.values()]
    counted = errors_counted(cluster, door)
    chance = random.Random(seed)
    hellos: dict[str, dict[str, Any]] = {
        "control": {"op": "ping", "timeout": 1.0},
        "proxy": {"op": "hello", "node": STRANGER, "inc": "x"},
        "ipc": {"op": "hello", "frontend": "fuzz"},
    }
    hello = hellos[name]

    sent = 0
    with Stranger(door) as stranger:
        for frames in undecodable(chance):
            stranger.send(*frames)
            sent += 1
        stranger.send(b"", b"", b"")
        stranger.send(*[b"x"] * 1000)
        assert "err" not in stranger.ask({"id": 1, **hello, "try": 1}), "all before it has arrived"
    with Stranger(door) as stranger:
        stranger.send_too_much(Config().message_limit * (CONTROL_FACTOR if name == "control" else 1))

    with Stranger(door) as stranger:
        welcome = stranger.ask({"id": 1, **hello, "try": 2})
        assert "err" not in welcome, welcome
        if name == "control":
            requests = list(control_requests())
        elif name == "ipc":
            requests = list(ipc_requests(welcome["inc"]))
        else:
            requests = list(proxy_requests(before["image"]["uuid"], welcome["token"]))
        chance.shuffle(requests)
        for number, request in enumerate(requests, 2):
            payload = [chance.randbytes(chance.choice((0, 1, 4096)))] if chance.random() < 0.5 else []
            stranger.send(msgpack.packb({"v": messages.VERSION, "id": number, **request}), *payload)
            if number % 100 == 0:  # answered one and all; another order is allowed
                stranger.ask({"id": -number, **hello, "try": number})
        last = stranger.ask({"id": 0, **hello, "try": 10**9})
        assert "err" not in last, last

    assert [process.pid for process in cluster.processes.values()] == pids
    assert all(process.alive for process in cluster.processes.values())
    assert errors_counted(cluster, door) >= counted + sent
    assert settled(cluster) == before
    assert read_all(disk) == content
    write_at(disk, 0, b"and it still works")
    assert cluster.compare_replicas() == 8


@pytest.mark.parametrize("seed", [1, 2])
def test_every_port_hears_noise(make_cluster: MakeCluster, seed: int) -> None:
    """Bytes that are no ZeroMQ at all, and subscribers that subscribe to nonsense, at every port."""
    cluster = make_cluster(nodes=2, settings=QUICK)
    disk = create(cluster, size="4M")
    content = os.urandom(4 << 20)
    write_at(disk, 0, content)
    before = settled(cluster)
    chance = random.Random(seed)
    greeting = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01NULL" + bytes(16) + b"\0" + bytes(31)
    ports = [int(str(v)) for k, v in cluster.settings.items() if k.endswith("_port")]
    assert len(ports) == 6
    local = cluster.run_root / cluster.node(1) / "blockd.sock"
    targets: list[int | Path] = [*ports, local]
    for target in targets:
        for noise in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            chance.randbytes(10_000),
            greeting[: chance.randrange(1, len(greeting))],
            greeting + chance.randbytes(5000),
            greeting + b"\x04\x19\x05READY" + b"\xff" * 100,
            greeting + b"\x02" + b"\xff" * 8 + b"x" * 100,  # a frame of 2^64 - 1 bytes, they say
        ):
            knock(cluster.node(1), target, noise)
    with zmq.Context() as context:
        for port in ports:
            with context.socket(zmq.XSUB) as subscriber:
                subscriber.linger = 0
                subscriber.connect(f"tcp://{cluster.node(1)}:{port}")
                for message in (b"\x01" + chance.randbytes(50_000), b"\x00never", b"\x07", chance.randbytes(100)):
                    subscriber.send(message)
    assert all(process.alive for process in cluster.processes.values())
    assert settled(cluster) == before
    assert read_all(disk) == content
    write_at(disk, 0, b"and it still works")
    assert cluster.ctl("status")["errors"] == []


def knock(node: str, target: int | Path, noise: bytes) -> None:
    """Send bytes to a port or a local socket and hang up; it may hang up first."""
    family = socket.AF_INET if isinstance(target, int) else socket.AF_UNIX
    with socket.socket(family, socket.SOCK_STREAM) as raw:
        raw.settimeout(ANSWER_S)
        raw.connect((node, target) if isinstance(target, int) else str(target))
        try:
            raw.sendall(noise)
            raw.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError, OSError):
            return
