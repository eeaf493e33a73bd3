"""Active blocks: what was stamped is flushed before it is retired, also where nothing was written."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from ukai.blockd.activity import Activity
from ukai.blockd.coordinator import Coordinator
from ukai.errors import UkaiError
from ukai.model import IN_SYNC, Replica

A, B = "192.0.2.1", "192.0.2.2"


def test_a_stamped_block_is_unflushed_where_it_was_stamped() -> None:
    """A power cut would take the generation of a last copy, which is then refused as an older one (R8)."""

    async def run() -> None:
        dirty: list[tuple[int, tuple[str, ...]]] = []
        marks: list[tuple[int, str, str]] = []

        async def mark(wanted: list[tuple[int, str, str]]) -> list[tuple[int, str]]:
            marks.extend(wanted)
            return []

        replicas = {A: Replica(IN_SYNC, 9, ""), B: Replica(IN_SYNC, 9, "")}
        c = SimpleNamespace(
            image=SimpleNamespace(replicas=lambda _block: replicas, required=lambda _node, _block: 3),
            flusher=SimpleNamespace(dirty=lambda block, nodes: dirty.append((block, nodes))),
            mark=mark,
        )
        activity = Activity(cast(Coordinator, c), 128, 1.0, 10.0)

        async def stamp(node: str, _generation: int, _least: int, blocks: list[int]) -> dict[int, UkaiError]:
            return {7: UkaiError("no")} if node == B else {}

        activity._stamp_on = stamp  # type: ignore[assignment, method-assign]
        assert await activity._stamp([4, 7]) == {}
        assert sorted(dirty) == [(4, (A,)), (4, (B,)), (7, (A,))]
        assert marks == [(7, B, "no")]

    asyncio.run(run())


@pytest.mark.expect_log("defect while announcing")
def test_a_defect_in_one_announcement_does_not_hold_up_the_next() -> None:
    async def run() -> None:
        activity = Activity(cast(Coordinator, SimpleNamespace()), 128, 1.0, 10.0)
        begun: list[list[int]] = []

        async def warm_up(blocks: list[int]) -> dict[int, UkaiError]:
            begun.append(blocks)
            if len(begun) == 1:
                raise KeyError(blocks[0])
            activity.warm.update(blocks)
            return {}

        activity._warm_up = warm_up  # type: ignore[method-assign]
        async with asyncio.timeout(5):
            with pytest.raises(UkaiError, match="defect: KeyError"):
                await activity.make_warm([4])
            await activity.make_warm([4])
        assert begun == [[4], [4]]

    asyncio.run(run())
