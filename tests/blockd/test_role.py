"""The role of a writer is given up once, however many want it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from ukai.blockd.coordinator import Coordinator
from ukai.blockd.core import Core
from ukai.blockd.role import Role

EPOCH = 7


def test_two_who_want_it_given_up_and_one_who_waits() -> None:
    """metad asks while this node gives it up by itself: both hear the same, and what waits goes on."""

    async def run() -> None:
        begun, drained = asyncio.Event(), asyncio.Event()
        drains, posted = 0, ["a write"]

        async def drain() -> None:
            nonlocal drains
            drains += 1
            begun.set()
            await drained.wait()

        async def passed() -> None:
            assert c.frozen is None, "what is posted is written before"
            assert c.posts.refusals > 0
            posted.clear()

        async def flush() -> None: ...

        def nothing(*_: object) -> None: ...

        c = SimpleNamespace(
            uuid="u", epoch=EPOCH, held=True, frozen=None, name=str, changed=nothing,
            now=asyncio.get_running_loop().time,
            writes=SimpleNamespace(drained=drain),
            activity=SimpleNamespace(active={}, warm=set(), end=nothing),
            flusher=SimpleNamespace(flush=flush),
            marker=SimpleNamespace(pending={}, abandon=nothing),
            core=SimpleNamespace(role_lost=nothing),
            image=SimpleNamespace(block_count=1),
            readable=SimpleNamespace(end=nothing),
            posts=SimpleNamespace(refusals=0, refuse=lambda: not posted, passed=passed),
        )  # fmt: skip
        c.holds = lambda epoch: c.held and c.epoch == epoch
        role = Role(cast(Coordinator, c))
        deadline = asyncio.get_running_loop().time() + 5
        wanted = [asyncio.ensure_future(role.release(EPOCH, deadline)) for _ in range(2)]
        async with asyncio.timeout(5):
            await begun.wait()
        waits = asyncio.ensure_future(c.frozen.wait())
        drained.set()
        async with asyncio.timeout(5):
            assert await asyncio.gather(*wanted) == [True, True]
            await waits
        assert drains == 1
        assert c.frozen is None
        assert c.posts.refusals == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("clean", "held", "wanted", "epoch", "told"),
    [
        (True, False, False, EPOCH, [{"image": "u", "epoch": EPOCH, "left": [[2, 2]]}]),
        (False, False, False, EPOCH, [{"image": "u", "epoch": EPOCH, "left": [[0, 3]]}]),  # all stays active (R5)
        (False, False, False, EPOCH + 1, [{"image": "u", "epoch": EPOCH + 1, "left": [[0, 3]]}]),  # granted, not told
        (False, False, True, EPOCH + 1, []),  # the answer is on its way
        (False, True, False, EPOCH, []),
        (False, False, False, EPOCH - 1, []),
    ],
)
def test_a_role_that_was_given_up_is_handed_back(
    clean: bool, held: bool, wanted: bool, epoch: int, told: list[dict[str, object]]
) -> None:
    """metad names this node, which does not hold the role: else whoever only reads would ask it for ever."""
    heard = []

    async def release(epoch: int, deadline: float) -> bool:
        return clean

    async def metad(op: str, fields: dict[str, object]) -> None:
        assert op == "release"
        heard.append(fields)

    role = SimpleNamespace(release=release, left=[[2, 2]], wanted=wanted)
    c = SimpleNamespace(uuid="u", epoch=EPOCH, held=held, role=role, image=SimpleNamespace(block_count=4))
    core = SimpleNamespace(now=lambda: 0.0, config=SimpleNamespace(io_timeout=1.0), metad=metad)
    asyncio.run(Core._hand_back(cast(Core, core), cast(Coordinator, c), epoch))
    assert heard == told
