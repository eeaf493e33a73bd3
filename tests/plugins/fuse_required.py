"""With ``UKAI_REQUIRE_FUSE=1`` (``make test`` sets it) a test marked ``fuse`` that was skipped fails the run."""

from __future__ import annotations

import os

import pytest

_skipped: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> pytest.TestReport:
    """Turn a skip of a FUSE test into a failure where FUSE is required."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("fuse") and _required():
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: a FUSE test may not be skipped here (UKAI_REQUIRE_FUSE=1): {report.longrepr}"
        _skipped.append(item.nodeid)
    return report


def _required() -> bool:
    return os.environ.get("UKAI_REQUIRE_FUSE") == "1"
