"""Marks are pursued until metad has committed them or the role is lost (R4, R9)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.blockd.test_peer import run
from ukai.blockd.marks import RETRY_S, Marker
from ukai.errors import NotCoordinator, NotReady, RemoteProtocolError, StaleEpoch, UkaiError, Unreachable
from ukai.messages import Header

A, B = "192.0.2.1", "192.0.2.2"


class Metad:
    """What answers the marks; ``gate`` holds the answers back."""

    def __init__(self) -> None:
        self.asked: list[list[list[object]]] = []
        self.replies: list[Header | BaseException] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.suspected: list[int] = []
        self.marker = Marker(self.send, self.suspected.append)

    async def send(self, marks: list[list[object]]) -> Header:
        self.asked.append(marks)
        await self.gate.wait()
        reply = self.replies.pop(0) if self.replies else {}
        if isinstance(reply, BaseException):
            raise reply
        return reply


def with_metad(story: Callable[[Metad], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        await story(Metad())

    run(whole())


def test_a_mark_is_asked_for_as_a_range_and_ends_when_committed() -> None:
    async def story(metad: Metad) -> None:
        metad.gate.clear()
        marks = [(1, A, "cut"), (2, A, "cut"), (4, A, "cut"), (2, B, "slow")]
        waiting = asyncio.create_task(metad.marker.mark(marks))
        await asyncio.sleep(0)
        assert metad.suspected == [1, 2, 4, 2]
        assert metad.marker.suspects(2) == {A: "cut", B: "slow"}
        metad.gate.set()
        assert await waiting == []
        assert sorted(metad.asked[0], key=str) == [[A, 1, 2, "cut"], [A, 4, 4, "cut"], [B, 2, 2, "slow"]]
        assert metad.marker.pending == {}
        assert metad.marker.suspects(2) == {}

    with_metad(story)


def test_a_mark_under_way_is_not_asked_for_twice_and_later_ones_travel_together() -> None:
    async def story(metad: Metad) -> None:
        metad.gate.clear()
        first = metad.marker.begin(1, A, "cut")
        await asyncio.sleep(0)
        assert metad.marker.begin(1, A, "another reason") is first
        later = [metad.marker.begin(b, A, "cut") for b in (2, 3, 9)]
        await asyncio.sleep(0)
        metad.gate.set()
        assert await asyncio.gather(first, *later) == [True] * 4
        assert metad.asked == [[[A, 1, 1, "cut"]], [[A, 2, 3, "cut"], [A, 9, 9, "cut"]]]
        assert metad.suspected == [1, 2, 3, 9]

    with_metad(story)


def test_the_last_copy_stays_and_is_named() -> None:
    async def story(metad: Metad) -> None:
        metad.replies = [{"kept": [[A, 2, 3], [B, 1, 1]]}]
        kept = await metad.marker.mark([(b, A, "cut") for b in range(1, 5)])
        assert kept == [(2, A), (3, A)]

    with_metad(story)


def test_metad_away_is_asked_until_it_answers() -> None:
    async def story(metad: Metad) -> None:
        loop = asyncio.get_running_loop()
        metad.replies = [Unreachable("away"), NotReady("not yet"), UkaiError("failed"), {}]
        begin = loop.time()
        assert await metad.marker.mark([(1, A, "cut")]) == []
        assert len(metad.asked) == 4
        assert loop.time() - begin == pytest.approx(3 * RETRY_S, abs=0.01)

    with_metad(story)


@pytest.mark.parametrize("kept", [5, [5], [[A, "x", 3]], [[A, 1]], None])
def test_an_answer_that_can_not_be_read_counts_for_nothing(kept: object) -> None:
    async def story(metad: Metad) -> None:
        metad.replies = [{"kept": kept}, {"kept": [[A, 1, 1]]}]
        assert await metad.marker.mark([(1, A, "cut")]) == [(1, A)]
        assert len(metad.asked) == 2

    with_metad(story)


@pytest.mark.expect_log("defect while marking")
def test_a_defect_does_not_leave_anybody_waiting_for_good() -> None:
    async def story(metad: Metad) -> None:
        metad.replies = [ValueError("a defect"), {}]
        assert await metad.marker.mark([(1, A, "cut")]) == []

    with_metad(story)


@pytest.mark.parametrize("error", [StaleEpoch("over"), NotCoordinator("lost")])
def test_a_lost_role_ends_all_that_waits(error: UkaiError) -> None:
    async def story(metad: Metad) -> None:
        metad.gate.clear()
        metad.replies = [error]
        waiting = [asyncio.create_task(metad.marker.mark([(b, A, "cut")])) for b in range(3)]
        settled = asyncio.create_task(metad.marker.settled(1))
        await asyncio.sleep(0)
        metad.gate.set()
        for task in (*waiting, settled):
            with pytest.raises(type(error)):
                await task
        assert metad.marker.pending == {}
        assert len(metad.asked) == 1
        assert await metad.marker.mark([(5, A, "anew")]) == []

    with_metad(story)


def test_abandoned_from_outside_all_that_waits_ends_and_nothing_is_sent_any_more() -> None:
    async def story(metad: Metad) -> None:
        metad.gate.clear()
        waiting = asyncio.create_task(metad.marker.mark([(1, A, "cut"), (2, A, "cut")]))
        await asyncio.sleep(0.01)
        metad.marker.begin(3, B, "cut")
        metad.marker.abandon(NotCoordinator("released"))
        with pytest.raises(NotCoordinator):
            await waiting
        metad.gate.set()
        await asyncio.sleep(1)
        assert len(metad.asked) == 1
        metad.marker.abandon(NotCoordinator("again"))

    with_metad(story)


def test_abandoned_from_within_the_request_itself() -> None:
    async def story(metad: Metad) -> None:
        async def send(marks: list[list[object]]) -> Header:
            metad.marker.abandon(StaleEpoch("a higher epoch"))
            raise StaleEpoch("a higher epoch")

        metad.marker = Marker(send, metad.suspected.append)
        with pytest.raises(StaleEpoch):
            await metad.marker.mark([(1, A, "cut")])
        assert metad.marker.pending == {}

    with_metad(story)


def test_a_waiter_that_gives_up_leaves_the_mark_to_be_pursued() -> None:
    async def story(metad: Metad) -> None:
        metad.gate.clear()
        waiting = asyncio.create_task(metad.marker.mark([(1, A, "cut")]))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        settled = asyncio.create_task(metad.marker.settled(1))
        await asyncio.sleep(0)
        assert not settled.done()
        metad.gate.set()
        await settled
        assert len(metad.asked) == 1

    with_metad(story)


def test_settled_waits_for_every_mark_of_the_block() -> None:
    async def story(metad: Metad) -> None:
        metad.replies = [RemoteProtocolError("odd"), {"kept": [[A, 1, 1]]}, {}]
        metad.marker.begin(1, A, "cut")
        settled = asyncio.create_task(metad.marker.settled(1))
        await asyncio.sleep(0)
        metad.marker.begin(1, B, "cut")
        await settled
        assert metad.marker.pending == {}
        await metad.marker.settled(77)

    with_metad(story)
