"""A state machine over real processes: any order of an operator's and of fate's verbs, against a model of the bytes.

A failing order is made shorter by Hypothesis and printed as the calls that repeat it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.cluster import Cluster, CtlError
from tests.machine import wait_for
from tests.mesh import Mesh
from tests.processes.guest import QUICK, create, in_sync, wait_shown
from tests.processes.recorder import RECORD_BYTES, number_in, record
from tests.processes.sample import ALL, EXAMPLES, SEED

pytestmark = [pytest.mark.cluster, pytest.mark.fuse, pytest.mark.expect_log(r"")]

METAD, HYPERVISORS, BLOCKDS = 1, (2, 3), (2, 3, 4)
SLOTS, STEP = 12, 300
"""Records and how far they are apart: more than one to some blocks of 1 MiB."""
FAULTS_AT_ONCE = 2
SETTINGS: dict[str, object] = {**QUICK, "io_timeout": 4, "active_limit": 4, "active_idle": 0.5, "sync_chunk": 64 << 10}
PROCESSES = [(METAD, "metad"), *((host, "blockd") for host in BLOCKDS)]

hosts = st.sampled_from(HYPERVISORS)
slots = st.integers(0, SLOTS - 1)


class World:
    """One cluster for all runs; each has an image of its own."""

    def __init__(self, root: Path, mesh: Mesh) -> None:
        self.mesh = mesh
        self.cluster = Cluster(root / "cluster", mesh=mesh, blockds=BLOCKDS, frontends=HYPERVISORS, settings=SETTINGS)
        self.numbers = itertools.count(1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Mesh(4) as mesh:
        one = World(tmp_path_factory.mktemp("machine"), mesh)
        try:
            one.cluster.start_all()
            yield one
        finally:
            mesh.join_all()
            faults = one.cluster.close()
    assert not faults, "; ".join(faults)


class Machine(RuleBasedStateMachine):
    """``holds``: slot → the pass that is there; ``open``: slot → passes whose write failed and may still come."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.cluster, self.mesh = self.world.cluster, self.world.mesh
        self.image = f"disk{next(self.world.numbers)}"
        self.early = False
        """A flush image: what no fsync has covered may go with the writer, also what was read."""
        self.holds = dict.fromkeys(range(SLOTS), 0)
        self.open: dict[int, set[int]] = {slot: set() for slot in range(SLOTS)}
        self.passes = itertools.count(1)
        self.down: set[tuple[int, str]] = set()
        self.frozen: set[tuple[int, str]] = set()

    @initialize(early=st.booleans())
    def make(self, early: bool) -> None:
        self.early = early
        options = ("--replication", "flush" if early else "sync")
        create(self.cluster, self.image, locations=(2, 3), hypervisors=HYPERVISORS, options=options)

    # --- a guest

    @rule(host=hosts, slot=slots, fsync=st.booleans())
    def write(self, host: int, slot: int, fsync: bool) -> None:
        number = next(self.passes)
        try:
            with self._disk(host).open("r+b", buffering=0) as disk:
                assert os.pwrite(disk.fileno(), record(slot, number), self._at(slot)) == RECORD_BYTES
                if not self.early:
                    self._is(slot, number)
                if fsync or self.early:
                    os.fsync(disk.fileno())
                self._is(slot, number)
        except OSError:
            assert self.faulty, "a write failed though all is well"
            if self.holds[slot] != number:
                self.open[slot].add(number)

    @rule(host=hosts, slot=slots)
    def read(self, host: int, slot: int) -> None:
        try:
            self._look(host, slot)
        except OSError:
            assert self.faulty, "a read failed though all is well"

    def _look(self, host: int, slot: int) -> None:
        with self._disk(host).open("rb", buffering=0) as disk:
            number = number_in(os.pread(disk.fileno(), RECORD_BYTES, self._at(slot)), slot)
        assert number in self.open[slot] | {self.holds[slot]}, f"slot {slot} holds pass {number}: {self.holds[slot]}"
        if number != self.holds[slot] and not self.early:  # it may not go again
            self.holds[slot] = number
            self.open[slot].discard(number)

    def _is(self, slot: int, number: int) -> None:
        self.holds[slot] = number
        self.open[slot].clear()

    def _disk(self, host: int) -> Path:
        return self.cluster.path(self.image, host)

    @staticmethod
    def _at(slot: int) -> int:
        return slot * STEP * RECORD_BYTES

    # --- fate

    @property
    def faulty(self) -> int:
        return len(self.down) + len(self.frozen) + len(self.mesh.cut_cables)

    @precondition(lambda self: self.faulty < FAULTS_AT_ONCE)
    @rule(who=st.sampled_from(PROCESSES))
    def kill(self, who: tuple[int, str]) -> None:
        if who not in self.down:
            self.frozen.discard(who)
            self.cluster.kill(*who)
            self.down.add(who)

    @precondition(lambda self: self.faulty < FAULTS_AT_ONCE)
    @rule(who=st.sampled_from(PROCESSES))
    def stop(self, who: tuple[int, str]) -> None:
        if who not in self.down | self.frozen:
            self.cluster.stop(*who)
            self.frozen.add(who)

    @precondition(lambda self: self.faulty < FAULTS_AT_ONCE)
    @rule(cable=st.sampled_from(list(itertools.combinations((METAD, *BLOCKDS), 2))))
    def cut(self, cable: tuple[int, int]) -> None:
        self.mesh.cut(*cable)

    @precondition(lambda self: self.down)
    @rule()
    def start(self) -> None:
        for who in sorted(self.down):
            self.cluster.start(*who, ready=False)
        self.down.clear()

    @precondition(lambda self: self.frozen)
    @rule()
    def cont(self) -> None:
        for who in sorted(self.frozen):
            self.cluster.cont(*who)
        self.frozen.clear()

    @precondition(lambda self: self.mesh.cut_cables)
    @rule()
    def join(self) -> None:
        self.mesh.join_all()

    # --- an administrator

    @rule()
    def sync(self) -> None:
        self._order("sync", "start", self.image)

    @rule(host=hosts)
    def migrate(self, host: int) -> None:
        self._order("migrate", self.image, self.cluster.node(host))

    @rule(host=st.sampled_from(BLOCKDS))
    def add_location(self, host: int) -> None:
        self._order("location", "add", self.image, self.cluster.node(host))

    @rule(host=st.sampled_from(BLOCKDS))
    def remove_location(self, host: int) -> None:
        self._order("location", "remove", self.image, self.cluster.node(host))

    def _order(self, *args: str) -> None:
        """May be refused, or come to nothing: what it does to the data is looked at."""
        if self.cluster.try_ask("ping", 0.3) is not None:
            with contextlib.suppress(CtlError):
                self.cluster.ctl(*args, "--timeout", "3")

    @rule()
    def all_well(self) -> None:
        """Everything heals: all is in-sync in bounded time, the copies are equal, each byte is what it must be."""
        self.mesh.join_all()
        self.cluster.heal()
        self.down.clear()
        self.frozen.clear()
        in_sync(self.cluster, self.image)
        self.cluster.compare_replicas(self.image)
        for host in HYPERVISORS:
            wait_shown(self.cluster, self.image, host)
            for slot in range(SLOTS):
                self._look(host, slot)

    def teardown(self) -> None:
        try:
            self.all_well()
        finally:
            self.mesh.join_all()
            self.cluster.heal()
            self._forget()

    def _forget(self) -> None:
        wait_for(lambda: not self.cluster.image(self.image)["writer"], "the role given back", 20, self.cluster.tails)

        def removed() -> bool:
            """What metad knows of open handles is as old as the last beat."""
            return self.cluster.ctl_run("image", "remove", self.image, "--delete-data").returncode == 0

        wait_for(removed, f"{self.image} removed", 20, self.cluster.tails)


def test_any_order(world: World) -> None:
    class Here(Machine):
        pass

    Here.world = world
    wanted = settings(
        max_examples=EXAMPLES,
        stateful_step_count=25 if ALL else 12,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink) if ALL else (Phase.generate,),
    )
    run_state_machine_as_test(seed(SEED)(Here), settings=wanted)
