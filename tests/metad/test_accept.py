"""An administrator says which copies to believe: older metadata, refused last copies, an older directory."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.metad.desk import A, B, C, Desk, at_desk
from ukai.errors import Behind, Busy, Damaged, NotFound, NotReady, Refused, StaleHandle, Unreachable, UsageError
from ukai.metad import acceptance
from ukai.metad.acceptance import NOBODY_TRUSTED, NOT_REPORTED, NOT_TRUSTED, OTHER_TAKEN, SKIP_CHANGES
from ukai.metad.registration import NO_DATA, Holding, Report
from ukai.model import IN_SYNC, OUT_OF_SYNC, Image, written
from ukai.ranges import RangeMap

Reports = dict[str, dict[str, Any]]


async def older(desk: Desk, *locations: str) -> tuple[Image, Reports]:
    """Blocks 0 to 4 are written, metad is saved, blocks 3 to 6 are written, and metad is put back.

    Gives the image of the older metadata, and what each node would report.
    """
    image = await desk.image(*locations)
    await desk.own(locations[0], image)
    await desk.coordinate(locations[0], "activate", image, ranges=[[0, 4]])
    await desk.coordinate(locations[0], "retire", image, ranges=[[0, 4]])
    saved = desk.core.cluster.seq
    await desk.coordinate(locations[0], "activate", image, ranges=[[3, 6]])
    reports = {
        n: {
            "serial": 3,
            "highest_seq": desk.core.cluster.seq,
            "maker": "metad-1",
            "cluster_id": "c1",
            "images": desk.holds(n),
        }
        for n in locations
    }
    desk.put_back(saved)
    return desk.core.image(image.uuid), reports


async def report(desk: Desk, reports: Reports) -> None:
    """All register, and are refused."""
    for node, said in reports.items():
        with pytest.raises(Behind, match="ukai-ctl metadata show"):
            await desk.register(node, inc=f"{node}-2", **said)


def test_the_trusted_copy_counts_and_all_goes_on_above_what_was_seen() -> None:
    async def scene(desk: Desk) -> None:
        image, reports = await older(desk, A, B)
        seen, epoch = reports[A]["highest_seq"], image.epoch
        await report(desk, reports)
        reply = await desk.do("metadata.accept", trust=[A])
        assert reply["seen"] == seen
        image = desk.core.image(image.uuid)
        assert desk.core.cluster.seq > seen + SKIP_CHANGES
        assert desk.committed[-1][0] == desk.core.cluster.seq
        assert (image.writer, image.former, image.online) == ("", "", True)
        assert image.epoch > epoch
        assert image.lost == {A: image.epoch, B: image.epoch}
        assert not len(image.active)
        assert desk.statuses(image, A) == [IN_SYNC] * 10
        assert desk.statuses(image, B) == [OUT_OF_SYNC] * 7 + [IN_SYNC] * 3
        assert [g for a, b, r in image.locations[A] if (g := r.generation)] == [
            g for _, _, g in reports[A]["images"][0]["gens"]
        ]
        assert NOT_TRUSTED in desk.reasons(image, B)
        for node, said in reports.items():
            await desk.register(node, inc=f"{node}-2", **said)
        assert desk.statuses(image, A) == [IN_SYNC] * 10
        assert await desk.own(B, image) > image.epoch - 1
        assert (await desk.do("status")).get("behind") is None

    at_desk(scene)


def test_handles_of_before_never_write_again() -> None:
    async def scene(desk: Desk) -> None:
        image, reports = await older(desk, A, B)
        epoch = image.epoch
        await report(desk, reports)
        await desk.do("metadata.accept", trust=[A])
        for node, said in reports.items():
            await desk.register(node, inc=f"{node}-2", **said)
        with pytest.raises(StaleHandle):
            await desk.own(A, image, opened_epoch=epoch)
        await desk.own(A, image, opened_epoch=desk.core.image(image.uuid).epoch)

    at_desk(scene)


def test_nodes_that_were_registered_are_asked_to_report() -> None:
    async def scene(desk: Desk) -> None:
        _, reports = await older(desk, A, B)
        await desk.register(A, inc=f"{A}-2", serial=3)
        with pytest.raises(Behind):
            await desk.register(B, inc=f"{B}-2", **reports[B])
        with pytest.raises(NotReady, match="register anew"):
            await desk.beat(A)
        with pytest.raises(Behind):
            await desk.do("register", node=A, inc=f"{A}-2", store_id=f"store-{A}", boot_id="boot", **reports[A])
        shown = await desk.do("metadata.show")
        assert shown["behind"]
        assert [(n["address"], n["reported"]) for n in shown["nodes"]] == [(A, True), (B, True)]

    at_desk(scene)


def test_the_first_trusted_node_with_a_usable_file_is_taken() -> None:
    async def scene(desk: Desk) -> None:
        image, reports = await older(desk, A, B, C)
        reports[A]["images"][0]["bad"] = [[1, 1, "block file is missing though it was written"]]
        reports[B]["images"][0]["bad"] = [[2, 2, "block file has 7 bytes instead of 4096"]]
        await report(desk, reports)
        await desk.do("metadata.accept", trust=[C, f"{image.name}={A}", B])
        assert desk.statuses(image, A)[:3] == [0, 2, 0]  # what is said of the image comes first
        assert desk.statuses(image, C)[:3] == [2, 0, 2]
        assert desk.statuses(image, B)[:3] == [2, 2, 2]

    at_desk(scene)


def test_a_block_that_only_others_have_is_no_never_written_one() -> None:
    async def scene(desk: Desk) -> None:
        image, reports = await older(desk, A, B)
        reports[A]["images"][0]["gens"] = reports[A]["images"][0]["gens"][:1]  # A missed what came after the backup
        await report(desk, reports)
        seq = desk.core.cluster.seq
        with pytest.raises(Refused, match=rf"{B}.*trust one of them too: --trust disk="):
            await desk.do("metadata.accept", trust=[A])
        assert desk.core.cluster.seq == seq
        await desk.do("metadata.accept", trust=[A, B])
        assert desk.statuses(image, A)[:7] == [0, 0, 0, 2, 2, 2, 2]
        assert desk.statuses(image, B)[:7] == [2, 2, 2, 0, 0, 0, 0]

    at_desk(scene)


def test_what_nobody_has_can_not_be_read_and_is_not_zeros() -> None:
    async def scene(desk: Desk) -> None:
        image, reports = await older(desk, A, B)
        for node in (A, B):
            reports[node]["images"][0]["bad"] = [[0, 0, "block file is missing though it was written"]]
        await report(desk, reports)
        reply = await desk.do("metadata.accept", trust=[A])
        assert any("nobody has a usable file of blocks 0" in note for note in reply["notes"])
        image = desk.core.image(image.uuid)
        lost = image.replica(A, 0)
        assert lost is not None
        assert (lost.status, lost.reason) == (IN_SYNC, "block file is missing though it was written")
        assert lost.generation > 0

    at_desk(scene)


def test_a_missing_node_is_named_and_not_trusted() -> None:
    async def scene(desk: Desk) -> None:
        image, reports = await older(desk, A, B)
        missing = reports.pop(B)
        await report(desk, reports)
        with pytest.raises(NotFound, match=f"node {B} has not reported"):
            await desk.do("metadata.accept", trust=[B])
        reply = await desk.do("metadata.accept", trust=[A])
        assert any(f"{B} had not reported" in note for note in reply["notes"])
        assert desk.statuses(image, B) == [OUT_OF_SYNC] * 10
        assert desk.reasons(image, B) == {NOT_REPORTED}
        missing["highest_seq"] += 1000  # it has seen more than those who reported
        await desk.register(B, inc="late", **missing)
        assert desk.statuses(image, B) == [OUT_OF_SYNC] * 10

    at_desk(scene)


def test_an_image_that_no_trusted_node_has_is_offline_until_it_is_decided() -> None:
    async def scene(desk: Desk) -> None:
        await desk.register(C)
        other = await desk.image(B, name="other")
        image, reports = await older(desk, A, B)
        for said in reports.values():
            said["images"] = [i for i in said["images"] if i["name"] == "disk" or said is reports[B]]
        await report(desk, reports)
        reply = await desk.do("metadata.accept", trust=[A])
        assert any("image other is offline" in note for note in reply["notes"])
        other = desk.core.image(other.uuid)
        assert not other.online
        assert desk.reasons(other, B) == {NOBODY_TRUSTED}
        assert desk.core.image(image.uuid).online

    at_desk(scene)


def test_a_node_that_became_a_location_after_the_backup_can_be_trusted() -> None:
    async def scene(desk: Desk) -> None:
        image, reports = await older(desk, A, B)
        held = reports[A]["images"]
        reports = {A: {**reports[A], "images": []}, C: {**reports[A], "images": held}}
        await report(desk, reports)
        await desk.do("metadata.accept", trust=[C])
        assert desk.statuses(image, C) == [IN_SYNC] * 10
        assert desk.statuses(image, A) == desk.statuses(image, B) == [OUT_OF_SYNC] * 10
        assert NO_DATA in desk.reasons(image, A)

    at_desk(scene)


def test_images_that_the_metadata_does_not_know_are_named() -> None:
    async def scene(desk: Desk) -> None:
        _, reports = await older(desk, A, B)
        reports[B]["images"].append(
            {"uuid": "new-one", "name": "made-later", "epoch": 1, "gens": [[0, 3, 9]], "bad": []}
        )
        await report(desk, reports)
        assert (await desk.do("metadata.show"))["unknown"] == [{"uuid": "new-one", "name": "made-later", "nodes": [B]}]
        reply = await desk.do("metadata.accept", trust=[A])
        assert any("made-later (new-one)" in note and "add_image" in note for note in reply["notes"])

    at_desk(scene)


def test_the_preview_tells_what_each_node_holds() -> None:
    async def scene(desk: Desk) -> None:
        image, reports = await older(desk, A, B)
        reports[B]["images"][0]["bad"] = [[1, 2, "wrong size"]]
        reports.pop(A)
        await report(desk, reports)
        shown = await desk.do("metadata.show")
        held = shown["images"][0]
        assert (held["name"], held["blocks"], held["epoch"]) == ("disk", 10, image.epoch)
        copy = held["copies"][B]
        assert (copy["location"], copy["held"], copy["written"], copy["bad_blocks"]) == (True, True, 7, 2)
        assert copy["newest"] > held["newest"]
        assert (held["copies"][A]["reported"], held["copies"][A]["held"]) == (False, False)

    at_desk(scene)


def test_nothing_to_accept_and_nobody_named() -> None:
    async def scene(desk: Desk) -> None:
        with pytest.raises(Refused, match="nothing to accept"):
            await desk.do("metadata.accept", trust=[A])
        _, reports = await older(desk, A, B)
        await report(desk, reports)
        with pytest.raises(UsageError, match="--trust"):
            await desk.do("metadata.accept", trust=[])
        with pytest.raises(NotFound):
            await desk.do("metadata.accept", trust=[f"nowhere={A}"])

    at_desk(scene)


BLOCKS = 6
holdings = st.none() | st.builds(
    lambda gens, bad: Holding(
        gens=RangeMap((b, b, g) for b, g in enumerate(gens) if g),
        bad=RangeMap((b, b, "bad") for b in sorted(bad) if gens[b]),
    ),
    st.lists(st.integers(0, 4), min_size=BLOCKS, max_size=BLOCKS),
    st.sets(st.integers(0, BLOCKS - 1)),
)


@settings(max_examples=300, deadline=None)
@given(
    held=st.fixed_dictionaries(dict.fromkeys((A, B, C), holdings)),
    order=st.lists(st.sampled_from([A, B, C]), unique=True, max_size=3),
    known=st.lists(st.integers(0, 2), min_size=BLOCKS, max_size=BLOCKS),
    missing=st.sets(st.sampled_from([A, B, C])),
)
def test_whatever_is_reported_the_decision_is_sound(
    held: dict[str, Holding | None], order: list[str], known: list[int], missing: set[str]
) -> None:
    """Only usable trusted files are sources; what anybody may have is never taken for never written."""
    image = Image("u", "disk", BLOCKS * 4096, 4096)
    for node in (A, B):
        image.set_replicas(node, [[b, b, IN_SYNC, g, ""] for b, g in enumerate(known)])
    reports = {
        n: Report(n, "i", f"s-{n}", "boot", 1, 100, "c1", "m", {"u": h} if h is not None else {})
        for n, h in held.items()
        if n not in missing
    }
    order = [n for n in order if n in reports]
    try:
        rows, _ = acceptance.trusted(image, order, reports)
    except Refused:
        return  # some block is usable on nodes only that are not trusted
    order = [n for n in order if held[n] is not None]
    for node, ranges in rows.items():
        image.set_replicas(node, ranges)
    for block in range(BLOCKS):
        state = image.replicas(block)
        usable = {
            n: g
            for n, r in reports.items()
            if (h := r.images.get("u")) is not None and (g := h.gens.get(block)) and not h.bad.get(block)
        }
        good = {n: r for n, r in state.items() if r.status == IN_SYNC and not r.reason}
        first = next((n for n in order if n in usable), None)
        if first is not None:
            assert {n: r.generation for n, r in good.items()} == {first: usable[first]}
        elif not order:
            assert not good
        else:
            anybody = known[block] or any(r.images["u"].gens.get(block) for r in reports.values() if "u" in r.images)
            assert written(state) is bool(anybody)
            assert bool(good) is not bool(anybody)


# --- a last copy that is refused


async def refused(desk: Desk) -> Image:
    """A has an older copy of blocks 0 to 2, which are nowhere else in-sync; B has something older still."""
    image = await desk.image(A, B)
    await desk.own(A, image)
    await desk.coordinate(A, "activate", image, ranges=[[0, 4]])
    await desk.coordinate(A, "mark", image, marks=[[B, 0, 2, "no answer"]])
    await desk.coordinate(A, "retire", image, ranges=[[0, 4]])
    await desk.coordinate(A, "activate", image, ranges=[[0, 4]])
    await desk.coordinate(A, "release", image)
    image = desk.core.image(image.uuid)
    new, old = image.replica(A, 0).generation, image.replica(B, 0).generation  # type: ignore[union-attr]
    gens = [[0, 2, old], [3, 4, new]]
    desk.answers[A, "inventory"] = {"uuid": image.uuid, "name": "disk", "epoch": 1, "gens": gens, "bad": []}
    desk.answers[B, "inventory"] = {"uuid": image.uuid, "name": "disk", "epoch": 1, "gens": gens, "bad": []}
    return image


def test_an_older_last_copy_is_taken_by_order_only() -> None:
    async def scene(desk: Desk) -> None:
        image = await refused(desk)
        old = desk.answers[A, "inventory"]["gens"][0][2]  # type: ignore[index]
        reply = await desk.do("image.accept", name="disk", node=A)
        assert reply["accepted"] == [[0, 2]]
        image = desk.core.image(image.uuid)
        assert [image.replica(A, b).generation for b in (0, 2)] == [old, old]  # type: ignore[union-attr]
        assert (image.online, image.writer, list(image.active)) == (True, "", [])
        assert desk.statuses(image, A)[:5] == [0, 0, 0, 0, 0]
        assert desk.statuses(image, B)[:5] == [2, 2, 2, 0, 0]
        assert OTHER_TAKEN in desk.reasons(image, B)
        with pytest.raises(Refused, match="nothing to accept"):
            await desk.do("image.accept", name="disk", node=A)

    at_desk(scene)


def test_another_node_may_be_taken_and_only_some_blocks() -> None:
    async def scene(desk: Desk) -> None:
        image = await refused(desk)
        await desk.do("image.accept", name="disk", node=B, ranges=[[1, 4]])
        assert desk.statuses(image, A)[:5] == [0, 2, 2, 0, 0]
        assert desk.statuses(image, B)[:5] == [2, 0, 0, 0, 0]

    at_desk(scene)


def test_a_missing_file_is_zeros_only_where_that_is_said() -> None:
    async def scene(desk: Desk) -> None:
        image = await refused(desk)
        desk.answers[A, "inventory"]["bad"] = [[0, 1, "block file is missing though it was written"]]  # type: ignore[index]
        with pytest.raises(Refused, match=r"no usable file of blocks 0-1 \(block 0: block file is missing.*--zeros"):
            await desk.do("image.accept", name="disk", node=A)
        reply = await desk.do("image.accept", name="disk", node=A, zeros=True)
        assert (reply["accepted"], reply["zeros"]) == ([[0, 1], [2, 2]], [[0, 1]])
        assert [f["ranges"] for n, op, f in desk.calls if op == "disown"] == [[[0, 1]]]
        image = desk.core.image(image.uuid)
        assert not written(image.replicas(0))
        assert desk.statuses(image, A)[:3] == [0, 0, 0]

    at_desk(scene)


def test_a_copy_out_of_reach_is_given_up_by_force_only() -> None:
    async def scene(desk: Desk) -> None:
        image = await refused(desk)
        desk.answers[A, "inventory"] = Unreachable("no answer")
        with pytest.raises(Unreachable, match="give them up with --force"):
            await desk.do("image.accept", name="disk", node=B)
        await desk.do("image.accept", name="disk", node=B, force=True, ranges=[[0, 2]])
        assert desk.statuses(image, B)[:3] == [0, 0, 0]
        assert desk.statuses(image, A)[:3] == [2, 2, 2]

    at_desk(scene)


def test_nothing_is_accepted_under_a_running_machine() -> None:
    async def scene(desk: Desk) -> None:
        image = await refused(desk)
        before = desk.statuses(image, A), desk.statuses(image, B)
        desk.answers[A, "close"] = Busy("open")
        with pytest.raises(Busy, match="stop the machine"):
            await desk.do("image.accept", name="disk", node=A)
        assert (desk.statuses(image, A), desk.statuses(image, B)) == before
        assert desk.core.image(image.uuid).online

    at_desk(scene)


def test_a_node_without_any_data_has_nothing_to_take() -> None:
    async def scene(desk: Desk) -> None:
        await refused(desk)
        desk.answers[B, "inventory"] = Damaged("no data of image")
        with pytest.raises(Refused, match="no usable file of blocks 0-2"):
            await desk.do("image.accept", name="disk", node=B)
        with pytest.raises(NotFound, match="no location"):
            await desk.do("image.accept", name="disk", node=C)

    at_desk(scene)


# --- an older directory with last copies


async def restored(desk: Desk) -> tuple[Image, Image, dict[str, Any]]:
    """Two images, of which B has the last and one of two copies; and what B reports with an older directory."""
    alone, shared = await desk.image(B, name="alone"), await desk.image(A, B, name="shared")
    for image in (alone, shared):
        node = B if image is alone else A
        await desk.own(node, image)
        await desk.coordinate(node, "activate", image, ranges=[[0, 4]])
        await desk.coordinate(node, "release", image)
    said = {"images": desk.holds(B), "serial": 0}
    await desk.beat(B, saved_seq=desk.core.cluster.seq)
    return alone, shared, said


def test_last_copies_in_an_older_directory_are_not_served() -> None:
    async def scene(desk: Desk) -> None:
        alone, shared, said = await restored(desk)
        seq = desk.core.cluster.seq
        for attempt in range(2):
            with pytest.raises(
                Refused, match=rf"older copy .*last in-sync copy of blocks 0-4 of image alone.*accept {B}"
            ):
                await desk.register(B, inc=f"again-{attempt}", **said)
        assert desk.core.cluster.seq == seq
        reason = (
            next(n["reason"] for n in (await desk.do("errors"))["nodes"] if n["address"] == B)
            if not (desk.core.up(B))
            else desk.core.refused[B]
        )
        assert "older copy" in reason
        await desk.register(B, inc="the right one")  # the directory that it had before
        assert desk.statuses(alone, B) == desk.statuses(shared, B) == [0] * 10

    at_desk(scene)


def test_an_older_directory_is_taken_as_it_is_by_order() -> None:
    async def scene(desk: Desk) -> None:
        alone, shared, said = await restored(desk)
        said["images"][0]["gens"] = [[0, 3, said["images"][0]["gens"][0][2]], [4, 4, 1]]
        with pytest.raises(Refused):
            await desk.register(B, inc="again", **said)
        epoch = desk.core.image(alone.uuid).epoch
        assert (await desk.do("node.accept", node=B))["accepted"] == {"alone": "0-4"}
        alone = desk.core.image(alone.uuid)
        assert [alone.replica(B, b).generation for b in (3, 4)] == [said["images"][0]["gens"][0][2], 1]  # type: ignore[union-attr]
        assert alone.epoch == epoch + 1
        assert desk.statuses(shared, B)[:5] == [2] * 5
        await desk.register(B, inc="again", **said)
        assert desk.statuses(alone, B) == [0] * 10
        assert desk.reasons(alone, B) == {""}
        with pytest.raises(Refused, match="not held back"):
            await desk.do("node.accept", node=B)

    at_desk(scene)


def test_a_directory_that_is_empty_is_no_older_copy() -> None:
    async def scene(desk: Desk) -> None:
        alone, shared, _ = await restored(desk)
        await desk.register(B, inc="again", store_id="new", serial=0, images=[])
        assert desk.statuses(alone, B) == [0] * 10  # the last copies stay, and can't be read
        assert "the node's data directory was replaced by another" in desk.reasons(alone, B)
        assert desk.statuses(shared, B)[:5] == [2] * 5

    at_desk(scene)
