"""What is wanted, as data, and the judgement on it.  Pure."""

from __future__ import annotations

from dataclasses import dataclass

from bench.results import Results
from bench.rows import ROWS


@dataclass(frozen=True)
class Target:
    """``row`` of ``system`` is at least (or at most) ``limit``: times the same row of ``base``, if that is given."""

    system: str
    row: str
    limit: float
    base: str = ""
    at_most: bool = False
    unit: str = ""

    def value(self, results: Results) -> float | None:
        """What was reached; None: not measured."""
        if self.base:
            return results.ratio(self.system, self.base, self.row)
        return results.median(self.system, self.row)

    def met(self, reached: float) -> bool:
        return reached <= self.limit if self.at_most else reached >= self.limit

    @property
    def title(self) -> str:
        return f"{self.system} {self.row}" + (f" / {self.base}" if self.base else "")

    @property
    def wanted(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.limit:g}{'×' if self.base else ' ' + self.unit}".rstrip()


TARGETS = (
    Target("ukai", "rand-read-1", 3, "glusterfs"),
    Target("ukai", "rand-read-16", 1.7, "glusterfs"),
    Target("ukai", "rand-write-1", 2, "glusterfs"),
    Target("ukai", "rand-write-16", 2, "glusterfs"),
    Target("ukai", "seq-write", 1.5, "glusterfs"),
    Target("ukai", "seq-read", 1.5, "glusterfs"),
    Target("ukai", "write-fsync", 1.2, "glusterfs"),
    *(Target("ukai-flush", row.name, 1.2, "moosefs") for row in ROWS),
    Target("ukai", "rand-read-1", 0.7, "binding"),
    Target("ukai", "rand-read-16", 0.7, "binding"),
    Target("ukai", "seq-read", 0.7, "binding"),
    Target("ukai-remote", "rand-read-1", 0.9, "glusterfs"),
    Target("ukai-remote", "seq-read", 1, "moosefs"),
    Target("ukai", "blockd-peak", 150, at_most=True, unit="MB"),
    Target("ukai", "frontend-peak", 120, at_most=True, unit="MB"),
    Target("ukai", "fairness-read", 0.5, unit="of the mean"),
    Target("ukai", "fairness-write", 0.5, unit="of the mean"),
    Target("resync", "differs", 300, unit="MB/s"),
    Target("resync", "equal", 800, unit="MB/s"),
    Target("resync", "p99-read", 2, at_most=True, unit="× of without"),
    Target("resync", "p99-write", 2, at_most=True, unit="× of without"),
    Target("resync", "rate-changed", 1.25, at_most=True, unit="of the new limit"),
    Target("metad", "start", 3, at_most=True, unit="s"),
    Target("metad", "memory", 400, at_most=True, unit="MB"),
    Target("metad", "snapshot", 0.3, at_most=True, unit="s"),
    Target("metad", "changes", 3000, unit="/s"),
    Target("metad", "requests-marked-again", 0, at_most=True),
)
