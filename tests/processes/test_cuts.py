"""Cables between four hosts are cut, one or two at once, while a guest writes, the role moves, or a resync runs.

One host has metad, three have a blockd each; the image has copies on two of those and may be opened on two.  Writes
are answered in their time, with an error at worst; what was told is there, the copies are equal, and once the cables
are whole everything is in-sync again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.machine import wait_for
from tests.mesh import Mesh
from tests.processes.guest import QUICK, Recorder, create, in_sync, out_of_sync, wait_shown
from tests.processes.ledger import Ledger
from tests.processes.sample import sample

pytestmark = [pytest.mark.cluster, pytest.mark.fuse, pytest.mark.expect_log(r"")]

METAD, WRITER, REPLICA, OTHER = 1, 2, 3, 4
SETTINGS: dict[str, object] = {**QUICK, "io_timeout": 6, "active_limit": 4, "active_idle": 0.5, "sync_chunk": 64 << 10}
ANSWER_S = 6 + 6
"""io_timeout, and what a busy machine may add."""

AHEAD = 100_000
"""Passes between a guest and the one that takes its disk over while it still writes."""

Cables = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Case:
    phase: str
    cables: Cables

    def __str__(self) -> str:
        return f"{self.phase}-{'+'.join(f'{a}{b}' for a, b in self.cables)}"


def cases() -> list[Case]:
    single = list(itertools.combinations((METAD, WRITER, REPLICA, OTHER), 2))
    cuts: list[Cables] = [*((c,) for c in single), *itertools.combinations(single, 2)]
    return [Case(phase, cables) for phase in ("write", "takeover", "sync") for cables in cuts]


class Field:
    """One cluster for all cases."""

    def __init__(self, root: Path, mesh: Mesh) -> None:
        self.mesh = mesh
        self.cluster = Cluster(
            root / "cluster", mesh=mesh, blockds=(WRITER, REPLICA, OTHER), frontends=(WRITER, OTHER), settings=SETTINGS
        )
        self.ledger = Ledger(root)

    def disk(self, host: int = WRITER) -> Path:
        return self.cluster.path("disk", host)

    def cut(self, cables: Cables) -> None:
        for a, b in cables:
            self.mesh.cut(a, b)

    def settle(self, crashes: int) -> None:
        self.mesh.join_all()
        self.cluster.wait_ready()
        in_sync(self.cluster, "disk")
        self.cluster.compare_replicas("disk")
        for host in (WRITER, OTHER):
            wait_shown(self.cluster, "disk", host)
            self.ledger.check(self.disk(host), crashes)
            crashes = 0
        in_sync(self.cluster, "disk")  # a writer that was cut off may have left blocks active until this grant (R5)
        assert self.cluster.compare_replicas("disk") == 32


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    with Mesh(4) as mesh:
        one = Field(tmp_path_factory.mktemp("cuts"), mesh)
        try:
            one.cluster.start_all()
            create(one.cluster, locations=(WRITER, REPLICA), hypervisors=(WRITER, OTHER))
            yield one
        finally:
            mesh.join_all()
            faults = one.cluster.close()
    assert not faults, "; ".join(faults)


def test_all_single_and_double_cuts_are_there() -> None:
    assert len(cases()) == 3 * (6 + 15)


@pytest.mark.parametrize("case", sample(cases(), 3), ids=str)
def test_cut(field: Field, case: Case) -> None:
    field.settle(PHASES[case.phase](field, case.cables))


def _write(field: Field, cables: Cables) -> int:
    with field.ledger.start(field.disk()) as guest:
        guest.wait_written(20)
        field.cut(cables)
        _answered(guest, 20)
        field.mesh.join_all()
        return _end(guest)


def _takeover(field: Field, cables: Cables) -> int:
    """A guest begins on the other hypervisor while the cables are cut; one of the two goes on, or none."""
    with field.ledger.start(field.disk()) as old:
        old.wait_written(20)
        field.cut(cables)
        with field.ledger.start(field.disk(OTHER), AHEAD) as new:
            _answered(new, 20)
            field.mesh.join_all()
            wait_for(lambda: old.popen.poll() is not None or new.popen.poll() is not None, "one guest's end", 30)
            return _end(old) + _end(new)


def _sync(field: Field, cables: Cables) -> int:
    with field.ledger.start(field.disk()) as guest:
        guest.wait_written(20)
        field.cluster.kill(REPLICA, "blockd")
        guest.wait_pass()
        field.cluster.start(REPLICA, "blockd")
        assert out_of_sync(field.cluster, "disk", REPLICA)
        field.cluster.ctl("sync", "start", "disk", "--rate", "4M")
        field.cut(cables)
        _answered(guest, 20)
        field.mesh.join_all()
        return _end(guest)


PHASES: dict[str, Callable[[Field, Cables], int]] = {"write": _write, "takeover": _takeover, "sync": _sync}


def _answered(guest: Recorder, more: int) -> None:
    """Until so many writes more are acknowledged or one has failed: each is answered in its time."""
    goal = guest.written + more
    wait_for(lambda: guest.popen.poll() is not None or guest.written >= goal, "answers to the guest's writes", ANSWER_S)


def _end(guest: Recorder) -> int:
    """How many writes of the guest are unknown: one if its disk failed."""
    if guest.popen.poll() is None:
        guest.popen.terminate()
    assert all(pause < ANSWER_S for pause in guest.pauses_s[:1]), guest.pauses_s[:3]
    return 1 if guest.popen.wait(ANSWER_S) else 0
