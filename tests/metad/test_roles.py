"""Who may write (R1–R3, R5), and what a coordinator may change (R4, R9, R11)."""

from __future__ import annotations

import asyncio

import pytest

from tests.metad.desk import A, B, C, D, Desk, at_desk
from ukai.errors import (
    Busy,
    NotCoordinator,
    NotFound,
    NotReady,
    Refused,
    RemoteProtocolError,
    StaleEpoch,
    StaleHandle,
    Timeout,
    Unreachable,
)
from ukai.messages import Header
from ukai.metad import jobs, roles
from ukai.model import Image


def test_first_write_takes_the_role_and_activates() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        assert await desk.own(A, image) == 1
        image = desk.core.image(image.uuid)
        assert (image.writer, image.epoch) == (A, 1)
        reply = await desk.coordinate(A, "activate", image, ranges=[[2, 3]])
        assert list(image.active) == [(2, 3)]
        assert {image.replica(n, 2).generation for n in (A, B)} == {reply["generation"]}  # type: ignore[union-attr]
        assert image.required(A, 2) == 0, "a crash before the first write leaves nothing of this generation"
        await desk.coordinate(A, "retire", image, ranges=[[0, 9]])
        assert not len(image.active)
        assert image.required(A, 2) == reply["generation"]
        await desk.coordinate(A, "release", image)
        assert image.writer == ""

    at_desk(scene)


@pytest.mark.parametrize("op", ["activate", "retire", "mark", "release", "sync.begin", "sync.finish", "job.end"])
def test_only_the_writer_in_its_epoch_changes_an_image(op: str) -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        seq = desk.core.cluster.seq
        request: Header = {"image": image.uuid, "ranges": [[0, 0]], "target": B, "number": 1, "state": "done"}
        request["marks"] = [[B, 0, 0, "x"]]
        with pytest.raises(StaleEpoch):
            await desk.do(op, node=A, inc=desk.core.sessions[A].inc, epoch=0, **request)
        with pytest.raises(NotCoordinator):
            await desk.do(op, node=B, inc=desk.core.sessions[B].inc, epoch=1, **request)
        with pytest.raises(NotReady):
            await desk.do(op, node=A, inc="another process", epoch=1, **request)
        assert desk.core.cluster.seq == seq

    at_desk(scene)


def test_the_last_in_sync_replica_stays_even_among_marks_of_one_request() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B, C)
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[0, 4]])
        reply = await desk.coordinate(
            A, "mark", image, marks=[[A, 0, 1, "eio"], [B, 0, 0, "gone"], [C, 0, 2, "gone"], [B, 1, 1, "gone"]]
        )
        assert reply["kept"] == [[C, 0, 1]]
        assert desk.statuses(image, A)[:4] == [2, 2, 0, 0]
        assert desk.statuses(image, B)[:4] == [2, 2, 0, 0]
        assert desk.statuses(image, C)[:4] == [0, 0, 2, 0]
        assert image.replica(C, 0).reason == "gone", "the reason is kept with the one that stays"  # type: ignore[union-attr]
        seq = desk.core.cluster.seq
        assert (await desk.coordinate(A, "mark", image, marks=[[A, 0, 1, "again"]]))["kept"] == []
        assert desk.core.cluster.seq == seq, "what is marked already is no change"

    at_desk(scene)


def test_marks_of_a_lost_node_are_one_change() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B, blocks=20_000)
        await desk.own(A, image)
        seq = desk.core.cluster.seq
        await desk.coordinate(A, "mark", image, marks=[[B, i, i, "gone"] for i in range(0, 20_000, 2)])
        assert desk.core.cluster.seq == seq + 1

    at_desk(scene)


def test_a_live_writer_is_asked_to_release_and_its_open_handles_are_stale() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[0, 0]])
        desk.answers[A, "release"] = {"handles": 1, "clean": True}
        assert await desk.own(B, image, opened_epoch=1) == 2
        image = desk.core.image(image.uuid)
        assert image.writer == B
        assert image.lost == {A: 2}
        assert not len(image.active)
        assert desk.statuses(image, A) == desk.statuses(image, B) == [0] * 10
        with pytest.raises(StaleHandle, match="open it anew"):
            await desk.grant(A, image, opened_epoch=1)
        desk.answers[B, "release"] = {"handles": 0, "clean": True}
        await desk.own(A, image, opened_epoch=2)
        assert B not in desk.core.image(image.uuid).lost

    at_desk(scene)


def test_a_silent_writer_is_waited_out_and_its_active_blocks_keep_one_copy() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B, C)
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[3, 4]])
        desk.answers[A, "release"] = Timeout("no answer")
        begun = desk.now()
        renewed: list[Header] = []

        async def keep_beating() -> None:
            for _ in range(6):
                renewed.append(await desk.beat(A, roles={image.uuid: 1}))
                for node in (B, C):
                    await desk.beat(node)
                await asyncio.sleep(0.08)

        beats = asyncio.create_task(keep_beating())
        await asyncio.sleep(0)
        reply = await desk.grant(B, image)
        await beats
        assert desk.now() - begun >= desk.core.config.lease
        assert [image.uuid] in [r["lost"] for r in renewed], "its beats no longer renew the role"
        await desk.do(
            "grant.commit", node=B, inc=desk.core.sessions[B].inc, image=image.uuid, epoch=reply["epoch"], fenced=[B, C]
        )
        assert desk.statuses(image, B) == [0] * 10
        assert desk.statuses(image, A) == desk.statuses(image, C) == [0, 0, 0, 2, 2, 0, 0, 0, 0, 0]
        image = desk.core.image(image.uuid)
        assert list(image.active) == [(3, 4)]
        assert image.lost == {A: 2}

    at_desk(scene)


def test_a_dead_writer_is_not_asked_for_longer_than_its_lease() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)

        async def never(fields: Header) -> Header:
            await asyncio.sleep(60)
            return {}

        desk.answers[A, "release"] = never
        begun = desk.now()
        task = asyncio.create_task(desk.own(B, image))
        while not task.done():
            await desk.beat(B)
            await asyncio.sleep(0.02)
        assert desk.core.config.lease <= desk.now() - begun < desk.core.config.lease + 0.3
        assert await task == 2

    at_desk(scene)


@pytest.mark.parametrize(
    ("how", "vacated"),
    [
        ("asked to release", True),
        ("not the writer", True),
        ("silent", False),
        ("silent, and the one after it never came", False),
        ("released by itself", True),
        ("started anew", True),
        ("released, and metad started anew", False),
        ("asks again", True),
        ("never written", True),
    ],
)
def test_a_grant_tells_whether_the_last_writer_is_known_to_have_stopped(how: str, vacated: bool) -> None:
    """If not, its peers may have confirmed its role a moment ago: that is to be waited out (R3)."""

    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B, C)
        taker = A if how == "asks again" else B
        if how != "never written":
            await desk.own(A, image)
        if how == "asked to release":
            desk.answers[A, "release"] = {"handles": 1, "clean": False}
        elif how == "not the writer":
            desk.answers[A, "release"] = NotCoordinator("no")
        elif how.startswith("silent"):
            desk.answers[A, "release"] = Timeout("no answer")
            desk.core.sessions[A].last_beat -= 100
            if how != "silent":
                assert (await desk.grant(C, image))["vacated"] is False
                desk.core.pending[image.uuid].until = desk.now()
        elif how.startswith("released"):
            await desk.coordinate(A, "release", image)
            if "metad" in how:
                desk.core.vacated.clear()
        elif how == "started anew":
            await desk.register(A, inc="A-2")
        reply = await desk.grant(taker, image)
        assert reply["vacated"] is vacated
        lease_s = 0 if vacated else desk.core.config.lease
        left_s = desk.core.pending[image.uuid].until - desk.now() - desk.core.config.replica_timeout
        assert lease_s < left_s <= lease_s + roles.PENDING_S
        await desk.do(
            "grant.commit", node=taker, inc=desk.core.sessions[taker].inc, image=image.uuid, epoch=reply["epoch"],
            fenced=[B, C],
        )  # fmt: skip
        assert image.uuid not in desk.core.vacated

    at_desk(scene)


def test_after_its_own_start_metad_waits_a_lease_for_a_writer_it_does_not_know() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        del desk.core.sessions[A]
        desk.core.started = desk.now()
        begun = desk.now()
        task = asyncio.create_task(desk.own(B, image))
        while not task.done():
            await desk.beat(B)
            await asyncio.sleep(0.02)
        assert desk.now() - begun >= desk.core.config.lease
        await task

    at_desk(scene)


def test_takeover_without_an_in_sync_copy_names_the_nodes_needed() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B, C)
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[0, 1]])
        await desk.coordinate(A, "mark", image, marks=[[B, 0, 1, "gone"], [C, 0, 0, "gone"]])
        desk.answers[A, "release"] = {"handles": 0, "clean": False}
        with pytest.raises(Unreachable, match=rf"needs node {A} or {C}: .* blocks 0,1 .* can't be reached") as caught:
            await desk.own(B, image, fenced=[B])
        assert "\n" not in caught.value.message
        assert desk.core.image(image.uuid).writer == ""

    at_desk(scene)


def test_a_reserved_epoch_is_good_for_one_commit_of_its_node() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        reply = await desk.grant(A, image)

        def commit(node: str, epoch: int) -> Header:
            return {"node": node, "inc": f"{node}-1", "image": image.uuid, "epoch": epoch, "fenced": [A, B]}

        with pytest.raises(StaleEpoch):
            await desk.do("grant.commit", **commit(B, reply["epoch"]))
        await desk.do("grant.commit", **commit(A, reply["epoch"]))
        await desk.do("grant.commit", **commit(A, reply["epoch"]))
        await desk.coordinate(A, "release", image)
        with pytest.raises(StaleEpoch):
            await desk.do("grant.commit", **commit(A, reply["epoch"]))

    at_desk(scene)


def test_two_nodes_at_once_do_not_take_the_role_from_each_other_before_it_is_used() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        desk.answers[A, "release"] = {"handles": 1, "clean": True}
        first = await desk.grant(A, image)
        second = asyncio.create_task(desk.grant(B, image))
        await asyncio.sleep(0.05)
        assert not second.done()
        await desk.do("grant.commit", node=A, inc=f"{A}-1", image=image.uuid, epoch=first["epoch"], fenced=[A, B])
        await second
        assert desk.called("release") == [A]

    at_desk(scene)


def test_who_may_have_the_role() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B, hypervisors=[A])
        for node in (C, D):
            await desk.register(node)
        with pytest.raises(Refused, match="no hypervisor"):
            await desk.grant(B, image)
        with pytest.raises(Refused, match="no hypervisor"):
            await desk.grant(C, image, purpose="sync")
        with pytest.raises(Refused, match="purpose"):
            await desk.grant(A, image, purpose="fun")
        await desk.own(A, image)
        with pytest.raises(Busy):
            await desk.grant(B, image, purpose="sync")
        await desk.do("image.offline", name="disk")
        with pytest.raises(NotFound, match="offline"):
            await desk.grant(A, image)
        with pytest.raises(NotFound):
            await desk.do("grant", node=A, inc=f"{A}-1", image="nope", opened_epoch=-1, purpose="io")

    at_desk(scene)


def test_a_resync_is_compare_and_set() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        generation = (await desk.coordinate(A, "activate", image, ranges=[[0, 1]]))["generation"]
        await desk.coordinate(A, "mark", image, marks=[[B, 0, 4, "gone"]])
        reply = await desk.coordinate(A, "sync.begin", image, target=B, ranges=[[0, 9]])
        assert reply == {"syncing": [[0, 1]], "in_sync": [[2, 4]]}
        assert desk.statuses(image, B) == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
        assert image.replica(B, 0).generation == generation  # type: ignore[union-attr]
        await desk.coordinate(A, "mark", image, marks=[[B, 1, 1, "gone again"]])
        reply = await desk.coordinate(A, "sync.finish", image, target=B, done=[[0, 1, generation]])
        assert reply == {"failed": [[1, 1]]}
        assert desk.statuses(image, B)[:2] == [0, 2]
        # one that becomes active meanwhile is not in-sync with what the target has
        await desk.coordinate(A, "sync.begin", image, target=B, ranges=[[1, 1]])
        again = (await desk.coordinate(A, "activate", image, ranges=[[1, 1]]))["generation"]
        assert await desk.coordinate(A, "sync.finish", image, target=B, done=[[1, 1, generation]]) == {
            "failed": [[1, 1]]
        }
        assert desk.statuses(image, B)[1] == 1
        assert await desk.coordinate(A, "sync.finish", image, target=B, done=[[1, 1, again]]) == {"failed": []}
        assert desk.statuses(image, B)[1] == 0

    at_desk(scene)


def test_syncing_replicas_do_not_outlive_their_coordinator() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[0, 1]])
        await desk.coordinate(A, "mark", image, marks=[[B, 0, 1, "gone"]])
        await desk.coordinate(A, "sync.begin", image, target=B, ranges=[[0, 1]])
        desk.answers[A, "release"] = {"handles": 0, "clean": True}
        await desk.register(C)
        await desk.do("hypervisor.add", name="disk", node=C)
        await desk.grant(C, image)
        assert desk.statuses(image, B)[:2] == [2, 2]
        assert "resync interrupted" in desk.reasons(image, B)

    at_desk(scene)


def test_fields_of_the_wrong_shape_change_nothing() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        seq = desk.core.cluster.seq
        wrong: list[tuple[str, Header]] = [
            ("activate", {"ranges": [[0, 10]]}),
            ("activate", {"ranges": [[1, 0]]}),
            ("activate", {"ranges": 7}),
            ("mark", {"marks": [[B, 0, 10, "x"]]}),
            ("mark", {"marks": [[B, 0]]}),
            ("mark", {"marks": {"a": 1}}),
            ("sync.begin", {"ranges": [[0, 1]]}),
            ("job.end", {"number": 1, "state": "tired"}),
        ]
        for op, fields in wrong:
            with pytest.raises(RemoteProtocolError):
                await desk.coordinate(A, op, image, **fields)
        with pytest.raises(RemoteProtocolError):
            await desk.do("no.such.op")
        assert desk.core.cluster.seq == seq

    at_desk(scene)


def test_a_writer_whose_process_ended_keeps_its_place_until_another_writes() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        await desk.register(A, inc="second life")
        image = desk.core.image(image.uuid)
        assert (image.writer, image.former) == ("", A)
        await desk.own(A, image, opened_epoch=1)  # its guest goes on
        await desk.register(A, inc="third life")
        await desk.beat(A, opens={image.uuid: 1})
        await desk.own(B, image)
        with pytest.raises(StaleHandle):
            await desk.grant(A, image, opened_epoch=1)

    at_desk(scene)


async def two(desk: Desk) -> Image:
    """An image that A has written and B reads while A is out of reach."""
    image = await desk.image(A, B)
    await desk.own(A, image)
    desk.answers[A, "release"] = Timeout("no answer")
    desk.skew += 10
    await desk.beat(B)
    reply = await desk.grant(B, image, purpose="read")
    numbered = {"node": B, "inc": f"{B}-1", "image": image.uuid, "epoch": reply["epoch"]}
    await desk.do("grant.commit", fenced=[A, B], **numbered)
    desk.answers[A, "release"] = {"handles": 1, "clean": True}
    desk.answers[B, "release"] = {"handles": 1, "clean": True}
    await desk.beat(A, opens={image.uuid: 1})
    return desk.core.image(image.uuid)


def test_a_role_taken_only_to_read_costs_the_writer_nothing() -> None:
    async def scene(desk: Desk) -> None:
        image = await two(desk)
        assert (image.writer, image.former, image.lost) == (B, A, {})
        with pytest.raises(Busy):
            await desk.grant(A, image, purpose="read")
        await desk.own(A, image, opened_epoch=0)
        image = desk.core.image(image.uuid)
        assert (image.writer, image.former, image.lost) == (A, "", {})

    at_desk(scene)


@pytest.mark.parametrize("how", ["grant", "activate"])
def test_who_reads_and_then_writes_makes_the_former_writers_handles_stale(how: str) -> None:
    async def scene(desk: Desk) -> None:
        image = await two(desk)
        if how == "grant":
            await desk.own(B, image)
        else:
            await desk.coordinate(B, "activate", image, ranges=[[0, 0]])
        with pytest.raises(StaleHandle):
            await desk.grant(A, image, opened_epoch=1)
        epoch = desk.core.image(image.uuid).epoch
        await desk.own(A, image, opened_epoch=epoch)
        with pytest.raises(StaleHandle):
            await desk.grant(B, image, opened_epoch=epoch)

    at_desk(scene)


def test_a_writer_that_released_with_open_handles_is_remembered() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        await desk.beat(A, opens={image.uuid: 1})
        for node in (A, B):
            desk.core.sessions[node].since -= 100  # these processes are not young
        await desk.coordinate(A, "release", image)
        await desk.own(A, image, opened_epoch=1)
        await desk.coordinate(A, "release", image)
        await desk.own(B, image, opened_epoch=1)
        with pytest.raises(StaleHandle):
            await desk.grant(A, image, opened_epoch=1)
        await desk.coordinate(B, "release", image)
        await desk.beat(B, opens={})
        await desk.own(A, image, opened_epoch=desk.core.image(image.uuid).epoch)
        assert B not in desk.core.image(image.uuid).lost

    at_desk(scene)


def test_the_coordinator_of_a_resync_is_looked_for() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B, hypervisors=[A])
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[0, 1]])
        await desk.coordinate(A, "mark", image, marks=[[B, 0, 1, "gone"]])
        await desk.coordinate(A, "release", image)
        job = (await desk.do("sync.start", name="disk", nodes=[B]))["job"]
        assert job["state"] == "waiting"
        await asyncio.gather(*desk.tasks)
        assert desk.called("acquire") == [A]
        with pytest.raises(Busy, match="under way"):
            await desk.do("sync.start", name="disk")
        desk.answers[A, "acquire"] = Timeout("no answer")
        jobs.tick(desk.core)
        await asyncio.gather(*desk.tasks)
        shown = (await desk.do("sync.status", name="disk"))["jobs"][0]
        assert "no answer" in shown["reason"]
        await desk.own(A, image)
        await desk.beat(A, progress={image.uuid: {"bytes_total": 8192, "bytes_done": 4096, "coordinator": A}})
        shown = (await desk.do("sync.status"))["jobs"][0]
        assert (shown["state"], shown["bytes_done"], shown["coordinator"]) == ("running", 4096, A)
        await desk.coordinate(A, "job.end", image, number=job["number"] + 1, state="done")
        assert (await desk.do("sync.status"))["jobs"][0]["state"] == "running", "the end of another order"
        await desk.coordinate(A, "job.end", image, number=job["number"], state="done", progress={"bytes_done": 8192})
        shown = (await desk.do("sync.status"))["jobs"][0]
        assert (shown["state"], shown["bytes_done"]) == ("done", 8192)

    at_desk(scene)


def test_a_verify_waits_for_what_a_writer_s_end_left() -> None:
    """It gives its place to metad's own order and has it back afterwards, with what it had found."""

    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[0, 1]])
        number = (await desk.do("verify.start", name="disk", ranges=[[0, 5]], rate=7))["job"]["number"]
        figures = {"blocks_done": 3, "blocks_differed": 1}
        await desk.coordinate(A, "job.note", image, number=number, at=3, progress=figures)
        await desk.register(A, inc="again")
        await desk.own(A, image)
        job = desk.core.cluster.jobs[image.uuid]
        assert (job.kind, job.reason, job.nodes) == ("sync", roles.RECONCILE, [B])
        shown = (await desk.do("sync.status", name="disk"))["jobs"][0]
        assert (shown["kind"], shown["number"], shown["state"]) == ("verify", number, "waiting")
        assert (shown["reason"], shown["blocks_done"], shown["ranges"]) == (roles.RECONCILE, 3, [[0, 5]])
        for op in ("sync.start", "verify.start"):
            with pytest.raises(Busy, match="a verify of image disk is under way"):
                await desk.do(op, name="disk")
        await desk.do("sync.rate", name="disk", rate=9)
        await desk.coordinate(A, "job.end", image, number=job.number, state="done")
        job = desk.core.cluster.jobs[image.uuid]
        assert (job.kind, job.number, job.state, job.rate, job.after) == ("verify", number, "running", 9, {})
        assert job.done == {**figures, "at": 3}
        await desk.coordinate(A, "job.end", image, number=number, state="done", progress={"blocks_differed": 2})
        shown = (await desk.do("sync.status", name="disk"))["jobs"][0]
        assert (shown["state"], shown["blocks_differed"]) == ("done", 2)

    at_desk(scene)


def test_a_verify_that_waits_can_be_stopped_and_metad_s_order_goes_on() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[0, 1]])
        await desk.register(A, inc="again")
        await desk.own(A, image)
        assert desk.core.cluster.jobs[image.uuid].reason == roles.RECONCILE
        shown = (await desk.do("verify.start", name="disk"))["job"]
        assert (shown["kind"], shown["state"]) == ("verify", "waiting")
        assert (await desk.do("sync.stop", name="disk"))["job"]["state"] == "stopped"
        job = desk.core.cluster.jobs[image.uuid]
        assert (job.kind, job.state, job.after) == ("sync", "running", {})
        job_number = job.number
        assert (await desk.do("sync.start", name="disk"))["job"]["number"] == job_number, "it is widened"

    at_desk(scene)


def test_a_node_that_takes_its_own_role_anew_is_not_forgotten() -> None:
    """It dies between the two phases; another one writes; its machine must not go on after that (R2)."""

    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[0, 0]])
        await desk.grant(A, image)
        desk.skew += 100.0  # A is silent from here on
        await desk.register(B, "B-2")
        await desk.own(B, image, fenced=[B])
        with pytest.raises(StaleHandle):
            await desk.grant(A, image, opened_epoch=1)

    at_desk(scene)


@pytest.mark.parametrize("replication", ["sync", "flush"])
@pytest.mark.parametrize("fenced", [[A, B], [B]])
def test_the_last_writer_of_a_flush_image_keeps_its_copy_or_its_handles_are_stale(
    replication: str, fenced: list[str]
) -> None:
    """A's blockd is started anew, and B takes the role to read, with or without A among the fenced (R2, R5)."""

    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.do("image.set", name="disk", replication=replication)
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[3, 4]])
        await desk.register(A, "A-2")
        reply = await desk.grant(B, image, purpose="read")
        await desk.do(
            "grant.commit", node=B, inc=desk.core.sessions[B].inc, image=image.uuid, epoch=reply["epoch"], fenced=fenced
        )  # fmt: skip
        kept = replication == "flush" and A in fenced
        assert [desk.statuses(image, n)[3:5] for n in (A, B)] == ([[0, 0], [2, 2]] if kept else [[2, 2], [0, 0]])
        desk.answers[B, "release"] = {"handles": 0, "clean": True}
        if replication == "flush" and not kept:
            assert desk.core.image(image.uuid).lost == {A: 2}
            with pytest.raises(StaleHandle):
                await desk.own(A, image, opened_epoch=1)
        else:
            await desk.own(A, image, opened_epoch=1)

    at_desk(scene)


def test_a_bad_file_at_the_last_writer_of_a_flush_image_makes_its_handles_stale() -> None:
    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.do("image.set", name="disk", replication="flush")
        await desk.own(A, image)
        await desk.coordinate(A, "activate", image, ranges=[[3, 4]])
        held = desk.holds(A)
        held[0]["bad"] = [[4, 4, "block file is missing though it was written"]]
        await desk.register(A, "A-2", images=held)
        image = desk.core.image(image.uuid)
        assert (image.lost, image.epoch) == ({A: 2}, 2)
        with pytest.raises(StaleHandle):
            await desk.own(A, image, opened_epoch=1)
        await desk.own(A, image, opened_epoch=2)

    at_desk(scene)


@pytest.mark.parametrize("heard", [True, False])
def test_a_blockd_that_no_frontend_has_told_of_its_handles_can_not_say_that_there_are_none(heard: bool) -> None:
    """Its frontend may be frozen, with a machine behind it that lives (R2)."""

    async def scene(desk: Desk) -> None:
        image = await desk.image(A, B)
        await desk.own(A, image)
        await desk.coordinate(A, "release", image)
        await desk.register(A, inc="another")
        for node in (A, B):
            desk.core.sessions[node].since -= 100  # these processes are not young
        await desk.beat(A, opens={}, heard=heard)
        await desk.own(B, image)
        assert (A in desk.core.image(image.uuid).lost) is not heard

    at_desk(scene)
