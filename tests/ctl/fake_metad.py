"""A metad that a test scripts: a ROUTER in a thread that answers from a table and keeps what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import zmq

from ukai import messages

Header = dict[str, Any]
Answer = Header | Callable[[Header], Header | None] | None

SUMMARY: Header = {
    "name": "image01",
    "uuid": "00000000-0000-4000-8000-000000000001",
    "size": 8 * 2**30,
    "block_size": 64 * 2**20,
    "blocks": 128,
    "online": True,
    "writer": "127.0.0.1",
    "epoch": 4,
    "replication": "sync",
    "checksum": False,
    "hypervisors": ["127.0.0.1", "127.0.0.2"],
    "locations": {
        "127.0.0.1": {"in_sync": 128, "syncing": 0, "out_of_sync": 0},
        "127.0.0.2": {"in_sync": 100, "syncing": 8, "out_of_sync": 20},
    },
    "open": {"127.0.0.1": 2},
    "health": "degraded",
}
JOB: Header = {
    "image": "image01",
    "kind": "sync",
    "number": 7,
    "state": "running",
    "reason": "",
    "nodes": ["127.0.0.2"],
    "ranges": [[0, 127]],
    "started": 1_700_000_000.0,
    "coordinator": "127.0.0.1",
    "bytes_total": 28 * 64 * 2**20,
    "bytes_done": 14 * 64 * 2**20,
    "bytes_equal": 10 * 64 * 2**20,
    "bytes_copied": 3 * 64 * 2**20,
    "bytes_hole": 64 * 2**20,
    "rate": 100 * 2**20,
    "eta": 9,
    "blocks_total": 28,
    "blocks_done": 14,
    "blocks_differed": 0,
    "rate_limit": 200 * 2**20,
}
NODE: Header = {
    "address": "127.0.0.1",
    "state": "up",
    "since": 1_700_000_000.0,
    "reason": "",
    "store_id": "store-1",
    "space_free": 10 * 2**30,
    "space_total": 50 * 2**30,
    "images": 1,
}
DOWN = NODE | {"address": "127.0.0.2", "state": "down", "reason": "no beat for 5 s", "store_id": "store-2"}
ERROR: Header = {
    "address": "127.0.0.2",
    "since": 1_700_000_000.0,
    "reason": "no beat for 5 s",
    "reported_by": ["127.0.0.1"],
}


def replica(status: int, reason: str = "", generation: int = 12) -> Header:
    name = ("in-sync", "syncing", "out-of-sync")[status]
    return {"status": status, "status_name": name, "generation": generation, "reason": reason}


IMAGE: Header = SUMMARY | {
    "placement": [
        {"first": 0, "last": 99, "replicas": {"127.0.0.1": replica(0), "127.0.0.2": replica(0)}},
        {"first": 100, "last": 107, "replicas": {"127.0.0.1": replica(0), "127.0.0.2": replica(1)}},
        {"first": 108, "last": 127, "replicas": {"127.0.0.1": replica(0), "127.0.0.2": replica(2, "no answer")}},
    ],
    "active": [[3, 4], [9, 9]],
    "job": JOB,
}

HOLDING: Header = {
    "location": True,
    "reported": True,
    "held": True,
    "written": 40,
    "newest": 17,
    "bad_blocks": 0,
    "bad": [],
}
BEHIND: Header = {
    "behind": True,
    "seq": 42,
    "nodes": [
        {"address": "127.0.0.1", "reported": True, "seq": 57, "reason": "the metadata is older than what it has seen"},
        {"address": "127.0.0.2", "reported": False, "seq": 0, "reason": ""},
    ],
    "images": [
        {
            "name": "image01",
            "uuid": SUMMARY["uuid"],
            "blocks": 128,
            "newest": 12,
            "copies": {
                "127.0.0.1": HOLDING,
                "127.0.0.2": HOLDING | {"reported": False, "written": 0, "newest": 0},
                "127.0.0.3": HOLDING | {"held": False, "written": 0, "newest": 0},
                "127.0.0.4": HOLDING
                | {"location": False, "newest": 9, "bad_blocks": 2, "bad": [[3, 4, "block file is missing"]]},
            },
        }
    ],
    "unknown": [{"name": "later", "uuid": "00000000-0000-4000-8000-000000000002", "nodes": ["127.0.0.1"]}],
}
"""An answer to ``metadata.show`` while the metadata is older than what nodes have seen."""

ANSWERS: dict[str, Answer] = {
    "image.create": {"image": SUMMARY, "notes": ["a note"]},
    "image.add": {"image": SUMMARY, "notes": []},
    "image.offline": {"image": SUMMARY | {"online": False}, "notes": []},
    "image.set": {"image": SUMMARY, "notes": []},
    "image.remove": {"notes": []},
    "image.list": {"images": [SUMMARY]},
    "image.show": {"image": IMAGE},
    "location.add": {"image": SUMMARY, "notes": []},
    "location.remove": {"image": SUMMARY, "notes": []},
    "hypervisor.add": {"image": SUMMARY, "notes": []},
    "hypervisor.remove": {"image": SUMMARY, "notes": []},
    "migrate": {"image": SUMMARY, "notes": []},
    "sync.start": {"job": JOB},
    "verify.start": {"job": JOB | {"kind": "verify"}},
    "sync.stop": {"job": JOB | {"state": "stopped", "reason": "stopped by an administrator"}},
    "sync.rate": {"job": JOB},
    "sync.status": {"jobs": [JOB]},
    "image.accept": {"image": SUMMARY, "accepted": [[0, 3], [7, 7]], "zeros": [], "notes": ["a note"]},
    "metadata.show": BEHIND,
    "metadata.accept": {"seq": 1_000_058, "seen": 57, "notes": ["a note"]},
    "node.accept": {"accepted": {"image01": "0-3,7", "image02": "1"}},
    "node.list": {"nodes": [NODE, DOWN]},
    "errors": {"nodes": [ERROR]},
    "status": {
        "cluster_id": "c0ffee00-0000-4000-8000-000000000000",
        "seq": 42,
        "metad": {"address": "127.0.0.1", "version": "0.1.0", "since": 1_700_000_000.0},
        "nodes": [NODE, DOWN],
        "images": [SUMMARY],
        "jobs": [JOB],
        "errors": [ERROR],
    },
}


class FakeMetad:
    """Answers an op from ``answers``: a map, a function of the request, or None for silence.

    A map with ``raw`` is sent as these bytes.  ``asked`` holds the requests in order.
    """

    def __init__(self) -> None:
        self.answers = dict(ANSWERS)
        self.asked: list[Header] = []
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self.port = int(self._router.bind_to_random_port("tcp://127.0.0.1", 32000, 32999))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="fake-metad")

    def __enter__(self) -> FakeMetad:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._router.close(0)
        self._context.term()

    def ops(self) -> list[str]:
        return [str(request["op"]) for request in self.asked]

    def last(self, op: str) -> Header:
        """The fields of the last request of that kind, without the wire's own."""
        request = next(r for r in reversed(self.asked) if r["op"] == op)
        return {k: v for k, v in request.items() if k not in ("v", "op", "id", "timeout")}

    def _serve(self) -> None:
        while not self._stop.is_set():
            if not self._router.poll(20):
                continue
            *envelope, frame = self._router.recv_multipart()
            request = messages.unpack(frame)
            self.asked.append(request)
            answer = self.answers.get(str(request["op"]))
            reply = answer(request) if callable(answer) else answer
            if reply is None:
                continue
            if "raw" in reply:
                self._router.send_multipart([*envelope, reply["raw"]])
            else:
                self._router.send_multipart([*envelope, messages.pack({**reply, "re": request["id"]})])
