"""Seeds of the simulator: zero violations, the same trace from the same seed, and faults that really happen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.sim.run import results, worker
from tests.sim.scenario import FAULTS

FIRST, COUNT, GROUP, HANDS = 1, 300, 60, 2
SECONDS = 6.0

FAILED_ONCE = (5, 34, 55, 72, 94, 105, 115, 142, 148, 207)
"""Seeds that found a defect when they were new; run at full length."""


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FIRST, FIRST + COUNT, GROUP))
def test_no_seed_fails(first: int) -> None:
    workers = [worker(first + hand, GROUP - hand, HANDS, SECONDS) for hand in range(HANDS)]
    records = [record for process in workers for record in results(process)]
    failed = [(r["seed"], r["violations"][:2], r["parameters"]) for r in records if r["violations"]]
    assert not failed
    assert sorted(r["seed"] for r in records) == list(range(first, first + GROUP))
    happened = {kind for r in records for kind, times in r["faults"].items() if times}
    assert happened >= set(FAULTS), "a kind of fault that never happened proves nothing"
    assert sum(r["counts"].get("acknowledged", 0) for r in records) > 50 * GROUP
    assert sum(r["counts"].get("reads", 0) for r in records) > 50 * GROUP


@pytest.mark.slow
def test_seeds_that_failed_once() -> None:
    force = '{"rare": [], "replication": "sync", "checksum": false}'
    with ThreadPoolExecutor(HANDS) as hands:
        told = hands.map(lambda seed: results(worker(seed, 1, 1, 12.0, force=force)), FAILED_ONCE)
        assert [[r["violations"] for r in one] for one in told] == [[[]]] * len(FAILED_ONCE)


def test_one_seed_gives_one_trace() -> None:
    """Each time, and compiled or not."""
    traces = []
    for compiled in (True, True, False):
        traces.append([r["digest"] for r in results(worker(1, 6, 1, 4.0, compiled=compiled))])
    assert traces[0] == traces[1] == traces[2]
    assert len(set(traces[0])) == 6
