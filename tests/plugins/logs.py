"""An undeclared log line of level warning or above fails the test, in this process or in one of a cluster.

Declared are those that match a marker ``expect_log(pattern)`` of the test or ``cluster.expect_log(pattern)``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from tests import cluster


class _Serious(logging.Handler):
    """Keeps what this process logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(f"{record.levelname.lower()}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def _no_undeclared_log_lines(request: pytest.FixtureRequest) -> Iterator[None]:
    allowed = [re.compile(mark.args[0]) for mark in request.node.iter_markers("expect_log")]
    handler = _Serious()
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
    found = [line for line in handler.kept if not any(p.search(line) for p in allowed)]
    found += _from_clusters(allowed)
    if found:
        pytest.fail("undeclared log lines:\n" + "\n".join(found[:20]), pytrace=False)


@pytest.fixture(autouse=True, scope="session")
def _no_undeclared_log_lines_at_the_end() -> Iterator[None]:
    yield
    if found := _from_clusters([]):
        pytest.fail("undeclared log lines after the last test:\n" + "\n".join(found[:20]), pytrace=False)


def _from_clusters(allowed: list[re.Pattern[str]]) -> list[str]:
    found: list[str] = []
    for one in list(cluster.LIVE):
        found += map(str, one.undeclared_log_lines(allowed))
        if not any(process.alive for process in one.processes.values()):
            cluster.LIVE.remove(one)
    return found
