"""The copy of the metadata: in step, never behind what it has seen (R12), never half changed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ukai.errors import Behind, RemoteProtocolError, UkaiError
from ukai.messages import Header, pack, unpack
from ukai.mirror import Mirror
from ukai.model import Cluster

UUID = "u1"


class Metad:
    """The metadata itself, as a process of metad would send them; ``restarted`` and ``restored`` make another one."""

    def __init__(self, cluster_id: str = "c", inc: str = "m1") -> None:
        self.cluster, self.inc = Cluster(cluster_id=cluster_id), inc
        self.entries: list[list[Any]] = []

    def change(self, **fields: object) -> list[Any]:
        change = {"t": "node", "address": f"192.0.2.{self.cluster.seq % 200 + 1}", **fields}
        self.cluster.apply(change)
        self.entries.append([self.cluster.seq, 0.5, "test", change])
        return self.entries[-1]

    def grow(self, count: int) -> Metad:
        for _ in range(count):
            self.change()
        return self

    def restarted(self, inc: str) -> Metad:
        other = Metad(self.cluster.cluster_id, inc)
        other.entries = list(self.entries)
        for _, _, _, change in self.entries:
            other.cluster.apply(change)
        return other

    def restored(self, inc: str, seq: int) -> Metad:
        other = Metad(self.cluster.cluster_id, inc)
        other.entries = self.entries[:seq]
        for _, _, _, change in other.entries:
            other.cluster.apply(change)
        return other

    def _wire(self, fields: Header) -> Header:
        return unpack(pack({**fields, "inc": self.inc, "cluster_id": self.cluster.cluster_id}))

    def snapshot(self) -> Header:
        return self._wire({"seq": self.cluster.seq, "snapshot": self.cluster.snapshot()})

    def since(self, seq: int) -> Header:
        return self._wire({"seq": self.cluster.seq, "changes": self.entries[seq:]})

    def published(self, first: int, last: int) -> Header:
        return self._wire({"op": "changes", "changes": self.entries[first - 1 : last]})

    def beat(self) -> Header:
        return self._wire({"op": "beat", "seq": self.cluster.seq})


def loaded(metad: Metad, **kwargs: Any) -> Mirror:
    mirror = Mirror(**kwargs)
    mirror.take_reply(metad.snapshot())
    return mirror


def same(mirror: Mirror, metad: Metad) -> bool:
    return mirror.seq == metad.cluster.seq and mirror.cluster.snapshot() == metad.cluster.snapshot()


def test_nothing_counts_before_the_first_snapshot() -> None:
    metad = Metad().grow(3)
    mirror = Mirror()
    assert mirror.seq == -1
    assert not mirror.take_published(metad.published(1, 3))
    assert not mirror.take_published(metad.beat())
    mirror.take_reply(metad.since(0))
    assert mirror.seq == -1
    mirror.take_reply(metad.snapshot())
    assert same(mirror, metad)


def test_it_follows_what_is_published_and_drops_what_it_has() -> None:
    metad = Metad().grow(3)
    mirror = loaded(metad)
    heard: list[object] = []
    mirror.on_change.append(heard.append)
    metad.grow(4)
    assert mirror.take_published(metad.published(2, 5))
    assert mirror.take_published(metad.published(2, 5))
    assert mirror.take_published(metad.published(6, 7))
    assert same(mirror, metad)
    assert heard == [e[3] for e in metad.entries[3:]]
    assert mirror.take_published(metad.beat())


def test_a_gap_is_found_and_filled_by_a_reply() -> None:
    metad = Metad().grow(3)
    mirror = loaded(metad)
    metad.grow(4)
    assert not mirror.take_published(metad.published(5, 7))
    assert mirror.seq == 3
    assert not mirror.take_published(metad.beat())
    mirror.take_reply(metad.since(3))
    assert same(mirror, metad)
    assert mirror.take_published(metad.published(5, 7))


def test_a_beat_that_a_reply_has_overtaken_asks_for_nothing() -> None:
    metad = Metad().grow(3)
    beat = metad.beat()
    assert loaded(metad.grow(1)).take_published(beat)


def test_a_reply_that_was_overtaken_is_neither_news_nor_an_older_copy() -> None:
    metad = Metad().grow(5)
    mirror = loaded(metad)
    early, early_snapshot = metad.since(3), metad.snapshot()
    metad.grow(5)
    assert mirror.take_published(metad.published(6, 10))
    mirror.take_reply(early)
    mirror.take_reply(early_snapshot)
    assert same(mirror, metad)


def test_a_new_metad_process_with_the_same_metadata_is_followed() -> None:
    metad = Metad().grow(5)
    mirror = loaded(metad)
    late, late_snapshot = metad.since(4), metad.snapshot()
    again = metad.restarted("m2").grow(1)
    assert not mirror.take_published(again.published(6, 6)), "of a process that is not known yet"
    mirror.take_reply(again.since(5))
    again.grow(1)
    assert mirror.take_published(again.published(7, 7))
    assert not mirror.take_published(metad.beat())
    mirror.take_reply(late)
    mirror.take_reply(late_snapshot)
    assert mirror.inc == "m2"
    assert same(mirror, again)


@pytest.mark.parametrize("how", ["snapshot", "since"])
def test_an_older_copy_of_the_metadata_is_refused(how: str) -> None:
    metad = Metad().grow(10)
    mirror = loaded(metad)
    old = metad.restored("m2", 6)
    reply = old.snapshot() if how == "snapshot" else old.since(6)
    for _ in range(2):
        with pytest.raises(Behind, match="change 6, this node has seen 10"):
            mirror.take_reply(reply)
    assert same(mirror, metad)
    assert mirror.inc == "m1"


def test_what_the_node_has_seen_outlives_the_process() -> None:
    metad = Metad().grow(10)
    old = metad.restored("m2", 9)
    mirror = Mirror(floor=10, cluster_id="c")
    with pytest.raises(Behind):
        mirror.take_reply(old.snapshot())
    assert not mirror.loaded
    mirror.take_reply(old.grow(1).snapshot())
    assert mirror.floor == 10


def test_the_floor_grows_with_all_that_is_seen() -> None:
    metad = Metad().grow(2)
    mirror = loaded(metad)
    assert mirror.floor == 2
    mirror.take_published(metad.grow(1).published(3, 3))
    assert mirror.floor == 3
    mirror.take_reply(metad.grow(4).since(3))
    assert mirror.floor == 7


def test_another_cluster_is_refused() -> None:
    metad, other = Metad().grow(3), Metad("other", "o1").grow(50)
    mirror = loaded(metad)
    with pytest.raises(Behind, match="cluster other"):
        mirror.take_reply(other.snapshot())
    assert not mirror.take_published(other.published(4, 4))
    with pytest.raises(Behind, match="cluster other"):
        Mirror(cluster_id="c").take_reply(other.snapshot())
    assert same(mirror, metad)


def test_a_reset_is_told_and_a_snapshot_of_the_same_state_is_none() -> None:
    metad = Metad().grow(3)
    mirror = Mirror()
    told: list[int] = []
    mirror.on_reset.append(lambda: told.append(mirror.seq))
    mirror.take_reply(metad.snapshot())
    assert told == [3]
    mirror.take_reply({"seq": 3})
    assert told == [3]


def _replace(reply: Header, **fields: object) -> Header:
    return {**reply, **fields}


@pytest.mark.parametrize(
    "changes",
    [
        5,
        "x",
        [5],
        [[4]],
        [["4", 0, "", {}]],
        [[4, 0, "", None]],
        [[4, 0, "", {}]],
        [[4, 0, "", {"t": "no-such-kind"}]],
        [[4, 0, "", {"t": "replicas", "uuid": "none", "node": "n", "ranges": []}]],
        [[4, 0, "", {"t": "image-drop", "uuid": "none"}]],
        [[4, 0, "", {"t": "node"}]],
    ],
)
def test_malformed_changes_are_refused_and_a_snapshot_sets_it_right(changes: object) -> None:
    for published in (False, True):
        metad = Metad().grow(3)
        mirror = loaded(metad)
        take = mirror.take_published if published else mirror.take_reply
        with pytest.raises(RemoteProtocolError):
            take(_replace(metad.published(1, 1) if published else metad.since(3), changes=changes))
        assert mirror.seq == -1, "half a change may have been made"
        assert not mirror.take_published(metad.beat())
        mirror.take_reply(metad.snapshot())
        assert same(mirror, metad)


def test_a_reply_with_a_gap_is_refused_since_a_decision_relies_on_it() -> None:
    metad = Metad().grow(3)
    mirror = loaded(metad)
    metad.grow(3)
    with pytest.raises(RemoteProtocolError, match="join"):
        mirror.take_reply(metad.since(4))
    assert mirror.seq == -1
    mirror.take_reply(metad.snapshot())
    assert same(mirror, metad)


@pytest.mark.parametrize(
    "fields",
    [
        {"seq": None},
        {"seq": "7"},
        {"seq": True},
        {"cluster_id": None},
        {"cluster_id": 5},
        {"inc": None},
        {"inc": 5},
    ],
)
def test_a_reply_that_does_not_say_of_what_it_is_is_refused(fields: Header) -> None:
    metad = Metad().grow(3)
    mirror = loaded(metad)
    with pytest.raises(RemoteProtocolError):
        mirror.take_reply(_replace(metad.grow(1).since(3), **fields))
    assert mirror.seq == 3


@pytest.mark.parametrize("name", ["seq", "cluster_id", "images", "nodes", "jobs"])
@pytest.mark.parametrize("value", [None, "x", [5], {"a": 1}])
def test_a_malformed_snapshot_is_refused_and_the_copy_stays(name: str, value: object) -> None:
    metad = Metad().grow(3)
    mirror = loaded(metad)
    good = metad.grow(2).snapshot()
    bad = _replace(good, snapshot={**good["snapshot"], name: value})
    if value is None:
        del bad["snapshot"][name]
    try:
        mirror.take_reply(bad)
    except UkaiError:
        assert mirror.seq == 3
    else:
        assert mirror.seq == 5
    for nothing in (5, "x", [1]):
        with pytest.raises(RemoteProtocolError):
            mirror.take_reply(_replace(good, snapshot=nothing))
    mirror.take_reply(good)
    assert mirror.seq == 5


steps = st.lists(
    st.tuples(st.sampled_from(["change", "publish", "lose", "reply", "late", "beat", "restart"]), st.integers(0, 5)),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_whatever_is_lost_late_or_twice_one_reply_brings_it_in_step(steps: list[tuple[str, int]]) -> None:
    metad = Metad()
    mirror = loaded(metad)
    kept: list[Header] = []
    restarts = 1
    for what, n in steps:
        before = mirror.seq
        if what == "change":
            metad.grow(n)
        elif what == "publish":
            mirror.take_published(metad.published(max(1, mirror.seq - n), metad.cluster.seq))
        elif what == "lose":
            mirror.take_published(metad.published(mirror.seq + 1 + n, metad.cluster.seq))
        elif what == "reply":
            kept.append(metad.since(mirror.seq))
            mirror.take_reply(kept[-1])
            assert same(mirror, metad)
        elif what == "late" and kept:
            mirror.take_reply(kept[n % len(kept)])
        elif what == "beat":
            assert mirror.take_published(metad.beat()) == (mirror.inc == metad.inc and mirror.seq == metad.cluster.seq)
        elif what == "restart":
            restarts += 1
            metad = metad.restarted(f"m{restarts}")
        assert mirror.seq >= before
        assert mirror.seq <= metad.cluster.seq
    mirror.take_reply(metad.since(mirror.seq))
    assert same(mirror, metad)
