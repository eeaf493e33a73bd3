"""What a test may not do makes it fail: shown with a run of pytest on tests that do it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.machine import wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
PLUGINS = ("tests.plugins.ending", "tests.plugins.leaks", "tests.plugins.logs", "tests.plugins.fuse_required")

OFFENDERS = {
    "an undeclared warning": ('logging.getLogger("x").warning("disk on fire")', "undeclared log lines"),
    "a thread": ('threading.Thread(target=time.sleep, args=(1,), name="leaky", daemon=True).start()', "thread leaky"),
    "a socket": ("KEPT.append(socket.socket())", "left behind: socket:"),
    "a process": ('KEPT.append(subprocess.Popen(["sleep", "8"]))', "sleep 8"),
    "a skipped FUSE test": ('pytest.skip("no FUSE here")', "may not be skipped"),
    "a Python warning": ('warnings.warn("old", DeprecationWarning)', "DeprecationWarning: old"),
}


HEAD = """
import logging, socket, subprocess, threading, time, warnings
import pytest
from tests.plugins import leaks

leaks.GRACE_S = 0.1
KEPT = []
pytestmark = [pytest.mark.fuse, pytest.mark.expect_log("smoke")]
"""


def command(path: Path) -> list[str | Path]:
    plugins = [option for name in PLUGINS for option in ("-p", name)]
    return [sys.executable, "-m", "pytest", "-q", "-c", REPOSITORY / "pyproject.toml", *plugins, path]


def run_pytest(path: Path, bodies: Mapping[str, str]) -> str:
    tests = [f"def test_{name.replace(' ', '_')}():\n    {body}\n" for name, body in bodies.items()]
    path.write_text("\n".join([HEAD, *tests]))
    done = subprocess.run(
        command(path),
        env={**os.environ, "UKAI_REQUIRE_FUSE": "1", "COLUMNS": "200"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


def test_each_offender_fails_and_a_declared_warning_does_not(tmp_path: Path) -> None:
    bodies = {"declared smoke": 'logging.getLogger("x").warning("smoke")'}
    bodies |= {name: body for name, (body, _) in OFFENDERS.items()}
    out = run_pytest(tmp_path / "test_offenders.py", bodies)
    summary = [line for line in out.splitlines() if line.startswith(("FAILED", "ERROR"))]
    for name, (_, message) in OFFENDERS.items():
        assert any(name.replace(" ", "_") in line for line in summary), f"{name} did not fail\n{out}"
        assert message in out
    assert not any("smoke" in line for line in summary), out


def test_a_run_that_is_told_to_end_ends_what_it_began(tmp_path: Path) -> None:
    path, begun, ended = tmp_path / "test_long.py", tmp_path / "begun", tmp_path / "ended"
    path.write_text(LONG.format(begun=str(begun), ended=str(ended)))
    process = subprocess.Popen(command(path), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        wait_for(begun.exists, "the test to begin", 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 2, "interrupted"
    finally:
        process.kill()
        process.wait()
    assert ended.exists()


LONG = """
import pathlib, time
import pytest

@pytest.fixture(scope="module")
def cluster():
    yield
    pathlib.Path({ended!r}).touch()

def test_long(cluster):
    pathlib.Path({begun!r}).touch()
    time.sleep(60)
"""
