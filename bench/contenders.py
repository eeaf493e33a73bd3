"""Who takes part, in which rows and how often; started when first wanted, dropped when it fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import measure
from bench.results import Results
from bench.rows import ROWS
from bench.systems import FILE_BYTES, Binding, GlusterFS, Image, MooseFS, Plain, System, Ukai

ALL = tuple(row.name for row in ROWS)
READS = tuple(row.name for row in ROWS if row.side == "read")
PEERS = ("glusterfs", "moosefs")


@dataclass(frozen=True)
class Contender:
    """``rows`` it takes part in; ``every_round``, or in the first only."""

    make: Callable[[], System]
    rows: tuple[str, ...] = ALL
    every_round: bool = True


class Contenders:
    """All of them.  ``directory`` gets a subdirectory for each."""

    def __init__(self, directory: Path, results: Results) -> None:
        self._directory, self._results = directory, results
        self.ukai, self._via_blockd = Ukai(), Ukai({"short_circuit": False})
        self.table: dict[str, Contender] = {
            "plain": Contender(Plain, every_round=False),
            "binding": Contender(Binding),
            "glusterfs": Contender(GlusterFS),
            "moosefs": Contender(MooseFS),
            "ukai": Contender(lambda: Image("ukai", "2 replicas, one of them local", self.ukai, (1, 2))),
            "ukai-flush": Contender(
                lambda: Image(
                    *("ukai-flush", "2 replicas, one of them local, replication=flush", self.ukai, (1, 2)),
                    *("--replication", "flush"),
                )
            ),
            "ukai-remote": Contender(
                lambda: Image("ukai-remote", "2 replicas, none on the hypervisor", self.ukai, (2, 3)),
                rows=("rand-read-1", "seq-read", "rand-write-1"),
            ),
            "ukai-1": Contender(lambda: Image("ukai-1", "1 replica", self.ukai, (1,)), every_round=False),
            "ukai-3": Contender(lambda: Image("ukai-3", "3 replicas", self.ukai, (1, 2, 3)), every_round=False),
            "ukai-via-blockd": Contender(
                lambda: Image("ukai-via-blockd", "2 replicas, short_circuit = false", self._via_blockd, (1, 2)),
                rows=READS,
                every_round=False,
            ),
            "ukai-checksum": Contender(
                lambda: Image(
                    "ukai-checksum", "2 replicas, one of them local, --checksum", self.ukai, (1, 2), "--checksum"
                ),
                every_round=False,
            ),
        }
        self._running: dict[str, System] = {}
        self._dropped: set[str] = set()

    def get(self, name: str) -> System | None:
        """The system, up and its file filled; None where that failed, now or before."""
        if name in self._dropped or name in self._running:
            return self._running.get(name)
        print(f"setting up {name}", flush=True)
        system: System | None = None
        try:
            system = self.table[name].make()
            self._running[name] = system
            home = self._directory / name
            home.mkdir()
            system.setup(home)
            self._results.about.setdefault("systems", {})[name] = system.about
            measure.fill(system.path(), FILE_BYTES, system.prefix(), system.close)
        except Exception as e:  # whatever a system does to the benchmark, it goes on without it
            self.failed(name, "its setup", e)
            self.drop(name)
            return None
        return system

    def failed(self, name: str, what: str, error: BaseException) -> None:
        """Note and tell that something of a system could not be run."""
        line = f"{name}: {what}: {str(error).strip()[:600]}"
        self._results.failures.append(line)
        print(f"FAILED {line}", flush=True)

    def drop(self, name: str) -> None:
        """It takes no part any more; what others of the same cluster need stays up."""
        self._dropped.add(name)
        system = self._running.pop(name, None)
        if system is not None and not isinstance(system, Image):
            system.close()

    def close(self) -> None:
        """End all; one that does not end holds up none of the others."""
        with ExitStack() as last:
            last.callback(self._via_blockd.close)
            last.callback(self.ukai.close)
            for name in list(self._running):
                last.callback(self.drop, name)
