"""fsync means it (R7): nothing that was written is taken for flushed before it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.blockd.test_peer import run
from ukai.blockd.coordinator import Coordinator
from ukai.blockd.flush import Flusher
from ukai.errors import DiskError, StaleEpoch, UkaiError, Unreachable
from ukai.messages import Header
from ukai.model import Image, Replica

OWN, OTHER = "192.0.2.1", "192.0.2.2"


class World:
    """A coordinator as far as a flush sees it, with blocks 0-9 in sync on two nodes."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.flushed: list[tuple[str, list[int]]] = []
        self.local: list[dict[int, str]] = []
        self.remote: list[Header | UkaiError] = []
        self.marked: list[tuple[int, str, str]] = []
        self.kept: list[tuple[int, str]] = []
        self.mark_error: UkaiError | None = None
        image = Image("u", size=81920, block_size=8192)
        for node in (OWN, OTHER):
            image.set_replicas(node, [[0, 9, *Replica(0, 5, "")]])
        core = SimpleNamespace(
            replica=SimpleNamespace(flush=self._flush_here),
            store=SimpleNamespace(image=lambda uuid: None),
            peer=lambda node: SimpleNamespace(ask=self._ask),
        )
        self.behind = SimpleNamespace(ops={}, settled=self._settled)
        coordinator = SimpleNamespace(
            own=OWN,
            uuid="u",
            epoch=3,
            held=True,
            hot={},
            image=image,
            core=core,
            mark=self._mark,
            behind=self.behind,
        )
        self.flusher = Flusher(cast(Coordinator, coordinator))

    async def _settled(self, ops: list[object]) -> None:
        assert not ops

    async def _flush_here(self, image: object, blocks: list[int]) -> dict[int, str]:
        self.flushed.append((OWN, blocks))
        await self.gate.wait()
        return self.local.pop(0) if self.local else {}

    async def _ask(self, op: str, fields: Header, *, numbered: bool) -> tuple[Header, None]:
        assert (op, numbered, fields["e"]) == ("f", True, 3)
        self.flushed.append((OTHER, [b for first, last in fields["ranges"] for b in range(first, last + 1)]))
        await self.gate.wait()
        reply = self.remote.pop(0) if self.remote else {"failed": []}
        if isinstance(reply, UkaiError):
            raise reply
        return reply, None

    async def _mark(self, marks: list[tuple[int, str, str]]) -> list[tuple[int, str]]:
        if self.mark_error is not None:
            raise self.mark_error
        self.marked += marks
        return [k for k in self.kept if any((b, n) == k for b, n, _ in marks)]


def through(block: int) -> Any:
    """A synchronous write to a block of both nodes."""
    return SimpleNamespace(
        block=block,
        took=False,
        failed={},
        acknowledged=False,
        then=None,
        hot=SimpleNamespace(nodes=(OTHER, OWN), clean=False),
    )


def with_world(story: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        await story(World())

    run(whole())


def test_each_node_flushes_what_was_written_there_and_once() -> None:
    async def story(world: World) -> None:
        world.flusher.dirty(1, (OWN, OTHER))
        world.flusher.dirty(2, (OTHER,))
        await world.flusher.flush()
        assert sorted(world.flushed) == [(OWN, [1]), (OTHER, [1, 2])]
        await world.flusher.flush()
        assert len(world.flushed) == 2

    with_world(story)


def test_what_is_written_during_a_flush_waits_for_the_next() -> None:
    async def story(world: World) -> None:
        world.gate.clear()
        world.flusher.dirty(1, (OWN,))
        flush = asyncio.create_task(world.flusher.flush())
        await asyncio.sleep(0.01)
        world.flusher.dirty(1, (OWN,))
        world.gate.set()
        await flush
        await world.flusher.flush()
        assert world.flushed == [(OWN, [1]), (OWN, [1])]

    with_world(story)


def test_a_flush_that_is_given_up_is_not_done() -> None:
    async def story(world: World) -> None:
        world.gate.clear()
        world.flusher.dirty(1, (OWN, OTHER))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await world.flusher.flush()
        world.gate.set()
        world.flushed.clear()
        await world.flusher.flush()
        assert sorted(world.flushed) == [(OWN, [1]), (OTHER, [1])]

    with_world(story)


def test_a_replica_that_fails_is_out_of_sync_before_success() -> None:
    async def story(world: World) -> None:
        world.flusher.dirty(1, (OWN, OTHER))
        world.flusher.dirty(2, (OWN, OTHER))
        world.local = [{2: "EIO"}]
        world.remote = [Unreachable("cut")]
        await world.flusher.flush()
        assert sorted(world.marked) == [(1, OTHER, "cut"), (2, OWN, "EIO"), (2, OTHER, "cut")]

    with_world(story)


@pytest.mark.parametrize("reply", [{}, {"failed": 5}, {"failed": [5]}, {"failed": [["x", "y"]]}, {"failed": None}])
def test_an_answer_that_can_not_be_read_is_no_flush(reply: Header) -> None:
    async def story(world: World) -> None:
        world.flusher.dirty(1, (OTHER,))
        world.remote = [reply]
        await world.flusher.flush()
        assert [(b, n) for b, n, _ in world.marked] == [(1, OTHER)]

    with_world(story)


def test_the_last_copy_that_fails_is_an_error_each_time() -> None:
    async def story(world: World) -> None:
        world.flusher.dirty(1, (OWN,))
        world.kept = [(1, OWN)]
        world.local = [{1: "EIO"}, {1: "EIO"}]
        for _ in range(2):
            with pytest.raises(DiskError, match="EIO"):
                await world.flusher.flush()

    with_world(story)


def test_marks_that_can_not_be_made_are_an_error_and_nothing_is_forgotten() -> None:
    async def story(world: World) -> None:
        world.flusher.dirty(1, (OWN,))
        world.flusher.dirty(2, (OWN,))
        world.local = [{1: "EIO"}, {1: "EIO"}]
        world.mark_error = StaleEpoch("the role is lost")
        with pytest.raises(StaleEpoch):
            await world.flusher.flush()
        world.mark_error = None
        await world.flusher.flush()
        assert world.marked == [(1, OWN, "EIO")]

    with_world(story)


def test_what_a_flush_under_way_has_taken_is_not_flushed_yet() -> None:
    """Or a block would be retired, and then lost by a power cut, before the disk has it."""

    async def story(world: World) -> None:
        world.flusher.dirty(1, (OWN, OTHER))
        assert world.flusher.needed([0, 1])
        world.gate.clear()
        flush = asyncio.ensure_future(world.flusher.flush())
        await asyncio.sleep(0)
        assert world.flusher.unflushed == {}
        assert world.flusher.needed([1])
        world.gate.set()
        await flush
        assert not world.flusher.needed([1])

    with_world(story)


@pytest.mark.expect_log("was started anew before block 1")
def test_a_reboot_during_a_flush_loses_what_the_flush_has_taken() -> None:
    async def story(world: World) -> None:
        world.flusher.dirty(1, (OTHER,))
        world.gate.clear()
        flush = asyncio.ensure_future(world.flusher.flush())
        await asyncio.sleep(0)
        world.flusher.rebooted(OTHER)
        world.gate.set()
        with pytest.raises(DiskError, match="was started anew before block 1"):
            await flush

    with_world(story)


def test_a_synchronous_write_covers_what_its_block_had_to_be_flushed() -> None:
    async def story(world: World) -> None:
        flusher, op = world.flusher, through(1)
        assert flusher.clean()
        flusher.dirty(1, (OWN, OTHER))
        assert flusher.covers(1)
        assert not flusher.covers(2)
        assert not flusher.clean()
        flusher.through_begins(op)
        assert op.took
        assert op.hot.clean, "the next write has to be flushed again"
        assert not flusher.clean()
        assert flusher.needed([1])
        assert not flusher.covers(2), "what it has taken was acknowledged before, and is not flushed yet"
        assert flusher.covers(1)
        flusher.through_ended(op)
        assert flusher.clean()
        await flusher.flush()
        assert world.flushed == []

    with_world(story)


def test_a_synchronous_write_that_failed_anywhere_has_flushed_nothing() -> None:
    async def story(world: World) -> None:
        flusher, op = world.flusher, through(1)
        flusher.dirty(1, (OWN,))
        flusher.through_begins(op)
        op.failed = {OTHER: Unreachable("cut")}
        flusher.through_ended(op)
        assert not flusher.clean()
        await flusher.flush()
        assert sorted(world.flushed) == [(OWN, [1]), (OTHER, [1])]

    with_world(story)


def test_an_fsync_beside_a_synchronous_write_flushes_what_that_has_taken() -> None:
    async def story(world: World) -> None:
        flusher, op, fresh = world.flusher, through(1), through(2)
        flusher.dirty(1, (OWN,))
        flusher.through_begins(op)
        flusher.through_begins(fresh)
        await flusher.flush()
        assert sorted(world.flushed) == [(OWN, [1]), (OTHER, [1])]

    with_world(story)


@pytest.mark.parametrize(
    "harm",
    [
        lambda world, _: world.flusher.dirty(2, (OTHER,)),
        lambda world, _: world.flusher.through_begins(through(2)),
        lambda world, _: world.behind.ops.update({3: [through(3)]}),
        lambda world, _: setattr(world.flusher, "lost", "the last copy"),
        lambda _, op: setattr(op, "acknowledged", False),
        lambda _, op: setattr(op, "took", True),
        lambda _, op: setattr(op, "then", lambda: None),
    ],
)
def test_an_fsync_waits_for_a_write_alone_only_where_that_is_all(harm: Callable[[World, Any], None]) -> None:
    """For one that was acknowledged before its fdatasyncs were done (flush images)."""

    async def story(world: World) -> None:
        op = through(1)
        assert world.flusher.last() is None
        world.flusher.through_begins(op)
        op.acknowledged, world.behind.ops = True, {1: [op]}
        assert world.flusher.last() is op
        harm(world, op)
        assert world.flusher.last() is None

    with_world(story)


def test_while_a_flush_is_under_way_nothing_is_covered() -> None:
    async def story(world: World) -> None:
        world.gate.clear()
        world.flusher.dirty(1, (OWN,))
        flush = asyncio.create_task(world.flusher.flush())
        await asyncio.sleep(0)
        assert not world.flusher.clean()
        assert not world.flusher.covers(2)
        world.gate.set()
        await flush
        assert world.flusher.clean()
        assert world.flusher.covers(2)

    with_world(story)


@pytest.mark.expect_log("was started anew before block 1")
def test_a_reboot_loses_what_a_synchronous_write_has_taken() -> None:
    async def story(world: World) -> None:
        world.flusher.dirty(1, (OTHER,))
        world.flusher.through_begins(through(1))
        world.flusher.rebooted(OTHER)
        assert not world.flusher.clean()
        assert not world.flusher.covers(1)
        with pytest.raises(DiskError, match="was started anew before block 1"):
            await world.flusher.flush()

    with_world(story)
