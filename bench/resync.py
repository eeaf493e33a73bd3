"""How fast copies are compared and made, and what that does to a guest meanwhile."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from bench import fio
from bench.cases import abandon, scratch
from bench.measure import fill, run_fio
from bench.results import Sample
from bench.rows import IOPS, Row
from tests.cluster import Cluster
from tests.machine import wait_for

SIZE_BYTES = 4 * 2**30
BLOCK_BYTES = 64 * 2**20
NEW_LIMIT_BYTES = 100 * 2**20
WATCH_S = 3.0
CHANGE_BYTES = 15 * NEW_LIMIT_BYTES
"""What a resync must have left to copy, for the time that a change of its limit is watched."""
SYNC_S = 180.0
RAMP_S = 0.5
TURNS = 3
GUEST_S = 4.0
"""Long enough for a p99; a resync of everything at the default limit takes longer than three attempts."""
FOREGROUND = Row(
    "foreground", "rand 50/50 4 KiB qd4", IOPS, "read", ("--rw=randrw", "--bs=4k", "--iodepth=4", "--rwmixread=50")
)

Keep = Callable[[Sample], None]


def measure(cluster: Cluster, keep: Keep, runtime_s: float) -> None:
    """4 GiB: to an empty copy under a guest, all different, all equal; an image of holes."""
    with scratch(cluster, ["resync"], SIZE_BYTES, (1,)):
        fill(cluster.path("resync"), SIZE_BYTES, [], lambda: abandon(cluster))
        # a second copy first, so that the guest before and during writes to as many
        cluster.ctl("location", "add", "resync", cluster.node(3))
        _keep_rate(keep, "to-empty", _sync(cluster, "resync"), SIZE_BYTES)
        _foreground(cluster, keep, max(runtime_s, GUEST_S))
        _differ(cluster)
        _keep_rate(keep, "differs", _sync(cluster, "resync"), SIZE_BYTES)
        _degrade(cluster, "resync", lambda: touch(cluster, "resync"))
        _keep_rate(keep, "equal", _sync(cluster, "resync"), SIZE_BYTES)
    with scratch(cluster, ["holes"], SIZE_BYTES, (1,)):
        touch(cluster, "holes")
        cluster.ctl("location", "add", "holes", cluster.node(2))
        _keep_rate(keep, "holes", _sync(cluster, "holes"), SIZE_BYTES)


def touch(cluster: Cluster, name: str) -> None:
    """Write 4 KiB into each block."""
    row = Row("touch", "touch", IOPS, "write", ("--rw=write", "--zonemode=strided", "--bs=4k", "--iodepth=4"))
    zones = ["--zonesize=4k", f"--zonerange={BLOCK_BYTES}", f"--io_size={SIZE_BYTES // BLOCK_BYTES * 4096}"]
    line = [*fio.fill_command(row, cluster.path(name), SIZE_BYTES), *zones]
    fio.run(line, 120, lambda: abandon(cluster))


def _degrade(cluster: Cluster, name: str, write: Callable[[], None]) -> None:
    """Take the copy of node 3 away while ``write`` writes, so that it is out-of-sync in every block written."""
    cluster.kill(3, "blockd")
    try:
        write()
    finally:
        cluster.start(3, "blockd")
    assert cluster.image(name)["health"] == "degraded", f"{name} lost no copy: nothing to bring in sync"


def _differ(cluster: Cluster) -> None:
    """Make all blocks of node 3's copy differ."""
    _degrade(cluster, "resync", lambda: fill(cluster.path("resync"), SIZE_BYTES, [], lambda: abandon(cluster)))


def _job(cluster: Cluster, name: str) -> dict[str, Any]:
    return next(job for job in cluster.ask("sync.status", name=name)["jobs"] if job["image"] == name)


def _sync(cluster: Cluster, name: str, rate: str = "none") -> dict[str, Any]:
    """Bring everything in sync; returns the job, with ``took``.  Raises AssertionError."""
    began = time.monotonic()
    cluster.ctl("sync", "start", name, "--rate", rate)

    def ended() -> dict[str, Any] | None:
        job = _job(cluster, name)
        return job if job["state"] in ("done", "failed", "stopped") else None

    job = wait_for(ended, f"{name} in sync", SYNC_S)
    assert job["state"] == "done", f"resync of {name} ended as {job['state']}: {job['reason']}"
    return {**job, "took": time.monotonic() - began}


def _keep_rate(keep: Keep, row: str, job: dict[str, Any], size_bytes: int) -> None:
    keep(Sample("resync", row, round(size_bytes / job["took"] / 1e6, 1), "MB/s"))
    for part in ("copied", "equal", "hole"):
        keep(Sample("resync", f"{row}-{part}", round(job[f"bytes_{part}"] / 1e6, 1), "MB"))


def _foreground(cluster: Cluster, keep: Keep, runtime_s: float) -> None:
    """A guest's latencies without and with a resync at the default limit; then the limit changes under way.

    In turns, since a machine is faster at one time than at another.  Each turn begins with both copies in sync: what
    the guest writes to blocks that are not goes to one node only, and that would be another comparison.
    """
    alone, beside = list[dict[str, float]](), list[dict[str, float]]()
    for turn in range(1, TURNS + 1):
        alone.append(_guest(cluster, keep, "alone", turn, runtime_s))
        _begin(cluster)
        beside.append(_guest(cluster, keep, "beside", turn, runtime_s))
        assert _job(cluster, "resync")["state"] == "running", "the resync ended before the guest did"
        if turn < TURNS:
            _finish(cluster)
    for side in ("read", "write"):
        with_it, without = (statistics.median(tails[side] for tails in runs) for runs in (beside, alone))
        keep(Sample("resync", f"p99-{side}", round(with_it / without, 2), "× of without"))
    job = _job(cluster, "resync")
    if job["bytes_total"] - job["bytes_done"] < CHANGE_BYTES:
        _finish(cluster)
        _begin(cluster)
    _change_limit(cluster, keep)


def _begin(cluster: Cluster) -> None:
    """A resync of everything, at the default limit."""
    _differ(cluster)
    os.sync()  # what made it differ is not the resync's
    cluster.ctl("sync", "start", "resync")


def _finish(cluster: Cluster) -> None:
    """The rest of the resync that runs, without a limit."""
    cluster.ctl("sync", "rate", "resync", "none")
    wait_for(lambda: _job(cluster, "resync")["state"] == "done", "the rest of the resync", SYNC_S)


def _guest(cluster: Cluster, keep: Keep, state: str, turn: int, runtime_s: float) -> dict[str, float]:
    """Run the guest's load: the p99 of its reads and writes in µs."""
    line = fio.command(FOREGROUND, cluster.path("resync"), SIZE_BYTES, runtime_s, RAMP_S)
    report, steal = run_fio(line, runtime_s + fio.END_S, lambda: abandon(cluster))
    tails = {}
    for side in ("read", "write"):
        found = fio.outcome(report["jobs"][0], Row("", "", IOPS, side, FOREGROUND.options))
        tails[side] = found.p99_us
        figures = (round(found.value, 1), IOPS, turn, found.p50_us, found.p99_us)
        keep(Sample("resync", f"guest-{state}-{side}", *figures, **steal))
    return tails


def _change_limit(cluster: Cluster, keep: Keep) -> None:
    """Another limit while the resync runs: what it copies from then on, from one of its reports to another."""
    cluster.ctl("sync", "rate", "resync", str(NEW_LIMIT_BYTES))
    wait_for(lambda: _job(cluster, "resync").get("rate_limit") == NEW_LIMIT_BYTES, "the new limit", WATCH_S)
    copied_before, began = _report(cluster, began=time.monotonic(), after_s=0.0)
    copied, ended = _report(cluster, began, WATCH_S)
    rate = (copied - copied_before) / (ended - began)
    keep(Sample("resync", "rate-changed", round(rate / NEW_LIMIT_BYTES, 3), "of the new limit"))
    _finish(cluster)


def _report(cluster: Cluster, began: float, after_s: float) -> tuple[int, float]:
    """Bytes copied by the first report, one per beat, that comes so long after ``began``, and when it came."""
    known = _job(cluster, "resync")["bytes_copied"]

    def fresh() -> tuple[int, float] | None:
        nonlocal known
        before, known = known, _job(cluster, "resync")["bytes_copied"]
        now = time.monotonic()
        return (known, now) if known != before and now - began >= after_s else None

    return wait_for(fresh, "a report of the resync", WATCH_S * 3)
