"""A metad and a blockd that keep images in memory and misbehave when told to.

In a test it runs as a thread of the test's process; ``python -m tests.frontend.fake_node RUN_DIR CONTROL PUBLISH``
runs it as a process of its own, for measurements.
"""

from __future__ import annotations

import queue
import secrets
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from ukai import messages
from ukai.errors import NotFound, RemoteProtocolError, StaleHandle, StaleSession, UkaiError
from ukai.messages import Header
from ukai.model import Cluster, Image

NODE = "127.0.0.1"
SLICE_MS = 20


class FakeNode:
    """Images by name; ``faults`` say what to do with the next requests of an operation.

    A fault is "hold" (not answered, not done, until ``release``), "late" (done, answered at ``release``), "lose"
    (done, never answered), "drop" (neither), an error that is the answer, or frames that are.  In these the number of
    the request takes the place of "ID".
    """

    def __init__(self, run_dir: Path, control_port: int, publish_port: int) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.endpoint = f"ipc://{run_dir}/blockd.sock"
        self.cluster = Cluster(cluster_id="fake", seq=1)
        self.data: dict[str, bytearray] = {}
        self.allocated: dict[str, int] = {}
        self.faults: dict[str, list[str | UkaiError | list[Any]]] = defaultdict(list)
        self.held: list[tuple[bytes, Header, bytes, bool]] = []
        self.seen: list[Header] = []
        self.record = True
        self.handles: dict[int, tuple[str, int]] = {}
        self.lost_epoch: dict[str, int] = {}
        self.epoch = 1
        self.inc = ""
        self.frozen = self.clean = False
        """``clean``: after a synchronous write it says that nothing is left to be flushed."""
        self._metad = self.context.socket(zmq.ROUTER)
        self._metad.bind(f"tcp://{NODE}:{control_port}")
        self._pub = self.context.socket(zmq.PUB)
        self._pub.bind(f"tcp://{NODE}:{publish_port}")
        self._blockd: zmq.Socket[bytes] | None = None
        self._orders: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="fake node")
        self._thread.start()

    # -- orders of the test; each is carried out by the node's own thread

    def do(self, work: Callable[[], None]) -> None:
        done = threading.Event()
        self._orders.put((work, done))
        assert done.wait(10)

    def add(self, name: str, size: int, block_size: int = 65536, hypervisors: tuple[str, ...] = (NODE,)) -> None:
        def work() -> None:
            self.data[name] = bytearray(size)
            self.allocated[name] = 0
            image = Image(f"uuid-{name}", name, size, block_size, list(hypervisors), True)
            self._change({"t": "image", **image.row()})

        self.do(work)

    def offline(self, name: str) -> None:
        self.do(lambda: self._change({"t": "image", "uuid": f"uuid-{name}", "online": False}))

    def start_blockd(self) -> None:
        def work() -> None:
            assert self._blockd is None
            self.inc = secrets.token_hex(4)
            self.handles = {}
            self._blockd = self.context.socket(zmq.ROUTER)
            self._blockd.linger = 0
            self._blockd.bind(self.endpoint)

        self.do(work)

    def kill_blockd(self) -> None:
        def work() -> None:
            assert self._blockd is not None
            self._blockd.close(0)
            self._blockd = None
            self.held = []

        self.do(work)

    def release(self) -> None:
        """Answer what was held."""

        def work() -> None:
            held, self.held = self.held, []
            for identity, header, payload, done in held:
                reply = ({}, b"") if done else self._try(header, payload)
                self._answer(identity, header, *reply)

        self.do(work)

    def close(self) -> None:
        self._stop = True
        self._thread.join()
        self.context.destroy(linger=0)

    def count(self, op: str) -> int:
        return sum(h["op"] == op for h in self.seen)

    # -- the node's thread

    def _change(self, change: dict[str, Any]) -> None:
        self.cluster.apply(change)
        row = [self.cluster.seq, 0.0, "test", change]
        self._publish({"op": "changes", "changes": [row]})

    def _publish(self, fields: Header) -> None:
        self._pub.send_multipart([b"meta.", messages.pack({"cluster_id": "fake", "inc": "m1", **fields})])

    def _run(self) -> None:
        beat_at = 0.0
        while not self._stop:
            while not self._orders.empty():
                work, done = self._orders.get()
                work()
                done.set()
            if time.monotonic() > beat_at:
                beat_at = time.monotonic() + 0.2
                self._publish({"op": "beat", "seq": self.cluster.seq})
                self._serve_metad()
            blockd = self._blockd
            if blockd is None or self.frozen:
                self._metad.poll(SLICE_MS)
                self._serve_metad()
            elif blockd.poll(SLICE_MS):
                self._serve_blockd(blockd)

    def _serve_metad(self) -> None:
        while self._metad.poll(0):
            identity, empty, frame = self._metad.recv_multipart()
            header = messages.unpack(frame)
            reply = {"re": header["id"], "inc": "m1", "seq": self.cluster.seq, "cluster_id": "fake"}
            reply["snapshot"] = self.cluster.snapshot(detail=False)
            self._metad.send_multipart([identity, empty, messages.pack(reply)])

    def _serve_blockd(self, socket: zmq.Socket[bytes]) -> None:
        for _ in range(64):
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            header = messages.unpack(frames[1])
            payload = frames[2] if len(frames) > 2 else b""
            if self.record:
                self.seen.append(header)
            op = header["op"]
            fault = self.faults[op].pop(0) if self.faults.get(op) else ""
            if isinstance(fault, UkaiError):
                self._answer(frames[0], header, messages.error_reply(fault), b"")
            elif isinstance(fault, list):
                socket.send_multipart([frames[0], *(_numbered(f, header["id"]) for f in fault)])
            elif fault == "hold":
                self.held.append((frames[0], header, payload, False))
            elif fault in ("late", "lose"):
                self._try(header, payload)
                if fault == "late":
                    self.held.append((frames[0], header, b"", True))
            elif fault != "drop":
                self._answer(frames[0], header, *self._try(header, payload))

    def _answer(self, identity: bytes, header: Header, reply: Header, payload: bytes | memoryview) -> None:
        assert self._blockd is not None
        frames: list[Any] = [identity, messages.pack({"re": header["id"], **reply})]
        self._blockd.send_multipart([*frames, payload] if header["op"] == "r" and "err" not in reply else frames)

    def _try(self, header: Header, payload: bytes) -> tuple[Header, bytes | memoryview]:
        try:
            return self._work(header, payload)
        except UkaiError as e:
            return messages.error_reply(e), b""

    def _work(self, header: Header, payload: bytes) -> tuple[Header, bytes | memoryview]:
        op = header["op"]
        if op == "hello":
            return {"inc": self.inc, "node": NODE, "io_timeout": 30.0}, b""
        if header.get("inc") != self.inc:
            raise StaleSession("another process")
        if op in ("r", "w", "z", "f"):
            if header["h"] not in self.handles:
                raise StaleSession("handle is not open here")
            name, opened = self.handles[header["h"]]
            data, at = self.data[name], header.get("o", 0)
            if op == "r":
                return {}, memoryview(data)[at : at + header["l"]]
            if opened < self.lost_epoch.get(name, 0):
                raise StaleHandle("another node has written the image since it was opened")
            if op == "w":
                if at + len(payload) > len(data):
                    raise RemoteProtocolError("past the end")
                data[at : at + len(payload)] = payload
                self.allocated[name] += len(payload)
            elif op == "z":
                data[at : at + header["l"]] = bytes(header["l"])
                self.allocated[name] = max(0, self.allocated[name] - header["l"])
            return ({"clean": True} if self.clean and (header.get("s") or header.get("f")) else {}), b""
        if op == "beat":
            return {"inc": self.inc, "known": [h for h in header["handles"] if h in self.handles]}, b""
        if op == "open":
            return self._open(header), b""
        if op == "close":
            self.handles.pop(header["h"], None)
            return {}, b""
        if op == "stat":
            return {"allocated": self.allocated[header["image"]]}, b""
        if op == "statfs":
            return {"free": 3 * 2**30, "total": 8 * 2**30}, b""
        raise RemoteProtocolError(f"no such operation: {op}")

    def _open(self, header: Header) -> Header:
        name = header["image"]
        if name not in self.data:
            raise NotFound(f"image {name} is not known")
        epoch = self.epoch if header["epoch"] == -1 else header["epoch"]
        if epoch < self.lost_epoch.get(name, 0):
            raise StaleHandle("another node has written the image since it was opened")
        self.handles[header["h"]] = (name, epoch)
        image = self.cluster.by_name(name)
        return {"uuid": image.uuid, "size": image.size, "block_size": image.block_size, "epoch": epoch}


def _numbered(frame: Any, number: int) -> bytes:
    """A frame to send: bytes as they are, a map packed."""
    if isinstance(frame, bytes):
        return frame
    return messages.pack({k: number if v == "ID" else v for k, v in frame.items()})


def main() -> None:
    run_dir, control, publish = sys.argv[1:4]
    node = FakeNode(Path(run_dir), int(control), int(publish))
    node.record = False
    node.add("disk", 2**28, 2**26)
    node.start_blockd()
    sys.stdin.read()
    node.close()


if __name__ == "__main__":
    main()
