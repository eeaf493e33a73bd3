"""One sample: fio on a system's file, and what its processes took meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from bench import fio
from bench.results import Sample
from bench.rows import FILL, Row
from bench.systems import FILE_BYTES, System


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


def sample(system: System, row: Row, number: int, runtime_s: float, ramp_s: float) -> Sample:
    """Run ``row`` on ``system``.  Raises FioError."""
    os.sync()  # nobody pays for what another has left to be written
    usage = Usage(system.processes())
    line = fio.command(row, system.path(), FILE_BYTES, runtime_s, ramp_s)
    report = fio.run([*system.prefix(), *line], runtime_s + ramp_s + fio.END_S, system.close)
    cores, peaks = usage.end()
    found = fio.outcome(report["jobs"][0], row)
    return Sample(
        *(system.name, row.name, round(found.value, 3), row.unit, number),
        *(round(found.p50_us, 1), round(found.p99_us, 1), round(found.iops, 1), cores, peaks),
    )


def fill(path: Path, size_bytes: int, prefix: list[str], abandon: Callable[[], None]) -> None:
    """Write a file once from end to end.  Raises FioError."""
    fio.run([*prefix, *fio.fill_command(FILL, path, size_bytes)], 120, abandon)


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Appends the seconds that the body took."""
    began = time.perf_counter()
    yield
    into.append(time.perf_counter() - began)
