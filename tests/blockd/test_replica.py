"""What a replica takes from a coordinator: sessions, numbers and epochs as tables, and fields of every wrong kind."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.blockd.conftest import OpenStore
from tests.blockd.faults import fails_once
from tests.blockd.files import UUID, block_path, descriptors, new_image, pattern, write
from ukai.blockd.files import HASH_BYTES, HOLE
from ukai.blockd.image_store import ImageStore
from ukai.blockd.replica import SESSION_LIMIT, Answer, Later, Replica
from ukai.blockd.store import Store
from ukai.errors import (
    BY_CODE,
    Damaged,
    DiskError,
    NotReady,
    RemoteProtocolError,
    StaleEpoch,
    StaleSession,
    UkaiError,
)
from ukai.messages import Header, pack, unpack

A, B = "192.0.2.1", "192.0.2.2"
TOKEN = 5000
NUMBERED = ("w", "wt", "ws", "z", "g", "f", "d", "k")
SESSION = ("fence", "r", "h", "usage")
PLAIN = ("hello", "ping")


async def run_here(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def new_replica(
    store: Store,
    registered_seq: int = 100,
    inc: str = "replica-inc",
    first_token: int = TOKEN,
    now: Callable[[], float] = time.monotonic,
) -> Replica:
    replica = Replica(store, inc, first_token, run_here, lambda _fds, _done: False, now)
    replica.registered_seq = registered_seq
    return replica


def ask(replica: Replica, header: Header, payload: bytes | None = None) -> tuple[Header, bytes]:
    """One message, as it would come from the wire, and its answer."""

    async def answered() -> Answer:
        answer = replica.handle(unpack(pack(dict(header))), payload)
        if isinstance(answer, Later):
            told: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            answer.then(lambda *a: told.set_result(a))
            return await told
        return answer if isinstance(answer, tuple) else await answer

    fields, data = asyncio.run(answered())
    return unpack(pack(dict(fields))), bytes(data) if data is not None else b""


class Sender:
    """A coordinator's side of a session, without its care."""

    def __init__(self, replica: Replica, node: str = A, inc: str = "a1", attempt: int = 1) -> None:
        self.replica = replica
        reply, _ = ask(replica, {"op": "hello", "node": node, "inc": inc, "try": attempt})
        self.token, self.number = reply["token"], 0
        assert reply["inc"] == "replica-inc"
        assert reply["registered_seq"] == replica.registered_seq

    def send(self, op: str, payload: bytes | None = None, **fields: object) -> tuple[Header, bytes]:
        header = {"op": op, "t": self.token, "i": UUID, **fields}
        if op in NUMBERED:
            header.setdefault("n", self.number)
            self.number += 1
        return ask(self.replica, header, payload)

    def write(self, data: bytes, *, block: int = 0, epoch: int = 1, generation: int = 7, **fields: object) -> None:
        """A write to a block that was stamped before."""
        image = self.replica.store.image(UUID)
        if image.generations[block] < generation:
            image.ready(block, generation, image.generations[block])
        self.send("w", data, e=epoch, b=block, o=0, g=generation, **fields)


@pytest.fixture
def replica(image: ImageStore) -> Replica:
    return new_replica(image.store)


@pytest.fixture
def sender(replica: Replica) -> Sender:
    return Sender(replica)


# --- sessions and numbers (R6)


def test_a_session_takes_its_numbers_in_order(sender: Sender, image: ImageStore) -> None:
    for n in range(4):
        sender.write(bytes([65 + n]))
    assert image.read(0, 0, 1) == b"D"


@pytest.mark.parametrize(
    ("numbers", "taken"),
    [
        ((0, 1, 2), 3),
        ((1,), 0),
        ((0, 2), 1),
        ((0, 0), 1),
        ((0, 1, 0), 2),
        ((0, 1, -1), 2),
        ((0, True), 1),
        ((0, 1.0), 1),
        ((0, None), 1),
        ((0, "1"), 1),
    ],
)
def test_a_gap_a_repetition_and_no_number_end_the_session(
    sender: Sender, image: ImageStore, numbers: tuple[object, ...], taken: int
) -> None:
    for at, number in enumerate(numbers):
        if at < taken:
            sender.write(bytes([65 + at]), n=number)
        else:
            with pytest.raises(StaleSession):
                sender.write(b"!", n=number)
            with pytest.raises(StaleSession):
                sender.write(b"!", n=at)
    # the block was stamped beforehand, so that it reads as zeros where no write was taken
    assert image.read(0, 0, 1) == (bytes([64 + taken]) if taken else b"\0")


@pytest.mark.parametrize("token", [None, "x", True, -1, TOKEN - 1, TOKEN + 1, 2**63])
@pytest.mark.parametrize("op", [*NUMBERED, *SESSION])
def test_a_foreign_token_is_refused_before_anything(sender: Sender, image: ImageStore, op: str, token: object) -> None:
    with pytest.raises(StaleSession):
        sender.send(op, b"x", t=token, e=50, b=0, o=0, g=9, l=1, c=512, ranges=[[0, 0]])
    assert image.epoch == 0
    assert set(image.generations) == {0}


def test_a_new_session_ends_the_older_one(replica: Replica, image: ImageStore) -> None:
    old = Sender(replica)
    old.write(b"old")
    new = Sender(replica, attempt=2)
    assert new.token != old.token
    with pytest.raises(StaleSession):
        old.write(b"late")
    new.write(b"new")
    with pytest.raises(StaleSession):
        old.write(b"late", n=1)
    assert image.read(0, 0, 3) == b"new"


def test_an_older_or_repeated_hello_does_not_end_the_session(replica: Replica, image: ImageStore) -> None:
    now = Sender(replica, attempt=5)
    for attempt in (5, 4, 0):
        with pytest.raises(StaleSession, match="older"):
            Sender(replica, attempt=attempt)
    now.write(b"x")
    assert image.read(0, 0, 1) == b"x"


def test_a_new_process_of_the_coordinator_begins_anew(replica: Replica) -> None:
    old = Sender(replica, inc="a1", attempt=9)
    new = Sender(replica, inc="a2", attempt=1)
    new.write(b"x")
    with pytest.raises(StaleSession):
        old.write(b"y")


def test_coordinators_of_two_nodes_do_not_disturb_each_other(replica: Replica) -> None:
    one, two = Sender(replica, A), Sender(replica, B)
    one.write(b"1", block=0)
    two.write(b"2", block=1)
    with pytest.raises(StaleSession):
        one.write(b"1", n=7)
    two.write(b"2", block=1)


def test_a_former_process_of_the_replica_is_no_longer_meant(image: ImageStore) -> None:
    old = Sender(new_replica(image.store))
    old.replica = new_replica(image.store, inc="next-inc", first_token=TOKEN + 4096)
    for op in (*NUMBERED, *SESSION):
        with pytest.raises(StaleSession):
            old.send(op, b"x", e=1, b=0, o=0, g=9, l=1, c=512, ranges=[])


def test_sessions_are_bounded(replica: Replica) -> None:
    first = Sender(replica, "10.0.0.0")
    for n in range(SESSION_LIMIT):
        Sender(replica, f"10.0.1.{n}")
    assert len(replica.sessions) == len(replica.by_node) == SESSION_LIMIT
    with pytest.raises(StaleSession):
        first.write(b"x")


def test_a_process_that_is_not_registered_does_nothing(image: ImageStore) -> None:
    replica = new_replica(image.store)
    sender = Sender(replica)
    replica.registered_seq = -1
    with pytest.raises(NotReady):
        Sender(replica, B)
    for op in (*NUMBERED, *SESSION, "ping"):
        with pytest.raises(NotReady):
            sender.send(op, b"x", e=9, b=0, o=0, g=9, l=1, c=512, ranges=[[0, 1]], roles={})
    assert image.epoch == 0


# --- epochs (R1)


@pytest.mark.parametrize("op", [*NUMBERED, "fence"])
def test_an_epoch_that_is_over_is_refused_before_a_file_is_touched(sender: Sender, image: ImageStore, op: str) -> None:
    sender.write(b"x", epoch=8)
    meta = (Path(image.directory) / ".ukai.json").read_bytes()
    with pytest.raises(StaleEpoch) as caught:
        sender.send(op, b"y", e=7, b=0, o=0, l=1, g=9, least=0, ranges=[[0, 4]], w=[[0, 0, 9, 1]])
    assert caught.value.details == {"epoch": 8}
    assert image.read(0, 0, 1) == b"x"
    assert list(image.generations) == [7, 0, 0, 0, 0]
    assert (Path(image.directory) / ".ukai.json").read_bytes() == meta
    assert not block_path(image.store, 1).exists()


@pytest.mark.parametrize("op", [*NUMBERED, "fence"])
def test_a_higher_epoch_is_persisted_and_told(reopen: OpenStore, op: str) -> None:
    replica = new_replica(new_image(reopen()).store)
    heard: list[tuple[str, int]] = []
    replica.on_epoch = lambda uuid, epoch: heard.append((uuid, epoch))
    sender = Sender(replica)
    sender.write(b"x", epoch=3)
    sender.send(op, b"y", e=4, b=0, o=0, l=1, g=7, least=0, ranges=[[0, 0]], w=[[0, 0, 7, 1]])
    assert heard == [(UUID, 3), (UUID, 4)]
    assert reopen().image(UUID).epoch == 4


def test_ping_tells_which_roles_are_over(sender: Sender, image: ImageStore) -> None:
    image.admit(6)
    other = "no-such-image"
    reply, _ = ask(sender.replica, {"op": "ping", "roles": {UUID: 5, other: 1}})
    assert reply["stale"] == {UUID: 6}
    assert ask(sender.replica, {"op": "ping", "roles": {UUID: 6}})[0]["stale"] == {}
    assert ask(sender.replica, {"op": "ping"})[0]["stale"] == {}


def test_a_fence_tells_how_long_ago_another_writer_may_have_been_confirmed(image: ImageStore) -> None:
    """That one reads until a lease after it: whoever fences waits as long (R3)."""
    clock = [100.0]
    replica = new_replica(image.store, now=lambda: clock[0])
    old, new = Sender(replica, A), Sender(replica, B)

    def ago_ms(epoch: int, passed_s: float = 0.5) -> int:
        clock[0] += passed_s
        ago = new.send("fence", e=epoch)[0]["ago"]
        assert ago == int(replica.confirmed_ago_s(UUID, B) * 1000)
        return int(ago)

    def ping(sender: Sender, *uuids: str) -> None:
        ask(replica, {"op": "ping", "t": sender.token, "roles": dict.fromkeys(uuids, 1)})

    assert ago_ms(2) == 500, "the process before this one may have answered anything"
    clock[0] += 9
    ping(old, UUID, "other")
    assert ago_ms(2) == 500
    ping(new, UUID)
    assert ago_ms(3) == 1000, "to itself whoever fences owes nothing"
    ping(old, UUID)  # it is told of the higher epoch, but that answer may be lost
    assert ago_ms(3) == 500
    Sender(replica, A, attempt=2)
    assert ago_ms(3) == 1000, "what it has heard outlives the session"
    ping(Sender(replica, A, attempt=3), "other")
    assert ago_ms(3) == 12000, "it holds the role no more"


def test_a_ping_with_a_token_of_another_session_is_refused(sender: Sender) -> None:
    ask(sender.replica, {"op": "ping", "roles": {}, "t": sender.token})
    with pytest.raises(StaleSession):
        ask(sender.replica, {"op": "ping", "roles": {}, "t": sender.token + 1})


# --- data


def test_what_is_sent_is_there(sender: Sender, image: ImageStore) -> None:
    data = pattern(8192, 4)
    sender.send("g", e=1, g=7, least=0, ranges=[[2, 2]])
    sender.send("w", data, e=1, b=2, o=0, g=7)
    sender.send("z", e=1, b=2, o=100, l=50, g=7)
    wanted = data[:100] + bytes(50) + data[150:]
    assert sender.send("r", b=2, o=0, l=8192, g=7) == ({"v": 1}, wanted)
    assert sender.send("f", e=1, ranges=[[2, 2]])[0]["failed"] == []
    assert image.unflushed == set()
    hashes = sender.send("h", b=2, o=0, l=8192, c=4096)[1]
    assert len(hashes) == 2 * HASH_BYTES
    assert sender.send("usage", ranges=[[0, 4]])[0]["allocated"] == 8192
    assert sender.send("usage", all=True)[0]["allocated"] == 8192


def test_a_block_never_written_reads_and_hashes_as_zeros(sender: Sender) -> None:
    assert sender.send("r", b=1, o=5, l=10, g=0)[1] == bytes(10)
    assert sender.send("h", b=1, o=0, l=8192, c=4096)[1] == HOLE * 2
    with pytest.raises(Damaged):
        sender.send("r", b=1, o=5, l=10, g=3)


def test_a_read_names_the_generation_it_wants(sender: Sender) -> None:
    sender.write(b"x", generation=7)
    for generation in (0, 6, 8):
        with pytest.raises(Damaged):
            sender.send("r", b=0, o=0, l=1, g=generation)
    # a resync wants no older copy; a source that has not heard yet of a new generation is none
    assert sender.send("r", b=0, o=0, l=1, least=6)[1] == b"x"
    assert sender.send("r", b=1, o=0, l=4, least=0)[1] == bytes(4)
    with pytest.raises(Damaged):
        sender.send("r", b=0, o=0, l=1, least=8)


def test_stamped_blocks_have_files_and_the_generation(sender: Sender, image: ImageStore) -> None:
    sender.send("g", e=1, g=9, least=0, ranges=[[0, 1], [1, 2]])
    assert list(image.generations) == [9, 9, 9, 0, 0]
    assert sender.send("r", b=1, o=0, l=4, g=9)[1] == bytes(4)
    with pytest.raises(StaleEpoch):
        sender.send("g", e=1, g=8, least=0, ranges=[[0, 0]])


def test_a_resync_makes_ready_writes_and_completes(sender: Sender, image: ImageStore) -> None:
    sender.write(b"older", generation=3)
    block_path(image.store, 0).unlink()
    sender.send("k", e=1, ranges=[[0, 1]])
    assert sender.send("h", b=0, o=0, l=8192, c=8192)[1] == HOLE
    sender.send("w", pattern(8192, 1), e=1, b=0, o=0, g=9)
    sender.send("d", e=1, b=0, g=9)
    assert sender.send("r", b=0, o=0, l=8192, g=9)[1] == pattern(8192, 1)
    assert image.unflushed == set()


def test_making_ready_fails_where_it_can_not_be_stored_that_a_block_is_of_no_generation(
    sender: Sender, image: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a copy made in part would pass for the whole one after a power cut (R8, R11)."""
    write(image, 0, 0, b"data", 5)
    image.admit(1)
    fails_once(monkeypatch, image.disk, "fdatasync")
    with pytest.raises(DiskError, match=r"fdatasync of .*\.ukai\.gen"):
        sender.send("k", e=1, ranges=[[0, 0]])
    sender.send("k", e=1, ranges=[[0, 0]])


def test_a_late_repetition_of_making_ready_alters_no_good_block(sender: Sender, image: ImageStore) -> None:
    sender.send("k", e=1, ranges=[[0, 0]])
    sender.send("w", b"good", e=1, b=0, o=0, g=9)
    sender.send("d", e=1, b=0, g=9)
    with pytest.raises(StaleSession):
        sender.send("k", e=1, ranges=[[0, 0]], n=0)
    assert image.read(0, 0, 4) == b"good"
    assert image.generations[0] == 9


def test_a_block_that_stays_empty_forgets_what_lay_there(sender: Sender, image: ImageStore) -> None:
    sender.write(b"of another time")
    sender.send("k", e=1, ranges=[[0, 1]], empty=True)
    assert list(image.generations[:2]) == [0, 0]
    assert not block_path(image.store, 1).exists()
    sender.send("g", e=1, g=9, least=0, ranges=[[0, 0]])
    assert sender.send("r", b=0, o=0, l=5, g=9)[1] == bytes(5)


def test_an_older_copy_is_neither_stamped_nor_written_nor_hashed(sender: Sender, image: ImageStore) -> None:
    sender.write(b"old", generation=5)
    for op, fields in (
        ("g", {"g": 9, "least": 7, "ranges": [[0, 0]]}),
        ("w", {"b": 0, "o": 0, "g": 9}),
        ("h", {"b": 0, "o": 0, "l": 512, "c": 512, "least": 7}),
    ):
        with pytest.raises(Damaged, match="generation 5 is below"):
            sender.send(op, b"x", e=1, **fields)
    assert image.generations[0] == 5


def test_several_writes_are_done_in_their_order(sender: Sender, image: ImageStore) -> None:
    for block in (0, 1):
        image.ready(block, 9, 0)
    rows = [[0, 0, 9, 4], [1, 2, 9, 3], [0, 2, 9, 4]]
    assert sender.send("wt", b"aaaabbbcccc", e=1, w=rows)[0] == {"v": 1}
    assert (image.read(0, 0, 7), image.read(1, 0, 6)) == (b"aacccc\0", b"\0\0bbb\0")
    assert image.unflushed == {0, 1}


def test_of_several_writes_those_that_fail_are_told(sender: Sender, image: ImageStore) -> None:
    """An older copy is not written (R8); the others are."""
    for block, generation in ((0, 9), (1, 5), (2, 9)):
        image.ready(block, generation, 0)
    reply, _ = sender.send("wt", b"aabbccdd", e=1, w=[[0, 0, 9, 2], [1, 0, 9, 2], [2, 0, 9, 2], [0, 2, 9, 2]])
    ((number, error),) = reply["failed"]
    assert (number, error["err"]) == (1, "damaged")
    assert "generation 5 is below" in error["msg"]
    assert (image.read(0, 0, 4), image.read(1, 0, 2), image.read(2, 0, 2)) == (b"aadd", b"\0\0", b"cc")
    assert image.generations[1] == 5
    image.admit(4)
    with pytest.raises(StaleEpoch):
        sender.send("wt", b"zz", e=3, w=[[0, 0, 9, 2]])
    assert image.read(0, 0, 2) == b"aa"


def test_a_flush_that_fails_names_the_blocks(sender: Sender, image: ImageStore) -> None:
    sender.write(b"x", block=0)
    sender.write(b"x", block=1)
    block_path(image.store, 1).unlink()
    assert [b for b, _ in sender.send("f", e=1, ranges=[[0, 1]])[0]["failed"]] == [1]
    assert [b for b, _ in sender.send("f", e=1, ranges=[[1, 1]])[0]["failed"]] == [1]
    with pytest.raises(Damaged):
        sender.send("d", e=1, b=1, g=7)


@pytest.mark.parametrize("late", [False, True])
def test_a_flush_beside_one_that_failed_is_no_success(
    image: ImageStore, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """The kernel tells of an error once, and the thread that was told may be heard last."""
    write(image, 0, 0, b"x", 7)
    replica = new_replica(image.store)
    errors = [OSError(errno.EIO, "EIO")]

    def fdatasync(fd: int) -> None:
        if errors and os.fstat(fd).st_size == 8192:
            raise errors.pop()

    monkeypatch.setattr(image.disk, "fdatasync", fdatasync)

    async def run_disk(function: Callable[..., Any], *args: Any) -> Any:
        first = bool(errors)
        result = function(*args)
        for _ in range(10 if first else 1):
            await asyncio.sleep(0)
        return result

    replica.run_disk = run_disk

    async def both() -> list[dict[int, str]]:
        first = asyncio.ensure_future(replica.flush(image, [0]))
        for _ in range(4 if late else 0):
            await asyncio.sleep(0)
        assert bool(errors) is not late
        return [await replica.flush(image, [0]), await first]

    assert [list(failed) for failed in asyncio.run(both())] == [[0], [0]]


def test_flushes_that_wait_for_another_go_together(image: ImageStore) -> None:
    for block in range(3):
        write(image, block, 0, b"x", 7)
    replica = new_replica(image.store)
    flushed: list[list[int]] = []
    gate = asyncio.Event()

    async def run_disk(function: Callable[..., Any], work: list[tuple[int, int, str]]) -> Any:
        flushed.append([block for block, _, _ in work if block >= 0])
        await gate.wait()
        return function(work)

    replica.run_disk = run_disk

    async def all_of_them() -> None:
        first = asyncio.ensure_future(replica.flush(image, [0]))
        while not flushed:  # noqa: ASYNC110  # the thread that it begins is played here
            await asyncio.sleep(0)
        others = [asyncio.ensure_future(replica.flush(image, [block])) for block in (2, 1, 1, 0)]
        await asyncio.sleep(0)
        gate.set()
        assert await asyncio.gather(first, *others) == [{}] * 5

    asyncio.run(all_of_them())
    assert flushed == [[0], [0, 1, 2]]


def test_a_write_with_its_flush_is_answered_when_both_are_done(
    sender: Sender, image: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    image.ready(0, 7, 0)
    synced: list[bytes] = []
    real = image.disk.fdatasync

    def fdatasync(fd: int) -> None:
        synced.append(os.pread(fd, 4, 0))
        real(fd)

    monkeypatch.setattr(image.disk, "fdatasync", fdatasync)
    assert sender.send("ws", b"data", e=1, b=0, o=0, g=7)[0] == {"failed": [], "v": 1}
    assert synced[-1] == b"data"
    assert image.unflushed == set()
    monkeypatch.setattr(image.disk, "fdatasync", _broken)
    for _ in range(2):
        assert [b for b, _ in sender.send("ws", b"more", e=1, b=0, o=0, g=7)[0]["failed"]] == [0]


def _broken(_fd: int) -> None:
    raise OSError(errno.EIO, "EIO")


@pytest.mark.expect_log("defect after a flush")
def test_a_flush_without_a_thread(image: ImageStore) -> None:
    for block in range(3):
        write(image, block, 0, b"x", 7)
    replica = new_replica(image.store)
    begun: list[tuple[int, Callable[[list[int]], None]]] = []

    def sync(fds: Sequence[int], done: Callable[[list[int]], None]) -> bool:
        begun.append((len(fds), done))
        return True

    replica.sync = sync
    heard: list[dict[int, str]] = []

    def broken(_failed: dict[int, str]) -> None:
        raise ValueError("a defect")

    async def flushed() -> None:
        replica.flush_soon(image, [0, 1], broken)
        replica.flush_soon(image, [2], heard.append)
        replica.flush_soon(image, [0, 1], heard.append)
        begun[0][1]([0, 0, errno.EIO])  # the generations, which were new, and the two blocks
        assert heard == [], "they wait for the next one"
        assert [count for count, _ in begun] == [3, 3], "the generations again, which tell of it, and two blocks"
        begun[1][1]([0, 0, 0])

    before = descriptors()
    asyncio.run(flushed())
    assert heard == [{}, {1: f"fdatasync of {image.path(1)}: {os.strerror(errno.EIO)}"}]
    assert list(image.poisoned) == [1]
    assert len(descriptors()) <= len(before)


def test_what_a_flush_finds_out_is_kept_when_nobody_waits_any_more(
    image: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(image, 0, 0, b"x", 7)
    monkeypatch.setattr(image.disk, "fdatasync", _broken)
    replica = new_replica(image.store)
    before = descriptors()

    async def given_up() -> None:
        begun, go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def run_disk(function: Callable[..., Any], *args: Any) -> Any:
            begun.set()
            await go_on.wait()
            result = function(*args)
            ended.set()
            return result

        replica.run_disk = run_disk
        flush = asyncio.create_task(replica.flush(image, [0]))
        await begun.wait()
        flush.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flush
        go_on.set()
        await ended.wait()
        await asyncio.sleep(0)

    asyncio.run(given_up())
    assert list(image.poisoned) == [0]
    assert len(descriptors()) == len(before)


def test_no_data_of_the_image_is_damage(sender: Sender) -> None:
    for op in (*NUMBERED, *SESSION):
        with pytest.raises(Damaged):
            sender.send(op, b"x", i="no-such", e=1, b=0, o=0, g=9, l=1, c=512, ranges=[])


# --- malformed fields

FIELDS: dict[str, Header] = {
    "hello": {"node": B, "inc": "b1", "try": 3},
    "ping": {"roles": {UUID: 5}},
    "fence": {"i": UUID, "e": 5},
    "w": {"i": UUID, "e": 5, "b": 1, "o": 3, "g": 9},
    "wt": {"i": UUID, "e": 5, "w": [[1, 3, 9, 1]]},
    "ws": {"i": UUID, "e": 5, "b": 1, "o": 3, "g": 9},
    "z": {"i": UUID, "e": 5, "b": 1, "o": 3, "l": 4, "g": 9},
    "g": {"i": UUID, "e": 5, "g": 9, "least": 0, "ranges": [[1, 1]]},
    "f": {"i": UUID, "e": 5, "ranges": [[0, 0]]},
    "d": {"i": UUID, "e": 5, "b": 0, "g": 9},
    "k": {"i": UUID, "e": 5, "ranges": [[1, 1]], "empty": False},
    "r": {"i": UUID, "b": 0, "o": 0, "l": 1, "g": 7},
    "h": {"i": UUID, "b": 0, "o": 0, "l": 512, "c": 512, "least": 7},
    "usage": {"i": UUID, "ranges": [[0, 4]]},
}
OPTIONAL = {("ping", "roles"), ("k", "empty"), ("h", "least"), *((op, "ranges") for op in ("g", "f", "k", "usage"))}
TEXTS = {"i", "node", "inc"}
DEEP: list[Any] = []
for _ in range(900):
    DEEP = [DEEP]

WRONG: dict[str, list[object]] = {
    "text": [None, 5, True, b"x", [], {}, DEEP, "x" * 5000],
    "number": [None, "5", True, 1.0, -1, 2**63, 2**64 - 1, [], {}, DEEP],
    "ranges": [
        None,
        5,
        "0-1",
        {},
        [5],
        [[0]],
        [[0, "1"]],
        [[1, 0]],
        [[-1, 0]],
        [[0, 5]],
        [[0, True]],
        DEEP,
        [[0, 2**62]],
    ],
    "w": [
        None,
        5,
        "x",
        {},
        [],
        [5],
        [[1, 3, 9]],
        [[1, 3, 9, 1, 0]],
        [["1", 3, 9, 1]],
        [[1, None, 9, 1]],
        [[1, 3, 9.0, 1]],
        [[1, 3, 9, True]],
        [[5, 3, 9, 1]],
        [[-1, 3, 9, 1]],
        [[1, -1, 9, 1]],
        [[1, 8192, 9, 1]],
        [[1, 3, 0, 1]],
        [[1, 3, 9, 0]],
        [[1, 3, 9, -1]],
        [[1, 3, 9, 2]],
        [[1, 3, 9, 1], [1, 4, 9, 1]],
        [[1, 3, 9, 2], [1, 4, 9, -1]],
        DEEP,
    ],
    "roles": [None, 5, "x", [], DEEP],
    "empty": [None, 5, "x", [], DEEP],
}
BOUNDS: list[tuple[str, str, object]] = [
    ("w", "b", 5),
    ("w", "o", 8190),
    ("w", "g", 0),
    ("ws", "b", 5),
    ("ws", "o", 8190),
    ("z", "b", 5),
    ("z", "o", 8190),
    ("z", "l", 0),
    ("z", "l", 8190),
    ("z", "l", 2**62),
    ("z", "g", 0),
    ("g", "g", 0),
    ("d", "b", 5),
    ("d", "g", 0),
    ("r", "l", 0),
    ("r", "l", 8193),
    ("r", "o", 8192),
    ("r", "l", 2**40),
    ("h", "l", 0),
    ("h", "l", 8193),
    ("h", "l", 2**40),
    ("h", "c", 511),
    ("h", "c", 0),
]


def _malformed() -> list[tuple[str, str, Header]]:
    out = []
    for op, fields in FIELDS.items():
        for name in fields:
            kind = "text" if name in TEXTS else name if name in WRONG else "number"
            if (op, name) not in OPTIONAL:
                out.append((op, f"{name} missing", {k: v for k, v in fields.items() if k != name}))
            out += [(op, f"{name} wrong {n}", {**fields, name: value}) for n, value in enumerate(WRONG[kind])]
    out += [(op, f"{name} {value}", {**FIELDS[op], name: value}) for op, name, value in BOUNDS]
    return out


def test_the_table_of_fields_names_every_op(replica: Replica) -> None:
    assert set(FIELDS) == {*replica.numbered, *replica.of_session, *replica.plain}
    assert (*replica.numbered, *replica.of_session, *replica.plain) == (*NUMBERED, *SESSION, *PLAIN)


def _state(image: ImageStore) -> object:
    files = {p.name: p.read_bytes() for p in sorted(Path(image.directory).iterdir())}
    return files, list(image.generations), image.epoch, set(image.unflushed), dict(image.poisoned)


def test_every_op_takes_its_fields_as_they_should_be(reopen: OpenStore) -> None:
    for op, fields in FIELDS.items():
        store = reopen()
        image = store.images.get(UUID) or new_image(store)
        sender = Sender(new_replica(store))
        sender.write(b"here", epoch=image.epoch, generation=max(7, image.generations[0]))
        image.set_generation(0, 7)
        image.set_generation(1, 9 if op in ("w", "wt", "ws", "z") else 0)
        block_path(store, 1).write_bytes(bytes(8192))
        sender.send(op, b"x" if op in ("w", "wt", "ws") else None, **fields)


@pytest.mark.parametrize(("op", "what", "fields"), _malformed(), ids=lambda v: v if isinstance(v, str) else "")
def test_a_malformed_field_is_an_error_and_alters_nothing(
    sender: Sender, image: ImageStore, op: str, what: str, fields: Header
) -> None:
    sender.write(b"here")
    before = _state(image)
    header = {"op": op, "t": sender.token, **fields}
    if op in NUMBERED:
        header["n"] = sender.number
    with pytest.raises(UkaiError) as caught:
        ask(sender.replica, header, b"data" if op in ("w", "ws") else None)
    assert isinstance(caught.value, RemoteProtocolError | Damaged), what
    assert len(caught.value.message) < 400
    assert _state(image) == before


@pytest.mark.parametrize("payload", [None, b"", bytes(8193)])
def test_a_write_without_data_or_with_too_much_alters_nothing(
    sender: Sender, image: ImageStore, payload: bytes | None
) -> None:
    with pytest.raises(RemoteProtocolError):
        sender.send("w", payload, e=5, b=0, o=0, g=9)
    assert image.epoch == 0
    assert set(image.generations) == {0}


@pytest.mark.parametrize("op", [None, 5, "", "x" * 10_000, "cr", DEEP, [], {}, True, b"w"])
def test_an_op_that_does_not_exist_is_refused(sender: Sender, op: object) -> None:
    for header in ({"op": op, "t": sender.token, "n": 0}, {}):
        with pytest.raises(RemoteProtocolError) as caught:
            ask(sender.replica, header)
        assert len(caught.value.message) < 200


def test_every_refusal_has_a_code_for_the_wire() -> None:
    assert {"stale-epoch", "stale-session", "not-ready", "damaged", "protocol-remote"} <= set(BY_CODE)
