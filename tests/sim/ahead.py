"""Seeds that tests look at, run by a process beside: it begins with the first of all tests, most of which only wait.

It gets the time of a processor that nobody else wants.  Where no other tests run, it begins when it is asked.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import psutil
import pytest

from tests.sim.run import ROOT

HANDS = 2

Records = list[dict[str, Any]]
Jobs = dict[str, Callable[[], Records]]


class Beside:
    """The process."""

    def __init__(self, idle: bool) -> None:
        self._told: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  # for as long as the process
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "tests.sim.ahead", *(["--idle"] if idle else [])]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdout=self._told, stderr=self._errors, start_new_session=True
        )
        self._records: dict[str, Records] = {}

    def pids(self) -> set[int]:
        try:
            process = psutil.Process(self._process.pid)
            return {process.pid, *(child.pid for child in process.children(recursive=True))}
        except psutil.NoSuchProcess:
            return set()

    def records(self) -> dict[str, Records]:
        """What the seeds of each job told, once all have ended well."""
        if not self._records:
            self._process.wait()
            self._errors.seek(0)
            assert self._process.returncode == 0, self._errors.read()[-2000:]
            self._told.seek(0)
            self._records = dict(json.loads(line) for line in self._told)
        return self._records

    def end(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


BESIDE: list[Beside] = []
"""None or one."""


def records(job: str) -> Records:
    """What the seeds of a job told, one after the other."""
    if not BESIDE:
        BESIDE.append(Beside(idle=False))
    return BESIDE[0].records()[job]


def pids() -> Iterable[int]:
    """Processes that are no test's."""
    return BESIDE[0].pids() if BESIDE else ()


def pytest_collection_finish(session: pytest.Session) -> None:
    wanted = {"test_no_seed_fails", "test_a_broken_rule_is_caught"} & {i.name.partition("[")[0] for i in session.items}
    beside_others = any(item.get_closest_marker("cluster") is not None for item in session.items)
    if wanted and beside_others and not session.config.option.collectonly:
        BESIDE.append(Beside(idle=True))


def pytest_unconfigure() -> None:
    for one in BESIDE:
        one.end()


def main() -> None:
    from tests.sim import test_mutations, test_seeds

    if "--idle" in sys.argv:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with ThreadPoolExecutor(HANDS) as hands:

        def done(jobs: Jobs) -> dict[str, Records]:
            return dict(zip(jobs, hands.map(lambda job: job(), jobs.values()), strict=True))

        told = done({**test_mutations.JOBS, **test_seeds.JOBS})
        told |= done(test_mutations.unbroken(told))
    for item in told.items():
        sys.stdout.write(json.dumps(item) + "\n")


if __name__ == "__main__":
    main()
