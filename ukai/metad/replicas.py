"""Decisions about replicas: which may go out-of-sync, which must stay (R9), which come back.

Pure: an image in, ranges ``[first, last, status, generation, reason]`` of a change out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ukai.model import IN_SYNC, OUT_OF_SYNC, SYNCING, Image, written
from ukai.ranges import RangeSet

Rows = list[list[Any]]
Mark = tuple[int, int, str]
"""first, last, reason."""


def out_of_sync(image: Image, node: str, marks: Iterable[Mark]) -> tuple[Rows, list[list[int]]]:
    """Take replicas of one node out of sync: (what changes, ranges that stay).

    The last in-sync replica of a block stays in sync whatever is said of it, with the reason kept (R9).
    What is out-of-sync already does not change.
    """
    rows: Rows = []
    kept: list[list[int]] = []
    where = image.locations.get(node)
    if where is None:
        return rows, kept
    for first, last, reason in marks:
        for a, b, replica in where.within(first, last):
            if replica.status == OUT_OF_SYNC:
                continue
            if replica.status == SYNCING:
                rows.append([a, b, OUT_OF_SYNC, replica.generation, reason])
                continue
            for c, d, state in image.segments(a, b):
                if any(r.status == IN_SYNC for n, r in state.items() if n != node):
                    rows.append([c, d, OUT_OF_SYNC, replica.generation, reason])
                else:
                    kept.append([c, d])
                    if replica.reason != reason:
                        rows.append([c, d, IN_SYNC, replica.generation, reason])
    return rows, kept


def last_copies(image: Image, node: str, ranges: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Where ``node`` holds the only in-sync replica: its removal is refused (R9)."""
    found = RangeSet()
    for first, last in ranges:
        for a, b, state in image.segments(first, last):
            mine = state.get(node)
            others = any(r.status == IN_SYNC for n, r in state.items() if n != node)
            if mine is not None and mine.status == IN_SYNC and not others:
                found.add(a, b)
    return [[a, b] for a, b in found]


def activated(image: Image, ranges: Iterable[tuple[int, int]], generation: int) -> dict[str, Rows]:
    """The generation of in-sync and syncing replicas of blocks that become active (R5)."""
    out: dict[str, Rows] = {}
    for first, last in ranges:
        for node, where in image.locations.items():
            for a, b, replica in where.within(first, last):
                if replica.status != OUT_OF_SYNC:
                    out.setdefault(node, []).append([a, b, replica.status, generation, ""])
    return out


def missing_sources(image: Image, fenced: set[str]) -> list[tuple[int, int, list[str]]]:
    """Ranges of written blocks without an in-sync replica among ``fenced``, and the nodes that have one (R3)."""
    out: list[tuple[int, int, list[str]]] = []
    for a, b, state in image.segments():
        good = [n for n, r in state.items() if r.status == IN_SYNC]
        if written(state) and not fenced.intersection(good):
            out.append((a, b, sorted(good)))
    return out


def reconciled(image: Image, node: str, fenced: set[str], keeper: str = "") -> dict[str, Rows]:
    """One replica of each active block stays in sync when the writer role moves (R5).

    That of ``keeper`` where it can be: the last writer, where it alone may have what it acknowledged.  Then that of
    ``node``, else a fenced one.  The check of ``missing_sources`` comes before.
    """
    out: dict[str, Rows] = {}
    for first, last in image.active:
        for a, b, state in image.segments(first, last):
            good = sorted(n for n, r in state.items() if r.status == IN_SYNC)
            sources = [n for n in good if n in fenced]
            if not sources:
                continue
            source = next((n for n in (keeper, node) if n in sources), sources[0])
            for other in good:
                if other != source:
                    reason = "writer stopped while the block was being written"
                    out.setdefault(other, []).append([a, b, OUT_OF_SYNC, state[other].generation, reason])
    return out


def interrupted(image: Image, reason: str, node: str | None = None) -> dict[str, Rows]:
    """Syncing replicas, of one node or of all, whose resync is over (R11)."""
    out: dict[str, Rows] = {}
    for address, where in image.locations.items():
        if node is None or address == node:
            rows = [[a, b, OUT_OF_SYNC, r.generation, reason] for a, b, r in where if r.status == SYNCING]
            if rows:
                out[address] = rows
    return out


def syncing(image: Image, target: str, ranges: Iterable[tuple[int, int]]) -> tuple[Rows, Rows, Rows]:
    """Begin a resync (R11): (what changes, [first, last] now syncing, [first, last] now in sync as never written)."""
    rows: Rows = []
    begun: Rows = []
    instant: Rows = []
    for first, last in ranges:
        for a, b, state in image.segments(first, last):
            mine = state.get(target)
            if mine is None or mine.status == IN_SYNC:
                continue
            good = [r.generation for r in state.values() if r.status == IN_SYNC]
            if not written(state):
                rows.append([a, b, IN_SYNC, 0, ""])
                instant.append([a, b])
            elif good:
                begun.append([a, b])
                if mine.status != SYNCING:
                    rows.append([a, b, SYNCING, max(good), ""])
    return rows, begun, instant


def synced(image: Image, target: str, done: Iterable[tuple[int, int, int]]) -> tuple[Rows, list[list[int]]]:
    """End a resync by compare-and-set: (what changes, ranges that were no longer syncing) (R11).

    ``done`` says of which generation the blocks are at the target: one that became active meanwhile has a higher one.
    """
    rows: Rows = []
    failed: list[list[int]] = []
    where = image.locations.get(target)
    for first, last, generation in done:
        good = RangeSet()
        for a, b, replica in where.within(first, last) if where is not None else ():
            if replica.status == SYNCING and replica.generation == generation:
                rows.append([a, b, IN_SYNC, replica.generation, ""])
                good.add(a, b)
            elif replica.status == IN_SYNC:
                good.add(a, b)
        failed.extend([a, b] for a, b in good.gaps(first, last))
    return rows, failed


def changes(image: Image, rows: dict[str, Rows]) -> list[dict[str, Any]]:
    """The changes for rows of several nodes."""
    return [{"t": "replicas", "uuid": image.uuid, "node": n, "ranges": r} for n, r in rows.items() if r]


def unsynced(image: Image, nodes: Iterable[str], ranges: Iterable[tuple[int, int]]) -> int:
    """How many replicas of these nodes and blocks are not in sync."""
    wanted = list(ranges)
    found = 0
    for where in (image.locations[n] for n in nodes if n in image.locations):
        for first, last in wanted:
            found += sum(b - a + 1 for a, b, r in where.within(first, last) if r.status != IN_SYNC)
    return found


def count(image: Image, node: str) -> tuple[int, int, int]:
    """Blocks of a location that are in-sync, syncing, out-of-sync."""
    found = [0, 0, 0]
    for a, b, replica in image.locations.get(node, ()):
        found[replica.status] += b - a + 1
    return found[0], found[1], found[2]
