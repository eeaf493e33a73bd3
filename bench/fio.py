"""fio: the command line, a run with its deadline, and what its report says."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.rows import COMMON, IOPS, Row
from tests.machine import tool

END_S = 30.0
"""How much longer than its runtime fio may take: opening, the last requests, closing."""
KILL_S = 10.0


class FioError(Exception):
    """fio failed or did not end; the message has its last words."""


@dataclass(frozen=True)
class Outcome:
    """What one job did.  Latencies in microseconds, of one request; of the fsync where the row has one."""

    value: float
    p50_us: float
    p99_us: float
    iops: float
    """Requests of both kinds per second."""


def command(row: Row, path: Path, size_bytes: int, runtime_s: float, ramp_s: float) -> list[str]:
    """The whole line, for people to repeat."""
    times = [f"--size={size_bytes}", f"--runtime={round(runtime_s * 1000)}ms", f"--ramp_time={round(ramp_s * 1000)}ms"]
    return [tool("fio"), *COMMON, f"--filename={path}", *times, *row.options]


def fill_command(row: Row, path: Path, size_bytes: int) -> list[str]:
    """Writes the whole file once, with bytes that no disk can leave out or compress to nothing."""
    common = [option for option in COMMON if option != "--time_based"]
    return [tool("fio"), *common, f"--filename={path}", f"--size={size_bytes}", "--refill_buffers", *row.options]


def run(line: Sequence[str], timeout_s: float, abandon: Callable[[], None]) -> dict[str, Any]:
    """Run a fio command and return its report.  Raises FioError.

    ``abandon`` ends the system under it: a fio that hangs in a mount dies no sooner.
    """
    process = subprocess.Popen(
        [*line, "--output-format=json"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd="/",
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        abandon()
        process.communicate(timeout=KILL_S)
        raise FioError(f"fio did not end within {timeout_s:g} s") from None
    except BaseException:
        process.kill()
        raise
    if process.returncode != 0:
        raise FioError(f"fio ended with {process.returncode}: {output.strip()[-500:]}")
    report: dict[str, Any] = json.loads(output[output.index("{") :])
    return report


def outcome(job: dict[str, Any], row: Row) -> Outcome:
    """What the row asks of a job of fio's report.  Raises FioError where fio made no request."""
    side = job[row.side]
    latency = job["sync"]["lat_ns"] if "--fsync=1" in row.options else side["clat_ns"]
    if not side["total_ios"] or "percentile" not in latency:
        raise FioError("fio made no request")
    percentile = latency["percentile"]
    return Outcome(
        value=side["iops"] if row.unit == IOPS else side["bw_bytes"] / 1e6,
        p50_us=percentile["50.000000"] / 1000,
        p99_us=percentile["99.000000"] / 1000,
        iops=job["read"]["iops"] + job["write"]["iops"],
    )
