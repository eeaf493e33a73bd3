"""Events that a guest may notice: its disk may fail, but what it was told is there, here or on the other hypervisor."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from tests.machine import wait_for
from tests.processes.guest import Recorder, wait_shown
from tests.processes.ledger import Ledger
from tests.processes.recorder import RECORD_BYTES
from tests.soak.events import METAD, Field

Scenario = Callable[[Field, Ledger, int, int], None]

BEFORE, AFTER = 40, 40
"""Records that are written before and after."""
END_S = 120.0


def _ended(recorder: Recorder) -> None:
    """The guest's disk fails: it must hear of it."""
    wait_for(lambda: recorder.popen.poll() is not None, "the old guest's disk failing", END_S)
    assert recorder.popen.returncode == 1, f"the old guest ended with {recorder.popen.returncode}"


def _go_on(field: Field, ledger: Ledger, host: int, crashes: int, *, more: Callable[[], object] = list) -> None:
    """What was told is there on ``host``, and it is written to there; ``more`` happens meanwhile."""
    disk = field.cluster.path("records", host)
    wait_shown(field.cluster, "records", host)
    ledger.check(disk, crashes)
    with ledger.start(disk, ahead=100_000) as recorder:
        recorder.wait_written(AFTER)
        more()
        recorder.wait_written(AFTER)
        recorder.end()
    ledger.check(disk, crashes=0)


def all_killed(field: Field, ledger: Ledger, home: int, _there: int) -> None:
    """Every process of every host at once."""
    with ledger.start(field.cluster.path("records", home)) as recorder:
        recorder.wait_written(BEFORE)
        for process in field.cluster.processes.values():
            process.signal(signal.SIGKILL)
        for process in field.cluster.processes.values():
            process.wait()
        _ended(recorder)
    field.heal()
    _go_on(field, ledger, home, crashes=1)


def writer_killed(field: Field, ledger: Ledger, home: int, there: int) -> None:
    """The writer's node dies; the machine is started on the other hypervisor."""
    with ledger.start(field.cluster.path("records", home)) as recorder:
        recorder.wait_written(BEFORE)
        for name in ("blockd", "frontend"):
            field.cluster.process(home, name).signal(signal.SIGKILL)
        for name in ("blockd", "frontend"):
            field.cluster.process(home, name).wait()
        _ended(recorder)
    _go_on(field, ledger, there, crashes=1, more=field.heal)


def writer_frozen(field: Field, ledger: Ledger, home: int, there: int) -> None:
    """The writer's node stands still, another takes over, the old one wakes up and must not write any more."""
    with ledger.start(field.cluster.path("records", home)) as recorder:
        recorder.wait_written(BEFORE)
        for name in field.chance.choice([["blockd"], ["frontend", "blockd"]]):
            field.cluster.stop(home, name)

        def wake() -> None:
            for name in ("blockd", "frontend"):
                if field.cluster.process(home, name).stopped:
                    field.cluster.cont(home, name)

        _go_on(field, ledger, there, crashes=1, more=wake)
        _ended(recorder)
    ledger.check(field.cluster.path("records", home), crashes=0)


def writer_cut_off(field: Field, ledger: Ledger, home: int, there: int) -> None:
    """All cables of the writer's host are cut; it goes on living, and hears of its loss when they are whole again."""
    with ledger.start(field.cluster.path("records", home)) as recorder:
        recorder.wait_written(BEFORE)
        for a, b in field.mesh.cables():
            if home in (a, b):
                field.mesh.cut(a, b)
        _go_on(field, ledger, there, crashes=1, more=field.mesh.join_all)
        _ended(recorder)
    ledger.check(field.cluster.path("records", home), crashes=0)


def frontend_killed(field: Field, ledger: Ledger, home: int, _there: int) -> None:
    with ledger.start(field.cluster.path("records", home)) as recorder:
        recorder.wait_written(BEFORE)
        field.cluster.kill(home, "frontend")
        _ended(recorder)
    field.heal()
    _go_on(field, ledger, home, crashes=1)


def migrated(field: Field, ledger: Ledger, home: int, there: int) -> None:
    """The role goes to the other hypervisor by order, while the old guest writes: it may not any more."""
    with ledger.start(field.cluster.path("records", home)) as recorder:
        recorder.wait_written(BEFORE)
        field.cluster.ctl("migrate", "records", field.cluster.node(there))
        _ended(recorder)
    _go_on(field, ledger, there, crashes=1)


def live_migration(field: Field, ledger: Ledger, home: int, there: int) -> None:
    """As QEMU does it: opened at the destination before the source stops; the first write there moves the role."""
    with ledger.start(field.cluster.path("records", home)) as recorder:
        recorder.wait_written(BEFORE)
        with field.cluster.path("records", there).open("r+b", buffering=0) as destination:
            recorder.wait_written(BEFORE)
            recorder.end()
            assert os.pwrite(destination.fileno(), bytes(512), (ledger.slots[-1] + 1) * RECORD_BYTES) == 512
    _go_on(field, ledger, there, crashes=0)


def two_cuts(field: Field, ledger: Ledger, home: int, _there: int) -> None:
    """Any two cables at once."""
    cables = field.chance.sample(field.mesh.cables(), 2)
    with ledger.start(field.cluster.path("records", home)) as recorder:
        recorder.wait_written(BEFORE)
        for a, b in cables:
            field.mesh.cut(a, b)
        wait_for(_settled_down(field, recorder), "a writer that goes on or has failed", END_S)
        field.heal()
        crashes = _end(recorder)
    _go_on(field, ledger, home, crashes)


def metad_and_writer(field: Field, ledger: Ledger, home: int, _there: int) -> None:
    """metad and the writer's blockd die at once."""
    with ledger.start(field.cluster.path("records", home)) as recorder:
        recorder.wait_written(BEFORE)
        for host, name in ((METAD, "metad"), (home, "blockd")):
            field.cluster.process(host, name).signal(signal.SIGKILL)
        for host, name in ((METAD, "metad"), (home, "blockd")):
            field.cluster.process(host, name).wait()
        field.heal()
        crashes = _end(recorder)
    _go_on(field, ledger, home, crashes)


def _settled_down(field: Field, recorder: Recorder) -> Callable[[], bool]:
    """Whether more was written since the cut, the guest has failed, or enough time has passed for either."""
    begun, looks = recorder.written, iter(range(field.chance.randrange(40, 200)))

    def look() -> bool:
        return recorder.popen.poll() is not None or recorder.written > begun + BEFORE or next(looks, None) is None

    return look


def _end(recorder: Recorder) -> int:
    """End a recorder whose disk may have failed; how many of its writes are unknown."""
    if recorder.popen.poll() is None:
        recorder.popen.send_signal(signal.SIGTERM)
    return 1 if recorder.popen.wait(END_S) else 0


SCENARIOS: list[tuple[str, Scenario]] = [
    ("all killed", all_killed),
    ("writer killed", writer_killed),
    ("writer frozen", writer_frozen),
    ("writer cut off", writer_cut_off),
    ("frontend killed", frontend_killed),
    ("migrated", migrated),
    ("live migration", live_migration),
    ("two cuts", two_cuts),
    ("metad and writer killed", metad_and_writer),
]
