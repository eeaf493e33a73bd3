"""The turns of a guest alone and beside a resync; no cluster runs here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from bench import resync
from bench.results import Results, Sample
from tests.cluster import Cluster

ALONE_US, BESIDE_US = (1000.0, 1200.0, 5000.0), (2400.0, 1500.0, 1800.0)
"""The p99 of a read in each turn; that of a write is ten times as long."""
BEGIN = ["kill 3", "fill", "start 3", "sync start resync"]
FINISH = ["sync rate resync none"]


class Fake:
    """A cluster, and the guest on it: what was done with them, in order."""

    def __init__(self, left_bytes: int) -> None:
        self.did: list[str] = []
        self._left_bytes, self._state = left_bytes, ""
        self._tails_us = [us for turn in zip(ALONE_US, BESIDE_US, strict=True) for us in turn]

    def kill(self, node: int, name: str) -> None:
        self.did.append(f"kill {node}")

    def start(self, node: int, name: str) -> None:
        self.did.append(f"start {node}")

    def ctl(self, *words: str) -> None:
        self.did.append(" ".join(words))
        self._state = "running" if "start" in words else "done"

    def ask(self, op: str, name: str) -> dict[str, Any]:
        job = {"image": name, "state": self._state, "bytes_total": resync.SIZE_BYTES}
        return {"jobs": [{**job, "bytes_done": resync.SIZE_BYTES - self._left_bytes}]}

    def image(self, name: str) -> dict[str, Any]:
        return {"health": "degraded"}

    def path(self, name: str) -> Path:
        return Path("/x")

    def run_fio(self, *args: object) -> tuple[dict[str, Any], dict[str, Any]]:
        self.did.append(f"guest, resync {self._state or 'done'}")
        tail_us = self._tails_us.pop(0)
        sides = {
            side: {
                "total_ios": 1,
                "iops": 5.0,
                "clat_ns": {"percentile": {"50.000000": 1000, "99.000000": tail_us * times * 1000}},
            }
            for side, times in (("read", 1), ("write", 10))
        }
        return {"jobs": [sides]}, {"stolen": 0.03, "attempts": 2}


def foreground(monkeypatch: pytest.MonkeyPatch, left_bytes: int) -> tuple[list[str], list[Sample]]:
    fake, kept = Fake(left_bytes), list[Sample]()
    monkeypatch.setattr(resync, "run_fio", fake.run_fio)
    monkeypatch.setattr(resync, "fill", lambda *args: fake.did.append("fill"))
    monkeypatch.setattr(resync, "_change_limit", lambda *args: fake.did.append("change"))
    resync._foreground(cast(Cluster, fake), kept.append, 4.0)
    return fake.did, kept


def test_each_turn_has_a_guest_alone_and_one_beside_a_resync_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    did, _ = foreground(monkeypatch, resync.CHANGE_BYTES)
    turn = ["guest, resync done", *BEGIN, "guest, resync running"]
    assert did == [*turn, *FINISH, *turn, *FINISH, *turn, "change"]


def test_a_change_of_the_limit_finds_enough_to_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    did, _ = foreground(monkeypatch, resync.CHANGE_BYTES - 1)
    assert did[-6:] == [*FINISH, *BEGIN, "change"]


def test_the_ratio_is_that_of_the_medians_over_the_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    _, kept = foreground(monkeypatch, resync.CHANGE_BYTES)
    found = Results(samples=kept)
    for side, times in (("read", 1), ("write", 10)):
        (ratio,) = found.of("resync", f"p99-{side}")
        assert ratio.value == 1.5
        for state, tails_us in (("alone", ALONE_US), ("beside", BESIDE_US)):
            guests = found.of("resync", f"guest-{state}-{side}")
            assert [(s.round, s.p99_us) for s in guests] == [(n, us * times) for n, us in enumerate(tails_us, 1)]
            assert {(s.stolen, s.attempts) for s in guests} == {(0.03, 2)}
