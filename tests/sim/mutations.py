"""The rules R1–R12, each broken on purpose: what the simulator must find.

A mutation takes the place of a few functions of the running code, in a process of its own (``run.py --mutation``).
It names the rule, the faults under which breaking it does harm, and words of the oracle that must notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.sim import world
from tests.sim.world import CONFIG, World
from ukai.blockd import core as block_core
from ukai.blockd import files, flush, image_store, marks, peer, replica, resync, sums, verify, writes
from ukai.blockd.activity import Activity
from ukai.blockd.behind import Behind
from ukai.blockd.coordinator import Coordinator
from ukai.blockd.image_store import ImageStore
from ukai.blockd.posted import Posts
from ukai.blockd.readable import Readable
from ukai.blockd.reads import Reads
from ukai.blockd.role import Role
from ukai.errors import NoSpace, UkaiError, Unreachable
from ukai.frontend.core import Overdue
from ukai.frontend.posted import Posted
from ukai.frontend.shortcut import Loan, Shortcut
from ukai.loans import NOT_LENT
from ukai.metad import acceptance, registration, replicas, roles
from ukai.metad import blocks as metad_blocks
from ukai.metad import core as metad_core
from ukai.mirror import Mirror
from ukai.model import IN_SYNC, OUT_OF_SYNC, SYNCING, written

Patch = tuple[Any, str, Any]

DEFAULT: dict[str, Any] = {
    "threads": 4,
    "locations": 2,
    "local": True,
    "fault_every_s": 0.5,
    "lossy_publish": 0.3,
    "repeat": 0.0,
    "slow_ms": 1.0,
    "rare": [],
    "checksum": False,
    "direct": True,
    "replication": "sync",
    "pairs": 0.0,
}


@dataclass(frozen=True)
class Mutation:
    """One way to break one rule."""

    rule: str
    name: str
    patches: Callable[[], list[Patch]]
    forced: dict[str, Any]
    """Parameters of the runs."""
    expect: tuple[str, ...]
    """Words of which one is in the violation."""
    seconds: float = 6.0


def apply(mutation: Mutation) -> None:
    for where, name, new in mutation.patches():
        if isinstance(where, dict):
            assert name in where
            where[name] = new
        else:
            assert hasattr(where, name), name
            setattr(where, name, new)


def _nothing(*_args: Any, **_keywords: Any) -> None:
    return None


async def _nothing_later(*_args: Any, **_keywords: Any) -> None:
    return None


def _world(*faults: str, **others: Any) -> dict[str, Any]:
    return {**DEFAULT, "faults": list(faults), **others}


def _flush(*faults: str, **others: Any) -> dict[str, Any]:
    return _world(*faults, replication="flush", **others)


# --- R1


def _any_epoch() -> list[Patch]:
    def admit(self: ImageStore, epoch: int) -> None:
        if epoch > self.epoch:
            self.save(epoch)

    return [(ImageStore, "admit", admit)]


def _epoch_in_memory() -> list[Patch]:
    def save(self: ImageStore, epoch: int) -> None:
        if epoch == 0:
            return real(self, epoch)
        self.epoch = epoch
        return None

    real = ImageStore.save
    return [(ImageStore, "save", save)]


# --- R2


def _stale_handles() -> list[Patch]:
    real = roles._check_eligible

    def eligible(image: Any, node: str, io: bool, opened_epoch: int) -> None:
        real(image, node, io, -1)

    return [(Coordinator, "check_handle", _nothing), (roles, "_check_eligible", eligible)]


def _role_taken_unasked() -> list[Patch]:
    async def unasked(*_args: Any) -> dict[str, Any]:
        return {"handles": 1, "clean": False}

    async def fence(self: Role, node: str, _epoch: int) -> float | None:
        return 0.0 if node == self._c.own or self._c.core.peer(node).up else None

    return [(roles, "_ask_to_release", unasked), (Role, "_fence", fence)]


# --- R3


def _no_fence() -> list[Patch]:
    async def fence(self: Role, node: str, _epoch: int) -> float:
        return 0.0

    return [(Role, "_fence", fence)]


def _no_check_of_fences() -> list[Patch]:
    return [(replicas, "missing_sources", lambda image, fenced: [])]


def _no_lease_wait() -> list[Patch]:
    def lease_end(self: metad_core.Core, node: str) -> float:
        return self.ports.now()

    def confirmed_ago_s(_self: replica.Replica, _uuid: str, _node: str) -> float:
        return CONFIG.lease

    return [(metad_core.Core, "lease_end", lease_end), (replica.Replica, "confirmed_ago_s", confirmed_ago_s)]


# --- R4


def _acknowledge_before_mark() -> list[Patch]:
    async def mark(self: marks.Marker, wanted: list[tuple[int, str, str]]) -> list[tuple[int, str]]:
        for one in wanted:
            self.begin(*one)
        return []

    return [(marks.Marker, "mark", mark)]


def _failed_replica_forgotten() -> list[Patch]:
    async def settle(self: writes.Writes, op: writes.Op) -> bool:
        self._c.hot.pop(op.block, None)
        return False

    return [(writes.Writes, "settle", settle)]


def _first_answer_is_enough() -> list[Patch]:
    def answered(self: writes.Op, node: str, error: Any) -> None:
        self.waiting -= 1
        if error is not None:
            self.failed[node] = error
        elif self.waiting > 0 and node:
            self.waiting = 0
        if self.waiting == 0:
            self.waiting = -100
            self.done(self)

    return [(writes.Op, "answered", answered)]


# --- loans: direct reads must be no worse than those through blockd (R3, R4)


def _loan_outlasts_a_mark() -> list[Patch]:
    def drop(self: Readable, block: int) -> None:
        self.stores.pop(block, None)

    def drop_all(self: Readable) -> None:
        self.stores.clear()

    return [(Readable, "drop", drop), (Readable, "drop_all", drop_all)]


def _marked_copy_elsewhere_is_read() -> list[Patch]:
    """Reads that are sent straight to another node know of no mark."""

    def drop(self: Readable, block: int) -> None:
        self.stores.pop(block, None)
        if self.page is not None:
            self.page.numbers[block] = NOT_LENT

    return [(Readable, "drop", drop), (Readable, "drop_all", _nothing)]


def _lease_of_loans_ignored() -> list[Patch]:
    def good(self: Shortcut, loan: Loan, block: int, offset: int, length: int, _now: float) -> bool:
        return real(self, loan, block, offset, length, float("-inf"))

    real = Shortcut.good
    return [(Shortcut, "good", good)]


def _write_under_way_is_read() -> list[Patch]:
    def begins(self: Shortcut, offset: int, _length: int) -> int:
        return real(self, offset, 0)

    real = Shortcut.write_begins
    return [(Shortcut, "write_begins", begins)]


def _loans_outlive_their_lender() -> list[Patch]:
    return [(World, "end_loans", _nothing)]


def _sums_not_looked_at() -> list[Patch]:
    return [(sums.Sums, "check", _nothing), (sums.Sums, "check_hole", _nothing)]


def _sums_of_another_boot() -> list[Patch]:
    return [(block_core.Core, "_renew_sums", _nothing_later)]


def _difference_not_marked() -> list[Patch]:
    return [(verify.Verify, "_decide", _nothing_later)]


# --- flush images: acknowledged early is no worse than a volatile cache (R2, R4, R7)


def _failures_behind_forgotten() -> list[Patch]:
    async def settle(self: Behind, op: writes.Op) -> None:
        self._settled(op)

    return [(Behind, "_settle", settle)]


def _flush_leaves_behind() -> list[Patch]:
    return [(Behind, "settled", _nothing_later)]


# --- posted writes: the same, though they are acknowledged before they have arrived (R1, R2, R7)


def _posted_over_another() -> list[Patch]:
    def may_post(self: Shortcut, loan: Loan, block: int, _offset: int, length: int, now: float) -> bool:
        return loan.posts and self.posted.room(length) and self.stands(loan, block, now)

    return [(Shortcut, "may_post", may_post), (Posted, "touching", lambda _self, _offset, _end: [])]


def _posted_not_seen_by_reads() -> list[Patch]:
    return [(world, "cover", _nothing)]


def _posted_not_sent_again() -> list[Patch]:
    def failed(self: Posted, number: int) -> None:
        self.done(number)

    return [(Posted, "failed", failed)]


def _posted_while_the_role_is_given_up() -> list[Patch]:
    """The loan is not taken back, so it is posted after what was posted has been taken in."""

    def refuse(self: Posts, blocks: Any = None) -> bool:
        self._c.core.ports.take_in()
        return not self._under_way

    return [(Posts, "refuse", refuse), (Shortcut, "stands", lambda _self, _loan, _block, _now: True)]


def _retired_under_posted_writes() -> list[Patch]:
    def refuse(self: Posts, blocks: Any = None) -> bool:
        return real(self, blocks) if blocks is None else False

    real = Posts.refuse
    return [(Posts, "refuse", refuse)]


def _handles_outlive_their_writes() -> list[Patch]:
    return [
        (roles, "lose_former", _nothing), (metad_blocks, "lose_former", _nothing),
        (roles, "lost_with", lambda image, node, gone: []),
    ]  # fmt: skip


# --- R5


def _unannounced() -> list[Patch]:
    async def warm_up(self: Activity, blocks: list[int]) -> dict[int, UkaiError]:
        known = [b for b in blocks if written(self._c.image.replicas(b))]
        fresh = [b for b in blocks if b not in known]
        errors = await real(self, fresh) if fresh else {}
        self.active.update(dict.fromkeys(known, self._c.now()))
        self.warm.update(known)
        return errors

    real = Activity._warm_up
    return [(Activity, "_warm_up", warm_up)]


def _nothing_reconciled() -> list[Patch]:
    return [(replicas, "reconciled", lambda image, node, fenced, keeper: {})]


def _retired_unflushed() -> list[Patch]:
    async def retire(self: Activity, blocks: list[int]) -> None:
        held = self._c.flusher.unflushed
        self._c.flusher.unflushed = {}
        try:
            await real(self, blocks)
        finally:
            self._c.flusher.unflushed = held

    real = Activity._retire
    return [(Activity, "_retire", retire)]


# --- R6


def _any_number() -> list[Patch]:
    def handle(self: replica.Replica, header: Any, payload: Any) -> Any:
        if header.get("op") in self.numbered and (session := self.sessions.get(header.get("t"))) is not None:
            session.next = header["n"]
        return real(self, header, payload)

    real = replica.Replica.handle
    return [(replica.Replica, "handle", handle)]


def _any_session() -> list[Patch]:
    def session(self: replica.Replica, header: Any) -> replica.Session:
        found = self.sessions.get(header["t"]) or replica.Session("", "", 0, header["t"])
        found.next = header.get("n", 0)
        return found

    return [(replica.Replica, "_session", session)]


# --- R7


def _flush_here_only() -> list[Patch]:
    async def one(self: flush.Flusher, node: str, wanted: set[int], away: dict[str, str]) -> dict[int, str]:
        return await real(self, node, wanted, away) if node == self._c.own else {}

    real = flush.Flusher._one
    return [(flush.Flusher, "_one", one)]


def _flush_overtakes() -> list[Patch]:
    """What waits at leisure is sent after the flush, not before it."""

    def numbered(self: peer.Peer, header: Any, payload: Any, done: peer.Done) -> bool:
        if header["op"] != "f" or self._together is None:
            return real(self, header, payload, done)
        together, self._together = self._together, None
        sent = real(self, header, payload, done)
        if sent:
            self._together = together
        else:
            together.ended(Unreachable("the connection was lost"), {}, None)
        return sent

    real = peer.Peer.numbered
    return [(peer.Peer, "numbered", numbered)]


def _failed_flush_ignored() -> list[Patch]:
    async def one(self: flush.Flusher, node: str, wanted: set[int], away: dict[str, str]) -> dict[int, str]:
        await real(self, node, wanted, away)
        return {}

    real = flush.Flusher._one
    return [(flush.Flusher, "_one", one)]


def _flush_of_this_process_only() -> list[Patch]:
    async def fsync(self: flush.Flusher, _handle: Any, _deadline: float) -> None:
        await self.flush()

    return [(flush.Flusher, "fsync", fsync)]


def _role_begins_clean() -> list[Patch]:
    def begin(self: flush.Flusher, _active: Any) -> None:
        self.unflushed = {}

    return [(flush.Flusher, "begin", begin)]


def _through_only_here() -> list[Patch]:
    def write_through(self: replica.Replica, header: Any, payload: Any) -> Any:
        self._write(header, payload)
        return {"failed": []}, None

    def numbered(self: replica.Replica, *args: Any, **keywords: Any) -> None:
        real(self, *args, **keywords)
        self.numbered["ws"] = partial(write_through, self)

    real = replica.Replica.__init__
    return [(replica.Replica, "__init__", numbered)]


def _through_only_there() -> list[Patch]:
    def flush_here(self: writes.Writes, op: writes.Op, _image: ImageStore) -> None:
        op.answered(self._c.own, None)

    return [(writes.Writes, "_flush_here", flush_here)]


def _under_way_is_flushed() -> list[Patch]:
    def clean(self: flush.Flusher) -> bool:
        return self._c.held and not self.lost and not any(self.unflushed.values())

    return [(flush.Flusher, "clean", clean)]


# --- R8


def _generations_not_compared() -> list[Patch]:
    return [(registration, "_older", lambda *_: []), (registration, "distrust", lambda *_: "")]


def _reboot_overlooked() -> list[Patch]:
    def compare(image: Any, report: Any, **about: Any) -> Any:
        return real(image, report, **{**about, "rebooted": False})

    real = registration.compare
    return [(registration, "compare", compare)]


def _missing_file_is_new() -> list[Patch]:
    def file(self: ImageStore, block: int) -> int:
        if self.disk.stat(self.path(block)) is None:
            self._create(block)
        return real(self, block)

    def inventory(self: ImageStore) -> dict[str, Any]:
        return {**real_inventory(self), "bad": []}

    real, real_inventory = ImageStore.file, ImageStore.inventory
    return [(ImageStore, "file", file), (ImageStore, "inventory", inventory)]


def _name_not_synced() -> list[Patch]:
    def make(disk: Any, directory: str, name: str, data: Any, size: int, source: int = -1) -> None:
        fd = disk.open(f"{directory}/{name}", create=True)
        disk.truncate(fd, size)
        files.write_all(disk, fd, data, 0)
        if source >= 0:
            files.copy_data(disk, source, fd, size)
        disk.close(fd)

    return [(image_store, "make_file", make)]


def _any_store() -> list[Patch]:
    return [(registration, "refusal", lambda cluster, report: "")]


# --- R9


def _last_copy_marked() -> list[Patch]:
    def out_of_sync(image: Any, node: str, wanted: Any) -> Any:
        where = image.locations.get(node)
        rows = []
        for first, last, reason in wanted if where is not None else ():
            for a, b, r in where.within(first, last):
                if r.status != OUT_OF_SYNC:
                    rows.append([a, b, OUT_OF_SYNC, r.generation, reason])
        return rows, []

    return [(replicas, "out_of_sync", out_of_sync)]


def _last_copy_removed() -> list[Patch]:
    return [(replicas, "last_copies", lambda image, node, ranges: [])]


# --- R10


def _full_disk_is_success() -> list[Patch]:
    def write(self: ImageStore, block: int, offset: int, data: Any, generation: int) -> None:
        try:
            real(self, block, offset, data, generation)
        except NoSpace:
            return

    real = ImageStore.write
    return [(ImageStore, "write", write)]


def _full_for_ever() -> list[Patch]:
    full: set[str] = set()

    def write(self: ImageStore, block: int, offset: int, data: Any, generation: int) -> None:
        if self.uuid in full:
            raise NoSpace("it was full once")
        try:
            real(self, block, offset, data, generation)
        except NoSpace:
            full.add(self.uuid)
            raise

    real = ImageStore.write
    return [(ImageStore, "write", write)]


# --- R11


def _copy_without_lock() -> list[Patch]:
    async def copy(self: resync.Resync, target: str, block: int, offset: int, length: int) -> None:
        data = await self._read(self._source(block), block, offset, length)
        await self._send(target, block, offset, data)

    return [(resync.Resync, "_copy", copy)]


def _finish_without_compare() -> list[Patch]:
    def synced(image: Any, target: str, done: Any) -> Any:
        rows = []
        for first, last, _ in done:
            for a, b, r in image.locations[target].within(first, last):
                rows.append([a, b, IN_SYNC, r.generation, ""])
        return rows, []

    async def block(self: resync.Resync, target: str, number: int) -> int:
        try:
            await real(self, target, number)
        except UkaiError:
            pass
        while self._goes_on and (r := self._c.image.replica(target, number)) is not None:  # a poll will do
            if r.status != SYNCING:
                break  # it was marked: with compare-and-set its end is then no news
            await asyncio.sleep(0.05)
        return 1

    real = resync.Resync._block
    return [(replicas, "synced", synced), (resync.Resync, "_block", block)]


def _syncing_is_read() -> list[Patch]:
    async def read_from(self: Reads, block: int, offset: int, length: int, good: Any) -> Any:
        c = self._c
        mine = c.image.replica(c.own, block)
        if mine is not None and mine.status == SYNCING:
            return c.core.store.image(c.uuid).read(block, offset, length)
        return await real(self, block, offset, length, good)

    real = Reads._read_from
    return [(Reads, "_read_from", read_from)]


def _nothing_copied() -> list[Patch]:
    return [(resync.Resync, "_copy", _nothing_later)]


# --- R12


def _older_metad_accepted() -> list[Patch]:
    return [(metad_core.Core, "check_current", _nothing)]


def _accepted_below() -> list[Patch]:
    return [(metad_core.Core, "begin_above", _nothing)]


def _all_trusted() -> list[Patch]:
    def trusted(image: Any, order: Any, reports: Any) -> Any:
        rows, notes = real(image, order, reports)
        for ranges in rows.values():
            for row in ranges:
                if row[3]:
                    row[2:] = [IN_SYNC, row[3], ""]
        return rows, notes

    real = acceptance.trusted
    return [(acceptance, "trusted", trusted)]


def _older_metadata_believed() -> list[Patch]:
    def check(self: Mirror, reply: Any) -> bool:
        self.floor = 0
        return real(self, reply)

    def reset(self: Mirror, snapshot: Any, reply: Any) -> None:
        self.loaded = self.loaded and reply.get("inc") == self.inc
        real_reset(self, snapshot, reply)

    real, real_reset = Mirror._check, Mirror._reset
    return [
        (metad_core.Core, "check_current", _nothing), (Mirror, "_check", check), (Mirror, "_reset", reset),
    ]  # fmt: skip


def _overdue_forgotten() -> list[Patch]:
    return [(Overdue, "hold", _nothing)]


DIFFERS, LACKS, STORED, READS = "is not active and differs", "does not have it", "has not stored it", "possible were"
SPOILT = (READS, "is torn", "in-sync and verified")

GONE = ("whose writes may be lost", "was replaced wrote")

MUTATIONS = (
    Mutation("R1", "a replica takes any epoch", _any_epoch, _world("takeover", locations=3), ("took",)),
    Mutation("R1", "an epoch is only remembered", _epoch_in_memory, _world("kill blockd"), ("forgotten", "fenced")),
    Mutation("R2", "stale handles write", _stale_handles, _world("zombie"), ("was replaced wrote",)),
    Mutation("R2", "the role is taken unasked", _role_taken_unasked, _world("split", "zombie"), ("fenced", READS)),
    Mutation("R3", "replicas are not fenced", _no_fence, _world("split", "takeover"), ("fenced",)),
    Mutation("R3", "fences are not counted", _no_check_of_fences, _world("split"), ("fenced",)),
    Mutation("R3", "a lease is not waited for", _no_lease_wait, _world("split"), (READS,)),
    Mutation("R4", "acknowledged before marked", _acknowledge_before_mark, _world("cut", "freeze"), (LACKS, STORED)),
    Mutation("R4", "a failed replica is forgotten", _failed_replica_forgotten, _world("cut", "freeze"), (LACKS,)),
    Mutation("R4", "the first answer is enough", _first_answer_is_enough, _world("freeze"), (LACKS,)),
    Mutation("R4", "a loan outlasts a mark", _loan_outlasts_a_mark, _world("disk", "freeze", "sync"), (READS,)),
    Mutation(
        "R4",
        "a marked copy elsewhere is read",
        _marked_copy_elsewhere_is_read,
        _world("disk", "freeze", "sync", local=False, fault_every_s=0.25),
        (READS,),
    ),
    Mutation(
        "R3",
        "a lease of loans is ignored",
        _lease_of_loans_ignored,
        _world("split", "freeze", fault_every_s=0.25),
        (READS,),
    ),
    Mutation("R4", "a write under way is read", _write_under_way_is_read, _world("split", slow_ms=5.0), (READS,)),
    Mutation(
        "R3",
        "loans outlive their lender",
        _loans_outlive_their_lender,
        _world("kill blockd", "disk", "sync", fault_every_s=0.2, struck=["127.0.0.1"]),
        (READS,),
        9.0,
    ),
    Mutation("R4", "checksums are not looked at", _sums_not_looked_at, _world("rot", "migrate", checksum=True), SPOILT),
    Mutation(
        "R4",
        "checksums of another boot are believed",
        _sums_of_another_boot,
        _world("power", checksum=True, locations=1, power_s=0.1),
        ("can't be read", "not within", "writes go on"),
    ),
    Mutation("R4", "a difference is not marked", _difference_not_marked, _world("rot"), SPOILT),
    Mutation(
        "R2",
        "handles outlive their writes",
        _handles_outlive_their_writes,
        _flush("kill blockd", "split", "cut", locations=3),
        GONE,
        15.0,
    ),
    Mutation(
        "R4",
        "failures behind are forgotten",
        _failures_behind_forgotten,
        _flush("disk", slow_ms=5.0, fault_every_s=0.1),
        (DIFFERS, STORED, READS),
    ),
    Mutation(
        "R7",
        "a flush leaves some behind",
        _flush_leaves_behind,
        _flush("disk", slow_ms=20.0, fault_every_s=0.1),
        (STORED, DIFFERS),
    ),
    Mutation(
        "R4",
        "posted over another write",
        _posted_over_another,
        _flush("kill blockd", "freeze", fault_every_s=0.3),
        (READS, STORED),
    ),
    Mutation("R4", "reads don't see what is posted", _posted_not_seen_by_reads, _flush("freeze"), (READS,)),
    Mutation(
        "R7",
        "what is posted is not sent again",
        _posted_not_sent_again,
        _flush("kill blockd", fault_every_s=0.2),
        (READS, STORED),
    ),
    Mutation(
        "R2",
        "posted while the role is given up",
        _posted_while_the_role_is_given_up,
        _flush("zombie", fault_every_s=0.2),
        (READS, *GONE),
    ),
    Mutation(
        "R5",
        "retired under posted writes",
        _retired_under_posted_writes,
        _flush("takeover", "split", rare=["takeover", "split"], fault_every_s=0.3),
        (READS, *GONE),
        9.0,
    ),
    Mutation(
        "R5", "writes are not announced", _unannounced, _world("kill blockd", "freeze"), (DIFFERS, LACKS, STORED, READS)
    ),
    Mutation(
        "R5", "nothing is reconciled", _nothing_reconciled, _world("takeover", "kill blockd"), ("fenced", DIFFERS)
    ),
    Mutation("R5", "retired without a flush", _retired_unflushed, _world("power"), (DIFFERS, STORED, READS)),
    Mutation("R6", "any number is taken", _any_number, _world("migrate", repeat=0.05), (DIFFERS, READS, LACKS, STORED)),
    Mutation(
        "R6", "any session is taken", _any_session, _world("migrate", repeat=0.05), (DIFFERS, READS, LACKS, STORED)
    ),
    Mutation(
        "R6",
        "overdue writes hold back nothing",
        _overdue_forgotten,
        _world("long freeze", rare=["long freeze"], threads=4),
        (READS, LACKS),
        12.0,
    ),
    Mutation("R7", "only the local disk is flushed", _flush_here_only, _world("migrate"), (STORED,)),
    Mutation("R7", "a flush overtakes writes at leisure", _flush_overtakes, _flush("migrate"), (STORED,)),
    Mutation("R7", "a failed flush is ignored", _failed_flush_ignored, _world("disk"), (STORED,)),
    Mutation(
        "R7", "only this process is flushed", _flush_of_this_process_only, _world("kill blockd", threads=1), (STORED,)
    ),
    Mutation("R7", "synced only here", _through_only_here, _world("migrate", pairs=0.9, threads=1), (STORED,)),
    Mutation("R7", "synced only there", _through_only_there, _world("migrate", pairs=0.9, threads=1), (STORED,)),
    Mutation(
        "R7",
        "synced only here, and acknowledged early",
        _through_only_here,
        _world("migrate", pairs=0.9, threads=1, replication="flush"),
        (STORED,),
    ),
    Mutation(
        "R7",
        "synced only there, and acknowledged early",
        _through_only_there,
        _world("migrate", pairs=0.9, threads=1, replication="flush"),
        (STORED,),
    ),
    Mutation("R7", "a flush under way is taken for done", _under_way_is_flushed, _world("slow disk"), (STORED,)),
    Mutation("R7", "a role begins clean", _role_begins_clean, _world("kill blockd"), (STORED,)),
    Mutation(
        "R8",
        "an old copy is taken",
        _generations_not_compared,
        _world("old directory", rare=["old directory"]),
        (DIFFERS, LACKS, STORED, READS),
        9.0,
    ),
    Mutation(
        "R8",
        "a reboot is overlooked",
        _reboot_overlooked,
        _world("power", threads=1, locations=3, power_s=0.1, fault_every_s=0.3),
        (DIFFERS, STORED, READS),
    ),
    Mutation(
        "R8", "a missing file is made anew", _missing_file_is_new, _world("block file"), (DIFFERS, LACKS, READS, STORED)
    ),
    Mutation("R8", "a name is not synced", _name_not_synced, _world("migrate"), (STORED,)),
    Mutation("R8", "any disk is taken", _any_store, _world("swap"), ("with the disk of another",)),
    Mutation("R9", "the last copy is marked", _last_copy_marked, _world("disk", locations=1), ("no in-sync replica",)),
    Mutation("R9", "the last copy is removed", _last_copy_removed, _world("location"), ("no in-sync replica", READS)),
    Mutation("R10", "a full disk is success", _full_disk_is_success, _world("full"), (LACKS,)),
    Mutation(
        "R10", "full once is full for ever", _full_for_ever, _world("full", locations=1), ("writes do not go on",), 3.0
    ),
    Mutation(
        "R11",
        "copied without a lock",
        _copy_without_lock,
        _world("location", "slow disk"),
        (DIFFERS, LACKS, STORED, READS),
    ),
    Mutation(
        "R11",
        "in-sync without compare",
        _finish_without_compare,
        _world("location", "full", "cut"),
        (DIFFERS, LACKS, STORED, READS, "not all in-sync"),
    ),
    Mutation(
        "R11",
        "syncing is read",
        _syncing_is_read,
        _world("freeze", "sync", "slow disk", "migrate", fault_every_s=0.3),
        (READS,),
    ),
    Mutation("R11", "nothing is copied", _nothing_copied, _world("freeze", "sync"), (DIFFERS, LACKS, STORED, READS)),
    Mutation("R12", "an older metad goes on", _older_metad_accepted, _world("old metad"), ("older database",)),
    Mutation(
        "R12",
        "older metadata is believed",
        _older_metadata_believed,
        _world("old metad", fault_every_s=0.2),
        ("older database",),
    ),
    Mutation(
        "R12",
        "accepted without a higher sequence",
        _accepted_below,
        _world("sync", accept=True),
        ("older database", "registered after older metadata"),
    ),
    Mutation(
        "R12",
        "every copy is trusted",
        _all_trusted,
        _world("freeze", "kill blockd", accept=True),
        (DIFFERS, LACKS, READS, STORED),
    ),
)

RULES = tuple(f"R{number}" for number in range(1, 13))
BY_NAME = {m.name: m for m in MUTATIONS}
