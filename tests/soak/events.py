"""What befalls the cluster of a soak while its guests write: each event has a beginning and an end.

A quiet one must not be noticed by a guest but for a pause: it takes from no block its last in-sync copy that can be
reached, and lasts less than ``io_timeout``.  A loud one may end the guests, and then what they were told is looked at.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import Cluster, CtlError
from tests.mesh import Mesh

METAD = 1
IN_SYNC = 0
ORDER_S = 5
UNKNOWN = 1 << 62
"""An epoch that metad could not be asked for: nothing more that takes copies away until all is healed."""
IMAGES = ("fio", "records")


class Field:
    """The cluster of one era, and what is amiss in it now."""

    def __init__(self, cluster: Cluster, mesh: Mesh, chance: random.Random, small: tuple[int, Path]) -> None:
        self.cluster, self.mesh, self.chance = cluster, mesh, chance
        self.home = 2
        """The host on which the guests run."""
        self.small_host, self.small = small
        self.hit: set[int] = set()
        """Hosts whose copies can't be counted on now."""
        self.ended: dict[str, int] = {}
        """image → epoch of a writer that was killed: until the next, what it wrote may yet go out-of-sync (R5)."""

    @property
    def hosts(self) -> list[int]:
        return [n for n in self.mesh.numbers if n != METAD]

    def spare(self, host: int) -> bool:
        """Whether every block has an in-sync copy on a host that is neither this one nor hit."""
        gone = {self.cluster.node(h) for h in self.hit | {host}}
        reply = self.cluster.try_ask("image.list")
        if reply is None:
            return False
        for image in reply["images"]:
            shown = self.cluster.try_ask("image.show", name=image["name"])
            if shown is None or shown["image"]["epoch"] <= self.ended.get(image["name"], -1):
                return False
            for part in shown["image"]["placement"]:
                if not any(r["status"] == IN_SYNC for n, r in part["replicas"].items() if n not in gone):
                    return False
        return True

    def kill_writer(self) -> None:
        """blockd on the guests' host is killed: its blocks are compared once it has the role again."""
        for name in IMAGES:
            shown = self.cluster.try_ask("image.show", name=name)
            self.ended[name] = shown["image"]["epoch"] if shown is not None else UNKNOWN
        self.cluster.kill(self.home, "blockd")

    def fill_disk(self) -> None:
        stats = os.statvfs(self.small)
        with (self.small / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, stats.f_bavail - 8) * stats.f_frsize)

    def free_disk(self) -> None:
        (self.small / "filler").unlink(missing_ok=True)

    def order(self, *args: str) -> str:
        """An administrator's order, which may be refused; what came of it."""
        if self.cluster.try_ask("ping", 0.5) is None:
            return "metad is away"
        try:
            self.cluster.ctl(*args, "--timeout", str(ORDER_S))
        except CtlError as e:
            return f"refused: {e.stderr.strip()[:120]}"
        return "done"

    def heal(self) -> None:
        """All cables are whole, all processes run, the disk has room."""
        self.mesh.join_all()
        self.free_disk()
        self.cluster.heal()
        self.hit.clear()
        self.ended.clear()


@dataclass(slots=True)
class Event:
    """One thing that happens."""

    kind: str
    what: str
    hosts: set[int]
    """Hosts whose copies can't be counted on meanwhile."""
    begin: Callable[[], object]
    end: Callable[[], object]


def _kill(field: Field, host: int, name: str, hosts: set[int]) -> Event:
    c = field.cluster
    where = f"{name} of host {host}"
    return Event("kill", where, hosts, lambda: c.kill(host, name), lambda: c.start(host, name, ready=False))


def _stop(field: Field, host: int, name: str, hosts: set[int]) -> Event:
    c = field.cluster
    return Event("stop", f"{name} of host {host}", hosts, lambda: c.stop(host, name), lambda: c.cont(host, name))


def _restart(field: Field, host: int, name: str, hosts: set[int]) -> Event:
    c = field.cluster
    return Event(
        "restart",
        f"{name} of host {host}",
        hosts,
        lambda: c.kill(host, name, signal.SIGTERM),
        lambda: c.start(host, name, ready=False),
    )


def _cut(field: Field, cables: list[tuple[int, int]], hosts: set[int]) -> Event:
    def join() -> None:
        for a, b in cables:
            field.mesh.join(a, b)

    def cut() -> None:
        for a, b in cables:
            field.mesh.cut(a, b)

    return Event("cut", " and ".join(f"{a}–{b}" for a, b in cables), hosts, cut, join)


def quiet(field: Field) -> Event:
    """Draw one; the caller looks whether its hosts can be spared."""
    chance, home = field.chance, field.home
    others = [h for h in field.hosts if h != home]
    other = chance.choice(others)
    make: list[Callable[[], Event]] = [
        lambda: _kill(field, other, "blockd", {other}),
        lambda: _kill(field, other, "blockd", {other}),
        lambda: _stop(field, other, "blockd", {other}),
        lambda: _restart(field, other, "blockd", {other}),
        lambda: Event(
            "kill",
            f"blockd of host {home}",
            set(),
            field.kill_writer,
            lambda: field.cluster.start(home, "blockd", ready=False),
        ),
        lambda: _stop(field, home, "blockd", set()),
        lambda: _kill(field, METAD, "metad", set()),
        lambda: _stop(field, METAD, "metad", set()),
        lambda: _restart(field, METAD, "metad", set()),
        lambda: _cut(field, [_pair(home, other)], {other}),
        lambda: _cut(field, [_pair(*others)], set()),
        lambda: _cut(field, [(METAD, other)], set()),
        lambda: _cut(field, [(METAD, home)], set()),
        lambda: _cut(field, [(METAD, other), _pair(home, other)], {other}),
        lambda: Event("disk full", f"host {field.small_host}", {field.small_host}, field.fill_disk, field.free_disk),
        lambda: _sync(field),
        lambda: _location(field, other),
    ]
    return chance.choice(make)()


def _pair(a: int, b: int) -> tuple[int, int]:
    return min(a, b), max(a, b)


def _sync(field: Field) -> Event:
    """A resync at a rate that lets the next events meet it."""
    image = field.chance.choice(IMAGES)
    rate = field.chance.choice(["4M", "16M", "none"])
    return Event(
        "resync",
        f"{image} at {rate}",
        set(),
        lambda: field.order("sync", "start", image, "--rate", rate),
        (lambda: field.order("sync", "stop", image)) if field.chance.random() < 0.3 else list,
    )


def _location(field: Field, host: int) -> Event:
    """A location goes, with its data, and comes again."""
    node = field.cluster.node(host)
    image = field.chance.choice(IMAGES)
    return Event(
        "location",
        f"{image} without host {host}",
        {host},
        lambda: field.order("location", "remove", image, node),
        lambda: field.order("location", "add", image, node),
    )
