"""Seeds of the simulator: zero violations, the same trace from the same seed, and faults that really happen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.sim.ahead import HANDS, Jobs, Records, records
from tests.sim.run import results, worker
from tests.sim.scenario import FAULTS

FIRST, COUNT, GROUP = 1, 300, 60
SECONDS = 6.0

FAILED_ONCE = (5, 34, 55, 72, 94, 105, 115, 142, 148, 207)
"""Seeds that found a defect when they were new; run at full length."""


def _run(first: int) -> Records:
    return results(worker(first, GROUP, 1, SECONDS))


JOBS: Jobs = {f"seeds from {first}": partial(_run, first) for first in range(FIRST, FIRST + COUNT, GROUP)}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_no_seed_fails(job: str) -> None:
    told = records(job)
    failed = [(r["seed"], r["violations"][:2], r["parameters"]) for r in told if r["violations"]]
    assert not failed
    first = int(job.rpartition(" ")[2])
    assert [r["seed"] for r in told] == list(range(first, first + GROUP))
    happened = {kind for r in told for kind, times in r["faults"].items() if times}
    assert happened >= set(FAULTS), "a kind of fault that never happened proves nothing"
    assert sum(r["counts"].get("acknowledged", 0) for r in told) > 50 * GROUP
    assert sum(r["counts"].get("reads", 0) for r in told) > 50 * GROUP


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
