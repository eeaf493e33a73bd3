"""The limit of orders that copy or compare in the background."""

from __future__ import annotations

import asyncio

import pytest

from tests.sim.loop import VirtualLoop
from ukai.blockd.jobs import RATE_SLICE_S, Rate

MIB = 2**20
AT_ONCE = 4


def times_of(rate: Rate, count: int) -> list[float]:
    """When each of ``count`` MiB was let through, with AT_ONCE waiting at a time."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    times: list[float] = []

    async def hand() -> None:
        while len(times) < count:
            await rate.take(MIB)
            times.append(loop.time())

    async def main() -> None:
        await asyncio.gather(*(hand() for _ in range(AT_ONCE)))

    try:
        loop.run_until_complete(main())
    finally:
        asyncio.set_event_loop(None)
        loop.close()
    return times


@pytest.mark.parametrize("limit", [10 * MIB, 200 * MIB, 1000 * MIB])
def test_a_limit_is_kept_and_what_was_not_used_is_no_reason_for_a_burst(limit: int) -> None:
    """What the guest writes goes down the same connection: it waits behind what was sent at once."""
    rate = Rate()
    rate.limit = limit
    times = times_of(rate, 200)  # after a thousand seconds without any
    for first in range(len(times)):
        for last in range(first, min(first + 40, len(times))):
            allowed = limit * (times[last] - times[first] + RATE_SLICE_S) + MIB
            assert (last - first + 1) * MIB <= allowed + 1
    assert 200 * MIB / (times[-1] - times[0]) == pytest.approx(limit, rel=0.15)


def test_no_limit_is_no_wait() -> None:
    times = times_of(Rate(), 100)
    assert times[-1] == times[0]
