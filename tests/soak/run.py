"""A soak over real processes: ``python -m tests.soak.run --minutes 30 [--seed N]``; exit 1 at a violation.

A cluster of four hosts, with a network of cables between them that can be cut, lives for an era of some minutes, with
settings that the seed draws; then the next one.  In a round of quiet events fio and a recorder write, and may notice
nothing but pauses; in a round of a loud event the recorder's disk may fail, and what it was told must be there, on
whichever hypervisor.  Each round ends with everything in-sync, the copies equal and all that was written verified.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests import machine
from tests.cluster import Cluster, CtlError
from tests.machine import tool, wait_for
from tests.mesh import Mesh
from tests.processes.guest import Recorder, in_sync, wait_shown
from tests.processes.ledger import Ledger
from tests.soak import loud
from tests.soak.events import IMAGES, Event, Field, quiet
from tests.soak.guests import Load, figures
from ukai.config import KEYS

ERA_S = 240.0
HYPERVISORS = (2, 3)
SMALL_BYTES = 512 << 20
GUEST_S = 240.0
SETTLE_S = 90.0
DEFECT = re.compile("defect|Traceback|the process ends|internal error")


class Soak:
    """The whole run: its chance, its clock and its figures."""

    def __init__(self, seed: int, seconds: float) -> None:
        self.chance = random.Random(seed)
        self.began = time.monotonic()
        self.until = self.began + seconds
        self.counts: Counter[str] = Counter()
        self.events: Counter[str] = Counter()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {time.time():.1f}  {text}", flush=True)  # as in the logs

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until

    def figures(self) -> str:
        c = self.counts
        events = ", ".join(f"{n} {kind}" for kind, n in sorted(self.events.items()))
        return (
            f"{c['eras']} eras, {c['rounds']} rounds; fio wrote {c['written'] >> 20} MiB and verified "
            f"{c['verified'] >> 20} MiB; {c['records']} records acknowledged, {c['looked']} looked at; "
            f"{c['copies']} copies of blocks compared; faults: {events or 'none'}"
        )


@contextlib.contextmanager
def small_filesystem(where: Path) -> Iterator[Path]:
    """A filesystem that can be filled, on a loop device."""
    image = where.with_suffix(".img")
    with image.open("wb") as file:
        file.truncate(SMALL_BYTES)
    subprocess.run([tool("mkfs.ext4"), "-q", "-m", "0", "-O", "^has_journal", image], check=True)
    where.mkdir()
    subprocess.run([tool("mount"), "-o", "loop", image, where], check=True)
    try:
        yield where
    finally:
        machine.unmount(where)
        image.unlink()


def era_settings(chance: random.Random) -> dict[str, object]:
    settings: dict[str, object] = {
        "replica_timeout": chance.choice([1.5, 3]),
        "lease": chance.choice([1.5, 3]),
        "beat_interval": 0.3,
        "role_linger": chance.choice([0.3, 2]),
        "io_timeout": 40,
        "sync_chunk": chance.choice([64 << 10, 1 << 20]),
        "active_limit": chance.choice([8, 128]),
        "active_idle": chance.choice([0.5, 10]),
        "active_age": chance.choice([3, 60]),
        "open_files_limit": chance.choice([16, 1024]),
    }
    if "short_circuit" in KEYS:
        settings["short_circuit"] = chance.choice(["true", "false"])
    if "busy_poll_us" in KEYS:
        settings["busy_poll_us"] = chance.choice([0, 300])
    if "aio" in KEYS:
        settings["aio"] = chance.choice(["true", "false"])
    return settings


def create(soak: Soak, cluster: Cluster, name: str) -> None:
    """An image of 64 MiB, as the seed wants it."""
    chance = soak.chance
    locations = chance.choice([(2, 3), (2, 4), (3, 4), (2, 3, 4), (2, 3, 4)])
    size, replication = chance.choice(["1M", "4M"]), chance.choice(["sync", "flush"])
    args = ["image", "create", name, "--size", "64M", "--block-size", size]
    args += [a for n in locations for a in ("--location", cluster.node(n))]
    args += [a for n in HYPERVISORS for a in ("--hypervisor", cluster.node(n))]
    optional = [["--replication", replication], ["--checksum"] if chance.random() < 0.3 else []]
    while True:
        try:
            cluster.ctl(*args, *itertools.chain.from_iterable(optional))
            break
        except CtlError:  # a release that has no such option yet
            if not optional:
                raise
            optional.pop()
    soak.say(f"image {name}: locations {locations}, blocks of {size} {optional}")


def load(chance: random.Random) -> Load:
    size, total = chance.choice([("4k", 8), ("16k", 16), ("64k", 32)])
    options = [
        f"--rw={chance.choice(['randwrite', 'randwrite', 'write'])}",
        f"--bs={size}",
        f"--iodepth={chance.choice([1, 8, 16])}",
        f"--size={total}m",
        f"--offset={chance.choice([0, 8])}m",
        f"--rate={chance.choice([1, 2])}m,{chance.choice([1, 2])}m",
        f"--randseed={chance.randrange(1 << 30)}",
    ]
    return Load(options)


class Era:
    """One cluster, from its start to its end."""

    def __init__(self, soak: Soak, field: Field, where: Path) -> None:
        self.soak, self.field, self.chance, self.where = soak, field, soak.chance, where
        self.ledger = Ledger(where)
        self.load: Load | None = None
        """What was written last as a whole."""

    def disk(self, name: str, host: int | None = None) -> Path:
        return self.field.cluster.path(name, self.field.home if host is None else host)

    def run(self) -> None:
        until = min(time.monotonic() + ERA_S, self.soak.until)
        number = 0
        while time.monotonic() < until:
            number += 1
            self.soak.counts["rounds"] += 1
            if number % 2:
                self.quiet_round()
            else:
                self.loud_round()
            self.settle()

    def quiet_round(self) -> None:
        self.field.home = self.chance.choice(HYPERVISORS)
        self.load = None
        new = load(self.chance)
        self.soak.say(f"quiet round on host {self.field.home}: fio {' '.join(new.options)}")
        for name in IMAGES:
            wait_shown(self.field.cluster, name, self.field.home)
        guest = new.start(self.disk("fio"), self.chance.choice([1, 64, 1024]))
        try:
            with self.ledger.start(self.disk("records")) as recorder:
                self.befall(guest, recorder)
                recorder.end()
            written, verified = figures(guest, GUEST_S)
        finally:
            self.end_guest(guest)
        self.soak.counts["written"] += written
        self.soak.counts["verified"] += verified
        self.ledger.check(self.disk("records"), crashes=0)
        self.load = new

    def befall(self, guest: subprocess.Popen[str], recorder: Recorder) -> None:
        """Quiet events, one or two at a time, until fio has ended."""
        under_way: list[tuple[float, Event]] = []
        try:
            while guest.poll() is None:
                assert recorder.popen.poll() is None, f"the recorder ended: {recorder.errors}"
                now = time.monotonic()
                for at, event in list(under_way):
                    if now >= at:
                        under_way.remove((at, event))
                        self.end_event(event)
                if len(under_way) < 2 and self.chance.random() < 0.5:
                    event = quiet(self.field)
                    if self.fits(event, [e for _, e in under_way]):
                        self.begin_event(event)
                        under_way.append((time.monotonic() + self.chance.uniform(0.2, 6), event))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    guest.wait(self.chance.uniform(0.2, 1.5))
        finally:
            for _, event in under_way:
                self.end_event(event)

    def fits(self, event: Event, others: list[Event]) -> bool:
        """Whether the guest can bear it beside what is under way: a process once, and never the last copy."""
        if any(event.what == other.what or event.kind == other.kind == "cut" for other in others):
            return False
        if any(other.kind in ("kill", "stop", "restart") and event.what in other.what for other in others):
            return False
        if not event.hosts:
            return True
        if all(self.field.spare(host) for host in event.hosts):
            return True
        for name in IMAGES:  # so that it fits soon
            self.field.order("sync", "start", name)
        return False

    def begin_event(self, event: Event) -> None:
        self.soak.events[event.kind] += 1
        self.soak.say(f"  {event.kind} {event.what}")
        self.field.hit |= event.hosts
        event.begin()

    def end_event(self, event: Event) -> None:
        self.soak.say(f"  over: {event.kind} {event.what}")
        event.end()
        self.field.hit -= event.hosts
        for name in IMAGES:
            if self.chance.random() < 0.5:
                self.field.order("sync", "start", name, "--rate", self.chance.choice(["8M", "none"]))

    def loud_round(self) -> None:
        home = self.field.home = self.chance.choice(HYPERVISORS)
        there = next(h for h in HYPERVISORS if h != home)
        kind, scenario = self.chance.choice(loud.SCENARIOS)
        self.soak.events[kind] += 1
        self.soak.say(f"loud round on host {home}: {kind}")
        for host in HYPERVISORS:
            wait_shown(self.field.cluster, "records", host)
        scenario(self.field, self.ledger, home, there)
        if self.load is not None:
            self.field.heal()
            guest = self.load.verify_again(self.disk("fio", self.chance.choice(HYPERVISORS)))
            try:
                self.soak.counts["verified"] += figures(guest, GUEST_S)[1]
            finally:
                self.end_guest(guest)

    def end_guest(self, guest: subprocess.Popen[str]) -> None:
        if guest.poll() is None:
            self.field.heal()  # else it may hang in a request until io_timeout
            guest.kill()
        guest.communicate(timeout=GUEST_S)

    def settle(self) -> None:
        """All healed: within bounded time all is in-sync, the copies are equal, the data are there."""
        cluster = self.field.cluster
        self.field.heal()
        for name in IMAGES:
            in_sync(cluster, name, SETTLE_S)
            wait_for(lambda name=name: not cluster.image(name)["writer"], "the role given back", SETTLE_S)  # type: ignore[misc]
            self.soak.counts["copies"] += cluster.compare_replicas(name)
        self.ledger.check(self.disk("records", self.chance.choice(HYPERVISORS)), crashes=0)
        for process in cluster.processes.values():
            for line in process.log.news():
                if line.level == "raw" or DEFECT.search(line.message):
                    raise AssertionError(f"a defect in a log: {line}")


def run_era(soak: Soak, where: Path) -> None:
    settings = era_settings(soak.chance)
    binding = soak.chance.choice(["auto", "auto", "fusepy"])
    small_host = soak.chance.choice([2, 3, 4])
    soak.counts["eras"] += 1
    soak.say(f"era {soak.counts['eras']}: {settings} binding {binding}, small disk on host {small_host}")
    where.mkdir()
    with contextlib.ExitStack() as stack:
        small = stack.enter_context(small_filesystem(where / "small"))
        mesh = stack.enter_context(Mesh(4))
        cluster = Cluster(
            where / "cluster", mesh=mesh, blockds=(2, 3, 4), frontends=HYPERVISORS, binding=binding, settings=settings
        )
        data = cluster.data_root(small_host)
        data.parent.mkdir(parents=True)
        (small / "data").mkdir()
        data.symlink_to(small / "data")
        try:
            cluster.start_all()
            for name in IMAGES:
                create(soak, cluster, name)
            era = Era(soak, Field(cluster, mesh, soak.chance, (small_host, small)), where)
            try:
                era.run()
            finally:
                soak.counts["records"] += era.ledger.written
                soak.counts["looked"] += era.ledger.verified
        except BaseException:
            mesh.join_all()
            (small / "filler").unlink(missing_ok=True)
            cluster.close()
            raise
        faults = cluster.close()
        assert not faults, "; ".join(faults)
    shutil.rmtree(where)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = secrets.randbits(32) if options.seed is None else options.seed
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    root = Path(tempfile.mkdtemp(prefix="ukai-soak-"))
    soak = Soak(seed, options.minutes * 60)
    soak.say(f"seed {seed}, {options.minutes:g} minutes")
    ending, code = "ok, 0 violations", 0
    try:
        while not soak.over:
            run_era(soak, root / f"era{soak.counts['eras'] + 1}")
    except KeyboardInterrupt:
        ending, code = "interrupted, 0 violations", 130
    except Exception as e:
        soak.say(f"VIOLATION, seed {seed}: {type(e).__name__}: {e}")
        ending, code = f"FAILED; logs and data are in {root}", 1
    if code != 1:
        shutil.rmtree(root, ignore_errors=True)
    soak.say(f"seed {seed}: {ending}; {soak.figures()}")
    return code


if __name__ == "__main__":
    sys.exit(main())
