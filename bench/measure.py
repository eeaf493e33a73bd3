"""One sample: fio on a system's file, and what its processes took meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from bench import fio
from bench.results import STOLEN_LIMIT, Sample
from bench.rows import FILL, Row
from bench.systems import FILE_BYTES, System

T = TypeVar("T")
Steal = dict[str, Any]
"""What a sample says of the host: ``stolen`` and ``attempts``."""

ATTEMPTS = 3
"""How often something is measured at most, where the host takes too much each time."""
STAT = Path("/proc/stat")


class Usage:
    """Processor time and peak memory of processes between ``begin`` and ``end``."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self._processes = processes
        self._before = {name: _busy_s(process) for name, process in processes.items()}
        for process in processes.values():
            try:
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak begins anew
            except OSError:
                continue
        self._began = time.monotonic()

    def end(self) -> tuple[dict[str, float], dict[str, float]]:
        """Cores in use and peak megabytes, per process that is still there."""
        took = time.monotonic() - self._began
        cores, peaks = {}, {}
        for name, process in self._processes.items():
            after = _busy_s(process)
            if after >= self._before[name]:
                cores[name] = round((after - self._before[name]) / took, 3)
                peaks[name] = round(_peak_mb(process), 1)
        return cores, peaks


def _busy_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return -1.0
    return float(times.user + times.system)


def _peak_mb(process: psutil.Process) -> float:
    try:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return 0.0


class Stolen:
    """What the host of a virtual machine took of all cores' time until ``end``."""

    def __init__(self) -> None:
        self._before = _steal_ticks()
        self._began = time.monotonic()

    def end(self) -> float:
        """The share, 0 to 1."""
        took_s = time.monotonic() - self._began
        all_ticks = took_s * os.sysconf("SC_CLK_TCK") * (os.cpu_count() or 1)
        return round((_steal_ticks() - self._before) / all_ticks, 4)


def _steal_ticks() -> int:
    """The eighth number of the line of all cores."""
    return int(STAT.read_text().splitlines()[0].split()[8])


def least_stolen(work: Callable[[], tuple[T, float]]) -> tuple[T, Steal]:
    """Do ``work``, which returns what it found and the share stolen meanwhile; again where that is too much.

    Returns what was found where least was stolen.
    """
    tries: list[tuple[T, float]] = []
    while len(tries) < ATTEMPTS and all(stolen > STOLEN_LIMIT for _, stolen in tries):
        tries.append(work())
    found, stolen = min(tries, key=lambda one: one[1])
    return found, {"stolen": stolen, "attempts": len(tries)}


def run_fio(line: Sequence[str], timeout_s: float, abandon: Callable[[], None]) -> tuple[dict[str, Any], Steal]:
    """fio's report, that of the attempt in which least was stolen.  Raises FioError."""

    def once() -> tuple[dict[str, Any], float]:
        stolen = Stolen()
        report = fio.run(line, timeout_s, abandon)
        return report, stolen.end()

    return least_stolen(once)


def sample(system: System, row: Row, number: int, runtime_s: float, ramp_s: float) -> Sample:
    """Run ``row`` on ``system``, again where the host took too much meanwhile.  Raises FioError."""

    def once() -> tuple[Sample, float]:
        os.sync()  # nobody pays for what another has left to be written
        usage, stolen = Usage(system.processes()), Stolen()
        line = fio.command(row, system.path(), FILE_BYTES, runtime_s, ramp_s)
        report = fio.run([*system.prefix(), *line], runtime_s + ramp_s + fio.END_S, system.close)
        share = stolen.end()
        cores, peaks = usage.end()
        found = fio.outcome(report["jobs"][0], row)
        figures = (round(found.p50_us, 1), round(found.p99_us, 1), round(found.iops, 1), cores, peaks)
        return Sample(system.name, row.name, round(found.value, 3), row.unit, number, *figures), share

    found, steal = least_stolen(once)
    return replace(found, **steal)


def fill(path: Path, size_bytes: int, prefix: list[str], abandon: Callable[[], None]) -> None:
    """Write a file once from end to end.  Raises FioError."""
    fio.run([*prefix, *fio.fill_command(FILL, path, size_bytes)], 120, abandon)


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Appends the seconds that the body took."""
    began = time.perf_counter()
    yield
    into.append(time.perf_counter() - began)
