"""The metadata model: changes, snapshots and mirrors lead to one state."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ukai.errors import LocalProtocolError, NotFound, UsageError
from ukai.mirror import Mirror
from ukai.model import (
    IN_SYNC,
    OUT_OF_SYNC,
    REMOVED,
    SYNCING,
    Change,
    Cluster,
    Image,
    Replica,
    check_name,
    check_sizes,
    parse_size,
    round_up,
    written,
)
from ukai.ranges import RangeSet

NODES = ("192.0.2.1", "192.0.2.2", "192.0.2.3")
UUIDS = ("u1", "u2", "u3")
BLOCKS = 12

spans = st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, BLOCKS - 1)).map(sorted)
states = st.sampled_from([IN_SYNC, SYNCING, OUT_OF_SYNC, REMOVED])


class Mirrors(RuleBasedStateMachine):
    """metad's cluster, a mirror that hears every change, and one that loses some and asks again."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster(cluster_id="c")
        self.log: list[list[Any]] = []
        self.near, self.far = Mirror(), Mirror()
        for mirror in (self.near, self.far):
            mirror.take_reply(self.reply(-1))

    def reply(self, since: int) -> dict[str, Any]:
        """What metad answers: changes, or a snapshot."""
        fields = {"seq": self.cluster.seq, "inc": "i", "cluster_id": "c"}
        found = {"changes": self.log[since:]} if since >= 0 else {"snapshot": self.cluster.snapshot()}
        return self.wire(fields | found)

    @staticmethod
    def wire(message: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = msgpack.unpackb(msgpack.packb(message))
        return found

    def change(self, change: Change, heard: bool) -> None:
        self.cluster.apply(change)
        entry = [self.cluster.seq, 1.0, "test", change]
        self.log.append(entry)
        message = self.wire({"op": "changes", "cluster_id": "c", "inc": "i", "changes": [entry]})
        assert self.near.take_published(message)
        if heard and not self.far.take_published(message):
            self.far.take_reply(self.reply(self.far.seq))

    @rule(uuid=st.sampled_from(UUIDS), online=st.booleans(), heard=st.booleans())
    def image(self, uuid: str, online: bool, heard: bool) -> None:
        shape = {"uuid": uuid, "name": f"n{uuid}", "size": BLOCKS * 4096, "block_size": 4096}
        self.change({"t": "image", **shape, "online": online}, heard)

    @rule(uuid=st.sampled_from(UUIDS), node=st.sampled_from(NODES), span=spans, status=states,
          generation=st.integers(0, 3), heard=st.booleans())  # fmt: skip
    def replicas(self, uuid: str, node: str, span: list[int], status: int, generation: int, heard: bool) -> None:
        if uuid in self.cluster.images:
            row = [*span, status, generation, "why" if status == OUT_OF_SYNC else ""]
            self.change({"t": "replicas", "uuid": uuid, "node": node, "ranges": [row]}, heard)

    @rule(uuid=st.sampled_from(UUIDS), span=spans, kind=st.sampled_from(["add", "del"]), heard=st.booleans())
    def active(self, uuid: str, span: list[int], kind: str, heard: bool) -> None:
        if uuid in self.cluster.images:
            self.change({"t": "active", "uuid": uuid, kind: [span]}, heard)

    @rule(uuid=st.sampled_from(UUIDS), heard=st.booleans())
    def drop(self, uuid: str, heard: bool) -> None:
        if uuid in self.cluster.images:
            self.change({"t": "image-drop", "uuid": uuid}, heard)

    @rule(node=st.sampled_from(NODES), serial=st.integers(0, 9), heard=st.booleans())
    def node(self, node: str, serial: int, heard: bool) -> None:
        self.change({"t": "node", "address": node, "serial": serial}, heard)

    @rule(uuid=st.sampled_from(UUIDS), number=st.integers(0, 9), heard=st.booleans())
    def job(self, uuid: str, number: int, heard: bool) -> None:
        self.change({"t": "job", "uuid": uuid, "number": number, "ranges": [[0, 1]]}, heard)

    @rule(by_snapshot=st.booleans())
    def ask_again(self, by_snapshot: bool) -> None:
        self.far.take_reply(self.reply(-1 if by_snapshot else self.far.seq))

    @rule()
    def hear_something_old(self) -> None:
        if self.log:
            message = {"op": "changes", "cluster_id": "c", "inc": "i", "changes": self.log[:2]}
            before = self.near.cluster.snapshot()
            assert self.near.take_published(self.wire(message))
            assert self.near.cluster.snapshot() == before

    @invariant()
    def mirrors_are_equal(self) -> None:
        assert self.near.cluster.snapshot() == self.cluster.snapshot()
        assert self.far.seq <= self.cluster.seq
        past = Cluster(cluster_id="c")
        for _, _, _, change in self.log[: self.far.seq]:
            past.apply(change)
        assert self.far.cluster.snapshot() == past.snapshot()

    @invariant()
    def what_was_before_belongs_to_active_blocks(self) -> None:
        for image in self.cluster.images.values():
            for node, earlier in image.before.items():
                for first, last, _ in earlier:
                    assert RangeSet([(first, last)]).gaps(first, last) == []
                    assert not image.active.gaps(first, last)
                    assert not image.locations[node].gaps(first, last)

    @invariant()
    def segments_are_the_blocks(self) -> None:
        for image in self.cluster.images.values():
            found = list(image.segments())
            assert [i for a, b, _ in found for i in range(a, b + 1)] == list(range(BLOCKS))
            for a, b, state in found:
                for index in range(a, b + 1):
                    assert state == image.replicas(index)


TestMirrors = Mirrors.TestCase
TestMirrors.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def made(**places: list[list[Any]]) -> Image:
    image = Image("u", "n", BLOCKS * 4096, 4096)
    for name, rows in places.items():
        image.set_replicas(name, rows)
    return image


@given(st.lists(st.tuples(st.sampled_from("ab"), spans, states, st.integers(0, 2)), max_size=12), spans)
def test_segments_of_a_part_are_the_longest(rows: list[tuple[str, list[int], int, int]], span: list[int]) -> None:
    image = made()
    for node, (first, last), status, generation in rows:
        image.set_replicas(node, [[first, last, status, generation, ""]])
    found = list(image.segments(*span))
    assert (found[0][0], found[-1][1]) == tuple(span)
    for (_, b, state), (c, _, other) in zip(found, found[1:], strict=False):
        assert b + 1 == c
        assert state != other


def test_the_generation_required_is_the_one_from_before_the_block_was_active() -> None:
    image = made(a=[[0, 11, IN_SYNC, 5, ""]], b=[[0, 11, IN_SYNC, 5, ""]])
    image.activate(2, 4)
    image.set_replicas("a", [[2, 4, IN_SYNC, 9, ""]])
    assert (image.required("a", 2), image.required("a", 1), image.required("c", 1)) == (5, 5, 0)
    image.activate(2, 6)
    image.set_replicas("a", [[2, 6, IN_SYNC, 12, ""]])
    assert image.required("a", 2) == 5, "the oldest that a crash may leave"
    image.retire(2, 3)
    assert (image.required("a", 2), image.required("a", 4)) == (12, 5)
    image.set_replicas("a", [[0, 11, REMOVED, 0, ""]])
    assert "a" not in image.before


def test_written() -> None:
    assert not written({"a": Replica(IN_SYNC, 0, ""), "b": Replica(OUT_OF_SYNC, 0, "new")})
    assert written({"a": Replica(IN_SYNC, 0, ""), "b": Replica(OUT_OF_SYNC, 3, "old")})


def test_an_image_may_change_its_name() -> None:
    cluster = Cluster()
    cluster.apply({"t": "image", "uuid": "u", "name": "old", "size": 4096, "block_size": 4096})
    cluster.apply({"t": "image", "uuid": "u", "name": "new"})
    assert cluster.by_name("new").uuid == "u"
    with pytest.raises(NotFound, match="image old is not known"):
        cluster.by_name("old")


def test_unknown_kinds_and_fields() -> None:
    cluster = Cluster()
    with pytest.raises(LocalProtocolError, match="'flood'"):
        cluster.apply({"t": "flood"})
    assert cluster.seq == 0
    cluster.apply({"t": "image", "uuid": "u", "name": "n", "of_a_later_release": 1})
    assert cluster.seq == 1


def test_the_last_block_may_be_shorter() -> None:
    image = Image("u", "n", 120_000_000, 50_000_000)
    assert [image.block_bytes(i) for i in range(image.block_count)] == [50_000_000, 50_000_000, 20_000_000]


@pytest.mark.parametrize(
    ("text", "size"),
    [("8000000000", 8 * 10**9), ("8G", 8 * 2**30), ("8GiB", 8 * 2**30), ("8GB", 8 * 10**9), ("1.5k", 1536), ("0", 0)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1e3", "8 X", "8GG", "xG"])
def test_texts_that_are_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


@given(st.integers(0, 2**62))
def test_rounding_up(size: int) -> None:
    assert size <= round_up(size) < size + 4096
    assert round_up(size) % 4096 == 0


@pytest.mark.parametrize("name", ["a", "image01", "0.x_-", "x" * 100])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".a", "-a", "a/b", "a b", "x" * 101, "a\n", "ä"])
def test_texts_that_are_no_names(name: str) -> None:
    with pytest.raises(UsageError, match="is no image name"):
        check_name(name)


@pytest.mark.parametrize(("size", "block"), [(0, 4096), (2**63, 4096), (8192, 1), (8192, 16384), (2**60, 4096)])
def test_sizes_that_are_refused(size: int, block: int) -> None:
    with pytest.raises(UsageError):
        check_sizes(size, block)
