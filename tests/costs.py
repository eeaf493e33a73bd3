"""What a fault of a disk cost, from the changes that metad stored: one event, and the log has one line for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ukai.blockd.marks import INTERRUPTED
from ukai.ranges import join

RESTART = ("session", "before blockd was started", "the connection was lost")
"""What a later restart costs or tells again: no event of the fault."""
OWN = "store.json can't be written"
"""The line of a fault that costs no replica."""


@dataclass
class Costs:
    """Replicas that coordinators had marked, and resyncs that failed."""

    marks: dict[tuple[str, str, str], list[tuple[int, int]]] = field(default_factory=dict)
    """(image, node, reason) → ranges of blocks."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    """(image, reason)."""

    @property
    def lines(self) -> list[str]:
        """What the log says of it: each range of blocks once."""
        marked = [
            f"image {image}: blocks {first}-{last} at {node} out-of-sync: {reason}"
            for (image, node, reason), ranges in self.marks.items()
            for first, last in ranges
        ]
        return sorted(marked + [f"resync of image {image}: failed: {reason}" for image, reason in self.failed])


def costs(changes: Iterable[Sequence[Any]], names: dict[str, str]) -> Costs:
    """From rows of the change table; ``names`` are those of the images, by uuid."""
    found = Costs()
    marked: dict[tuple[str, str, str], set[int]] = {}
    for _, _, cause, change in changes:
        name = names.get(change.get("uuid", ""), "")
        if change["t"] == "job" and change.get("state") == "failed":
            found.failed.append((name, change["reason"]))
        if change["t"] == "replicas" and cause.startswith("mark by"):
            for first, last, _, _, reason in change["ranges"]:
                if reason != INTERRUPTED and not any(r in reason for r in RESTART):
                    marked.setdefault((name, change["node"], reason), set()).update(range(first, last + 1))
    found.marks = {key: join(sorted(blocks)) for key, blocks in marked.items()}
    return found


def check_one_event(said: Iterable[str], found: Costs) -> None:
    """The log tells of what a fault cost, in a line per range of blocks, and of nothing else; it is one event at most.

    ``said`` are lines of level warning or above.  An order that the fault ended has a line of its own, for one reason.
    """
    lines = sorted(line for line in said if not any(r in line for r in RESTART))
    own = [line for line in lines if OWN in line]
    assert lines == sorted(found.lines + own), f"the log says {lines}, it cost {found.lines}"
    reasons = {reason for _, _, reason in found.marks} | {reason for _, reason in found.failed} | set(own)
    assert len(reasons) <= 1, f"several events: {lines}"
    assert len({node for _, node, _ in found.marks}) <= 1, f"marks of several nodes: {lines}"
    assert len(found.failed) <= 1, f"several orders failed: {lines}"
