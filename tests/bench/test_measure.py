"""What is measured again since the host took the processor away, on a made-up /proc/stat."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import fio, measure
from bench.measure import Stolen, run_fio, sample
from bench.results import Sample
from bench.rows import BY_NAME
from bench.systems import Plain

CORES, TICKS_PER_S, RUN_S = 4, 100, 2.0
LIMIT_TICKS = 16  # 2 % of 2 s of 4 cores

Pass = Callable[[float, int], None]


@pytest.fixture
def passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pass:
    """Lets seconds pass, in which the host takes so many ticks."""
    stat, now_s, steal = tmp_path / "stat", 50.0, 89_551

    def on(seconds: float, ticks: int) -> None:
        nonlocal now_s, steal
        now_s, steal = now_s + seconds, steal + ticks
        others = round(now_s * 10)  # what the kernel, interrupts and guests of this machine took: it grows too
        stat.write_text(
            f"cpu  34306 2894 {others} 53503 1447 {others} {others} {steal} {others} 0\n"
            f"cpu0 17153 1447 {others} 26751 723 {others} {others} {steal // 3} {others} 0\n"
        )

    on(0, 0)
    monkeypatch.setattr(measure, "STAT", stat)
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: now_s))
    system = SimpleNamespace(sync=lambda: None, cpu_count=lambda: CORES, sysconf={"SC_CLK_TCK": TICKS_PER_S}.get)
    monkeypatch.setattr(measure, "os", system)
    return on


def fake_fio(monkeypatch: pytest.MonkeyPatch, passes: Pass, stolen: list[int]) -> list[list[str]]:
    """fio that finds 10, 20, 30 … /s while the host takes what ``stolen`` says; returns the lines it is run with."""
    lines: list[list[str]] = []

    def run(line: list[str], timeout_s: float, abandon: Callable[[], None]) -> dict[str, Any]:
        passes(RUN_S, stolen[len(lines)])
        lines.append(line)
        percentile = {"50.000000": 90_000, "99.000000": 400_000}
        side = {"total_ios": 100, "iops": 10.0 * len(lines), "clat_ns": {"percentile": percentile}}
        return {"jobs": [{"read": side, "write": {"total_ios": 0, "iops": 0.0}}]}

    monkeypatch.setattr(fio, "run", run)
    return lines


def take(directory: Path) -> Sample:
    system = Plain()
    system.setup(directory)
    return sample(system, BY_NAME["rand-read-1"], 1, RUN_S, 0.0)


def test_what_the_host_took_is_a_share_of_all_cores(passes: Pass) -> None:
    stolen = Stolen()
    passes(2.0, 80)
    assert stolen.end() == 0.1
    passes(2.0, 0)
    assert stolen.end() == 0.05
    stolen = Stolen()
    passes(3.0, 0)
    assert stolen.end() == 0


@pytest.mark.parametrize(
    ("stolen", "kept", "attempts"),
    [
        ([0], 0, 1),
        ([LIMIT_TICKS], 0, 1),
        ([LIMIT_TICKS + 1, LIMIT_TICKS], 1, 2),
        ([80, 40, 0], 2, 3),
        ([80, 40, 56], 1, 3),
        ([24, 40, 56], 0, 3),
    ],
)
def test_a_stolen_sample_is_measured_again_and_the_least_stolen_is_kept(
    stolen: list[int],
    kept: int,
    attempts: int,
    passes: Pass,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    lines = fake_fio(monkeypatch, passes, [*stolen, 0])
    found = take(tmp_path)
    assert len(lines) == found.attempts == attempts
    assert all(line == lines[0] for line in lines)
    assert found.value == 10 * (kept + 1)
    assert found.stolen == round(stolen[kept] / (RUN_S * CORES * TICKS_PER_S), 4)


def test_the_other_parts_keep_the_least_stolen_report_too(passes: Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = fake_fio(monkeypatch, passes, [80, 40, 56, 0])
    report, steal = run_fio(["fio"], 1, lambda: None)
    assert report["jobs"][0]["read"]["iops"] == 20
    assert steal == {"stolen": 0.05, "attempts": 3}
    assert len(lines) == 3


def test_each_sample_has_a_steal_of_its_own(passes: Pass, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_fio(monkeypatch, passes, [8, 0])
    assert [take(tmp_path).stolen for _ in range(2)] == [0.01, 0]
