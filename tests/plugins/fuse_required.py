"""With ``UKAI_REQUIRE_FUSE=1`` (``make test`` sets it) a test marked ``fuse`` that would be skipped fails."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn the skip of a FUSE test into a failure where FUSE is required."""
    report = yield
    required = os.environ.get("UKAI_REQUIRE_FUSE") == "1" and item.get_closest_marker("fuse") is not None
    if required and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"a FUSE test may not be skipped where UKAI_REQUIRE_FUSE=1: {report.longrepr}"
    return report
