"""Images made, added, moved and removed; every refusal leaves no trace."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.metad.desk import A, B, C, Desk, at_desk
from ukai.errors import (
    Busy,
    Exists,
    LastCopy,
    NotFound,
    Refused,
    StaleHandle,
    Timeout,
    UkaiError,
    Unreachable,
    UsageError,
)
from ukai.messages import Header
from ukai.metad import adoption
from ukai.model import OUT_OF_SYNC
from ukai.ranges import RangeMap, RangeSet

GiB = 2**30


async def three(desk: Desk) -> None:
    for node in (A, B, C):
        await desk.register(node)


def test_create_asks_all_nodes_and_commits_once() -> None:
    async def scene(desk: Desk) -> None:
        await three(desk)
        reply = await desk.do("image.create", name="disk", size=100 * GiB + 1, block_size=0, locations=[A, B])
        image = reply["image"]
        assert (image["size"], image["block_size"], image["blocks"]) == (100 * GiB + 4096, 64 * 2**20, 1601)
        assert image["hypervisors"] == [A, B]
        assert image["health"] == "ok"
        assert "rounded up" in reply["notes"][0]
        assert desk.called("prepare") == [A, B]
        shown = (await desk.do("image.show", name="disk"))["image"]
        assert [(p["first"], p["last"]) for p in shown["placement"]] == [(0, 1600)]
        assert shown["placement"][0]["replicas"][A] == {
            "status": 0, "status_name": "in-sync", "generation": 0, "reason": "",
        }  # fmt: skip

    at_desk(scene)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"name": "-x"}, UsageError, "no image name"),
        ({"name": "a/b"}, UsageError, "no image name"),
        ({"size": 0}, UsageError, "size of 0 bytes"),
        ({"size": 2**63}, UsageError, "not possible"),
        ({"size": "8G"}, UsageError, "number of bytes"),
        ({"size": -5}, UsageError, "-5 bytes"),
        ({"block_size": 1}, UsageError, "block size of 1 bytes"),
        ({"block_size": 16384}, UsageError, "block size of 16384 bytes"),
        ({"size": 2**60, "block_size": 4096}, UsageError, "more than"),
        ({"locations": []}, UsageError, "at least one location"),
        ({"locations": ["192.0.2.77"]}, NotFound, r"192.0.2.77 has never registered; known nodes: 192.0.2.1, 192"),
        ({"locations": [A, A]}, UsageError, "twice"),
        ({"hypervisors": ["192.0.2.77"]}, NotFound, "never registered"),
        ({"replication": "none"}, UsageError, "replication"),
    ],
)
def test_creates_that_are_refused(fields: dict[str, Any], error: type[UkaiError], message: str) -> None:
    async def scene(desk: Desk) -> None:
        await three(desk)
        seq = desk.core.cluster.seq
        with pytest.raises(error, match=message) as caught:
            await desk.do("image.create", **{"name": "disk", "size": 8192, "locations": [A]} | fields)
        assert "\n" not in caught.value.message
        assert desk.core.cluster.seq == seq
        assert desk.called("prepare") == []

    at_desk(scene)


def test_a_create_that_fails_on_one_node_is_undone_on_all() -> None:
    async def scene(desk: Desk) -> None:
        await three(desk)
        desk.answers[B, "prepare"] = Exists("data of an image disk are there")
        desk.answers[C, "prepare"] = Timeout("no answer")
        seq = desk.core.cluster.seq
        with pytest.raises(Exists):
            await desk.do("image.create", name="disk", size=8192, locations=[A, B, C])
        assert sorted(desk.called("drop")) == [A, C], "one that did not answer may have done it; B refused and did not"
        assert desk.core.cluster.seq == seq
        desk.answers.clear()
        await desk.do("image.create", name="disk", size=8192, locations=[A, B, C])

    at_desk(scene)


def test_two_creates_at_once_and_one_over_another() -> None:
    async def scene(desk: Desk) -> None:
        await three(desk)
        wish: Header = {"name": "disk", "size": 8192, "locations": [A]}
        results = await asyncio.gather(
            desk.do("image.create", **wish), desk.do("image.create", **wish), return_exceptions=True
        )
        assert [type(r) for r in results] == [dict, Exists]
        with pytest.raises(Exists, match="exists"):
            await desk.do("image.create", **wish)

    at_desk(scene)


def test_a_location_on_a_node_that_is_down() -> None:
    async def scene(desk: Desk) -> None:
        await three(desk)
        await desk.do("image.create", name="disk", size=8192, locations=[A])
        desk.skew += 5
        await desk.beat(A)
        seq = desk.core.cluster.seq
        with pytest.raises(Unreachable, match=f"node {B} can't be reached"):
            await desk.do("location.add", name="disk", node=B)
        with pytest.raises(Unreachable):
            await desk.do("image.create", name="other", size=8192, locations=[A, B])
        assert desk.core.cluster.seq == seq

    at_desk(scene)


def test_locations_come_out_of_sync_and_go_but_for_the_last_copy() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, blocks=10)
        await desk.register(B)
        reply = await desk.do("location.add", name="disk", node=B, ranges=[[2, 5]])
        assert reply["image"]["locations"][B] == {"in_sync": 0, "syncing": 0, "out_of_sync": 4}
        assert reply["image"]["health"] == "degraded"
        assert desk.reasons(image, B) == {"new location"}
        with pytest.raises(Exists):
            await desk.do("location.add", name="disk", node=B, ranges=[[3, 4]])
        await desk.do("location.add", name="disk", node=B)
        assert desk.statuses(image, B) == [OUT_OF_SYNC] * 10
        await desk.own(A, image)
        await desk.coordinate(A, "sync.begin", image, target=B, ranges=[[0, 6]])
        with pytest.raises(LastCopy, match="last in-sync copy of blocks 7-9") as caught:
            await desk.do("location.remove", name="disk", node=A)
        assert caught.value.details == {"ranges": [[7, 9]]}
        reply = await desk.do("location.remove", name="disk", node=A, ranges=[[0, 3]])
        assert reply["notes"] == []
        assert desk.calls[-1][1:] == ("drop", {"uuid": image.uuid, "name": "disk", "ranges": [[0, 3]]})
        await desk.coordinate(A, "sync.begin", image, target=B, ranges=[[0, 9]])
        desk.answers[A, "drop"] = Timeout("no answer")
        reply = await desk.do("location.remove", name="disk", node=A)
        assert "were not deleted" in reply["notes"][0]
        assert list(desk.core.image(image.uuid).locations) == [B]
        assert desk.core.image(image.uuid).writer == A
        with pytest.raises(NotFound):
            await desk.do("location.remove", name="disk", node=A)
        with pytest.raises(UsageError, match="block 10 does not exist"):
            await desk.do("location.remove", name="disk", node=B, ranges=[[4, 10]])

    at_desk(scene)


def test_kept_data_are_not_dropped() -> None:
    async def scene(desk: Desk) -> None:
        await desk.image(A, B)
        reply = await desk.do("location.remove", name="disk", node=B, keep_data=True)
        assert "were kept" in reply["notes"][0]
        assert desk.called("drop") == []

    at_desk(scene)


def test_offline_is_refused_while_open_and_the_others_may_open_again() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        desk.answers[B, "close"] = Busy("open")
        with pytest.raises(Busy, match=f"open on {B}"):
            await desk.do("image.offline", name="disk")
        assert desk.core.image(image.uuid).online
        asked = [(n, f.get("reopen", False)) for n, op, f in desk.calls if op == "close"]
        assert (A, True) in asked
        desk.answers.clear()
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[0, 1]])
        desk.answers[A, "release"] = {"handles": 0, "clean": True}
        reply = await desk.do("image.offline", name="disk")
        assert reply["image"]["health"] == "offline"
        image = desk.core.image(image.uuid)
        assert (image.online, image.writer, len(image.active)) == (False, "", 0)
        assert (await desk.do("image.offline", name="disk"))["notes"]
        reply = await desk.do("image.add", name="disk")
        assert reply["image"]["online"]
        with pytest.raises(Exists, match="online already"):
            await desk.do("image.add", name="disk")

    at_desk(scene)


def test_offline_with_a_writer_out_of_reach_needs_force() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[0, 1]])
        desk.answers[A, "release"] = Timeout("no answer")
        with pytest.raises(Unreachable, match="--force"):
            await desk.do("image.offline", name="disk")
        assert desk.core.image(image.uuid).online
        reply = await desk.do("image.offline", name="disk", force=True)
        assert any("did not release" in n for n in reply["notes"])
        image = desk.core.image(image.uuid)
        assert (image.online, image.writer, list(image.active)) == (False, "", [(0, 1)])

    at_desk(scene)


def test_remove_forgets_and_tells_what_it_could_not_delete() -> None:
    async def scene(desk: Desk) -> None:
        await desk.image(A, B)
        assert (await desk.do("image.remove", name="disk"))["notes"] == []
        assert "disk" in desk.core.cluster.names, "without delete_data it only goes offline"
        desk.answers[B, "drop"] = Timeout("no answer")
        notes = (await desk.do("image.remove", name="disk", delete_data=True))["notes"]
        assert len(notes) == 1
        assert B in notes[0]
        assert not desk.core.cluster.images
        with pytest.raises(NotFound, match="image list"):
            await desk.do("image.show", name="disk")

    at_desk(scene)


def test_hypervisors() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A)
        await desk.register(B)
        reply = await desk.do("hypervisor.add", name="disk", node=B)
        assert reply["image"]["hypervisors"] == [A, B]
        with pytest.raises(Exists):
            await desk.do("hypervisor.add", name="disk", node=B)
        await desk.own(B, image)
        desk.answers[B, "close"] = Busy("open")
        with pytest.raises(Busy):
            await desk.do("hypervisor.remove", name="disk", node=B)
        desk.answers.clear()
        await desk.do("hypervisor.remove", name="disk", node=B)
        assert desk.core.image(image.uuid).writer == ""
        with pytest.raises(NotFound):
            await desk.do("hypervisor.remove", name="disk", node=B)
        with pytest.raises(Refused, match="only hypervisor"):
            await desk.do("hypervisor.remove", name="disk", node=A)

    at_desk(scene)


def test_migrate_moves_the_role() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        desk.answers[A, "release"] = {"handles": 1, "clean": True}

        async def acquire(fields: Header) -> Header:
            assert fields["purpose"] == "io"
            await desk.own(B, image)
            return {}

        desk.answers[B, "acquire"] = acquire
        reply = await desk.do("migrate", name="disk", node=B)
        assert reply["image"]["writer"] == B
        assert desk.core.image(image.uuid).lost == {A: 2}
        await desk.register(C)
        with pytest.raises(Refused, match="no hypervisor"):
            await desk.do("migrate", name="disk", node=C)

    at_desk(scene)


def test_migrate_from_a_silent_writer_wants_force() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)

        async def acquire(fields: Header) -> Header:
            await desk.own(B, image)
            return {}

        desk.answers[B, "acquire"] = acquire
        desk.skew += desk.core.config.lease + 10
        await desk.beat(B)
        with pytest.raises(Refused, match=f"the writer {A} .* can't be asked to finish.* --force"):
            await desk.do("migrate", name="disk", node=B)
        assert image.writer == A
        reply = await desk.do("migrate", name="disk", node=B, force=True)
        assert reply["image"]["writer"] == B
        assert desk.core.image(image.uuid).lost == {A: 2}

    at_desk(scene)


# --- metadata made by hand


def hand_made(**fields: Any) -> bytes:
    """Two blocks of 50,000,000 bytes and a shorter one, on A and B."""
    both = {A: {"sync_status": 0}, B: {"sync_status": 0}}
    found = {
        "name": "image01", "size": 120_000_000, "block_size": 50_000_000, "hypervisors": [A],
        "blocks": [both, both, both], "more": "keys may follow",
    }  # fmt: skip
    return json.dumps({k: v for k, v in (found | fields).items() if v is not None}).encode()


GOOD = {A: {"sync_status": 0}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "line 1 column 1"),
        (b"\xff\xfe", "UTF-8|JSON"),
        (hand_made()[:-9], "is the file complete"),
        (b"[" * 100_000, "JSON"),
        (b"[]", "not a JSON object"),
        (b"7" * 5000, "out of all bounds"),
        (hand_made(blocks=None), "blocks is missing"),
        (hand_made(name="image02"), "named 'image02'"),
        (hand_made(size="8G"), "size: a whole number"),
        (hand_made(size=0, blocks=[]), "size of 0"),
        (hand_made(size=True), "size: a whole number"),
        (hand_made(block_size=200_000_000), "block size of 200000000"),
        (hand_made(blocks=[GOOD, GOOD]), "2 blocks are listed, 3 are wanted"),
        (hand_made(blocks={}), "0 blocks are listed"),
        (hand_made(hypervisors=[]), "hypervisors"),
        (hand_made(hypervisors=["node1"]), "not an IPv4 address"),
        (hand_made(hypervisors=[A, A]), "twice"),
        (hand_made(blocks=[GOOD, 7, GOOD]), "block 1: an object"),
        (hand_made(blocks=[GOOD, {"host": {"sync_status": 0}}, GOOD]), "'host' is not an IPv4 address"),
        (hand_made(blocks=[GOOD, {A: {"sync_status": 3}}, GOOD]), "must be 0, 1 or 2, not 3"),
        (hand_made(blocks=[GOOD, {A: {"sync_status": True}}, GOOD]), "must be 0, 1 or 2, not True"),
        (hand_made(blocks=[GOOD, {A: {}}, GOOD]), "not None"),
        (hand_made(blocks=[GOOD, {}, GOOD]), "block 1 has no in-sync location"),
        (hand_made(blocks=[GOOD, {A: {"sync_status": 1}}, GOOD]), "block 1 has no in-sync location"),
        (hand_made().replace(f'"{B}"'.encode(), f'"{A}"'.encode(), 1), "is there twice"),
    ],
)
def test_hand_made_metadata_that_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        adoption.read(data, "image01")
    assert caught.value.message.startswith("metadata of image image01: ")
    assert "\n" not in caught.value.message


def test_hand_made_files_are_adopted_as_they_are() -> None:
    async def scene(desk: Desk) -> None:
        await three(desk)
        out = {A: {"sync_status": 0}, B: {"sync_status": 2}}
        both = {A: {"sync_status": 0}, B: {"sync_status": 0}}
        desk.files["image01"] = hand_made(blocks=[both, out, both])
        desk.answers[A, "prepare"] = {"present": [[0, 1]], "bad": []}
        desk.answers[B, "prepare"] = {"present": [[1, 1]], "bad": []}
        reply = await desk.do("image.add", name="image01")
        image = desk.core.cluster.by_name("image01")
        generation = image.replica(A, 0).generation  # type: ignore[union-attr]
        assert generation > 0
        assert [tuple(r) for r in image.locations[A]] == [(0, 1, (0, generation, "")), (2, 2, (0, 0, ""))]
        assert desk.statuses(image, B) == [2, 2, 0]
        assert {"no block file", "out-of-sync in the metadata that was added", ""} == desk.reasons(image, B)
        adopted = [(n, f) for n, op, f in desk.calls if op == "adopted"]
        assert adopted == [(A, {"uuid": image.uuid, "ranges": [[0, 1]], "generation": generation})]
        assert any("no multiple of 4096" in n for n in reply["notes"])
        assert any(B in n and "no block file" in n for n in reply["notes"])

    at_desk(scene)


@pytest.mark.parametrize(
    ("replies", "blocks", "message"),
    [
        ({A: {"bad": [[1, 1, "7 bytes"]]}}, [GOOD, GOOD, GOOD], "block 1: the only in-sync copy is on .*: 7 bytes"),
        (
            {B: {"present": [[0, 0]]}},
            [{A: {"sync_status": 0}, B: {"sync_status": 2}}, GOOD, GOOD],
            "has a block file but is said to be out-of-sync",
        ),
        ({A: {"present": [[0, 3]]}}, [GOOD, GOOD, GOOD], "out of bounds"),
        ({A: {"bad": 7}}, [GOOD, GOOD, GOOD], "field bad"),
        ({A: Exists("data of another image")}, [GOOD, GOOD, GOOD], "data of another image"),
    ],
)
def test_adoptions_that_are_refused_leave_no_trace(replies: dict[str, Any], blocks: list[Any], message: str) -> None:
    async def scene(desk: Desk) -> None:
        await three(desk)
        desk.files["image01"] = hand_made(blocks=blocks)
        for node, reply in replies.items():
            desk.answers[node, "prepare"] = reply
        seq = desk.core.cluster.seq
        with pytest.raises(UkaiError, match=message):
            await desk.do("image.add", name="image01")
        assert desk.core.cluster.seq == seq
        prepared = [n for n, op, f in desk.calls if op == "prepare" and f["mode"] == "adopt"]
        forgotten = [n for n, op, f in desk.calls if op == "prepare" and f["mode"] == "forget"]
        assert forgotten == [n for n in prepared if not isinstance(replies.get(n), Exists)]
        with pytest.raises(NotFound):
            await desk.do("image.show", name="image01")

    at_desk(scene)


def test_a_wrong_file_beside_a_good_one_is_out_of_sync() -> None:
    read = adoption.read(hand_made(), "image01")
    rows = adoption.combine(read, {A: RangeSet([(0, 2)]), B: RangeSet([(0, 2)])}, {B: RangeMap([(1, 1, "7 bytes")])}, 9)
    assert rows == {
        A: [[0, 2, 0, 9, ""]],
        B: [[0, 0, 0, 9, ""], [1, 1, 2, 0, "7 bytes"], [2, 2, 0, 9, ""]],
    }


def test_sync_start_with_nothing_to_do_is_done() -> None:
    async def scene(desk: Desk) -> None:
        await desk.image(A, B)
        job = (await desk.do("sync.start", name="disk"))["job"]
        assert (job["state"], job["reason"]) == ("done", "nothing was out-of-sync")
        with pytest.raises(NotFound, match="no location"):
            await desk.do("sync.start", name="disk", nodes=[C])
        with pytest.raises(UsageError, match="rate"):
            await desk.do("sync.start", name="disk", rate=-2)

    at_desk(scene)


def test_sync_stop_and_rate() -> None:
    async def scene(desk: Desk) -> None:
        await desk.image(A)
        await desk.register(B)
        await desk.do("location.add", name="disk", node=B)
        with pytest.raises(NotFound, match="no resync"):
            await desk.do("sync.stop", name="disk")
        await desk.do("sync.start", name="disk")
        assert (await desk.do("sync.rate", name="disk", rate=1000))["job"]["state"] == "waiting"
        assert desk.core.cluster.jobs[desk.core.cluster.names["disk"]].rate == 1000
        assert (await desk.do("sync.stop", name="disk"))["job"]["state"] == "stopped"
        assert (await desk.do("sync.start", name="disk"))["job"]["number"] > 1

    at_desk(scene)


def test_a_timeout_that_is_none() -> None:
    async def scene(desk: Desk) -> None:
        await desk.image(A)
        for value in (0, -1, "x", True):
            with pytest.raises(UsageError, match="timeout"):
                await desk.do("image.remove", name="disk", timeout=value)

    at_desk(scene)


def test_checksums_are_asked_of_every_location() -> None:
    async def scene(desk: Desk) -> None:
        for node in (A, B, C):
            await desk.register(node)
        fields = {"size": 8192, "block_size": 4096, "locations": [A, B], "hypervisors": []}
        reply = await desk.do("image.create", name="disk", checksum=True, **fields)
        assert reply["image"]["checksum"] is True
        await desk.do("location.add", name="disk", node=C)
        asked = {node: fields["checksum"] for node, op, fields in desk.calls if op == "prepare"}
        assert asked == {A: True, B: True, C: True}

    at_desk(scene)


def test_back_to_sync_only_with_everything_flushed() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        assert (await desk.do("image.set", name="disk", replication="flush"))["image"]["replication"] == "flush"
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[3, 4]])
        desk.answers[A, "release"] = {"handles": 1, "clean": False}
        with pytest.raises(Unreachable, match="could not flush"):
            await desk.do("image.set", name="disk", replication="sync")
        assert desk.core.image(image.uuid).replication == "flush"
        desk.answers[A, "release"] = {"handles": 1, "clean": True}
        await desk.do("image.set", name="disk", replication="sync")
        image = desk.core.image(image.uuid)
        assert (image.replication, image.writer, image.former, list(image.active)) == ("sync", "", A, [])
        await desk.own(A, image, opened_epoch=1)
        with pytest.raises(UsageError, match="choose sync or flush"):
            await desk.do("image.set", name="disk", replication="never")

    at_desk(scene)


def test_not_back_to_sync_while_blocks_wait_for_their_comparison() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.do("image.set", name="disk", replication="flush")
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[3, 4]])
        await desk.register(A, "A-2")
        with pytest.raises(Busy, match="when it is opened"):
            await desk.do("image.set", name="disk", replication="sync")

    at_desk(scene)


def test_a_writer_that_was_taken_offline_by_force_does_not_write_after_another() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        desk.answers[A, "close"] = Unreachable("cut")
        desk.answers[A, "release"] = Unreachable("cut")
        await desk.do("image.offline", name="disk", force=True)
        await desk.do("image.add", name="disk")
        await desk.own(B, image, fenced=[B])
        with pytest.raises(StaleHandle):
            await desk.grant(A, image, opened_epoch=1)

    at_desk(scene)
