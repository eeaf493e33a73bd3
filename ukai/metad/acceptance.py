"""What an administrator takes for the truth where the rules alone can't tell (R8, R9, R12).

Decisions, pure: what the metadata says and what nodes report in, changes out.  ``trusted`` decides about one image
after older metadata was accepted; ``taken`` about blocks whose last copy is refused; ``kept`` about the last copies in
a data directory that is itself an older copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from ukai.errors import Refused
from ukai.metad.registration import NO_DATA, Holding, Report, compare, flaws
from ukai.metad.replicas import Rows
from ukai.model import IN_SYNC, OUT_OF_SYNC, Change, Image, Replica, written
from ukai.ranges import RangeMap, RangeSet, show

NOT_TRUSTED = "not trusted when older metadata was accepted"
NOT_REPORTED = "its node had not reported when older metadata was accepted"
NOBODY_TRUSTED = "no copy was trusted when older metadata was accepted"
OTHER_TAKEN = "the copy of another node was accepted in its place"
SKIP_CHANGES = 1_000_000
"""How far above all that was seen the sequence goes on: a node that has not reported may have seen more."""
SKIP_EPOCHS = 1000

Holdings = Mapping[str, Holding | None]
"""node → what it has of one image; None: nothing."""


def _parts(image: Image, first: int, last: int, holdings: Holdings) -> Iterator[tuple[int, int, dict[str, Replica]]]:
    """Cut first..last into ranges in which every location and every report is of one kind."""
    cuts = {last + 1}
    for earlier in image.before.values():
        for a, b, _ in earlier.within(first, last):
            cuts |= {a, b + 1}
    for holding in holdings.values():
        for part in (holding.gens, holding.bad) if holding is not None else ():
            for a, b, _ in part.within(first, last):
                cuts |= {a, b + 1}
    for a, b, state in image.segments(first, last):
        at = a
        for cut in sorted(c for c in cuts if a < c <= b):
            yield at, cut - 1, state
            at = cut
        yield at, b, state


def _have(holdings: Holdings, node: str, block: int) -> int:
    """The generation that a node reports of a block; 0: none."""
    holding = holdings.get(node)
    return (holding.gens.get(block) or 0) if holding is not None else 0


def _bad(holdings: Holdings, node: str, block: int) -> str:
    holding = holdings.get(node)
    return (holding.bad.get(block) or "") if holding is not None else NO_DATA


class _Table:
    """location → rows of a change, neighbours of one kind joined."""

    def __init__(self) -> None:
        self._rows: dict[str, RangeMap[tuple[int, int, str]]] = {}

    def set(self, node: str, first: int, last: int, status: int, generation: int, reason: str) -> None:
        self._rows.setdefault(node, RangeMap()).set(first, last, (status, generation, reason))

    def rows(self) -> dict[str, Rows]:
        return {n: [[a, b, *value] for a, b, value in where] for n, where in self._rows.items()}


# --- older metadata (R12)


def trusted(image: Image, order: Sequence[str], reports: Mapping[str, Report]) -> tuple[dict[str, Rows], list[str]]:
    """The replicas of one image, when the metadata is older than the data: (rows, notes).

    Of each block the first node in ``order`` with a usable file is in-sync, with the generation that it reports.
    Raises Refused, naming the nodes, where only others have one.
    """
    holdings: dict[str, Holding | None] = {
        n: reports[n].images.get(image.uuid) for n in {*image.locations, *order} if n in reports
    }
    order = [n for n in order if holdings.get(n) is not None]
    for node, report in reports.items():  # one that became a location later is no location yet, and may have data
        if node not in holdings and image.uuid in report.images:
            holdings[node] = report.images[image.uuid]
    strangers = [n for n in order if n not in image.locations]
    table, lost, only = _Table(), RangeSet(), RangeMap[str]()
    for first, last, state in _parts(image, 0, image.block_count - 1, holdings):
        have = {n: _have(holdings, n, first) for n in holdings}
        usable = {n for n, generation in have.items() if generation and not _bad(holdings, n, first)}
        places = {*state, *strangers, *(n for n in order if have[n])}
        top = max([0, *have.values(), *(r.generation for r in state.values())])
        good = next((n for n in order if n in usable), "")
        if order and not good and usable:
            only.set(first, last, " and ".join(sorted(usable)))
            continue
        for node in places:
            if not order:
                reason = NOBODY_TRUSTED
            elif node not in reports:
                reason = NOT_REPORTED
            else:
                reason = NO_DATA if holdings.get(node) is None else NOT_TRUSTED
            table.set(node, first, last, OUT_OF_SYNC, have.get(node, 0), reason)
        if good:
            table.set(good, first, last, IN_SYNC, have[good], "")
        elif order and not top:
            for node in places:
                if holdings.get(node) is not None:
                    table.set(node, first, last, IN_SYNC, 0, "")
        elif order:
            lost.add(first, last)
            reason = _bad(holdings, order[0], first) or f"generation {have[order[0]]} is below {top}: an older copy"
            table.set(order[0], first, last, IN_SYNC, top, reason)
    if len(only):
        blocks = "; ".join(f"blocks {show([(a, b)])}: {nodes}" for a, b, nodes in list(only)[:5])
        raise Refused(
            f"image {image.name}: of some blocks no trusted node has a usable file, but others have ({blocks}); "
            f"trust one of them too: --trust {image.name}=NODE"
        )
    notes = []
    if not order:
        notes.append(
            f"image {image.name} is offline, since no trusted node holds it: choose with ukai-ctl image accept "
            f"{image.name} NODE, or forget it with ukai-ctl image remove {image.name} --delete-data"
        )
    if len(lost):
        notes.append(f"image {image.name}: nobody has a usable file of blocks {show(lost)}; they can't be read")
    if missing := sorted(n for n in image.locations if n not in reports):
        notes.append(f"image {image.name}: {', '.join(missing)} had not reported; what it has is not trusted")
    return table.rows(), notes


def epoch_above(image: Image, reports: Iterable[Report]) -> int:
    """An epoch above all that any node has seen of the image (R1)."""
    seen = [r.images[image.uuid].epoch for r in reports if image.uuid in r.images]
    return max([image.epoch, *seen]) + SKIP_EPOCHS


def begin_anew(image: Image, epoch: int, others: Iterable[str] = ()) -> list[Change]:
    """No writer, nothing active, and no handle of before that may write again (R1, R2)."""
    lost = dict(image.lost) | dict.fromkeys([*image.hypervisors, *others], epoch)
    row: Change = {"t": "image", "uuid": image.uuid, "writer": "", "former": "", "epoch": epoch, "lost": lost}
    active = [list(r) for r in image.active]
    return [row, *([{"t": "active", "uuid": image.uuid, "del": active}] if active else [])]


# --- a last copy that is refused (R9)


def taken(
    image: Image, node: str, ranges: Iterable[tuple[int, int]], holdings: Holdings, zeros: bool
) -> tuple[dict[str, Rows], RangeSet]:
    """Take what ``node`` has of blocks without a usable in-sync copy: (rows, blocks that are zeros from now on).

    Raises Refused where there is no such block, or where the node has no usable file of one and ``zeros`` isn't said.
    """
    table, blank, unusable = _Table(), RangeSet(), RangeMap[str]()
    found = False
    for first, last in ranges:
        for a, b, state in _parts(image, first, last, holdings):
            if node not in state or not written(state) or _served(image, a, state, holdings):
                continue
            found = True
            have, bad = _have(holdings, node, a), _bad(holdings, node, a)
            if not have or bad:
                unusable.set(a, b, bad or "it has no data of it")
                blank.add(a, b)
            for other in state:
                generation = 0 if a in blank else _have(holdings, other, a) or state[other].generation
                table.set(other, a, b, OUT_OF_SYNC, generation, OTHER_TAKEN)
            table.set(node, a, b, IN_SYNC, 0 if a in blank else have, "")
    if not found:
        raise Refused(f"image {image.name}: nothing to accept, each of these blocks has an in-sync copy that is usable")
    if len(unusable) and not zeros:
        a, b, reason = next(iter(unusable))
        raise Refused(
            f"image {image.name}: node {node} has no usable file of blocks {show(blank)} (block {a}: {reason}); choose "
            "another node or other blocks, or say --zeros: they then read as zeros"
        )
    return table.rows(), blank


def _served(image: Image, block: int, state: dict[str, Replica], holdings: Holdings) -> bool:
    """Whether an in-sync copy of a block is what it should be; with checksums, also that no read has failed."""
    return any(
        replica.status == IN_SYNC
        and not (image.checksum and replica.reason)
        and (holding := holdings.get(node)) is not None
        and not flaws(image, node, block, block, replica, holding)
        for node, replica in state.items()
    )


# --- a data directory that is an older copy (R8)


def kept(image: Image, report: Report, distrusted: str) -> tuple[list[Change], RangeSet]:
    """Take a directory as it is: its last copies with what they have, all else out-of-sync; (changes, what was taken).

    Last copies of which it has no usable file stay as they are, with the reason.
    """
    changes = compare(image, report, same_process=False, rebooted=False, distrusted=distrusted)
    holding, table, mine = report.images.get(image.uuid), _Table(), RangeSet()
    if holding is not None:
        for a, b, state in _parts(image, 0, image.block_count - 1, {report.node: holding}):
            replica = state.get(report.node)
            have = holding.gens.get(a)
            if replica is None or replica.status != IN_SYNC or not have or holding.bad.get(a):
                continue
            if not any(r.status == IN_SYNC for n, r in state.items() if n != report.node):
                mine.add(a, b)
                table.set(report.node, a, b, IN_SYNC, have, "")
    rows = table.rows().get(report.node)
    if rows:
        changes.append({"t": "replicas", "uuid": image.uuid, "node": report.node, "ranges": rows})
    return changes, mine
