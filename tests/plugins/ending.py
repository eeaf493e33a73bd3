"""A run that is told to end (SIGTERM) ends what its fixtures began, as after Ctrl-C.

A shell starts what runs in its background with SIGINT ignored, and so would all processes of the tests be.
"""

from __future__ import annotations

import signal

import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
