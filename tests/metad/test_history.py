"""The ring of recent changes and the packed snapshot."""

from __future__ import annotations

import random
from typing import Any

import msgpack
import pytest

from tests.metad.test_store import batch, random_change
from ukai import messages
from ukai.metad import history
from ukai.metad.core import Entry
from ukai.metad.history import History, chunks
from ukai.model import Cluster


def node(serial: int, text: str = "") -> dict[str, Any]:
    return {"t": "node", "address": "192.0.2.1", "serial": serial, "store_id": text}


def test_changes_since_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "RING_BYTES", 1000)
    monkeypatch.setattr(history, "CATCH_UP_BYTES", 500)
    cluster = Cluster()
    ring = History(0)
    for serial in range(100):
        ring.extend(batch(cluster, [node(serial)]))
    assert ring.since(100) == []
    assert [msgpack.unpackb(c)[0] for c in ring.since(98) or []] == [99, 100]
    assert ring.since(101) is None, "the asker has seen what we have not"
    assert ring.since(-1) is None
    assert ring.since(90) is None, "a snapshot is less"
    assert ring.since(0) is None, "out of memory"


@pytest.mark.parametrize("seed", range(4))
def test_the_packed_snapshot_is_the_snapshot(seed: int) -> None:
    chance = random.Random(seed)
    cluster = Cluster(cluster_id="c")
    ring = History(0)
    for _ in range(60):
        entries: list[Entry] = []
        for _ in range(3):
            entries += batch(cluster, [random_change(chance, cluster)])
        ring.extend(entries)
        for detail in (True, False):
            packed = msgpack.unpackb(ring.snapshot(cluster, detail))
            assert packed == msgpack.unpackb(msgpack.packb(cluster.snapshot(detail)))
            assert ring.snapshot(cluster, detail) is ring.snapshot(cluster, detail)


def test_published_messages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "PUBLISH_BYTES", 100)
    parts = chunks([b"a" * 60, b"b" * 30, b"c" * 30, b"d" * 101, b"e" * 10])
    assert parts == [[b"a" * 60, b"b" * 30], [b"c" * 30], [b"e" * 10]]
    assert chunks([]) == []


def test_a_header_with_packed_parts_is_a_header() -> None:
    header = history.raw_map({"re": 3}, {"changes": history.raw_array([msgpack.packb([1, 2]), msgpack.packb("x")])})
    assert messages.unpack(header) == {"v": 1, "re": 3, "changes": [[1, 2], "x"]}
