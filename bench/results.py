"""What was measured: samples, their medians and ratios, and the file that keeps them.  Pure but for the file."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STOLEN_LIMIT = 0.02
"""Share of all cores' time: where the host took more, a figure says more about the host than about the system."""


@dataclass(frozen=True)
class Sample:
    """One figure of one run.

    ``cores`` is the processor time per second of each process, ``peak_mb`` the most memory it had resident.
    ``stolen`` is the share of all cores' time that the host took meanwhile, ``attempts`` how often it was measured.
    """

    system: str
    row: str
    value: float
    unit: str
    round: int = 1
    p50_us: float = 0.0
    p99_us: float = 0.0
    iops: float = 0.0
    cores: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)
    stolen: float = 0.0
    attempts: int = 1


@dataclass
class Results:
    """All samples of one or several runs.  ``about`` says what is on and off, ``failures`` what could not be run."""

    about: dict[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def of(self, system: str, row: str) -> list[Sample]:
        return [s for s in self.samples if (s.system, s.row) == (system, row)]

    def median(self, system: str, row: str, what: str = "value") -> float | None:
        """The median over the rounds; None where there is none."""
        found = [getattr(s, what) for s in self.of(system, row)]
        return statistics.median(found) if found else None

    def spread(self, system: str, row: str) -> tuple[float, float] | None:
        """The lowest and the highest value."""
        found = [s.value for s in self.of(system, row)]
        return (min(found), max(found)) if found else None

    def ratio(self, system: str, base: str, row: str) -> float | None:
        """How many times the median of ``base``; None where one of the two is missing."""
        ours, theirs = self.median(system, row), self.median(base, row)
        return ours / theirs if ours is not None and theirs else None

    def systems(self, rows: Iterable[str]) -> list[str]:
        """Those with a sample in one of the rows, in the order in which they were first measured."""
        wanted = set(rows)
        return list(dict.fromkeys(s.system for s in self.samples if s.row in wanted))

    def processes(self, system: str, row: str) -> dict[str, tuple[float, float]]:
        """Per process the median of the processor time and the highest peak of memory: (cores, megabytes)."""
        cores, peaks = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
        for sample in self.of(system, row):
            for name, value in sample.cores.items():
                cores[name].append(value)
            for name, value in sample.peak_mb.items():
                peaks[name].append(value)
        return {name: (statistics.median(cores[name]), max(peaks[name], default=0.0)) for name in cores}

    def repeated(self) -> tuple[int, int]:
        """Samples that were measured again, and those that were kept though more than STOLEN_LIMIT was stolen."""
        again = sum(s.attempts > 1 for s in self.samples)
        return again, sum(s.stolen > STOLEN_LIMIT for s in self.samples)

    def save(self, path: Path) -> None:
        """Whole or not at all, so that a run that is cut short leaves what it had."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(self), indent=1) + "\n")
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises OSError or ValueError."""
        raw = json.loads(path.read_text())
        return cls(raw["about"], [Sample(**sample) for sample in raw["samples"]], raw["failures"])
