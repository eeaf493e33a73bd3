"""metad with 20 images of 160,000 blocks on two nodes each, asked over its real sockets.

The replicas differ in runs of RUN_BLOCKS, as after a life of scattered writes: a run is one range in memory, one
row in the database, and what the figures grow with.  Blocks that never differed cost nothing.
"""

from __future__ import annotations

import gc
import os
import random
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import zmq

from bench.machines import PeerError
from bench.results import Sample
from tests.cluster import program
from tests.machine import PortRange
from ukai import messages
from ukai.daemon import GC_OBJECTS
from ukai.metad.core import Entry
from ukai.metad.store import Store
from ukai.model import Change, Cluster

IMAGES, BLOCKS = 20, 160_000
RUN_BLOCKS = 16
RUNS = {"in runs of 64": 64, "never written": BLOCKS}
"""Other states of the same images, for the curve."""
METAD, WRITER, OTHER = "127.0.0.1", "127.0.0.1", "127.0.0.2"
BLOCK_BYTES = 50_000_000 // 4096 * 4096
CHANGES = 10_000
WINDOW = 64
"""Requests under way: coordinators ask for many at a time, and metad commits those that wait together."""
ANSWER_S = 30.0
LIMIT_BYTES = 512 * 2**20

Keep = Callable[[Sample], None]


def measure(directory: Path, keep: Keep) -> None:
    """Start, memory, snapshot and changes per second; then how these grow with what there is."""
    directory.mkdir()
    for label, run_blocks in {"": RUN_BLOCKS, **RUNS}.items():
        root = directory / f"run{run_blocks}"
        ranges = build(root, run_blocks)
        with running(root) as (metad, started_s):
            prefix = f"{label}: " if label else ""
            keep(Sample("metad", f"{prefix}ranges", ranges, ""))
            keep(Sample("metad", f"{prefix}start", round(started_s, 2), "s"))
            snapshot(metad, keep, prefix)
            keep(Sample("metad", f"{prefix}memory", metad.peak_mb(), "MB"))
            if not label:
                metad.register()
                changes(metad, keep)


def build(root: Path, run_blocks: int) -> int:
    """Write the database as metad would have; returns the number of ranges of replicas."""
    chance = random.Random(run_blocks)
    store = Store(str(root), 10**6)
    cluster = store.open(lambda: str(uuid.uuid4()))
    ranges = 0
    for number in range(IMAGES):
        made: Change = {"t": "image", "uuid": f"image-{number}", "name": f"image-{number}", "online": True}
        made |= {"size": BLOCKS * BLOCK_BYTES, "block_size": BLOCK_BYTES, "hypervisors": [WRITER, OTHER]}
        rows = _rows(chance, run_blocks)
        batch = [made]
        batch += [{"t": "replicas", "uuid": made["uuid"], "node": n, "ranges": rows} for n in (WRITER, OTHER)]
        _commit(store, cluster, batch)
        ranges += 2 * len(rows)
    store.close()
    return ranges


def _rows(chance: random.Random, run_blocks: int) -> list[list[Any]]:
    """Replicas in sync; neighbours have different generations."""
    if run_blocks == BLOCKS:
        return [[0, BLOCKS - 1, 0, 0, ""]]
    rows: list[list[Any]] = []
    first = 0
    while first < BLOCKS:
        last = min(first + chance.randint(1, 2 * run_blocks - 1), BLOCKS) - 1
        rows.append([first, last, 0, 1 + (len(rows) * 7 + 1) % 50, ""])
        first = last + 1
    return rows


def _commit(store: Store, cluster: Cluster, changes: list[Change]) -> None:
    entries: list[Entry] = []
    for change in changes:
        cluster.apply(change)
        entries.append((cluster.seq, time.time(), "benchmark", change))
    store.commit(entries, cluster)


class Metad:
    """A running metad, and this process as a blockd and a subscriber of it."""

    def __init__(self, process: subprocess.Popen[bytes], first_port: int, context: zmq.Context[Any]) -> None:
        self._process, self._number = process, 0
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.set(zmq.MAXMSGSIZE, LIMIT_BYTES)
        self._socket.connect(f"tcp://{METAD}:{first_port}")
        self.subscriber = context.socket(zmq.SUB)
        self.subscriber.linger = 0
        self.subscriber.set(zmq.RCVHWM, 0)
        self.subscriber.connect(f"tcp://{METAD}:{first_port + 2}")
        self.subscriber.subscribe(b"meta.")
        self.cluster = Cluster()

    def send(self, op: str, **fields: object) -> int:
        """One request; returns its number."""
        self._number += 1
        self._socket.send_multipart([b"", messages.pack({"op": op, "id": self._number, **fields})])
        return self._number

    def receive(self) -> messages.Header | None:
        """The next answer; None when there is none in time.  Raises UkaiError for one that is an error."""
        if (packed := self.receive_packed()) is None:
            return None
        header = messages.unpack(packed, LIMIT_BYTES)
        messages.raise_error(header)
        return header

    def receive_packed(self) -> bytes | None:
        """The next answer as it came."""
        return self._socket.recv_multipart()[1] if self._socket.poll(int(ANSWER_S * 1000)) else None

    def ask(self, op: str, **fields: object) -> messages.Header:
        """One request and its answer.  Raises PeerError, UkaiError."""
        number = self.send(op, **fields)
        while (answer := self.receive()) is not None:
            if answer.get("re") == number:
                return answer
        raise PeerError(f"metad did not answer {op} within {ANSWER_S:g} s")

    def register(self) -> None:
        """As a node that has what it should have; then it becomes the writer of all images."""
        who = {"node": WRITER, "inc": "benchmark"}
        held = [
            {
                "uuid": image.uuid,
                "name": image.name,
                "epoch": 0,
                "bad": [],
                "gens": [[a, b, r.generation] for a, b, r in image.locations[WRITER] if r.generation],
            }
            for image in self.cluster.images.values()
        ]
        store = {"store_id": "store", "boot_id": "boot", "serial": 0, "highest_seq": 0, "cluster_id": ""}
        self.ask("register", **who, **store, n=self._number + 1, images=held)
        for image in self.cluster.images.values():
            wanted = {"image": image.uuid, "opened_epoch": -1, "purpose": "io"}
            granted = self.ask("grant", **who, n=self._number + 1, **wanted)
            epoch = {"image": image.uuid, "epoch": granted["epoch"]}
            self.ask("grant.commit", **who, n=self._number + 1, **epoch, fenced=[WRITER, OTHER])

    def mark(self, number: int) -> None:
        """Send one mark of one block, as a coordinator does after a write that its replica did not take."""
        image = number % IMAGES
        block = number // IMAGES * 2  # not neighbours: these would become one range
        self._number += 1
        fields = {"node": WRITER, "inc": "benchmark", "n": self._number, "image": f"image-{image}", "epoch": 1}
        marks = [[OTHER, block, block, "no answer within 5 s"]]
        request = {"op": "mark", "id": self._number, **fields, "marks": marks}
        self._socket.send_multipart([b"", messages.pack(request)])

    def peak_mb(self) -> float:
        """The most memory it had resident."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("VmHWM:"))

    def busy_s(self) -> float:
        """Its processor time."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        self._socket.close()
        self.subscriber.close()


@contextmanager
def running(root: Path) -> Iterator[tuple[Metad, float]]:
    """Start metad on what is there; gives it and the seconds until it answered."""
    ports = PortRange([METAD], 6)
    env = {k: v for k, v in os.environ.items() if not k.startswith("UKAI_")}
    env |= {"UKAI_CONFIG": str(root / "ukai.toml"), "UKAI_METADATA_ROOT": str(root), "UKAI_RUN_DIR": str(root)}
    env |= {"UKAI_METAD_ADDRESS": METAD, "UKAI_NODE_ADDRESS": METAD, "UKAI_CONTROL_PORT": str(ports.first)}
    names = ("PROXY_PORT", "PUBLISH_PORT", "METAD_EVENTS_PORT", "BLOCKD_EVENTS_PORT", "FRONTEND_EVENTS_PORT")
    env |= {f"UKAI_{name}": str(ports.first + n) for n, name in enumerate(names, 1)}
    (root / "ukai.toml").write_text("# all settings come from the environment\n")
    with (root / "log").open("wb") as out, zmq.Context() as context:
        began = time.monotonic()
        process = subprocess.Popen([program("ukai-metad")], env=env, stdout=out, stderr=out, cwd="/")
        metad = Metad(process, ports.first, context)
        try:
            metad.ask("ping")
            yield metad, time.monotonic() - began
        finally:
            metad.close()
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
            ports.close()


def snapshot(metad: Metad, keep: Keep, prefix: str) -> None:
    """What a new subscriber asks for: the first time, again, and what it costs to take it in, as a daemon does."""
    for row in ("snapshot", "snapshot again"):
        began = time.monotonic()
        metad.send("snapshot", since=-1)
        packed = metad.receive_packed()
        keep(Sample("metad", f"{prefix}{row}", round(time.monotonic() - began, 3), "s"))
    assert packed is not None, f"no snapshot within {ANSWER_S:g} s"
    before = gc.get_threshold()
    gc.set_threshold(GC_OBJECTS)
    began = time.monotonic()
    metad.cluster = Cluster.from_snapshot(messages.unpack(packed, LIMIT_BYTES)["snapshot"])
    keep(Sample("metad", f"{prefix}snapshot taken in", round(time.monotonic() - began, 3), "s"))
    gc.set_threshold(*before)


def changes(metad: Metad, keep: Keep) -> None:
    """Status changes of single blocks, WINDOW under way: committed, answered and published."""
    while metad.subscriber.poll(0):
        metad.subscriber.recv_multipart()
    busy, began = metad.busy_s(), time.monotonic()
    sent, answered, published = 0, 0, 0
    while answered < CHANGES or published < CHANGES:
        while sent < CHANGES and sent - answered < WINDOW:
            metad.mark(sent)
            sent += 1
        if answered < CHANGES:
            if metad.receive() is None:
                raise PeerError(f"metad answered {answered} of {CHANGES} marks and then none")
            answered += 1
        while metad.subscriber.poll(1000 if answered == CHANGES and published < CHANGES else 0):
            header = messages.unpack(metad.subscriber.recv_multipart()[-1], LIMIT_BYTES)
            published += sum(c[3]["t"] == "replicas" for c in header.get("changes", []))
        if time.monotonic() - began > ANSWER_S * 3:
            raise PeerError(f"metad published {published} of {CHANGES} marks")
    took = time.monotonic() - began
    keep(Sample("metad", "changes", round(CHANGES / took, 1), "/s", cores={"metad": (metad.busy_s() - busy) / took}))
