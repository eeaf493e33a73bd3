"""A process is killed, stopped, delayed or fails at each step of each protocol, under a guest that writes.

The guest may notice a pause, and an error only where its role goes to another hypervisor.  What it was told is there,
the copies are equal, and all is in-sync again once the fault is over.  A point that isn't reached fails the test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import machine
from tests.cluster import Cluster, Process
from tests.machine import wait_for
from tests.processes.guest import QUICK, Recorder, create, in_sync, out_of_sync, wait_shown
from tests.processes.ledger import Ledger
from tests.processes.sample import sample
from ukai import faults

pytestmark = [pytest.mark.cluster, pytest.mark.fuse, pytest.mark.expect_log(r"")]  # who dies takes connections along

WRITER, REPLICA, OTHER = 1, 2, 3
BLOCK = 1 << 20
SETTINGS: dict[str, object] = {**QUICK, "active_limit": 4, "active_idle": 0.5, "active_age": 3, "sync_chunk": 64 << 10}
HIT_S = 20.0
AHEAD = 100_000
"""Passes between a guest and the one that takes its disk over while it still writes."""
PAUSE_SLACK_S = 8.0
DEFECTS = ("defect", "Traceback", "internal error")


class Stage:
    """One cluster for all cases of a kind of image, its image, and what its guests were told."""

    def __init__(self, root: Path, replication: str) -> None:
        self.replication = replication
        self.armed = root / "armed"
        self.armed.mkdir()
        settings = {**SETTINGS, "fault_dir": self.armed}
        self.cluster = Cluster(root / "cluster", nodes=3, frontends=(WRITER, OTHER), settings=settings)
        self.ledger = Ledger(root)

    @property
    def disk(self) -> Path:
        return self.cluster.path("disk", WRITER)

    def process(self, who: str) -> Process:
        if who == "metad":
            return self.cluster.process(1, "metad")
        return self.cluster.process(WRITER if who == "writer" else REPLICA, "blockd")

    def arm(self, who: str, point: str, order: str) -> Callable[[], bool]:
        """Put an order at a point; the result tells whether it was reached."""
        process = self.process(who)
        path = self.armed / f"{process.node}.{process.name}.{point}"
        path.with_name(path.name + ".hit").unlink(missing_ok=True)
        new = path.with_name(path.name + ".new")
        new.write_text(order)
        new.rename(path)
        return path.with_name(path.name + ".hit").exists

    def settle(self) -> None:
        """Everything whole: in-sync, equal, and nothing that was told is lost."""
        for path in self.armed.iterdir():
            path.unlink()
        self.cluster.heal()
        in_sync(self.cluster, "disk")
        assert self.cluster.compare_replicas("disk") == 32
        self.ledger.check(self.disk, crashes=0)
        for process in self.cluster.processes.values():
            for line in process.log.lines():
                assert not any(d in line.message for d in DEFECTS), line


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    one = Stage(tmp_path_factory.mktemp("points"), request.param)
    try:
        one.cluster.start_all()
        create(one.cluster, hypervisors=(WRITER, OTHER), options=("--replication", one.replication))
        yield one
    finally:
        faults = one.cluster.close()
    assert not faults, "; ".join(faults)


@dataclass(frozen=True, slots=True)
class Case:
    """At a point of one process an order is carried out; ``victim`` is killed while ``who`` stands still there."""

    phase: str
    who: str
    point: str
    order: str
    victim: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.phase, self.who, self.point, self.order.replace(" ", ""), self.victim)))


STEPS: list[tuple[str, str, str]] = [
    # phase, who, points
    ("grant", "writer", "grant.ask grant.reserved grant.fenced grant.held"),
    ("grant", "replica", "replica.fence replica.fenced"),
    ("grant", "metad", "metad.grant metad.commit"),
    ("write", "writer", "activate.ask activate.announced activate.stamped write.sent write.local write.answered"),
    ("write", "writer", "flush.begin flush.answered retire.flushed retire.done"),
    ("write", "replica", "replica.stamp replica.write replica.written replica.flush replica.flushed"),
    ("write", "metad", "metad.activate metad.retire metad.store metad.stored"),
    ("degrade", "writer", "mark.ask mark.committed"),
    ("degrade", "metad", "metad.mark"),
    ("idle", "metad", "metad.release"),
    ("takeover", "writer", "release.begin release.drained release.flushed"),
    ("takeover", "metad", "metad.displace metad.displaced"),
    ("sync", "writer", "sync.renewed sync.begun sync.compared sync.read sync.sent sync.complete sync.finish"),
    ("sync", "writer", "sync.finished"),
    ("sync", "replica", "replica.renew replica.complete"),
    ("sync", "metad", "metad.sync-begin metad.sync-finish"),
    ("register", "replica", "register.ask register.answered register.stored"),
    ("register", "metad", "metad.register"),
]
DEGRADED = [
    "activate.announced", "activate.stamped", "write.sent", "write.local", "write.answered",
    "mark.ask", "mark.committed", "flush.begin", "flush.answered",
]  # fmt: skip
"""Steps of a write whose replica is gone, at the writer."""

FENCED = [
    "activate.ask", "activate.announced", "activate.stamped", "write.sent", "write.local", "write.answered",
    "flush.begin", "flush.answered", "retire.flushed", "retire.done",
]  # fmt: skip
"""Steps of a write at which the writer stands still until another has its role."""

EARLY_PHASES = ("write", "degrade", "fence", "idle", "takeover")
"""What differs where a write is acknowledged before all replicas have answered."""


def cases() -> list[Case]:
    found = [
        Case(phase, who, point, order)
        for phase, who, points in STEPS
        for point in points.split()
        for order in ("kill", "stop", "delay 1", "error")
        if (order != "error" or point in faults.FAILING) and (order != "delay 1" or who == "writer")
    ]
    steps = [("writer", p) for p in DEGRADED] + [("metad", p) for p in ("metad.mark", "metad.store", "metad.stored")]
    found += [Case("degrade", who, p, "stop", v) for who, p in steps for v in ("writer", "replica", "metad")]
    found += [Case("fence", "writer", point, "stop") for point in FENCED]
    return found


def test_every_point_has_its_cases() -> None:
    assert {case.point for case in cases()} == set(faults.POINTS)


CASES = [("sync", case) for case in sample(cases(), 10)]
CASES += [("flush", case) for case in sample([c for c in cases() if c.phase in EARLY_PHASES], 4)]


@pytest.mark.parametrize(("stage", "case"), CASES, indirect=["stage"], ids=str)
def test_at_a_point(stage: Stage, case: Case) -> None:
    PHASES[case.phase](stage, case)
    stage.settle()


# --- what leads to the point


def _writing(stage: Stage, case: Case) -> None:
    """The guest writes here and there, so that blocks are announced, written, flushed and retired all the time."""
    with stage.ledger.start(stage.disk) as guest:
        guest.wait_written(20)
        _meet(stage, case, stage.arm(case.who, case.point, case.order))
        _goes_on(guest)


def _degrade(stage: Stage, case: Case) -> None:
    with stage.ledger.start(stage.disk) as guest:
        guest.wait_written(20)
        hit = stage.arm(case.who, case.point, case.order)
        if case.victim == "replica":
            stage.cluster.stop(REPLICA, "blockd")  # it is killed at the point
        else:
            stage.cluster.kill(REPLICA, "blockd")
        _meet(stage, case, hit)
        stage.cluster.heal()
        _goes_on(guest)


def _grant(stage: Stage, case: Case) -> None:
    _idle_image(stage)
    hit = stage.arm(case.who, case.point, case.order)
    with stage.ledger.start(stage.disk) as guest:
        _meet(stage, case, hit)
        _goes_on(guest)


def _release(stage: Stage, case: Case) -> None:
    with stage.ledger.start(stage.disk) as guest:
        guest.wait_written(20)
        hit = stage.arm(case.who, case.point, case.order)
        guest.end()
    _meet(stage, case, hit)


def _takeover(stage: Stage, case: Case) -> None:
    """The first write on the other hypervisor moves the role; the old guest may not write any more."""
    there = stage.cluster.path("disk", OTHER)
    wait_shown(stage.cluster, "disk", OTHER)
    with stage.ledger.start(stage.disk) as guest:
        guest.wait_written(20)
        hit = stage.arm(case.who, case.point, case.order)
        with stage.ledger.start(there, ahead=AHEAD) as new:
            _meet(stage, case, hit)
            wait_for(lambda: guest.popen.poll() is not None, "the old guest's disk failing", 40, stage.cluster.tails)
            assert guest.popen.returncode == 1
            _goes_on(new)
    stage.ledger.check(there, crashes=1)


def _fence(stage: Stage, case: Case) -> None:
    """The writer wakes up in the midst of a write, and its role is gone: it may change nothing any more (R1, R3)."""
    there = stage.cluster.path("disk", OTHER)
    wait_shown(stage.cluster, "disk", OTHER)
    with stage.ledger.start(stage.disk) as guest:
        guest.wait_written(20)
        hit, process = stage.arm(case.who, case.point, case.order), stage.process(case.who)
        _reach(stage, case, hit)
        with stage.ledger.start(there, ahead=AHEAD) as new:
            new.wait_written(10)
            stage.cluster.cont(process.node, process.name)
            wait_for(lambda: guest.popen.poll() is not None, "the old guest's disk failing", 40, stage.cluster.tails)
            assert guest.popen.returncode == 1
            _goes_on(new)
    stage.ledger.check(there, crashes=1)


def _sync(stage: Stage, case: Case) -> None:
    with stage.ledger.start(stage.disk) as guest:
        guest.wait_written(20)
        stage.cluster.kill(REPLICA, "blockd")
        guest.wait_pass()
        stage.cluster.start(REPLICA, "blockd")
        assert out_of_sync(stage.cluster, "disk", REPLICA)
        hit = stage.arm(case.who, case.point, case.order)
        stage.cluster.ctl("sync", "start", "disk")
        _meet(stage, case, hit)
        _goes_on(guest)


def _register(stage: Stage, case: Case) -> None:
    with stage.ledger.start(stage.disk) as guest:
        guest.wait_written(20)
        stage.cluster.kill(REPLICA, "blockd")
        hit = stage.arm(case.who, case.point, case.order)
        stage.cluster.start(REPLICA, "blockd", ready=False)
        _meet(stage, case, hit)
        _goes_on(guest)


PHASES: dict[str, Callable[[Stage, Case], None]] = {
    "write": _writing,
    "degrade": _degrade,
    "grant": _grant,
    "idle": _release,
    "takeover": _takeover,
    "fence": _fence,
    "sync": _sync,
    "register": _register,
}


# --- at the point, and afterwards


def _meet(stage: Stage, case: Case, hit: Callable[[], bool]) -> None:
    """Wait for the point, see that the order was carried out, and put an end to the fault."""
    cluster, process = stage.cluster, stage.process(case.who)
    _reach(stage, case, hit)
    if case.order == "kill":
        assert process.wait() == -9
        cluster.start(process.node, process.name, ready=False)
    elif case.order == "stop":
        if case.victim:
            victim = stage.process(case.victim)
            if victim.alive:
                cluster.kill(victim.node, victim.name)
            if case.victim != case.who:
                cluster.cont(process.node, process.name)
            if not victim.alive:
                cluster.start(victim.node, victim.name, ready=False)
        else:
            _wait_beyond_timeout(stage, process)
            cluster.cont(process.node, process.name)


def _reach(stage: Stage, case: Case, hit: Callable[[], bool]) -> None:
    process = stage.process(case.who)
    wait_for(hit, f"the point {case.point} at {process}", HIT_S, stage.cluster.tails)
    if case.order == "stop":
        wait_for(lambda: machine.process_state(process.pid) == "T", f"{process} stopped at {case.point}", 5)
        process.stopped = True


def _wait_beyond_timeout(stage: Stage, process: Process) -> None:
    """Until the others have noticed that a process stands still."""
    if process.name == "metad":
        return  # a stop of any length; nothing but its return tells

    def missed() -> bool:
        reply = stage.cluster.try_ask("errors")
        return reply is not None and any(n["address"] == process.node for n in reply["nodes"])

    wait_for(missed, f"{process} among what is unavailable", 20, stage.cluster.tails)


def _goes_on(guest: Recorder) -> None:
    """The guest has noticed nothing but a pause."""
    guest.wait_written(len(guest.slots) // 2)
    guest.end()
    limit_s = float(str(SETTINGS["io_timeout"])) + PAUSE_SLACK_S
    assert all(pause < limit_s for pause in guest.pauses_s[:1]), guest.pauses_s[:3]


def _idle_image(stage: Stage) -> None:
    wait_for(lambda: not stage.cluster.image("disk")["writer"], "the role given back", 20, stage.cluster.tails)
