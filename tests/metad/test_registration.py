"""What a node says when it comes, against what it should have (R8, R9, R12)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.metad.desk import A, B, C, Desk, at_desk
from ukai.errors import Behind, NotReady, Refused, RemoteProtocolError, StaleSession
from ukai.model import Image


async def written(desk: Desk, *locations: str, retire: bool = True) -> Image:
    """An image with blocks 0 to 4 written."""
    image = await desk.image(*locations)
    await desk.own(locations[0], image)
    await desk.coordinate(locations[0], "activate", image, ranges=[[0, 4]])
    if retire:
        await desk.coordinate(locations[0], "retire", image, ranges=[[0, 4]])
    return desk.core.image(image.uuid)


def test_a_restart_that_lost_nothing_changes_nothing_but_the_node() -> None:
    async def scene(desk: Desk) -> None:
        image = await written(desk, A, B)
        await desk.register(B, inc="again")
        assert desk.statuses(image, B) == [0] * 10
        kinds = {change["t"] for _, _, cause, change in desk.committed if cause == f"register {B}"}
        assert kinds == {"node"}

    at_desk(scene)


def gens(image: Image, rows: list[list[int]], bad: list[list[Any]] | None = None) -> list[dict[str, Any]]:
    return [{"uuid": image.uuid, "name": image.name, "epoch": 1, "gens": rows, "bad": bad or []}]


@pytest.mark.parametrize(
    ("report", "marked", "reason"),
    [
        ({"images": []}, [0, 1, 2, 3, 4], "no data of this image"),
        ({"images": "older"}, [2, 3, 4], "is below"),
        ({"images": "bad"}, [1], "wrong size"),
        ({"store_id": "another"}, [0, 1, 2, 3, 4], "replaced by another"),
        ({"serial": 0}, [0, 1, 2, 3, 4], "an older copy (registration 0, 1 is known)"),
        ({"highest_seq": 1}, [0, 1, 2, 3, 4], "an older copy (it has seen change 1, "),
    ],
)
def test_what_differs_is_out_of_sync_with_the_reason(report: dict[str, Any], marked: list[int], reason: str) -> None:
    async def scene(desk: Desk) -> None:
        image = await written(desk, A, B)
        await desk.beat(B, saved_seq=desk.core.cluster.seq)
        generation = image.replica(B, 0).generation  # type: ignore[union-attr]
        said = dict(report)
        if said.get("images") == "older":
            said["images"] = gens(image, [[0, 1, generation], [2, 3, generation - 1]])
        elif said.get("images") == "bad":
            said["images"] = gens(image, [[0, 4, generation]], [[1, 1, "wrong size"], [7, 7, "never written"]])
        await desk.register(B, inc="again", **said)
        assert [i for i, s in enumerate(desk.statuses(image, B)) if s == 2] == marked
        assert reason in " ".join(desk.reasons(image, B))
        assert desk.statuses(image, A) == [0] * 10

    at_desk(scene)


def test_the_last_copy_stays_with_the_reason() -> None:
    async def scene(desk: Desk) -> None:
        image = await written(desk, A, B)
        await desk.register(B, inc="again", images=[])
        await desk.register(A, inc="again", images=[])
        assert desk.statuses(image, A) == [0] * 10
        assert "no data of this image on the node" in desk.reasons(image, A)

    at_desk(scene)


def test_a_block_that_was_announced_and_not_yet_written_is_no_older_copy() -> None:
    async def scene(desk: Desk) -> None:
        image = await written(desk, A, B)
        old = image.replica(B, 0).generation  # type: ignore[union-attr]
        await desk.coordinate(A, "activate", image, ranges=[[0, 6]])
        await desk.register(B, inc="again", images=gens(image, [[0, 4, old]]))
        assert desk.statuses(image, B) == [0] * 10
        await desk.register(B, inc="third", images=gens(image, [[0, 3, old], [4, 4, old - 1]]))
        assert [i for i, s in enumerate(desk.statuses(image, B)) if s == 2] == [4]

    at_desk(scene)


def test_a_reboot_makes_active_blocks_suspect() -> None:
    async def scene(desk: Desk) -> None:
        image = await written(desk, A, B)
        await desk.coordinate(A, "activate", image, ranges=[[1, 2]])
        await desk.register(B, inc="again", boot_id="another boot")
        assert [i for i, s in enumerate(desk.statuses(image, B)) if s == 2] == [1, 2]
        assert "node restarted while the block was active" in desk.reasons(image, B)

    at_desk(scene)


def test_a_syncing_replica_on_a_restarted_node_is_interrupted() -> None:
    async def scene(desk: Desk) -> None:
        image = await written(desk, A, B)
        await desk.coordinate(A, "mark", image, marks=[[B, 0, 4, "gone"]])
        await desk.coordinate(A, "sync.begin", image, target=B, ranges=[[0, 4]])
        await desk.register(B, inc="again")
        assert desk.statuses(image, B)[:5] == [2] * 5

    at_desk(scene)


def test_the_same_process_registering_anew_is_no_restart() -> None:
    async def scene(desk: Desk) -> None:
        image = await written(desk, A, B, retire=False)
        await desk.coordinate(A, "mark", image, marks=[[B, 0, 0, "gone"]])
        await desk.coordinate(A, "sync.begin", image, target=B, ranges=[[0, 0]])
        desk.core.sessions.clear()  # metad was restarted
        with pytest.raises(NotReady, match="register"):
            await desk.do("beat", node=A, inc=f"{A}-1")
        for node in (A, B):
            await desk.register(node)
        image = desk.core.image(image.uuid)
        assert (image.writer, list(image.active)) == (A, [(0, 4)])
        assert desk.statuses(image, B)[:5] == [1, 0, 0, 0, 0]

    at_desk(scene)


def test_registration_grows_the_serial_once_the_node_has_it() -> None:
    async def scene(desk: Desk) -> None:
        assert (await desk.register(A))["serial"] == 1
        assert desk.core.cluster.nodes[A].serial == 1
        report: dict[str, Any] = {"node": A, "inc": "x", "store_id": f"store-{A}", "boot_id": "boot", "images": []}
        report |= {"highest_seq": desk.core.cluster.seq}
        assert (await desk.do("register", serial=1, **report))["serial"] == 2
        # the answer was lost: the node comes with what it has, and is no older copy
        assert (await desk.do("register", serial=1, **report))["serial"] == 2
        assert desk.core.cluster.nodes[A].serial == 1

    at_desk(scene)


def test_two_nodes_with_each_others_directories_are_refused() -> None:
    async def scene(desk: Desk) -> None:
        image = await written(desk, A, B)
        for node, other in ((A, B), (B, A)):
            with pytest.raises(Refused, match=f"is that of node {other}"):
                await desk.register(node, inc="again", store_id=f"store-{other}")
        assert desk.statuses(image, A) == desk.statuses(image, B) == [0] * 10
        listed = (await desk.do("errors"))["nodes"]
        assert [n["address"] for n in listed] == [A, B]
        assert "put each node's data_root back" in listed[0]["reason"]
        await desk.register(A, inc="right again")
        assert [n["address"] for n in (await desk.do("errors"))["nodes"]] == [B]

    at_desk(scene)


def test_metadata_that_is_behind_serves_nothing_but_reports() -> None:
    async def scene(desk: Desk) -> None:
        await written(desk, A, B)
        seq = desk.core.cluster.seq
        with pytest.raises(Behind, match=rf"is at change {seq}, node {B} has seen change 500"):
            await desk.register(B, inc="again", highest_seq=500)
        with pytest.raises(NotReady, match="register anew"):
            await desk.beat(A)
        with pytest.raises(Behind):
            await desk.do("image.offline", name="disk")
        assert (await desk.do("status"))["behind"] == {B: 500}
        assert (await desk.do("image.list"))["images"]
        assert desk.core.cluster.seq == seq

    at_desk(scene)


def test_a_node_of_another_cluster_is_refused_and_harms_nobody() -> None:
    async def scene(desk: Desk) -> None:
        await written(desk, A, B)
        with pytest.raises(Behind, match="belongs to cluster other, this is cluster c1"):
            await desk.register(C, cluster_id="other", highest_seq=500)
        await desk.beat(A)

    at_desk(scene)


@pytest.mark.parametrize(
    "wrong",
    [
        {"node": "localhost"},
        {"node": 7},
        {"serial": -1},
        {"highest_seq": "9"},
        {"images": {}},
        {"images": [7]},
        {"images": [{"uuid": 7}]},
        {"images": [{"uuid": "u", "gens": [[1, 0, 3]]}]},
        {"images": [{"uuid": "u", "gens": [[1, 2]]}]},
        {"images": [{"uuid": "u", "bad": [[1, 2, 3]]}]},
        {"store_id": None},
    ],
)
def test_reports_of_the_wrong_shape(wrong: dict[str, Any]) -> None:
    async def scene(desk: Desk) -> None:
        await desk.register(B)
        seq = desk.core.cluster.seq
        with pytest.raises(RemoteProtocolError):
            await desk.do(
                "register",
                **{"node": A, "inc": "i", "store_id": "s", "boot_id": "b", "serial": 0, "highest_seq": 0} | wrong,
            )
        assert desk.core.cluster.seq == seq

    at_desk(scene)


@pytest.mark.parametrize(
    "wrong",
    [{"roles": []}, {"roles": {"a": "b"}}, {"opens": 3}, {"down": [[1, 2, 3]]}, {"progress": {"x": 1}}, {"space": [1]}],
)
def test_beats_of_the_wrong_shape(wrong: dict[str, Any]) -> None:
    async def scene(desk: Desk) -> None:
        await desk.register(A)
        with pytest.raises(RemoteProtocolError):
            await desk.beat(A, **wrong)

    at_desk(scene)


def test_nodes_are_down_without_beats_and_listed_with_who_says_so() -> None:
    async def scene(desk: Desk) -> None:
        await written(desk, A, B)
        await desk.beat(A, down=[[B, 1.6e9, "no answer within 5 s"]])
        assert (await desk.do("errors"))["nodes"] == [
            {"address": B, "since": 1.6e9, "reason": "no answer within 5 s", "reported_by": [A]}
        ]
        await desk.beat(A, down=[])
        assert (await desk.do("errors"))["nodes"] == []
        desk.skew += 1
        await desk.beat(A)
        listed = (await desk.do("errors"))["nodes"]
        assert [(n["address"], n["reason"]) for n in listed] == [(B, "its blockd sends no beats")]
        states = {n["address"]: n["state"] for n in (await desk.do("node.list"))["nodes"]}
        assert states == {A: "up", B: "down"}
        await desk.beat(B)
        assert (await desk.do("errors"))["nodes"] == []

    at_desk(scene)


def test_a_registration_that_comes_late_is_refused() -> None:
    """It tells of an older serial than the node has stored since: taken, it would pass for an older copy (R8)."""

    async def scene(desk: Desk) -> None:
        await desk.register(A)
        await desk.register(A)
        report: dict[str, Any] = {"node": A, "inc": f"{A}-1", "store_id": f"store-{A}", "boot_id": "boot", "images": []}
        report |= {"highest_seq": desk.core.cluster.seq, "serial": 1, "n": 1}
        before = desk.core.cluster.seq
        with pytest.raises(StaleSession, match="send it anew"):
            await desk.do("register", **report)
        assert desk.core.cluster.seq == before

    at_desk(scene)


def test_a_process_that_has_not_seen_the_registration_of_another_comes_late_or_catches_up_first() -> None:
    async def scene(desk: Desk) -> None:
        await desk.register(A)
        report: dict[str, Any] = {"node": A, "inc": "another", "store_id": f"store-{A}", "boot_id": "boot"}
        report |= {"highest_seq": desk.core.cluster.seq, "serial": 1, "n": 1, "images": []}
        began = desk.core.sessions[A].began_seq
        with pytest.raises(StaleSession, match="has to catch up first"):
            await desk.do("register", since=began - 1, **report)
        assert desk.core.sessions[A].inc == f"{A}-1"
        await desk.do("register", since=began, **report)
        assert desk.core.sessions[A].inc == "another"

    at_desk(scene)


def test_what_a_process_sent_before_its_node_was_refused_comes_late() -> None:
    """Its node came back with the directory of another one, and metad reads the former connection last."""

    async def scene(desk: Desk) -> None:
        await desk.register(A)
        await desk.register(B)
        number = desk.core.sessions[A].number
        report: dict[str, Any] = {"node": A, "boot_id": "boot", "highest_seq": 1, "serial": 1, "images": []}
        with pytest.raises(Refused, match="put each node's data_root back"):
            await desk.do("register", inc="another", store_id=f"store-{B}", n=1, **report)
        seq = desk.core.cluster.seq
        with pytest.raises(StaleSession, match="send it anew"):
            await desk.do("register", inc=f"{A}-1", store_id=f"store-{A}", n=number, **report)
        assert desk.core.cluster.seq == seq

    at_desk(scene)


def test_a_request_from_before_the_node_stored_its_serial_confirms_nothing() -> None:
    async def scene(desk: Desk) -> None:
        await desk.register(A)
        report: dict[str, Any] = {"node": A, "inc": f"{A}-1", "store_id": f"store-{A}", "boot_id": "boot", "images": []}
        await desk.do("register", highest_seq=desk.core.cluster.seq, serial=1, **report)
        await desk.beat(A, serial=1)
        assert desk.core.cluster.nodes[A].serial == 1
        await desk.beat(A)
        assert desk.core.cluster.nodes[A].serial == 2

    at_desk(scene)
