"""Measurements of UKAI alone: many images, cold blocks, and what grows with queue depth, images and blocks."""

from __future__ import annotations

import mmap
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench import fio
from bench.measure import Steal, fill, run_fio, timed
from bench.results import Sample
from bench.rows import BY_NAME, FILL, MBPS, Row, at_depth
from bench.systems import READY_S, create
from tests.cluster import Cluster
from tests.machine import tool, wait_for

Keep = Callable[[Sample], None]

IMAGES, JOBS = 16, 4
IMAGE_BYTES = 64 * 2**20
COLD_BLOCKS = 100  # below active_limit, so that none is retired meanwhile
COLD_BYTES = 512 * 2**20
DEPTHS = (1, 2, 4, 8, 16, 32)
COUNTS = (1, 2, 4, 8, 16)
BLOCK_SIZES = {4: 64 * 2**20, 256: 2**20, 1024: 2**18, 4096: 2**16}
"""Number of blocks of an image of CURVE_BYTES → their size."""
CURVE_BYTES = 256 * 2**20
LOSS_BLOCKS, LOSS_BLOCK_BYTES = 10_000, 2**16
RAMP_S = 0.5
SECTOR_BYTES = 4096


@contextmanager
def scratch(
    cluster: Cluster, names: Sequence[str], size_bytes: int, locations: tuple[int, ...], *options: str
) -> Iterator[None]:
    """Images for one case, deleted after it."""
    made = []
    try:
        for name in names:
            create(cluster, name, size_bytes, locations, *options)
            made.append(name)
        yield
    finally:
        for name in made:
            delete(cluster, name)


def delete(cluster: Cluster, name: str) -> None:
    """Delete an image once its last handle is closed.  Raises AssertionError."""

    def gone() -> bool:
        return cluster.ctl_run("image", "remove", name, "--delete-data", "--json").returncode == 0

    wait_for(gone, f"{name} deleted", READY_S)


def side_by_side(
    cluster: Cluster, names: Sequence[str], row: Row, jobs: int, runtime_s: float
) -> tuple[dict[str, float], Steal]:
    """Run ``jobs`` of ``row`` on each image, all at once: image → what it got.  Raises FioError."""
    words = [tool("fio"), "--ioengine=libaio", "--direct=1", "--randrepeat=0", "--time_based"]
    words += [f"--runtime={round(runtime_s * 1000)}ms", f"--ramp_time={round(RAMP_S * 1000)}ms"]
    words += [f"--size={IMAGE_BYTES}", f"--numjobs={jobs}", *row.options]
    for name in names:
        words += [f"--name={name}", f"--filename={cluster.path(name)}"]
    report, steal = run_fio(words, runtime_s + RAMP_S + fio.END_S, lambda: abandon(cluster))
    got = dict.fromkeys(names, 0.0)
    for job in report["jobs"]:
        got[job["jobname"]] += fio.outcome(job, row).value
    return got, steal


def abandon(cluster: Cluster) -> None:
    """Nothing under a fio that hangs can be saved."""
    cluster.close()


def images(cluster: Cluster, keep: Keep, runtime_s: float) -> None:
    """16 images with 4 jobs each: does one starve?  Two at once.  The curve over the number of images."""
    names = [f"many-{n}" for n in range(IMAGES)]
    with scratch(cluster, names, IMAGE_BYTES, (1, 2)):
        for name in names:
            fill(cluster.path(name), IMAGE_BYTES, [], lambda: abandon(cluster))
        for side in ("read", "write"):
            got, steal = side_by_side(cluster, names, BY_NAME[f"rand-{side}-1"], JOBS, runtime_s)
            keep(Sample("ukai", f"{IMAGES}x{JOBS}-{side}", round(sum(got.values()), 1), "/s", **steal))
            slowest = min(got.values()) / statistics.mean(got.values())
            keep(Sample("ukai", f"fairness-{side}", round(slowest, 3), "of the mean", **steal))
            for row in (f"rand-{side}-16", f"seq-{side}"):
                both, steal = side_by_side(cluster, names[:2], BY_NAME[row], 1, runtime_s)
                keep(Sample("ukai", f"two-images-{row}", round(sum(both.values()), 1), BY_NAME[row].unit, **steal))


def cold(cluster: Cluster, keep: Keep, runtime_s: float) -> None:
    """What R5 costs: the first write to a block, and a sequential write over blocks never written before."""
    size = COLD_BLOCKS * 2**20
    with scratch(cluster, ["cold"], size, (1, 2), "--block-size", str(2**20)):
        first, second = list[float](), list[float]()
        buffer = mmap.mmap(-1, SECTOR_BYTES)  # aligned, as direct I/O wants it
        fd = os.open(cluster.path("cold"), os.O_RDWR | os.O_DIRECT)
        try:
            os.pwrite(fd, buffer, 0)  # takes the writer role; its block is not counted
            for block in range(1, COLD_BLOCKS):
                for times in (first, second):
                    with timed(times):
                        os.pwrite(fd, buffer, block * 2**20)
        finally:
            os.close(fd)
        for name, times in (("cold-write", first), ("warm-write", second)):
            ordered = sorted(times)
            p50, p99 = (ordered[int(len(ordered) * part)] * 1e6 for part in (0.5, 0.99))
            keep(Sample("ukai", name, round(p50, 1), "µs", p50_us=round(p50, 1), p99_us=round(p99, 1)))
    for label, block_bytes in (("1M", 2**20), ("64M", 64 * 2**20)):
        with scratch(cluster, ["cold"], COLD_BYTES, (1, 2), "--block-size", str(block_bytes)):
            for state in ("cold", "again"):
                report = fio.run(
                    fio.fill_command(FILL, cluster.path("cold"), COLD_BYTES), 120, lambda: abandon(cluster)
                )
                found = fio.outcome(report["jobs"][0], FILL)
                keep(Sample("ukai", f"seq-{state}-blocks-{label}", round(found.value, 1), MBPS, p99_us=found.p99_us))


def loss(cluster: Cluster, keep: Keep, runtime_s: float) -> None:
    """A node is lost under a guest that writes to LOSS_BLOCKS blocks, twice: what metad is asked for."""
    size = LOSS_BLOCKS * LOSS_BLOCK_BYTES
    with scratch(cluster, ["loss"], size, (1, 3), "--block-size", str(LOSS_BLOCK_BYTES)):
        cluster.kill(3, "blockd")
        try:
            for row in ("requests-marked", "requests-marked-again"):
                before = mark_requests(cluster)
                fill(cluster.path("loss"), size, [], lambda: abandon(cluster))
                keep(Sample("metad", row, mark_requests(cluster) - before, "requests"))
            lost = cluster.image("loss")["locations"][cluster.node(3)]
            assert lost["out_of_sync"] == LOSS_BLOCKS, f"the loss did not touch all blocks: {lost}"
        finally:
            cluster.start(3, "blockd")


def mark_requests(cluster: Cluster) -> int:
    """How many marks metad has been asked for until now, as its metrics say."""
    published: list[dict[str, Any]] = [
        # the first may be from before the last request
        cluster.ctl("metrics", "--process", "metad", "--once", "--name", "ukai_requests_total")
        for _ in range(2)
    ]
    return sum(int(m["value"]) for m in published[-1]["metrics"] if _counts_marks(m))


def _counts_marks(metric: dict[str, Any]) -> bool:
    return bool(metric["name"] == "ukai_requests_total" and metric["labels"].get("op") == "mark")


def curves(cluster: Cluster, keep: Keep, runtime_s: float) -> None:
    """Random requests over queue depth, number of images and number of blocks."""
    runtime_s = min(runtime_s, 2.0)
    names = [f"curve-{n}" for n in range(max(COUNTS))]
    with scratch(cluster, names, IMAGE_BYTES, (1, 2)):
        for name in names:
            fill(cluster.path(name), IMAGE_BYTES, [], lambda: abandon(cluster))
        for side in ("read", "write"):
            row = BY_NAME[f"rand-{side}-1"]
            for depth in DEPTHS:
                got, steal = side_by_side(cluster, names[:1], at_depth(row, depth), 1, runtime_s)
                keep(Sample("ukai", f"depth-{depth}-{side}", round(sum(got.values()), 1), "/s", **steal))
            for count in COUNTS:
                got, steal = side_by_side(cluster, names[:count], at_depth(row, 4), 1, runtime_s)
                keep(Sample("ukai", f"images-{count}-{side}", round(sum(got.values()), 1), "/s", **steal))
    for count, block_bytes in BLOCK_SIZES.items():
        with scratch(cluster, ["curve"], CURVE_BYTES, (1, 2), "--block-size", str(block_bytes)):
            fill(cluster.path("curve"), CURVE_BYTES, [], lambda: abandon(cluster))
            for side in ("read", "write"):
                row = BY_NAME[f"rand-{side}-16"]
                line = fio.command(row, cluster.path("curve"), CURVE_BYTES, runtime_s, RAMP_S)
                report, steal = run_fio(line, runtime_s + RAMP_S + fio.END_S, lambda: abandon(cluster))
                found = fio.outcome(report["jobs"][0], row)
                keep(Sample("ukai", f"blocks-{count}-{side}", round(found.value, 1), "/s", **steal))
