"""The table of fault points and the code that has them agree; what is armed acts once, and tells."""

from __future__ import annotations

import ast
import asyncio
import signal
import subprocess
import sys
import timeit
from collections.abc import Iterator
from pathlib import Path

import pytest

import ukai
from tests.machine import process_state, wait_for
from ukai import fault_dir, faults
from ukai.errors import DiskError, UkaiError

ROOT = Path(ukai.__file__).parent
NODE = "127.0.0.1"
POINT_S = 1e-6
"""A point that is off may take no longer: a write of 4 KiB has four, and takes some 300 µs."""


def _used() -> Iterator[str]:
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("point", "pause")
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "faults"
            ):
                (name,) = node.args
                assert isinstance(name, ast.Constant), f"{path}: a name is wanted"
                assert type(name.value) is str
                yield name.value


def test_each_point_of_the_table_is_used_once_and_no_other() -> None:
    assert sorted(_used()) == sorted(faults.POINTS)
    assert faults.POINTS.keys() >= faults.FAILING


def test_off_a_point_costs_next_to_nothing() -> None:
    times = 100_000
    assert min(timeit.repeat(lambda: faults.point("write.sent"), number=times, repeat=3)) / times < POINT_S


def _arm(root: Path, point: str, order: str) -> Path:
    path = root / f"{NODE}.blockd.{point}"
    path.write_text(order)
    return path


def test_it_acts_the_nth_time_once_and_tells(tmp_path: Path) -> None:
    acting = fault_dir.FaultDir(str(tmp_path), NODE, "blockd")
    assert acting.act("write.sent") == 0
    path = _arm(tmp_path, "write.sent", "error @3")
    assert [acting.act("write.sent"), acting.act("write.sent")] == [0, 0]
    with pytest.raises(DiskError, match=r"write\.sent"):
        acting.act("write.sent")
    assert not path.exists()
    assert path.with_name(path.name + ".hit").exists()
    assert acting.act("write.sent") == 0
    _arm(tmp_path, "grant.ask", "delay 1.5")
    assert acting.act("grant.ask") == 1.5
    _arm(tmp_path, "write.answered", "error")
    with pytest.raises(AssertionError, match="can't fail"):
        acting.act("write.answered")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_it_kills_and_stops_its_own_process(tmp_path: Path, number: signal.Signals) -> None:
    path = _arm(tmp_path, "write.sent", "kill" if number == signal.SIGKILL else "stop")
    source = (
        f"from ukai import fault_dir, faults; fault_dir.arm({str(tmp_path)!r}, {NODE!r}, 'blockd'); "
        "faults.point('write.sent'); print('went on')"
    )
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE) as process:
        if number == signal.SIGKILL:
            assert process.wait(20) == -number
            return
        wait_for(lambda: path.with_name(path.name + ".hit").exists(), "the hit", 20)
        wait_for(lambda: process_state(process.pid) == "T", "the stop", 20)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=20)[0] == b"went on\n"


def test_a_pause_waits_and_lets_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_act", lambda _name: 0.05)

    async def both() -> list[str]:
        order: list[str] = []

        async def paused() -> None:
            await faults.pause("grant.ask")
            order.append("paused")

        async def other() -> None:
            order.append("other")

        await asyncio.gather(paused(), other())
        return order

    assert asyncio.run(both()) == ["other", "paused"]


def test_a_directory_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(UkaiError, match="leave it empty"):
        fault_dir.arm(str(tmp_path / "none"), NODE, "blockd")
