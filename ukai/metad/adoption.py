"""Metadata that an administrator made by hand, and the block files that belong to it.

Pure: text in, placement out.  The JSON form is that of the original's create_metadata:

    {"name": …, "size": …, "block_size": …, "hypervisors": [address, …],
     "blocks": [{address: {"sync_status": 0}, …}, …]}
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass, field
from typing import Any

from ukai.errors import UsageError
from ukai.model import IN_SYNC, OUT_OF_SYNC, STATUS_NAMES, SYNCING, check_name, check_sizes
from ukai.ranges import RangeMap, RangeSet, show

FILE_LIMIT_BYTES = 256 * 2**20
NO_FILE = "no block file"
SAID_OUT_OF_SYNC = "out-of-sync in the metadata that was added"


@dataclass(slots=True)
class HandMade:
    """What the file says; statuses are in-sync or out-of-sync."""

    name: str
    size: int
    block_size: int
    hypervisors: list[str]
    status: dict[str, RangeMap[int]] = field(default_factory=dict)
    """location → block → status."""

    @property
    def block_count(self) -> int:
        return -(-self.size // self.block_size)


def _pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the file; a key that is there twice would else be lost in silence."""
    out: dict[str, Any] = {}
    for key, value in items:
        if key in out:
            raise UsageError(f"{key!r:.60} is there twice in one place")
        out[key] = value
    return out


def read(data: bytes, name: str) -> HandMade:
    """Read the file ``name``.  Raises UsageError with one line that says what to mend."""
    try:
        return _read(data, name)
    except UsageError as e:
        raise UsageError(f"metadata of image {name}: {e.message}") from None


def _read(data: bytes, name: str) -> HandMade:
    if len(data) > FILE_LIMIT_BYTES:
        raise UsageError(f"the file is larger than {FILE_LIMIT_BYTES} bytes; choose a larger block size")
    try:
        found = json.loads(data, object_pairs_hook=_pairs)
    except UnicodeDecodeError:
        raise UsageError("the file is no UTF-8 text") from None
    except json.JSONDecodeError as e:
        raise UsageError(f"not valid JSON, line {e.lineno} column {e.colno}: {e.msg}; is the file complete?") from None
    except (RecursionError, ValueError):
        raise UsageError("not valid JSON: a value is out of all bounds") from None
    if type(found) is not dict:
        raise UsageError("not a JSON object with name, size, block_size, hypervisors and blocks")
    for key in ("name", "size", "block_size", "hypervisors", "blocks"):
        if key not in found:
            raise UsageError(f"{key} is missing; is the file complete?")
    if found["name"] != name:
        raise UsageError(f"it is for an image named {found['name']!r:.120}; rename the file or change the name in it")
    check_name(name)
    for key in ("size", "block_size"):
        if type(found[key]) is not int:
            raise UsageError(f"{key}: a whole number of bytes is wanted, not {found[key]!r:.60}")
    check_sizes(found["size"], found["block_size"])
    image = HandMade(name, found["size"], found["block_size"], _addresses(found["hypervisors"]))
    blocks = found["blocks"]
    if type(blocks) is not list or len(blocks) != image.block_count:
        have = len(blocks) if type(blocks) is list else 0
        raise UsageError(
            f"{have} blocks are listed, {image.block_count} are wanted for {image.size} bytes "
            f"in blocks of {image.block_size}"
        )
    seen: set[str] = set()
    for index, block in enumerate(blocks):
        _block(image, index, block, seen)
    return image


def _block(image: HandMade, index: int, block: Any, seen: set[str]) -> None:
    if type(block) is not dict:
        raise UsageError(f"block {index}: an object with one entry per location is wanted, not {block!r:.60}")
    good = False
    for address, entry in block.items():
        if address not in seen:
            seen.add(_address(address))
        status = entry.get("sync_status") if type(entry) is dict else None
        if type(status) is not int or status not in STATUS_NAMES:
            raise UsageError(f"block {index}, location {address}: sync_status must be 0, 1 or 2, not {status!r:.40}")
        good = good or status == IN_SYNC
        image.status.setdefault(address, RangeMap()).set(index, index, OUT_OF_SYNC if status == SYNCING else status)
    if not good:
        raise UsageError(f"block {index} has no in-sync location; give one of them sync_status 0")


def _addresses(value: Any) -> list[str]:
    if type(value) is not list or not value:
        raise UsageError("hypervisors: a list of at least one address is wanted")
    out = [_address(v) for v in value]
    for address in out:
        if out.count(address) > 1:
            raise UsageError(f"hypervisor {address} is there twice")
    return out


def _address(value: Any) -> str:
    try:
        if type(value) is not str:
            raise ValueError
        return str(ipaddress.IPv4Address(value))
    except ValueError:
        raise UsageError(f"{value!r:.60} is not an IPv4 address") from None


Rows = list[list[Any]]
"""Ranges [first, last, status, generation, reason] of the model."""


def combine(
    image: HandMade, present: dict[str, RangeSet], bad: dict[str, RangeMap[str]], generation: int
) -> dict[str, Rows]:
    """location → replicas, from what the file says and what is on the disks (R8).

    Raises UsageError where no good copy of a block is left, or where it can't be told which one is.
    """
    rows: dict[str, RangeMap[tuple[int, int, str]]] = {node: RangeMap() for node in image.status}
    for first, last in _segments(image, present, bad):
        said = {n: s for n, where in image.status.items() if (s := where.get(first)) is not None}
        faulty = {n: r for n in said if n in bad and (r := bad[n].get(first)) is not None}
        files = {n for n in said if first in present.get(n, ()) and n not in faulty}
        trusted = {n for n, s in said.items() if s == IN_SYNC}
        blocks = f"block {first}" if first == last else f"blocks {first}-{last}"
        good = trusted & files
        if not good and (trusted & faulty.keys()):
            node = sorted(trusted & faulty.keys())[0]
            raise UsageError(
                f"image {image.name}, {blocks}: the only in-sync copy is on {node}, and there: {faulty[node]}"
            )
        if not good and files:
            node = sorted(files)[0]
            raise UsageError(
                f"image {image.name}, {blocks}: {node} has a block file but is said to be out-of-sync, and no in-sync "
                "location has one; correct sync_status or put the file in place"
            )
        for node, status in said.items():
            if node in faulty:
                value = (OUT_OF_SYNC, 0, faulty[node])
            elif status == OUT_OF_SYNC:
                value = (OUT_OF_SYNC, 0, SAID_OUT_OF_SYNC)
            elif node in good:
                value = (IN_SYNC, generation, "")
            else:
                value = (OUT_OF_SYNC, 0, NO_FILE) if good else (IN_SYNC, 0, "")
            rows[node].set(first, last, value)
    return {node: [[a, b, *v] for a, b, v in where] for node, where in rows.items()}


def _segments(image: HandMade, present: dict[str, RangeSet], bad: dict[str, RangeMap[str]]) -> list[tuple[int, int]]:
    cuts = {0, image.block_count}
    for where in image.status.values():
        cuts.update(c for a, b, _ in where for c in (a, b + 1))
    for files in present.values():
        cuts.update(c for a, b in files for c in (a, b + 1))
    for faults in bad.values():
        cuts.update(c for a, b, _ in faults for c in (a, b + 1))
    edges = sorted(c for c in cuts if 0 <= c <= image.block_count)
    return [(a, b - 1) for a, b in zip(edges, edges[1:], strict=False)]


def usable(rows: dict[str, Rows]) -> dict[str, list[list[int]]]:
    """location → ranges whose block files were adopted."""
    return {
        n: [[a, b] for a, b, status, generation, _ in r if status == IN_SYNC and generation] for n, r in rows.items()
    }


def summary(rows: dict[str, Rows]) -> list[str]:
    """Notes about what was set out-of-sync, one per location and reason, and about what nobody has a file of."""
    found: dict[tuple[str, str], RangeSet] = {}
    empty = RangeSet()
    for node, items in rows.items():
        for first, last, status, generation, reason in items:
            if status == OUT_OF_SYNC:
                found.setdefault((node, reason), RangeSet()).add(first, last)
            elif generation == 0:
                empty.add(first, last)
    notes = [f"{node}: blocks {show(ranges)} are out-of-sync: {reason}" for (node, reason), ranges in found.items()]
    if len(empty):
        notes.append(f"no location has a file of blocks {show(empty)}: never written, they read as zeros")
    return notes
